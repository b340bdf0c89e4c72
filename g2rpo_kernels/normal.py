"""normal: the standard-normal noise a step draws, a pure function of its seeds.

Philox4x32-10 (Salmon et al., SC 2011), all four output words used, as Triton's `tl.randn4x` does:
element e of a branch is output e % 4 of counter (lo32(e // 4), hi32(e // 4), 0, 0) under the key
(lo32(seed), hi32(seed)). Every backend produces these integers exactly, and these floats to 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_seeds
from ._library import define_op

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_TO_UNIFORM = 4.6566127342e-10  # just under 2^-31, so that the product stays below 1 in float32
_SMALLEST = 1e-7  # keeps log(u) finite; caps the noise at 5.7 standard deviations


def normal(
    seeds: Tensor,  # int64 [*B]
    shape: Sequence[int],
) -> Tensor:  # [*B, *shape]
    """Standard-normal noise of `shape` for every seed; what `sde_step(..., seeds=seeds)` draws.

    seeds: int64 of any shape [*B], 64 unsigned bits each; contiguous or copied.
    shape: the shape of one branch, without the seeds' own dimensions.
    Returns float32 [*B, *shape] on the seeds' device. Not differentiable.

    Equivalent to `torch.randn(*seeds.shape, *shape)`, but the same on every device and backend,
    and for a seed independent of all the others.
    """
    check_seeds(seeds)
    if not isinstance(shape, Sequence) or not all(isinstance(n, int) for n in shape):
        raise TypeError(f"shape is {shape!r}; expected a sequence of integers")
    if any(n < 0 for n in shape):
        raise ValueError(f"shape is {tuple(shape)}; expected sizes of 0 or more")
    return _normal(seeds, shape)


def philox(counter: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of counter (lo32, hi32, 0, 0) under key (lo32, hi32) of seeds.

    counter, seeds: int64, broadcast against each other. Returns four int64 tensors in [0, 2^32).
    Written with int64 operations: a 32x32-bit product wraps modulo 2^64 in them, so its high word
    is an arithmetic shift and a mask.
    """
    key0, key1 = seeds & _MASK, (seeds >> 32) & _MASK
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3 = counter & _MASK, (counter >> 32) & _MASK, zero, zero
    for _ in range(10):
        product0, product2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product2 >> 32) & _MASK) ^ c1 ^ key0
        c2 = ((product0 >> 32) & _MASK) ^ c3 ^ key1
        c1, c3 = product2 & _MASK, product0 & _MASK
        key0, key1 = (key0 + _KEY_STEPS[0]) & _MASK, (key1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _uniform(words: Tensor) -> Tensor:
    """32 random bits -> float32 in [0, 1): read as int32, negative values folded onto -x - 1."""
    return torch.minimum(words, words ^ _MASK).float() * _TO_UNIFORM


def _box_muller(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    radius = (-2.0 * u1.clamp_min(_SMALLEST).log()).sqrt()
    angle = (2 * math.pi) * u2
    return radius * angle.cos(), radius * angle.sin()


def normal_reference(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    counter = torch.arange((count + 3) // 4, dtype=torch.int64, device=seeds.device)
    w0, w1, w2, w3 = (_uniform(word) for word in philox(counter, seeds.unsqueeze(-1)))
    noise = torch.stack([*_box_muller(w0, w1), *_box_muller(w2, w3)], dim=-1)
    return noise.flatten(-2)[..., :count].reshape([*seeds.shape, *shape]).contiguous()


def _fake(seeds, shape):
    return seeds.new_empty((*seeds.shape, *shape), dtype=torch.float32)


_normal = define_op(
    "normal(Tensor seeds, SymInt[] shape) -> Tensor", reference=normal_reference, fake=_fake
)
