"""`g2rpo compare PRESET ... --seeds N --budget EVALUATIONS`: see the package's docstring."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..arguments import make_parser, take_options
from ..config import RewardConfig
from ..errors import ConfigurationError
from ..lock import alone
from ..metrics import count, duration, number, write_beside
from ..rewards import short_names
from .methods import Method, Run, check_methods, check_runs, make_method, make_runs, updates_for
from .sweep import SWEEP_SEEDS, Sweep
from .table import Curve, Table, legend, make_table, markdown
from .workers import is_done, train_all

BUDGET, SEEDS, POINTS = 60_000, 2, 10


def main(arguments: Sequence[str]) -> int:
    """The command. Raises ConfigurationError, or TrainingError when a run fails; returns 0."""
    options, rest = take_options(
        arguments,
        valued={
            "--budget": "transformer evaluations of a run",
            "--seeds": "a number of seeds",
            "--jobs": "runs at a time",
            "--points": "evaluations of the policy along a run",
            "--sweep": "KEY=VALUE,VALUE,...",
            "--reward": "the name of a trained reward",
            "--output": "a directory",
        },
    )
    texts, overrides = _split(rest)
    parser = make_parser("compare")
    if {"-h", "--help"} & set(overrides):
        parser.print_help()
        return 0
    if not texts:
        raise ConfigurationError(
            "no method is given; expected presets before the options, each perhaps with keys, as "
            "'g2rpo-digits rollout.granularities=[1]'"
        )
    budget = _whole("--budget", options["--budget"], BUDGET)
    seeds = range(_whole("--seeds", options["--seeds"], SEEDS, SWEEP_SEEDS[0]))
    jobs = _whole("--jobs", options["--jobs"], os.cpu_count() or 1)
    points = _whole("--points", options["--points"], POINTS)
    sweep = None if options["--sweep"] is None else Sweep.parse(options["--sweep"])
    folder = Path(options["--output"] or Path("runs") / "comparison")
    methods = [make_method(parser, text, overrides) for text in texts]
    check_methods(methods)
    trained = _trained(methods, options["--reward"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--output is {str(folder)!r}; expected a directory that can be made: {error}"
        ) from error
    with alone(folder, f"another comparison is under way in {folder}; expected it to end first"):
        if sweep is not None:
            variants = sweep.variants(parser, texts, overrides)
            runs = make_runs(variants, SWEEP_SEEDS, budget, 1, folder / "sweep")
            check_runs(parser, runs, folder)
            print(f"Sweep of {sweep.key} over {', '.join(sweep.values)}, by {trained} alone")
            _train(runs, jobs, trained)
            methods = sweep.choose(methods, variants, list(map(Curve.read, runs)), trained)
        runs = make_runs(methods, seeds, budget, points, folder)
        check_runs(parser, runs, folder)
        for method in methods:
            updates, evaluations = updates_for(method.config, budget)
            print(f"{method.label}: {count(updates, 'update')}, {evaluations:,} evaluations")
        _train(runs, jobs, trained)
        curves = [Curve.read(run) for run in runs]
        _write(folder, make_table(curves, trained), curves, sweep, arguments)
    return 0


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Methods, which come first, and --key value arguments for all of them."""
    first = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    return list(arguments[:first]), list(arguments[first:])


def _whole(name: str, value: str | None, default: int, most: int | None = None) -> int:
    if value is None:
        return default
    digits = value.replace("_", "")
    if not digits.isdecimal() or int(digits) < 1 or (most is not None and int(digits) > most):
        upto = "1 or more" if most is None else f"1 to {most}"
        raise ConfigurationError(f"{name} is {value!r}; expected a whole number, {upto}")
    return int(digits)


def _trained(methods: Sequence[Method], name: str | None) -> str:
    """The reward by which runs are compared at an equal level: all methods must have it."""
    common: list[str] | None = None
    for method in methods:
        names = [
            short
            for reward, short in zip(method.config.rewards, _names(method.config.rewards))
            if not reward.heldout
        ]
        common = names if common is None else [n for n in common if n in names]
    if not common:
        raise ConfigurationError(
            "the methods have no reward in common that is not held out; expected one by which "
            "they can be compared"
        )
    if name is not None and name not in common:
        raise ConfigurationError(
            f"--reward is {name!r}; expected a reward that is not held out and that all methods "
            f"evaluate, one of {common}"
        )
    return name or common[0]


def _names(rewards: Sequence[RewardConfig]) -> list[str]:
    return short_names([r.name for r in rewards], [r.label for r in rewards])


def _train(runs: Sequence[Run], jobs: int, trained: str) -> None:
    left = [run for run in runs if not is_done(run)]
    there = f", {len(runs) - len(left)} made already" if len(left) < len(runs) else ""
    jobs = min(jobs, len(left))
    side = f"; {jobs} at a time" if jobs > 1 else ""
    print(f"{count(len(runs), 'run')}{there}{side}", flush=True)
    if not left:
        return
    made, began = 0, time.monotonic()

    def on_done(run: Run, seconds: float) -> None:
        nonlocal made
        made += 1
        values = Curve.read(run).values(f"reward/{trained}/mean")
        spent = time.monotonic() - began
        eta = duration(spent / made * (len(left) - made)) if made < len(left) else ""
        print(
            f"[{made}/{len(left)}] {run.name}: {duration(seconds)}; {trained} "
            f"{number(values[0])} -> {number(values[-1])}" + (f"; {eta} left" if eta else ""),
            flush=True,
        )

    train_all(left, jobs, on_done)


def _write(
    folder: Path,
    table: Table,
    curves: Sequence[Curve],
    sweep: Sweep | None,
    arguments: Sequence[str],
) -> None:
    """comparison.json, comparison.md, curves.png, samples.png; and the table on the terminal."""
    from .pictures import write_comparison, write_grids  # matplotlib: a second
    from .terminal import show

    command = shlex.join(["g2rpo", "compare", *arguments])
    facts = {
        "command": command,
        "seeds": table.seeds,
        "level": table.level,
        "reward": table.reward,
        "sweep": None if sweep is None else asdict(sweep),
        "start": table.start,
        "methods": {
            label: {name: asdict(figure) for name, figure in figures.items()}
            for label, figures in table.methods.items()
        },
    }
    text = json.dumps(_plain(facts), indent=1, ensure_ascii=False, allow_nan=False)
    write_beside(folder / "comparison.json", text.encode())
    parts = [f"    {command}", markdown(table), legend(table)]
    if sweep is not None:
        parts.append(sweep.sentence(table.reward))
    write_beside(folder / "comparison.md", ("\n\n".join(parts) + "\n").encode())
    write_comparison(curves, table, folder / "curves.png")
    write_grids(curves, folder / "samples.png")
    show(table)
    print(f"comparison.json, comparison.md, curves.png and samples.png are in {folder}", flush=True)


def _plain(value: object) -> object:
    """NaN has no spelling in JSON: null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
