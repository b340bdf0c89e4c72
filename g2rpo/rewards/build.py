"""From the configuration's `rewards` to callables on the device of the policy.

Whatever costs little is checked for all of them before the first weights are read: import paths,
arguments, and whether all files are there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError
from ..models import choose_device
from . import Reward, RewardFunction, import_reward, short_names
from .arguments import check_names, check_types
from .load import OTHERS, PUBLISHED, folder_of, has_vocabulary_at, load, missing, place_of

if TYPE_CHECKING:
    from ..config import Config, RewardConfig

CHANNELS = 3  # of the images that published scorers look at


def make_rewards(config: Config, on_message: Callable[[str], None] = print) -> list[Reward]:
    """All rewards of a validated configuration, in their order, on model.device.

    A function is taken as it is. A class is called once, as `Class(device=..., **options)`, with
    `path=...` where a path is given and with `dtype=torch.bfloat16` where dtype is that; device is
    a torch.device. Published scorers are loaded by `load`; those that find no vocabulary of CLIP
    beside their weights take that of the FLUX pipeline which is trained.

    on_message: told what is loaded, and what a judge has to say.

    Raises ConfigurationError naming the reward; for missing files a single one, with the commands
    that download those of all rewards. Errors of a class of yours are left as they are.
    """
    device = choose_device(config.model.device)
    names = short_names([r.name for r in config.rewards], [r.label for r in config.rewards])
    checked = [
        _check(reward, name, device, on_message)
        for reward, name in zip(config.rewards, names, strict=True)
    ]
    _expect_files(checked, from_pipeline=config.model.path != "digits")
    # Once for all, and only where it is needed: a pipeline of the hub is fetched for it.
    borrowed = [source for source in checked if source.needs_vocabulary]
    vocabulary = _vocabulary_of(config.model.path) if borrowed else None
    rewards = []
    for source in checked:
        options = {"tokenizer": vocabulary} if source.needs_vocabulary else {}
        given = source.reward
        reward = Reward(
            source.name, source.make(**options), given.weight, given.heldout, given.offload,
            None if source.imported else CHANNELS,
        )  # fmt: skip
        reward.rest()  # before the next takes room, and the model after them
        rewards.append(reward)
    return rewards


@dataclass(frozen=True)
class _Checked:
    """A reward whose arguments are good. make() reads its weights, if it has any."""

    reward: RewardConfig
    name: str  # short
    make: Callable[..., RewardFunction]
    imported: bool

    @property
    def needs_vocabulary(self) -> bool:
        """Whether CLIP's has to come from elsewhere than from beside its weights."""
        published, reward = PUBLISHED.get(self.reward.name), self.reward
        if self.imported or published is None or not published.tokenizer:
            return False
        if reward.options.get("tokenizer") is not None:
            return False
        return not has_vocabulary_at(folder_of(place_of(reward.name, reward.path)))


def _check(
    reward: RewardConfig, name: str, device: torch.device, on_message: Callable[[str], None]
) -> _Checked:
    if ":" in reward.name:
        return _Checked(reward, name, _imported(reward, name, device), imported=True)
    if reward.name == "judge":
        return _Checked(reward, name, _judge(reward, name, on_message), imported=False)
    return _Checked(reward, name, _published(reward, name, device, on_message), imported=False)


def _imported(
    reward: RewardConfig, name: str, device: torch.device
) -> Callable[[], RewardFunction]:
    found = import_reward(reward.name)
    where = f"reward {name!r}"
    if reward.offload and not callable(getattr(found, "offload", None)):
        raise ConfigurationError(
            f"{where}: offload is True; expected False, for {reward.name} has no method offload()"
        )
    dtype = {"dtype": getattr(torch, reward.dtype)} if reward.dtype != "float32" else {}
    path = {"path": reward.path} if reward.path is not None else {}
    if isinstance(found, type):
        if not any("__call__" in vars(base) for base in found.__mro__):
            raise ConfigurationError(
                f"{where}: {reward.name} is a class whose instances cannot be called; expected "
                "one with __call__(self, images, prompts) -> [N]"
            )
        given: dict[str, Any] = {"device": device, **path, **dtype}
        check_names(where, reward.name, found, given, reward.options)
        return partial(found, **given, **reward.options)
    for key, value, default in (
        ("path", reward.path, None),
        ("dtype", reward.dtype, "float32"),
        ("options", list(reward.options), []),  # no values: some may be secret
    ):
        if value != default:
            raise ConfigurationError(
                f"{where}: {key} is {value!r}; expected {default or 'none'}, for {reward.name} is "
                "a function, or made already: only a class or a published scorer takes arguments"
            )
    return lambda: found


