"""From arguments to a `Config`: presets, YAML files, --group.key value.

`g2rpo train` and `g2rpo embed` take the same ones, so that one line or one file serves both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigurationError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from .config import Config

PRESETS = Path(__file__).parent / "presets"

# What may differ when a run goes on: everything else would make it another run.
RESUMABLE = (
    "train.updates", "train.save_every", "train.keep_last", "train.evaluate_every",
    "train.max_skipped", "train.hacking_stop", "train.tracker", "model.device", "data.embeddings",
    "distributed.strategy", "distributed.gather", "distributed.gradients", "distributed.timeout",
)  # fmt: skip


# By command: how it is called, and what it does.
USAGE = {
    "train": (
        "g2rpo train PRESET|FILE.yaml [--group.key value ...] [--overwrite]\n"
        "       g2rpo train --resume RUN_DIR [--group.key value ...]",
        "Fine-tune a flow model with Granular-GRPO. --overwrite replaces a run that train.output "
        "holds. --resume goes on with a run; then only these keys may be given: "
        f"{', '.join(RESUMABLE)}.",
    ),
    "embed": (
        "g2rpo embed PRESET|FILE.yaml [--group.key value ...] [--everything]",
        "Fill data.embeddings with the embeddings of the prompts that `g2rpo train` of the same "
        "arguments will use; --everything: of all in data.prompts and data.evaluation_prompts. "
        "What is there stays.",
    ),
    "plan": (
        "g2rpo plan PRESET|FILE.yaml --gpu NAME|SIZE [--gpus N[,N...]] [--per-node N] "
        "[--network GB/S]\n                  [--strategy NAME] [--price DOLLARS] [--json] "
        "[--group.key value ...]",
        "Say whether `g2rpo train` of the same arguments fits a GPU (h100-80gb, or a memory size "
        "such as 80GB), what to switch on where it does not, and how long it takes; --price, of a "
        "GPU-hour: what it costs. --gpus: of each of so many, --per-node (8) in a node, with "
        "--network (50 GB/s a GPU) between nodes; several numbers: a table of every strategy. No "
        "GPU is needed, and no weights. Exit code 0 if it fits, 1 if "
        "not.",
    ),
    "compare": (
        "g2rpo compare METHOD ... [--seeds N] [--budget EVALUATIONS] [--sweep KEY=VALUE,...] "
        "[--jobs N] [--points N] [--reward NAME] [--output DIR] [--group.key value ...]",
        "Train each method from seeds 0 to N - 1 (default 2) with an equal budget of transformer "
        "evaluations (default 60,000; the whole number of updates that comes nearest), and compare "
        "rewards, judges and variety, also where the trained reward is equal. METHOD is a preset "
        "or a YAML file, or one with keys, as 'g2rpo-digits rollout.eta=0.5'; --group.key value is "
        "of all methods. --sweep gives each method the value of a key with the highest trained "
        "reward, by runs of seeds of their own. --jobs: runs at a time, by default one a core. "
        "--points: evaluations of the policy along a run, by default 10. --reward: by which one "
        "runs are compared at equal level, by default the first that is not held out. --output: by "
        "default runs/comparison; the same command goes on with what is there, as do more seeds, "
        "further methods and a larger budget.",
    ),
    "evaluate": (
        "g2rpo evaluate RUN_DIR [--checkpoint NAME] [--ema] [--samples N] [--output DIR] "
        "[--overwrite] [--group.key value ...]\n"
        "       g2rpo evaluate IMAGES_DIR --rewards '[...]' [--base IMAGES_DIR] [--samples N] "
        "[--output DIR] [--overwrite] [--group.key value ...]",
        "Score a run's checkpoint (the newest, or --checkpoint step-000020; --ema: its moving "
        "average) beside the policy that the run began with, on the same prompts and noises; or a "
        "folder of images, beside those of the same names in --base. --samples: images of each, by "
        "default as many as an evaluation of the run has, and at least one of each prompt that is "
        "given; or all of a folder. Prompts of images are those of data.prompts, one an image in "
        "the order of names; of metadata.jsonl in their folder; or their PNG text chunk 'prompt'. "
        "--output: by default RUN_DIR/evaluation-step-000020, or evaluation-FOLDER here; "
        "--overwrite replaces an evaluation there.",
    ),
}


def make_parser(command: str = "train") -> ArgumentParser:
    """Every key of `Config` as --group.key, its docstring as help. command: one of USAGE."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from .config import Config

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage, description = USAGE[command]
    parser = ArgumentParser(
        prog=f"g2rpo {command}", allow_abbrev=False, usage=usage,
        description=f"{description} Presets: {', '.join(preset_names())}. "
        "Lists are given as '[1,2]'.",
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="One more YAML file of overrides.")
    parser.add_class_arguments(Config)
    return parser


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def find_preset(name: str) -> Path:
    """A preset's name, or the path of a YAML file -> an existing file."""
    builtin, file = PRESETS / f"{name}.yaml", Path(name)
    if builtin.is_file():
        return builtin
    if file.is_file():
        return file
    raise ConfigurationError(
        f"{name!r} is neither a preset, one of {preset_names()}, nor a YAML file"
    )


