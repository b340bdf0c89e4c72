"""step_mean: mean[p] = a_p x_p + b_p v_p."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import affine
from ._launch import BLOCK, launch, row_elements, row_stride


@triton.jit(do_not_specialize=["chunks", "table_stride"])
def step_mean_kernel(velocity, latents, table, mean, elements, chunks, table_stride,
                     BLOCK: tl.constexpr):  # fmt: skip
    """mean[p, e] = a_p x[p, e] + b_p v[p, e]; a program has BLOCK elements of one row."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < elements - start
    at = row * elements + start + column
    a, b = tl.load(table + row * table_stride), tl.load(table + row * table_stride + 1)
    x, v = tl.load(latents + at, mask=inside), tl.load(velocity + at, mask=inside)
    tl.store(mean + at, affine(x, v, a, b), mask=inside)


def step_mean(velocity: Tensor, latents: Tensor, table: Tensor) -> Tensor:
    mean = torch.empty(velocity.shape, dtype=torch.float32, device=velocity.device)
    elements = row_elements(velocity)
    chunks = triton.cdiv(elements, BLOCK)
    launch(
        step_mean_kernel, velocity.shape[0] * chunks,
        velocity, latents, table, mean, elements, chunks, row_stride(table),
        BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return mean


def examples(given) -> None:
    step_mean(given.rows, given.rows, given.table)
