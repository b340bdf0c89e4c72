"""gated_residual and its backward pass; and gated_residual_modulate on adaln_modulate's kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch, row_stride
from .adaln_modulate import (
    finish_row_sums,
    modulate,
    modulate_backward,
    partial_sums,
    sequence_like,
)

COLUMNS = 1024  # of a tile, at most
TILE_BYTES = 8192  # of one tensor that a program has in registers, in 4 warps
CHUNK_ROWS = 32  # rows whose sums over L make one partial sum, at least


@triton.jit(do_not_specialize=["length", "tiles", "blocks"])
def gated_residual_kernel(residual, update, gate, hidden,
                          width, length, tiles, blocks, gate_stride,
                          ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """hidden = residual + gate * update; a program has ROWS rows of COLUMNS of one sequence."""
    sequence = (tl.program_id(0) // blocks // tiles).to(tl.int64)
    first = tl.program_id(0) // blocks % tiles * ROWS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    inside = (row < length - first) & (column < width)
    at = (sequence * length + first) * width + (row * width + column)
    g = tl.load(gate + sequence * gate_stride + column, mask=column < width, other=0.0)
    r = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    value = r + g.to(tl.float32) * u
    tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "chunks", "blocks"])
def gated_residual_backward_kernel(grad, gate, update, grad_update, partial,
                                   width, length, chunks, blocks, gate_stride,
                                   STEPS: tl.constexpr, ROWS: tl.constexpr,
                                   COLUMNS: tl.constexpr):  # fmt: skip
    """grad_update = gate * grad for COLUMNS of the rows of one chunk of a sequence.

    partial [B, chunks, D]: the sum over the chunk of grad * update, where update is given.
    """
    chunk = tl.program_id(0) // blocks
    sequence = (chunk // chunks).to(tl.int64)
    start = chunk % chunks * (STEPS * ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    of_row = column < width
    g = tl.load(gate + sequence * gate_stride + column, mask=of_row, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        first = start + step * ROWS
        inside = (row < length - first) & of_row
        at = (sequence * length + first) * width + (row * width + column)
        d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_update + at, (g * d).to(grad_update.dtype.element_ty), mask=inside)
        if update is not None:
            total += d * tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    if partial is not None:
        sums = partial + chunk.to(tl.int64) * width + column
        tl.store(sums, tl.sum(total, axis=0)[None, :], mask=of_row)


def tile(x: Tensor) -> tuple[dict[str, int], int]:
    """Rows and columns of a tile of x [B, L, D], whatever B and L; and how many span D."""
    width, elements = x.shape[2], TILE_BYTES // x.element_size()
    columns = min(COLUMNS, max(16, triton.next_power_of_2(width)))
    rows = min(32, elements // columns)
    warps = max(1, 4 * rows * columns // elements)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}, triton.cdiv(width, columns)


def gated_residual(residual: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    batch, length, width = residual.shape
    hidden = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    shape, blocks = tile(residual)
    tiles = triton.cdiv(length, shape["ROWS"])
    launch(
        gated_residual_kernel, batch * tiles * blocks,
        residual, update, gate, hidden, width, length, tiles, blocks, row_stride(gate),
        **shape,
    )  # fmt: skip
    return hidden


def gated_residual_backward(
    grad: Tensor, gate: Tensor, update: Tensor | None, update_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, length, width = grad.shape
    grad_update = torch.empty(grad.shape, dtype=update_dtype, device=grad.device)
    shape, blocks = tile(grad)
    kinds = int(update is not None)
    steps = max(1, CHUNK_ROWS // shape["ROWS"]) if kinds else 1
    partial, chunks = partial_sums(grad, steps * shape["ROWS"], kinds)
    launch(
        gated_residual_backward_kernel, batch * chunks * blocks,
        grad, gate, update, grad_update, partial,
        width, length, chunks, blocks, row_stride(gate),
        STEPS=steps, **shape,
    )  # fmt: skip
    return grad_update, finish_row_sums(partial, grad, kinds)


def gated_residual_modulate(
    residual: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    return hidden, *modulate(residual, shift, scale, eps, False, update, gate, hidden)


def gated_residual_modulate_fp8(
    residual: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    return hidden, *modulate(residual, shift, scale, eps, True, update, gate, hidden)


def gated_residual_modulate_backward(
    grad_modulated: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    gate: Tensor,
    scale: Tensor,
    update: Tensor | None,
    eps: float,
    wants_sums: bool,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_update = torch.empty(hidden.shape, dtype=update_dtype, device=hidden.device)
    grad_residual, sums = modulate_backward(
        grad_modulated, hidden, scale, eps, wants_sums, grad_hidden, gate, update, grad_update
    )
    return grad_residual, grad_update, sums


def examples(given) -> None:
    x, m = sequence_like(given.rows)
    gated_residual(x, x, m)
    for update in (None, x):
        gated_residual_backward(x, m, update, x.dtype)
    gated_residual_modulate(x, x, m, m, m, 1e-6)
    gated_residual_modulate_fp8(x, x, m, m, m, 1e-6)
    # As the frozen model, the trained modulation, and one whose hidden goes nowhere else.
    for other, update, wants_sums in ((x, None, False), (x, x, True), (None, x, False)):
        gated_residual_modulate_backward(x, other, x, m, m, update, 1e-6, wants_sums, x.dtype)
