"""The configuration of an evaluation: a run's own, with what may differ, or that of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import restricted_config
from ..config import Config, RewardConfig, RolloutConfig
from ..data import read_prompts
from ..errors import ConfigurationError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

# What may differ from the run's: where things are and run, what is asked for, and how it is drawn.
OF_A_RUN = (
    "model.path", "model.transformer", "model.dtype", "model.fuse", "model.attention",
    "model.device", "data.prompts", "data.evaluation_prompts", "data.column", "data.embeddings",
    "rollout.height", "rollout.width", "rollout.steps", "rollout.shift", "rollout.guidance",
    "rollout.branch_batch", "rewards",
)  # fmt: skip
# model.path: of a FLUX pipeline, whose vocabulary of CLIP a scorer may take.
OF_IMAGES = (
    "model.path", "model.device", "data.prompts", "data.column", "rollout.branch_batch", "rewards",
)  # fmt: skip
# Keys that nothing is drawn with: the run's own may not go together with other steps.
UNUSED = ("eta", "dynamics", "sde_positions", "granularities", "precision", "engine")


def run_settings(
    parser: ArgumentParser, run_dir: Path, overrides: Sequence[str]
) -> tuple[Config, Config]:
    """The configuration of a run, and of its evaluation, validated.

    --data.prompts is what is to be evaluated, whatever data.evaluation_prompts the run has.
    Raises ConfigurationError, for a key that is none of OF_A_RUN too.
    """
    base = ["--config", str(run_dir / "config.yaml")]
    told = f"{run_dir} was started with"
    run, config = restricted_config(parser, base, overrides, OF_A_RUN, told)
    if _given(overrides, "data.prompts") and not _given(overrides, "data.evaluation_prompts"):
        config.data.evaluation_prompts = None
    for name in UNUSED:
        setattr(config.rollout, name, getattr(RolloutConfig(), name))
    config.rollout.sde_positions = [0]
    _check(config)
    return run, config


def default_samples(config: Config, overrides: Sequence[str]) -> int:
    """As many images as an evaluation of the run has; of prompts that are given, each at least one.

    config: of `run_settings`.
    """
    samples, data = config.train.evaluation_samples, config.data
    for key in ("data.evaluation_prompts", "data.prompts"):
        file = data.evaluation_prompts if key == "data.evaluation_prompts" else data.prompts
        if _given(overrides, key) and file is not None:
            return max(samples, len(read_prompts(file, data.column, key)))
    return samples


def image_settings(parser: ArgumentParser, arguments: Sequence[str]) -> Config:
    """The configuration of an evaluation of a folder of images, validated."""
    told = "a folder of images is evaluated with"
    _, config = restricted_config(parser, [], arguments, OF_IMAGES, told)
    _check(config)
    return config


def _given(arguments: Sequence[str], key: str) -> bool:
    return any(argument.partition("=")[0] == f"--{key}" for argument in arguments)


def _check(config: Config) -> None:
    config.validate(training=False)
    if not config.rewards:
        raise ConfigurationError(
            """rewards is []; expected at least one, as --rewards '[{"name": "module:function"}]'"""
        )


def marks(
    rewards: Sequence[RewardConfig], run: Config | None
) -> tuple[list[bool], list[bool] | None]:
    """Of each reward, whether it is held out and whether it was trained on; see `Comparison.mark`.

    With a run it is the run that knows: a reward is trained on where that has trained on it, only
    reported where that gives it the weight 0, held out otherwise. Without, the rewards say it
    themselves, by `heldout`; where none does, nothing is known of a training (None).
    """
    if run is None:
        heldout = [reward.heldout for reward in rewards]
        trained = [reward.weight > 0 and not reward.heldout for reward in rewards]
        return heldout, trained if any(heldout) else None
    trained, heldout = [], []
    for reward in rewards:
        known = [own for own in run.rewards if own.name == reward.name]
        known = [own for own in known if own.label == reward.label] or known  # two judges, say
        known = [own for own in known if not own.heldout]
        trained.append(any(own.weight > 0 for own in known))
        heldout.append(not trained[-1] and (reward.heldout or not known))
    return heldout, trained
