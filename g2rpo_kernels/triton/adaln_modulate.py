"""adaln_modulate and its backward pass; `gated_residual_modulate` launches the same two kernels.

A program has whole rows of one sequence in registers, ROWS at a time, so that shift and scale are
read once for all of them. The gradients of shift and scale are summed over L in two stages: a chunk
of rows, whose size depends on D alone, then all chunks of a sequence in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fp8 import empty_fp8, fp8_bytes, quantize_row, row_max
from ._launch import launch, row_stride

FORWARD_BYTES = 16384  # of x that a program of the forward kernel has in registers, in 8 warps
BACKWARD_TILE = 4096  # elements
ROWS = 32  # of a tile, at most: narrow rows
CHUNK_ROWS = 16  # rows whose sums over L make one partial sum, at least


@triton.jit
def normalise(x, inside, count, eps):  # [ROWS, BLOCK], 0 outside
    """(x - mean) / std of each row [ROWS, BLOCK], and 1 / std [ROWS, 1]."""
    mean = tl.div_rn(tl.sum(x, axis=1), count)[:, None]
    centred = tl.where(inside, x - mean, 0.0)
    # The mean of a row far from 0 is off by a rounding that matters beside its deviation.
    left = tl.div_rn(tl.sum(centred, axis=1), count)[:, None]
    square = tl.div_rn(tl.sum(centred * centred, axis=1), count)[:, None]
    variance = tl.maximum(square - left * left, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    return (centred - left) * rstd, rstd


@triton.jit(do_not_specialize=["length", "tiles"])
def modulate_kernel(x, update, gate, hidden, shift, scale, y, scales,
                    width, count, eps, length, tiles, gate_stride, shift_stride, scale_stride,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y = normalise(x) * (1 + scale) + shift for ROWS rows of one sequence.

    Where update is given, hidden = x + gate * update is stored and stands for x. Where scales is
    given, y is rowwise FP8, its bytes and its scales.
    """
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * ROWS
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    of_row = column < width
    inside = (row < length - first) & of_row
    at = (sequence * length + first) * width + (row * width + column)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if update is not None:
        g = tl.load(gate + sequence * gate_stride + column, mask=of_row, other=0.0).to(tl.float32)
        u = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        stored = (value + g * u).to(hidden.dtype.element_ty)
        tl.store(hidden + at, stored, mask=inside)
        value = stored.to(tl.float32)
    normal, _ = normalise(value, inside, count, eps)
    factor = tl.load(scale + sequence * scale_stride + column, mask=of_row, other=0.0)
    offset = tl.load(shift + sequence * shift_stride + column, mask=of_row, other=0.0)
    value = normal * (1.0 + factor.to(tl.float32)) + offset.to(tl.float32)
    if scales is None:
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    else:
        value = tl.where(inside, value, 0.0)
        codes, row_scale = quantize_row(value, row_max(value)[:, None])
        tl.store(y + at, codes, mask=inside)
        tl.store(scales + sequence * length + first + row, row_scale, mask=row < length - first)


