"""A rank's part of a parameter, and the whole of one.

Parameters are ordinary where every rank has them whole, and DTensors where FSDP2 has cut them along
their rows. What is kept beside a parameter (a moving average, a copy) is kept of its part alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(value: Tensor) -> Tensor:
    """This rank's part, in the same memory; an ordinary tensor is itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def part_of(parameter: Tensor, whole: Tensor) -> Tensor:
    """Of an ordinary tensor as large as the whole parameter, what is in this rank's part of it."""
    if not isinstance(parameter, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    for dim, (length, first) in enumerate(zip(shape, offset)):
        whole = whole.narrow(dim, min(first, whole.shape[dim]), length)
    return whole


def as_sharded(parameter: Tensor, part: Tensor) -> Tensor:
    """A part, as the DTensor that it is a part of, on the parameter's device; collective no more
    than `part_of`."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part.to(parameter.device), parameter.device_mesh, parameter.placements, run_check=False,
        shape=parameter.shape, stride=parameter.stride(),
    )  # fmt: skip


@torch.no_grad()
def whole_values(
    parameters: Mapping[str, Tensor], parts: Mapping[str, Tensor] | None, keep: bool
) -> Iterator[tuple[str, Tensor]]:
    """The whole of each parameter, or of `parts` of them, one after the other, gathered by all
    ranks that have a part. keep: False where this rank only takes part; nothing is given then."""
    for name, parameter in parameters.items():
        value = parameter.detach() if parts is None else parts[name]
        if isinstance(parameter, DTensor):
            value = as_sharded(parameter, local(value)).full_tensor()
        if keep:
            yield name, value
