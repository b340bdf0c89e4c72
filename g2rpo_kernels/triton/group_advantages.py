"""group_advantages: rewards [R, J, N, K] -> advantages [N, K], every group normalised by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import row_sum
from ._launch import launch


@triton.jit(do_not_specialize=["granularities", "samples", "positions", "group", "blocks"])
def group_advantages_kernel(rewards, advantages, granularities, samples, positions, group, blocks,
                            WEIGHTS: tl.constexpr, EPS: tl.constexpr,
                            COLUMNS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """advantages[n, k] = sum_r weight_r sum_j (reward[r, j, n, k] - mean) / (std + eps)

    Mean and unbiased std over the G samples of n's group, in float64. A group whose rewards are all
    equal, or of which one is not finite, counts 0. A program has COLUMNS positions of one prompt.
    The weights are constants, so that a call copies nothing to the GPU.
    """
    prompt = (tl.program_id(0) // blocks).to(tl.int64)
    k = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    sample = tl.arange(0, GROUP)[None, :]
    inside = (k < positions) & (sample < group)
    at = (prompt * group + sample) * positions + k
    size = tl.zeros([COLUMNS], tl.float64) + group
    eps = tl.full([COLUMNS], EPS, tl.float64)
    total = tl.zeros([COLUMNS, GROUP], tl.float64)
    for model in tl.static_range(len(WEIGHTS)):
        of_model = tl.zeros([COLUMNS, GROUP], tl.float64)
        for j in range(granularities):
            slab = (model * granularities + j).to(tl.int64) * samples * positions
            r = tl.load(rewards + slab + at, mask=inside, other=0.0).to(tl.float64)
            failed = row_sum((inside & ~(tl.abs(r) < float("inf"))).to(tl.int32))
            highest = tl.max(tl.where(inside, r, float("-inf")), axis=1)
            lowest = tl.min(tl.where(inside, r, float("inf")), axis=1)
            usable = (failed == 0) & (highest > lowest)
            gap = tl.where(inside, r - (row_sum(r) / size)[:, None], 0.0)
            std = tl.sqrt(row_sum(gap * gap) / (size - 1.0))
            of_model += tl.where(usable[:, None], gap * (1.0 / (std + eps))[:, None], 0.0)
        total += tl.full([COLUMNS, GROUP], WEIGHTS[model], tl.float64) * of_model
    tl.store(advantages + at, total.to(tl.float32), mask=inside)


def group_advantages(
    rewards: Tensor, group_size: int, weights: Sequence[float] | None, eps: float
) -> Tensor:
    models, granularities, samples, positions = rewards.shape
    advantages = torch.empty((samples, positions), dtype=torch.float32, device=rewards.device)
    group = triton.next_power_of_2(group_size)
    columns = max(1, min(triton.next_power_of_2(max(positions, 1)), 256 // group))
    blocks = triton.cdiv(positions, columns)
    launch(
        group_advantages_kernel, samples // group_size * blocks,
        rewards, advantages, granularities, samples, positions, group_size, blocks,
        WEIGHTS=tuple(weights) if weights is not None else (1.0,) * models, EPS=float(eps),
        COLUMNS=columns, GROUP=group, num_warps=1 if group <= 256 else 4,
    )  # fmt: skip
    return advantages


def examples(given) -> None:
    for models in (1, 3):
        rewards = given.rows.new_empty((models, 2, 96, 8))
        group_advantages(rewards, 12, None, 1e-8)
