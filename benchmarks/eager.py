"""The eager baselines: what flow-RL trainers run today, in plain PyTorch.

Latents and velocities are repeated to one row a branch, upcast to float32, stepped in score form
with a standard deviation per row, and log-probabilities are averaged over all but the first
dimension (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818). Written from the formulas.
What those trainers compute beside the loss for their logs is left out, which favours them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPS = 1e-8


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def repeated(x: Tensor, branches: int) -> Tensor:
    """[P, *S] -> [P*G, *S], one row a branch."""
    return upcast(x).repeat_interleave(branches, dim=0)


def per_row(value: Tensor, branches: int, like: Tensor) -> Tensor:
    """[P] -> [P*G, 1, ...], shaped to multiply `like`."""
    return value.repeat_interleave(branches, dim=0).view(-1, *[1] * (like.ndim - 1))


def mean_and_scale(
    v: Tensor, x: Tensor, sigma: Tensor, sigma_next: Tensor, sigma_max: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """Where a row's step lands without noise, and the noise's scale; sigmas as `per_row` shapes."""
    dt = sigma_next - sigma
    std = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * eta
    mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std * torch.sqrt(-dt)


def sde_step_with_log_prob(
    velocity: Tensor,  # [P, *S]
    latents: Tensor,  # [P, *S]
    sigmas: tuple[Tensor, Tensor, Tensor],  # [P] each: sigma, sigma_next, stand-in for sigma = 1
    branches: int,
    *,
    noise: Tensor | None = None,  # [P*G, *S]
    x_next: Tensor | None = None,  # [P*G, *S]: replay this sample instead of drawing one
    eta: float = 0.7,
) -> tuple[Tensor, Tensor]:  # [P*G, *S], [P*G]
    v, x = repeated(velocity, branches), repeated(latents, branches)
    mean, scale = mean_and_scale(v, x, *(per_row(s, branches, x) for s in sigmas), eta)
    if x_next is None:
        x_next = mean + scale * (torch.randn_like(mean) if noise is None else noise)
    log_prob = (
        -((x_next.detach() - mean) ** 2) / (2 * scale**2)
        - torch.log(scale)
        - math.log(math.sqrt(2 * math.pi))
    )
    return x_next, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


def clipped_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float
) -> Tensor:  # all [P*G] -> []
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
    return torch.mean(torch.maximum(unclipped, clipped))


def ode_step(velocity: Tensor, latents: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    dt = (sigma_next - sigma).view(-1, *[1] * (latents.ndim - 1))
    return upcast(latents) + dt * upcast(velocity)


def step_mean(
    velocity: Tensor, latents: Tensor, sigmas: tuple[Tensor, Tensor, Tensor], eta: float = 0.7
) -> Tensor:
    """The mean of the step above, one row an anchor."""
    v, x = upcast(velocity), upcast(latents)
    return mean_and_scale(v, x, *(per_row(s, 1, x) for s in sigmas), eta)[0]


def group_advantages(rewards: Tensor, group_size: int, weights: list[float]) -> Tensor:
    """[R, J, N, K] -> [N, K], a Python loop over reward models, granularities and prompts.

    Positions are kept as columns; a loop over them as well would be K times slower.
    """
    models, granularities, samples, _ = rewards.shape
    total = torch.zeros_like(rewards[0, 0])
    for r in range(models):
        for j in range(granularities):
            for start in range(0, samples, group_size):
                group = rewards[r, j, start : start + group_size]
                advantage = (group - group.mean(dim=0)) / (group.std(dim=0) + EPS)
                total[start : start + group_size] += weights[r] * advantage
    return total
