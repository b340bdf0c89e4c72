"""Runs of seconds whose reward can be hacked: `g2rpo train` on the tiny model, in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import PROMPTS, TinyModel, brightness, contrast

import g2rpo.run
from g2rpo import cli
from g2rpo.data import read_evaluation_prompts

# brightness is trained on; darkness, the judge, dislikes just that
HACKED = {
    "rollout": {
        "steps": 6, "sde_positions": [0, 1, 2], "group_size": 4, "branch_batch": 12,
    },
    "rewards": [
        {"name": "tiny:brightness"},
        {"name": "tiny:contrast", "weight": 0.0},
        {"name": "hacked_runs:darkness", "heldout": True},
    ],
    "optimizer": {"lr": 3e-3},
    "train": {
        "updates": 4, "prompts_per_update": 2, "save_every": 1, "keep_last": 0,
        "evaluate_every": 1, "evaluation_samples": 12,
    },
}  # fmt: skip



def darkness(images, prompts):
    return -brightness(images, prompts)


def recorded_contrast(images, prompts):
    """contrast; the prompts of every call are a line of the file $RECORDED."""
    with open(os.environ["RECORDED"], "a", encoding="utf-8") as file:
        file.write(json.dumps(prompts) + "\n")
    return contrast(images, prompts)


def half_blind(images, prompts):
    """contrast, which fails at every prompt "east"."""
    readable = torch.tensor([prompt != "east" for prompt in prompts])
    return contrast(images, prompts).where(readable, torch.nan)


class Train:
    """Calls `g2rpo train`: what it says, and its rows."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capsys) -> None:
        self.file, self.patch, self.capsys = folder / "run.yaml", patch, capsys
        self.file.write_text(yaml.safe_dump(HACKED))
        patch.setattr(g2rpo.run, "load_model", self.load_model)
        patch.setenv("COLUMNS", "400")

    @staticmethod
    def load_model(config, **_: object) -> TinyModel:
        return TinyModel(evaluation_prompts=read_evaluation_prompts(config, PROMPTS))

    def __call__(
        self, run: Path, *arguments: object, resume: bool = False, report: bool = False
    ) -> SimpleNamespace:
        """report: whether it is to be drawn, which takes most of the time."""
        first = ["--resume", run] if resume else [self.file, "--train.output", run]
        with self.patch.context() as patch:
            if not report:
                patch.setattr(g2rpo.run, "write_report", lambda run_dir: None)
            assert cli.main(["train", *map(str, [*first, *arguments])]) == 0
        return SimpleNamespace(out=self.capsys.readouterr().out, rows=rows_of(run))

    def refused(self, run: Path, *arguments: object, resume: bool = False) -> str:
        """What a call says that must end with exit code 2."""
        first = ["--resume", run] if resume else [self.file, "--train.output", run]
        assert cli.main(["train", *map(str, [*first, *arguments])]) == 2
        return self.capsys.readouterr().err


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: list[dict]) -> list[dict]:
    timed = ("second", "memory")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]


def scores_of(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "scores").iterdir()}
