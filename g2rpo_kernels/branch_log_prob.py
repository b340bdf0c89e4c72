"""branch_log_prob: how likely the current policy makes each branch of a stochastic step.

    log_prob[p, g] = -w_p * mean_N((x_next[p, g] - mean_p)^2) + c_p,   mean_p = a_p x_p + b_p v_p
    grad_v[p]      = sum_g grad[p, g] * 2 w_p b_p (x_next[p, g] - mean_p) / N

Every log-probability of the package (`sde_step`, `policy_loss`) comes from `log_prob_reference`
applied to the *stored* x_next, in one reduction order: replaying a step gives the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._checks import (
    check_branches,
    check_gaussian,
    check_rows,
    check_table,
    compute_dtype,
    refuse_grad,
)
from ._library import define_op
from .dynamics import StepCoefficients
from .step_mean import column, step_mean_reference

_CHUNK = 4096


def branch_log_prob(
    velocity: Tensor,  # [P, *S]
    latents: Tensor,  # [P, *S]
    x_next: Tensor,  # [P, G, *S] or [P, *S]
    coefficients: StepCoefficients,  # table [P, 5] or [1, 5]
) -> Tensor:  # [P, G] or [P]
    """Log-probability of each branch x_next of a step, averaged over its N elements (nats/element).

    velocity, latents: one anchor row p for all its G branches, never repeated; float32, bfloat16
        or float16 (float64 on the reference backend); non-contiguous tensors are copied.
    x_next: the stored result of `sde_step`.
    coefficients: any dynamics but "ode", which has no log-probability.
    Returns float32 [P, G] or [P] (float64 if velocity or latents is). Differentiable in velocity
    only: latents and x_next are samples, and one that requires a gradient is refused.

    Equivalent to, without the G-fold copies:
        mean = step_mean(velocity, latents, coefficients).unsqueeze(1)         # [P, 1, *S]
        log_prob = -w * ((x_next - mean) ** 2).flatten(2).mean(2) + c

    Source: Flow-GRPO (arXiv 2505.05470); singular stochastic sampling, G2RPO (arXiv 2510.01982).
    """
    check_rows(velocity, latents)
    check_branches("x_next", x_next, velocity)
    table = check_table(coefficients, velocity)
    check_gaussian(coefficients)
    refuse_grad("branch_log_prob", "it is a sample", latents=latents, x_next=x_next)
    return _branch_log_prob(velocity, latents, x_next, table)


def row_mean(x: Tensor) -> Tensor:
    """Mean over the last dimension, [*B, N] -> [*B], the same bits whatever *B is.

    torch splits a long reduction over threads when it has a single output, which would make the
    bits of one row depend on how many rows stand beside it. Summing in chunks avoids that.
    """
    count = x.shape[-1]
    whole = count - count % _CHUNK
    total = x[..., whole:].sum(-1)
    if whole:
        total = total + x[..., :whole].unflatten(-1, (-1, _CHUNK)).sum(-1).sum(-1)
    return total / count


def residual(velocity: Tensor, latents: Tensor, x_next: Tensor, table: Tensor) -> Tensor:
    """x_next - mean, flattened: [P, G, N], or [P, N] without a branch axis."""
    mean = as_rows(step_mean_reference(velocity, latents, table))
    branches = x_next.shape[1 : 1 + x_next.ndim - velocity.ndim]  # (G,) or ()
    x_next = x_next.to(mean.dtype).view(len(mean), *branches, mean.shape[1])
    return x_next - (mean.unsqueeze(1) if branches else mean)


def as_rows(x: Tensor) -> Tensor:
    """[P, *S] -> [P, N]; `flatten(1)` would not take an empty S, nor `view(P, -1)` P = 0."""
    return x.view(x.shape[0], math.prod(x.shape[1:]))


def log_prob_reference(velocity: Tensor, latents: Tensor, x_next: Tensor, table: Tensor) -> Tensor:
    mean_square = row_mean(residual(velocity, latents, x_next, table).square())
    return -column(table, 3, mean_square) * mean_square + column(table, 4, mean_square)


def log_prob_backward_reference(
    grad_log_prob: Tensor,  # [P, G] or [P]
    velocity: Tensor,
    latents: Tensor,
    x_next: Tensor,
    table: Tensor,
    scale: Tensor | None = None,  # [] multiplies everything
    old_velocity: Tensor | None = None,  # [P, *S] of policy_loss's normalised ratio
    reference_velocity: Tensor | None = None,  # [P, *S] of policy_loss's KL term
    kl_weight: float = 0.0,
) -> Tensor:
    """grad_v [P, *S] in velocity's dtype, each anchor row written once.

    (2 w b / N) * scale * [ sum_g grad_g (x_next_g - mean) + (sum_g grad_g) (mean - mean_old)
                            + kl_weight / P * (mean - mean_reference) ]
    """
    difference = residual(velocity, latents, x_next, table)
    grad = grad_log_prob.to(difference.dtype)
    total = grad.unsqueeze(-1) * difference
    if grad.ndim == 2:
        total, grad = total.sum(1), grad.sum(1)
    rows, count = total.shape
    # mean - mean_other = b (v - v_other): latents cancel
    velocity_rows = velocity.to(total.dtype).view(rows, count)
    b = column(table, 1, total)
    if old_velocity is not None:
        drift = b * (velocity_rows - old_velocity.to(total.dtype).view(rows, count))
        total = total + grad.unsqueeze(-1) * drift
    if reference_velocity is not None:
        drift = b * (velocity_rows - reference_velocity.to(total.dtype).view(rows, count))
        total = total + kl_weight / rows * drift
    factor = 2 * column(table, 3, total) * b / count
    if scale is not None:
        factor = factor * scale.to(total.dtype)
    return (factor * total).view(velocity.shape).to(velocity.dtype)


def _fake(velocity, latents, x_next, table):
    leading = x_next.shape[: 1 + x_next.ndim - velocity.ndim]
    return velocity.new_empty(leading, dtype=compute_dtype(velocity, latents))


def _no_second_backward(ctx, grad):
    raise RuntimeError(
        "branch_log_prob and policy_loss can be differentiated once; their gradient has none"
    )


def _fake_backward(grad_log_prob, velocity, latents, x_next, table, *rest):
    return torch.empty_like(velocity, memory_format=torch.contiguous_format)


log_prob_backward = define_op(
    "log_prob_backward(Tensor grad_log_prob, Tensor velocity, Tensor latents, Tensor x_next, "
    "Tensor table, Tensor? scale=None, Tensor? old_velocity=None, "
    "Tensor? reference_velocity=None, float kl_weight=0.0) -> Tensor",
    reference=log_prob_backward_reference,
    fake=_fake_backward,
    backward=_no_second_backward,
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_log_prob):
    return log_prob_backward(grad_log_prob, *ctx.saved_tensors), None, None, None


_branch_log_prob = define_op(
    "branch_log_prob(Tensor velocity, Tensor latents, Tensor x_next, Tensor table) -> Tensor",
    reference=log_prob_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
