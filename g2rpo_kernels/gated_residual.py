"""gated_residual, and gated_residual_modulate, which goes on to the next normalisation.

    hidden[b, l]    = residual[b, l] + gate[b] * update[b, l]
    modulated[b, l] = adaln_modulate(hidden, shift, scale)[b, l]

In one pass, hidden is written and not read again. For the backward pass `update` is kept only
where the gate has a gradient, which it has not when only adapters are trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_like, compute_dtype, refuse_grad
from ._library import define_op
from .adaln_modulate import (
    NO_FP8_GRAD,
    check_eps,
    check_modulation,
    check_sequence,
    contiguous_like,
    modulate,
    modulate_backward,
    once,
)
from .quantize_fp8 import Fp8Tensor, fake_fp8, quantize_fp8_reference


def gated_residual(
    residual: Tensor,  # [B, L, D]
    update: Tensor,  # [B, L, D]
    gate: Tensor,  # [B, D]
) -> Tensor:  # [B, L, D]
    """`residual + gate * update`, one gate for all rows of a sequence.

    residual, update, gate: float32, bfloat16 or float16 (float64 on the reference backend), each
        its own; non-contiguous residual and update are copied.
    Returns [B, L, D] in the dtype of residual, computed in float32 (float64 if an input is).
    Differentiable in all three, once.

    Equivalent to:
        hidden = residual + gate[:, None] * update
    """
    _check(residual, update, gate)
    return _gated_residual(residual, update, gate)


def gated_residual_modulate(
    residual: Tensor,  # [B, L, D]
    update: Tensor,  # [B, L, D]
    gate: Tensor,  # [B, D]
    shift: Tensor,  # [B, D]
    scale: Tensor,  # [B, D]
    *,
    eps: float = 1e-6,
    fp8: bool = False,
) -> tuple[Tensor, Tensor | Fp8Tensor]:  # [B, L, D], [B, L, D]
    """`gated_residual` and `adaln_modulate` of what it returns, in one pass.

    residual, update, gate: as for `gated_residual`; shift, scale, eps, fp8: as for
        `adaln_modulate`.
    Returns hidden in the dtype of residual, and modulated, computed from hidden as it is stored:
    in the same dtype, or an Fp8Tensor. Both carry gradients, to all five inputs, once; with
    fp8=True inputs that require a gradient are refused.

    Equivalent to:
        hidden = gated_residual(residual, update, gate)
        modulated = adaln_modulate(hidden, shift, scale, eps=eps, fp8=fp8)
    """
    _check(residual, update, gate)
    check_modulation("shift", shift, "residual", residual)
    check_modulation("scale", scale, "residual", residual)
    check_eps(eps)
    if not fp8:
        return _gated_residual_modulate(residual, update, gate, shift, scale, eps)
    refuse_grad(
        "gated_residual_modulate with fp8=True", NO_FP8_GRAD,
        residual=residual, update=update, gate=gate, shift=shift, scale=scale,
    )  # fmt: skip
    hidden, *quantised = _gated_residual_modulate_fp8(residual, update, gate, shift, scale, eps)
    return hidden, Fp8Tensor(*quantised)


def _check(residual: Tensor, update: Tensor, gate: Tensor) -> None:
    check_sequence("residual", residual)
    check_like("update", update, "residual", residual)
    check_modulation("gate", gate, "residual", residual)


# ---- References ----


def gated_residual_reference(residual: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    dtype = compute_dtype(residual, update, gate)
    hidden = residual.to(dtype) + gate.to(dtype)[:, None] * update.to(dtype)
    return hidden.to(residual.dtype)


def gated_residual_backward_reference(
    grad: Tensor,  # [B, L, D], also that of residual
    gate: Tensor,  # [B, D]
    update: Tensor | None,  # [B, L, D]
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """grad_update [B, L, D]; grad_gate as float32 [1, B, D], or [0, B, D] without update.

    grad_update = gate * grad,    grad_gate = sum_l grad * update
    """
    dtype = _wide(grad, gate, update)
    grad, gate = grad.to(dtype), gate.to(dtype)
    return (gate[:, None] * grad).to(update_dtype), _gate_sum(grad, gate, update)


def _wide(*tensors: Tensor | None) -> torch.dtype:
    return compute_dtype(*(x for x in tensors if x is not None))


def _gate_sum(grad: Tensor, gate: Tensor, update: Tensor | None) -> Tensor:
    if update is None:
        return grad.new_empty((0, *gate.shape))
    return (grad * update.to(grad.dtype)).sum(1)[None]


def gated_residual_modulate_reference(
    residual: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    hidden = gated_residual_reference(residual, update, gate)
    return hidden, modulate(hidden, shift, scale, eps).to(hidden.dtype)


def gated_residual_modulate_fp8_reference(
    residual: Tensor, update: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = gated_residual_reference(residual, update, gate)
    return hidden, *quantize_fp8_reference(modulate(hidden, shift, scale, eps))


def gated_residual_modulate_backward_reference(
    grad_modulated: Tensor,  # [B, L, D]
    grad_hidden: Tensor | None,  # [B, L, D]
    hidden: Tensor,  # [B, L, D]
    gate: Tensor,  # [B, D]
    scale: Tensor,  # [B, D]
    update: Tensor | None,  # [B, L, D]
    eps: float,
    wants_sums: bool,
    update_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_residual and grad_update [B, L, D], and the sums over L as float32 [K, B, D].

    grad_residual = grad_hidden + the gradient that the normalisation hands back, unrounded for
    grad_update = gate * grad_residual. The sums: grad_shift and grad_scale if wants_sums, then
    grad_gate if update is given.
    """
    dtype = _wide(grad_modulated, grad_hidden, hidden, gate, scale, update)
    grad, sums = modulate_backward(grad_modulated.to(dtype), hidden, scale, eps, wants_sums)
    if grad_hidden is not None:
        grad = grad_hidden.to(dtype) + grad
    gate = gate.to(dtype)
    grad_update = (gate[:, None] * grad).to(update_dtype)
    return grad.to(hidden.dtype), grad_update, torch.cat([sums, _gate_sum(grad, gate, update)])


