"""The rollout of an update: anchors, and the branches that leave them.

`run_ode` takes one noise a prompt deterministically down the schedule: the anchor. At each SDE
position k of it, one stochastic step from (x_k, v_k) fans out into G branches: singular stochastic
sampling. v_k is the anchor's own velocity, so branching costs no evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .policy import Conditions, FluxPolicy
from .seeds import branch_seeds


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
class Branches:
    """Everything the update needs of the B prompts of one forward, and what is to be completed."""

    latents: Tensor  # [K, B, *S] the anchors' x_k
    x_next: Tensor  # [B, G, K, *S] the branches
    old_log_prob: Tensor  # [K, B, G]
    anchor_images: Tensor  # [B, *S] the anchors' own x0


def branch_out(
    policy: FluxPolicy,
    noise: Tensor,  # [B, *S]
    conditions: Conditions,  # B rows
    sigmas: Tensor,  # float32 [T + 1]
    positions: Sequence[int],  # K SDE positions
    coefficients: Sequence[gk.StepCoefficients],  # K
    seeds: Sequence[Tensor],  # K, each int64 [B, G]
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Branches:
    """One anchor a prompt, and G branches at each of its SDE positions.

    on_rows: called with the number of rows after each forward.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for i, latents, velocity, following in run_ode(policy, noise, conditions, sigmas):
        if i in positions:
            kept[i] = velocity, latents
        on_rows(len(noise))
    steps = [
        gk.sde_step(*kept[k], step, seeds=step_seeds)
        for k, step, step_seeds in zip(positions, coefficients, seeds, strict=True)
    ]
    return Branches(
        latents=torch.stack([kept[k][1] for k in positions]),
        x_next=torch.stack([x_next for x_next, _ in steps], dim=2),
        old_log_prob=torch.stack([log_prob for _, log_prob in steps]),
        anchor_images=following,
    )


def all_branch_seeds(
    run_seed: int,
    update: int,
    prompt_ids: Sequence[int],
    positions: Sequence[int],
    group_size: int,
    device: torch.device,
) -> list[Tensor]:  # K, each int64 [B, G]
    """The seeds `branch_out` wants."""
    return [
        branch_seeds(run_seed, update, prompt_ids, k, group_size).to(device) for k in positions
    ]
