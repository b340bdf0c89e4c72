"""The noise schedule, and the paths along it that complete a branch at several granularities.

A branch leaves the anchor at SDE position k and stands at sigma[k+1]. For granularity g it is then
evaluated along

    sigma[k+1], sigma[k+2], sigma[k+2+g], sigma[k+2+2g], ...

and its image is the x0-prediction at the last evaluated sigma. The last sigma of that list within
the schedule is arrived at, not evaluated; a coarse run may thus end above sigma = 0 and the
x0-prediction closes the gap. All granularities share their common beginnings (the same latents at
the same sigma), so the paths of one position form a prefix tree, evaluated once a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def noise_schedule(steps: int, shift: float) -> Tensor:
    """sigma = shift*t / (1 + (shift-1)*t), t from 1 to 0: float64 [steps + 1], decreasing."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; expected a number > 0")
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = shift * t / (1 + (shift - 1) * t)
    sigmas[0] = 1  # exactly: at shift < 1/2 it would be rounded, and dynamics divide by 1 - sigma
    return sigmas


def completion_path(position: int, granularity: int, steps: int) -> list[int]:
    """Indices of the sigmas at which a branch of `position` is evaluated, coarse or fine.

    position: SDE position k, 0 <= k <= steps - 2. granularity: step size in sigmas, >= 1.
    """
    if not 0 <= position <= steps - 2:
        raise ValueError(
            f"position is {position}; expected 0 <= position <= steps - 2 = {steps - 2}"
        )
    if granularity < 1:
        raise ValueError(f"granularity is {granularity}; expected at least 1")
    return [position + 1, *range(position + 2, steps + 1, granularity)][:-1]


@dataclass
class CompletionNode:
    """One transformer evaluation of every branch of a position: a prefix of its paths."""

    sigma: int  # index of the sigma it is evaluated at
    children: list[CompletionNode] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)  # granularities whose path ends here
    remaining: int = 1  # evaluations on the longest path from here, this one included

    def count(self) -> int:
        return 1 + sum(child.count() for child in self.children)


def completion_tree(position: int, granularities: Sequence[int], steps: int) -> CompletionNode:
    """The prefix tree of one position's paths. `finished` holds indices into granularities."""
    root = CompletionNode(position + 1)
    for index, granularity in enumerate(granularities):
        node = root
        path = completion_path(position, granularity, steps)
        for depth, sigma in enumerate(path):
            if depth:
                child = next((c for c in node.children if c.sigma == sigma), None)
                if child is None:
                    child = CompletionNode(sigma)
                    node.children.append(child)
                node = child
            node.remaining = max(node.remaining, len(path) - depth)
        node.finished.append(index)
    return root


def evaluations_per_prompt(
    steps: int, positions: Sequence[int], granularities: Sequence[int], group_size: int
) -> int:
    """Transformer evaluations of one prompt's rollout: the anchor and all completions.

    The update's own forwards, len(positions) a prompt, come on top.
    """
    nodes = sum(completion_tree(k, granularities, steps).count() for k in positions)
    return steps + group_size * nodes
