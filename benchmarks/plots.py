"""One picture a device: times faster than eager, and how near to the copy bandwidth."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from report import headline, shape_text
from texts import times_text

INK, PALE = "#333333", "#dddddd"
# Okabe and Ito's colours, which the colour-blind can tell apart; shapes differ as well.
STYLES = {
    "compiled eager": ("torch.compile of eager", "#E69F00", "s", 40),
    "compiled reference": ("torch.compile of our reference", "#009E73", "^", 46),
    "ours": ("ours", "#0072B2", "o", 64),
}


def plot(content: dict, path: Path) -> None:
    """A PNG 2000 pixels wide, meant to be shown at 1000."""
    shown, _ = headline(content)
    rows = [row for row in reversed(shown) if row["ours"] and "eager" in row["variants"]]
    if not rows:
        raise ValueError(f"{path.name}: expected a case with both eager and ours; none was timed")
    figure = Figure(figsize=(10, 1.5 + 0.36 * len(rows)), dpi=200, layout="constrained",
                    facecolor="white")  # fmt: skip
    speed, share = figure.subplots(1, 2, width_ratios=[2.1, 1], sharey=True)
    _draw_speed(speed, rows)
    _draw_share(share, rows)
    device = "device time" if content["device"] == "cuda" else "wall time"
    variant = content["machine"].get("variant")
    extra = f", {content['machine']['threads']} threads, {variant}" if variant else ""
    figure.suptitle(
        f"{content['machine']['name']}{extra}: {device}, torch {content['versions']['torch']}, "
        f"{content['date']}",
        fontsize=10, color=INK, x=0.01, ha="left",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _name(row: dict) -> str:
    direction = " fwd+bwd" if row["backward"] else ""
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return f"{row['task']}{direction}\n{shape_text(row)}{dtype}"


def _draw_speed(axes: Axes, rows: list[dict]) -> None:
    for y, row in enumerate(rows):
        entries = row["variants"]
        base = entries["eager"]["over_ours"]["median"]
        values = {"ours": base}
        for name in ("compiled eager", "compiled reference"):
            if name in entries:
                values[name] = base / entries[name]["over_ours"]["median"]
        axes.plot([1, *values.values()], [y] * (1 + len(values)), color=PALE, lw=1.4, zorder=1)
        for name, value in values.items():
            _, colour, marker, size = STYLES[name]
            axes.scatter(value, y, s=size, color=colour, marker=marker, zorder=3,
                         edgecolor="white", linewidth=0.7)  # fmt: skip
        axes.annotate(times_text(base), (base, y), xytext=(0, 6), textcoords="offset points",
                      ha="center", fontsize=7, color=STYLES["ours"][1])  # fmt: skip
    axes.axvline(1, color=INK, lw=1, zorder=2)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    low, high = axes.get_xlim()
    if high / low < 30:  # less than a decade and a half: 1, 2, 5, 10 are the lines to read
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(rows)), [_name(row) for row in rows], fontsize=7.5)
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.set_xlabel("times faster than eager", fontsize=8.5, color=INK)
    shown = [axes.scatter([], [], s=size, color=colour, marker=marker, label=label)
             for label, colour, marker, size in STYLES.values()]  # fmt: skip
    axes.legend(handles=shown, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3,
                frameon=False, fontsize=8, labelcolor=INK, borderaxespad=0.2,
                handletextpad=0.2, columnspacing=1.2)  # fmt: skip
    _plain(axes)


def _draw_share(axes: Axes, rows: list[dict]) -> None:
    shares = [100 * row["variants"][row["ours"]]["copy_fraction"] for row in rows]
    axes.barh(range(len(rows)), shares, height=0.52, color="#56B4E9")
    for y, value in enumerate(shares):
        inside = value > 0.12 * max(100, *shares)  # outside, it could stand on the line at 100
        axes.annotate(f"{value:.0f}", (value, y), xytext=(-3 if inside else 3, 0),
                      textcoords="offset points", ha="right" if inside else "left",
                      va="center", fontsize=7, color=INK)  # fmt: skip
    axes.axvline(100, color=INK, lw=1)
    axes.set_xlim(0, max(112, 1.1 * max(shares)))
    axes.set_xlabel("ours, % of the copy bandwidth", fontsize=8.5, color=INK)
    axes.tick_params(labelleft=False)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=7.5, colors=INK, length=0, which="both")
    axes.grid(axis="x", color=PALE, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
