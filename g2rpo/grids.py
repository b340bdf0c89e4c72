"""Grids of samples: the images of one evaluation, and those of two side by side."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .figures import INK
from .metrics import count, write_beside

MIN_TILE, MAX_TILE = 48, 256  # pixels of an image's longer side in a grid
GRID_PIXELS = 2**21  # what all tiles of a grid may add up to, beyond MIN_TILE


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
    font = label_font(max(14, height // 9))
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
    left, font = layouts[0]["label_width"], label_font(layouts[0]["font_size"], bold=True)
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


def label_font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
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
