"""sde_step: fan every anchor row out into its branches by one stochastic step.

    x_next[p, g] = a_p x_p + b_p v_p + s_p eps[p, g],    log_prob[p, g] = log p(x_next[p, g])
"""

from __future__ import annotations

from torch import Tensor

from ._checks import (
    check_branches,
    check_device,
    check_rows,
    check_seeds,
    check_table,
    compute_dtype,
    refuse_grad,
)
from ._library import define_op
from .branch_log_prob import log_prob_reference
from .dynamics import StepCoefficients
from .normal import normal_reference
from .step_mean import column, step_mean_reference


def sde_step(
    velocity: Tensor,  # [P, *S]
    latents: Tensor,  # [P, *S]
    coefficients: StepCoefficients,  # table [P, 5] or [1, 5]
    *,
    seeds: Tensor | None = None,  # int64 [P, G] or [P]
    noise: Tensor | None = None,  # [P, G, *S] or [P, *S]
) -> tuple[Tensor, Tensor | None]:  # [P, G, *S] or [P, *S]; [P, G] or [P]
    """One stochastic step of every anchor row, in G branches, with their log-probabilities.

    velocity, latents: one anchor row p for all its G branches, never repeated; float32, bfloat16
        or float16 (float64 on the reference backend); non-contiguous tensors are copied.
    seeds or noise, exactly one: seeds draw `normal(seeds, S)`; the branch axis is there when seeds
        has two dimensions, or noise one more than latents.
    Returns x_next, float32 (float64 if velocity or latents is), and its log_prob in nats/element,
    the very bits that `branch_log_prob` gives for this x_next. For dynamics "ode" x_next is the
    mean and log_prob is None.

    Not differentiable: x_next is a sample. Inputs that require a gradient are refused; gradients
    come from `branch_log_prob` or `policy_loss`.

    Equivalent to:
        mean = step_mean(velocity, latents, coefficients).unsqueeze(1)         # [P, 1, *S]
        x_next = mean + s * torch.randn(P, G, *S)
        log_prob = -w * ((x_next - mean) ** 2).flatten(2).mean(2) + c

    Source: singular stochastic sampling, G2RPO (arXiv 2510.01982).
    """
    check_rows(velocity, latents)
    if (seeds is None) == (noise is None):
        given = "both" if seeds is not None else "neither"
        raise ValueError(f"{given} of seeds and noise given; expected exactly one")
    if seeds is not None:
        check_seeds(seeds)
        check_device("seeds", seeds, "velocity", velocity)
        if seeds.ndim not in (1, 2) or seeds.shape[0] != velocity.shape[0]:
            raise ValueError(
                f"seeds has shape {tuple(seeds.shape)}; expected [P, G] or [P] with "
                f"P = {velocity.shape[0]}, the rows of velocity"
            )
    else:
        check_branches("noise", noise, velocity)
    refuse_grad(
        "sde_step",
        "differentiate branch_log_prob or policy_loss instead",
        velocity=velocity,
        latents=latents,
        noise=noise,
    )
    x_next, log_prob = _sde_step(
        velocity, latents, check_table(coefficients, velocity), seeds, noise
    )
    return x_next, None if coefficients.dynamics == "ode" else log_prob


def sde_step_reference(
    velocity: Tensor, latents: Tensor, table: Tensor, seeds: Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    mean = step_mean_reference(velocity, latents, table)
    if noise is None:
        noise = normal_reference(seeds, latents.shape[1:])
    if noise.ndim > mean.ndim:
        mean = mean.unsqueeze(1)
    x_next = mean + column(table, 2, mean) * noise.to(mean.dtype)
    return x_next, log_prob_reference(velocity, latents, x_next, table)


def _fake(velocity, latents, table, seeds, noise):
    dtype = compute_dtype(velocity, latents)
    if noise is None:
        shape, leading = (*seeds.shape, *latents.shape[1:]), seeds.shape
    else:
        shape, leading = noise.shape, noise.shape[: 1 + noise.ndim - latents.ndim]
    return velocity.new_empty(shape, dtype=dtype), velocity.new_empty(leading, dtype=dtype)


_sde_step = define_op(
    "sde_step(Tensor velocity, Tensor latents, Tensor table, Tensor? seeds, Tensor? noise) "
    "-> (Tensor, Tensor)",
    reference=sde_step_reference,
    fake=_fake,
)
