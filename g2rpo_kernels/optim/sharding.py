"""Parameters that are DTensors: how one is stepped, and what of its state is whose.

The bits are those of one process, however many share a parameter. A scale is of a block of elements
that follow one another, so a parameter is stepped shard by shard where no shard begins within a
block: where rows are made of whole blocks, or where all shards are equal and made of whole blocks.
Any other (a bias, a norm, a small matrix) is gathered, every process keeps the whole of its state
and makes the whole step, and copies its own rows of what came out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gradient_factors import is_dtensor

if TYPE_CHECKING:
    from .parts import Slot


def local(x: Tensor) -> Tensor:
    """The tensor itself, or this process's part of a DTensor; call under no_grad."""
    return x.to_local() if is_dtensor(x) else x


def place(slot: Slot, block_size: int) -> None:
    """Settle how the slot's DTensor is stepped: shards, the whole gathered, or what is here.

    Raises ValueError, naming the parameter, for placements whose shards are not contiguous.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    param: Any = slot.param
    parts, divided = 1, False
    for placement, size in zip(param.placements, param.device_mesh.shape, strict=True):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard or placement.dim != 0:
            raise ValueError(
                f"{slot.name} is a DTensor placed as {param.placements}; expected Shard(0) and "
                "Replicate() only, whose shards are contiguous in the whole"
            )
        parts, divided = parts * size, True
    inner, rows = math.prod(param.shape[1:]), param.shape[0] if param.ndim else 1
    aligned = inner % block_size == 0 or (
        rows % parts == 0 and rows // parts * inner % block_size == 0
    )
    _, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    slot.mesh = param.device_mesh
    slot.sharded, slot.gathered = divided and aligned, parts > 1 and not aligned
    slot.row = offset[0] if offset and param.to_local().numel() else 0
    slot.first = slot.row * inner if slot.sharded else 0


def stepped_shape(slot: Slot) -> torch.Size:
    """Shape of what this process steps: the parameter, or its shard of it."""
    return slot.param.shape if slot.gathered else local(slot.param).shape


def own_rows(slot: Slot, value: Tensor) -> Tensor:
    """This process's part of a tensor of the whole parameter, or of its scales: a view."""
    rows, mine = slot.param.shape[0], local(slot.param).shape[0]
    if not rows:
        return value
    # Scales may be several a row, or one of several rows; then the shards are equal.
    begin, count = (n * value.shape[0] // rows for n in (slot.row, mine))
    return value.narrow(0, begin, count)


def as_dtensor(slot: Slot, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a sharded parameter's state, of the whole `shape`, placed as the parameter.

    It shares memory with `value`, unless that is offloaded: a mesh of GPUs holds no host memory.
    """
    from torch.distributed.tensor import DTensor

    param: Any = slot.param
    return DTensor.from_local(
        value.to(local(param).device), slot.mesh, param.placements, run_check=False,
        shape=torch.Size(shape), stride=torch.empty(shape, device="meta").stride(),
    )  # fmt: skip


def from_dtensor(slot: Slot, key: str, value: Any) -> Tensor:
    """This process's part of a DTensor in a state dict. Raises ValueError, naming the parameter."""
    param: Any = slot.param
    if not slot.sharded:
        raise ValueError(
            f"the state of {slot.name} has {key} as a DTensor; expected an ordinary tensor of the "
            "whole parameter, which here is not stepped by shards"
        )
    if value.device_mesh != slot.mesh or value.placements != param.placements:
        raise ValueError(
            f"the state of {slot.name} has {key} placed as {value.placements} on "
            f"{value.device_mesh}; expected {param.placements} on {slot.mesh}, as the parameter"
        )
    return value.to_local()
