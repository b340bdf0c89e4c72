"""branch_log_prob and its backward pass.

A log-probability is summed in two stages: one partial sum a chunk of a row, whose size depends on
N alone, then all chunks of a branch in order. `sde_step` and `policy_loss` sum in the same way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import affine, log_prob_of, row_sum, sum_partials
from ._launch import (
    BLOCK,
    ENOUGH_PROGRAMS,
    PARTIALS,
    branches_of,
    chunk_size,
    launch,
    row_elements,
    row_stride,
)

BRANCHES = 4  # branches a program has in flight


@triton.jit(do_not_specialize=["branches", "share", "shares", "chunks", "table_stride"])
def branch_log_prob_kernel(velocity, latents, x_next, table, old_velocity, reference_velocity,
                           partial, old_partial, reference_partial,
                           elements, branches, share, shares, chunks, table_stride,
                           BRANCHES: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """partial[p, g, chunk] = sum over the chunk of (x_next[p, g, e] - a_p x[p, e] - b_p v[p, e])^2

    and, where given, old_partial[p, chunk] = sum of (v - old_velocity)^2, and the same for
    reference_velocity. A program has one chunk of one row and `share` of its branches.
    """
    chunk = tl.program_id(0) % chunks
    first = (tl.program_id(0) // chunks) % shares * share
    row = (tl.program_id(0) // chunks // shares).to(tl.int64)
    start = chunk.to(tl.int64) * CHUNK
    column = tl.arange(0, CHUNK)[None, :]
    inside = column < elements - start
    at = row * elements + start + column
    a, b = tl.load(table + row * table_stride), tl.load(table + row * table_stride + 1)
    v = tl.load(velocity + at, mask=inside, other=0.0).to(tl.float32)
    mean = affine(tl.load(latents + at, mask=inside, other=0.0), v, a, b)
    for g in range(first, tl.minimum(first + share, branches), BRANCHES):
        branch = g + tl.arange(0, BRANCHES)[:, None]
        here = branch < branches
        there = (row * branches + branch) * elements + start
        x = tl.load(x_next + there + column, mask=here & inside, other=0.0).to(tl.float32)
        gap = tl.where(inside, x - mean, 0.0)
        sums = partial + (row * branches + branch) * chunks + chunk
        tl.store(sums, row_sum(gap * gap)[:, None], mask=here)
    if old_velocity is not None:
        gap = v - tl.load(old_velocity + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(old_partial + row * chunks + chunk + tl.arange(0, 1), row_sum(gap * gap))
    if reference_velocity is not None:
        gap = v - tl.load(reference_velocity + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(reference_partial + row * chunks + chunk + tl.arange(0, 1), row_sum(gap * gap))


@triton.jit(do_not_specialize=["branches", "chunks", "table_stride"])
def finish_log_prob_kernel(partial, table, log_prob, count, branches, chunks, table_stride,
                           BLOCK: tl.constexpr):  # fmt: skip
    """log_prob[p, g] = -w_p * (sum over chunks of partial[p, g]) / N + c_p; a program a branch."""
    branch = tl.program_id(0).to(tl.int64)
    row = branch // branches
    w, c = tl.load(table + row * table_stride + 3), tl.load(table + row * table_stride + 4)
    one = tl.arange(0, 1)
    sums = partial + branch * chunks + one[:, None]
    total = sum_partials(sums, chunks, one[:, None] < 1, 1, BLOCK)
    tl.store(log_prob + branch + one, log_prob_of(total, count, w, c))


@triton.jit(do_not_specialize=["branches", "chunks", "table_stride"])
def log_prob_backward_kernel(grad_log_prob, velocity, latents, x_next, table, scale,
                             old_velocity, reference_velocity, grad_velocity,
                             elements, count, kl_weight, branches, chunks, table_stride,
                             BLOCK: tl.constexpr):  # fmt: skip
    """grad_v[p] = (2 w_p b_p / N) scale * [sum_g grad_g (x_next_g - mean)

                   + (sum_g grad_g) b (v - v_old) + kl_weight b (v - v_reference)]

    kl_weight is that of the loss over P. A program has BLOCK elements of one row.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    start = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)
    inside = column < elements - start
    at = row * elements + start + column
    a, b = tl.load(table + row * table_stride), tl.load(table + row * table_stride + 1)
    v = tl.load(velocity + at, mask=inside, other=0.0).to(tl.float32)
    mean = affine(tl.load(latents + at, mask=inside, other=0.0), v, a, b)
    total, grad_sum = tl.zeros([BLOCK], tl.float32), 0.0
    for g in range(branches):
        grad = tl.load(grad_log_prob + row * branches + g).to(tl.float32)
        there = (row * branches + g) * elements + start
        x = tl.load(x_next + there + column, mask=inside, other=0.0).to(tl.float32)
        total += grad * (x - mean)
        grad_sum += grad
    if old_velocity is not None:
        gap = v - tl.load(old_velocity + at, mask=inside, other=0.0).to(tl.float32)
        total += grad_sum * (b * gap)
    if reference_velocity is not None:
        gap = v - tl.load(reference_velocity + at, mask=inside, other=0.0).to(tl.float32)
        total += kl_weight * (b * gap)
    factor = tl.div_rn(2.0 * tl.load(table + row * table_stride + 3) * b, count)
    if scale is not None:
        factor *= tl.load(scale).to(tl.float32)
    grad_velocity_type = grad_velocity.dtype.element_ty
    tl.store(grad_velocity + at, (factor * total).to(grad_velocity_type), mask=inside)


