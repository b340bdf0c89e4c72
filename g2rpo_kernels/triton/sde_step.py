"""sde_step: x_next[p, g] = a_p x_p + b_p v_p + s_p eps[p, g], and the log_prob of each branch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import affine, normal_chunk, row_sum
from ._launch import branches_of, chunk_size, launch, row_elements, row_stride
from .branch_log_prob import finish_log_prob, share_of

# Branches a program has in flight: drawing keeps the arithmetic units busy with fewer.
DRAWN, GIVEN = 2, 4


@triton.jit(do_not_specialize=["branches", "share", "shares", "chunks", "table_stride"])
def sde_step_kernel(velocity, latents, table, seeds, noise, x_next, partial,
                    elements, branches, share, shares, chunks, table_stride,
                    BRANCHES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """x_next[p, g, e] = (a_p x[p, e] + b_p v[p, e]) + s_p eps[p, g, e]

    partial[p, g, chunk] = sum over the chunk of (x_next - a x - b v)^2, of the x_next stored. eps
    is drawn from seeds[p, g], or read from noise. A program has one chunk of one row and `share`
    of its branches.
    """
    chunk = tl.program_id(0) % chunks
    first = (tl.program_id(0) // chunks) % shares * share
    row = (tl.program_id(0) // chunks // shares).to(tl.int64)
    start = chunk.to(tl.int64) * CHUNK
    column = tl.arange(0, CHUNK)[None, :]
    inside = column < elements - start
    at = row * elements + start + column
    a, b = tl.load(table + row * table_stride), tl.load(table + row * table_stride + 1)
    s = tl.load(table + row * table_stride + 2)
    x = tl.load(latents + at, mask=inside, other=0.0)
    mean = affine(x, tl.load(velocity + at, mask=inside, other=0.0), a, b)
    for g in range(first, tl.minimum(first + share, branches), BRANCHES):
        branch = g + tl.arange(0, BRANCHES)[:, None]
        here = branch < branches
        there = (row * branches + branch) * elements + start
        if seeds is not None:
            key = tl.load(seeds + row * branches + branch, mask=here, other=0)
            eps = normal_chunk(key, start, CHUNK)
        else:
            eps = tl.load(noise + there + column, mask=here & inside, other=0.0).to(tl.float32)
        moved = mean + s * eps
        tl.store(x_next + there + column, moved, mask=here & inside)
        gap = tl.where(inside, moved - mean, 0.0)
        sums = partial + (row * branches + branch) * chunks + chunk
        tl.store(sums, row_sum(gap * gap)[:, None], mask=here)


def sde_step(
    velocity: Tensor, latents: Tensor, table: Tensor, seeds: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    if noise is None:
        leading, branches = seeds.shape, seeds.shape[1] if seeds.ndim == 2 else 1
    else:
        branches = branches_of(noise, latents)
        leading = noise.shape[: 1 + noise.ndim - latents.ndim]
    empty = {"dtype": torch.float32, "device": velocity.device}
    x_next = torch.empty((*leading, *latents.shape[1:]), **empty)
    rows, elements = len(velocity), row_elements(velocity)
    chunk = chunk_size(elements)
    chunks = triton.cdiv(elements, chunk)
    partial = torch.empty((rows, branches, chunks), **empty)
    at_once = GIVEN if seeds is None else DRAWN
    share = share_of(rows * chunks, branches, at_once)
    shares = triton.cdiv(branches, share)
    launch(
        sde_step_kernel, rows * shares * chunks,
        velocity, latents, table, seeds, noise, x_next, partial,
        elements, branches, share, shares, chunks, row_stride(table),
        BRANCHES=at_once, CHUNK=chunk, num_warps=1,
    )  # fmt: skip
    return x_next, finish_log_prob(partial, table, elements, leading)


def examples(given) -> None:
    sde_step(given.rows, given.rows, given.table, given.seeds, None)
    sde_step(given.rows, given.rows, given.table, None, given.branches)
