"""What a run writes down while it trains, and what a person sees of it meanwhile.

`MetricsLog` keeps metrics.jsonl, one strict JSON object a line, in a way that survives being killed
between any two bytes. `Display` is the progress shown by the trainer: a small live panel on a
terminal, plain lines anywhere else. `closing_line` says in words what came of it.

A metrics row is a flat dict; `update` is its one obligatory key, and update 0 is the state before
training. `seconds`, `evaluations` and `skipped_updates` are totals so far; counts of groups and
`seconds/<phase>` are of that update alone. The keys `reward/<name>/mean` and `heldout/<name>/mean`
(with `/std`) are there only in rows where the fixed prompts and noises were evaluated.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]
KINDS = {"reward": "reward", "heldout": "held-out"}  # first part of a key -> what a person reads


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
    ends: dict[tuple[str, str], tuple[Row, Row]] = {}
    for row in rows:
        for key in row:
            kind, _, rest = key.partition("/")
            if kind in KINDS and rest.endswith("/mean"):
                reward = (kind, rest.removesuffix("/mean"))
                ends[reward] = (ends.get(reward, (row, row))[0], row)
    found = []
    for (kind, name), (first, last) in ends.items():
        mean, std = f"{kind}/{name}/mean", f"{kind}/{name}/std"
        values = [first[mean], last[mean], first.get(std), last.get(std)]
        finite = [None if v is None or not math.isfinite(v) else v for v in values]
        found.append(Change(kind, name, first["update"], last["update"], *finite))
    return sorted(found, key=lambda change: list(KINDS).index(change.kind))


def closing_line(rows: Sequence[Row], run_dir: str | Path) -> str:
    """Two sentences in plain ASCII: what rose and what fell, what it took, where the files are."""
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
        f"{outcome}. {count(last['update'], 'update')},"
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


class Display:
    """Shows a run while it trains; a context manager that the trainer drives.

    On a terminal: four lines, redrawn four times a second by a thread of their own, while whatever
    else is printed, logged or warned scrolls by above them. Elsewhere (a file, CI, TERM=dumb):
    plain lines without control codes, one for every row that carries an evaluation, one for another
    row if none was printed in the last 5 s, and a sign of life every 30 s inside a long update.

    total_updates: where the bar ends, >= 1.
    evaluations_per_update: training evaluations of one update, >= 1; they move the bar inside it.
    console: where to; standard output by default.
    """

    WIDTH = 100  # columns; more only spreads the eye
    ROW_SECONDS = 5.0
    LIFE_SECONDS = 30.0

    def __init__(
        self, total_updates: int, evaluations_per_update: int, console: Console | None = None
    ) -> None:
        if total_updates < 1:
            raise ValueError(f"total_updates is {total_updates}, expected at least 1")
        if evaluations_per_update < 1:
            raise ValueError(
                f"evaluations_per_update is {evaluations_per_update}, expected at least 1"
            )
        self.console = console or Console()
        self._live: Live | None = None
        self._total, self._per_update = total_updates, evaluations_per_update
        self._done = 0  # updates
        self._evaluations = 0  # of training, since this display began
        self._in_update = 0  # of them, since the last row
        self._phase = ""
        self._began = self._phase_since = self._last_line = time.monotonic()
        self._evaluating = 0.0  # seconds spent in finished phases "evaluation"
        self._grad_norm: float | None = None
        self._evaluated: list[Row] = []  # the first and the latest row with an evaluation
        self._rewards: list[Change] = []  # the first reward and the first held-out one between them
        self._marks: deque[tuple[float, float, int, int]] = deque(maxlen=10)  # one an update
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []  # handlers, former streams
        self._mark(afresh=True)

    # What the trainer calls.

    def __enter__(self) -> Display:
        self._began = self._phase_since = self._last_line = time.monotonic()
        self._mark(afresh=True)
        if self.console.is_interactive:
            former = sys.stdout, sys.stderr
            self._live = Live(
                self,
                console=self.console,
                refresh_per_second=4,
                # a stream that goes to a file stays there
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            self._move_log_handlers(dict(zip(former, (sys.stdout, sys.stderr), strict=True)))
        return self

    def __exit__(self, *exception: object) -> None:
        self.phase("finished" if self._share() == 1 else "stopped")
        if self._live is not None:
            self._live.stop()
            self._live = None
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._moved.clear()

    def resume(self, rows: Sequence[Row]) -> None:
        """Takes over the rows of a run that is being continued, without printing them."""
        for row in rows:
            self._take(row)
        self._mark(afresh=True)

    def phase(self, name: str) -> None:
        """Names what is going on now. What happens in "evaluation" does not count as training."""
        now = time.monotonic()
        if self._phase == "evaluation":
            self._evaluating += now - self._phase_since
        self._phase, self._phase_since = name, now

    def advance(self, evaluations: int) -> None:
        """Counts transformer evaluations as they are done; costs less than a microsecond."""
        if self._phase != "evaluation":
            self._evaluations += evaluations
            self._in_update += evaluations
        if self._live is None and time.monotonic() - self._last_line >= self.LIFE_SECONDS:
            self._print(f"{self._share():.0%}", self._phase)

    def row(self, row: Row) -> None:
        """Takes the metrics row of a finished update, or of the state before training."""
        evaluated = self._take(row)
        self._mark(afresh=not self._evaluations)  # the first evaluation is no guide to the pace
        late = time.monotonic() - self._last_line >= self.ROW_SECONDS
        if self._live is None and (evaluated or late):
            shown = [f"{change.name} {_latest(change)}" for change in self._rewards]
            if self._grad_norm is not None:
                shown.append(f"grad norm {number(self._grad_norm)}")
            self._print(*shown)

    def message(self, text: str) -> None:
        """Prints text, above the panel if there is one, unwrapped: a path in it can be copied."""
        self.console.out(text, highlight=False)

    # What it makes of that.

    def _take(self, row: Row) -> bool:
        """Returns whether the row carries an evaluation."""
        self._done, self._in_update = row["update"], 0
        self._grad_norm = row.get("grad_norm", self._grad_norm)
        if not changes([row]):
            return False
        self._evaluated = [*self._evaluated[:1], row]
        found = changes(self._evaluated)
        firsts = (next((change for change in found if change.kind == kind), None) for kind in KINDS)
        self._rewards = [change for change in firsts if change is not None]
        return True

    def _move_log_handlers(self, redirected: dict[Any, Any]) -> None:
        """Points handlers at the redirected streams: those made earlier hold the former ones."""
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in {h for logger in loggers for h in getattr(logger, "handlers", ())}:
            if isinstance(handler, logging.StreamHandler) and handler.stream in redirected:
                former = handler.setStream(redirected[handler.stream])
                if former is not None:  # None: the stream was not redirected
                    self._moved.append((handler, former))

    def _mark(self, afresh: bool) -> None:
        former = () if afresh else self._marks
        mark = (*self._clocks(), self._evaluations, self._done)
        self._marks = deque([*former, mark], maxlen=10)  # replaced at once: a thread is reading

    def _clocks(self) -> tuple[float, float]:
        """The time, and the time without the phases "evaluation"."""
        now = time.monotonic()
        evaluating = now - self._phase_since if self._phase == "evaluation" else 0.0
        return now, now - self._evaluating - evaluating

    def _share(self) -> float:
        """How much of the run is done, from 0 to 1."""
        inside = min(1.0, self._in_update / self._per_update)
        return min(1.0, (self._done + inside) / self._total)

    def _pace(self) -> tuple[str, str]:
        """Evaluations a second and the time left, both from the last ten updates; "" if unknown."""
        wall, training, evaluations, done = self._marks[0]
        now, now_training = self._clocks()
        evaluations = self._evaluations - evaluations
        updates = self._share() * self._total - done
        left = self._total * (1 - self._share())
        rate = eta = ""
        if evaluations and now_training > training:
            rate = f"{evaluations / (now_training - training):,.0f} evaluations/s"
        if left and updates >= 0.05:  # a guess is worth reading from a twentieth of an update on
            eta = f"eta {clock((now - wall) / updates * left)}"
        return rate, eta

    def _update(self) -> str:
        return f"update {self._done:>{len(str(self._total))}}/{self._total}"

    def _print(self, *parts: str) -> None:
        parts = (self._update(), *parts, *self._pace())
        self.console.out("  ".join(part for part in parts if part), highlight=False)
        self._last_line = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        options = options.update(width=min(self.WIDTH, options.max_width))
        pace, eta = self._pace()
        bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            self._update(),
            ProgressBar(completed=self._share(), total=1.0),
            f"{self._share():4.0%}",
            eta or ("eta -:--" if self._share() < 1 else ""),
        )
        facts = [
            pace or "- evaluations/s",
            f"grad norm {number(self._grad_norm)}",
            f"elapsed {clock(time.monotonic() - self._began)}",
        ]
        status = Text("  ".join([f"{self._phase:<11}", *facts]), no_wrap=True, overflow="ellipsis")
        rewards = Table.grid(padding=(0, 2, 0, 0))
        arrow = " -> " if options.ascii_only else " → "
        values = [_latest(change, arrow) for change in self._rewards]
        label_width, value_width = max(map(len, KINDS.values())), max(map(len, values), default=0)
        name_width = max(8, options.max_width - label_width - value_width - 6)  # may be cut short
        for max_width in (label_width, name_width, value_width):
            rewards.add_column(no_wrap=True, max_width=max_width)
        for change, value in zip(self._rewards, values):
            rewards.add_row(KINDS[change.kind], change.name, value)
        for renderable in (bar, status, rewards):
            yield from console.render(renderable, options)


def _latest(change: Change, arrow: str | None = None) -> str:
    """The newest value, after the first one if there is an arrow, with the change since then."""
    if change.difference is None:
        return "not a finite number"
    if change.first_update == change.last_update:
        return number(change.after)
    former = "" if arrow is None else f"{number(change.before)}{arrow}"
    return f"{former}{number(change.after)} ({number(change.difference, sign=True)})"


def number(value: float | None, sign: bool = False) -> str:
    """Three decimals where they say something, three digits where not; None is a dash."""
    if value is None:
        return "-"
    plus = "+" if sign else ""
    plain = value == 0 or 0.01 <= abs(value) < 1000
    return format(value, f"{plus}.3f" if plain else f"{plus}.3g")


def count(items: int, noun: str) -> str:
    return f"{items:,} {noun}" + ("" if items == 1 else "s")


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
