"""ode_step: one Euler step of the probability-flow ODE, with a sigma per row."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_device, check_floating, check_rows, compute_dtype, refuse_grad
from ._library import define_op
from .dynamics import check_number


def ode_step(
    velocity: Tensor,  # [P, *S]
    latents: Tensor,  # [P, *S]
    sigma: Tensor | float,  # [P], or one for all rows
    sigma_next: Tensor | float,  # [P], or one for all rows
) -> Tensor:  # [P, *S]
    """`latents + (sigma_next - sigma) * velocity`; to sigma_next = 0 this is the x0-prediction.

    velocity, latents: float32, bfloat16 or float16 (float64 on the reference backend), each its
        own; non-contiguous tensors are copied.
    sigma, sigma_next: numbers, or floating tensors [P] or [1] on the same device, kept as float32.
        Numbers are checked (0 <= sigma_next < sigma <= 1); values inside tensors are not, since
        that would synchronise a GPU. They are constants: one that requires a gradient is refused.
    Returns float32 [P, *S] (float64 if velocity or latents is). Differentiable in velocity and
    latents.

    Equivalent to:
        x_next = latents + (sigma_next - sigma).view(-1, 1, 1) * velocity       # S = (L, C)
    """
    check_rows(velocity, latents)
    rows = _per_row("sigma", sigma, velocity), _per_row("sigma_next", sigma_next, velocity)
    if not isinstance(sigma, Tensor) and not isinstance(sigma_next, Tensor):
        if not sigma_next < sigma:
            raise ValueError(
                f"sigma is {sigma} and sigma_next is {sigma_next}; "
                "expected 0 <= sigma_next < sigma <= 1"
            )
    refuse_grad("ode_step", "sigmas are constants", sigma=rows[0], sigma_next=rows[1])
    return _ode_step(velocity, latents, *rows)


def _per_row(name: str, value: Tensor | float, velocity: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        if not 0 <= check_number(name, value) <= 1:
            raise ValueError(f"{name} is {value}; expected a number in [0, 1]")
        return torch.full((1,), value, dtype=torch.float32, device=velocity.device)
    check_floating(name, value)
    check_device(name, value, "velocity", velocity)
    if value.ndim != 1 or value.shape[0] not in (1, velocity.shape[0]):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; expected a number, [1] or "
            f"[{velocity.shape[0]}], one a row of velocity"
        )
    return value if value.dtype is torch.float32 else value.to(torch.float32)


def _delta(sigma: Tensor, sigma_next: Tensor, like: Tensor) -> Tensor:
    return (sigma_next - sigma).to(compute_dtype(like)).view(-1, *[1] * (like.ndim - 1))


def ode_step_reference(
    velocity: Tensor, latents: Tensor, sigma: Tensor, sigma_next: Tensor
) -> Tensor:
    dtype = compute_dtype(velocity, latents)
    velocity, latents = velocity.to(dtype), latents.to(dtype)
    return latents + _delta(sigma, sigma_next, latents) * velocity


def _fake(velocity, latents, sigma, sigma_next):
    return velocity.new_empty(velocity.shape, dtype=compute_dtype(velocity, latents))


def _setup_context(ctx, inputs, output):
    velocity, latents, sigma, sigma_next = inputs
    ctx.save_for_backward(sigma, sigma_next)
    ctx.dtypes = velocity.dtype, latents.dtype


def _backward(ctx, grad):
    velocity_dtype, latents_dtype = ctx.dtypes
    grad_velocity = grad_latents = None
    if ctx.needs_input_grad[0]:
        grad_velocity = (_delta(*ctx.saved_tensors, grad) * grad).to(velocity_dtype)
    if ctx.needs_input_grad[1]:
        grad_latents = grad.to(latents_dtype)
    return grad_velocity, grad_latents, None, None


_ode_step = define_op(
    "ode_step(Tensor velocity, Tensor latents, Tensor sigma, Tensor sigma_next) -> Tensor",
    reference=ode_step_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
