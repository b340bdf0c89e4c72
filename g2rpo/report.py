"""What a person looks at after a run: curves, grids of samples, and one report.html with all of it.

Everything here is made from the run directory alone (config.yaml, metrics.jsonl, samples/), so it
can be made again at any time: after a resume, after a crash, or on another machine.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import platform
import re
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jinja2
import torch
import yaml
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from g2rpo.tracking import (
    KINDS,
    Change,
    MetricsLog,
    Row,
    changes,
    count,
    duration,
    number,
    write_beside,
)

INK, PALE = "#333333", "#dddddd"
# Okabe and Ito's colours, which the colour-blind can tell apart: blues for what is trained on, reds
# for what only judges. The two also differ in dash and marker.
COLOURS = {
    "reward": ("#0072B2", "#56B4E9", "#003F63"),
    "heldout": ("#D55E00", "#E69F00", "#7A3600"),
}
STROKES = {"reward": ("-", "o"), "heldout": ("--", "s")}
PHASE_COLOURS = ("#999999", "#56B4E9", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#F0E442")

MIN_TILE, MAX_TILE = 48, 256  # pixels of an image's longer side in a grid
GRID_PIXELS = 2**21  # what all tiles of a grid may add up to, beyond MIN_TILE
JPEG_FROM_BYTES = 2**20  # pictures in the page beyond this many bytes


# Curves.


def write_curves(rows: Sequence[Row], path: str | Path) -> None:
    """Draws a run as a PNG 1800 pixels wide, meant to be shown at 900.

    Above, every evaluated reward against updates, a panel for each unit: held-out ones dashed, the
    mean over each update's own rollouts as a pale line. Below, whatever the rows say of gradient
    norm, advantages, ratios and seconds. One row, the state before training, is enough.
    Raises ValueError if no row carries an evaluation.
    """
    found = changes(rows)
    if not found:
        raise ValueError("rows: expected at least one with a key 'reward/<name>/mean'")
    units = list(dict.fromkeys(_unit(change.name) for change in found))
    trained = [row for row in rows if row["update"] > 0]
    lines = {
        title: {label: y for label, y in series.items() if any(map(math.isfinite, y))}
        for title, series in {
            "gradient norm": {"": _series(trained, "grad_norm")},
            "std of the advantages": {"": _series(trained, "advantage_std")},
            "ratio - 1": {
                "largest": [ratio - 1 for ratio in _series(trained, "ratio_max")],
                "mean": [ratio - 1 for ratio in _series(trained, "ratio_mean")],
            },
            "fraction clipped": {"": _series(trained, "clip_fraction")},
        }.items()
    }
    if not any(lines["fraction clipped"].get("", ())):
        del lines["fraction clipped"]  # nothing was: a panel of zeros has nothing to add
    lines = {title: series for title, series in lines.items() if series}
    phases = _phases(trained)
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
            _draw_lines(next(panels), updates, title, series)
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


def _phases(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Seconds of every phase in each row, in the order in which the rows name the phases."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("seconds/"))
    return {key.removeprefix("seconds/"): [row.get(key) or 0.0 for row in rows] for key in keys}


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
            label=f"{change.name}, {KINDS[change.kind]}: {values}",
        )
        rollouts = _series(rows, f"rollout/{change.name}/mean")
        if change.kind == "reward" and any(map(math.isfinite, rollouts)):
            label = "the same over each update's own rollouts"
            axes.plot(updates, rollouts, color=colour, linewidth=1, alpha=0.35, label=label)
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
        axes.plot(updates, values, color=colour, linewidth=1.4, marker=marker, ms=2, label=label)
    if all(value == 0 for values in series.values() for value in values):
        axes.set_ylim(-1, 1)
        axes.text(updates[0], 0.2, "exactly 0", fontsize=8, color=INK)
        axes.set_yticks([0])
    elif len(series) > 1:
        axes.legend(frameon=False, fontsize=7, labelcolor=INK)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
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


# Grids of samples.


def sample_path(samples_dir: str | Path, update: int) -> Path:
    """Where the grid of an update lives: samples/update-000020.png."""
    return Path(samples_dir) / f"update-{update:06d}.png"


def write_grid(
    images: torch.Tensor,  # [N, C, H, W], floating point in [0, 1], C = 1 or 3, any device
    prompts: Sequence[str],  # N
    path: str | Path,
    columns: int | None = None,
) -> None:
    """Writes a PNG with a labelled row for each prompt, its images side by side, in order.

    columns: images beside one another before a prompt's row is continued below; None keeps each
    prompt in one row. Tiny images grow by a whole factor without smoothing, to MIN_TILE pixels or
    just above; large ones shrink to MAX_TILE or, in a grid of very many, further. What lies between
    is kept pixel for pixel. Raises TypeError or ValueError for images or prompts of another form.
    """
    tiles = _tiles(images)
    if len(prompts) != len(tiles):
        raise ValueError(f"prompts has {len(prompts)} entries, expected one an image: {len(tiles)}")
    if columns is not None and columns < 1:
        raise ValueError(f"columns is {columns}, expected at least 1")
    groups: dict[str, list[Image.Image]] = {}
    for prompt, tile in zip(prompts, tiles):
        groups.setdefault(prompt, []).append(tile)
    columns = min(columns or len(tiles), max(map(len, groups.values())))
    width, height = tiles[0].size
    font = _font(max(14, height // 9))
    line = round(font.size * 1.25)
    gap = max(2, width // 24)

    rows = {prompt: math.ceil(len(group) / columns) for prompt, group in groups.items()}
    letters = round(max(1.2 * width, 150) / (0.55 * font.size))
    labels = {
        prompt: textwrap.wrap(
            prompt, letters, max_lines=max(1, rows[prompt] * height // line), placeholder=" ..."
        )
        for prompt in groups
    }
    lengths = [font.getlength(text) for label in labels.values() for text in label]
    left = math.ceil(max(lengths, default=0)) + 4 * gap
    total = gap + sum(n * (height + gap) + gap for n in rows.values())
    canvas = Image.new("RGB", (left + columns * (width + gap), total), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for prompt, group in groups.items():
        block = rows[prompt] * (height + gap) - gap
        draw.multiline_text(
            (left - 2 * gap, top + block / 2),
            "\n".join(labels[prompt]),
            fill=INK,
            font=font,
            anchor="rm",
            align="right",
            spacing=line - font.size,
        )
        for index, tile in enumerate(group):
            down, across = divmod(index, columns)
            canvas.paste(tile, (left + across * (width + gap), top + down * (height + gap)))
        top += block + 2 * gap
    _save_png(canvas, path, {"label_width": left, "font_size": font.size})


def write_before_after(
    samples_dir: str | Path, path: str | Path, first_update: int, last_update: int
) -> None:
    """Puts two grids of the same prompts and noises side by side, each under its update's number.

    They are read from samples_dir, where write_grid has put them under sample_path. Raises
    FileNotFoundError, or ValueError if they are not two grids of one layout.
    """
    grids, layouts = [], []
    for update in (first_update, last_update):
        file = sample_path(samples_dir, update)
        with Image.open(file) as grid:
            if "g2rpo" not in grid.info:
                raise ValueError(f"{file}: expected a grid written by write_grid")
            layouts.append(json.loads(grid.info["g2rpo"]))
            grids.append(grid.convert("RGB"))
    before, after = grids
    if before.size != after.size or layouts[0] != layouts[1]:
        raise ValueError(
            f"{samples_dir}: the grids of updates {first_update} and {last_update} differ in layout"
            f" ({before.size} and {after.size} pixels), expected the same prompts and image size"
        )
    left, font = layouts[0]["label_width"], _font(layouts[0]["font_size"], bold=True)
    titles = [
        "before training" if update == 0 else f"after {count(update, 'update')}"
        for update in (first_update, last_update)
    ]
    after = after.crop((left, 0, *after.size))  # the labels are there once already
    space, top = round(1.5 * font.size), 2 * round(font.size)
    # a grid of few tiles is narrower than its title
    second = space + max(before.width, left + math.ceil(font.getlength(titles[0])))
    right = second + max(after.width, math.ceil(font.getlength(titles[1])))
    canvas = Image.new("RGB", (right, top + before.height), "white")
    draw = ImageDraw.Draw(canvas)
    for grid, x, title_x, title in zip((before, after), (0, second), (left, second), titles):
        canvas.paste(grid, (x, top))
        draw.text((title_x, top / 2), title, fill=INK, font=font, anchor="lm")
    _save_png(canvas, path, {})


def _tiles(images: torch.Tensor) -> list[Image.Image]:
    """Checks the images and brings them to the size they have in a grid."""
    if not images.is_floating_point():
        raise TypeError(f"images is {images.dtype}, expected a floating point dtype")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images has shape {list(images.shape)}, expected [N, C, H, W] with C = 1 or 3 and"
            " no empty dimension"
        )
    images = images.detach().to("cpu", torch.float32)
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # a NaN fails it too
        raise ValueError(f"images has values from {low:.4g} to {high:.4g}, expected them in [0, 1]")
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    pixels = pixels.expand(-1, -1, -1, 3).contiguous().numpy()
    height, width = images.shape[2:]
    longer = max(height, width)
    if longer < MIN_TILE:
        factor, filter_ = math.ceil(MIN_TILE / longer), Image.Resampling.NEAREST
    else:
        most = max(MIN_TILE, min(MAX_TILE, math.isqrt(GRID_PIXELS // len(images))))
        factor, filter_ = min(1, most / longer), Image.Resampling.LANCZOS
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return [Image.fromarray(each).resize(size, filter_) for each in pixels]


def _font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic, Arabic; no Chinese."""
    weight = "bold" if bold else "normal"
    properties = font_manager.FontProperties(family="DejaVu Sans", weight=weight)
    return ImageFont.truetype(font_manager.findfont(properties, fallback_to_default=False), size)


