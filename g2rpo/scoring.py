"""Scoring: decoded images past the reward functions, and the images of the fixed evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import g2rpo_kernels as gk

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


def score_rollout(
    model: Model,
    finished: Tensor,  # [J, B * G, K, *S]
    anchors: Tensor | None,  # [B, *S]
    prompts: Sequence[str],  # B
    rewards: Sequence[Reward],  # R
    batch_size: int,
) -> tuple[Tensor, dict[str, float]]:  # [R, J, B * G, K], metrics keys
    """Rewards of all images-to-be, and of the anchors' own images beside them. Of the former also
    how many have none, and what a reward that cannot read all of a prompt has counted."""
    row: dict[str, float] = {}
    if anchors is not None:
        scores = score_latents(model, anchors, prompts, rewards, batch_size)
        for reward, values in zip(rewards, scores, strict=True):
            row[f"anchor/{reward.name}/mean"], _ = mean_and_std(values)
    shape = finished.shape[:3]
    per_prompt = shape[1] * shape[2] // len(prompts)
    captions = [p for p in prompts for _ in range(per_prompt)] * shape[0]
    scores = score_latents(model, finished.flatten(0, 2), captions, rewards, batch_size)
    for reward, values in zip(rewards, scores, strict=True):
        mean, std = mean_and_std(values)
        row[f"rollout/{reward.name}/mean"], row[f"rollout/{reward.name}/std"] = mean, std
        row[f"rollout/{reward.name}/failed"] = int((~values.isfinite()).sum())
        if hasattr(reward.function, "truncated_prompts"):
            row[f"truncated_prompts/{reward.name}"] = int(reward.function.truncated_prompts)
    return scores.view(-1, *shape), row


@torch.no_grad()
def sample_policy(
    model: Model,
    prompts: Sequence[str],  # M, one an image
    sigmas: Tensor,  # float32 [T + 1]
    batch_size: int,
    first: int = 0,
) -> Tensor:  # [M, 3 or 1, H, W]
    """Deterministic samples of these prompts from fixed noises, the same in every run and for every
    policy: images of one place in two such lists are a pair. first: place of the first of them, for
    a list that is drawn in parts."""
    policy = model.policy
    seeds = evaluation_seeds(first + len(prompts))[first:]
    noise = gk.normal(seeds.to(policy.device), model.latent_shape)
    images = []
    for rows in row_slices(len(prompts), batch_size):
        *_, (_, _, _, latents) = run_ode(policy, noise[rows], model.embed(prompts[rows]), sigmas)
        images.append(model.decode(latents))
    return torch.cat(images)


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
        if hasattr(reward.function, "truncated_prompts"):
            row[f"truncated_prompts/{reward.name}"] = int(reward.function.truncated_prompts)
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
