"""gelu_tanh and gelu_tanh_beside: forward, backward, and rows straight into FP8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fp8 import (
    empty_fp8,
    fp8_bytes,
    from_magnitude,
    magnitude,
    quantize_row,
    row_block,
    row_max,
)
from ._launch import launch

BLOCK = 1024  # elements a program without a sum or maximum over the row
WARPS = 4  # 8 elements a thread: 16 bytes of bfloat16


@triton.jit
def sigmoid_2u(x):
    """(1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)) of float32 x, u = sqrt(2/pi) (x + 0.044715 x^3)."""
    return 1.0 / (1.0 + tl.exp(x * (-1.5957691216057308 + -0.07135481282553484 * (x * x))))


@triton.jit
def gelu(x):
    """gelu(x), float32."""
    x = x.to(tl.float32)
    return x * sigmoid_2u(x)


@triton.jit
def gelu_slope(x):
    """d gelu / dx = s + x s (1 - s) d(2u)/dx, float32."""
    x = x.to(tl.float32)
    # At 30 s has long been 0 or 1 exactly; beyond, x^2 times 0 would in the end be inf times 0. By
    # comparison, because the hardware's minimum drops a NaN.
    x = tl.where(x > 30.0, 30.0, x)
    x = tl.where(x < -30.0, -30.0, x)
    s = sigmoid_2u(x)
    return s + x * (s * (1.0 - s)) * (1.5957691216057308 + 0.2140644384766045 * (x * x))


@triton.jit
def gelu_tanh_kernel(x, y, elements, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < elements - start
    at = start + column
    tl.store(y + at, gelu(tl.load(x + at, mask=inside)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def gelu_tanh_backward_kernel(grad, x, grad_x, elements, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < elements - start
    at = start + column
    g = tl.load(grad + at, mask=inside).to(tl.float32) * gelu_slope(tl.load(x + at, mask=inside))
    tl.store(grad_x + at, g.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def row_start(row, length, batch_stride, row_stride):
    """Where row b * L + l of [B, L, M] begins, with any strides of B and L."""
    batch = row // length
    return batch * batch_stride + (row - batch * length) * row_stride


@triton.jit(do_not_specialize=["length", "left_chunks", "chunks"])
def gelu_tanh_beside_kernel(attention, mlp, y, left, right, length, batch_stride, mlp_stride,
                            left_chunks, chunks, BLOCK: tl.constexpr):  # fmt: skip
    """BLOCK elements of one row of y [B L, left + right]: of its attention, or of its gelu."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    column = tl.arange(0, BLOCK)
    y += row * (left + right)
    if chunk < left_chunks:
        start = chunk * BLOCK
        inside = column < left - start
        part = tl.load(attention + row * left + start + column, mask=inside)
        tl.store(y + start + column, part, mask=inside)
    else:
        start = (chunk - left_chunks) * BLOCK
        inside = column < right - start
        x = mlp + row_start(row, length, batch_stride, mlp_stride) + start
        activated = gelu(tl.load(x + column, mask=inside)).to(y.dtype.element_ty)
        tl.store(y + left + start + column, activated, mask=inside)