def parse_config(parser: ArgumentParser, arguments: Sequence[str]) -> Config:
    """Arguments -> Config. Unknown keys and wrong types exit with a message that names them."""
    from .config import Config

    try:
        parsed = parser.parse_args(list(arguments))
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"a file named in {list(arguments)} cannot be read; expected UTF-8 text: {error}"
        ) from error
    for f in fields(Config):
        value = parsed[f.name]
        if f.name != "rewards" and not (is_dataclass(value) or hasattr(value, "keys")):
            raise ConfigurationError(f"{f.name} is {value!r}; expected a mapping of its keys")
    values = parser.instantiate(parsed)
    return Config(**{f.name: values[f.name] for f in fields(Config)})


def resumed_config(parser: ArgumentParser, run_dir: Path, overrides: Sequence[str]) -> Config:
    """The configuration of the run in run_dir, with overrides of `RESUMABLE` keys alone."""
    file = run_dir / "config.yaml"
    if not file.is_file():
        raise ConfigurationError(
            f"--resume is {str(run_dir)!r}; expected the directory of a run "
            "(there is no config.yaml in it)"
        )
    _, after = restricted_config(
        parser, ["--config", str(file)], overrides, RESUMABLE, f"{run_dir} was started with"
    )
    after.train.output = str(run_dir)
    return after


def restricted_config(
    parser: ArgumentParser,
    base: Sequence[str],
    overrides: Sequence[str],
    allowed: Sequence[str],
    told: str,
) -> tuple[Config, Config]:
    """The configurations of the arguments `base`, and of overrides of `allowed` keys after them.

    told: 'the run was started with', for errors. Raises ConfigurationError for any other key.
    """
    before = parse_config(parser, base)
    after = parse_config(parser, [*base, *overrides])
    for key, (old, new) in differences(before, after).items():
        if key not in allowed:
            raise ConfigurationError(
                f"{key} is {new!r}, but {told} {old!r}; expected only these to change: "
                f"{', '.join(allowed)}"
            )
    return before, after


def differences(a: object, b: object, prefix: str = "") -> dict[str, tuple[object, object]]:
    """Keys in which two configurations differ, with both values."""
    found: dict[str, tuple[object, object]] = {}
    for f in fields(a):  # type: ignore[arg-type]
        x, y = getattr(a, f.name), getattr(b, f.name)
        if is_dataclass(x):
            found |= differences(x, y, f"{prefix}{f.name}.")
        elif x != y:
            found[prefix + f.name] = x, y
    return found


def take_options(
    arguments: Sequence[str], flags: Sequence[str] = (), valued: Mapping[str, str] | None = None
) -> tuple[dict[str, str | None], list[str]]:
    """Split the options that are no keys of a configuration from the arguments.

    valued: those that have a value, and what is expected of it. Returns them by name, None where
    one was not given and "yes" for a flag, and the rest.
    """
    valued = valued or {}
    options: dict[str, str | None] = dict.fromkeys((*flags, *valued))
    rest, remaining = [], iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if argument in flags:
            options[argument] = "yes"
        elif name in valued:
            value = value if equals else next(remaining, "")
            if not value:
                raise ConfigurationError(f"{name} has no value; expected {valued[name]}")
            options[name] = value
        else:
            rest.append(argument)
    return options, rest


def named_config(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Config, str]:
    """PRESET|FILE.yaml [--group.key value ...] -> the configuration and what it is called."""
    preset, overrides = None, list(arguments)
    if overrides and not overrides[0].startswith("-"):
        preset, overrides = overrides[0], overrides[1:]
    if preset is None and not {"-h", "--help"} & set(overrides):
        raise ConfigurationError(
            f"no preset given; expected one of {preset_names()} or a YAML file, before the options"
        )
    file = ["--config", str(find_preset(preset))] if preset is not None else []
    return parse_config(parser, [*file, *overrides]), Path(preset or "").stem
