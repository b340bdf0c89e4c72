"""The parameters of an AdamW8bit: what is expected of them, of their gradients and of numbers.

A parameter may be a DTensor; sharding.py says whether this process steps its shard of it then, or
the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..gradient_factors import GradientFactors, _fold, is_dtensor
from .arithmetic import CODECS, LOW_BITS, LOW_DTYPES
from .sharding import from_dtensor, local, own_rows, place, stepped_shape

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
    first: int = 0  # element of the whole that what is stepped here begins at
    mesh: Any = None  # DeviceMesh of a DTensor
    sharded: bool = False  # a DTensor of which each process steps its shard
    gathered: bool = False  # a DTensor of which each process steps the whole
    row: int = 0  # of the whole, that the local shard begins at
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


def make_slot(param: Tensor, name: str, group: int, index: int, block_size: int) -> Slot:
    """Raises TypeError or ValueError, naming the parameter, for what cannot be stepped."""
    slot = Slot(param, name, group, index)
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"{name} has dtype {param.dtype}; expected bfloat16 or float32")
    if is_dtensor(param):
        place(slot, block_size)
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


# Gradients --------------------------------------------------------------------------------------


def gradient_of(slot: Slot) -> Tensor | GradientFactors | None:
    """What the parameter has of a gradient in this process, checked; None where there is none.

    Of a DTensor's it is the local part, which shares its memory.
    """
    param, name = slot.param, slot.name
    factors = getattr(param, "grad_factors", None)
    grad = param.grad
    if factors is not None:
        if slot.sharded or slot.gathered:
            raise TypeError(
                f"the gradient of {name} is kept as factors; expected a DTensor placed as the "
                f"parameter, {param.placements}"
            )
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
    shape: tuple[int, ...], dtype: torch.dtype, group: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of the state of a parameter (or shard) of this shape and dtype.

    Codes are in its shape. Scales are one a block: [rows, blocks] where rows are whole blocks, so
    that whoever takes rows of the codes takes the same ones of the scales; else [blocks].
    """
    shape, block_size = tuple(shape), group["block_size"]
    inner = math.prod(shape[1:])
    scales: tuple[int, ...] = (-(-math.prod(shape) // block_size),)
    if len(shape) >= 2 and inner % block_size == 0:
        scales = shape[0], inner // block_size
    layout = {
        **dict.fromkeys(CODES, (shape, torch.uint8)),
        **dict.fromkeys(SCALES, (scales, torch.float32)),
    }
    low_bits = LOW_BITS[group["master_bits"]]
    if low_bits and dtype is torch.bfloat16:
        layout["low_bits"] = (shape, LOW_DTYPES[low_bits])
    return layout


def check_state(
    name: str,
    state: Mapping[str, Any],
    shape: tuple[int, ...],
    param_dtype: torch.dtype,
    group: Mapping[str, Any],
) -> None:
    """A state of a parameter (or shard) of this shape and dtype, whatever device it is on.

    Raises ValueError naming the parameter.
    """
    if PARAM_DTYPES.get(param_dtype) != state.get("dtype", PARAM_DTYPES.get(param_dtype)):
        raise ValueError(
            f"{name} has dtype {param_dtype}; its optimizer state was made for {state['dtype']}"
        )
    layout = state_layout(shape, param_dtype, group)
    if state.keys() != {"step", "dtype", *layout}:
        raise ValueError(
            f"the state of {name} has {sorted(state)}; expected "
            f"{sorted(('step', 'dtype', *layout))}"
        )
    for key, (expected, dtype) in layout.items():
        value = state[key]
        if not isinstance(value, Tensor) or value.dtype is not dtype or value.shape != expected:
            given = (
                f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
            )
            raise ValueError(
                f"the state of {name} has {key} {given}; expected {dtype} {tuple(expected)}"
            )


def own_state(slot: Slot, given: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """What this process keeps of a state in a state dict, checked: views of what was given.

    given: tensors of the whole parameter or, of one stepped by shards, DTensors placed as it is.
        Scales may be [blocks], as older versions saved them.

    Raises ValueError naming the parameter.
    """
    whole, dtype = slot.param.shape, slot.param.dtype
    state = with_scales_of(state_layout(whole, dtype, group), given)
    check_state(slot.name, state, whole, dtype, group)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if is_dtensor(value):
            state[key] = from_dtensor(slot, key, value)
        elif slot.sharded:
            state[key] = own_rows(slot, value)
    check_state(slot.name, state, stepped_shape(slot), dtype, group)
    return state


def with_scales_of(
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], state: Mapping[str, Any]
) -> dict[str, Any]:
    """The state with scales in the layout's shape, where they are [blocks] and as many."""
    made = dict(state)
    for key in SCALES:
        value, shape = made.get(key), layout[key][0]
        if isinstance(value, Tensor) and value.ndim == 1 and value.numel() == math.prod(shape):
            made[key] = value if is_dtensor(value) else value.reshape(shape)
    return made
