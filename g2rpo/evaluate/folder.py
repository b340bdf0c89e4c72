"""Folders of images that something else has drawn: what is in them, and of which prompts.

The prompt of an image, by the first of these that there is:

    data.prompts         a file with as many prompts as there are images, which go by name
    metadata.jsonl       in the folder, as Hugging Face's imagefolder has it: a line an image,
                         {"file_name": "0000.png", "prompt": "a red fox"}; "text" serves as well
    the text chunk       'prompt' of a PNG, which `g2rpo sample` and `g2rpo evaluate` write
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..config import Config
from ..data import read_prompts
from ..errors import ConfigurationError
from ..metrics import count

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"
GREY = ("L", "1", "I;16", "I;16L", "I;16B")
# Pillow's, of files that are cut or damaged, one kind for every format.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Folder:
    """M images, by name."""

    files: list[Path]
    prompts: list[str | None]  # their own; None: there is none
    sizes: list[tuple[int, int]]  # height and width in pixels, upright
    grey: bool  # all of them have one channel

    @property
    def names(self) -> list[str]:
        return [file.name for file in self.files]


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, by name; those in folders of it are not among them."""
    if not folder.is_dir():
        return []
    found = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.is_file()]
    return sorted(f for f in found if not f.name.startswith("."))


def read_folder(folder: Path, argument: str, column: str) -> Folder:
    """Every image is opened and decoded once, so that a damaged one is found before others are
    scored. argument: what named the folder. column: data.column.

    Raises ConfigurationError naming the file.
    """
    files = images_in(folder)
    if not files:
        raise ConfigurationError(
            f"{argument} is {str(folder)!r}; expected a folder with images ({', '.join(SUFFIXES)})"
        )
    listed = _metadata(folder, [file.name for file in files], column)
    prompts, sizes, grey = [], [], True
    for file in files:
        picture, said = _open(file)
        prompts.append(listed.get(file.name, said))
        sizes.append((picture.height, picture.width))
        grey = grey and picture.mode in GREY
    return Folder(files, prompts, sizes, grey)


def prompts_of(folder: Folder, config: Config) -> tuple[list[str], str]:
    """A prompt an image, and where they are from. Raises ConfigurationError for one without."""
    path, column = config.data.prompts, config.data.column
    files = folder.files
    if path is not None:
        prompts = read_prompts(path, column)
        if len(prompts) != len(files):
            raise ConfigurationError(
                f"data.prompts is {path!r}, which holds {count(len(prompts), 'different prompt')}; "
                f"expected one an image, in the order of their names, and there are {len(files)} "
                f"({files[0].name}, ...). Where a prompt has several images, write {METADATA} into "
                'their folder instead, a line an image: {"file_name": "'
                f'{files[0].name}", "prompt": "{prompts[0]}"}}'
            )
        return prompts, path
    for file, prompt in zip(files, folder.prompts, strict=True):
        if prompt is None:
            raise ConfigurationError(
                f"{file} has no prompt; expected --data.prompts FILE, a line for it in "
                f"{file.parent / METADATA}, or a PNG text chunk 'prompt'"
            )
    listed = (files[0].parent / METADATA).is_file()
    return [str(p) for p in folder.prompts], METADATA if listed else "the images' text chunks"


def check_pairs(folder: Folder, base: Folder, prompts: Sequence[str], argument: str) -> None:
    """Raise ConfigurationError unless both have the same names, and no prompts that differ."""
    place = str(base.files[0].parent)
    lone = sorted(set(folder.names) - set(base.names))
    others = sorted(set(base.names) - set(folder.names))
    if lone or others:
        raise ConfigurationError(
            f"{argument} is {place!r}, where {len(lone)} of the {len(folder.files)} images have no "
            f"partner of their name and {len(others)} of its {len(base.files)} are no partners, "
            f"the first {(lone or others)[0]!r}; expected the same names in both folders"
        )
    for name, prompt, theirs in zip(folder.names, prompts, base.prompts, strict=True):
        if theirs is not None and theirs != prompt:
            raise ConfigurationError(
                f"{argument} is {place!r}, whose {name} is of the prompt {theirs[:80]!r}; expected "
                f"{prompt[:80]!r}, as of its partner"
            )


def load_image(file: Path, grey: bool) -> Tensor:  # [1 if grey else 3, H, W] float32 in [0, 1]
    """An image as a viewer shows it. Raises ConfigurationError naming the file."""
    picture, _ = _open(file)
    if picture.mode.startswith("I;16"):
        levels = np.asarray(picture).astype(np.float32) / 65535
    else:
        picture = picture.convert("L" if picture.mode in GREY else "RGB")
        levels = np.asarray(picture).astype(np.float32) / 255
    image = torch.from_numpy(levels)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    return image if grey else image.expand(3, -1, -1)


def _open(file: Path) -> tuple[Image.Image, str | None]:
    """The decoded image, upright, and the prompt that it carries."""

    def wrong(what: str, expected: str) -> ConfigurationError:
        return ConfigurationError(f"{file} {what}; expected {expected}")

    try:
        with Image.open(file) as opened:
            frames = getattr(opened, "n_frames", 1)
            opened.load()
            text = getattr(opened, "text", {}).get("prompt")
            picture = ImageOps.exif_transpose(opened)
    except DAMAGE as error:
        raise wrong(f"cannot be read: {error}", f"a whole image ({', '.join(SUFFIXES)})") from error
    if frames != 1:
        raise wrong(f"holds {frames} frames", "a single image")
    if "A" in picture.mode.upper() and picture.mode != "LAB" or "transparency" in picture.info:
        opaque = picture.convert("RGBA").getchannel("A").getextrema() == (255, 255)
        if not opaque:
            raise wrong(
                "is transparent in places", "an opaque image, since what lies behind is not known"
            )
        picture = picture.convert("L" if picture.mode in ("LA", "La") else "RGB")
    if picture.mode == "P":
        picture = picture.convert("RGB")
    if picture.mode not in (*GREY, "RGB"):
        raise wrong(f"has the mode {picture.mode!r}", "RGB or greyscale")
    return picture, text if text and text.strip() else None


def _metadata(folder: Path, names: Sequence[str], column: str) -> dict[str, str]:
    """File name -> prompt, by metadata.jsonl if it is there."""
    file = folder / METADATA
    if not file.is_file():
        return {}
    found: dict[str, str] = {}
    keys = ("prompt", "text") if column == "prompt" else (column,)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} cannot be read: {error}; expected UTF-8 text") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue

        def wrong(fault: str, number: int = number) -> ConfigurationError:
            return ConfigurationError(f"{file}, line {number}: {fault}")

        try:
            row = json.loads(line)
        except ValueError as error:
            raise wrong(f"expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise wrong(f"expected a JSON object, found {line[:80]!r}")
        name = row.get("file_name")
        if name not in names:
            raise wrong(f"file_name is {name!r}; expected an image in the folder, as {names[0]!r}")
        if name in found:
            raise wrong(f"file_name is {name!r}, as in an earlier line; expected a line an image")
        prompt = next((row[key] for key in keys if key in row), None)
        if not isinstance(prompt, str) or not prompt.strip():
            raise wrong(f"{' or '.join(keys)} is {prompt!r}; expected the prompt of {name}")
        found[name] = prompt
    return found
