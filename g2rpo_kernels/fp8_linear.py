"""fp8_linear: a linear layer on FP8 operands with a scale a row, for forwards without gradients.

    y[m, n] = (sum_k x[m, k] w[n, k]) * scale_x[m] * scale_w[n] + bias[n]

The product is torch's own scaled matmul. Where the hardware has none, `emulate=True` computes the
formula exactly: products of e4m3 are multiples of 2^-18, whose sum float64 holds without rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import FLOATS, check_device, check_floating, refuse_grad
from .quantize_fp8 import FP8, Fp8Tensor, check_fp8

# Sums in the tensor core's own accumulator: its error is small beside that of rounding to e4m3.
FAST_ACCUMULATION = True
MULTIPLE = 16  # what the hardware wants of K and N


class Fp8Support(NamedTuple):
    """How a device multiplies FP8 matrices."""

    kind: str  # "rowwise": scales inside the product; "tensorwise": after it; "none"
    reason: str


def fp8_linear(
    x: Fp8Tensor,  # values [..., K], scales [...]
    weight: Fp8Tensor,  # values [N, K], scales [N]
    bias: Tensor | None = None,  # [N]
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    emulate: bool = False,
) -> Tensor:  # [..., N]
    """The linear layer x W^T + bias of what `quantize_fp8` made of x and W.

    K and N: multiples of 16. bias: floating, used as out_dtype rounds it. out_dtype: bfloat16 is
        what the hardware writes itself; float32 and float16 are rounded from its float32 product.
    emulate: compute without FP8 hardware, on any device and slowly: exact up to one rounding to
        out_dtype, and a row's bits do not depend on the others'. The hardware's sum is not exact.
    Raises RuntimeError where `fp8_support(device).kind` is "none" and emulate is False. Not
    differentiable: whatever requires a gradient is refused.

    Equivalent to:
        y = F.linear(dequantize(x), dequantize(weight), bias).to(out_dtype)
    """
    _check(x, weight, bias, out_dtype)
    if bias is not None:
        bias = bias.to(out_dtype)
    leading, width = x.scales.shape, len(weight.scales)
    if not emulate:
        support = fp8_support(x.values.device)
        if support.kind == "none":
            raise RuntimeError(
                f"fp8_linear on {_name(x.values.device)}: {support.reason}; expected a device with "
                "FP8 products, or emulate=True, which is slow"
            )
    if x.scales.numel() == 0 or width == 0:
        return x.scales.new_empty((*leading, width), dtype=out_dtype)
    rows = Fp8Tensor(
        x.values.reshape(-1, x.values.shape[-1]).contiguous(), x.scales.reshape(-1).contiguous()
    )
    weight = Fp8Tensor(weight.values.contiguous(), weight.scales.contiguous())
    if emulate:
        y = _emulated(rows, weight, bias)
    elif support.kind == "rowwise" and out_dtype is torch.bfloat16:
        y = _rowwise(rows, weight, bias)
    else:
        y = _tensorwise(rows, weight, bias)
    return y.to(out_dtype).view(*leading, width)


def fp8_support(device: torch.device | str) -> Fp8Support:
    """How `fp8_linear` multiplies on a device, tried once on small matrices.

    "rowwise": compute capability 8.9 or later and a torch that takes a scale a row. "tensorwise":
    one that takes a scale a matrix; the rows' scales are then applied to a float32 product.
    Code that torch.compile traces must find the answer there: call this once before.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Fp8Support("none", f"FP8 products run on GPUs, not on {device.type}")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device.index not in _answers:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"how {device} multiplies FP8 is not known yet, and torch.compile cannot trace "
                "finding out; expected a call of fp8_support(device) before"
            )
        _answers[device.index] = _ask(device)
    return _answers[device.index]


_answers: dict[int, Fp8Support] = {}  # by GPU


def _ask(device: torch.device) -> Fp8Support:
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 9):
        return Fp8Support(
            "none",
            "its compute capability is {}.{}, and FP8 products came with 8.9".format(*capability),
        )
    try:
        _try(_rowwise, device)
        return Fp8Support("rowwise", "torch takes a scale a row")
    except (RuntimeError, ValueError) as error:
        rowwise = _first_line(error)
    try:
        _try(_tensorwise, device)
        return Fp8Support("tensorwise", f"torch takes no scale a row: {rowwise}")
    except (RuntimeError, ValueError) as error:
        return Fp8Support("none", f"torch has no FP8 product for it: {_first_line(error)}")


def _try(product, device: torch.device) -> None:
    """Raise RuntimeError unless `product` works: 32 x 32 x 64, with scales that tell rows apart."""
    with torch.no_grad():
        ones = torch.ones(32, 64, device=device).to(FP8)
        scales = torch.arange(1.0, 33.0, device=device)
        bias = torch.ones(32, device=device, dtype=torch.bfloat16)
        got = product(Fp8Tensor(ones, scales), Fp8Tensor(ones, scales), bias).float()
        want = 64 * scales[:, None] * scales + 1
        if not torch.allclose(got, want, rtol=0.01):
            raise RuntimeError("its product is wrong")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _name(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


# Each of the three: x [M, K], weight [N, K], both contiguous, bias [N] or None -> [M, N]. The
# second operand is wanted column-major: a transposed view of the weight is just that.


def _rowwise(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None) -> Tensor:
    return torch._scaled_mm(
        x.values, weight.values.t(), x.scales.view(-1, 1), weight.scales.view(1, -1),
        bias=bias, out_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUMULATION,
    )  # fmt: skip


def _tensorwise(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None) -> Tensor:
    one = torch.ones((), dtype=torch.float32, device=x.values.device)
    product = torch._scaled_mm(
        x.values, weight.values.t(), one, one,
        out_dtype=torch.float32, use_fast_accum=FAST_ACCUMULATION,
    )  # fmt: skip
    product.mul_(x.scales.view(-1, 1)).mul_(weight.scales)
    return product if bias is None else product.add_(bias)


def _emulated(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None) -> Tensor:
    product = x.values.to(torch.float64) @ weight.values.to(torch.float64).t()
    product = product * x.scales[:, None] * weight.scales
    return product if bias is None else product + bias


def _check(x: Fp8Tensor, weight: Fp8Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> None:
    check_fp8("x", x)
    check_fp8("weight", weight)
    if out_dtype not in FLOATS[:3]:
        raise ValueError(f"out_dtype is {out_dtype}; expected float32, bfloat16 or float16")
    check_device("weight", weight.values, "x", x.values)
    columns, shape = x.values.shape[-1], tuple(weight.values.shape)
    if len(shape) != 2 or shape[1] != columns:
        raise ValueError(
            f"weight has shape {shape}; expected [N, {columns}] beside x {tuple(x.values.shape)}"
        )
    if shape[0] % MULTIPLE or columns % MULTIPLE:
        raise ValueError(
            f"weight has shape {shape}; expected multiples of {MULTIPLE}, as the hardware does"
        )
    if bias is not None:
        check_floating("bias", bias)
        check_device("bias", bias, "x", x.values)
        if bias.shape != shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {shape[:1]}")
    refuse_grad(
        "fp8_linear", "it is for forwards alone",
        **{"x.values": x.values, "x.scales": x.scales, "weight.values": weight.values,
           "weight.scales": weight.scales, "bias": bias},
    )  # fmt: skip
