"""What is compared: methods, each a preset with a few keys changed, and their runs by seed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import RESUMABLE, differences, find_preset, parse_config
from ..config import Config
from ..errors import ConfigurationError
from ..metrics import MetricsLog
from ..sampling import evaluations_of_update

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# What a comparison sets itself, and by which option.
OPTION_OF = {
    "train.updates": "--budget", "train.seed": "--seeds", "train.evaluate_every": "--points",
    "train.output": "--output",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A configuration under a name."""

    label: str
    config: Config
    changed: tuple[str, ...] = ()  # key=value, beyond the preset


@dataclass(frozen=True)
class Run:
    """One method from one seed, in a directory of its own."""

    method: Method
    seed: int
    config: Config
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.method.label}, seed {self.seed}"


def make_method(parser: ArgumentParser, text: str, overrides: Sequence[str]) -> Method:
    """'PRESET key=value ...' -> a method named by what it changes.

    overrides: --key value arguments for all methods; those of `text` come after them. Raises
    ConfigurationError; unknown keys and wrong types exit with a message that names them.
    """
    try:
        preset, *changed = shlex.split(text) or [""]
    except ValueError as error:
        raise ConfigurationError(
            f"the method {text!r} is not PRESET key=value ...: {error}"
        ) from error
    if "=" in preset and not Path(preset).is_file():
        raise ConfigurationError(
            f"the method {text!r} begins with a key; expected 'PRESET {text}', in quotes as one"
        )
    for item in changed:
        if not re.fullmatch(r"\w+(\.\w+)*=.+", item):
            raise ConfigurationError(
                f"the method {text!r} has {item!r}; expected key=value, as rollout.eta=0.5"
            )
    given = [f"--{item}" for item in changed]
    for argument in (*overrides, *given):
        key = argument.partition("=")[0].removeprefix("--")
        if key in OPTION_OF:
            raise ConfigurationError(
                f"{key} is given; expected {OPTION_OF[key]}, by which a comparison sets it"
            )
    config = parse_config(parser, ["--config", str(find_preset(preset)), *overrides, *given])
    config.validate()
    pairs = [item.partition("=") for item in changed]
    short = [f"{key.rpartition('.')[2]}={value}" for key, _, value in pairs]
    return Method(" ".join([Path(preset).stem, *short]), config, tuple(changed))


def updates_for(config: Config, budget: int) -> tuple[int, int]:
    """Updates that come nearest to `budget` transformer evaluations, at least one; and theirs."""
    updates, total = 1, evaluations_of_update(config, 1)
    while total < budget:
        further = evaluations_of_update(config, updates + 1)
        if total + further - budget > budget - total:
            break
        updates, total = updates + 1, total + further
    return updates, total


def make_runs(
    methods: Sequence[Method], seeds: Sequence[int], budget: int, points: int, folder: Path
) -> list[Run]:
    """Seed by seed, so that a comparison cut short has something of every method.

    points: evaluations of the policy along each run, about so many, the one before training apart.
    """
    runs = []
    for seed in seeds:
        for method in methods:
            config = deepcopy(method.config)
            train, directory = config.train, folder / slug(method.label) / f"seed-{seed}"
            train.seed, train.output = seed, str(directory)
            train.updates, _ = updates_for(config, budget)  # by the seed: windows may be random
            train.evaluate_every = max(1, round(train.updates / points))
            runs.append(Run(method, seed, config, directory))
    return runs


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", label).strip("_")


def check_runs(parser: ArgumentParser, runs: Sequence[Run], folder: Path) -> None:
    """Runs that are there must be those that are asked for, but for how long they are.

    A run of fewer updates is gone on with. Raises ConfigurationError naming the run and the key, or
    --budget where the run is past it: its curve has no evaluation there.
    """
    for run in runs:
        file, log = run.directory / "config.yaml", run.directory / "metrics.jsonl"
        if not file.is_file():
            continue
        there = parse_config(parser, ["--config", str(file)])
        if run.config.model.attention == "auto":  # a run keeps what it has found to be fastest
            run.config.model.attention = there.model.attention
        for key, (old, new) in differences(there, run.config).items():
            if key not in RESUMABLE:
                raise ConfigurationError(
                    f"--output is {str(folder)!r}, where {key} of the run {run.name} is {old!r}; "
                    f"expected {new!r}, as the arguments have it, or another directory"
                )
        updates = run.config.train.updates
        rows = MetricsLog(log).rows() if log.is_file() else []
        made = rows[-1]["update"] if rows else 0
        if made > updates:
            raise ConfigurationError(
                f"--budget leaves {updates} updates of the run {run.name}, which has made {made} "
                f"in {str(folder)!r}; expected at least so many evaluations, or another directory"
            )


def check_methods(methods: Sequence[Method]) -> None:
    """Two methods of one name would share directories; two of one configuration, every bit."""
    for i, method in enumerate(methods):
        for other in methods[:i]:
            if slug(method.label) == slug(other.label):
                what = "have one name"
            elif not differences(method.config, other.config):
                what = "have one configuration"
            else:
                continue
            raise ConfigurationError(
                f"the methods {other.label!r} and {method.label!r} {what}; expected methods that "
                "differ, and YAML files of different names"
            )
