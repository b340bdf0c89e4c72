"""What sharding (FSDP2, a group a block) has in memory beside a rank's part.

The weights that are gathered: of two blocks, the one that runs and the next, and what is of none
(embedders, the last norm and linear), which stays whole from the anchor to the end of the backward.
Gradients on their way to their parts: one block's, as backward leaves them and as the float32 that
is reduced. And with distributed.gather 'phase' the copy that completes.
"""

from __future__ import annotations

from ..config import Config
from .model import Linear, Sizes


def in_flight(config: Config, sizes: Sizes, itemsize: int, loose: bool) -> dict[str, int]:
    """Bytes by phase of what is gathered or on its way. loose: gradients go to their parts after
    every backward, not once a step."""
    weights, trained = _blocks(config, sizes, itemsize)
    blocks = sum(weights[:2])
    whole = itemsize * sizes.parameters + 4 * _adapters(config, sizes)
    rest = whole - sum(weights)
    gradient = 4 if config.model.lora.rank else itemsize
    each = 4 + (gradient if loose or gradient != 4 else 0)  # else backward adds to what is kept
    completing = 0 if config.distributed.gather == "phase" else blocks
    return {
        "anchor": blocks + rest,
        "completions": completing + rest,
        "rewards": rest,
        "backward": blocks + rest + each * max(trained, default=0),
    }


def completing_copy(config: Config, sizes: Sizes, itemsize: int, activations: int) -> int:
    """Bytes of the copy that completions are made with, its FP8 weights apart.

    A fused one gives the linears that make modulations back before its first forward, so that they
    are there or activations are, whichever is larger; in FP8 token linears visit a block at a time.
    """
    if config.rollout.precision == "bfloat16":
        itemsize = 2
    fp8 = config.rollout.precision == "fp8"
    copied = sizes.parameters + _adapters(config, sizes)
    doubles, singles = _weights(sizes.double_linears), _weights(sizes.single_linears)
    if fp8:
        copied -= sizes.doubles * doubles + sizes.singles * singles
    if not config.model.fuse:
        return itemsize * copied
    visiting = sizes.modulation + (max(doubles, singles) if fp8 else 0)
    return itemsize * (copied - sizes.modulation) + max(0, itemsize * visiting - activations)


def _blocks(config: Config, sizes: Sizes, itemsize: int) -> tuple[list[int], list[int]]:
    """Of every block the bytes of its weights, and the number of those that are trained; the
    largest first."""
    lora = config.model.lora
    weights: list[int] = []
    trained: list[int] = []
    for count, parameters, linears in (
        (sizes.doubles, sizes.double_parameters, sizes.double_linears),
        (sizes.singles, sizes.single_parameters, sizes.single_linears),
    ):
        adapters = sizes.adapters_of(linears, lora.rank, lora.targets) if lora.rank else 0
        weights += [itemsize * parameters + 4 * adapters] * count
        trained += [adapters if lora.rank else parameters] * count
    return sorted(weights, reverse=True), sorted(trained, reverse=True)


def _adapters(config: Config, sizes: Sizes) -> int:
    lora = config.model.lora
    return sizes.adapters(lora.rank, lora.targets) if lora.rank else 0


def _weights(linears: tuple[Linear, ...]) -> int:
    return sum(linear.inputs * linear.outputs for linear in linears)
