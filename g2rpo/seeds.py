"""Seeds: a hash of what a draw is for, so that no draw depends on batch size, order or device.

The seed of a branch is a splitmix64 chain over (run seed, update, prompt id, SDE position, branch).
Other draws use values that no branch has: the anchor's initial noise has position -1, the fixed
evaluation noises update -1. There is no generator state to save: a resumed run draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_NO_POSITION = _EVALUATION = -1


def splitmix64(x: np.ndarray) -> np.ndarray:
    """One output of Vigna's splitmix64 for every uint64 state in x (arithmetic modulo 2^64)."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_seed(*parts: int | np.ndarray) -> Tensor:
    """Chain the parts (integers or integer arrays, broadcast) into int64 seeds of 64 bits each."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = splitmix64(state ^ np.asarray(part, dtype=np.int64).view(np.uint64))
    return torch.from_numpy(state.view(np.int64))


def branch_seeds(
    run_seed: int,
    update: int,
    prompt_ids: Sequence[int],  # P
    positions: Sequence[int],  # K SDE positions
    group_size: int,
) -> Tensor:  # int64 [K, P, group_size]
    """Seeds of all branches of an update."""
    prompts = np.asarray(prompt_ids, dtype=np.int64)[None, :, None]
    steps = np.asarray(positions, dtype=np.int64)[:, None, None]
    return hash_seed(run_seed, update, prompts, steps, np.arange(group_size))


def anchor_seeds(run_seed: int, update: int, prompt_ids: Sequence[int]) -> Tensor:
    """Seeds of the anchors' initial noise: int64 [P]."""
    prompts = np.asarray(prompt_ids, dtype=np.int64)
    return hash_seed(run_seed, update, prompts, _NO_POSITION, 0)


def trajectory_seeds(
    run_seed: int, update: int, prompt_ids: Sequence[int], group_size: int, common: bool
) -> Tensor:  # int64 [P, group_size]
    """Seeds of the initial noises of a prompt's runs: one for all of them, or one each."""
    prompts = np.asarray(prompt_ids, dtype=np.int64)[:, None]
    runs = np.zeros(group_size, dtype=np.int64) if common else np.arange(group_size)
    return hash_seed(run_seed, update, prompts, _NO_POSITION, runs)


def shuffled_steps(
    seeds: Tensor,  # int64 [K, M] of the K steps of M runs
    count: int,
) -> Tensor:  # int64 [count, M], values in [0, K)
    """For each run, `count` of its steps in an order of its own, from the steps' seeds."""
    keys = splitmix64(seeds.numpy().view(np.uint64))  # not the noise's own words
    return torch.from_numpy(np.argsort(keys, axis=0, kind="stable")[:count].copy())


def evaluation_seeds(samples: int) -> Tensor:
    """Seeds of the evaluation noises, the same in every run: int64 [samples]."""
    return hash_seed(0, _EVALUATION, 0, _NO_POSITION, np.arange(samples))


def permutation(run_seed: int, epoch: int, size: int) -> list[int]:
    """A permutation of range(size) for one epoch, from the same hash (keys are 64 bits)."""
    keys = hash_seed(run_seed, epoch, np.arange(size)).numpy().view(np.uint64)
    return np.argsort(keys, kind="stable").tolist()