def _published(
    reward: RewardConfig, name: str, device: torch.device, on_message: Callable[[str], None]
) -> Callable[..., RewardFunction]:
    where, options = f"reward {name!r}", dict(reward.options)
    published = PUBLISHED.get(reward.name)
    loader = import_reward(OTHERS[reward.name] if published is None else published.loader)
    given = {"path": "", "device": device, "dtype": torch.float32}
    if published is not None:
        given |= {"mend": "", **published.options}
    check_names(where, reward.name, loader, given, options)
    check_types(where, loader, options)
    if options.get("batch_size", 1) < 1:
        raise ConfigurationError(
            f"{where}: options.batch_size is {options['batch_size']}; expected at least 1"
        )
    if options.get("tokenizer") is not None:
        options["tokenizer"] = Path(options["tokenizer"]).expanduser()
    place = place_of(reward.name, reward.path)

    def make(**more: Any) -> RewardFunction:
        on_message(f"Loading {reward.name} of {place}")
        dtype = getattr(torch, reward.dtype)
        return load(reward.name, place, device, dtype, **{**options, **more})

    return make


def _judge(
    reward: RewardConfig, name: str, on_message: Callable[[str], None]
) -> Callable[[], RewardFunction]:
    where, options = f"reward {name!r}", dict(reward.options)
    if reward.path is None:
        raise ConfigurationError(
            f"{where}: path is None; expected the judge's endpoint, as http://host:8000/v1"
        )
    for key, value, default in (
        ("dtype", reward.dtype, "float32"), ("offload", reward.offload, False),
    ):  # fmt: skip
        if value != default:
            raise ConfigurationError(
                f"{where}: {key} is {value!r}; expected {default!r}, for a judge has no weights "
                "here"
            )
    judge = import_reward(OTHERS["judge"])
    check_names(where, "judge", judge, {"endpoint": "", "on_message": print}, options)
    if isinstance(options.get("parse"), str):
        options["parse"] = import_reward(options["parse"])
    check_types(where, judge.__init__, options)
    variable = options.get("api_key_env")
    if variable is not None and not os.environ.get(variable, "").strip():
        raise ConfigurationError(
            f"{where}: options.api_key_env is {variable!r}, a variable that is not set; expected "
            "the API key in it"
        )
    made = load("judge", reward.path, on_message=on_message, **options)
    return lambda: made


def _expect_files(checked: list[_Checked], from_pipeline: bool) -> None:
    """Raise ConfigurationError with the commands that get all that is missing."""
    lacking: dict[str, list[str]] = {}
    for source in checked:
        if not source.imported:
            reward = source.reward
            tokenizer = reward.options.get("tokenizer")
            vocabulary = tokenizer is not None or not from_pipeline
            if commands := missing(reward.name, reward.path, tokenizer, vocabulary):
                lacking[source.name] = commands
    if lacking:
        lines = dict.fromkeys(line for commands in lacking.values() for line in commands)
        raise ConfigurationError(
            f"files of the rewards {', '.join(lacking)} are missing; these commands get them (or "
            "name the folder that has them as `path` of the reward):\n  " + "\n  ".join(lines)
        )


def _vocabulary_of(pipeline: str) -> Path:
    """CLIP's, in the folder of a FLUX pipeline or on the hub. Raises ConfigurationError."""
    from ..flux.files import component, resolve_folder

    folder = resolve_folder(pipeline, transformer_weights=False, text_encoder_weights=False)
    found = component(folder, "tokenizer")
    if not has_vocabulary_at(found):
        raise ConfigurationError(
            f"{found} has no vocabulary of CLIP, which rewards of weights without one would take; "
            "expected vocab.json and merges.txt, as in FLUX.1-dev's"
        )
    return found
