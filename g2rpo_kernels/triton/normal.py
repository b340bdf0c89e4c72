"""normal: the noise of every seed, its own in any batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import normal_chunk
from ._launch import launch

TILE = 1024  # elements a program


@triton.jit(do_not_specialize=["branches", "chunks"])
def normal_kernel(seeds, noise, branches, elements, chunks,
                  ROWS: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """noise[i, e] = output e % 4 of Box-Muller on Philox(counter e // 4, key seeds[i])."""
    row = (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    start = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    column = tl.arange(0, CHUNK)[None, :]
    inside = (row < branches) & (column < elements - start)
    key = tl.load(seeds + row, mask=row < branches, other=0)
    eps = normal_chunk(key, start, CHUNK)
    tl.store(noise + (row * elements + start) + column, eps, mask=inside)


def normal(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    noise = torch.empty((*seeds.shape, *shape), dtype=torch.float32, device=seeds.device)
    elements, branches = math.prod(shape), seeds.numel()
    chunk = min(TILE, max(16, triton.next_power_of_2(elements)))
    chunks, rows = triton.cdiv(elements, chunk), TILE // chunk
    launch(
        normal_kernel, triton.cdiv(branches, rows) * chunks,
        seeds, noise, branches, elements, chunks,
        ROWS=rows, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return noise


def examples(given) -> None:
    normal(given.seeds, given.rows.shape[1:])
    normal(given.seeds, (64,))  # several branches a program
