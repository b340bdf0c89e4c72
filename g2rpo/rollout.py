"""Anchors, and the branches that leave them: the rollout of G2RPO.

`run_ode` takes one noise a prompt deterministically down the schedule: the anchor. At each SDE
position k of it, one stochastic step from (x_k, v_k) fans out into G branches: singular stochastic
sampling. v_k is the anchor's own velocity, so branching costs no evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .policy import Conditions, FluxPolicy


def run_ode(
    policy: FluxPolicy,
    latents: Tensor,  # [B, *S] noise at sigma[0]
    conditions: Conditions,  # B rows
    sigmas: Tensor,  # float32 [T + 1] on the policy's device
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Deterministic sampling. Yields (i, x_i, v_i, x_{i+1}) for each of the T steps."""
    for i in range(len(sigmas) - 1):
        velocity = policy.predict(latents, sigmas[i].expand(len(latents)), conditions)
        following = gk.ode_step(velocity, latents, sigmas[i : i + 1], sigmas[i + 1 : i + 2])
        yield i, latents, velocity, following
        latents = following


@dataclass(frozen=True)
class Step:
    """One stochastic step of M rows, G branches each, as a policy loss sees it again."""

    latents: Tensor  # [M, *S]
    sigmas: Tensor  # float32 [M]
    x_next: Tensor  # [M, G, *S]
    old_log_prob: Tensor  # [M, G]
    coefficients: gk.StepCoefficients  # table [M, 5] or [1, 5]
    old_velocity: Tensor | None  # [M, *S], where it was kept


class Steps(Protocol):
    """The stochastic steps of the rows of one forward: what the update needs of a rollout."""

    old_log_prob: Tensor  # [K, M, G]

    def __len__(self) -> int:
        """K."""

    def step(self, index: int) -> Step:
        """One of the K."""


@dataclass(frozen=True)
class Branches:
    """`Steps` of the B prompts of one forward, and what is to be completed."""

    latents: Tensor  # [K, B, *S] the anchors' x_k
    x_next: Tensor  # [B, G, K, *S] the branches
    old_log_prob: Tensor  # [K, B, G]
    anchors: Tensor  # [B, *S] the anchors past their last SDE position
    sigmas: Tensor  # float32 [K]
    coefficients: gk.StepCoefficients  # table [K, 5]
    velocity: Tensor | None = None  # [K, B, *S], where it was kept

    def __len__(self) -> int:
        return len(self.latents)

    def step(self, index: int) -> Step:
        table = self.coefficients.table[index : index + 1]
        return Step(
            self.latents[index],
            self.sigmas[index].expand(self.latents.shape[1]),
            self.x_next[:, :, index],
            self.old_log_prob[index],
            gk.StepCoefficients(table, self.coefficients.dynamics),
            None if self.velocity is None else self.velocity[index],
        )


def branch_out(
    policy: FluxPolicy,
    noise: Tensor,  # [B, *S]
    conditions: Conditions,  # B rows
    sigmas: Tensor,  # float32 [T + 1]
    positions: Sequence[int],  # K SDE positions
    coefficients: gk.StepCoefficients,  # table [K, 5]
    seeds: Tensor,  # int64 [K, B, G]
    on_rows: Callable[[int], None] = lambda rows: None,
    keep_velocity: bool = False,
) -> Branches:
    """One anchor a prompt, up to its last SDE position, and G branches at each of them.

    on_rows: called with the number of rows after each forward. keep_velocity: for GRPO-Guard's
    ratio.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    until = sigmas[: max(positions) + 2]
    anchors = noise
    for i, latents, velocity, following in run_ode(policy, noise, conditions, until):
        if i in positions:
            kept[i] = velocity, latents
        anchors = following
        on_rows(len(noise))
    velocity, latents = (torch.cat([kept[k][part] for k in positions]) for part in (0, 1))
    # All positions in one call, a row a (position, prompt): the draws of a row are its own.
    rows = gk.StepCoefficients(
        coefficients.table.repeat_interleave(len(noise), dim=0), coefficients.dynamics
    )
    x_next, log_prob = gk.sde_step(velocity, latents, rows, seeds=seeds.flatten(0, 1))
    count = len(positions), len(noise)
    return Branches(
        latents=latents.unflatten(0, count),
        x_next=x_next.unflatten(0, count).permute(1, 2, 0, *range(3, x_next.ndim + 1)).contiguous(),
        old_log_prob=log_prob.unflatten(0, count),
        anchors=anchors,
        sigmas=sigmas[list(positions)],
        coefficients=coefficients,
        velocity=velocity.unflatten(0, count) if keep_velocity else None,
    )