def _save_png(picture: Image.Image, path: str | Path, layout: dict[str, float]) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("g2rpo", json.dumps(layout))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True, pnginfo=info)
    write_beside(path, buffer.getvalue())


# The page.


def write_report(run_dir: str | Path) -> Path:
    """Makes curves.png, samples/before_after.png and report.html anew; returns the last one's path.

    The page needs nothing but itself: its pictures are data URIs, and it has no scripts. Raises
    FileNotFoundError without config.yaml or metrics.jsonl, ValueError without an evaluated row.
    """
    run_dir = Path(run_dir)
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    train = (yaml.safe_load(config_text) or {}).get("train", {})
    rows = MetricsLog(run_dir / "metrics.jsonl").rows()
    curves, samples = run_dir / "curves.png", run_dir / "samples"
    write_curves(rows, curves)
    # a grid beyond the last row is left from before a resume
    updates = [update for update in _sampled_updates(samples) if update <= rows[-1]["update"]]
    grids = [sample_path(samples, update) for update in updates[:1]]
    if len(updates) > 1:
        grids = [samples / "before_after.png"]
        write_before_after(samples, grids[0], updates[0], updates[-1])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    images = train.get("evaluation_samples")
    page = environment.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        rewards=[_headline(change, images) for change in changes(rows)],
        images=images,
        curves=_data_uri(curves),
        samples=[_data_uri(grid) for grid in grids],
        compared=len(updates) > 1,
        facts=_facts(rows, train.get("updates")),
        phases=_phase_totals(rows),
        config=config_text,
    )
    write_beside(run_dir / "report.html", page.encode())
    return run_dir / "report.html"


