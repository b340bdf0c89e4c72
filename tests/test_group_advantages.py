"""Advantages: a group normalised by itself, then summed; failed and indifferent ones are silent."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Target
from torch import Tensor

import g2rpo_kernels as gk


def draw_rewards(*shape: int, device: str = "cpu", scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, generator=cases.generator("rewards", shape))).to(device)


def by_loop(rewards: Tensor, group_size: int, weights: list[float], eps: float) -> Tensor:
    """Number by number in Python floats: mean, unbiased std, and the two special groups."""
    models, granularities, samples, positions = rewards.shape
    out = torch.zeros(samples, positions, dtype=torch.float64)
    for r in range(models):
        for j in range(granularities):
            for first in range(0, samples, group_size):
                for k in range(positions):
                    group = rewards[r, j, first : first + group_size, k].double().tolist()
                    if any(x != x or abs(x) == float("inf") for x in group):
                        continue
                    if max(group) == min(group):
                        continue
                    mean = sum(group) / group_size
                    variance = sum((x - mean) ** 2 for x in group) / (group_size - 1)
                    for i, x in enumerate(group):
                        out[first + i, k] += weights[r] * (x - mean) / (variance**0.5 + eps)
    return out


@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((1, 1, 2, 1), 2), ((2, 3, 12, 4), 3), ((1, 2, 24, 8), 12), ((3, 1, 35, 2), 7)],
)
def test_against_a_loop(
    shape: tuple[int, ...], group_size: int, eps: float, target: Target
) -> None:
    rewards = draw_rewards(*shape)
    rewards[0, 0, :group_size, 0] = 0.1  # an indifferent group
    rewards[-1, -1, -1, -1] = torch.nan  # a failed one
    weights = [0.5, -1.0, 2.0][: shape[0]]
    got = gk.group_advantages(rewards.to(target.device), group_size, weights, eps)
    assert got.dtype == torch.float32 and got.is_contiguous()
    want = by_loop(rewards, group_size, weights, eps)
    torch.testing.assert_close(got.cpu().double(), want, rtol=3e-7, atol=3e-7)


def widest(target: Target) -> torch.dtype:
    """float64 is the reference backend's alone."""
    return torch.float64 if target.backend == "reference" else torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float64_whatever_the_rewards_are(dtype: torch.dtype, target: Target) -> None:
    """Rewards near 1000 that differ in their last bits: float32 sums would lose them."""
    if dtype == torch.float64 != widest(target):
        pytest.skip("float64 is the reference backend's alone")
    rewards = (1000 + draw_rewards(1, 1, 12, 3)).to(dtype)
    got = gk.group_advantages(rewards.to(target.device), 12)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = by_loop(rewards, 12, [1.0], 1e-8)
    torch.testing.assert_close(got.cpu().double(), want, rtol=3e-7, atol=3e-7)


def test_two_samples_get_plus_and_minus_half_of_root_two(target: Target) -> None:
    """The unbiased std of a pair is its distance over root 2; the biased one would give 1."""
    rewards = torch.tensor([3.0, 7.0], device=target.device).view(1, 1, 2, 1)
    got = gk.group_advantages(rewards, 2).flatten()
    torch.testing.assert_close(got.cpu(), torch.tensor([-0.5, 0.5]) * 2**0.5)


def test_sums_over_granularities_and_weighs_models(target: Target) -> None:
    rewards = draw_rewards(2, 3, 12, 4, device=target.device).to(widest(target))
    parts = [
        [gk.group_advantages(rewards[r : r + 1, j : j + 1], 4) for j in range(3)] for r in range(2)
    ]
    per_model = [sum(row) for row in parts]
    tolerance = 1e-12 if rewards.dtype == torch.float64 else 1e-6
    close = {"rtol": tolerance, "atol": tolerance}
    unweighted = gk.group_advantages(rewards, 4)
    torch.testing.assert_close(unweighted, per_model[0] + per_model[1], **close)
    weighted = gk.group_advantages(rewards, 4, weights=(0.3, 2))
    torch.testing.assert_close(weighted, 0.3 * per_model[0] + 2 * per_model[1], **close)
    assert torch.equal(gk.group_advantages(rewards, 4, weights=[1, 1]), unweighted)
    silenced = gk.group_advantages(rewards, 4, weights=[0, 1])
    torch.testing.assert_close(silenced, per_model[1], **close)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7, 1e8, 0.0])
