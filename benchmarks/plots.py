"""Two pictures a device: times faster than eager, and how near to what the device does at most."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ceilings import BFLOAT16
from ceilings import FP8 as FP8_PRODUCTS
from flux_forward import COMPILED, EAGER, FP8, FUSED, ROLLOUT
from flux_results import BLOCKS, FORWARD
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from report import BASELINES, headline, shape_text
from texts import over, times_text

INK, PALE = "#333333", "#dddddd"
COMPILE, OURS, OURS_FP8 = "torch.compile, the best of its ways", "ours", "ours, FP8"
COPY = "copy"
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    COMPILE: "#E69F00", OURS: "#0072B2", OURS_FP8: "#009E73",
    COPY: "#0072B2", BFLOAT16: "#E69F00", FP8_PRODUCTS: "#009E73",
}  # fmt: skip
THICK = 0.36  # of a bar, where a row of the picture is 1


@dataclass
class Row:
    """A row of both pictures. speeds: times eager; shares: per cent, by what they are of."""

    name: str
    block: bool = False  # of FLUX's blocks, which have a column of their own
    speeds: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)


def rows_of(content: dict, others: dict[str, dict]) -> list[Row]:
    """What of a device is drawn: its flow ops at one shape, block ops, forwards. others: by kind,
    results of the same device."""
    shown, _ = headline(content)
    rows = [_op(row, _flow_name(row), BASELINES[1:]) for row in shown
            if row["shape"] == shown[0]["shape"]]  # fmt: skip
    for row in others.get(BLOCKS, {}).get("cases", []):
        direction = " fwd+bwd" if row["backward"] else ""
        made = _op(row, f"{row['task']}{direction}\n{row['shape']}", ("torch.compile",))
        made.block = True
        rows.append(made)
    rows += [_forward(row) for row in others.get(FORWARD, {}).get("cases", [])]
    return [row for row in rows if row.speeds or row.shares]


def _flow_name(row: dict) -> str:
    direction = " fwd+bwd" if row["backward"] else ""
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{row['task']}{direction}\n{shape_text(row)}{dtype}"


def _op(row: dict, name: str, compiled: tuple[str, ...]) -> Row:
    made = Row(name)
    if not row["ours"]:
        return made
    made.shares[COPY] = 100 * row["variants"][row["ours"]]["copy_fraction"]
    base, best = over(row, ("eager",)), over(row, compiled)
    if base is not None:
        made.speeds[OURS] = base
        if best is not None:
            made.speeds[COMPILE] = base / best
    return made


def _forward(row: dict) -> Row:
    """Of ours in bfloat16 the faster of its two ways."""
    made, entries = Row(f"FLUX's forward\n{row['batch']} × {row['tokens']} tokens"), row["variants"]
    ways = {COMPILE: (COMPILED,), OURS: (FUSED, ROLLOUT), OURS_FP8: (FP8,)}
    if EAGER in entries:
        for name, of in ways.items():
            found = [entries[way]["speedup"]["median"] for way in of
                     if way in entries and entries[way]["speedup"]]  # fmt: skip
            if found:
                made.speeds[name] = max(found)
    for peak, of in ((BFLOAT16, ways[OURS]), (FP8_PRODUCTS, ways[OURS_FP8])):
        found = [entries[way]["of_peak"] for way in of
                 if way in entries and entries[way]["of_peak"] is not None]  # fmt: skip
        if found:
            made.shares[peak] = 100 * max(found)
    return made


def title(content: dict) -> str:
    """The device and all that the figures depend on, in two lines."""
    machine, versions = content["machine"], content["versions"]
    if content["device"] == "cuda":
        head = f"{machine['name']}, driver {machine['driver']}, device time"
        under = f"CUDA {versions['cuda']}, Triton {versions['triton']}, "
    else:
        head = f"{machine['name']}, {machine['threads']} threads, {machine['variant']}, wall time"
        under = ""
    commit = f", commit {content['commit']}" if content["commit"] else ""
    return f"{head}\ntorch {versions['torch']}, {under}{content['date']}{commit}"


def plot(content: dict, others: dict[str, dict], speed: Path, roofline: Path) -> None:
    """Two PNGs 2000 pixels wide, meant to be shown at 1000."""
    rows = rows_of(content, others)
    if not any(row.speeds for row in rows):
        raise ValueError(f"{speed.name}: expected a case with both eager and ours; none was timed")
    for path, part, label, line, text in (
        (speed, "speeds", "times faster than eager", 1, times_text),
        (roofline, "shares", "ours, % of what the device does at most", 100, "{:.0f} %".format),
    ):
        columns: list[Column] = [[], []]
        for row in rows:
            if getattr(row, part):
                columns[row.block].append((row.name, getattr(row, part)))
        figure = _figure([column for column in columns if column], label, line, text)
        figure.suptitle(title(content), fontsize=9.5, color=INK, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


Column = list[tuple[str, dict[str, float]]]  # names, and a bar each


def _figure(columns: list[Column], label: str, line: float, text: Callable) -> Figure:
    """Groups of bars, each with its number, in columns of axes of their own; a line at `line`."""
    named = {name for column in columns for _, values in column for name in values}
    names = [name for name in COLOURS if name in named]
    longest = max(columns, key=len)
    widest = max(len(values) for _, values in longest)
    height = 1.3 + (0.2 + 0.17 * widest) * len(longest)
    figure = Figure(figsize=(10, height), dpi=200, layout="constrained", facecolor="white")
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        _bars(axes, column, names, line, text, len(longest))
        axes.set_xlabel(label, fontsize=8.5, color=INK)
    _legend(figure.axes[0], names)
    return figure


def _bars(
    axes: Axes, column: Column, names: list[str], line: float, text: Callable, rows: int
) -> None:
    """rows: of the longest column, so that bars are as thick in all."""
    thick = min(THICK, 0.84 / max(len(values) for _, values in column))
    for y, (_, values) in enumerate(column):
        there = [name for name in names if name in values]
        for i, name in enumerate(there):
            at = y + (i - (len(there) - 1) / 2) * thick
            axes.barh(at, values[name], height=0.9 * thick, color=COLOURS[name])
            axes.annotate(text(values[name]), (values[name], at), xytext=(3, 0), va="center",
                          textcoords="offset points", fontsize=7, color=INK,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
    axes.axvline(line, color=INK, lw=1, zorder=0.9)
    axes.set_xlim(0, 1.12 * max(line, *(max(values.values()) for _, values in column)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=(1, 2, 5, 10)))
    axes.set_yticks(range(len(column)), [name for name, _ in column], fontsize=7.5)
    axes.set_ylim(rows - 0.4, -0.6)  # the first on top
    axes.tick_params(labelsize=7.5, colors=INK, length=0, which="both")
    axes.grid(axis="x", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)


def _legend(axes: Axes, names: Iterable[str]) -> None:
    labels = {COPY: "of the copy bandwidth", BFLOAT16: "of matrix products in bfloat16",
              FP8_PRODUCTS: "of matrix products in FP8"}  # fmt: skip
    shown = [axes.barh(0, 0, color=COLOURS[name], label=labels.get(name, name)) for name in names]
    axes.legend(handles=shown, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(shown),
                frameon=False, fontsize=8, labelcolor=INK, borderaxespad=0.2, handlelength=1.2,
                handletextpad=0.5, columnspacing=1.6)  # fmt: skip
