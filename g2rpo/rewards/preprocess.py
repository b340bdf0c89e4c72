"""Images as a CLIP sees them, from tensors, on their device, a batch at a time.

What it replaces goes an image at a time through PIL: 8-bit pixels, PIL's bicubic resize, a crop or
a border, the mean and deviation of the training set. PIL resizes one axis and then the other, and
rounds to 8 bits after each. So does this: torch's antialiased bicubic interpolation has the same
kernel (a = -0.5), and with both roundings more than 99 % of the pixels of a photograph are PIL's
and the others one step of 255 away. Without any rounding the mean difference is 0.28 of a step,
with a single one at the end 0.14: a reward of a fine-tuned policy should not learn those. The width
comes first, as in every Pillow under which these scorers were published; Pillow 13 begins with the
height where that shrinks by more than twice as many pixels, an upright image that is squashed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of every CLIP here, red, green, blue
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
RESIZES = ("shortest", "squash", "longest")
BEYOND = 1e-3  # how far outside [0, 1] a pixel may be, from rounding


@dataclass(frozen=True)
class Preprocess:
    """[N, 3, H, W] in [0, 1] -> [N, 3, size, size], normalised float32.

    resize: "shortest", the shorter side to `size`, then the middle is cut out (OpenAI, open_clip);
    "squash", both sides to `size` (DFN); "longest", the longer side to `size`, then black borders
    (hpsv2). Squares are the same in all three. crop_down: where the margin is odd, cut the smaller
    half off at the top or left, as transformers does, instead of rounding half to even, as
    torchvision does.
    """

    size: int
    resize: str = "shortest"
    crop_down: bool = False
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD

    def __post_init__(self) -> None:
        if self.resize not in RESIZES:
            raise ConfigurationError(
                f"resize is {self.resize!r}; expected one of {', '.join(RESIZES)}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Of images without NaN. Values outside [0, 1] are clamped, as 8 bits would."""
        mean, std = (
            torch.tensor(values, device=images.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return self.pixels(images).div_(255).sub_(mean).div_(std)

    def pixels(self, images: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, 3, size, size]
        """The same before the normalisation: whole numbers in [0, 255], float32."""
        if images.device.type == "cpu" and len(images) > 1:  # one alone stays in the cache
            return torch.cat([self.pixels(image) for image in images.split(1)])
        height, width = images.shape[-2:]
        rows, columns = self._resized(height, width)
        levels = _levels(images.float().mul(255))
        if columns != width:
            levels = _resize(levels, height, columns)
        if rows != height:
            levels = _resize(levels, rows, columns)
        return self._fitted(levels)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Of the whole image, before the crop or the borders."""
        size, short, long = self.size, min(height, width), max(height, width)
        if self.resize == "squash":
            return size, size
        if self.resize == "longest":
            scale = size / float(long)
            return round(height * scale), round(width * scale)
        other = int(size * long / short)
        return (size, other) if height <= width else (other, size)

    def _fitted(self, levels: Tensor) -> Tensor:
        height, width = levels.shape[-2:]
        down, across = self.size - height, self.size - width
        if down > 0 or across > 0:
            before = (max(across, 0) // 2, max(down, 0) // 2)
            levels = F.pad(
                levels,
                (before[0], max(across, 0) - before[0], before[1], max(down, 0) - before[1]),
            )
        top, left = self._margin(max(-down, 0)), self._margin(max(-across, 0))
        return levels[..., top : top + self.size, left : left + self.size]

    def _margin(self, cut: int) -> int:
        return cut // 2 if self.crop_down else round(cut / 2)


def _resize(levels: Tensor, height: int, width: int) -> Tensor:
    """One axis, whichever differs."""
    return _levels(F.interpolate(levels, (height, width), mode="bicubic", antialias=True))


def _levels(values: Tensor) -> Tensor:
    """In place, to what 8 bits can hold."""
    return values.round_().clamp_(0, 255)


def check(images: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
    """Hold the arguments of a scorer to its contract; prompts: None where there are none.

    Returns the images, those with a pixel that is not finite replaced by black ones, and which
    were finite, [N] bool. Raises TypeError or ValueError, naming the argument, otherwise.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images is a {type(images).__name__}; expected a tensor [N, 3, H, W]")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images has shape {tuple(images.shape)}; expected [N, 3, H, W]")
    if not images.is_floating_point():
        raise ValueError(
            f"images has dtype {images.dtype}; expected a floating one, values in [0, 1]"
        )
    if prompts is not None:
        _check_prompts(prompts, len(images))
    finite = torch.ones(len(images), dtype=torch.bool, device=images.device)
    if not len(images):
        return images, finite
    low, high = torch.stack(images.aminmax()).tolist()
    if not math.isfinite(high - low):  # NaN, where there is any, is both
        finite = images.isfinite().flatten(1).all(1)
        images = torch.where(finite[:, None, None, None], images, torch.zeros_like(images))
        low, high = torch.stack(images.aminmax()).tolist()
    if low < -BEYOND or high > 1 + BEYOND:
        raise ValueError(
            f"images has values from {low:.4g} to {high:.4g}; expected [0, 1], of a decoded image"
        )
    return images, finite


def _check_prompts(prompts: Sequence[str], count: int) -> None:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        kinds = "a string" if isinstance(prompts, str) else "something else than strings"
        raise TypeError(f"prompts is or holds {kinds}; expected a list of {count} strings")
    if len(prompts) != count:
        raise ValueError(f"prompts has {len(prompts)} entries; expected {count}, one an image")
