"""The optimizer a configuration names, and what of the transformer it wants set up.

    adamw           torch's fused AdamW on the parameters as they are; its master is the parameter,
                    so that tiny steps want model.dtype float32
    adamw8bit       gk.AdamW8bit: bfloat16 parameters, extra bits of a master, moments of 8 bits
    adamw_streamed  float32 master and moments in host memory; see streamed_adamw.py
    bitsandbytes, torchao    their AdamW8bit, where they are installed
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

import g2rpo_kernels as gk

from .config import OptimizerConfig
from .errors import ConfigurationError
from .seeds import hash_seed
from .streamed_adamw import StreamedAdamW

SHARDS = ("adamw", "adamw8bit")  # those that step parts of parameters


def make_optimizer(
    config: OptimizerConfig,
    parameters: Mapping[str, nn.Parameter],
    seed: int,
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer `config.name` names, of these parameters by name.

    seed: of its rounding, where that is stochastic (adamw8bit, torchao). sharded: whether they are
    DTensors of FSDP2.

    Raises ConfigurationError where a package is missing or the parameters are of a dtype or a
    layout it cannot train.
    """
    if sharded and config.name not in SHARDS:
        raise ConfigurationError(
            f"optimizer.name is {config.name!r} with sharded weights; expected "
            f"{' or '.join(map(repr, SHARDS))}, or distributed.strategy 'replicate'"
        )
    given: dict[str, Any] = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    values = list(parameters.values())
    if config.name == "adamw":
        return torch.optim.AdamW(values, **given, fused=True)
    for name, parameter in parameters.items():
        if parameter.dtype not in (torch.bfloat16, torch.float32):
            raise ConfigurationError(
                f"optimizer.name is {config.name!r} and {name} {parameter.dtype}; expected "
                "bfloat16 or float32 parameters (model.dtype), or optimizer.name 'adamw'"
            )
    if config.name == "adamw8bit":
        try:
            return gk.AdamW8bit(
                list(parameters.items()), **given, master_bits=config.master_bits,
                codec=config.codec, seed=seed,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigurationError(f"optimizer.name is 'adamw8bit', and {error}") from error
    if config.name == "adamw_streamed":
        return StreamedAdamW(values, **given)
    if config.name == "bitsandbytes":
        return _package("bitsandbytes", "bitsandbytes.optim", "bnb").AdamW8bit(values, **given)
    if config.name == "torchao":
        return _seeded(_package("torchao", "torchao.optim", "torchao").AdamW8bit)(
            values, **given, bf16_stochastic_round=True, seed=seed
        )
    raise ConfigurationError(
        f"optimizer.name is {config.name!r}; expected 'adamw', 'adamw8bit', 'adamw_streamed', "
        "'bitsandbytes' or 'torchao'"
    )


def rounds_to_nearest(name: str) -> bool:
    """Whether it forgets what of a step a bfloat16 parameter cannot hold."""
    return name in ("adamw", "bitsandbytes")


def modulation_linears(transformer: nn.Module) -> list[nn.Module]:
    """Of a FLUX transformer, fused or not: the linears that make shifts, scales and gates of one
    vector an image."""
    norms = [
        *(n for b in transformer.transformer_blocks for n in (b.norm1, b.norm1_context)),
        *(b.norm for b in transformer.single_transformer_blocks),
        transformer.norm_out,
    ]
    return [norm.linear for norm in norms]


def _package(name: str, module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"optimizer.name is {name!r}, which cannot be imported ({error}); expected "
            f"pip install 'g2rpo[{extra}]', or optimizer.name 'adamw8bit'"
        ) from error


def _seeded(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """torchao's, whose rounding draws from torch's global generator, from a seed of its own.

    What it draws then depends on the seed and the number of the step alone, so that a resumed run
    goes on as if it had not ended; the global generator is as before.
    """

    class SeededAdamW8bit(base):
        def __init__(self, params: Any, *, seed: int, **given: Any) -> None:
            super().__init__(params, **given)
            self.seed = seed

        def step(self, closure: Any = None) -> Any:
            number = max((int(state["step"]) for state in self.state.values()), default=0)
            devices = {p.device for group in self.param_groups for p in group["params"]}
            with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
                torch.manual_seed(int(hash_seed(self.seed, number)))
                return super().step(closure)

    return SeededAdamW8bit
