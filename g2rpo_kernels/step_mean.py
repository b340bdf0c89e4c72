"""step_mean: where a step lands without its noise, mean = a*x + b*v."""

from __future__ import annotations

from torch import Tensor

from ._checks import check_rows, check_table, compute_dtype
from ._library import define_op
from .dynamics import StepCoefficients


def step_mean(
    velocity: Tensor,  # [P, *S]
    latents: Tensor,  # [P, *S]
    coefficients: StepCoefficients,  # table [P, 5] or [1, 5]
) -> Tensor:  # [P, *S]
    """The mean of one step, `a*latents + b*velocity`, a row of coefficients a row.

    velocity, latents: float32, bfloat16 or float16 (float64 on the reference backend), each its
        own; non-contiguous tensors are copied.
    Returns float32 [P, *S] (float64 if an input is). Differentiable in velocity and latents.

    Equivalent to:
        a, b = coefficients.table[:, 0], coefficients.table[:, 1]
        mean = a.view(-1, 1, 1) * latents + b.view(-1, 1, 1) * velocity        # S = (L, C)

    Source: Flow-GRPO (arXiv 2505.05470) eq. 9 and its kin, in the affine form of `dynamics.py`.
    """
    check_rows(velocity, latents)
    return _step_mean(velocity, latents, check_table(coefficients, velocity))


def column(table: Tensor, index: int, like: Tensor) -> Tensor:
    """Coefficient `index` of a table [P or 1, 5], shaped to multiply like's rows [P, *S]."""
    return table[:, index].to(compute_dtype(like)).view(-1, *[1] * (like.ndim - 1))


def step_mean_reference(velocity: Tensor, latents: Tensor, table: Tensor) -> Tensor:
    dtype = compute_dtype(velocity, latents)
    velocity, latents = velocity.to(dtype), latents.to(dtype)
    return column(table, 0, latents) * latents + column(table, 1, latents) * velocity


def _fake(velocity, latents, table):
    return velocity.new_empty(velocity.shape, dtype=compute_dtype(velocity, latents))


def _setup_context(ctx, inputs, output):
    velocity, latents, table = inputs
    ctx.save_for_backward(table)
    ctx.dtypes = velocity.dtype, latents.dtype


def _backward(ctx, grad):
    (table,) = ctx.saved_tensors
    velocity_dtype, latents_dtype = ctx.dtypes
    grad_velocity = grad_latents = None
    if ctx.needs_input_grad[0]:
        grad_velocity = (column(table, 1, grad) * grad).to(velocity_dtype)
    if ctx.needs_input_grad[1]:
        grad_latents = (column(table, 0, grad) * grad).to(latents_dtype)
    return grad_velocity, grad_latents, None


_step_mean = define_op(
    "step_mean(Tensor velocity, Tensor latents, Tensor table) -> Tensor",
    reference=step_mean_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
