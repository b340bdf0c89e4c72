"""Scoring: decoded images past the reward functions, and the images of the fixed evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .distributed import Ranks
from .policy import Model
from .rewards import Reward, score
from .rollout import run_ode
from .seeds import evaluation_seeds

RESAMPLES = 2000  # of an evaluation's intervals: 10 ms a reward of 500 images


def row_slices(rows: int, size: int) -> list[slice]:
    """[0, rows) in slices of at most `size`."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def mean_and_std(values: Tensor) -> tuple[float, float]:
    """Over the finite ones, since a failed score is NaN. NaN without any (std: without two)."""
    values = values[values.isfinite()]
    return float(values.mean()), float(values.std()) if len(values) > 1 else math.nan


def score_latents(
    model: Model,
    latents: Tensor,  # [M, *S]
    prompts: Sequence[str],  # M
    rewards: Sequence[Reward],  # R
    batch_size: int,
) -> Tensor:  # float64 [R, M]
    """Decode and score, batch_size images at a time, so that all images never exist at once."""
    scores: list[list[Tensor]] = [[] for _ in rewards]
    for rows in row_slices(len(latents), batch_size):
        images = model.decode(latents[rows])
        for values, reward in zip(scores, rewards, strict=True):
            values.append(score_finite(reward, images, prompts[rows]))
    return torch.stack([torch.cat(values) for values in scores])


