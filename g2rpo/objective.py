"""The objective: rewards of the finished branches -> advantages; what the policy losses report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .errors import TrainingError


@dataclass(frozen=True)
class Advantages:
    """Advantages of one update and what there is to say of them."""

    values: Tensor  # [B, K, G], ready for `policy_loss` rows (prompt, position)
    std: float  # over all of them
    zero_spread_groups: int  # groups whose rewards are all equal: advantage exactly 0
    failed_groups: int  # groups with a NaN or infinite reward: advantage 0
    groups: int  # all groups that count (reward models of weight > 0)


def integrate_advantages(
    rewards: Tensor,  # [R, J, B * G, K]
    group_size: int,
    weights: Sequence[float],  # R numbers
) -> Advantages:
    """Multi-granularity, multi-reward advantages, with the special groups counted.

    Reward models of weight 0 are only reported: they neither count nor fail.
    Raises TrainingError when every group has failed, since there is nothing left to learn from.
    """
    samples, positions = rewards.shape[2:]
    trained = rewards[[weight > 0 for weight in weights]].double()
    grouped = trained.view(*trained.shape[:2], -1, group_size, positions)
    failed = ~grouped.isfinite().all(3)
    equal = (grouped.amax(3) == grouped.amin(3)) & ~failed
    if bool(failed.all()):
        raise TrainingError(
            f"every reward group failed: all {failed.numel()} groups hold a NaN or infinite "
            "reward, so no advantage can be formed; check the reward functions"
        )
    advantages = gk.group_advantages(rewards, group_size, weights=list(weights))  # [N, K]
    values = advantages.view(samples // group_size, group_size, positions).transpose(1, 2)
    return Advantages(
        values=values.float().contiguous(),
        std=float(values.std()),
        zero_spread_groups=int(equal.sum()),
        failed_groups=int(failed.sum()),
        groups=failed.numel(),
    )


def summarise_losses(losses: Sequence[gk.PolicyLoss], with_kl: bool = False) -> dict[str, float]:
    """The metrics row's keys over the policy losses of one update, in one transfer: means, and of
    ratio_max the largest. A NaN in any of them is a NaN in the row. with_kl: there is a KL term."""
    table = torch.stack([torch.cat([out.loss.view(1), out.statistics]) for out in losses]).double()
    loss, ratio_mean, _, clip_fraction, approx_kl, kl = table.mean(0).tolist()
    return {
        "loss": loss,
        "ratio_mean": ratio_mean,
        "ratio_max": float(table[:, 2].max()),
        "clip_fraction": clip_fraction,
        "approx_kl": approx_kl,
        **({"kl": kl} if with_kl else {}),
    }
