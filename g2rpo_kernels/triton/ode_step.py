"""ode_step: x_next[p] = x_p + (sigma_next_p - sigma_p) v_p."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import BLOCK, launch, row_elements, row_stride


@triton.jit(do_not_specialize=["chunks", "sigma_stride", "next_stride"])
def ode_step_kernel(velocity, latents, sigma, sigma_next, x_next,
                    elements, chunks, sigma_stride, next_stride,
                    BLOCK: tl.constexpr):  # fmt: skip
    """x_next[p, e] = x[p, e] + (sigma_next_p - sigma_p) v[p, e]; BLOCK elements of one row."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < elements - start
    at = row * elements + start + column
    delta = tl.load(sigma_next + row * next_stride) - tl.load(sigma + row * sigma_stride)
    x, v = tl.load(latents + at, mask=inside), tl.load(velocity + at, mask=inside)
    tl.store(x_next + at, x.to(tl.float32) + delta * v.to(tl.float32), mask=inside)


def ode_step(velocity: Tensor, latents: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    x_next = torch.empty(velocity.shape, dtype=torch.float32, device=velocity.device)
    elements = row_elements(velocity)
    chunks = triton.cdiv(elements, BLOCK)
    launch(
        ode_step_kernel, velocity.shape[0] * chunks,
        velocity, latents, sigma, sigma_next, x_next,
        elements, chunks, row_stride(sigma), row_stride(sigma_next),
        BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return x_next


def examples(given) -> None:
    ode_step(given.rows, given.rows, given.table[:, 0], given.table[:, 0])
