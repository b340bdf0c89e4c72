"""Curves of a comparison: rewards against evaluations with bands over seeds, and each judge against
the reward, where methods that only learned more slowly lie on one line."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ..figures import INK, PALE
from ..grids import label_font, sample_path
from ..metrics import KINDS, write_beside
from .table import Curve, Table, metric_names

# Okabe and Ito's colours, and a dash each, so that they can be told apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
DASHES = ("-", "--", "-.", ":")
ACROSS = 2
GRIDS_WIDTH = 1900  # pixels, which grids of samples fill before the next begins below


def write_comparison(curves: Sequence[Curve], table: Table, path: Path) -> None:
    """A PNG: the reward, every judge and image measure against evaluations; then every judge
    against the trained reward."""
    reward = f"reward/{table.reward}/mean"
    judges = [f"heldout/{name}/mean" for name in table.judges]
    measures = [f"images/{name}/mean" for name in metric_names(curves, "images")]
    panels = [(key, None) for key in (reward, *judges, *measures)]
    panels += [(key, reward) for key in judges]
    down = math.ceil(len(panels) / ACROSS)
    beside = ACROSS if max(map(len, table.methods)) <= 55 else 1  # letters of the legend
    height = 2.9 * down + 0.19 * math.ceil(len(table.methods) / beside) + 0.2
    figure = Figure(figsize=(9, height), dpi=200, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.07, hspace=0.03)
    axes = figure.subplots(down, ACROSS, squeeze=False)
    for (key, against), panel in zip(panels, axes.flat):
        _draw(panel, curves, list(table.methods), key, against)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=beside, frameon=False, fontsize=8.5,
        labelcolor=INK, handlelength=3.2,
    )  # fmt: skip
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_beside(path, picture.getvalue())


def _draw(
    axes: Axes, curves: Sequence[Curve], labels: Sequence[str], key: str, against: str | None
) -> None:
    for index, label in enumerate(labels):
        found = [curve for curve in curves if curve.run.method.label == label]
        colour = COLOURS[index % len(COLOURS)]
        dash = DASHES[(index + index // len(COLOURS)) % len(DASHES)]
        if against is not None:  # a line a seed: there is no common abscissa to average at
            for curve in found:
                x, y = curve.values(against), curve.values(key)
                axes.plot(x, y, dash, color=colour, lw=1.1, alpha=0.6)
                axes.plot(x[-1:], y[-1:], "o", color=colour, ms=3.5)
            continue
        x, y = over_seeds(found, key)
        axes.plot(x, y.mean(0), dash, color=colour, lw=1.6, marker="o", ms=2.5, label=label)
        if len(found) > 1:
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
    of = "" if against is None else ", against the reward; ends marked"
    axes.set_title(_title(key) + of, fontsize=9, loc="left", color=INK)
    axes.set_xlabel(
        "transformer evaluations" if against is None else _title(against), fontsize=8, color=INK
    )
    axes.tick_params(labelsize=7.5, colors=INK, length=0)
    if against is None:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def over_seeds(curves: Sequence[Curve], key: str) -> tuple[np.ndarray, np.ndarray]:  # [n], [S, n]
    """Transformer evaluations, and `key` there of each of S runs: linear between a run's own, as
    far as all of them go, NaN beside an evaluation that gave none."""
    end = min(curve.evaluations[-1] for curve in curves)
    x = np.unique([e for curve in curves for e in curve.evaluations if e <= end]).astype(float)
    return x, np.array([np.interp(x, curve.evaluations, curve.values(key)) for curve in curves])


def _title(key: str) -> str:
    """'judge accuracy (held-out)' of heldout/judge_accuracy/mean"""
    kind, _, short = key.removesuffix("/mean").partition("/")
    return f"{short.replace('_', ' ')} ({KINDS[kind]})"


def write_grids(curves: Sequence[Curve], path: Path) -> None:
    """A PNG: samples before training, then every method's last ones from its first seed, grids of
    the same prompts and noises beside one another. A method without any, whose images were not
    finite, is named all the same."""
    grids = {"before training": _samples(curves[0], 0)}
    for curve in curves:
        label = curve.run.method.label
        if label not in grids:
            grids[label] = _samples(curve, -1)
    face, gap, line = label_font(18, bold=True), 12, 24
    width = max([400, *(grid.width + gap for grid in grids.values() if grid)])
    height = max([0, *(grid.height + gap for grid in grids.values() if grid)])
    titles = [
        textwrap.wrap(label if grid else f"{label}: no samples", width // 12)
        for label, grid in grids.items()
    ]  # a bold letter of this size is less than 12 pixels wide, but for capitals
    top = max(map(len, titles)) * line + gap
    across = min(len(grids), max(1, GRIDS_WIDTH // width))
    down = math.ceil(len(grids) / across)
    canvas = Image.new("RGB", (across * width + gap, down * (top + height)), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (title, grid) in enumerate(zip(titles, grids.values())):
        x, y = index % across * width + gap, index // across * (top + height)
        below = y + top - 6  # the last line of a title lies on its grid
        draw.multiline_text(
            (x, below), "\n".join(title), fill=INK, font=face, anchor="ld", spacing=line - 18
        )
        if grid:
            canvas.paste(grid, (x, y + top))
    picture = io.BytesIO()
    canvas.save(picture, format="PNG", optimize=True)
    write_beside(path, picture.getvalue())


def _samples(curve: Curve, evaluation: int) -> Image.Image | None:
    file = sample_path(curve.run.directory / "samples", curve.rows[evaluation]["update"])
    if not file.is_file():
        return None
    with Image.open(file) as grid:
        return grid.convert("RGB")
