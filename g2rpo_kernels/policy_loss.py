"""policy_loss: the clipped policy objective on branch log-probabilities, with its own backward.

    r    = exp(log_prob - old_log_prob)
    loss = mean over branches and rows of max(-A r, -A clip(r, 1 - e, 1 + e)) + kl_weight * kl

The gradient is closed-form, so nothing of the forward is kept but one number a branch:
dloss/dlog_prob, which `log_prob_backward` turns into grad_velocity, written once per anchor row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import (
    check_branches,
    check_gaussian,
    check_like,
    check_per_branch,
    check_rows,
    check_table,
    compute_dtype,
    refuse_grad,
)
from ._library import define_op
from .branch_log_prob import as_rows, log_prob_backward, log_prob_reference, row_mean
from .dynamics import StepCoefficients, check_number
from .step_mean import column


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns. Only `loss` carries a gradient; the rest is for the eye."""

    loss: Tensor  # []
    log_prob: Tensor  # [P, G] or [P], of the current policy
    statistics: Tensor  # [5]: the five properties below, in one tensor for one transfer

    @property
    def ratio_mean(self) -> Tensor:
        """Mean of r; exactly 1 on-policy."""
        return self.statistics[0]

    @property
    def ratio_max(self) -> Tensor:
        return self.statistics[1]

    @property
    def clip_fraction(self) -> Tensor:
        """Share of branches with |r - 1| > clip_range."""
        return self.statistics[2]

    @property
    def approx_kl(self) -> Tensor:
        """mean(r - 1 - log r), an estimate of KL(old policy, current policy)."""
        return self.statistics[3]

    @property
    def kl(self) -> Tensor:
        """Mean over rows of w * mean_N((mean - mean_reference)^2); 0 without a reference."""
        return self.statistics[4]


def policy_loss(
    velocity: Tensor,  # [P, *S]
    latents: Tensor,  # [P, *S]
    x_next: Tensor,  # [P, G, *S] or [P, *S]
    old_log_prob: Tensor,  # [P, G] or [P]
    advantages: Tensor,  # [P, G] or [P]
    coefficients: StepCoefficients,  # table [P, 5] or [1, 5]
    *,
    clip_range: float = 1e-4,
    advantage_clip: float | None = None,
    reference_velocity: Tensor | None = None,  # [P, *S]
    kl_weight: float = 0.0,
    old_velocity: Tensor | None = None,  # [P, *S]
) -> PolicyLoss:
    """Clipped policy loss over the G branches of P anchor rows; `loss.backward()` reaches velocity.

    velocity, latents: one anchor row p for all its G branches, never repeated; float32, bfloat16
        or float16 (float64 on the reference backend); non-contiguous tensors are copied.
    x_next, old_log_prob: what `sde_step` returned at rollout.
    advantages: e.g. `group_advantages(...)`, arranged [P, G].
    clip_range: half-width of the ratio's window, > 0.
    advantage_clip: clamp advantages to +-advantage_clip first; None: as they are.
    reference_velocity, kl_weight: adds kl_weight * kl to the loss, the KL divergence (per element)
        from the step this velocity would have made.
    old_velocity: velocity at rollout; turns on GRPO-Guard's normalised ratio
        exp((log_prob - old_log_prob + w mean_N((mean - mean_old)^2)) * s) (arXiv 2510.22319).

    The mean is over branches *and* rows: K positions in one call are already divided by K.
    Only `loss` is differentiable, and only in velocity; other inputs that require a gradient are
    refused. Arithmetic in float32 (float64 if velocity or latents is).

    Equivalent to:
        log_prob = branch_log_prob(velocity, latents, x_next, coefficients)
        ratio = torch.exp(log_prob - old_log_prob)
        loss = torch.maximum(-advantages * ratio,
                             -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()

    Source: PPO (arXiv 1707.06347) eq. 7, on the branches of G2RPO (arXiv 2510.01982).
    """
    check_rows(velocity, latents)
    leading = check_branches("x_next", x_next, velocity)
    if 0 in leading:
        raise ValueError(
            f"x_next has shape {tuple(x_next.shape)}; expected at least one row and one branch, "
            "since the loss is a mean over them"
        )
    check_per_branch("old_log_prob", old_log_prob, leading, velocity)
    check_per_branch("advantages", advantages, leading, velocity)
    for name, other in (("reference_velocity", reference_velocity), ("old_velocity", old_velocity)):
        if other is not None:
            check_like(name, other, "velocity", velocity)
    table = check_table(coefficients, velocity)
    check_gaussian(coefficients)
    if not check_number("clip_range", clip_range) > 0:
        raise ValueError(f"clip_range is {clip_range}; expected a number > 0")
    if advantage_clip is not None and not check_number("advantage_clip", advantage_clip) > 0:
        raise ValueError(f"advantage_clip is {advantage_clip}; expected a number > 0, or None")
    if not check_number("kl_weight", kl_weight) >= 0:
        raise ValueError(f"kl_weight is {kl_weight}; expected a number >= 0")
    if kl_weight > 0 and reference_velocity is None:
        raise ValueError(f"kl_weight is {kl_weight} without reference_velocity; expected both")
    refuse_grad(
        "policy_loss",
        "only velocity is differentiable",
        latents=latents,
        x_next=x_next,
        old_log_prob=old_log_prob,
        advantages=advantages,
        reference_velocity=reference_velocity,
        old_velocity=old_velocity,
    )
    loss, log_prob, _, statistics = _policy_loss(
        velocity, latents, x_next, old_log_prob, advantages, table,
        clip_range, advantage_clip, reference_velocity, kl_weight, old_velocity,
    )  # fmt: skip
    return PolicyLoss(loss, log_prob, statistics)


