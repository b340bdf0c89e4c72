"""group_advantages: rewards of branches -> the advantage of each injected noise (MGAI).

Within each group (reward model, granularity, prompt, SDE position) the rewards of the G branches
are normalised; then summed over granularities and, weighted, over reward models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_floating, refuse_grad
from ._library import define_op
from .dynamics import check_number


def group_advantages(
    rewards: Tensor,  # [R, J, N, K]
    group_size: int,
    weights: Sequence[float] | None = None,  # R numbers
    eps: float = 1e-8,
) -> Tensor:  # [N, K]
    """Multi-granularity, multi-reward group-relative advantages.

    rewards: R reward models, J granularities, N samples (a prompt's G = group_size samples are
        contiguous), K SDE positions; float32, bfloat16, float16 or float64; copied if not
        contiguous.
    group_size: G >= 2, divides N.
    weights: one per reward model; None: all 1.
    eps: added to the standard deviation (reward units).

    Per (r, j, prompt, k): (reward - mean) / (std + eps) over the G samples, std unbiased, in
    float64; summed over j, then over r with weights. Two special groups, decided per group:
    all G rewards equal gives exactly 0 (rounding alone would give +-0.6), and a reward that is NaN
    or infinite (a judge that failed) makes its whole group give 0. The caller counts both.

    Returns float32 [N, K] (float64 for float64 rewards). For `policy_loss` rows (prompt, k):
        advantages.view(B, G, K).transpose(1, 2).reshape(B * K, G)

    Equivalent to, for R = J = K = 1:
        r = rewards.view(-1, group_size)
        advantages = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)

    Source: multi-granularity advantage integration, G2RPO (arXiv 2510.01982).
    """
    check_floating("rewards", rewards)
    if rewards.ndim != 4:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; expected [R, J, N, K] "
            "(reward models, granularities, samples, SDE positions)"
        )
    if 0 in rewards.shape[:2]:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}; expected at least one reward model and one "
            "granularity"
        )
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(f"group_size is {group_size!r}; expected an integer of at least 2")
    models, _, samples, _ = rewards.shape
    if samples % group_size:
        raise ValueError(
            f"group_size is {group_size}, which does not divide the N = {samples} samples of "
            f"rewards {tuple(rewards.shape)}"
        )
    if weights is not None:
        if not isinstance(weights, Sequence):
            raise TypeError(
                f"weights is a {type(weights).__name__}; expected a sequence of numbers"
            )
        weights = [float(check_number(f"weights[{i}]", weight)) for i, weight in enumerate(weights)]
        if not all(abs(weight) < math.inf for weight in weights):  # NaN included
            raise ValueError(f"weights is {weights}; expected finite numbers")
        if len(weights) != models:
            raise ValueError(
                f"weights has {len(weights)} numbers; expected {models}, one a reward model"
            )
    if not check_number("eps", eps) >= 0:
        raise ValueError(f"eps is {eps}; expected a number >= 0")
    refuse_grad("group_advantages", "rewards are constants of the policy loss", rewards=rewards)
    return _group_advantages(rewards, group_size, weights, eps)


def group_advantages_reference(
    rewards: Tensor, group_size: int, weights: Sequence[float] | None, eps: float
) -> Tensor:
    models, granularities, samples, positions = rewards.shape
    groups = samples // group_size
    r = rewards.double().view(models, granularities, groups, group_size, positions)
    highest, lowest = r.amax(3, keepdim=True), r.amin(3, keepdim=True)  # both NaN if any is
    usable = (highest > lowest) & highest.isfinite() & lowest.isfinite()
    gap = r - r.mean(3, keepdim=True)
    std = (gap.square().sum(3, keepdim=True) / (group_size - 1)).sqrt()
    normalised = gap / (std + eps)
    normalised = torch.where(usable, normalised, torch.zeros_like(normalised)).sum(1)
    if weights is not None:
        weights = torch.tensor(weights, dtype=torch.float64, device=r.device)
        normalised = normalised * weights.view(-1, 1, 1, 1)
    return normalised.sum(0).view(samples, positions).to(_output_dtype(rewards))


def _output_dtype(rewards: Tensor) -> torch.dtype:
    return torch.float64 if rewards.dtype == torch.float64 else torch.float32


def _fake(rewards, group_size, weights, eps):
    return rewards.new_empty(rewards.shape[2:], dtype=_output_dtype(rewards))


_group_advantages = define_op(
    "group_advantages(Tensor rewards, int group_size, float[]? weights, float eps) -> Tensor",
    reference=group_advantages_reference,
    fake=_fake,
)