def _sampled_updates(samples_dir: Path) -> list[int]:
    names = (re.fullmatch(r"update-(\d{6,})\.png", file.name) for file in samples_dir.glob("*.png"))
    return sorted(int(name[1]) for name in names if name)


def _headline(change: Change, images: int | None) -> dict[str, str]:
    """A line of the table before -> after, as text, with standard errors if images are known."""

    def error(*stds: float | None) -> float | None:
        return None if images is None or None in stds else math.hypot(*stds) / math.sqrt(images)

    def text(value: float | None, error: float | None, sign: bool = False) -> str:
        if value is None or error is None:
            return number(value, sign)
        return f"{number(value, sign)} ± {number(error) if error < 5e-4 else format(error, '.3f')}"

    once = change.first_update == change.last_update
    both = error(change.before_std, change.after_std)
    clear = change.difference is not None and abs(change.difference) > 2 * (both or 0.0)
    return {
        "kind": KINDS[change.kind],
        "name": change.name,
        "before": text(change.before, error(change.before_std)),
        "after": "-" if once else text(change.after, error(change.after_std)),
        "change": "-" if once else text(change.difference, both, sign=True),
        "direction": change.direction,
        "emphasis": change.direction if clear else "",
    }


def _facts(rows: Sequence[Row], planned: int | None) -> list[tuple[str, str]]:
    last = rows[-1]
    evaluations, seconds = last.get("evaluations") or 0, last.get("seconds") or 0.0
    peak = max(row.get("peak_memory_bytes") or 0 for row in rows)
    versions = [f"Python {platform.python_version()}"]
    for package in ("g2rpo", "torch", "diffusers"):
        found = next(iter(metadata.distributions(name=package)), None)
        versions += [] if found is None else [f"{package} {found.version}"]
    return [
        ("Updates", f"{last['update']:,}" + ("" if planned is None else f" of {planned:,}")),
        ("Transformer evaluations, of training", f"{evaluations:,}"),
        ("Training time", duration(seconds)),
        ("Evaluations a second", f"{evaluations / seconds:,.0f}" if seconds else "-"),
        ("Updates skipped", f"{last.get('skipped_updates') or 0:,}"),
        ("Groups without spread", f"{sum(row.get('zero_spread_groups') or 0 for row in rows):,}"),
        ("Groups with a failed reward", f"{sum(row.get('failed_groups') or 0 for row in rows):,}"),
        ("Peak memory", f"{peak / 2**30:.2f} GiB" if peak else "-"),
        ("Versions where this page was made", ", ".join(versions)),
    ]


def _phase_totals(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """Phase, its total time in words, its percentage of all phases; the longest first."""
    totals = {phase: sum(seconds) for phase, seconds in _phases(rows).items()}
    everything = sum(totals.values())
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return [(name, duration(total), 100 * total / everything) for name, total in ordered if total]


def _data_uri(picture: Path) -> str:
    """A picture for the page; a grid of photographs, huge as a PNG, goes in as a JPEG."""
    data, kind = picture.read_bytes(), "png"
    if len(data) > JPEG_FROM_BYTES:
        smaller = io.BytesIO()
        Image.open(picture).convert("RGB").save(smaller, format="JPEG", quality=88)
        data, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
