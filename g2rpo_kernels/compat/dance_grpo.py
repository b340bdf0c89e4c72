"""DanceGRPO's step (arXiv 2505.07818) on our ops.

In the peer's fastvideo/train_grpo_flux.py, after its own `def flux_step`:

    from g2rpo_kernels.compat import flux_step
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ode_step import ode_step
from ..step_mean import step_mean
from . import _schedule, _step


def flux_step(
    model_output: Tensor,  # [B, *S], the velocity
    latents: Tensor,  # [B, *S]
    eta: float,
    sigmas: Tensor,  # [steps + 1], from 1 to 0
    index: int,
    prev_sample: Tensor | None,  # [B, *S]
    grpo: bool,
    sde_solver: bool,
    *,
    log_prob_constant: bool = False,
) -> tuple[Tensor, ...]:  # [B, *S], [B, *S], [B]; or [B, *S], [B, *S]
    """One step from sigmas[index] to sigmas[index + 1].

    model_output, latents, prev_sample: float32, bfloat16, float16 or float64, each its own.
        Everything is computed and returned in float32 (float64 if an input is); DanceGRPO rounds
        to bfloat16 when model_output and latents both are, which its loop avoids.
    eta: the diffusion; > 0 with grpo=True, whose log-probability divides by it.
    sigmas: on the CPU, as in DanceGRPO, or on a GPU (read once for as long as it lives unchanged).
    index: an integer, or a tensor of one (on a GPU that waits for it, as in DanceGRPO).
    prev_sample: None draws it around the mean, with torch.randn_like as DanceGRPO does; given, it
        is scored and returned as it is.
    grpo: False ignores prev_sample and returns (prev_sample_mean, pred_original_sample).
    sde_solver: False takes the ODE's mean and keeps the noise, and its log-probability, around it.
    log_prob_constant: adds -log(std) - log(2 pi)/2, which DanceGRPO computes and then drops (they
        stand in a statement of their own); forks that close that gap want True. It cancels in
        every ratio.

    Returns (prev_sample, pred_original_sample, log_prob), all differentiable in model_output and
    latents, log_prob with prev_sample as a constant:
        pred_original_sample: latents - sigma * model_output.
        log_prob: mean over S of -(prev_sample - mean)^2 / (2 eta^2 (-dt)).

    Raises TypeError or ValueError naming the argument, its value and what was expected.

    Source: XueZeyue/DanceGRPO, fastvideo/train_grpo_flux.py.
    """
    _step.check_tensors(
        ("model_output", model_output), ("latents", latents), ("prev_sample", prev_sample)
    )
    eta = _schedule.check_noise_level("eta", eta, "dance")
    if grpo and eta == 0:
        raise ValueError("eta is 0; expected a number > 0 with grpo=True, which divides by it")
    row = _schedule.scheduled_row(sigmas, index, eta, "dance")
    steps = _schedule.steps(
        [row],
        "dance",
        latents.device,
        drift="dance" if sde_solver else "ode",
        constant=log_prob_constant,
    )
    x0 = ode_step(model_output, latents, row.sigma, 0.0)
    if not grpo:
        return step_mean(model_output, latents, steps.coefficients), x0
    if prev_sample is None:
        noise = torch.randn_like(latents, dtype=torch.result_type(latents, model_output))
        prev_sample, log_prob = _step.draw_next(model_output, latents, steps.coefficients, noise)
    else:
        log_prob = _step.log_prob(model_output, latents, prev_sample, steps.coefficients)
    return prev_sample, x0, log_prob
