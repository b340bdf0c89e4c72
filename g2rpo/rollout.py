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
    anchors: Tensor  # [B, *S] the anchors past their last SDE position


def branch_out(
    policy: FluxPolicy,
    noise: Tensor,  # [B, *S]
    conditions: Conditions,  # B rows
    sigmas: Tensor,  # float32 [T + 1]
    positions: Sequence[int],  # K SDE positions
    coefficients: gk.StepCoefficients,  # table [K, 5]
    seeds: Tensor,  # int64 [K, B, G]
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Branches:
    """One anchor a prompt, up to its last SDE position, and G branches at each of them.

    on_rows: called with the number of rows after each forward.
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
    )


def broken_prompts(chunks: Sequence[tuple[slice, Branches]], finished: Tensor) -> list[int]:
    """Rows (prompts) any of whose branches or images-to-be is not finite."""
    log_probs = torch.cat([branches.old_log_prob for _, branches in chunks], dim=1)  # [K, B, G]
    prompts = log_probs.shape[1]
    sound = log_probs.isfinite().all(2).all(0)
    sound &= finished.isfinite().flatten(2).all(2).all(0).view(prompts, -1).all(1)
    return (~sound).nonzero().flatten().tolist()