def _mean_gap(velocity: Tensor, other: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """w * mean_N((mean - mean_other)^2), [P]; the latents' share of both means cancels."""
    gap = row_mean(as_rows(velocity.to(dtype) - other.to(dtype)).square())
    return column(table, 3, gap) * column(table, 1, gap).square() * gap


def policy_loss_reference(
    velocity, latents, x_next, old_log_prob, advantages, table,
    clip_range, advantage_clip, reference_velocity, kl_weight, old_velocity,
):  # fmt: skip
    """Returns loss [], log_prob, dloss/dlog_prob (before the KL term), statistics [5]."""
    log_prob = log_prob_reference(velocity, latents, x_next, table)
    dtype, branches = log_prob.dtype, log_prob.numel()
    log_ratio = log_prob - old_log_prob.to(dtype)
    slope = torch.ones_like(table[:, 2], dtype=dtype)  # dlog_ratio/dlog_prob, [P or 1]
    if old_velocity is not None:
        slope = table[:, 2].to(dtype)
        gap = _mean_gap(velocity, old_velocity, table, dtype)
        log_ratio = (log_ratio + gap.view(-1, *[1] * (log_prob.ndim - 1))) * column(
            table, 2, log_prob
        )
    ratio = log_ratio.exp()
    advantages = advantages.to(dtype)
    if advantage_clip is not None:
        advantages = advantages.clamp(-advantage_clip, advantage_clip)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(unclipped, clipped).mean()
    # Not `where(unclipped >= clipped)`: a NaN must reach the gradient, not become a silent 0.
    slope = slope.view(-1, *[1] * (log_prob.ndim - 1))
    grad_log_prob = (
        torch.where(unclipped < clipped, torch.zeros_like(ratio), unclipped) * slope / branches
    )
    kl = loss.new_zeros(())
    if reference_velocity is not None:
        kl = _mean_gap(velocity, reference_velocity, table, dtype).mean()
        loss = loss + kl_weight * kl
    statistics = torch.stack(
        [
            ratio.mean(),
            ratio.max(),
            ((ratio - 1).abs() > clip_range).to(dtype).mean(),
            (ratio - 1 - log_ratio).mean(),
            kl,
        ]
    )
    return loss, log_prob, grad_log_prob, statistics


def _fake(velocity, latents, x_next, old_log_prob, *rest):
    dtype = compute_dtype(velocity, latents)
    leading = old_log_prob.shape
    return (
        velocity.new_empty((), dtype=dtype),
        velocity.new_empty(leading, dtype=dtype),
        velocity.new_empty(leading, dtype=dtype),
        velocity.new_empty((5,), dtype=dtype),
    )


def _setup_context(ctx, inputs, output):
    velocity, latents, x_next, _, _, table, _, _, reference_velocity, kl_weight, old_velocity = (
        inputs
    )
    grad_log_prob = output[2]
    ctx.save_for_backward(
        grad_log_prob, velocity, latents, x_next, table, old_velocity, reference_velocity
    )
    ctx.kl_weight = kl_weight


def _backward(ctx, grad_loss):
    if grad_loss is None:
        return (None,) * 11
    grad_log_prob, velocity, latents, x_next, table, old_velocity, reference_velocity = (
        ctx.saved_tensors
    )
    grad_velocity = log_prob_backward(
        grad_log_prob, velocity, latents, x_next, table,
        grad_loss, old_velocity, reference_velocity, ctx.kl_weight,
    )  # fmt: skip
    return grad_velocity, *[None] * 10


_policy_loss = define_op(
    "policy_loss(Tensor velocity, Tensor latents, Tensor x_next, Tensor old_log_prob, "
    "Tensor advantages, Tensor table, float clip_range, float? advantage_clip, "
    "Tensor? reference_velocity, float kl_weight, Tensor? old_velocity) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=policy_loss_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
