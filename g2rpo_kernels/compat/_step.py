"""What the peers' steps share: noise drawn as theirs, and our ops on one affine step.

The numbers of the step come from `_schedule`; here tensors of the size of a latent are touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_floating, check_like
from ..branch_log_prob import branch_log_prob
from ..dynamics import StepCoefficients
from ..sde_step import sde_step
from ..step_mean import step_mean
from ._schedule import Row, Steps, steps


def check_tensors(
    velocity: tuple[str, Tensor], latents: tuple[str, Tensor], x_next: tuple[str, Tensor | None]
) -> None:
    """Each with the name its peer gives it: [B, *S], floating, one shape, one device."""
    name, x = velocity
    check_floating(name, x)
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected [B, *S], at least one element a sample"
        )
    check_like(*latents, name, x)
    if x_next[1] is not None:
        check_like(*x_next, name, x)


# Noise


def randn(
    shape: torch.Size,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """torch's noise, so that a peer's seeds give its numbers (diffusers' randn_tensor draws so).

    A generator on the CPU draws there, whatever the device; a list has one generator a sample.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != 1:
            if len(generator) != shape[0]:
                raise ValueError(
                    f"generator has {len(generator)} entries; expected 1 or {shape[0]}, one a row"
                )
            each = (1, *shape[1:])
            return torch.cat([randn(torch.Size(each), g, device, dtype) for g in generator])
        (generator,) = generator
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator is a {type(generator).__name__}; expected a torch.Generator, a list of "
            "them or None"
        )
    if generator.device.type not in ("cpu", device.type):
        raise ValueError(
            f"generator is on {generator.device}; expected cpu or {device}, the device of the step"
        )
    drawn_on = device if generator.device.type == device.type else generator.device
    return torch.randn(shape, generator=generator, device=drawn_on, dtype=dtype).to(device)


def refuse_both(prev_sample: Tensor | None, generator: object) -> None:
    if prev_sample is not None and generator is not None:
        raise ValueError(
            f"generator is a {type(generator).__name__} beside a prev_sample, which leaves nothing "
            "to draw; expected one of them"
        )


# The step


def needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def log_prob(
    velocity: Tensor, latents: Tensor, x_next: Tensor, coefficients: StepCoefficients
) -> Tensor:  # [B]
    """Log-probability of x_next as a constant; gradients reach velocity and latents."""
    if needs_grad(latents):
        # branch_log_prob is differentiable in its velocity only. Seen as a function of the mean
        # (a = 0, b = 1) it has the same value, and step_mean hands the gradient on to both.
        table = coefficients.table.clone()
        table[:, 0], table[:, 1] = 0, 1
        velocity = step_mean(velocity, latents, coefficients)
        coefficients = StepCoefficients(table, coefficients.dynamics)
    return branch_log_prob(velocity, latents.detach(), x_next.detach(), coefficients)


def draw_next(
    velocity: Tensor, latents: Tensor, coefficients: StepCoefficients, noise: Tensor
) -> tuple[Tensor, Tensor]:  # [B, *S], [B]
    """mean + s*noise and its log-probability; gradients flow through the mean, as in the peers."""
    x_next, log = sde_step(velocity.detach(), latents.detach(), coefficients, noise=noise)
    if needs_grad(velocity, latents):
        # sde_step gives no gradients. Adding an exact zero that has the mean's keeps its bits.
        mean = step_mean(velocity, latents, coefficients)
        x_next = x_next + (mean - mean.detach())
        log = log_prob(velocity, latents, x_next, coefficients)
    return x_next, log


def ode_mean(velocity: Tensor, latents: Tensor, rows: Sequence[Row]) -> Tensor:  # [B, *S]
    """x + (sigma_next - sigma) * v; ode_step would copy a sigma a row to the GPU every time."""
    still = [row._replace(eta=0.0, sigma_max=None) for row in rows]
    return step_mean(velocity, latents, steps(still, "ode", velocity.device).coefficients)


def per_row(values: Tensor, rows: int, like: Tensor) -> Tensor:
    """[P or 1] -> [rows, 1, ...] of like's dimensions: a copy, for the caller to keep."""
    return values.expand(rows).clone().view(rows, *[1] * (like.ndim - 1))


def step_std(steps: Steps) -> Tensor:
    """What Flow-GRPO calls std_dev_t: the step's standard deviation over sqrt(-dt), [P or 1]."""
    return steps.coefficients.table[:, 2] / (-steps.dt).sqrt()