def score_finite(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:  # [N]
    """`score`, but an image with a NaN or infinite pixel is a failed score, NaN, and is not shown
    to the reward function: those are written for images."""
    sound = images.isfinite().flatten(1).all(1)
    if bool(sound.all()):
        return score(reward, images, prompts)
    values = images.new_full((len(images),), math.nan, dtype=torch.float64)
    if bool(sound.any()):
        kept = [prompt for prompt, ok in zip(prompts, sound.tolist(), strict=True) if ok]
        values[sound] = score(reward, images[sound], kept)
    return values


@dataclass(frozen=True)
class RolloutScores:
    """What the rewards say of a rollout, on the device, float64; NaN where one failed."""

    images: Tensor  # [R, J, B * G, K], of the images-to-be
    anchors: Tensor | None  # [R, B], of the anchors' own images beside them
    truncated: dict[str, int]  # by reward: prompts that it could not read all of

    def of_all(self, ranks: Ranks) -> RolloutScores:
        """Those of all ranks' prompts, in the order of the ranks."""
        parts = ranks.gather(self.truncated)
        return RolloutScores(
            ranks.gather_rows(self.images, dim=2),
            None if self.anchors is None else ranks.gather_rows(self.anchors, dim=1),
            {name: sum(part[name] for part in parts) for name in self.truncated},
        )

    def row(self, rewards: Sequence[Reward]) -> dict[str, float]:
        """Metrics keys."""
        row: dict[str, float] = {}
        for i, reward in enumerate(rewards):
            name, values = reward.name, self.images[i]
            if self.anchors is not None:
                row[f"anchor/{name}/mean"], _ = mean_and_std(self.anchors[i])
            row[f"rollout/{name}/mean"], row[f"rollout/{name}/std"] = mean_and_std(values)
            row[f"rollout/{name}/failed"] = int((~values.isfinite()).sum())
        return row | {f"truncated_prompts/{name}": n for name, n in self.truncated.items()}


def score_rollout(
    model: Model,
    finished: Tensor,  # [J, B * G, K, *S]
    anchors: Tensor | None,  # [B, *S]
    prompts: Sequence[str],  # B
    rewards: Sequence[Reward],  # R
    batch_size: int,
) -> RolloutScores:
    """Rewards of all images-to-be, and of the anchors' own images beside them."""
    of_anchors = None
    if anchors is not None:
        of_anchors = score_latents(model, anchors, prompts, rewards, batch_size)
    shape = finished.shape[:3]
    per_prompt = shape[1] * shape[2] // len(prompts)
    captions = [p for p in prompts for _ in range(per_prompt)] * shape[0]
    scores = score_latents(model, finished.flatten(0, 2), captions, rewards, batch_size)
    return RolloutScores(scores.view(-1, *shape), of_anchors, truncated_prompts(rewards))


def truncated_prompts(rewards: Sequence[Reward]) -> dict[str, int]:
    """By reward: what those that cannot read all of a prompt have counted so far."""
    functions = {reward.name: reward.function for reward in rewards}
    return {
        name: int(function.truncated_prompts)
        for name, function in functions.items()
        if hasattr(function, "truncated_prompts")
    }


@torch.no_grad()
def sample_policy(
    model: Model,
    prompts: Sequence[str],  # M, one an image
    sigmas: Tensor,  # float32 [T + 1]
    batch_size: int,
    places: Sequence[int] | None = None,
) -> Tensor:  # [M, 3 or 1, H, W]
    """Deterministic samples of these prompts from fixed noises, the same in every run and for every
    policy: images of one place in two such lists are a pair. places: of these prompts in a list
    that is drawn in parts; None: it is all of the list."""
    policy = model.policy
    places = range(len(prompts)) if places is None else places
    seeds = evaluation_seeds(max(places) + 1)[list(places)]
    noise = gk.normal(seeds.to(policy.device), model.latent_shape)
    images = []
    for rows in row_slices(len(prompts), batch_size):
        *_, (_, _, _, latents) = run_ode(policy, noise[rows], model.embed(prompts[rows]), sigmas)
        images.append(model.decode(latents))
    return torch.cat(images)


def evaluate_policy(
    model: Model,
    prompts: Sequence[str],  # M
    sigmas: Tensor,  # float32 [T + 1]
    rewards: Sequence[Reward],  # R
    batch_size: int,
    ranks: Ranks,
    start: Tensor | None = None,  # [R, M], the starting policy's
) -> tuple[dict[str, float], Tensor | None, Tensor]:
    """The fixed evaluation, drawn and scored by all ranks: metrics keys and images [M, C, H, W],
    both the lead's alone, and scores, float64 [R, M]."""
    # As many for each rank, whose forwards may be collective; those past the end are left out.
    each = -(-len(prompts) // ranks.count)
    places = [(ranks.rank * each + i) % len(prompts) for i in range(each)]
    mine = [prompts[place] for place in places]
    images = sample_policy(model, mine, sigmas, batch_size, places)
    scores = score_images(images, mine, rewards, batch_size)
    scores = ranks.gather_rows(scores, dim=1)[:, : len(prompts)]
    everyones = ranks.rows_to_lead(images)
    if everyones is None:
        return {}, None, scores
    everyones = everyones[: len(prompts)]
    row = evaluation_row(everyones, prompts, rewards, scores, start)
    if hasattr(model, "image_metrics"):
        measured = model.image_metrics(everyones, prompts)
        row |= {f"images/{name}/mean": value for name, value in measured.items()}
    return row, everyones, scores


def score_images(
    images: Tensor,  # [M, 3 or 1, H, W]
    prompts: Sequence[str],  # M
    rewards: Sequence[Reward],  # R
    batch_size: int,
) -> Tensor:  # float64 [R, M], NaN where a score failed
    """Every reward and judge on images, batch_size of them at a time."""
    return torch.stack(
        [
            torch.cat(
                [
                    score_finite(reward, images[rows], prompts[rows])
                    for rows in row_slices(len(prompts), batch_size)
                ]
            )
            for reward in rewards
        ]
    )


def evaluation_row(
    images: Tensor,  # [M, 3 or 1, H, W]
    prompts: Sequence[str],  # M
    rewards: Sequence[Reward],  # R
    scores: Tensor,  # [R, M]
    start: Tensor | None = None,  # [R, M], the starting policy's of the same prompts and noises
) -> dict[str, float]:
    """Metrics keys: reward/<name>/mean, /std, /low, /high, /failed and, with `start`, /win_rate;
    heldout/... for held-out ones; and, where a prompt has two images, images/diversity/mean."""
    from .evaluate.statistics import estimate  # scipy takes half a second to import

    row: dict[str, float] = {}
    for i, reward in enumerate(rewards):
        kind = "heldout" if reward.heldout else "reward"
        key, values = f"{kind}/{reward.name}", scores[i]
        row[f"{key}/mean"], row[f"{key}/std"] = mean_and_std(values)
        interval = estimate(values, RESAMPLES)
        row[f"{key}/low"], row[f"{key}/high"] = interval.low, interval.high
        row[f"{key}/failed"] = int((~values.isfinite()).sum())
        if start is not None:
            row[f"{key}/win_rate"] = win_rate(values, start[i])
    row |= {f"truncated_prompts/{name}": n for name, n in truncated_prompts(rewards).items()}
    if len(set(prompts)) < len(prompts):
        row["images/diversity/mean"] = diversity(images, prompts)
    return row


def win_rate(values: Tensor, start: Tensor) -> float:  # [M], [M]
    """Share of pairs whose `values` are higher, equal ones counted a half. NaN: no finite pair."""
    difference = values - start.to(values.device)
    difference = difference[difference.isfinite()]
    return float((difference > 0).double().mean() + 0.5 * (difference == 0).double().mean())


def diversity(images: Tensor, prompts: Sequence[str]) -> float:
    """How much the images of one prompt differ: a pixel's standard deviation over them, averaged
    over pixels and prompts (in units of the pixel range). NaN if no prompt has two images.

    No reward sees it. A policy that has found the one image its reward likes best has 0.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    spreads = [images[rows].std(0).mean() for rows in groups.values() if len(rows) > 1]
    return float(torch.stack(spreads).mean()) if spreads else math.nan
