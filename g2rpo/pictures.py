"""Pictures in files of their own, which say what they show."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from .errors import TrainingError
from .metrics import write_beside


def picture_name(index: int, prompt: str) -> str:
    """0000-first-words-of-the-prompt.png"""
    words = "-".join(re.findall(r"\w+", prompt.lower())[:6])[:48].rstrip("-")
    return f"{index:04d}-{words}.png" if words else f"{index:04d}.png"


def to_picture(image: Tensor) -> Image.Image:  # [3 or 1, H, W] in [0, 1]
    """Of 8 bits a channel. What is not finite is black."""
    levels = (image.float().nan_to_num(0, 0, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    return Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))


def write_picture(picture: Image.Image, path: Path, said: Mapping[str, object]) -> None:
    """A PNG; said: its text chunks. Raises TrainingError where it cannot be written."""
    info = PngImagePlugin.PngInfo()
    for key, value in said.items():
        info.add_text(key, str(value))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    try:
        write_beside(path, buffer.getvalue())
    except OSError as error:
        raise TrainingError(f"{path} cannot be written: {error}") from error
