"""Completions: every branch to its image, at every granularity, in batches of one fixed size.

A completion is an independent work item (latents, sigma, path, prompt). `plan_completions` packs
all items of an update ahead of time, a sigma per row, longest remaining path first so that the
last batches stay full. The plan depends on counts alone and serves every update; `complete` runs
it. What a branch becomes does not depend on what it was packed with.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .policy import Conditions, FluxPolicy
from .schedule import CompletionNode, completion_tree


@dataclass(frozen=True)
class CompletionBatch:
    """One forward of the transformer, and the Euler steps that follow from it.

    Rows beyond `rows` repeat the first: the forward always sees one static shape. A step reads one
    row of the batch and writes one slot of the pool; several may read the same row.
    """

    rows: int
    slots: Tensor  # int64 [batch] of the pool, the latents read
    prompts: Tensor  # int64 [batch] rows of the conditions
    sigmas: Tensor  # float32 [batch]
    step_rows: Tensor  # int64 [E] of this batch
    step_sigmas: Tensor  # float32 [E]
    step_sigmas_next: Tensor  # float32 [E], 0 for the x0-prediction
    step_slots: Tensor  # int64 [E] of the pool, the latents written


@dataclass(frozen=True)
class CompletionPlan:
    """Batches in order. The pool: first the branches, last the finished latents."""

    batches: tuple[CompletionBatch, ...]
    branches: int
    granularities: int
    slots: int

    @property
    def evaluations(self) -> int:
        """Real rows, padding not counted."""
        return sum(batch.rows for batch in self.batches)

    @property
    def padding(self) -> int:
        return sum(len(batch.slots) - batch.rows for batch in self.batches)


def plan_completions(
    sigmas: Tensor,  # float64 [T + 1]
    positions: Sequence[int],
    granularities: Sequence[int],
    prompts: int,
    group_size: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> CompletionPlan:
    """Pack all completions of `prompts` prompts into batches of `batch_size` rows.

    Branches are numbered (prompt * group_size + branch) * len(positions) + position's index, the
    layout of rewards [N, K].
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    steps = len(sigmas) - 1
    trees = [completion_tree(k, granularities, steps) for k in positions]
    branches = prompts * group_size * len(positions)
    # Every granularity may hold a slot of its own while its paths run, and one when finished.
    finished = branches * len(granularities)
    free = list(range(finished - 1, branches - 1, -1))
    ready: list[tuple[int, int, int, int, CompletionNode]] = []
    for slot in range(branches):
        root = trees[slot % len(positions)]
        ready.append((-root.remaining, slot, slot, slot, root))
    heapq.heapify(ready)
    order, batches = branches, []
    while ready:
        items = [heapq.heappop(ready) for _ in range(min(batch_size, len(ready)))]
        padded = items + [items[0]] * (batch_size - len(items))
        steps_to: list[tuple[int, int, int, int]] = []  # row, sigma, sigma_next, slot
        for row, (_, _, slot, branch_id, node) in enumerate(items):
            for granularity in node.finished:
                steps_to.append(
                    (row, node.sigma, steps, finished + granularity * branches + branch_id)
                )
            if not node.children:
                free.append(slot)
            for child in node.children:
                to = slot if child is node.children[0] else free.pop()
                steps_to.append((row, node.sigma, child.sigma, to))
                heapq.heappush(ready, (-child.remaining, order, to, branch_id, child))
                order += 1
        row, sigma, sigma_next, to = zip(*steps_to, strict=True)
        batches.append(
            CompletionBatch(
                rows=len(items),
                slots=_index([slot for _, _, slot, _, _ in padded], device),
                prompts=_index(
                    [b // (group_size * len(positions)) for _, _, _, b, _ in padded], device
                ),
                sigmas=sigmas[[node.sigma for *_, node in padded]].float().to(device),
                step_rows=_index(row, device),
                step_sigmas=sigmas[list(sigma)].float().to(device),
                step_sigmas_next=sigmas[list(sigma_next)].float().to(device),
                step_slots=_index(to, device),
            )
        )
    return CompletionPlan(tuple(batches), branches, len(granularities), finished * 2)


def _index(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def complete(
    policy: FluxPolicy,
    plan: CompletionPlan,
    latents: Tensor,  # [B, G, K, *S] the branches
    conditions: Conditions,  # B rows
    on_batch: Callable[[int], None] | None = None,
) -> Tensor:  # [J, B * G, K, *S]
    """Finish every branch at every granularity; returns the x0-predictions, float32.

    on_batch: called with the number of real rows after each batch.
    """
    prompts, group_size, positions, *shape = latents.shape
    if prompts * group_size * positions != plan.branches:
        raise ValueError(
            f"latents has {prompts} x {group_size} x {positions} branches; the plan expects "
            f"{plan.branches}"
        )
    pool = latents.new_empty(plan.slots, *shape)
    pool[: plan.branches] = latents.reshape(plan.branches, *shape)
    for batch in plan.batches:
        rows = pool[batch.slots]
        velocity = policy.predict(rows, batch.sigmas, conditions[batch.prompts])
        pool[batch.step_slots] = gk.ode_step(
            velocity[batch.step_rows], rows[batch.step_rows],
            batch.step_sigmas, batch.step_sigmas_next,
        )  # fmt: skip
        if on_batch is not None:
            on_batch(batch.rows)
    done = pool[plan.slots - plan.branches * plan.granularities :]
    return done.view(plan.granularities, prompts * group_size, positions, *shape)