def partial_sums(
    velocity: Tensor,  # [P, *S]
    latents: Tensor,  # [P, *S]
    x_next: Tensor,  # [P, G, *S] or [P, *S]
    table: Tensor,  # [P or 1, 5]
    old_velocity: Tensor | None = None,  # [P, *S]
    reference_velocity: Tensor | None = None,  # [P, *S]
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # [P, G, chunks], [P, chunks], [P, chunks]
    """The sums of squares of x_next - mean, v - v_old and v - v_reference, one a chunk."""
    rows, branches, elements = len(velocity), branches_of(x_next, latents), row_elements(velocity)
    chunk = chunk_size(elements)
    chunks = triton.cdiv(elements, chunk)
    empty = {"dtype": torch.float32, "device": velocity.device}
    partial = torch.empty((rows, branches, chunks), **empty)
    old, reference = (
        None if other is None else torch.empty((rows, chunks), **empty)
        for other in (old_velocity, reference_velocity)
    )
    share = share_of(rows * chunks, branches, BRANCHES)
    shares = max(1, triton.cdiv(branches, share))
    launch(
        branch_log_prob_kernel, rows * shares * chunks,
        velocity, latents, x_next, table, old_velocity, reference_velocity,
        partial, old, reference,
        elements, branches, share, shares, chunks, row_stride(table),
        BRANCHES=BRANCHES, CHUNK=chunk, num_warps=1,
    )  # fmt: skip
    return partial, old, reference


def share_of(programs: int, branches: int, at_once: int) -> int:
    """Branches of a row that one program takes: all, unless that would leave the GPU idle."""
    return at_once if programs < ENOUGH_PROGRAMS else max(at_once, branches)


def finish_log_prob(partial: Tensor, table: Tensor, elements: int, leading: tuple) -> Tensor:
    """Partial sums [P, G, chunks] -> log_prob `leading`, [P, G] or [P]."""
    log_prob = torch.empty(leading, dtype=torch.float32, device=partial.device)
    rows, branches, chunks = partial.shape
    launch(
        finish_log_prob_kernel, rows * branches,
        partial, table, log_prob, float(elements), branches, chunks, row_stride(table),
        BLOCK=min(PARTIALS, triton.next_power_of_2(chunks)), num_warps=1,
    )  # fmt: skip
    return log_prob


def branch_log_prob(velocity: Tensor, latents: Tensor, x_next: Tensor, table: Tensor) -> Tensor:
    partial, _, _ = partial_sums(velocity, latents, x_next, table)
    leading = x_next.shape[: 1 + x_next.ndim - latents.ndim]
    return finish_log_prob(partial, table, row_elements(velocity), leading)


def log_prob_backward(
    grad_log_prob: Tensor,
    velocity: Tensor,
    latents: Tensor,
    x_next: Tensor,
    table: Tensor,
    scale: Tensor | None = None,
    old_velocity: Tensor | None = None,
    reference_velocity: Tensor | None = None,
    kl_weight: float = 0.0,
) -> Tensor:
    grad_velocity = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    rows, elements = len(velocity), row_elements(velocity)
    chunks = triton.cdiv(elements, BLOCK)
    launch(
        log_prob_backward_kernel, rows * chunks,
        grad_log_prob, velocity, latents, x_next, table, scale, old_velocity, reference_velocity,
        grad_velocity, elements, float(elements), kl_weight / max(1, rows),
        branches_of(x_next, latents), chunks, row_stride(table),
        BLOCK=BLOCK, num_warps=2,
    )  # fmt: skip
    return grad_velocity


def examples(given) -> None:
    step = given.rows, given.rows, given.branches, given.table
    branch_log_prob(*step)
    partial_sums(*step, given.rows, given.rows)
    log_prob_backward(given.numbers, *step)
    log_prob_backward(given.numbers, *step, given.numbers[0, 0], given.rows, given.rows, 0.5)
