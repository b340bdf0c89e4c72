"""Trajectories: whole runs that are stochastic at many steps, the rollout of the other methods.

G runs a prompt go from noise to image, each stochastic at the given steps and deterministic at the
others. A run has one reward, and that is the advantage of all of its steps: Flow-GRPO (arXiv
2505.05470), DanceGRPO (arXiv 2505.07818) and, with a window of steps, MixGRPO (arXiv 2507.21802).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .policy import Conditions, FluxPolicy
from .rollout import Step


@dataclass(frozen=True)
class Trajectories:
    """`Steps` of the M runs of one forward, one branch each, and the images they end in."""

    latents: Tensor  # [K, M, *S] before each stochastic step
    x_next: Tensor  # [K, M, *S] after it
    old_log_prob: Tensor  # [K, M, 1]
    sigmas: Tensor  # float32 [K, M]
    coefficients: Tensor  # [K, M, 5]
    dynamics: str
    finished: Tensor  # [M, *S] at sigma 0
    velocity: Tensor | None = None  # [K, M, *S], where it was kept

    def __len__(self) -> int:
        return len(self.latents)

    def step(self, index: int) -> Step:
        return Step(
            self.latents[index],
            self.sigmas[index],
            self.x_next[index].unsqueeze(1),
            self.old_log_prob[index],
            gk.StepCoefficients(self.coefficients[index], self.dynamics),
            None if self.velocity is None else self.velocity[index],
        )

    def some(self, chosen: Tensor) -> Trajectories:  # int64 [K', M] of the K, each run its own
        """The same runs with these of their steps alone."""
        rows = torch.arange(chosen.shape[1], device=chosen.device)

        def take(values: Tensor) -> Tensor:
            return values[chosen, rows]

        return Trajectories(
            take(self.latents), take(self.x_next), take(self.old_log_prob), take(self.sigmas),
            take(self.coefficients), self.dynamics, self.finished,
            None if self.velocity is None else take(self.velocity),
        )  # fmt: skip


def run_trajectories(
    policy: FluxPolicy,
    noise: Tensor,  # [M, *S]
    conditions: Conditions,  # M rows
    sigmas: Tensor,  # float32 [T + 1]
    positions: Sequence[int],  # K stochastic steps, ascending
    coefficients: gk.StepCoefficients,  # table [K, 5]
    seeds: Tensor,  # int64 [K, M]
    on_rows: Callable[[int], None] = lambda rows: None,
    keep_velocity: bool = False,
) -> Trajectories:
    """M runs from noise to sigma = 0, stochastic at `positions`.

    on_rows: called with the number of rows after each forward. keep_velocity: for GRPO-Guard's
    ratio.
    """
    rows, kept = len(noise), []
    latents = noise
    for i in range(len(sigmas) - 1):
        velocity = policy.predict(latents, sigmas[i].expand(rows), conditions)
        if i in positions:
            k = positions.index(i)
            step = gk.StepCoefficients(coefficients.table[k : k + 1], coefficients.dynamics)
            following, log_prob = gk.sde_step(velocity, latents, step, seeds=seeds[k])
            kept.append((latents, following, log_prob, velocity if keep_velocity else None))
        else:
            following = gk.ode_step(velocity, latents, sigmas[i : i + 1], sigmas[i + 1 : i + 2])
        latents = following
        on_rows(rows)
    before, after, log_prob, velocities = zip(*kept, strict=True)
    table = coefficients.table[:, None].expand(-1, rows, -1)
    return Trajectories(
        latents=torch.stack(before),
        x_next=torch.stack(after),
        old_log_prob=torch.stack(log_prob).unsqueeze(2),
        sigmas=sigmas[list(positions)][:, None].expand(-1, rows),
        coefficients=table,
        dynamics=coefficients.dynamics,
        finished=latents,
        velocity=torch.stack(velocities) if keep_velocity else None,
    )
