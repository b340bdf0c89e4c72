"""What of a model is trained: bytes of weights, moments and gradients, and how often they are made.

`config` is of one GPU: where several share a run, of its part of it (`gpus.share_of`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..config import Config
from .gpus import ONE, Gpus
from .model import Sizes

BLOCK = 256  # elements that share a scale of 8-bit moments


@dataclass(frozen=True)
class Trained:
    """Bytes of what is trained: weights, their further bits, moments, gradients; of a rank's part
    where it has no more."""

    weights: int  # of the whole transformer, adapters among them
    low_bits: int
    moments: int  # on the GPU
    gradients: int  # dense, at a step
    held: int  # of them before, in the backward
    factors: int  # of the own rows
    all_factors: int  # at a step, of all ranks' rows, or dense where that is less
    step: int  # what a step needs besides
    streamed: int  # in host memory
    count: int  # of parameters trained


def trained(config: Config, sizes: Sizes, gpus: Gpus = ONE) -> Trained:
    """Bytes a parameter: the weight's dtype; adamw8bit 2.03 of moments (a code each, and a float32
    scale in 256) and of a bfloat16 weight 1 or 2 of low bits; adamw 2 of that dtype; gradients of
    that dtype, dense but for the modulations' under adamw8bit, of which 16 bits of every row of
    outputs and inputs are kept.

    Replicas gather the rows of all ranks before a step, as long as they are fewer bytes than the
    gradient itself. Sharded, a rank has its part of all this,
    and factors nothing; gradients that are reduced once a step are float32 and whole until then."""
    name, lora = config.optimizer.name, config.model.lora
    itemsize = dtype_of(config).itemsize
    weights, count, item = sizes.parameters * itemsize, sizes.parameters, itemsize
    if lora.rank:  # adapters are float32
        count, item = sizes.adapters(lora.rank, lora.targets), 4
        weights += count * item
    full, sharded = not lora.rank, gpus.sharded(config)
    low_bits = factors = step = streamed = 0
    dense = count
    moments = 2 * count + 8 * -(-count // BLOCK)
    if name == "adamw":
        moments = 2 * count * item
    elif name == "adamw8bit":
        extra = {16: 0, 24: 1, 32: 2}[config.optimizer.master_bits]
        low_bits = extra * count if item == 2 else 0
        rows = factor_rows(config)
        if full and not sharded and rows * sizes.modulation_features < sizes.modulation:
            dense -= sizes.modulation
            factors = rows * sizes.modulation_features * item
            step = 4 * sizes.largest  # the largest of them, made dense in float32
    elif name == "adamw_streamed":
        moments, streamed = 0, (12 if item == 2 else 8) * count
        # Two buffers of a parameter's states, and its gradient in float32.
        step = (2 * (12 if item == 2 else 8) + 4) * sizes.largest
    parts = gpus.parts(config)
    weights, low_bits, moments, gradients, own = (
        -(-whole // parts) for whole in (weights, low_bits, moments, dense * item, count)
    )
    kept_whole = sharded and not loose_gradients(config)
    return Trained(
        weights=weights, low_bits=low_bits, moments=moments, gradients=gradients,
        held=4 * count if kept_whole else gradients,
        factors=factors, all_factors=min(gpus.count * factors, sizes.modulation * item), step=step,
        streamed=streamed, count=own,
    )  # fmt: skip


def loose_gradients(config: Config) -> bool:
    """Sharded: whether every backward's gradients go to their parts at once."""
    return config.distributed.gradients == "sharded" or backwards(config) == steps(config)


def steps(config: Config) -> int:
    """Steps of the optimizer in an update."""
    per_position = config.objective.stepping == "per_position"
    return len(config.rollout.sde_positions) if per_position else 1


def backwards(config: Config) -> int:
    """Forwards and backwards in an update, a rank's."""
    return len(config.rollout.sde_positions) * chunks(config)


def chunks(config: Config) -> int:
    """Forwards that the anchors' rows take at one step of the schedule."""
    return -(-config.train.prompts_per_update // anchor_rows(config))


def factor_rows(config: Config) -> int:
    """Rows of gradient factors at a step: one a sample that was differentiated since the last."""
    return config.train.prompts_per_update * len(config.rollout.sde_positions) // steps(config)


def dtype_of(config: Config) -> torch.dtype:
    default = "float32" if config.model.path == "digits" else "bfloat16"
    return getattr(torch, config.model.dtype or default)


def anchor_rows(config: Config) -> int:
    """Rows of an anchor's forward, and of the update's; as `Trainer` has them."""
    return min(config.rollout.branch_batch, config.train.prompts_per_update)
