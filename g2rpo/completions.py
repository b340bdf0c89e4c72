"""Completions: every branch to its image, at every granularity, in batches of one fixed size.

A completion is an independent work item (latents, sigma, path, prompt). `plan_completions` packs
all items of an update ahead of time, a sigma per row, longest remaining path first so that the
last batches stay full. The plan depends on counts alone and serves every update; `complete` runs
it. What a branch becomes does not depend on what it was packed with.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import g2rpo_kernels as gk

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
    sigma_index: Tensor  # int64 [batch], the same as indices into the schedule
    step_rows: Tensor  # int64 [E] of this batch
    step_sigmas: Tensor  # float32 [E]
    step_sigmas_next: Tensor  # float32 [E], 0 for the x0-prediction
    step_slots: Tensor  # int64 [E] of the pool, the latents written


@dataclass(frozen=True)
class CompletionPlan:
    """Batches in order. The pool holds the latents on their way, then the finished ones:
    [J, branches] x0-predictions and last the anchors' own."""

    batches: tuple[CompletionBatch, ...]
    prompts: int
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


@dataclass(order=True, frozen=True)
class _Item:
    """One evaluation that is ready: longest remaining path first, then oldest first."""

    priority: tuple[int, int]
    node: CompletionNode = field(compare=False)
    slot: int = field(compare=False)  # where its latents are
    prompt: int = field(compare=False)
    finished: tuple[int, ...] = field(compare=False)  # slots of its images, one a granularity


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
    layout of rewards [N, K]. An anchor that has passed its last SDE position is completed with
    them, at granularity 1, since from there on no log-probability depends on it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    steps = len(sigmas) - 1
    trees = [completion_tree(k, granularities, steps) for k in positions]
    branches = prompts * group_size * len(positions)
    # Every granularity may hold a slot of its own while its paths run, and one when finished.
    working = branches * len(granularities) + prompts
    starts = [
        (trees[b % len(positions)], b // (group_size * len(positions)),
         tuple(working + j * branches + b for j in range(len(granularities))))
        for b in range(branches)
    ]  # fmt: skip
    starts += [
        (completion_tree(max(positions), [1], steps), p, (2 * working - prompts + p,))
        for p in range(prompts)
    ]
    free = list(range(working - 1, len(starts) - 1, -1))
    ready = [
        _Item((-root.remaining, slot), root, slot, prompt, finished)
        for slot, (root, prompt, finished) in enumerate(starts)
    ]
    heapq.heapify(ready)
    age, batches = len(ready), []
    while ready:
        items = [heapq.heappop(ready) for _ in range(min(batch_size, len(ready)))]
        edges: list[tuple[int, int, int, int]] = []  # row, sigma, sigma_next, slot
        for row, item in enumerate(items):
            node = item.node
            edges += [(row, node.sigma, steps, item.finished[j]) for j in node.finished]
            if not node.children:
                free.append(item.slot)
            for child in node.children:
                slot = item.slot if child is node.children[0] else free.pop()
                edges.append((row, node.sigma, child.sigma, slot))
                priority = (-child.remaining, age)
                heapq.heappush(ready, _Item(priority, child, slot, item.prompt, item.finished))
                age += 1
        batches.append(_batch(items, edges, batch_size, sigmas, device))
    return CompletionPlan(tuple(batches), prompts, branches, len(granularities), 2 * working)


def _batch(
    items: Sequence[_Item],
    edges: Sequence[tuple[int, int, int, int]],
    batch_size: int,
    sigmas: Tensor,
    device: torch.device | str,
) -> CompletionBatch:
    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    def sigma_of(values: Sequence[int]) -> Tensor:
        return sigmas[list(values)].float().to(device)

    padded = [*items, *[items[0]] * (batch_size - len(items))]
    row, sigma, sigma_next, slot = zip(*edges, strict=True)
    return CompletionBatch(
        rows=len(items),
        slots=index([item.slot for item in padded]),
        prompts=index([item.prompt for item in padded]),
        sigmas=sigma_of([item.node.sigma for item in padded]),
        sigma_index=index([item.node.sigma for item in padded]),
        step_rows=index(row),
        step_sigmas=sigma_of(sigma),
        step_sigmas_next=sigma_of(sigma_next),
        step_slots=index(slot),
    )


def complete(
    predict: Callable[[Tensor, CompletionBatch], Tensor],
    plan: CompletionPlan,
    latents: Tensor,  # [B, G, K, *S] the branches
    anchors: Tensor,  # [B, *S] the anchors past their last SDE position
    on_batch: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:  # [J, B * G, K, *S], [B, *S]
    """Finish every branch at every granularity, and the anchors: x0-predictions, float32.

    predict(latents [batch, *S], batch): their velocities; see `engine`. on_batch: called with the
    number of real rows after each batch. Nothing here waits for a GPU.
    """
    prompts, group_size, positions, *shape = latents.shape
    if (prompts, prompts * group_size * positions) != (plan.prompts, plan.branches):
        raise ValueError(
            f"latents has {prompts} x {group_size} x {positions} branches; the plan expects "
            f"{plan.branches} of {plan.prompts} prompts"
        )
    pool = latents.new_empty(plan.slots, *shape)
    pool[: plan.branches] = latents.reshape(plan.branches, *shape)
    pool[plan.branches : plan.branches + prompts] = anchors
    for batch in plan.batches:
        rows = pool.index_select(0, batch.slots)
        velocity = predict(rows, batch)
        following = gk.ode_step(
            velocity.index_select(0, batch.step_rows), rows.index_select(0, batch.step_rows),
            batch.step_sigmas, batch.step_sigmas_next,
        )  # fmt: skip
        pool.index_copy_(0, batch.step_slots, following)
        if on_batch is not None:
            on_batch(batch.rows)
    finished = pool[plan.slots // 2 :].split([plan.granularities * plan.branches, prompts])
    return finished[0].view(plan.granularities, -1, positions, *shape), finished[1]
