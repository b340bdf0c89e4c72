"""AdamW8bit: AdamW on moments of 8 bits, and bfloat16 weights that lose no small step.

    opt = gk.AdamW8bit(model.parameters(), lr=2e-6)
    loss.backward()
    opt.step(grad_scale=min(1.0, 1.0 / float(gk.total_grad_norm(model.parameters()))))

A bfloat16 weight of .02 has its neighbours 1e-4 away; lr 2e-6 moves it by 2e-6, and rounding to
nearest moves it back, for ever. So the optimizer keeps what a bfloat16 lacks of a longer master:

    master_bits   kept beside a weight    a step is rounded
    16            nothing                 stochastically, to bfloat16: unbiased, noisy
    24            8 bits                  stochastically, to 24 bits
    32            16 bits                 not at all: the master is a float32

Moments: codes of 8 bits with a float32 scale a block of 256 (Dettmers et al. 2022, arXiv
2110.02861), with no floor under the scale: gradients of 1e-7 are as good as those of 1. In all 5.03
bytes a parameter at 24 bits, with the weight. csrc/adamw8bit.h has the arithmetic; its bits are the
same on every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..gradient_factors import GradientFactors
from .bitsandbytes import from_bitsandbytes, to_bitsandbytes
from .pack import Pack, is_pointed, point, run
from .parts import Slot, check_group, gradient_of, names_of_non_finite
from .sharding import local, own_rows
from .states import OptimizerStates

__all__ = ["AdamW8bit", "from_bitsandbytes", "to_bitsandbytes"]


class AdamW8bit(OptimizerStates):
    """AdamW (Loshchilov & Hutter 2019) with 8-bit moments; see the top of the file.

    params: as any torch optimizer's; (name, tensor) pairs let messages name parameters. Contiguous
        bfloat16 or float32 tensors, or DTensors of them placed as Shard(0) and Replicate().
    lr > 0 (a scheduler may make it 0: then moments move and weights do not), betas in [0, 1),
    eps > 0, weight_decay >= 0, decoupled: as torch.optim.AdamW's, and like them a group's own.
    master_bits: 16, 24 or 32, of bfloat16 parameters; a float32 one is its own master.
    block_size: elements of one scale, a power of two from 64 to 1024.
    codec: "dynamic", bitsandbytes' code, or "fp8", e4m3.
    seed: of the stochastic rounding, an int. A parameter's random bits depend on it, the number of
        the step and the parameter's place in the optimizer alone; not on how it is sharded.

    State of a parameter of B blocks: `step`, int; `exp_avg` and `exp_avg_sq`, uint8 codes in its
    shape; `exp_avg_scale`, `exp_avg_sq_scale`, float32 [rows, blocks of a row] where it has two
    dimensions or more and rows of whole blocks, else [B]; `low_bits`, int8 or int16 in its shape;
    `dtype`, the parameter's, a str.

    DTensors are stepped to the same bits on any number of processes, values and states. Where rows
    are of whole blocks, or shards are equal and of whole blocks, `state` is of the local shard.
    Others (biases, norms, small matrices) are gathered at every step, which is a collective of
    their mesh, and `state` is of the whole on every process. `state_dict()` and `load_state_dict()`
    speak of whole parameters, and so of no number of processes.

    Raises TypeError and ValueError that name what is wrong.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        master_bits: int = 24,
        block_size: int = 256,
        codec: str = "dynamic",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "master_bits": master_bits, "block_size": block_size, "codec": codec, "seed": seed,
        }  # fmt: skip
        check_group("", defaults, lr_may_be_zero=False)
        self._set_up()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            check_group(f"group {len(self.param_groups) - 1}: ", group, lr_may_be_zero=False)
            if len(set(group["params"])) != len(group["params"]):
                raise ValueError("a parameter is given twice; expected each of them once")
            self._make_slots()
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | Tensor | None = None,
        zero_grad: bool = False,
    ) -> Any:
        """Step every parameter that has a gradient, `.grad` or `.grad_factors`.

        A DTensor has a gradient on all processes of its mesh or on none: the step is a collective.

        grad_scale: what gradients are multiplied by on the way, without a pass of its own: of
            clipping, or a loss scale's inverse. The caller vouches for the gradients that it was
            made of: where it is not finite the step is skipped. None: 1, and the gradients are
            checked, in one pass and one synchronisation.
        zero_grad: leave zeros in the gradients, in the same pass, and no factors.

        A step with gradients that are not finite is skipped: nothing moves, step numbers neither,
        `skipped_steps` counts it and `last_non_finite` names the parameters.

        Returns what closure, called first, returned. Raises RuntimeError while offloaded.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._offloaded:
            raise RuntimeError("the states are in host memory; expected restore() before step()")
        for i, group in enumerate(self.param_groups):
            check_group(f"group {i}: ", group, lr_may_be_zero=True)
        scale = 1.0 if grad_scale is None else _scale_of(grad_scale)
        slots = self._current_slots()
        gradients = [gradient_of(slot) for slot in slots]
        bad = None
        if grad_scale is None:
            bad = names_of_non_finite(slots, gradients)
        elif not math.isfinite(scale):
            bad = names_of_non_finite(slots, gradients) or ["grad_scale"]
        if bad:
            self.skipped_steps += 1
            self.last_non_finite = bad
        else:
            self._step(slots, gradients, scale, zero_grad)
        if zero_grad:
            self._clear(slots, gradients, everything=bool(bad))
        return loss

    def _step(
        self,
        slots: list[Slot],
        gradients: list[Tensor | GradientFactors | None],
        scale: float,
        zero_grad: bool,
    ) -> None:
        packs: dict[tuple, Pack] = {}
        ready = self._ready(slots, gradients)  # everything is checked before anything moves
        for slot, param, grad, state in ready:
            step = state["step"] = state["step"] + 1
            if not param.numel():
                continue
            group = self.param_groups[slot.group]
            if isinstance(grad, GradientFactors):  # one at a time: they are what does not fit whole
                pack = Pack(group, step, torch.float32, slot.kind)
                pack.members.append((slot, param, grad.dense(torch.float32), state))
                run(pack, scale, False)
                continue
            key = slot.group, step, grad.dtype, slot.kind
            pack = packs.get(key)
            if pack is None:
                pack = packs[key] = Pack(group, step, grad.dtype, slot.kind)
            pack.members.append((slot, param, grad.contiguous(), state))
        for pack in packs.values():
            run(pack, scale, zero_grad)
        for slot, param, _, _ in ready:
            if slot.gathered:
                local(slot.param).copy_(own_rows(slot, param))

    def _ready(
        self, slots: list[Slot], gradients: list[Tensor | GradientFactors | None]
    ) -> list[tuple[Slot, Tensor, Tensor | GradientFactors, dict[str, Any]]]:
        """What a backend needs of each parameter that has a gradient, in this process."""
        ready = []
        for slot, grad in zip(slots, gradients):
            if grad is None:
                continue
            param = slot.param if slot.mesh is None else local(slot.param)
            if slot.gathered:
                param, grad = slot.param.full_tensor(), slot.param.grad.full_tensor()
            state = self.state[slot.param] or self._state_of(slot)
            if not is_pointed(slot, state, param):
                point(slot, state, param, self.param_groups[slot.group])
            ready.append((slot, param, grad, state))
        return ready

    def __repr__(self) -> str:
        lines = [
            f"  group {i}: {len(group['params'])} parameters, "
            + ", ".join(f"{name} {group[name]}" for name in self.defaults if name in group)
            for i, group in enumerate(self.param_groups)
        ]
        return "\n".join(["AdamW8bit(", *lines, ")"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, and parameters lose their `grad_factors`."""
        super().zero_grad(set_to_none)
        for slot in self._current_slots():
            _drop_factors(slot.param)

    def _clear(
        self, slots: list[Slot], gradients: list[Tensor | GradientFactors | None], everything: bool
    ) -> None:
        """The gradients that no backend has cleared."""
        for slot, grad in zip(slots, gradients):
            if isinstance(grad, GradientFactors):
                _drop_factors(slot.param)
            elif grad is not None and (
                everything or slot.gathered or not grad.is_contiguous()
            ):
                grad.zero_()


def _drop_factors(param: Tensor) -> None:
    if getattr(param, "grad_factors", None) is not None:
        del param.grad_factors


def _scale_of(grad_scale: float | Tensor) -> float:
    if isinstance(grad_scale, bool):
        raise TypeError(f"grad_scale is {grad_scale!r}; expected a number")
    try:
        scale = float(grad_scale)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"grad_scale is {grad_scale!r}; expected a number") from error
    if scale < 0:
        raise ValueError(f"grad_scale is {scale!r}; expected a number >= 0")
    return scale