@triton.jit(do_not_specialize=["length", "chunks"])
def modulate_backward_kernel(grad, x, scale, other_grad, gate, update, grad_x, grad_update, partial,
                             width, count, eps, length, chunks, scale_stride, gate_stride,
                             STEPS: tl.constexpr, MODULATION: tl.constexpr, KINDS: tl.constexpr,
                             ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """grad_x = other_grad + rstd * (g - mean(g) - normal * mean(g * normal)), g = grad (1 + scale)

    and, where gate is given, grad_update = gate * grad_x: for the rows of one chunk of a sequence.
    partial [B, chunks, KINDS, D]: sums over the chunk of grad and grad * normal if MODULATION,
    then of grad_x * update where update is given.
    """
    sequence = (tl.program_id(0) // chunks).to(tl.int64)
    start = tl.program_id(0) % chunks * (STEPS * ROWS)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    of_row = column < width
    shift_sum = tl.zeros([1, BLOCK], tl.float32)
    scale_sum = tl.zeros([1, BLOCK], tl.float32)
    gate_sum = tl.zeros([1, BLOCK], tl.float32)
    for step in range(STEPS):
        first = start + step * ROWS
        inside = (row < length - first) & of_row
        at = (sequence * length + first) * width + (row * width + column)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        # Loaded anew for every row, from the cache: registers are what is short here.
        factor = tl.load(scale + sequence * scale_stride + column, mask=of_row, other=0.0)
        g = dy * (1.0 + factor.to(tl.float32))
        normal, rstd = normalise(value, inside, count, eps)
        mean = tl.div_rn(tl.sum(g, axis=1), count)[:, None]
        along = tl.div_rn(tl.sum(g * normal, axis=1), count)[:, None]
        dx = rstd * (g - mean - normal * along)
        if other_grad is not None:
            dx += tl.load(other_grad + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + at, dx.to(grad_x.dtype.element_ty), mask=inside)
        if gate is not None:
            of_gate = tl.load(gate + sequence * gate_stride + column, mask=of_row, other=0.0)
            du = of_gate.to(tl.float32) * dx
            tl.store(grad_update + at, du.to(grad_update.dtype.element_ty), mask=inside)
        if MODULATION:
            shift_sum += tl.sum(dy, axis=0)[None, :]
            scale_sum += tl.sum(dy * normal, axis=0)[None, :]
        if update is not None:
            u = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
            gate_sum += tl.sum(dx * u, axis=0)[None, :]
    if partial is not None:
        sums = partial + tl.program_id(0).to(tl.int64) * (KINDS * width) + column
        if MODULATION:
            tl.store(sums, shift_sum, mask=of_row)
            tl.store(sums + width, scale_sum, mask=of_row)
        if update is not None:
            tl.store(sums + (KINDS - 1) * width, gate_sum, mask=of_row)


@triton.jit(do_not_specialize=["batch", "chunks", "kinds", "blocks"])
def finish_row_sums_kernel(partial, sums, width, batch, chunks, kinds, blocks,
                           CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """sums[k, b, d] = sum over chunks of partial[b, chunk, k, d], CHUNKS apart, then these."""
    block = tl.program_id(0) % blocks
    kind = tl.program_id(0) // blocks % kinds
    sequence = (tl.program_id(0) // blocks // kinds).to(tl.int64)
    chunk, column = tl.arange(0, CHUNKS)[:, None], block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([CHUNKS, COLUMNS], tl.float32)
    for first in range(0, chunks, CHUNKS):
        here = ((sequence * chunks + first + chunk) * kinds + kind) * width + column[None, :]
        inside = (chunk < chunks - first) & (column < width)[None, :]
        total += tl.load(partial + here, mask=inside, other=0.0)
    at = (kind * batch + sequence) * width + column
    tl.store(sums + at, tl.sum(total, axis=0), mask=column < width)


# ---- Launchers ----


def tile(width: int, elements: int, warps: int) -> dict[str, int]:
    """Rows of `width` in a tile of `elements`, for which there would be `warps`; whatever B, L."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, min(ROWS, elements // block))
    warps = max(1, min(16, warps * rows * block // elements))
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def modulate(
    x: Tensor,  # [B, L, D]
    shift: Tensor,  # [B, D]
    scale: Tensor,  # [B, D]
    eps: float,
    fp8: bool,
    update: Tensor | None = None,  # [B, L, D]
    gate: Tensor | None = None,  # [B, D]
    hidden: Tensor | None = None,  # [B, L, D], to be written
) -> tuple[Tensor, ...]:  # (y,), or its FP8 values and scales
    batch, length, width = x.shape
    if fp8:
        y, scales = empty_fp8(x.shape, x.device)
    else:
        y, scales = torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    shape = tile(width, FORWARD_BYTES // x.element_size(), 8)
    tiles = triton.cdiv(length, shape["ROWS"])
    launch(
        modulate_kernel, batch * tiles,
        x, update, gate, hidden, shift, scale, fp8_bytes(y) if fp8 else y, scales,
        width, float(width), float(eps), length, tiles,
        0 if gate is None else row_stride(gate), row_stride(shift), row_stride(scale),
        **shape,
    )  # fmt: skip
    return (y, scales) if fp8 else (y,)


def modulate_backward(
    grad: Tensor,  # [B, L, D]
    x: Tensor,  # [B, L, D]
    scale: Tensor,  # [B, D]
    eps: float,
    wants_sums: bool,
    other_grad: Tensor | None = None,  # [B, L, D]
    gate: Tensor | None = None,  # [B, D]
    update: Tensor | None = None,  # [B, L, D]
    grad_update: Tensor | None = None,  # [B, L, D], to be written
) -> tuple[Tensor, Tensor]:  # grad_x [B, L, D], sums [K, B, D]
    batch, length, width = x.shape
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kinds = 2 * wants_sums + (update is not None)
    shape = tile(width, BACKWARD_TILE, 16 if kinds else 8)  # sums take registers, too
    steps = max(1, CHUNK_ROWS // shape["ROWS"]) if kinds else 1
    partial, chunks = partial_sums(x, steps * shape["ROWS"], kinds)
    launch(
        modulate_backward_kernel, batch * chunks,
        grad, x, scale, other_grad, gate, update, grad_x, grad_update, partial,
        width, float(width), float(eps), length, chunks,
        row_stride(scale), 0 if gate is None else row_stride(gate),
        STEPS=steps, MODULATION=bool(wants_sums), KINDS=kinds, **shape,
    )  # fmt: skip
    return grad_x, finish_row_sums(partial, x, kinds)


def partial_sums(x: Tensor, rows: int, kinds: int) -> tuple[Tensor | None, int]:
    """Room for the sums over chunks of `rows` rows of x [B, L, D], and the chunks of a sequence."""
    batch, length, width = x.shape
    chunks = triton.cdiv(length, rows)
    if not kinds:
        return None, chunks
    shape = batch, chunks, kinds, width
    return torch.empty(shape, dtype=torch.float32, device=x.device), chunks


def finish_row_sums(partial: Tensor | None, x: Tensor, kinds: int) -> Tensor:
    """partial [B, chunks, K, D] of x [B, L, D] -> [K, B, D]."""
    batch, _, width = x.shape
    sums = torch.empty((kinds, batch, width), dtype=torch.float32, device=x.device)
    if partial is not None:
        columns = min(128, max(16, triton.next_power_of_2(width)))
        blocks = triton.cdiv(width, columns)
        launch(
            finish_row_sums_kernel, batch * kinds * blocks,
            partial, sums, width, batch, partial.shape[1], kinds, blocks,
            CHUNKS=8, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return sums


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return modulate(x, shift, scale, eps, False)[0]


def adaln_modulate_fp8(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return modulate(x, shift, scale, eps, True)


def adaln_modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, wants_sums: bool
) -> tuple[Tensor, Tensor]:
    return modulate_backward(grad, x, scale, eps, wants_sums)


def sequence_like(rows: Tensor) -> tuple[Tensor, Tensor]:
    """For examples: x [B, L, D] and m [B, D], of the width of a flat row, else of FLUX's."""
    width = rows.shape[1] if rows.ndim == 2 else 3072
    return rows.new_empty((2, 100, width)), rows.new_empty((2, width))


def examples(given) -> None:
    x, m = sequence_like(given.rows)
    adaln_modulate(x, m, m, 1e-6)
    adaln_modulate_fp8(x, m, m, 1e-6)
    for wants_sums in (False, True):
        adaln_modulate_backward(x, x, m, 1e-6, wants_sums)