@triton.jit(do_not_specialize=["length", "left_chunks", "chunks"])
def gelu_tanh_beside_backward_kernel(grad, mlp, grad_attention, grad_mlp, left, right,
                                     length, batch_stride, mlp_stride, left_chunks, chunks,
                                     BLOCK: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    column = tl.arange(0, BLOCK)
    grad += row * (left + right)
    if chunk < left_chunks:
        start = chunk * BLOCK
        inside = column < left - start
        part = tl.load(grad + start + column, mask=inside)
        tl.store(grad_attention + row * left + start + column, part, mask=inside)
    else:
        start = (chunk - left_chunks) * BLOCK
        inside = column < right - start
        x = mlp + row_start(row, length, batch_stride, mlp_stride) + start
        slope = gelu_slope(tl.load(x + column, mask=inside))
        product = tl.load(grad + left + start + column, mask=inside).to(tl.float32) * slope
        to = grad_mlp + row * right + start + column
        tl.store(to, product.to(grad_mlp.dtype.element_ty), mask=inside)


@triton.jit
def joint_part(mlp, attention, start, left, right, BLOCK: tl.constexpr):
    """Elements start .. start + BLOCK of a row [attention | gelu(mlp)], float32, 0 behind its end.

    attention, mlp: pointers to the row's; attention None: the row is gelu(mlp).
    """
    column = start + tl.arange(0, BLOCK)
    if attention is None:
        return gelu(tl.load(mlp + column, mask=column < right, other=0.0))
    else:
        before = column < left
        beside = column - left
        x = tl.load(mlp + beside, mask=(beside >= 0) & (beside < right), other=0.0)
        a = tl.load(attention + column, mask=before, other=0.0)
        return tl.where(before, a.to(tl.float32), gelu(x))


@triton.jit(do_not_specialize=["length"])
def gelu_tanh_fp8_kernel(mlp, attention, codes, scales, left, right,
                         length, batch_stride, mlp_stride,
                         BLOCK: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """One row [attention | gelu(mlp)] in FP8. WHOLE: it fits one BLOCK."""
    row = tl.program_id(0).to(tl.int64)
    width = left + right
    mlp += row_start(row, length, batch_stride, mlp_stride)
    if attention is not None:
        attention += row * left
    codes += row * width
    column = tl.arange(0, BLOCK)
    if WHOLE:
        part = joint_part(mlp, attention, 0, left, right, BLOCK)
        part_codes, scale = quantize_row(part, row_max(part))
        tl.store(codes + column, part_codes, mask=column < width)
        tl.store(scales + row, scale)
    else:  # read and computed twice; read from the cache the second time
        running = tl.zeros([BLOCK], tl.int32)
        for start in range(0, width, BLOCK):
            part = joint_part(mlp, attention, start, left, right, BLOCK)
            running = tl.maximum(running, magnitude(part))
        largest = from_magnitude(tl.max(running, axis=0))
        for start in range(0, width, BLOCK):
            part = joint_part(mlp, attention, start, left, right, BLOCK)
            part_codes, scale = quantize_row(part, largest)
            tl.store(codes + start + column, part_codes, mask=column < width - start)
            tl.store(scales + row, scale)


def gelu_tanh(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(x.numel(), BLOCK)
    launch(gelu_tanh_kernel, programs, x, y, x.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return y


def gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        gelu_tanh_backward_kernel, triton.cdiv(x.numel(), BLOCK), grad, x, grad_x, x.numel(),
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return grad_x


def gelu_tanh_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = empty_fp8(x.shape, x.device)
    width, rows = x.shape[-1], scales.numel()
    block, warps, whole = row_block(width)
    launch(
        gelu_tanh_fp8_kernel, rows, x, None, fp8_bytes(values), scales, 0, width,
        max(1, rows), 0, width, BLOCK=block, WHOLE=whole, num_warps=warps,
    )  # fmt: skip
    return values, scales


def gelu_tanh_beside(attention: Tensor, mlp: Tensor) -> Tensor:
    (batch, length, left), right = attention.shape, mlp.shape[2]
    y = torch.empty((batch, length, left + right), dtype=mlp.dtype, device=mlp.device)
    left_chunks, right_chunks = triton.cdiv(left, BLOCK), triton.cdiv(right, BLOCK)
    launch(
        gelu_tanh_beside_kernel, batch * length * (left_chunks + right_chunks),
        attention, mlp, y, left, right, length, mlp.stride(0), mlp.stride(1),
        left_chunks, left_chunks + right_chunks, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y


def gelu_tanh_beside_backward(grad: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, right = mlp.shape
    left = grad.shape[2] - right
    grad_attention = torch.empty((batch, length, left), dtype=grad.dtype, device=grad.device)
    grad_mlp = torch.empty(mlp.shape, dtype=mlp.dtype, device=mlp.device)
    left_chunks, right_chunks = triton.cdiv(left, BLOCK), triton.cdiv(right, BLOCK)
    launch(
        gelu_tanh_beside_backward_kernel, batch * length * (left_chunks + right_chunks),
        grad, mlp, grad_attention, grad_mlp, left, right, length, mlp.stride(0), mlp.stride(1),
        left_chunks, left_chunks + right_chunks, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return grad_attention, grad_mlp


def gelu_tanh_beside_fp8(attention: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor]:
    (batch, length, left), right = attention.shape, mlp.shape[2]
    values, scales = empty_fp8((batch, length, left + right), mlp.device)
    block, warps, whole = row_block(left + right)
    launch(
        gelu_tanh_fp8_kernel, batch * length, mlp, attention, fp8_bytes(values), scales,
        left, right, length, mlp.stride(0), mlp.stride(1),
        BLOCK=block, WHOLE=whole, num_warps=warps,
    )  # fmt: skip
    return values, scales


def examples(given) -> None:
    rows = given.rows if given.rows.ndim == 3 else given.rows[:, None]
    gelu_tanh_backward(gelu_tanh(rows), rows)
    gelu_tanh_beside_backward(gelu_tanh_beside(rows, rows), rows)
    for width in (rows.shape[2], 12288, 40960):
        mlp = rows.new_empty(2, 12, width)
        gelu_tanh_fp8(mlp)
        gelu_tanh_beside_fp8(rows.new_empty(2, 12, max(1, width // 4)), mlp)
