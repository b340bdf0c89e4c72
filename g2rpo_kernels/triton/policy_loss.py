"""policy_loss: everything between the partial sums of its log-probabilities and its outputs.

Two launches: `branch_log_prob_kernel` reads x_next, then the one program below finishes. Its work
is P * G branches of N / 512 numbers each, a five-hundredth of what the first launch reads.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._device import log_prob_of, row_sum, sum_partials
from ._launch import PARTIALS, launch, row_elements, row_stride
from .branch_log_prob import partial_sums

ROWS = 32  # branches in flight


@triton.jit(do_not_specialize=["rows", "branches", "chunks", "table_stride"])
def finish_policy_loss_kernel(partial, old_partial, reference_partial, table, old_log_prob,
                              advantages, loss, log_prob, grad_log_prob, statistics,
                              count, low, high, clip_range, advantage_clip, kl_weight,
                              rows, branches, chunks, table_stride,
                              ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """r    = exp((log_prob - old_log_prob + w b^2 mean_N((v - v_old)^2)) s)

    loss = mean of max(-A r, -A clip(r, low, high)) + kl_weight * kl
    grad = 0 where -A r < -A clip(r), else -A r s, over P G         (of log_prob; without kl)
    kl   = mean of w b^2 mean_N((v - v_reference)^2)
    statistics = mean r, max r, share of |r - 1| > clip_range, mean(r - 1 - log r), kl

    Without old_partial, v_old = v and s = 1. A NaN reaches every result that depends on it:
    comparisons are written so that it passes through.
    """
    i = tl.arange(0, ROWS)
    one = tl.arange(0, 1)
    zero = tl.zeros([ROWS], tl.float32)
    kl_sum, loss_sum, ratio_sum, outside_sum, excess_sum = zero, zero, zero, zero, zero
    if reference_partial is not None:
        for first in range(0, rows, ROWS):
            row, here = first + i, first + i < rows
            at = row.to(tl.int64)
            sums = reference_partial + (at * chunks)[:, None]
            total = sum_partials(sums, chunks, here[:, None], ROWS, BLOCK)
            kl_sum += mean_gap(total, table + at * table_stride, here, count)
    ratio_max = zero  # ratios are not negative
    for first in range(0, rows * branches, ROWS):
        here = first + i < rows * branches
        branch = (first + i).to(tl.int64)
        row = branch // branches
        entry = table + row * table_stride
        w, c = tl.load(entry + 3, mask=here, other=0.0), tl.load(entry + 4, mask=here, other=0.0)
        sums = partial + (branch * chunks)[:, None]
        total = sum_partials(sums, chunks, here[:, None], ROWS, BLOCK)
        log_p = log_prob_of(total, count, w, c)
        tl.store(log_prob + branch, log_p, mask=here)

        old = tl.load(old_log_prob + branch, mask=here, other=0.0).to(tl.float32)
        log_ratio = log_p - old
        slope = zero + 1.0  # dlog_ratio / dlog_prob
        if old_partial is not None:
            sums = old_partial + (row * chunks)[:, None]
            total = sum_partials(sums, chunks, here[:, None], ROWS, BLOCK)
            slope = tl.load(entry + 2, mask=here, other=0.0)
            log_ratio = (log_ratio + mean_gap(total, entry, here, count)) * slope
        # float32's exp is approximate on the GPU; one number a branch can afford float64's.
        ratio = tl.exp(log_ratio.to(tl.float64)).to(tl.float32)
        advantage = tl.load(advantages + branch, mask=here, other=0.0).to(tl.float32)
        advantage = clamp(advantage, -advantage_clip, advantage_clip)
        unclipped = -advantage * ratio
        clipped = -advantage * clamp(ratio, low, high)
        is_clipped = unclipped < clipped
        grad = tl.where(is_clipped, 0.0, unclipped) * slope
        branch_count = zero + (rows * branches).to(tl.float32)
        tl.store(grad_log_prob + branch, tl.div_rn(grad, branch_count), mask=here)

        loss_sum += tl.where(here, tl.where(is_clipped, clipped, unclipped), 0.0)
        ratio_sum += tl.where(here, ratio, 0.0)
        outside_sum += tl.where(here & (tl.abs(ratio - 1.0) > clip_range), 1.0, 0.0)
        excess_sum += tl.where(here, ratio - 1.0 - log_ratio, 0.0)
        ratio_max = tl.where(here & (ratio > ratio_max), ratio, ratio_max)

    branch_count = tl.zeros([1], tl.float32) + (rows * branches).to(tl.float32)
    row_count = tl.zeros([1], tl.float32) + rows.to(tl.float32)
    kl = tl.div_rn(row_sum(kl_sum[None, :]), row_count)
    loss_mean = tl.div_rn(row_sum(loss_sum[None, :]), branch_count)
    if reference_partial is not None:
        loss_mean += kl_weight * kl
    ratio_mean = tl.div_rn(row_sum(ratio_sum[None, :]), branch_count)
    largest = tl.max(ratio_max, axis=0)
    tl.store(loss + one, loss_mean)
    tl.store(statistics + one, ratio_mean)
    tl.store(statistics + 1 + one, tl.where(ratio_mean == ratio_mean, largest, ratio_mean))
    tl.store(statistics + 2 + one, tl.div_rn(row_sum(outside_sum[None, :]), branch_count))
    tl.store(statistics + 3 + one, tl.div_rn(row_sum(excess_sum[None, :]), branch_count))
    tl.store(statistics + 4 + one, kl)


@triton.jit
def mean_gap(square_sum, entry, here, count):
    """w b^2 * (square_sum / N), for pointers `entry` to rows of the table."""
    w = tl.load(entry + 3, mask=here, other=0.0)
    b = tl.load(entry + 1, mask=here, other=0.0)
    return w * (b * b) * tl.div_rn(square_sum, tl.full(square_sum.shape, count, tl.float32))


@triton.jit
def clamp(x, low, high):
    """Keeps NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


def policy_loss(
    velocity, latents, x_next, old_log_prob, advantages, table,
    clip_range, advantage_clip, reference_velocity, kl_weight, old_velocity,
):  # fmt: skip
    """Returns loss [], log_prob, dloss/dlog_prob (before the KL term), statistics [5]."""
    partial, old_partial, reference_partial = partial_sums(
        velocity, latents, x_next, table, old_velocity, reference_velocity
    )
    rows, branches, chunks = partial.shape
    empty = {"dtype": torch.float32, "device": velocity.device}
    loss, statistics = torch.empty((), **empty), torch.empty((5,), **empty)
    log_prob, grad_log_prob = (torch.empty(old_log_prob.shape, **empty) for _ in range(2))
    launch(
        finish_policy_loss_kernel, 1,
        partial, old_partial, reference_partial, table, old_log_prob, advantages,
        loss, log_prob, grad_log_prob, statistics,
        float(row_elements(velocity)), 1.0 - clip_range, 1.0 + clip_range, float(clip_range),
        math.inf if advantage_clip is None else float(advantage_clip), float(kl_weight),
        rows, branches, chunks, row_stride(table),
        ROWS=min(ROWS, triton.next_power_of_2(rows * branches)),
        BLOCK=min(PARTIALS, triton.next_power_of_2(chunks)),
        num_warps=8, maxnreg=192,
    )  # fmt: skip
    return loss, log_prob, grad_log_prob, statistics


def examples(given) -> None:
    step = given.rows, given.rows, given.branches, given.numbers, given.numbers, given.table
    policy_loss(*step, 1e-4, None, None, 0.0, None)
    policy_loss(*step, 1e-4, 5.0, given.rows, 0.5, given.rows)
