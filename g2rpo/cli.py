"""The command line: `g2rpo train`, `embed`, `plan`, `sample`, `evaluate`, `compare`, `doctor`."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import ConfigurationError, TrainingError

if TYPE_CHECKING:
    from .config import Config

# Top-level modules that `pip install g2rpo` alone does not bring.
TRAIN_EXTRA = (
    "accelerate", "anyio", "diffusers", "filelock", "httpx2", "huggingface_hub", "jinja2",
    "jsonargparse", "matplotlib", "numpy", "peft", "PIL", "platformdirs", "rich", "safetensors",
    "scipy", "sklearn", "threadpoolctl", "tokenizers", "transformers", "yaml",
)  # fmt: skip
USAGE = """\
usage: g2rpo COMMAND ...

commands:
  train PRESET|FILE.yaml [--group.key value ...]   fine-tune a flow model with Granular-GRPO
  train --resume RUN_DIR                           go on with a run
  embed PRESET|FILE.yaml [--group.key value ...]   embed a run's prompts ahead of it
  plan PRESET|FILE.yaml --gpu NAME|SIZE ...        whether a run fits, and how long it takes
  sample RUN_DIR|MODEL --prompt TEXT ...           draw images with a checkpoint, a LoRA or neither
  evaluate RUN_DIR|IMAGES_DIR ...                  every reward, before and after training
  compare METHOD ... --seeds N --budget N          methods at an equal budget, over several seeds
  doctor                                           what this machine has, and what is missing
  doctor --bench                                   what it does at most, and the main ops, in 20 s
  doctor --fp8 [PRESET|FILE.yaml ...]              what FP8 completions would change

`g2rpo train digits` needs nothing but itself and a few minutes.
`g2rpo COMMAND --help` documents every key."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"g2rpo {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"g2rpo: error: unknown command {name!r}; expected one of {', '.join(COMMANDS)}",
              file=sys.stderr)  # fmt: skip
        return 2
    ranks = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    if name != "train" and ranks != "1":
        if os.environ["RANK"] == "0":
            print(f"g2rpo {name}: error: started as {ranks} processes (WORLD_SIZE); expected one: "
                  "only g2rpo train shares its work among several", file=sys.stderr)  # fmt: skip
        return 2
    try:
        return COMMANDS[name](rest)
    except ModuleNotFoundError as error:
        if error.name not in TRAIN_EXTRA:
            raise
        print(f"g2rpo {name}: error: the package {error.name!r} is not installed; "
              "get it and what else the trainer needs with: pip install 'g2rpo[train]'",
              file=sys.stderr)  # fmt: skip
        return 2
    except (ConfigurationError, TrainingError) as error:
        if not getattr(error, "told", False):
            print(f"g2rpo {name}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except KeyboardInterrupt:
        print(f"g2rpo {name}: interrupted", file=sys.stderr)
        return 130


# Each imports what it needs only then: torch and diffusers take seconds.


def train(arguments: list[str]) -> int:
    # All ranks of a machine read the same: the first of them says what is wrong with it.
    told = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) != "0"
    unheard = io.StringIO()
    try:
        with redirect_stderr(unheard) if told else nullcontext():
            config, run_dir, options = _what_to_train(arguments)
    except ConfigurationError as error:
        error.told = told
        raise
    from . import run
    from .distributed import ALONE, joined

    ranks = ALONE
    try:
        with joined(config.distributed.timeout, config.model.device) as ranks:
            run_dir = ranks.from_lead(run_dir)  # its name may have the time in it
            config.train.output = str(run_dir)
            if options["--resume"] is not None:
                return run.resume(config, run_dir, ranks)
            overwrite = options["--overwrite"] is not None
            return run.start(config, run_dir, overwrite=overwrite, ranks=ranks)
    except (ConfigurationError, TrainingError) as error:
        error.told = ranks.told
        raise


def _what_to_train(arguments: list[str]) -> tuple[Config, Path, dict[str, str | None]]:
    """The validated configuration, the run's directory, --resume and --overwrite."""
    from .arguments import make_parser, named_config, resumed_config, take_options

    parser = make_parser("train")
    options, rest = take_options(
        arguments, flags=["--overwrite"], valued={"--resume": "the directory of a run"}
    )
    resumed = options["--resume"]
    if resumed is not None:
        if options["--overwrite"] or (rest and not rest[0].startswith("-")):
            raise ConfigurationError(
                "--resume goes on with a run; expected no preset and no --overwrite beside it"
            )
        run_dir = Path(resumed)
        config = resumed_config(parser, run_dir, rest)
    else:
        config, name = named_config(parser, rest)
        if config.train.output is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise ConfigurationError(
                "train.output is null, and torchrun may restart this run (--max-restarts); "
                "expected a directory, in which it finds itself again"
            )
        name = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        run_dir = Path(config.train.output or Path("runs") / name)
    config.validate()
    return config, run_dir, options


def embed(arguments: list[str]) -> int:
    from .arguments import make_parser, named_config, take_options

    options, rest = take_options(arguments, flags=["--everything"])
    config, _ = named_config(make_parser("embed"), rest)
    config.validate(training=False)
    from .flux.embed import embed

    return embed(config, everything=options["--everything"] is not None)


def plan(arguments: list[str]) -> int:
    from . import plan

    return plan.main(arguments)


def sample(arguments: list[str]) -> int:
    from .flux import sample

    return sample.main(arguments)


def evaluate(arguments: list[str]) -> int:
    from .evaluate import command

    return command.main(arguments)


def compare(arguments: list[str]) -> int:
    from .compare import command

    return command.main(arguments)


def doctor(arguments: list[str]) -> int:
    if "--fp8" in arguments:
        from . import fp8_gate

        return fp8_gate.main([argument for argument in arguments if argument != "--fp8"])
    from . import doctor

    return doctor.main(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train, "embed": embed, "plan": plan, "sample": sample,
    "evaluate": evaluate, "compare": compare, "doctor": doctor,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
