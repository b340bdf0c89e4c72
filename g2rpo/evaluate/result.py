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

    Images are files, named relative to the evaluation's folder.
    """

    name: str  # of the policy, for people: 'digits-20260101, step-000020'
    prompts: Sequence[str]  # M
    rewards: Sequence[str]  # R short names
    heldout: Sequence[bool]  # R: a judge that the training never saw
    scores: Tensor  # float64 [R, M] on the host; NaN: failed
    images: Sequence[Path]  # M
    base_name: str | None = None
    base_scores: Tensor | None = None  # [R, M]
    base_images: Sequence[Path] | None = None  # M
    facts: Mapping[str, object] = field(default_factory=dict)  # how it was made: label -> value
    trained: Sequence[bool] | None = None  # R: trained on; None: nothing is known of a training
    diversity: float | None = None  # of the images of one prompt; None: no prompt has two images
    base_diversity: float | None = None

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The table, a row a reward: those trained on, those reported, those held out."""
        rows = [
            compare(
                name, heldout, self.scores[i],
                None if self.base_scores is None else self.base_scores[i],
                trained=None if self.trained is None else self.trained[i],
            )
            for i, (name, heldout) in enumerate(zip(self.rewards, self.heldout, strict=True))
        ]  # fmt: skip
        return sorted(rows, key=lambda row: (row.heldout, row.trained is False))
