"""Scores of images that are on the host, a batch of them on the device at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from rich.console import Console
from torch import Tensor

from ..errors import ConfigurationError, TrainingError
from ..flux.pipeline import progress_bar
from ..memory import within_memory
from ..metrics import count, duration
from ..rewards import Reward
from ..scoring import score_images

Chunks = Iterable[tuple[Sequence[int], Tensor]]  # places, and images [n, 3 or 1, H, W] of them


class Batch:
    """How many images at once: half as many wherever memory runs out."""

    def __init__(self, size: int, on_message: Callable[[str], None]) -> None:
        self.size = size
        self._on_message = on_message

    def within_memory(self, doing: str, work: Callable[[int], Tensor]) -> Tensor:
        """work(size), with as small a size as it takes. Raises TrainingError at one image."""

        def halve(reason: str) -> None:
            if self.size == 1:
                raise TrainingError(
                    f"out of memory while {doing} a single image ({reason}); expected more GPU "
                    "memory, a smaller rollout.height and rollout.width, or fewer rewards at a time"
                )
            self.size //= 2
            self._on_message(
                f"Out of memory while {doing} images: from here on {self.size} at once ({reason})"
            )

        return within_memory(lambda: work(self.size), halve)


def score_chunks(
    chunks: Chunks,
    prompts: Sequence[str],  # M
    rewards: Sequence[Reward],  # R
    batch: Batch,
    device: torch.device,
    on_scores: Callable[[int], None] = lambda count: None,
) -> Tensor:  # float64 [R, M] on the host, NaN where a score failed
    """Scores of all images. on_scores(n): n more images have been scored by one of the rewards.

    Raises TrainingError, which names the reward, for images or prompts that it refuses.
    """
    scores = torch.full((len(rewards), len(prompts)), math.nan, dtype=torch.float64)
    for places, images in chunks:
        asked = [prompts[i] for i in places]
        for row, reward in zip(scores, rewards, strict=True):
            row[list(places)] = _score(images, asked, reward, batch, device, on_scores)
            reward.rest()
    return scores


def _score(
    images: Tensor,
    prompts: Sequence[str],
    reward: Reward,
    batch: Batch,
    device: torch.device,
    on_scores: Callable[[int], None],
) -> Tensor:  # [N]
    found: list[Tensor] = []
    done = 0

    def some(size: int) -> Tensor:
        rows = slice(done, done + size)
        return score_images(images[rows].to(device), prompts[rows], [reward], size)[0].cpu()

    while done < len(images):
        try:
            found.append(batch.within_memory(f"scoring by {reward.name!r}", some))
        except ValueError as error:  # what a reward says of images or prompts that it cannot take
            raise TrainingError(f"reward {reward.name!r} refuses the images: {error}") from error
        done += len(found[-1])
        on_scores(len(found[-1]))
    return torch.cat(found)


def check_channels(rewards: Sequence[Reward], channels: int) -> None:
    """Raise ConfigurationError for a reward that scores no images of so many channels."""
    for reward in rewards:
        if reward.channels not in (None, channels):
            raise ConfigurationError(
                f"reward {reward.name!r} scores images of {reward.channels} channels; these have "
                f"{channels}"
            )


def score_sources(
    sources: Sequence[Chunks],  # of the base, where there is one, and of the policy
    prompts: Sequence[str],  # M
    rewards: Sequence[Reward],  # R
    batch: Batch,
    device: torch.device,
    console: Console,
) -> list[Tensor]:  # float64 [R, M] each
    """`score_chunks` of each, while a person watches."""
    began, total = time.monotonic(), len(sources) * len(rewards) * len(prompts)
    with progress_bar(console, "scoring", total) as progress:
        scores = [
            score_chunks(
                source, prompts, rewards, batch, device, lambda done: progress.advance(0, done)
            )
            for source in sources
        ]
    spent = duration(time.monotonic() - began)
    console.out(
        f"{count(total, 'score')} by {count(len(rewards), 'reward')} in {spent}", highlight=False
    )
    return scores
