"""What each method's update computes, from its authors' formulas in float64: the truth of
test_baselines*.py, whose real updates are those of baseline_updates.py.

`METHODS` says of each preset what its authors publish, at the 16 steps that the presets have. The
formulas use `peers.step` (predicted image and noise, the score) and nothing of g2rpo or
g2rpo_kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import peers
import torch
from torch import Tensor

STEPS = 16


@dataclass(frozen=True)
class Method:
    """One peer: which steps are stochastic, how, which of them are trained, and the objective."""

    dynamics: str  # of peers.step
    level: float  # its eta or noise_level
    clip_range: float
    stochastic: range  # steps that ever are
    window: int | None = None  # of these, in a row; None: all
    moves: int | None = None  # updates after which it slides on by one; None: it is drawn
    fraction: float = 1.0  # of a run's stochastic steps, that are trained
    common_noise: bool = True
    one_std: bool = False  # rewards are divided by the std of all of them, not of the group
    granularities: tuple[int, ...] = ()  # of G2RPO's branches; (): whole runs

    def windows(self, update: int) -> list[list[int]]:
        """The stochastic steps of an update; several where one of them is drawn."""
        steps = list(self.stochastic)
        if self.window is None:
            return [steps]
        starts = range(len(steps) - self.window + 1)
        if self.moves is not None:
            starts = [starts[(update - 1) // self.moves % len(starts)]]
        return [steps[start : start + self.window] for start in starts]

    @property
    def trained(self) -> int:
        """Of a run's steps, or of a prompt's branching ones."""
        return int((self.window or len(self.stochastic)) * self.fraction)


ALL_BUT_LAST, HALF = range(STEPS - 1), range(STEPS // 2)
METHODS = {
    "flow-grpo-digits": Method("flow", 0.7, 1e-4, ALL_BUT_LAST, common_noise=False, one_std=True),
    "flow-grpo-fast-digits": Method(
        "cps", 0.8, 1e-5, HALF, window=3, common_noise=False, one_std=True
    ),
    "dance-grpo-digits": Method("dance", 0.3, 1e-4, ALL_BUT_LAST, fraction=0.6),
    "mix-grpo-digits": Method("flow", 0.7, 1e-4, ALL_BUT_LAST, window=4, moves=8),
    "g2rpo-digits": Method("flow", 0.7, 1e-4, HALF, granularities=(1, 2)),
    "g2rpo-no-mgai-digits": Method("flow", 0.7, 1e-4, HALF, granularities=(1,)),
}


def schedule() -> Tensor:  # float64 [STEPS + 1]
    """shift 3 on linspace(1, 0): DanceGRPO's, MixGRPO's and Granular-GRPO's sd3_time_shift."""
    t = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    return 3 * t / (1 + 2 * t)


def step(
    method: Method,
    velocity: Tensor,  # [R, *S]
    latents: Tensor,  # [R, *S]
    steps: Tensor,  # int64 [R] of the schedule
    x_next: Tensor | None = None,  # [R, G, *S]
    noise: Tensor | None = None,  # [R, G, *S]
    constant: bool = True,
) -> peers.Step:  # of R * G rows
    """The peer's step, a row a branch: Granular-GRPO's code too repeats a prompt's velocity."""
    branches = (x_next if noise is None else noise).shape[1]
    sigmas, ones = schedule(), [1] * (latents.ndim - 1)
    velocity, latents, at = (
        rows.repeat_interleave(branches, 0) for rows in (velocity, latents, steps)
    )
    return peers.step(
        method.dynamics, velocity.double(), latents.double(),
        sigmas[at].view(-1, *ones), sigmas[at + 1].view(-1, *ones),
        torch.full([len(at), *ones], method.level, dtype=torch.float64), sigma_max=sigmas[1],
        prev_sample=None if x_next is None else x_next.double().flatten(0, 1),
        noise=None if noise is None else noise.double().flatten(0, 1), constant=constant,
    )  # fmt: skip


# Advantages ---------------------------------------------------------------------------------------


def standardised(rewards: Tensor, dim: int) -> Tensor:
    """DanceGRPO, MixGRPO, Granular-GRPO: (r - r.mean()) / (r.std() + 1e-8) of a prompt's group."""
    return (rewards - rewards.mean(dim, keepdim=True)) / (rewards.std(dim, keepdim=True) + 1e-8)


def flow_grpo_advantages(rewards: Tensor) -> Tensor:  # [B, G]
    """Flow-GRPO with global_std: (r - mean of the prompt) / (np.std of all + 1e-4)."""
    spread = rewards.std(correction=0)
    return (rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-4)


# The objective ------------------------------------------------------------------------------------


def gap(values: Tensor, others: Tensor) -> Tensor:  # [R]
    return (values - others).square().flatten(1).mean(1)


def ratio(ours: peers.Step, old: peers.Step) -> Tensor:
    return (ours.log_prob - old.log_prob).exp()


def guard_ratio(ours: peers.Step, old: peers.Step, dynamics: str) -> Tensor:
    """GRPO-Guard's RatioNorm, with the mean over a row's dimensions that its paper has.

    ratio_mean_bias = mean((prev_sample_mean - old_prev_sample_mean)^2) / (2 (sqrt_dt sigma_t)^2)
    ratio = exp((log_prob - old_log_prob + ratio_mean_bias) * (sqrt_dt sigma_t))

    Where the log-prob is without 1 / (2 std^2), as Flow-CPS has it, so is the bias."""
    std = ours.std.flatten()
    bias = gap(ours.mean, old.mean)
    if dynamics != "cps":
        bias = bias / (2 * std**2)
    return ((ours.log_prob - old.log_prob + bias) * std).exp()


def clipped(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """All peers' loss of each sample, advantages clamped to 5 standard deviations."""
    advantages = advantages.clamp(-5, 5)
    unclipped = -advantages * ratio
    return torch.maximum(unclipped, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def divergence(ours: peers.Step, reference: peers.Step, dynamics: str) -> Tensor:  # [R]
    """KL of two Gaussian steps of one std, an element: gap / (2 std^2), std that of the whole step.
    Flow-CPS leaves the divisor out."""
    value = gap(ours.mean, reference.mean)
    return value if dynamics == "cps" else value / (2 * ours.std.flatten() ** 2)
