"""An evaluation: what was drawn and how it scored, before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from .statistics import Comparison, compare


@dataclass(frozen=True)
class Evaluation:
    """M images of a policy, their prompts and scores; and, in pairs with them, those of a base.

    Images are files in the evaluation's folder, named relative to it.
    """

    name: str  # of the policy, for people: 'digits-20260101, step-000020'
    prompts: Sequence[str]  # M
    rewards: Sequence[str]  # R short names
    heldout: Sequence[bool]  # R: never trained on
    scores: Tensor  # float64 [R, M] on the host; NaN: failed
    images: Sequence[Path]  # M
    base_name: str | None = None
    base_scores: Tensor | None = None  # [R, M]
    base_images: Sequence[Path] | None = None  # M
    facts: Mapping[str, object] = field(default_factory=dict)  # how it was made: label -> value

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The table, a row a reward, those that are trained on first."""
        rows = [
            compare(
                name, heldout, self.scores[i],
                None if self.base_scores is None else self.base_scores[i],
            )
            for i, (name, heldout) in enumerate(zip(self.rewards, self.heldout, strict=True))
        ]  # fmt: skip
        return sorted(rows, key=lambda row: row.heldout)
