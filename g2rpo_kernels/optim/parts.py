"""The parameters of an AdamW8bit: what is expected of them, of their gradients and of numbers.

A parameter may be a DTensor; what is stepped is then this process's shard of it, and `first` says
where that begins in the whole parameter, so that its random bits are those of the whole.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..gradient_factors import GradientFactors, _fold
from .arithmetic import CODECS, LOW_BITS, LOW_DTYPES

PARAM_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK_SIZES = (64, 128, 256, 512, 1024)
LEAST_EPS = 1e-37  # normal in float32
CODES, SCALES = ("exp_avg", "exp_avg_sq"), ("exp_avg_scale", "exp_avg_sq_scale")
TENSORS = (*CODES, *SCALES, "low_bits")  # the order of AdamwTensor


@dataclass(eq=False, slots=True)
class Slot:
    """One parameter's place in the optimizer."""

    param: Tensor
    name: str
    group: int
    index: int  # among all parameters: a part of its random bits' seed
    first: int = 0  # of the local shard, in the whole parameter
    mesh: Any = None  # DeviceMesh of a DTensor
    # Of the state's tensors as they were last checked, to see that they are the same, and cheaply:
    owners: tuple[Tensor | None, ...] = (None,) * 5
    pointers: tuple[int, ...] = ()
    kind: tuple[torch.dtype, int, torch.device] | None = None  # parameter's, bytes of low_bits


# Numbers ----------------------------------------------------------------------------------------


def check_group(where: str, group: Mapping[str, Any], lr_may_be_zero: bool) -> None:
    """lr, betas, eps and weight_decay of a parameter group, and what never changes in it."""
    lr = group["lr"]
    least = "a number >= 0" if lr_may_be_zero else "a number > 0"
    _check_number(f"{where}lr", lr, least, lambda x: x > 0 or (lr_may_be_zero and x == 0))
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{where}betas is {betas!r}; expected two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        _check_number(f"{where}betas[{i}]", beta, "a number in [0, 1)", lambda x: 0 <= x < 1)
    _check_number(
        f"{where}eps", group["eps"],
        f"a number >= {LEAST_EPS}: a second moment of 8 bits may be exactly 0",
        lambda x: x >= LEAST_EPS,
    )  # fmt: skip
    _check_number(f"{where}weight_decay", group["weight_decay"], "a number >= 0", lambda x: x >= 0)
    for name, allowed in (
        ("master_bits", tuple(LOW_BITS)), ("block_size", BLOCK_SIZES), ("codec", CODECS)
    ):  # fmt: skip
        value = group[name]
        if isinstance(value, bool) or value not in allowed:
            raise ValueError(f"{where}{name} is {value!r}; expected one of {allowed}")
    if type(group["seed"]) is not int:
        raise TypeError(f"{where}seed is {group['seed']!r}; expected an int")


def _check_number(name: str, value: Any, expected: str, holds: Any) -> None:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and holds(number)):
        raise ValueError(f"{name} is {value!r}; expected {expected}")


# Parameters -------------------------------------------------------------------------------------


def make_slot(param: Tensor, name: str, group: int, index: int) -> Slot:
    """Raises TypeError or ValueError, naming the parameter, for what cannot be stepped."""
    slot = Slot(param, name, group, index)
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"{name} has dtype {param.dtype}; expected bfloat16 or float32")
    if is_dtensor(param):
        slot.first, slot.mesh = _first_element(param, name), param.device_mesh
    elif param.layout is not torch.strided or is_traceable_wrapper_subclass(param):
        raise TypeError(
            f"{name} is a {type(param).__name__} of layout {param.layout}; expected an ordinary "
            "strided tensor or a DTensor"
        )
    check_contiguous(local(param), name)
    return slot


def check_contiguous(param: Tensor, name: str) -> None:
    if not param.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(param.shape)} and strides {param.stride()}; expected a "
            "contiguous parameter (.contiguous(), or memory_format=torch.contiguous_format)"
        )


