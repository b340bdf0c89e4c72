"""Advantages by the standard deviation of all of an update's rewards, objective.advantage_std."""

from __future__ import annotations

import math

import pytest
import torch
from baseline_updates import close
from torch import Tensor

from g2rpo.objective import _by_one_std, integrate_advantages


def rewards_of_two(positions: int = 1) -> Tensor:  # float64 [2, 2, 12, positions], groups of 4
    generator = torch.Generator().manual_seed(3)
    scale = torch.tensor([1.0, 30.0], dtype=torch.float64).view(2, 1, 1, 1)
    return scale * torch.randn(2, 2, 12, positions, generator=generator, dtype=torch.float64)


def one_std_by_loop(rewards: Tensor, group_size: int, weights: list[float]) -> Tensor:
    """Number by number in Python floats."""
    out = torch.zeros(rewards.shape[2:], dtype=torch.float64)
    for values, weight in zip(rewards, weights, strict=True):
        finite = [x for x in values.flatten().tolist() if math.isfinite(x)]
        mean_of_all = sum(finite) / len(finite)
        spread = (sum((x - mean_of_all) ** 2 for x in finite) / (len(finite) - 1)) ** 0.5
        for j in range(values.shape[0]):
            for k in range(values.shape[2]):
                for first in range(0, values.shape[1], group_size):
                    group = values[j, first : first + group_size, k].tolist()
                    if not all(map(math.isfinite, group)) or max(group) == min(group):
                        continue
                    mean = sum(group) / group_size
                    for i, x in enumerate(group):
                        out[first + i, k] += weight * (x - mean) / (spread + 1e-8)
    return out


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.25, 2.0]])
def test_one_std_against_a_loop(weights: list[float], positions: int) -> None:
    """Several rewards, granularities and positions; groups that failed; one that is indifferent."""
    rewards = rewards_of_two(positions)
    rewards[0, 0, 5, 0] = torch.nan
    rewards[1, 1, 8, -1] = torch.inf
    rewards[1, 0, 2, 0] = -torch.inf
    rewards[0, 1, :4, 0] = 0.1
    truth = one_std_by_loop(rewards, 4, weights)
    assert truth.count_nonzero() == truth.numel()  # each sample has a granularity or reward left
    close(_by_one_std(rewards, 4, weights), truth, atol=1e-12)
    advantages = integrate_advantages(rewards, 4, weights, "update")
    assert (advantages.failed_groups, advantages.zero_spread_groups) == (3, 1)
    assert advantages.groups == 2 * 2 * 3 * positions
    assert advantages.values.shape == (3, positions, 4)
    close(advantages.values.transpose(1, 2).flatten(0, 1), truth, atol=1e-6)


def test_one_std_leaves_failed_and_indifferent_groups_at_zero() -> None:
    """Exactly: Adam makes a whole step of a gradient of rounding errors."""
    rewards = rewards_of_two()[:1, :1]
    rewards[0, 0, 1] = torch.nan
    rewards[0, 0, 4:8] = 0.26384601438460253  # whose mean over 24 is another number
    got = _by_one_std(rewards, 4, [1.0]).view(3, 4)
    assert (got[:2] == 0).all() and (got[2] != 0).all()
    for size in (3, 5, 7, 12, 24):
        alike = torch.full((1, 1, 2 * size, 1), 0.26384601438460253, dtype=torch.float64)
        assert (_by_one_std(alike, size, [1.0]) == 0).all()
    rewards[0, 0, ::4] = torch.nan  # no group is left
    assert (_by_one_std(rewards, 4, [1.0]) == 0).all()
    rewards[:] = torch.nan
    assert (_by_one_std(rewards, 4, [1.0]) == 0).all()


def test_a_reward_of_no_weight_takes_no_part_in_one_std() -> None:
    rewards = rewards_of_two()
    alone = integrate_advantages(rewards[:1], 4, [1.0], "update")
    rewards[1, :, 3] = torch.nan
    both = integrate_advantages(rewards, 4, [1.0, 0.0], "update")
    assert torch.equal(alone.values, both.values) and both.failed_groups == 0
    group = integrate_advantages(rewards[:1], 4, [1.0])
    assert not torch.allclose(alone.values, group.values, atol=0.05)
