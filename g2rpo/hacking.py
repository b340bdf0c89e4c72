"""Reward hacking, as the evaluations show it: a trained reward rises and a judge falls.

A policy may learn to please its reward by what nobody asked for. A held-out reward, which is never
trained on, then falls. The rule, at every evaluation, from the rows of metrics.jsonl alone: the
mean of a trained reward (its weight is not 0) is above where it started, and that of a held-out one
is below the 95 % interval of where it started. Prompts and noises are the same at every evaluation,
so that interval is rather too wide than too narrow: a warning is seldom chance, and may come late.

Rows of versions that kept no intervals, and runs without held-out rewards, are not watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .metrics import Row, finite, number

ROUNDING = 1e-9  # of a mean, relative to it: sums in another order


@dataclass(frozen=True)
class Moved:
    """A reward's mean at the first evaluation, with its interval, and now."""

    name: str
    start: float
    low: float
    high: float
    now: float

    @property
    def fall(self) -> str:
        """'judge 0.812, below its start 0.916 [0.890, 0.938]'"""
        interval = f"{number(self.start)} [{number(self.low)}, {number(self.high)}]"
        return f"{self.name} {number(self.now)}, below its start {interval}"

    @property
    def rise(self) -> str:
        """'fit -0.301, above its start -0.600'"""
        return f"{self.name} {number(self.now)}, above its start {number(self.start)}"


@dataclass(frozen=True)
class Alarm:
    """An evaluation at which trained rewards have risen and held-out ones have fallen."""

    update: int
    rose: tuple[Moved, ...]  # at least one
    fell: tuple[Moved, ...]  # at least one

    @property
    def short(self) -> str:
        """For a line of progress."""
        more = f", and {len(self.fell) - 1} more" if len(self.fell) > 1 else ""
        return f"REWARD HACKING? {self.fell[0].fall}{more}"

    @property
    def text(self) -> str:
        fell, rose = (
            "; ".join(part) for part in ([m.fall for m in self.fell], [m.rise for m in self.rose])
        )
        return f"held-out {fell}, while trained {rose}"


def evaluated(rows: Sequence[Row]) -> list[Row]:
    """Those that carry an evaluation."""
    return [row for row in rows if any(_kind(key) for key in row)]


def is_watched(start: Row) -> bool:
    """Whether the first evaluation says what the rule needs: a held-out reward's interval."""
    return any(_kind(key) == "heldout" and finite(start, f"{key[:-4]}low") for key in start)


def watch(rows: Sequence[Row]) -> Alarm | None:
    """At the newest evaluation."""
    found = evaluated(rows)
    return _compare(found[0], found[-1]) if found else None


def alarms(rows: Sequence[Row]) -> list[Alarm]:
    """At every evaluation so far that gave one."""
    found = evaluated(rows)
    compared = (_compare(found[0], row) for row in found)
    return [alarm for alarm in compared if alarm is not None]


def in_a_row(rows: Sequence[Row]) -> int:
    """Evaluations with an alarm, the newest and those right before it."""
    found = evaluated(rows)
    count = 0
    while count < len(found) and _compare(found[0], found[-1 - count]) is not None:
        count += 1
    return count


def spans(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Updates of the first and the last alarm of every unbroken row of them."""
    found = evaluated(rows)
    result: list[tuple[int, int]] = []
    before = False  # whether the evaluation before had an alarm
    for row in found:
        now = _compare(found[0], row) is not None
        if now:
            first = result.pop()[0] if before else row["update"]
            result.append((first, row["update"]))
        before = now
    return result


def sentence(rows: Sequence[Row]) -> str:
    """For the end of a run, without a full stop; "" where nothing was warned of."""
    found = spans(rows)
    if not found:
        return ""
    alarm = watch(rows)
    if alarm is not None:
        since = found[-1][0]
        when = f"since update {since}" if since < alarm.update else f"at update {since}"
        return f"Reward hacking? {when[0].upper()}{when[1:]}: {alarm.text}"
    when = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in found)
    return f"Reward hacking was warned of at updates {when}, and not at the last evaluation"


def advice(alarm: Alarm, sound: int | None) -> str:
    """The message at the first alarm. sound: the newest checkpoint that was evaluated without."""
    if sound is None:
        back = (
            "there is no checkpoint of an evaluation without this warning (train.save_every, "
            "train.keep_last)"
        )
    else:
        back = f"checkpoint step-{sound:06d} is of the last evaluation without this warning"
    return (
        f"Update {alarm.update}: reward hacking? {alarm.text[0].upper()}{alarm.text[1:]}. What is "
        "learnt may please the reward alone: look at samples/, try a lower optimizer.lr or "
        f"objective.kl above 0; {back}; train.hacking_stop can end such a run by itself"
    )


def _compare(start: Row, row: Row) -> Alarm | None:
    rose, fell = [], []
    for kind, name in _rewards(start):
        key = f"{kind}/{name}"
        before, now = finite(start, f"{key}/mean"), finite(row, f"{key}/mean")
        low, high = finite(start, f"{key}/low"), finite(start, f"{key}/high")
        if before is None or now is None or low is None or high is None:
            continue
        moved = Moved(name, before, low, high, now)
        if kind == "heldout" and now < low - ROUNDING * abs(low):
            fell.append(moved)
        elif kind == "reward" and start.get(f"{key}/weight") and now > before:
            rose.append(moved)
    return Alarm(row["update"], tuple(rose), tuple(fell)) if rose and fell else None


def _rewards(row: Row) -> Iterator[tuple[str, str]]:
    for key in row:
        if kind := _kind(key):
            yield kind, key.removeprefix(f"{kind}/").removesuffix("/mean")


def _kind(key: str) -> str:
    """'reward' or 'heldout' for the key of an evaluated mean, else ''."""
    kind = key.partition("/")[0]
    return kind if kind in ("reward", "heldout") and key.endswith("/mean") else ""
