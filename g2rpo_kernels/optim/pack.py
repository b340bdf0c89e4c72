"""Parameters that one call of a backend steps together, and the table it reads them from.

Native backends take addresses: a row of ten words a parameter, AdamwTensor of csrc/ops.h. Gradients
lie elsewhere at every step, so the table is made anew each time; what a state contributes to it is
kept for as long as it is made of the same tensors.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import native
from .arithmetic import MASK64, Constants, _splitmix64, constants, step_reference
from .parts import TENSORS, Slot, check_contiguous, check_state


@dataclass(eq=False, slots=True)
class Pack:
    """Parameters of one group, step, device and set of dtypes."""

    group: Mapping[str, Any]
    step: int
    grad_dtype: torch.dtype
    kind: tuple[torch.dtype, int, torch.device]  # parameter's dtype, bytes of low_bits, device
    members: list[tuple[Slot, Tensor, Tensor, Mapping[str, Any]]] = field(default_factory=list)

    def table(self) -> Tensor:
        """int64 [T, 10], on the host: the words of AdamwTensor."""
        words = array("q")
        extend = words.extend
        for slot, param, grad, _ in self.members:
            rest = *slot.pointers, param.numel(), slot.first, 0
            extend((param.data_ptr(), grad.data_ptr(), *rest))
        table = torch.frombuffer(words, dtype=torch.int64).view(-1, native.WORDS)
        indices = torch.tensor([slot.index for slot, _, _, _ in self.members])
        table[:, -1] = seed_words(self.group["seed"], self.step, indices)
        return table


def point(slot: Slot, state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> None:
    """Have the slot's addresses be those of the state's tensors, checked where they changed.

    A backend writes where these point: they must be what the parameter needs, on its device.
    """
    check_contiguous(param, slot.name)
    check_state(slot.name, state, param.shape, param.dtype, group)
    owners = tuple(map(state.get, TENSORS))
    for key, tensor in zip(TENSORS, owners):
        if tensor is None:
            continue
        if tensor.device != param.device or not tensor.is_contiguous():
            raise ValueError(
                f"the state of {slot.name} has {key} on {tensor.device}, strides "
                f"{tensor.stride()}; expected it contiguous on {param.device}, as the parameter"
            )
    slot.owners = owners
    slot.pointers = tuple(0 if tensor is None else tensor.data_ptr() for tensor in owners)
    low_bits = owners[-1]
    low_bytes = 0 if low_bits is None else low_bits.element_size()
    slot.kind = param.dtype, low_bytes, param.device


def is_pointed(slot: Slot, state: Mapping[str, Any], param: Tensor) -> bool:
    """Whether nothing has changed since `point`. Of every parameter at every step."""
    a, b, c, d, e = slot.owners
    get = state.get
    return (
        a is not None and get("exp_avg") is a and get("exp_avg_sq") is b
        and get("exp_avg_scale") is c and get("exp_avg_sq_scale") is d and get("low_bits") is e
        and param.dtype is slot.kind[0] and param.is_contiguous()
    )  # fmt: skip


def run(pack: Pack, grad_scale: float, zero_grad: bool) -> None:
    """Step the members, in place; leave zeros in their gradients if asked."""
    group = pack.group
    k = constants(
        float(group["lr"]), tuple(map(float, group["betas"])), float(group["eps"]),
        float(group["weight_decay"]), pack.step, grad_scale,
    )  # fmt: skip
    param_dtype, low_bytes, device = pack.kind
    backend = native.backend_for(device)
    if backend == "reference":
        return _run_reference(pack, k, zero_grad)
    native.step(
        backend, pack.table(), k, device, param_dtype, pack.grad_dtype, low_bytes,
        group["block_size"], group["codec"], zero_grad,
    )  # fmt: skip
    # Written by address: what keeps a parameter's version (autograd, copies of weights) is told.
    written = [slot.param for slot, _, _, _ in pack.members]
    if zero_grad:
        written += [grad for _, _, grad, _ in pack.members]
    torch.autograd.graph.increment_version(written)


def _run_reference(pack: Pack, k: Constants, zero_grad: bool) -> None:
    seeds = pack.table()[:, -1].tolist()
    for (slot, param, grad, state), seed in zip(pack.members, seeds):
        low_bits = state.get("low_bits")
        step_reference(
            param.view(-1), grad.view(-1), state["exp_avg"].view(-1),
            state["exp_avg_sq"].view(-1), state["exp_avg_scale"].view(-1),
            state["exp_avg_sq_scale"].view(-1),
            None if low_bits is None else low_bits.view(-1),
            k, pack.group["block_size"], pack.group["codec"], seed & MASK64, slot.first,
        )  # fmt: skip
        if zero_grad:
            grad.zero_()


def seed_words(seed: int, step: int, indices: Tensor) -> Tensor:
    """`arithmetic.seed_word` of many parameters: int64 of the same 64 bits each."""
    state = 0
    for part in (seed, step):
        state = _splitmix64((state ^ (part & MASK64)) & MASK64)
    x = (indices ^ _signed(state)) + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
