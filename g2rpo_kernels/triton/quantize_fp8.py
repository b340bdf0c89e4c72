"""quantize_fp8: one program a row; and the same for the rows of many weights in one launch."""

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

REFRESH_BLOCK = 1024  # divides the widths of FLUX, so that no lane idles


@triton.jit
def quantize_from(x, codes, scale, width, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The row that starts at pointer x, to pointers codes and scale. WHOLE: it fits one BLOCK."""
    column = tl.arange(0, BLOCK)
    if WHOLE:
        row = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
        row_codes, row_scale = quantize_row(row, row_max(row))
        tl.store(codes + column, row_codes, mask=column < width)
        tl.store(scale, row_scale)
    else:  # read twice; the second time from the cache
        running = tl.zeros([BLOCK], tl.int32)
        for start in range(0, width, BLOCK):
            part = tl.load(x + start + column, mask=column < width - start, other=0.0)
            running = tl.maximum(running, magnitude(part))
        largest = from_magnitude(tl.max(running, axis=0))
        for start in range(0, width, BLOCK):
            inside = column < width - start
            part = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
            part_codes, row_scale = quantize_row(part, largest)
            tl.store(codes + start + column, part_codes, mask=inside)
            tl.store(scale, row_scale)


@triton.jit
def quantize_fp8_kernel(x, codes, scales, width, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = row * width
    quantize_from(x + at, codes + at, scales + row, width, BLOCK, WHOLE)


@triton.jit(do_not_specialize=["count"])
def refresh_fp8_kernel(like_x, like_codes, like_scales, table, count,
                       BLOCK: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """One row of one of `count` weights, and its codes and scale.

    table: int64 [count, 5], a weight's addresses of x, codes and scales, its width, and how many
        rows the weights before it have.
    like_*: tensors of the types at those addresses. ALIGNED: addresses and widths are multiples of
        16, which the compiler cannot see in a table.
    """
    program = tl.program_id(0).to(tl.int64)
    first, last = tl.zeros([], tl.int32), tl.zeros([], tl.int32) + count
    while last - first > 1:  # the last weight that begins at this row or before
        middle = (first + last) // 2
        before = tl.load(table + middle * 5 + 4) <= program
        first = tl.where(before, middle, first)
        last = tl.where(before, last, middle)
    entry = table + first * 5
    x = tl.load(entry).to(like_x.dtype)
    codes = tl.load(entry + 1).to(like_codes.dtype)
    scales = tl.load(entry + 2).to(like_scales.dtype)
    width = tl.load(entry + 3).to(tl.int32)
    row = program - tl.load(entry + 4)
    if ALIGNED:
        x, codes = tl.multiple_of(x, 16), tl.multiple_of(codes, 16)
        width = tl.multiple_of(width, 16)
    at = row * width
    quantize_from(x + at, codes + at, scales + row, width, BLOCK, False)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = empty_fp8(x.shape, x.device)
    block, warps, whole = row_block(x.shape[-1])
    launch(
        quantize_fp8_kernel, scales.numel(), x, fp8_bytes(values), scales, x.shape[-1],
        BLOCK=block, WHOLE=whole, num_warps=warps,
    )  # fmt: skip
    return values, scales


def refresh_fp8(weights: list[Tensor], values: list[Tensor], scales: list[Tensor]) -> None:
    """quantize_fp8 of each weight into its values and scales; all contiguous and of one dtype."""
    table, rows = [], 0
    for x, y, scale in zip(weights, values, scales, strict=True):
        table.append((x.data_ptr(), y.data_ptr(), scale.data_ptr(), x.shape[-1], rows))
        rows += scale.numel()
    aligned = all(number % 16 == 0 for x, y, _, width, _ in table for number in (x, y, width))
    launch(
        refresh_fp8_kernel, rows, weights[0], fp8_bytes(values[0]), scales[0],
        torch.tensor(table, dtype=torch.int64, device=weights[0].device), len(table),
        BLOCK=REFRESH_BLOCK, ALIGNED=aligned, num_warps=2,
    )  # fmt: skip


def examples(given) -> None:
    values, scales = quantize_fp8(given.rows)
    for width in (12288, 40960):
        quantize_fp8(given.rows.new_empty(8, width))
    # Addresses of tensors without memory are 0, which is aligned.
    refresh_fp8([given.rows] * 3, [values] * 3, [scales] * 3)
