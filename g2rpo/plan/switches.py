"""What would make room: single changes of a configuration, planned anew, and several together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..optimizers import SHARDS
from .cards import Card
from .gpus import Gpus
from .memory import Memory, plan_memory
from .model import Sizes
from .rewards import PARAMETERS, scorers_of
from .states import dtype_of


@dataclass(frozen=True)
class Switch:
    """A change of the configuration, and the peak it would give, in bytes."""

    change: str
    peak: int
    fits: bool


def decided(config: Config, sizes: Sizes, card: Card, gpus: Gpus) -> tuple[Config, Memory]:
    """The configuration with distributed.gather decided where it is 'auto', and its memory: once a
    rollout if that fits, or if the copy has a precision or engine that completions need."""
    rollout = config.rollout
    if not gpus.sharded(config) or config.distributed.gather != "auto":
        return config, plan_memory(config, sizes, card.multiprocessors, gpus)
    needed = rollout.precision is not None or rollout.engine not in ("auto", "eager")
    config = copy.deepcopy(config)
    for gather in ("phase",) if needed else ("phase", "forward"):
        config.distributed.gather = gather
        memory = plan_memory(config, sizes, card.multiprocessors, gpus)
        if memory.peak <= card.usable:
            break
    return config, memory


def _set(group: str, key: str, value: Any) -> Callable[[Config], None]:
    return lambda config: setattr(getattr(config, group), key, value)


def _bfloat16(optimizer: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.model.dtype, config.optimizer.name = "bfloat16", optimizer

    return change


def _lora(config: Config) -> None:
    config.model.lora.rank = 64


def _rest(config: Config) -> None:
    for reward in config.rewards:
        reward.offload |= reward.name in PARAMETERS and reward.name != "judge"


def _changes(config: Config, gpus: Gpus) -> list[tuple[str, Callable[[Config], None]]]:
    """What could be changed of this configuration, as one types it, the mildest first."""
    model, rollout, optimizer = config.model, config.rollout, config.optimizer
    sharded = gpus.sharded(config)
    full = not model.lora.rank
    found: list[tuple[str, Callable[[Config], None]]] = []
    if gpus.count > 1 and not sharded and optimizer.name in SHARDS:
        change = _set("distributed", "strategy", "shard")
        found.append(("--distributed.strategy shard", change))
    if sharded and config.distributed.gradients == "whole":
        change = _set("distributed", "gradients", "sharded")
        found.append(("--distributed.gradients sharded", change))
    if optimizer.name == "adamw8bit" and not optimizer.offload:
        found.append(("--optimizer.offload true", _set("optimizer", "offload", True)))
    if scorers_of(config).staying:
        found.append(("--rewards with offload: true", _rest))
    if not model.gradient_checkpointing:
        found.append(
            ("--model.gradient_checkpointing true", _set("model", "gradient_checkpointing", True))
        )
    if model.path != "digits" and config.data.embeddings is None:
        found.append(
            ("--data.embeddings FOLDER (g2rpo embed)", _set("data", "embeddings", "FOLDER"))
        )
    if not model.fuse:
        found.append(("--model.fuse true", _set("model", "fuse", True)))
    if rollout.precision == "fp8":
        found.append(("--rollout.precision null", _set("rollout", "precision", None)))
    batch = rollout.branch_batch
    for rows in dict.fromkeys((batch // 2, batch // 4, 1)):
        if 1 <= rows < batch:
            found.append((f"--rollout.branch_batch {rows}", _set("rollout", "branch_batch", rows)))
    if full and dtype_of(config).itemsize == 4:  # bfloat16 alone would lose small steps
        for name in ("adamw8bit",) if sharded else ("adamw8bit", "adamw_streamed"):
            change = f"--model.dtype bfloat16 --optimizer.name {name}"
            found.append((change, _bfloat16(name)))
    elif full and optimizer.name != "adamw8bit":
        found.append(("--optimizer.name adamw8bit", _set("optimizer", "name", "adamw8bit")))
    if full:
        found.append(("--model.lora.rank 64", _lora))
    return found


def switches_of(config: Config, sizes: Sizes, card: Card, gpus: Gpus) -> tuple[Switch, ...]:
    """Each change that lowers the peak, planned anew with it; and those that do it together."""

    def peak(changed: Config) -> int:
        return decided(changed, sizes, card, gpus)[1].peak

    def after(change: Callable[[Config], None], start: Config) -> Config:
        changed = copy.deepcopy(start)
        change(changed)
        return changed

    now = peak(config)
    each = [(name, peak(after(change, config))) for name, change in _changes(config, gpus)]
    switches = [Switch(name, p, p <= card.usable) for name, p in each if p < now]
    if any(switch.fits and "lora" not in switch.change for switch in switches):
        return tuple(switches)
    # None alone: the one that helps most, and so on from there.
    names: list[str] = []
    while now > card.usable:
        options = [(peak(after(change, config)), name, after(change, config))
                   for name, change in _changes(config, gpus) if "lora" not in name]  # fmt: skip
        if not options or min(options, key=lambda o: o[0])[0] >= now:
            break
        now, name, config = min(options, key=lambda o: o[0])
        key = name.partition(" ")[0]
        names = [*(n for n in names if n.partition(" ")[0] != key), name]
    if len(names) > 1:
        switches.append(Switch(" ".join(names), now, now <= card.usable))
    return tuple(switches)
