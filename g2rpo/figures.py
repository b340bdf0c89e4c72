"""curves.png: a run's rewards over its updates, and what else its metrics say."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator

from . import hacking
from .metrics import Row, changes, number, phase_seconds, write_beside

INK, PALE, ALARM = "#333333", "#dddddd", "#CC79A7"
# Okabe and Ito's colours, which the colour-blind can tell apart: blues for what is trained on, reds
# for what only judges. The two also differ in dash and marker.
COLOURS = {
    "reward": ("#0072B2", "#56B4E9", "#003F63"),
    "heldout": ("#D55E00", "#E69F00", "#7A3600"),
}
STROKES = {"reward": ("-", "o"), "heldout": ("--", "s")}
PHASE_COLOURS = ("#999999", "#56B4E9", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#F0E442")


def write_curves(rows: Sequence[Row], path: str | Path) -> None:
    """Draws a run as a PNG 1800 pixels wide, meant to be shown at 900.

    Above, every evaluated reward against updates, a panel for each unit: held-out ones dashed, 95 %
    intervals as pale bands, the mean over each update's own rollouts as a pale line; where reward
    hacking was warned of, the ground is tinted. Below, whatever the rows say of gradient
    norm, diversity, advantages, ratios and seconds. One row, the state before training, is enough.
    Raises ValueError if no row carries an evaluation.
    """
    found = [change for change in changes(rows) if change.kind != "images"]
    if not found:
        raise ValueError("rows: expected at least one with a key 'reward/<name>/mean'")
    units = list(dict.fromkeys(_unit(change.name) for change in found))
    trained = [row for row in rows if row["update"] > 0]
    lines = {
        title: {label: y for label, y in series.items() if any(map(math.isfinite, y))}
        for title, series in {
            "gradient norm": {"": _series(trained, "grad_norm")},
            "std of the advantages": {"": _series(trained, "advantage_std")},
            "diversity within a prompt": {"": _series(rows, "images/diversity/mean")},
            "ratio - 1": {
                "largest": [ratio - 1 for ratio in _series(trained, "ratio_max")],
                "mean": [ratio - 1 for ratio in _series(trained, "ratio_mean")],
            },
            "fraction clipped": {"": _series(trained, "clip_fraction")},
        }.items()
    }
    if not any(lines["fraction clipped"].get("", ())):
        del lines["fraction clipped"]  # nothing was: a panel of zeros has nothing to add
    if lines["diversity within a prompt"] and len(lines) > 3:
        del lines["std of the advantages"]  # the fifth panel would cost a line; this one says least
    lines = {title: series for title, series in lines.items() if series}
    phases = phase_seconds(trained)
    small = len(lines) + bool(phases)

    across, below = min(len(units), 3), min(small, 3 if small > 4 else 4)
    down, below_down = math.ceil(len(units) / across), math.ceil(small / below) if small else 0
    heights = [3.4 * down, 2.0 * below_down]
    figure = Figure(figsize=(9, sum(heights)), dpi=200, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.07, wspace=0.03, hspace=0.03)
    figures = figure.subfigures(2, 1, height_ratios=heights) if small else [figure]
    for unit, axes in zip(units, figures[0].subplots(down, across, squeeze=False).flat):
        _draw_unit(axes, rows, unit)
    if small:
        panels = iter(figures[1].subplots(below_down, below, squeeze=False).flat)
        updates = [row["update"] for row in trained]
        for title, series in lines.items():
            # diversity is evaluated, like rewards: update 0 has it as well, others may not
            at = updates if title != "diversity within a prompt" else [r["update"] for r in rows]
            _draw_lines(next(panels), at, title, series)
        if phases:
            legend = _draw_phases(next(panels), updates, phases)
            legend.set_in_layout(small % below == 0)  # else it lies in the empty place beside it
    for axes in figure.findobj(Axes):
        axes.set_visible(axes.has_data())
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_beside(path, picture.getvalue())


def _unit(name: str) -> str:
    """The panel of a reward: rewards of one unit share an axis, and any other has its own."""
    if name.endswith("log_prob"):
        return "log-probability"
    return "probability" if name.endswith(("probability", "accuracy")) else name


def _series(rows: Sequence[Row], key: str) -> list[float]:
    return [math.nan if row.get(key) is None else float(row[key]) for row in rows]


def _draw_unit(axes: Axes, rows: Sequence[Row], unit: str) -> None:
    updates = [row["update"] for row in rows]
    colours = {kind: itertools.cycle(palette) for kind, palette in COLOURS.items()}
    for change in changes(rows):
        if _unit(change.name) != unit:
            continue
        colour, (dash, marker) = next(colours[change.kind]), STROKES[change.kind]
        mean = f"{change.kind}/{change.name}/mean"
        evaluated = [row for row in rows if row.get(mean) is not None]
        values = " → ".join(number(value) for value in dict.fromkeys((change.before, change.after)))
        axes.plot(
            [row["update"] for row in evaluated],
            _series(evaluated, mean),
            dash,
            marker=marker,
            markersize=3.5,
            linewidth=1.8,
            color=colour,
            zorder=3,
            label=f"{change.name}, {change.label}: {values}",
        )
        at = [row["update"] for row in evaluated]
        low, high = (_series(evaluated, mean[:-4] + end) for end in ("low", "high"))
        axes.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        rollouts = _series(rows, f"rollout/{change.name}/mean")
        if change.kind == "reward" and any(map(math.isfinite, rollouts)):
            label = "the same over each update's own rollouts"
            axes.plot(updates, rollouts, color=colour, linewidth=1, alpha=0.35, label=label)
    for index, (first, last) in enumerate(hacking.spans(rows)):
        label = "reward hacking?" if index == 0 else None
        axes.axvline(first, color=ALARM, linewidth=1, zorder=1)
        axes.axvspan(first, max(last, first + 0.4), color=ALARM, alpha=0.15, lw=0, label=label)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.set_xlabel("update", fontsize=9, color=INK)
    axes.set_xlim(-0.4, max(1, rows[-1]["update"]) + 0.4)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
        handlelength=2.6,
        borderaxespad=0.2,
    )
    _plain_axes(axes)


def _draw_lines(axes: Axes, updates: list[int], title: str, series: dict[str, list[float]]) -> None:
    marker = "o" if len(updates) <= 60 else None
    for (label, values), colour in zip(series.items(), COLOURS["reward"]):
        points = [(u, value) for u, value in zip(updates, values) if math.isfinite(value)]
        axes.plot(*zip(*points), color=colour, linewidth=1.4, marker=marker, ms=2, label=label)
    if all(value == 0 for values in series.values() for value in values):
        axes.set_ylim(-1, 1)
        axes.text(updates[0], 0.2, "exactly 0", fontsize=8, color=INK)
        axes.set_yticks([0])
    elif len(series) > 1:
        axes.legend(frameon=False, fontsize=7, labelcolor=INK)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
    axes.set_title(title, fontsize=8.5, loc="left", color=INK)
    _plain_axes(axes)


def _draw_phases(axes: Axes, updates: list[int], phases: dict[str, list[float]]) -> Legend:
    edges = [update - 0.5 for update in updates] + [updates[-1] + 0.5]
    base = [0.0] * len(updates)
    for index, (phase, seconds) in enumerate(phases.items()):
        top = [low + value for low, value in zip(base, seconds)]
        colour = PHASE_COLOURS[index % len(PHASE_COLOURS)]
        axes.stairs(top, edges, baseline=base, fill=True, color=colour, label=phase)
        base = top
    axes.set_title("seconds", fontsize=8.5, loc="left", color=INK)
    _plain_axes(axes)
    return axes.legend(
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=7,
        labelcolor=INK,
        reverse=True,
        handlelength=1,
    )


def _plain_axes(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=7.5, colors=INK, length=0)
    axes.yaxis.get_offset_text().set(fontsize=7, color=INK)
    axes.grid(axis="y", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
