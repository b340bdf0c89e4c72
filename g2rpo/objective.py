"""The objective: rewards of the finished branches -> advantages; what the policy losses report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .errors import TrainingError

EPS = 1e-8  # added to a standard deviation, as `gk.group_advantages` does


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
    std: str = "group",
) -> Advantages:
    """Multi-granularity, multi-reward advantages, with the special groups counted.

    std: "group", or "update": of all of a reward's finite values, as Flow-GRPO's code has it.

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
    if std == "update":
        advantages = _by_one_std(trained, group_size, [w for w in weights if w > 0])
    else:
        advantages = gk.group_advantages(rewards, group_size, weights=list(weights))  # [N, K]
    values = advantages.view(samples // group_size, group_size, positions).transpose(1, 2)
    return Advantages(
        values=values.float().contiguous(),
        std=float(values.std()),
        zero_spread_groups=int(equal.sum()),
        failed_groups=int(failed.sum()),
        groups=failed.numel(),
    )


def _by_one_std(
    rewards: Tensor,  # float64 [R, J, N, K]
    group_size: int,
    weights: Sequence[float],  # R numbers
) -> Tensor:  # [N, K]
    """(reward - mean of its group) / std of all finite ones; exactly 0 in a group that has failed
    or whose rewards are equal, as in `gk.group_advantages`."""
    groups = rewards.unflatten(2, (-1, group_size))  # [R, J, B, G, K]
    highest, lowest = groups.amax(3, keepdim=True), groups.amin(3, keepdim=True)  # NaN if any is
    usable = (highest > lowest) & highest.isfinite() & lowest.isfinite()
    centred = groups - groups.mean(3, keepdim=True)  # of equal ones not 0 but for rounding
    total = rewards.new_zeros(rewards.shape[2:])
    for weight, values, ours, ok in zip(weights, rewards, centred, usable, strict=True):
        if not bool(ok.any()):
            continue  # fewer than two values may be left
        scaled = ours / (values[values.isfinite()].std() + EPS)
        total += weight * torch.where(ok, scaled, 0.0).sum(0).flatten(0, 1)  # [N, K]
    return total


def loss_table(losses: Sequence[gk.PolicyLoss]) -> Tensor:
    """The statistics of policy losses, a row each, and of how many branches: float64 [n, 7], on the
    CPU, in one transfer."""
    table = torch.stack([torch.cat([out.loss.view(1), out.statistics]) for out in losses])
    branches = torch.tensor([out.log_prob.numel() for out in losses], dtype=torch.float64)
    return torch.cat([table.double().cpu(), branches[:, None]], dim=1)


def summarise_losses(table: Tensor, with_kl: bool = False) -> dict[str, float]:
    """The metrics row's keys over all the policy losses of one update, of every rank: means over
    branches, however they were cut into forwards, and of ratio_max the largest. A NaN in any of
    them is a NaN in the row. with_kl: there is a KL term."""
    branches = table[:, 6]
    means = (table[:, :6] * branches[:, None]).sum(0) / branches.sum()
    loss, ratio_mean, _, clip_fraction, approx_kl, kl = means.tolist()
    return {
        "loss": loss,
        "ratio_mean": ratio_mean,
        "ratio_max": float(table[:, 2].max()),
        "clip_fraction": clip_fraction,
        "approx_kl": approx_kl,
        **({"kl": kl} if with_kl else {}),
    }
