"""The command line: `g2rpo train PRESET|FILE.yaml [--group.key value ...]`, `g2rpo doctor`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import ConfigurationError, TrainingError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

    from .config import Config

# Top-level modules that `pip install g2rpo` alone does not bring.
TRAIN_EXTRA = (
    "accelerate", "diffusers", "jinja2", "jsonargparse", "matplotlib", "PIL", "platformdirs",
    "rich", "safetensors", "sklearn", "threadpoolctl", "transformers", "yaml",
)  # fmt: skip
PRESETS = Path(__file__).parent / "presets"
USAGE = """\
usage: g2rpo COMMAND ...

commands:
  train PRESET|FILE.yaml [--group.key value ...]   fine-tune a flow model with Granular-GRPO
  train --resume RUN_DIR                           go on with a run
  doctor                                           what this machine has, and what is missing

`g2rpo train digits` needs nothing but itself and a few minutes.
`g2rpo train --help` documents every key."""

# What may differ when a run goes on: everything else would make it another run.
RESUMABLE = (
    "train.updates", "train.save_every", "train.keep_last", "train.evaluate_every", "model.device",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"g2rpo {__version__}")
        return 0
    if arguments[0] not in ("train", "doctor"):
        print(f"g2rpo: error: unknown command {arguments[0]!r}; expected train or doctor",
              file=sys.stderr)  # fmt: skip
        return 2
    try:
        if arguments[0] == "doctor":
            from . import doctor

            return doctor.main(arguments[1:])
        return train(arguments[1:])
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_EXTRA:
            raise
        print(f"g2rpo train: error: the package {error.name!r} is not installed; "
              "get it and what else the trainer needs with: pip install 'g2rpo[train]'",
              file=sys.stderr)  # fmt: skip
        return 2
    except (ConfigurationError, TrainingError) as error:
        print(f"g2rpo train: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except KeyboardInterrupt:
        print(f"g2rpo {arguments[0]}: interrupted", file=sys.stderr)
        return 130


def train(arguments: list[str]) -> int:
    """The train command. Seconds of imports come after the arguments have been looked at."""
    parser = make_parser()
    preset = None
    if arguments and not arguments[0].startswith("-"):
        preset, arguments = arguments[0], arguments[1:]
    options, overrides = _take_options(arguments)
    if options["--resume"] is not None:
        if preset is not None or options["--overwrite"] is not None:
            raise ConfigurationError(
                "--resume goes on with a run; expected no preset and no --overwrite beside it"
            )
        run_dir = Path(options["--resume"])
        config = resumed_config(parser, run_dir, overrides)
    elif preset is None and not {"-h", "--help"} & set(overrides):
        raise ConfigurationError(
            f"no preset given; expected one of {preset_names()} or a YAML file, before the options"
        )
    else:
        file = ["--config", str(find_preset(preset))] if preset is not None else []
        config = parse_config(parser, [*file, *overrides])
        name = f"{Path(preset or '').stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = Path(config.train.output or Path("runs") / name)
        config.train.output = str(run_dir)
    config.validate()
    from . import run  # torch, diffusers and matplotlib: seconds

    if options["--resume"] is not None:
        return run.resume(config, run_dir)
    return run.start(config, run_dir, overwrite=options["--overwrite"] is not None)


def make_parser() -> ArgumentParser:
    """Every key of `Config` as --group.key, its docstring as help."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    from .config import Config

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="g2rpo train",
        allow_abbrev=False,
        usage="g2rpo train PRESET|FILE.yaml [--group.key value ...] [--overwrite]\n"
        "       g2rpo train --resume RUN_DIR [--group.key value ...]",
        description="Fine-tune a flow model with Granular-GRPO. "
        f"Presets: {', '.join(preset_names())}. Lists are given as '[1,2]'. "
        "--overwrite replaces a run that train.output holds. --resume goes on with a run; then "
        f"only these keys may be given: {', '.join(RESUMABLE)}.",
    )
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
    before = parse_config(parser, ["--config", str(file)])
    after = parse_config(parser, ["--config", str(file), *overrides])
    for key, (old, new) in _differences(before, after).items():
        if key not in RESUMABLE:
            raise ConfigurationError(
                f"{key} is {new!r}, but {run_dir} was started with {old!r}; expected only these to "
                f"change: {', '.join(RESUMABLE)}"
            )
    after.train.output = str(run_dir)
    return after


def _differences(a: object, b: object, prefix: str = "") -> dict[str, tuple[object, object]]:
    found: dict[str, tuple[object, object]] = {}
    for f in fields(a):  # type: ignore[arg-type]
        x, y = getattr(a, f.name), getattr(b, f.name)
        if is_dataclass(x):
            found |= _differences(x, y, f"{prefix}{f.name}.")
        elif x != y:
            found[prefix + f.name] = x, y
    return found


def _take_options(arguments: list[str]) -> tuple[dict[str, str | None], list[str]]:
    """Split --resume RUN_DIR and --overwrite, which are not keys of the run, from the overrides."""
    options: dict[str, str | None] = {"--resume": None, "--overwrite": None}
    rest, remaining = [], iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if argument == "--overwrite":
            options["--overwrite"] = "yes"
        elif name == "--resume":
            value = value if equals else next(remaining, "")
            if not value:
                raise ConfigurationError("--resume has no value; expected the directory of a run")
            options["--resume"] = value
        else:
            rest.append(argument)
    return options, rest


if __name__ == "__main__":
    sys.exit(main())
