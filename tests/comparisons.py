"""Made-up curves, and comparisons of the tiny model whose workers are this process."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import tiny_cli
import torch
import yaml

import g2rpo.run
from g2rpo import cli, digits
from g2rpo.compare import workers
from g2rpo.compare.methods import Method, Run
from g2rpo.compare.pictures import write_comparison
from g2rpo.compare.table import Curve
from g2rpo.config import Config
from g2rpo.evaluations import scores_path

SMALL = {
    "rollout": {
        "steps": 6, "sde_positions": [0, 1, 2], "granularities": [1], "group_size": 4,
        "branch_batch": 8,
    },
    "rewards": [{"name": "tiny:brightness"}, {"name": "tiny:contrast", "heldout": True}],
    "optimizer": {"lr": 1e-3},
    "train": {"prompts_per_update": 2, "save_every": 1, "evaluation_samples": 6},
}  # fmt: skip
UPDATE = 2 * (6 + 4 * (5 + 4 + 3) + 3)  # its transformer evaluations: anchors, branches, gradients


def write_small(folder: Path, name: str = "small", **groups: dict) -> Path:
    """SMALL as a YAML file, with changed keys."""
    path = folder / f"{name}.yaml"
    changed = {group: {**SMALL.get(group, {}), **keys} for group, keys in groups.items()}
    path.write_text(yaml.safe_dump({**SMALL, **changed}))
    return path


def curve(
    label: str = "a",
    seed: int = 0,
    directory: Path = Path("nowhere"),
    evaluations: Sequence[int] | None = None,
    updates: Sequence[int] | None = None,
    **values: Sequence[float | None],  # reward__fit, heldout__judge, images__diversity
) -> Curve:
    """A run's curve: reward__fit=[.5, .7] are its means at two evaluations."""
    n = len(next(iter(values.values())))
    evaluations = evaluations or [100 * i for i in range(n)]
    updates = updates or list(range(n))
    rows = [
        {
            "update": updates[i], "evaluations": evaluations[i], "seconds": 1.5 * i,
            "seconds/evaluation": 0.1,
            **{f"{key.replace('__', '/')}/mean": found[i] for key, found in values.items()},
        }
        for i in range(n)
    ]  # fmt: skip
    config = Config()
    config.train.updates, config.train.seed = updates[-1], seed
    return Curve(Run(Method(label, config), seed, config, directory), rows)


@contextmanager
def in_this_process(tiny: bool = True, pictures: bool = False) -> Iterator[list[str]]:
    """Runs of `g2rpo compare` are made here, one after the other, by default of the tiny model,
    without their reports and by default without curves.png, which take longer. Gives the names of
    those made."""
    made: list[str] = []

    def train_all(runs, jobs, on_done):
        for run in runs:
            began = time.monotonic()
            assert workers._train(run.config, run.directory, 1) == ""
            made.append(run.name)
            on_done(run, time.monotonic() - began)

    threads = torch.get_num_threads()
    draw = write_comparison if pictures else lambda *_: None
    load = tiny_cli.load_tiny_model if tiny else g2rpo.run.load_model
    try:
        with (
            mock.patch("g2rpo.compare.pictures.write_comparison", draw),
            mock.patch.object(g2rpo.run, "load_model", load),
            mock.patch.object(g2rpo.run, "write_report", lambda run_dir: None),
            mock.patch("g2rpo.compare.command.train_all", train_all),
        ):
            yield made
    finally:
        torch.set_num_threads(threads)


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and error of `g2rpo compare <arguments>`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main(["compare", *map(str, arguments)])
        except SystemExit as stop:  # jsonargparse's own way out
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def rows_of(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the memory says."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k and "memory" not in k}
        for line in lines
    ]


def scores_of(run_dir: Path) -> dict[int, dict]:
    """Of every evaluation, by its update."""
    evaluated = [row["update"] for row in rows_of(run_dir) if any("/low" in key for key in row)]
    return {u: json.loads(scores_path(run_dir, u).read_text()) for u in evaluated}


# Of the digits, for workers that are processes


DIGITS = {
    "model": {"path": "digits"},
    "rollout": {
        "steps": 4, "sde_positions": [0, 1], "granularities": [1], "group_size": 4,
        "branch_batch": 16,
    },
    "rewards": [
        {"name": "comparisons:slow_probability"},
        {"name": "g2rpo.digits:judge_probability", "heldout": True},
    ],
    "optimizer": {"lr": 1e-3},
    "train": {"prompts_per_update": 2, "save_every": 3, "evaluation_samples": 20},
}  # fmt: skip
DIGITS_UPDATE = 2 * (4 + 4 * (3 + 2) + 2)


def slow_probability(images, prompts):
    """classifier_probability, at a pace that a test can interrupt."""
    time.sleep(0.05)
    return digits.classifier_probability(images, prompts)


def broken_reward(images, prompts):
    raise ConnectionError("the scorer does not answer")
