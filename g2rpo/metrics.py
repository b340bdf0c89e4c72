"""The metrics of a run: metrics.jsonl, and what its rows say in a person's words.

`MetricsLog` keeps metrics.jsonl, one strict JSON object a line, in a way that survives being killed
between any two bytes. `changes` compares the first evaluation with the last, `closing_line` says in
words what came of a run.

A row is a flat dict, by update. "So far" means since update 0, over resumes; anything else is of
that update alone. A number that is not finite is null. Update 0, the state before training, has
`update`, `seconds`, `evaluations`, `seconds/evaluation` and the evaluated rewards, and no more.

    update               integer, the one obligatory key; rises from row to row
    seconds              s of wall clock in updates so far; evaluations of the policy are not in it
    evaluations          transformer evaluations of training so far: one a row of a batch, forwards
                         with gradients included, evaluations of the policy not
    evaluations_per_second    transformer evaluations of this update over its seconds
    lr                   learning rate
    loss                 policy loss, mean over branches and steps of the optimizer
    ratio_mean           importance ratio, mean over branches; 1 on-policy
    ratio_max            importance ratio, the largest
    clip_fraction        share of branches with |ratio - 1| > clip_range, from 0 to 1
    approx_kl            nats; mean of ratio - 1 - log(ratio), estimates KL(old, current policy)
    kl                   KL(current, starting policy) an element, where objective.kl is not 0
    grad_norm            norm of the whole gradient before clipping, mean over the update's steps
    advantage_std        of the advantages, summed over granularities and rewards, before clipping
    reward_groups        groups that count, of rewards with weight > 0: one for every such reward,
                         granularity, prompt and SDE position
    zero_spread_groups   those among them with all rewards equal: advantage 0
    failed_groups        those among them with a NaN or infinite reward: advantage 0
    skipped_updates      updates so far whose every gradient was 0 or not finite: no weight moved;
                         one whose rollout was not finite has no scores either
    seconds/<phase>      s of wall clock: prompts (their embedding), anchor, completions, rewards,
                         update, evaluation; waiting, of several ranks: for the others' draws. Of
                         several the longest
    peak_memory_bytes    bytes, of this process so far: allocated on the GPU, or else resident; of
                         several ranks the largest

    anchor/<reward>/mean           images of the deterministic anchors, one a prompt
    rollout/<reward>/mean, /std    images of the finished branches, all positions and granularities
    rollout/<reward>/failed        those of them with a score that is not finite
    truncated_prompts/<reward>     prompts with more tokens than it reads, since this process began;
                                   of rewards that count them
    reward/<name>/mean, /std       the fixed evaluation: rewards, where a row carries one
    reward/<name>/low, /high       95 % interval of that mean, a bootstrap over the images
    reward/<name>/failed           scores that are not finite
    reward/<name>/win_rate         share of images better than the starting policy's of the same
                                   prompt and noise, equal ones counted a half; not at update 0
    reward/<name>/weight           at update 0 alone: its weight in the advantages
    heldout/<name>/...             the same of those that only judge, which have no weight
    heldout_fallen                 of those, the ones whose mean is below the interval it started
                                   in, while a trained reward is above its start; see hacking.py
    images/<name>/mean             what the model says of them by image_metrics: of the digits
                                   pairwise_distance and coverage
    images/diversity/mean          the same images: a pixel's standard deviation over those of one
                                   prompt, mean over pixels and prompts; no reward sees it

Rewards are as their functions return them, unweighted. Mean and standard deviation (n - 1) are over
the images whose score is finite.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Row = dict[str, Any]
# First part of a key -> what a person reads.
KINDS = {"reward": "reward", "heldout": "held-out", "images": "images"}


class MetricsLog:
    """The rows of metrics.jsonl, in order of `update`.

    NaN and infinities have no spelling in JSON; they are written as null and read back as None, so
    None means "was not a finite number". A last line cut short by a kill is left out by `rows` and
    removed by the next `append`; every other line that is not a row is an error.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._last_update: int | None = None  # None until the file has been looked at

    def append(self, row: Row) -> None:
        """Adds one row and returns once it is on the disk.

        Values are numbers (NumPy's too), strings, booleans or None. Raises TypeError for anything
        else and ValueError unless `update` is an integer greater than the last row's.
        """
        plain = {key: _plain(key, value) for key, value in row.items()}
        update = plain.get("update")
        if type(update) is not int or update < 0:
            raise ValueError(f"row['update'] is {update!r}, expected an integer >= 0")
        if self._last_update is None:
            self._last_update = -1
            if self.path.exists():
                self.truncate(after_update=sys.maxsize)  # all it does is drop a torn line
        if update <= self._last_update:
            raise ValueError(
                f"row['update'] is {update}, but {self.path} already ends with update"
                f" {self._last_update}; truncate() it first when resuming"
            )
        with self.path.open("ab") as file:
            file.write(json.dumps(plain, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._last_update = update

    def rows(self) -> list[Row]:
        """All complete rows. Raises FileNotFoundError, or ValueError naming file and line."""
        return [row for _, row in self._lines()]

    def truncate(self, after_update: int) -> None:
        """Keeps the rows with update <= after_update; a reader sees the old file or the new one."""
        kept = [(line, row) for line, row in self._lines() if row["update"] <= after_update]
        write_beside(self.path, b"".join(line + b"\n" for line, _ in kept))
        self._last_update = kept[-1][1]["update"] if kept else -1

    def _lines(self) -> Iterator[tuple[bytes, Row]]:
        lines = self.path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            last = number == len(lines)  # what follows the last newline: nothing, or a torn line
            if last and not line:
                return
            try:
                row = json.loads(line, parse_constant=_refuse_constant)
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                if last:
                    return
                raise ValueError(f"{self.path}, line {number}: not strict JSON: {error}") from error
            if not isinstance(row, dict) or type(row.get("update")) is not int:
                raise ValueError(
                    f"{self.path}, line {number}: expected an object with an integer 'update',"
                    f" got {line[:80]!r}"
                )
            yield line, row


def _plain(key: str, value: object) -> object:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(
        f"row[{key!r}] is a {type(value).__name__}, expected a number, a string, a boolean or None"
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def write_beside(path: str | Path, data: bytes) -> None:
    """Replaces a file's content at once: written beside it, synced, renamed over it."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")  # what a kill leaves here, the next write replaces
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    if os.name == "posix":  # the rename itself is only durable once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@dataclass(frozen=True)
class Change:
    """One reward on the fixed prompts and noises, at the first and the last evaluation of a run."""

    kind: str  # "reward" (trained on) or "heldout" (only judged by)
    name: str
    first_update: int
    last_update: int
    before: float | None  # mean over the images; None where it was not a finite number
    after: float | None
    before_std: float | None
    after_std: float | None
    before_interval: tuple[float, float] | None = None  # 95 %, where the row has it
    after_interval: tuple[float, float] | None = None
    win_rate: float | None = None  # of the last against the first
    weight: float | None = None  # in the advantages, where the first row has it

    @property
    def label(self) -> str:
        """What a person reads of its part in the run."""
        return "reported" if self.weight == 0 else KINDS[self.kind]

    @property
    def difference(self) -> float | None:
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def direction(self) -> str:
        """What happened in words; "stayed" in the digits shown, "" where nothing compares."""
        if self.difference is None or self.first_update == self.last_update:
            return ""
        if number(self.before) == number(self.after):
            return "stayed"
        return "rose" if self.difference > 0 else "fell"


def changes(rows: Sequence[Row]) -> list[Change]:
    """Every evaluated reward, then every held-out one, in the order the rows name them."""
    rows_of: dict[tuple[str, str], tuple[Row, Row]] = {}  # first and last
    for row in rows:
        for key in row:
            kind, _, rest = key.partition("/")
            if kind in KINDS and rest.endswith("/mean"):
                reward = (kind, rest.removesuffix("/mean"))
                rows_of[reward] = (rows_of.get(reward, (row, row))[0], row)
    found = []
    for (kind, name), (first, last) in rows_of.items():
        key = f"{kind}/{name}"
        ends = [finite(row, f"{key}/{which}") for which in ("mean", "std") for row in (first, last)]
        intervals = [_interval(row, key) for row in (first, last)]
        more = finite(last, f"{key}/win_rate"), finite(first, f"{key}/weight")
        found.append(Change(kind, name, first["update"], last["update"], *ends, *intervals, *more))
    return sorted(found, key=lambda change: list(KINDS).index(change.kind))


def finite(row: Row, key: str) -> float | None:
    """A row's number; None where it has none, or one that is not finite."""
    value = row.get(key)
    return None if value is None or not math.isfinite(value) else value


def _interval(row: Row, key: str) -> tuple[float, float] | None:
    low, high = finite(row, f"{key}/low"), finite(row, f"{key}/high")
    return None if low is None or high is None else (low, high)


def phase_seconds(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Seconds of every phase in each row, in the order in which the rows name the phases."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("seconds/"))
    return {key.removeprefix("seconds/"): [row.get(key) or 0.0 for row in rows] for key in keys}


def closing_line(rows: Sequence[Row], run_dir: str | Path, warning: str = "") -> str:
    """In plain ASCII: what rose and what fell, a warning if there is one, what it took, where the
    files are."""
    found = changes(rows)
    last = rows[-1] if rows else {"update": 0}
    if not found:
        outcome = "No reward has been evaluated yet"
    elif found[0].first_update == found[0].last_update:
        outcome = f"Evaluated only at update {found[0].last_update}: no change to report"
    else:
        outcome = "; ".join(
            f"{label}: " + ", ".join(_outcome(change) for change in found if change.kind == kind)
            for kind, label in KINDS.items()
            if any(change.kind == kind for change in found)
        )
        outcome = outcome[0].upper() + outcome[1:]
        if found[0].last_update != last["update"]:
            outcome += f" (last evaluated at update {found[0].last_update})"
    return (
        f"{outcome}. {f'{warning}. ' if warning else ''}{count(last['update'], 'update')},"
        f" {count(last.get('evaluations') or 0, 'evaluation')} of the transformer and"
        f" {duration(last.get('seconds') or 0.0)} of training; report.html, curves.png and samples/"
        f" are in {run_dir}"
    )


def _outcome(change: Change) -> str:
    before, after = number(change.before), number(change.after)
    if change.direction in ("rose", "fell"):
        return f"{change.name} {change.direction} from {before} to {after}"
    if change.direction == "stayed":
        return f"{change.name} stayed at {after}"
    return f"{change.name} cannot be compared (it was not a finite number)"


def number(value: float | None, sign: bool = False) -> str:
    """Three decimals where they say something, three digits where not; None is a dash."""
    if value is None:
        return "-"
    plus = "+" if sign else ""
    plain = value == 0 or 0.01 <= abs(value) < 1000
    return format(value, f"{plus}.3f" if plain else f"{plus}.3g")


def count(items: int, noun: str) -> str:
    return f"{items:,} {noun}" + ("" if items == 1 else "s")


def size(bytes: int) -> str:
    """4.2 MB, 12.9 GB, 80 GB: three digits, in powers of a thousand."""
    value, unit = float(bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 84.2 s, 12 min 05 s, 3 h 07 min."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def clock(seconds: float) -> str:
    """Seconds as 1:24 or 2:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
