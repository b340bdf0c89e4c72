"""Rows and pictures of a run that never was, for the tests of what is written and shown of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

DIGITS = ["zero", "one", "two"]


def evaluated(update: int, reward: float, judge: float, **more: object) -> dict:
    return {
        "update": update,
        "reward/fit/mean": reward,
        "reward/fit/std": 0.5,
        "heldout/judge/mean": judge,
        "heldout/judge/std": 0.25,
        **more,
    }


def run_rows(updates: int = 4, heldout: bool = True) -> list[dict]:
    found = []
    for update in range(updates + 1):
        row: dict = {"update": update}
        if update:
            row |= {"seconds": 2.5 * update, "evaluations": 6048 * update, "skipped_updates": 1}
            row |= {"grad_norm": 0.3, "advantage_std": 1.4, "zero_spread_groups": 2}
            row |= {"ratio_mean": 1.0, "ratio_max": 1.0, "clip_fraction": 0.0, "failed_groups": 3}
            row |= {"seconds/completions": 1.5, "seconds/update": 0.5, "peak_memory_bytes": 2**30}
            row |= {"rollout/classifier_probability/mean": 0.8}
        if update % 2 == 0:
            share = update / max(updates, 1)
            row |= {"reward/classifier_log_prob/mean": -0.6 + 0.25 * share}
            row |= {"reward/classifier_log_prob/std": 1.0}
            row |= {"reward/classifier_probability/mean": 0.77 + 0.14 * share}
            row |= {"reward/classifier_probability/std": 0.2}
            if heldout:
                row |= {"heldout/judge_accuracy/mean": 0.986 - 0.026 * share}
                row |= {"heldout/judge_accuracy/std": 0.3}
        found.append(row)
    return found


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
