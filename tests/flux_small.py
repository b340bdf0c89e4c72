"""A run of seconds on the miniature FLUX folder, and its reward."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

PROMPTS = (
    "a golden retriever leaping on green grass", "a lighthouse in a storm, oil on canvas",
    "a bowl of ripe strawberries on a blue table", "two old friends playing chess",
    "Glasbläser, Köln",
)  # fmt: skip


def warmth(images, prompts):  # [N, 3, H, W] -> [N]
    """Red against blue."""
    assert images.shape[1] == 3 and len(images) == len(prompts)
    return (images[:, 0] - images[:, 2]).flatten(1).mean(1)


def write_run(folder: Path, miniature: Path, **groups: dict) -> Path:
    """prompts.txt and run.yaml in the folder; groups change the run's keys. Returns the latter."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    run = {
        "model": {"path": str(miniature), "lora": {"rank": 4, "alpha": 8}},
        "data": {"prompts": str(folder / "prompts.txt"), "max_sequence_length": 64},
        "rollout": {
            "height": 32, "width": 48, "steps": 5, "sde_positions": [0, 1], "group_size": 3,
            "branch_batch": 8,
        },
        "rewards": [{"name": "flux_small:warmth"}],
        "optimizer": {"lr": 1e-2},
        "train": {
            "updates": 3, "prompts_per_update": 2, "save_every": 1, "evaluate_every": 3,
            "evaluation_samples": 5,
        },
    }  # fmt: skip
    for name, keys in groups.items():
        run[name] = {**run.get(name, {}), **keys}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def environment() -> dict[str, str]:
    """Of a process that finds the reward."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
