"""quantize_fp8: rows in e4m3, each with a scale of its own.

    scale[r]    = max_k |x[r, k]| / 448
    values[r, k] = e4m3(x[r, k] / scale[r])            x ~ values * scale

448 is the largest e4m3. A row of zeros has scale 1; one with an infinity or a NaN has scale NaN, so
that it shows in whatever is computed from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, check_device, check_floating, refuse_grad
from ._library import define_op

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
# Rows whose largest element is below 448 times this keep it as their scale: 1 / scale is finite.
LEAST_SCALE = 2.0**-126


class Fp8Tensor(NamedTuple):
    """values * scales[..., None], as `quantize_fp8` makes it."""

    values: Tensor  # [..., K] float8_e4m3fn
    scales: Tensor  # [...] float32


def quantize_fp8(x: Tensor) -> Fp8Tensor:  # [..., K] -> values [..., K], scales [...]
    """Rows of x (its last dimension) as the nearest e4m3, ties to even, with a float32 scale each.

    x: float32, bfloat16 or float16 (float64, which is rounded to float32 first, on the reference
        backend), at least one element a row; non-contiguous tensors are copied. Not
        differentiable: an x that requires a gradient is refused.
    The scale is max|x| * float32(1/448), at least 2^-126, and x is multiplied by its reciprocal,
    all in float32: the same bits on every backend.

    Equivalent to:
        scales = x.float().abs().amax(-1) / 448                              # 1 where that is 0
        values = (x.float() / scales[..., None]).to(torch.float8_e4m3fn)
    """
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [..., K] with at least one element a row"
        )
    refuse_grad("quantize_fp8", "rounding to e4m3 has none", x=x)
    return Fp8Tensor(*_quantize_fp8(x))


def dequantize(quantized: Fp8Tensor, dtype: torch.dtype = torch.float32) -> Tensor:  # [..., K]
    """values * scales[..., None] in `dtype`: the product in float32 (or float64), rounded once."""
    check_fp8("quantized", quantized)
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}; expected float32, bfloat16, float16 or float64")
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return (quantized.values.to(wide) * quantized.scales[..., None].to(wide)).to(dtype)


@torch.no_grad()
def refresh_fp8(weights: list[Tensor], out: list[Fp8Tensor]) -> None:
    """out[i] becomes quantize_fp8(weights[i]), in place; on a GPU in one launch a dtype.

    For FP8 copies of parameters, which change at every optimizer step. Gradients are ignored.

    weights: [..., K], as for `quantize_fp8`, on one device. out: of the same shapes there, their
        values and scales contiguous (rows of a larger tensor are), no two overlapping.
    """
    if len(weights) != len(out):
        raise ValueError(f"out has {len(out)} tensors; expected {len(weights)}, one a weight")
    for i, (weight, to) in enumerate(zip(weights, out)):
        _check_refresh(f"weights[{i}]", weight, f"out[{i}]", to, weights[0])
    weights = [weight.detach().contiguous() for weight in weights]
    groups = {}
    for weight, to in zip(weights, out):
        if to.scales.numel():
            groups.setdefault(weight.dtype, []).append((weight, to))
    for dtype, group in groups.items():
        chosen = _quantize_fp8.select(group[0][0].device, dtype is torch.float64)
        if chosen is _quantize_fp8.implementations.get("triton"):
            from .triton.quantize_fp8 import refresh_fp8 as launch

            launch([w for w, _ in group], [to.values for _, to in group],
                   [to.scales for _, to in group])  # fmt: skip
            continue
        for weight, to in group:
            for part, new in zip(to, chosen(weight)):
                part.copy_(new)


def _check_refresh(name: str, weight: Tensor, to_name: str, to: Fp8Tensor, first: Tensor) -> None:
    check_floating(name, weight)
    check_fp8(to_name, to)
    check_device(name, weight, "weights[0]", first)
    check_device(to_name, to.values, name, weight)
    if weight.ndim < 1 or weight.shape[-1] == 0 or to.values.shape != weight.shape:
        raise ValueError(
            f"{to_name}.values has shape {tuple(to.values.shape)} beside {name} "
            f"{tuple(weight.shape)}; expected one shape [..., K] with at least one element a row"
        )
    if not (to.values.is_contiguous() and to.scales.is_contiguous()):
        raise ValueError(f"{to_name} is not contiguous; expected memory that is written in place")


def check_fp8(name: str, x: Fp8Tensor) -> None:
    """values [..., K] float8_e4m3fn and scales [...] float32, on one device."""
    if not isinstance(x, Fp8Tensor):
        raise TypeError(
            f"{name} is a {type(x).__name__}; expected an Fp8Tensor, as quantize_fp8 returns"
        )
    for part, dtype in (("values", FP8), ("scales", torch.float32)):
        given = getattr(x, part)
        if not isinstance(given, Tensor) or given.dtype is not dtype:
            what = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"{name}.{part} is {what}; expected a {dtype} tensor")
    if x.values.ndim < 1 or x.scales.shape != x.values.shape[:-1]:
        raise ValueError(
            f"{name}.scales has shape {tuple(x.scales.shape)} beside values "
            f"{tuple(x.values.shape)}; expected one scale a row"
        )
    check_device(f"{name}.scales", x.scales, f"{name}.values", x.values)


def quantize_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float32)
    largest = x.abs().amax(-1)  # NaN if one is
    # Products and not quotients: torch divides by a number differently on CPUs and GPUs.
    scales = (largest * (1 / LARGEST)).clamp(min=LEAST_SCALE)
    scales = scales.masked_fill(largest == 0, 1.0).masked_fill(~largest.isfinite(), torch.nan)
    y = (x * scales.reciprocal()[..., None]).clamp(-LARGEST, LARGEST)
    return y.masked_fill(scales.isnan()[..., None], torch.nan).to(FP8), scales


def fake_fp8(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """For a fake: values of `shape` [..., K] and their scales, on the device of `like`."""
    return like.new_empty(shape, dtype=FP8), like.new_empty(shape[:-1], dtype=torch.float32)


def _fake(x):
    return fake_fp8(x, x.shape)


_quantize_fp8 = define_op(
    "quantize_fp8(Tensor x) -> (Tensor, Tensor)",
    reference=quantize_fp8_reference,
    fake=_fake,
)