@pytest.mark.parametrize("group_size", [2, 3, 12])
def test_an_indifferent_group_gives_exactly_zero(
    value: float, group_size: int, target: Target
) -> None:
    """Even where rounding makes the mean of equal numbers another number, so that std is not 0."""
    for dtype in {torch.float32, widest(target)}:
        rewards = torch.full((1, 2, 2 * group_size, 1), value, dtype=dtype, device=target.device)
        assert (gk.group_advantages(rewards, group_size) == 0).all()
        rewards[0, 1, -1] = 2 * value + 1  # one group of one granularity has advantages now
        got = gk.group_advantages(rewards, group_size).flatten()
        assert (got[:group_size] == 0).all() and (got[group_size:] != 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_failed_reward_silences_its_group_alone(bad: float, target: Target) -> None:
    rewards = draw_rewards(2, 2, 9, 3, device=target.device)
    healthy = gk.group_advantages(rewards, 3)
    without = rewards.clone()
    without[1, 0, 3:6, 2] = 0.25  # contributes 0, as the failed group must
    rewards[1, 0, 4, 2] = bad
    got = gk.group_advantages(rewards, 3)
    assert torch.equal(got, gk.group_advantages(without, 3))
    changed = (got != healthy).nonzero().tolist()
    assert changed == [[3, 2], [4, 2], [5, 2]]
    rewards[:] = bad
    assert (gk.group_advantages(rewards, 3) == 0).all()


def test_shift_and_scale_of_a_reward_model_do_not_matter(target: Target) -> None:
    rewards = draw_rewards(2, 2, 24, 3, device=target.device).to(widest(target))
    base = gk.group_advantages(rewards, 12)
    moved = rewards.clone()
    moved[0] = 1000 * moved[0] - 5
    moved[1] = 0.01 * moved[1] + 100
    # float32 rewards near 100 that differ by 0.01 have lost three digits before they get here
    tolerance = 1e-5 if rewards.dtype == torch.float64 else 2e-3
    torch.testing.assert_close(
        gk.group_advantages(moved, 12), base, rtol=tolerance, atol=tolerance
    )
    tolerance = 1e-12 if rewards.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(gk.group_advantages(-rewards, 12), -base, rtol=tolerance, atol=0)


def test_each_group_has_mean_zero_and_unit_spread(target: Target) -> None:
    rewards = draw_rewards(1, 1, 36, 5, device=target.device).to(widest(target))
    groups = gk.group_advantages(rewards, 12).view(3, 12, 5)
    assert groups.mean(1).abs().max() < (1e-14 if groups.dtype == torch.float64 else 1e-7)
    torch.testing.assert_close(groups.std(1), torch.ones_like(groups[:, 0]), rtol=3e-7, atol=0)


def test_layout_for_the_rows_of_the_policy_loss(target: Target) -> None:
    """Row (prompt b, position k), branch g of the loss is sample b * G + g at position k."""
    prompts, group_size, positions = 3, 4, 5
    rewards = draw_rewards(1, 1, prompts * group_size, positions, device=target.device)
    advantages = gk.group_advantages(rewards, group_size)
    rows = advantages.view(prompts, group_size, positions).transpose(1, 2)
    rows = rows.reshape(prompts * positions, group_size)
    for b in range(prompts):
        for k in range(positions):
            group = rewards[:, :, b * group_size : (b + 1) * group_size, k : k + 1]
            alone = gk.group_advantages(group, group_size).flatten()
            assert torch.equal(rows[b * positions + k], alone)


def test_no_samples_and_no_positions(target: Target) -> None:
    assert gk.group_advantages(draw_rewards(1, 2, 0, 3, device=target.device), 4).shape == (0, 3)
    assert gk.group_advantages(draw_rewards(1, 2, 8, 0, device=target.device), 4).shape == (8, 0)
