"""Rewards: any callable `reward(images, prompts) -> [N]`, given by its import path, and the scorers
that are published, given by name (`load`). `build.make_rewards` makes those of a configuration.

    images: [N, 3 or 1, H, W] float in [0, 1], on the device of the policy
    prompts: list of N strings
    (both are shared with the other rewards: not to be changed in place)
    returns: [N] numbers, higher is better; NaN for an image that could not be scored

A NaN makes that image's group contribute nothing, and is counted; it is never scored as 0.

A reward with weights of its own may have

    offload(): its weights go to host memory; the next call brings them back by itself. It may be
        called while they are there already.
    truncated_prompts: an integer, how many prompts it has not read to their end so far; it is shown
        beside the scores.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigurationError

RewardFunction = Callable[[Tensor, list[str]], Tensor]


@dataclass(frozen=True)
class Reward:
    """A reward function with its place in the run."""

    name: str  # short, as in the metrics' keys
    function: RewardFunction
    weight: float = 1.0  # in the advantages; 0: only reported
    heldout: bool = False  # scored at evaluations, never trained on
    offload: bool = False  # its weights are on the device while it scores, and not in between
    channels: int | None = None  # of the images it can score; None: any

    def rest(self) -> None:
        """Between two scorings: the weights to host memory, if it is to be offloaded."""
        if self.offload:
            self.function.offload()


def import_reward(path: str) -> RewardFunction:
    """"package.module:function" -> the callable. Errors name the path and what is missing."""
    module_name, colon, attribute = path.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigurationError(f"reward is {path!r}; expected 'package.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # the module is there and misses something else
        raise ConfigurationError(
            f"reward is {path!r}; expected an importable module, but there is no {error.name!r} "
            "on sys.path (for a file in this folder: PYTHONPATH=.)"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigurationError(
            f"reward is {path!r}; expected a callable {attribute!r} in {module_name}, found "
            f"{'nothing' if function is None else type(function).__name__}"
        )
    return function


def reward_name(path: str, all_paths: Sequence[str]) -> str:
    """The short name of a reward: its function's, or the whole path where two would be alike."""
    short = path.rpartition(":")[2]
    alike = sum(other.rpartition(":")[2] == short for other in all_paths)
    return short if alike == 1 else path.replace(":", ".")


def short_names(paths: Sequence[str], labels: Sequence[str | None]) -> list[str]:
    """What rewards are called in metrics: their labels, or else `reward_name` among those without.

    paths: import paths, or names of published scorers.
    """
    bare = [path for path, label in zip(paths, labels) if label is None]
    return [
        reward_name(path, bare) if label is None else label for path, label in zip(paths, labels)
    ]


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Call a reward and hold it to its contract. Returns float64 [N] on the images' device.

    Raises ConfigurationError for images of other channels than it can score.
    """
    if reward.channels not in (None, images.shape[1]):
        raise ConfigurationError(
            f"reward {reward.name!r} scores images of {reward.channels} channels; got images of "
            f"{images.shape[1]}, [N, C, H, W] = {tuple(images.shape)}"
        )
    with torch.no_grad():
        values = reward.function(images, list(prompts))
    try:
        values = torch.as_tensor(values, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"reward {reward.name!r} returned a {type(values).__name__}, no tensor ({error}); "
            f"expected shape ({len(images)},), one number an image"
        ) from error
    if values.shape != (len(images),):
        raise ValueError(
            f"reward {reward.name!r} returned shape {tuple(values.shape)}; expected "
            f"({len(images)},), one number an image"
        )
    return values.double()