def is_dtensor(x: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # who has one has imported it
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The tensor itself, or this process's part of a DTensor; call under no_grad."""
    return x.to_local() if is_dtensor(x) else x


def _first_element(param: Any, name: str) -> int:
    """Where the local shard begins in the whole parameter, flattened; a multiple of 8."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for placement in param.placements:
        whole = type(placement) is Replicate
        if not whole and not (type(placement) is Shard and placement.dim == 0):
            raise ValueError(
                f"{name} is a DTensor placed as {param.placements}; expected Shard(0) and "
                "Replicate() only, whose shards are contiguous in the whole"
            )
    _, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    inner, rows = math.prod(param.shape[1:]), param.shape[0] if param.ndim else 1
    first = offset[0] * inner if offset and param.to_local().numel() else 0
    begins = [first]
    for placement, parts in zip(param.placements, param.device_mesh.shape):
        if type(placement) is Shard and parts > 1:  # so that all processes refuse it, or none
            rows = -(-rows // parts)
            begins.append(rows * inner)
    if any(begin % 8 for begin in begins):
        raise ValueError(
            f"{name}, a DTensor of shape {tuple(param.shape)}, has shards of {rows * inner} "
            f"elements, this one from {first} on; expected multiples of 8, since eight elements "
            "share their random bits"
        )
    return first


# Gradients --------------------------------------------------------------------------------------


def gradient_of(slot: Slot) -> Tensor | GradientFactors | None:
    """What the parameter has of a gradient in this process, checked; None where there is none."""
    param, name = slot.param, slot.name
    factors = getattr(param, "grad_factors", None)
    grad = param.grad
    if factors is not None:
        if grad is None:
            return factors
        _fold(param)  # something added a dense gradient of its own
        grad = param.grad
    if grad is None:
        return None
    if grad.layout is not torch.strided:
        raise TypeError(f"the gradient of {name} has layout {grad.layout}; expected a dense one")
    if grad.dtype not in GRAD_DTYPES:
        raise TypeError(
            f"the gradient of {name} has dtype {grad.dtype}; expected float32, bfloat16 or float16"
        )
    if slot.mesh is not None:
        if not is_dtensor(grad) or grad.placements != param.placements:
            given = grad.placements if is_dtensor(grad) else type(grad).__name__
            raise TypeError(
                f"the gradient of {name} is {given}; expected a DTensor placed as the parameter, "
                f"{param.placements}"
            )
        return grad.to_local()
    return grad


def names_of_non_finite(
    slots: list[Slot], gradients: list[Tensor | GradientFactors | None]
) -> list[str]:
    """Of the parameters whose gradient holds an infinity or a NaN: one synchronisation a device.

    Where there are DTensors all processes of their meshes give the same answer: it is a collective.
    """
    tensors: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
    flags: dict[torch.device, list[tuple[list[int], Tensor]]] = {}
    for i, gradient in enumerate(gradients):
        if isinstance(gradient, GradientFactors):
            norm = gradient.squared_norm().sqrt().float()
            flags.setdefault(norm.device, []).append(([i], norm.isfinite()[None]))
        elif gradient is not None and gradient.numel():
            tensors.setdefault((gradient.device, gradient.dtype), {})[i] = gradient
    for (device, _), some in tensors.items():
        # The largest magnitude: unlike the root of the sum of squares it cannot overflow.
        largest = torch.stack(torch._foreach_norm(list(some.values()), math.inf))
        flags.setdefault(device, []).append((list(some), largest.isfinite()))
    found: list[int] = []
    for pairs in flags.values():
        places = [i for at, _ in pairs for i in at]
        finite = torch.cat([flag for _, flag in pairs]).tolist()
        found += [i for i, good in zip(places, finite) if not good]
    meshes = list(dict.fromkeys(slot.mesh for slot in slots if slot.mesh is not None))
    for mesh in meshes:
        found = _anywhere(found, len(slots), mesh)
    return [slots[i].name for i in sorted(found)]


def _anywhere(found: list[int], count: int, mesh: Any) -> list[int]:
    """What any process of the mesh has found."""
    flags = torch.zeros(count)
    flags[found] = 1
    flags = flags.to(mesh.device_type)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(
            flags, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim)
        )
    return flags.nonzero().flatten().tolist()


# States -----------------------------------------------------------------------------------------


def state_layout(
    param: Tensor, group: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a (local) parameter's state: codes in its shape, a scale a block."""
    shape, blocks = tuple(param.shape), -(-param.numel() // group["block_size"])
    layout = {
        **dict.fromkeys(CODES, (shape, torch.uint8)),
        **dict.fromkeys(SCALES, ((blocks,), torch.float32)),
    }
    low_bits = LOW_BITS[group["master_bits"]]
    if low_bits and param.dtype is torch.bfloat16:
        layout["low_bits"] = (shape, LOW_DTYPES[low_bits])
    return layout


def check_state(
    name: str, state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]
) -> None:
    """A state of this (local) parameter, whatever device it is on.

    Raises ValueError naming the parameter.
    """
    if PARAM_DTYPES.get(param.dtype) != state.get("dtype", PARAM_DTYPES.get(param.dtype)):
        raise ValueError(
            f"{name} has dtype {param.dtype}; its optimizer state was made for {state['dtype']}"
        )
    layout = state_layout(param, group)
    if state.keys() != {"step", "dtype", *layout}:
        raise ValueError(
            f"the state of {name} has {sorted(state)}; expected "
            f"{sorted(('step', 'dtype', *layout))}"
        )
    for key, (shape, dtype) in layout.items():
        value = state[key]
        if not isinstance(value, Tensor) or value.dtype is not dtype or value.shape != shape:
            given = (
                f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
            )
            raise ValueError(
                f"the state of {name} has {key} {given}; expected {dtype} {tuple(shape)}"
            )