# ---- Registration ----


def _fake_gated_backward(grad, gate, update, update_dtype):
    sums = grad.new_empty((int(update is not None), *gate.shape), dtype=_wide(grad, gate, update))
    return contiguous_like(grad, update_dtype), sums


_gated_residual_backward = define_op(
    "gated_residual_backward(Tensor grad, Tensor gate, Tensor? update, ScalarType update_dtype) "
    "-> (Tensor, Tensor)",
    reference=gated_residual_backward_reference,
    fake=_fake_gated_backward,
    backward=once("gated_residual"),
    differentiable=2,
    strided=(1,),
)


def _setup_context(ctx, inputs, output):
    residual, update, gate = inputs
    ctx.save_for_backward(gate, update if ctx.needs_input_grad[2] else None)
    ctx.dtypes = residual.dtype, update.dtype, gate.dtype


def _backward(ctx, grad):
    return _gated_grads(ctx, grad, *ctx.saved_tensors)


def _gated_grads(ctx, grad, gate, update):
    """Of residual, update and gate, given that of hidden."""
    needs_residual, needs_update, needs_gate = ctx.needs_input_grad[:3]
    grad_residual = grad_update = grad_gate = None
    if needs_residual:
        grad_residual = grad.to(ctx.dtypes[0])
    if needs_update or needs_gate:
        grad_update, sums = _gated_residual_backward(grad, gate, update, ctx.dtypes[1])
        grad_gate = sums[0].to(ctx.dtypes[2]) if needs_gate else None
    return grad_residual, grad_update if needs_update else None, grad_gate


def _fake(residual, update, gate):
    return contiguous_like(residual)


_gated_residual = define_op(
    "gated_residual(Tensor residual, Tensor update, Tensor gate) -> Tensor",
    reference=gated_residual_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    strided=(2,),  # a chunk of a linear's output
)


def _fake_modulate_backward(
    grad_modulated, grad_hidden, hidden, gate, scale, update, eps, wants_sums, update_dtype
):
    kinds = 2 * bool(wants_sums) + (update is not None)
    dtype = _wide(grad_modulated, grad_hidden, hidden, gate, scale, update)
    sums = hidden.new_empty((kinds, *gate.shape), dtype=dtype)
    return contiguous_like(hidden), contiguous_like(hidden, update_dtype), sums


_gated_residual_modulate_backward = define_op(
    "gated_residual_modulate_backward(Tensor grad_modulated, Tensor? grad_hidden, Tensor hidden, "
    "Tensor gate, Tensor scale, Tensor? update, float eps, bool wants_sums, "
    "ScalarType update_dtype) -> (Tensor, Tensor, Tensor)",
    reference=gated_residual_modulate_backward_reference,
    fake=_fake_modulate_backward,
    backward=once("gated_residual_modulate"),
    differentiable=3,
    strided=(3, 4),
)


def _setup_modulate(ctx, inputs, output):
    residual, update, gate, shift, scale, ctx.eps = inputs
    ctx.save_for_backward(output[0], gate, scale, update if ctx.needs_input_grad[2] else None)
    ctx.dtypes = tuple(x.dtype for x in inputs[:5])


def _modulate_backward(ctx, grad_hidden, grad_modulated):
    hidden, gate, scale, update = ctx.saved_tensors
    if grad_modulated is None:
        if grad_hidden is None:
            return (None,) * 6
        return *_gated_grads(ctx, grad_hidden, gate, update), None, None, None
    needs = ctx.needs_input_grad
    wants_sums = needs[3] or needs[4]
    grad_residual, grad_update, sums = _gated_residual_modulate_backward(
        grad_modulated, grad_hidden, hidden, gate, scale, update, ctx.eps, wants_sums, ctx.dtypes[1]
    )
    return (
        grad_residual if needs[0] else None,
        grad_update if needs[1] else None,
        sums[-1].to(ctx.dtypes[2]) if needs[2] else None,
        sums[0].to(ctx.dtypes[3]) if needs[3] else None,
        sums[1].to(ctx.dtypes[4]) if needs[4] else None,
        None,
    )


def _fake_modulate(residual, update, gate, shift, scale, eps):
    return contiguous_like(residual), contiguous_like(residual)


_gated_residual_modulate = define_op(
    "gated_residual_modulate(Tensor residual, Tensor update, Tensor gate, Tensor shift, "
    "Tensor scale, float eps) -> (Tensor, Tensor)",
    reference=gated_residual_modulate_reference,
    fake=_fake_modulate,
    backward=_modulate_backward,
    setup_context=_setup_modulate,
    differentiable=2,
    strided=(2, 3, 4),
)


def _fake_modulate_fp8(residual, update, gate, shift, scale, eps):
    return contiguous_like(residual), *fake_fp8(residual, residual.shape)


_gated_residual_modulate_fp8 = define_op(
    "gated_residual_modulate_fp8(Tensor residual, Tensor update, Tensor gate, Tensor shift, "
    "Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    reference=gated_residual_modulate_fp8_reference,
    fake=_fake_modulate_fp8,
    strided=(2, 3, 4),
)
