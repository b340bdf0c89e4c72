"""adaln_modulate: LayerNorm without weights, then the scale and shift that the timestep decides.

    y[b, l] = (x[b, l] - mean) / sqrt(variance + eps) * (1 + scale[b]) + shift[b]

Mean and (biased) variance are those of the D elements of a row. The backward pass reads x anyway
and has a whole row in registers, so it computes them again: nothing but x is kept for it.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ._checks import check_device, check_floating, compute_dtype, refuse_grad
from ._library import define_op
from .branch_log_prob import row_mean
from .dynamics import check_number
from .quantize_fp8 import Fp8Tensor, fake_fp8, quantize_fp8_reference


def adaln_modulate(
    x: Tensor,  # [B, L, D]
    shift: Tensor,  # [B, D]
    scale: Tensor,  # [B, D]
    *,
    eps: float = 1e-6,
    fp8: bool = False,
) -> Tensor | Fp8Tensor:  # [B, L, D]
    """Adaptive layer normalisation of every row (the last dimension) of x.

    x, shift, scale: float32, bfloat16 or float16 (float64 on the reference backend), each its own;
        a non-contiguous x is copied.
    eps: added to the variance, >= 0.
    fp8: return an Fp8Tensor, values [B, L, D] and scales [B, L], quantised as by `quantize_fp8`
        from the float32 result, which is rounded once.
    Returns [B, L, D] in the dtype of x, computed in float32 (float64 if an input is).
    Differentiable in x, shift and scale, once; with fp8=True inputs that require a gradient are
    refused.

    Equivalent to:
        y = F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]

    Source: adaLN-Zero of DiT (arXiv 2212.09748), as FLUX's blocks have it.
    """
    check_sequence("x", x)
    check_modulation("shift", shift, "x", x)
    check_modulation("scale", scale, "x", x)
    check_eps(eps)
    if not fp8:
        return _adaln_modulate(x, shift, scale, eps)
    refuse_grad("adaln_modulate with fp8=True", NO_FP8_GRAD, x=x, shift=shift, scale=scale)
    return Fp8Tensor(*_adaln_modulate_fp8(x, shift, scale, eps))


NO_FP8_GRAD = "train with fp8=False"


def check_sequence(name: str, x: Tensor) -> None:
    """x: [B, L, D] with at least one element a row."""
    check_floating(name, x)
    if x.ndim != 3 or x.shape[2] == 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected [B, L, D] with at least one element a row"
        )


def check_modulation(name: str, m: Tensor, x_name: str, x: Tensor) -> None:
    """m: [B, D] beside x [B, L, D], which has been checked."""
    check_floating(name, m)
    check_device(name, m, x_name, x)
    if m.ndim != 2 or m.shape[0] != x.shape[0] or m.shape[1] != x.shape[2]:
        raise ValueError(
            f"{name} has shape {tuple(m.shape)}; expected {(x.shape[0], x.shape[2])}, the [B, D] "
            f"of {x_name} {tuple(x.shape)}"
        )


def check_eps(eps: float) -> None:
    if not check_number("eps", eps) >= 0:
        raise ValueError(f"eps is {eps}; expected a number >= 0")


# ---- The reference ----


def normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of x (float32 or float64) less their mean, over their deviation; and one over that."""
    centred = x - row_mean(x)[..., None]
    # Again: the mean of a row far from 0 is off by a rounding that matters beside its deviation.
    centred = centred - row_mean(centred)[..., None]
    rstd = (row_mean(centred.square()) + eps).rsqrt()[..., None]
    return centred * rstd, rstd


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """adaln_modulate before it is rounded."""
    dtype = compute_dtype(x, shift, scale)
    normal, _ = normalise(x.to(dtype), eps)
    return normal * (1 + scale.to(dtype))[:, None] + shift.to(dtype)[:, None]


def adaln_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return modulate(x, shift, scale, eps).to(x.dtype)


def adaln_modulate_fp8_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return quantize_fp8_reference(modulate(x, shift, scale, eps))


def modulate_backward(
    grad: Tensor, x: Tensor, scale: Tensor, eps: float, wants_sums: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of x, not yet rounded, and the sums over L that are those of shift and scale.

    grad_x = rstd * (g - mean(g) - normal * mean(g * normal)),    g = grad * (1 + scale)
    sums   = [sum_l grad, sum_l grad * normal]
    """
    dtype = compute_dtype(grad, x, scale)
    grad, scale = grad.to(dtype), scale.to(dtype)
    normal, rstd = normalise(x.to(dtype), eps)
    g = grad * (1 + scale)[:, None]
    along = row_mean(g * normal)[..., None]
    grad_x = rstd * (g - row_mean(g)[..., None] - normal * along)
    if not wants_sums:
        return grad_x, grad.new_empty((0, *scale.shape))
    return grad_x, torch.stack([grad.sum(1), (grad * normal).sum(1)])


def adaln_modulate_backward_reference(
    grad: Tensor,  # [B, L, D]
    x: Tensor,  # [B, L, D]
    scale: Tensor,  # [B, D]
    eps: float,
    wants_sums: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x [B, L, D] in x's dtype; grad_shift and grad_scale in one float32 tensor [2, B, D].

    Without wants_sums the latter is [0, B, D]: where only adapters are trained, shift and scale
    have no gradient.
    """
    grad_x, sums = modulate_backward(grad, x, scale, eps, wants_sums)
    return grad_x.to(x.dtype), sums


# ---- Registration ----


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """For a fake."""
    return x.new_empty(x.shape, dtype=x.dtype if dtype is None else dtype)


def once(op: str):
    """The backward pass of a backward pass: none of these ops can be differentiated twice."""

    def refuse(ctx, *grads) -> NoReturn:
        raise RuntimeError(f"{op} can be differentiated once; its gradient has none")

    return refuse


def _fake_backward(grad, x, scale, eps, wants_sums):
    sums = (2 if wants_sums else 0, *scale.shape)
    return contiguous_like(x), x.new_empty(sums, dtype=compute_dtype(grad, x, scale))


_adaln_modulate_backward = define_op(
    "adaln_modulate_backward(Tensor grad, Tensor x, Tensor scale, float eps, bool wants_sums) "
    "-> (Tensor, Tensor)",
    reference=adaln_modulate_backward_reference,
    fake=_fake_backward,
    backward=once("adaln_modulate"),
    differentiable=2,
    strided=(2,),
)


def _setup_context(ctx, inputs, output):
    x, shift, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)
    ctx.dtypes = shift.dtype, scale.dtype


def _backward(ctx, grad):
    x, scale = ctx.saved_tensors
    needs_x, *needs = ctx.needs_input_grad[:3]
    grad_x, sums = _adaln_modulate_backward(grad, x, scale, ctx.eps, any(needs))
    of_modulation = (
        sums[i].to(ctx.dtypes[i]) if needed else None for i, needed in enumerate(needs)
    )
    return grad_x if needs_x else None, *of_modulation, None


def _fake(x, shift, scale, eps):
    return contiguous_like(x)


_adaln_modulate = define_op(
    "adaln_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor",
    reference=adaln_modulate_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    strided=(1, 2),  # chunks of one linear's output
)


def _fake_fp8(x, shift, scale, eps):
    return fake_fp8(x, x.shape)


_adaln_modulate_fp8 = define_op(
    "adaln_modulate_fp8(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)",
    reference=adaln_modulate_fp8_reference,
    fake=_fake_fp8,
    strided=(1, 2),
)
