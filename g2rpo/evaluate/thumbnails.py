"""Small pictures for a page, each in it once however often it is shown."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageOps

TINY_SIDE = 96  # pixels that the longer side of a tiny image grows to, by a whole factor
LONGEST_SIDE = 320  # of a photograph in the page
PAGE_PIXELS = 24_000_000  # of all of them; beyond that they are smaller: a page of some 10 MB


@dataclass(frozen=True)
class Thumbnail:
    id: str  # of the element in the page that holds it
    width: int
    height: int
    data: str  # data URI
    href: str  # the full file, relative to the page


def thumbnails(folder: Path, files: Sequence[Path]) -> dict[Path, Thumbnail]:
    """A thumbnail a file: a PNG of the very pixels where it is tiny, else a JPEG.

    files are named relative to the folder. Raises OSError naming one that cannot be read.
    """
    files = list(dict.fromkeys(files))
    side = min(LONGEST_SIDE, math.isqrt(PAGE_PIXELS // max(1, len(files))))
    return {file: _thumbnail(folder, file, f"p{i}", side) for i, file in enumerate(files)}


def _thumbnail(folder: Path, file: Path, id: str, side: int) -> Thumbnail:
    try:
        with Image.open(folder / file) as opened:
            opened.draft("RGB", (2 * side, 2 * side))  # a large JPEG is not decoded in full
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except OSError as error:
        raise OSError(f"{folder / file} cannot be read as an image: {error}") from error
    data = io.BytesIO()
    factor = TINY_SIDE // max(picture.size)
    if factor >= 1:
        size = (factor * picture.width, factor * picture.height)
        picture = picture.resize(size, Image.Resampling.NEAREST)
        picture.save(data, format="PNG", optimize=True)
    else:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        picture.save(data, format="JPEG", quality=85)
    kind = "png" if factor >= 1 else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
    return Thumbnail(id, *picture.size, uri, quote(file.as_posix()))
