"""What a comparison says: a row a method, means and standard errors over its seeds.

The question is never only how high the trained reward rose. A method that makes fewer or smaller
steps has lost less of everything at the same budget, so the held-out judges are also read off each
run's curve where the reward first reaches a level that every run reaches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..metrics import MetricsLog, Row, duration, number
from .methods import Run

AT_EQUAL, BEST = ", at equal reward", ", best"  # after a judge's name, in headings
COUNTS = ("updates", "evaluations", "seconds")


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run."""

    run: Run
    rows: Sequence[Row]  # those of metrics.jsonl that carry an evaluation

    @staticmethod
    def read(run: Run) -> Curve:
        rows = MetricsLog(run.directory / "metrics.jsonl").rows()
        return Curve(run, [row for row in rows if "seconds/evaluation" in row])

    def values(self, key: str) -> list[float]:
        """Of a metrics key, NaN where it was none."""
        found = (row.get(key) for row in self.rows)
        return [math.nan if value is None else float(value) for value in found]

    @property
    def evaluations(self) -> list[int]:
        return [row["evaluations"] for row in self.rows]

    def best(self, key: str) -> float:
        """The highest of the evaluations that gave a number; NaN if none did."""
        return max(filter(math.isfinite, self.values(key)), default=math.nan)

    def at_level(self, key: str, of: str, level: float) -> float:
        """`key` where `of` first reaches `level`, linear between evaluations; NaN if it never
        does."""
        x, y = self.values(of), self.values(key)
        if x and x[0] >= level:
            return y[0]
        for (x0, y0), (x1, y1) in zip(zip(x, y), zip(x[1:], y[1:])):
            if x0 < level <= x1:
                return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
        return math.nan


@dataclass(frozen=True)
class Figure:
    """A number over seeds."""

    mean: float  # NaN where a seed has none: the others are no smaller sample, but a chosen one
    error: float  # standard error; NaN for a single seed

    @staticmethod
    def of(values: Sequence[float]) -> Figure:
        if not values or not all(map(math.isfinite, values)):
            return Figure(math.nan, math.nan)
        error = math.nan
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
        return Figure(statistics.fmean(values), error)

    @property
    def text(self) -> str:
        if not math.isfinite(self.mean):
            return "-"
        shown = number(self.mean)
        return shown if not math.isfinite(self.error) else f"{shown} ± {self._error()}"

    def _error(self) -> str:
        return f"{self.error:.3f}" if self.error < 100 else f"{self.error:.3g}"


@dataclass(frozen=True)
class Table:
    """Of methods: label -> heading -> figure."""

    headings: Sequence[str]
    methods: Mapping[str, Mapping[str, Figure]]
    level: float  # of the reward, the highest that every run reaches; NaN if one was never a number
    reward: str  # names of the reward and the judges
    judges: Sequence[str]
    start: Mapping[str, float]  # before training, by heading; NaN where the runs began differently
    seeds: int


def metric_names(curves: Sequence[Curve], kind: str) -> list[str]:
    """Names of the rewards (or heldout, images) that the first rows of runs evaluate."""
    prefix, suffix = f"{kind}/", "/mean"
    keys = dict.fromkeys(key for curve in curves for key in curve.rows[0])
    return [
        key[len(prefix) : -len(suffix)]
        for key in keys
        if key.startswith(prefix) and key.endswith(suffix)
    ]


def make_table(curves: Sequence[Curve], name: str) -> Table:
    """name: of the reward by which runs are compared at equal level."""
    reward = f"reward/{name}/mean"
    judges = {judge: f"heldout/{judge}/mean" for judge in metric_names(curves, "heldout")}
    reached = [curve.best(reward) for curve in curves]
    level = min(reached) if all(map(math.isfinite, reached)) else math.nan
    last = {
        name: reward,
        **judges,
        **{measure: f"images/{measure}/mean" for measure in metric_names(curves, "images")},
    }
    columns: dict[str, Callable[[Curve], float]] = {
        name: _last(reward),
        **{judge: _last(key) for judge, key in judges.items()},
        **{f"{judge}{AT_EQUAL}": _at(key, reward, level) for judge, key in judges.items()},
        **{f"{judge}{BEST}": _best(key) for judge, key in judges.items()},
        **{heading: _last(key) for heading, key in last.items()},
        "updates": lambda curve: curve.rows[-1]["update"],
        "evaluations": lambda curve: curve.rows[-1]["evaluations"],
        "seconds": lambda curve: curve.rows[-1]["seconds"],
    }
    methods: dict[str, list[Curve]] = {}
    for curve in curves:
        methods.setdefault(curve.run.method.label, []).append(curve)
    return Table(
        headings=list(columns),
        methods={
            label: {heading: Figure.of([of(c) for c in found]) for heading, of in columns.items()}
            for label, found in methods.items()
        },
        level=level,
        reward=name,
        judges=list(judges),
        start={
            heading: _common([curve.values(key)[0] for curve in curves])
            for heading, key in last.items()
        },
        seeds=len({curve.run.seed for curve in curves}),
    )


def _common(values: Sequence[float]) -> float:
    """What all of them are, or NaN: methods may draw the starting policy's images differently."""
    same = all(math.isclose(value, values[0], abs_tol=5e-4) for value in values)
    return values[0] if same else math.nan


def _last(key: str) -> Callable[[Curve], float]:
    return lambda curve: curve.values(key)[-1]


def _best(key: str) -> Callable[[Curve], float]:
    return lambda curve: curve.best(key)


def _at(key: str, reward: str, level: float) -> Callable[[Curve], float]:
    return lambda curve: curve.at_level(key, reward, level)


def markdown(table: Table) -> str:
    """The table as it stands in a document: a row a method."""
    lines = [
        "| method | " + " | ".join(table.headings) + " |",
        "|---|" + "--:|" * len(table.headings),
    ]
    for label, figures in table.methods.items():
        cells = [cell(heading, figures[heading]) for heading in table.headings]
        lines.append(f"| {label.replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def legend(table: Table) -> str:
    """What the columns mean, in a sentence or two."""
    seeds = f"Mean ± standard error over {table.seeds} seeds" if table.seeds > 1 else "One seed"
    level = (
        f"where {table.reward} first reaches {number(table.level)}, the highest that every run "
        "reaches"
        if math.isfinite(table.level)
        else f"nowhere, since {table.reward} of a run was never a number"
    )
    return f"{seeds}. At equal reward: {level}. Best: the highest of a run's evaluations."


def cell(heading: str, figure: Figure) -> str:
    if heading in ("updates", "evaluations"):
        return f"{figure.mean:,.0f}"
    return duration(figure.mean) if heading == "seconds" else figure.text
