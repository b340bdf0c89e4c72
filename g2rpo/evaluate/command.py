"""The command `g2rpo evaluate`, from arguments to files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ..arguments import make_parser, parse_config, take_options
from ..checkpoint import check_weights, choose_checkpoint
from ..config import Config
from ..errors import ConfigurationError
from ..metrics import duration
from ..rewards.build import make_rewards
from ..weights import FullWeights, LoraWeights
from .files import check_folder, make_folder, write_files
from .folder import images_in
from .of_images import evaluate_folders, read_folders
from .of_run import evaluate_run
from .page import write_page
from .scores import check_channels
from .settings import default_samples, image_settings, run_settings
from .table import show


def main(arguments: Sequence[str]) -> int:
    """0. Raises ConfigurationError on wrong input, TrainingError where it cannot go on."""
    parser = make_parser("evaluate")
    options, rest = take_options(
        arguments, flags=["--ema", "--overwrite"],
        valued={"--checkpoint": "a name such as step-000020", "--samples": "a number of images",
                "--output": "a folder", "--base": "a folder of images"},
    )  # fmt: skip
    if {"-h", "--help"} & set(rest):
        parse_config(parser, ["--help"])
    if not rest or rest[0].startswith("-"):
        raise ConfigurationError(
            "nothing to evaluate is given; expected the directory of a run, or a folder of images, "
            "before the options"
        )
    place, overrides = Path(rest[0]).expanduser(), rest[1:]
    samples = _samples(options["--samples"])
    is_run = (place / "config.yaml").is_file()
    _check_place(place, is_run, options)
    began = time.monotonic()
    console = Console(highlight=False)
    overwrite, given = options["--overwrite"] is not None, options["--output"]
    output = Path(given).expanduser() if given else None
    if is_run:
        ema = options["--ema"] is not None
        run, config = run_settings(parser, place, overrides)
        checkpoint = choose_checkpoint(place, options["--checkpoint"], "RUN_DIR")
        folder = (LoraWeights if config.model.lora.rank else FullWeights).folder
        check_weights(checkpoint, folder, ema)  # before hours of drawing
        output = output or place / f"evaluation-{checkpoint.name}{'-ema' if ema else ''}"
        check_folder(output, overwrite)
        samples = samples or default_samples(config, overrides)
        rewards = make_rewards(config)
        check_channels(rewards, 1 if config.model.path == "digits" else 3)
        make_folder(output)
        evaluation = evaluate_run(
            run, config, rewards, place, checkpoint, ema, samples, output, console
        )
        settings = {"run": str(place), "checkpoint": checkpoint.name, "ema": ema}
    else:
        config = image_settings(parser, overrides)
        base = Path(options["--base"]).expanduser() if options["--base"] else None
        folders = read_folders(place, base, samples, config)
        output = output or Path(f"evaluation-{place.resolve().name}")
        check_folder(output, overwrite)
        rewards = make_rewards(config)
        make_folder(output)
        evaluation = evaluate_folders(*folders, config, rewards, output, console)
        settings = {"images": str(place), "base": base and str(base)}
    settings |= {"samples": len(evaluation.prompts), **_used(config, is_run)}
    write_files(evaluation, output, settings)
    page = write_page(evaluation, output)
    console.print()
    show(evaluation, console)
    console.print()
    console.out(
        f"In {duration(time.monotonic() - began)}: {page}, and beside it evaluation.json, "
        "evaluation.csv and scores.csv", highlight=False,
    )  # fmt: skip
    return 0


def _samples(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(f"--samples is {text!r}; expected a number of images, at least 1")
    return int(text)


def _check_place(place: Path, is_run: bool, options: Mapping[str, str | None]) -> None:
    """Raise ConfigurationError unless it is a run or a folder of images, with options of such."""
    if is_run and options["--base"] is not None:
        raise ConfigurationError(
            f"--base is given, but {str(place)!r} is a run, whose base is the policy that it began "
            "with; expected no --base"
        )
    if is_run:
        return
    if place.parent.name == "checkpoints" and (place.parent.parent / "config.yaml").is_file():
        raise ConfigurationError(
            f"{str(place)!r} is a checkpoint; expected its run: {place.parent.parent} --checkpoint "
            f"{place.name}"
        )
    if not images_in(place):
        raise ConfigurationError(
            f"{str(place)!r} is neither the directory of a run (with its config.yaml) nor a folder "
            "with images (.png, .jpg, .jpeg, .webp); expected either"
        )
    for name in ("--checkpoint", "--ema"):
        if options[name] is not None:
            raise ConfigurationError(
                f"{name} is given, but {str(place)!r} is a folder of images; expected a run, or no "
                f"{name}"
            )


def _used(config: Config, is_run: bool) -> dict[str, object]:
    """The keys of the configuration that an evaluation uses, as they are."""
    groups = asdict(config)
    rollout = {key: groups["rollout"][key] for key in ("branch_batch",)}
    if is_run:
        keys = ("height", "width", "steps", "shift", "guidance", "branch_batch")
        rollout = {key: groups["rollout"][key] for key in keys}
    return {
        "model": groups["model"] if is_run else {"device": config.model.device},
        "data": groups["data"], "rollout": rollout, "rewards": groups["rewards"],
    }  # fmt: skip
