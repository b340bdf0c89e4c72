"""Flow-GRPO's step (arXiv 2505.05470, eq. 9) and Flow-CPS's (arXiv 2509.05952) on our ops.

At the end of the peer's flow_grpo/diffusers_patch/sd3_sde_with_logprob.py:

    from g2rpo_kernels.compat import sde_step_with_logprob
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..step_mean import step_mean
from . import _schedule, _step

_DYNAMICS = {"sde": "flow", "cps": "cps"}


def sde_step_with_logprob(
    scheduler: object,  # diffusers' FlowMatchEulerDiscreteScheduler, or one like it
    model_output: Tensor,  # [B, *S], the velocity
    timestep: Tensor | float,  # [B] or [1], values of scheduler.timesteps
    sample: Tensor,  # [B, *S]
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,  # [B, *S]
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
    *,
    determistic: bool = False,
    return_step_std: bool = False,
) -> tuple[Tensor, ...]:  # [B, *S], [B], [B, *S], [len(timestep), 1, ...]
    """One step from `timestep` to the next: (prev_sample, log_prob, prev_sample_mean, std_dev_t).

    scheduler: has `sigmas` and `index_for_timestep()`. Its second sigma stands in for sigma = 1.
    model_output, sample, prev_sample: float32, bfloat16, float16 or float64; everything is computed
        and returned in float32.
    timestep: on a GPU it is read once a call, which waits for the GPU; on the CPU nothing waits.
    noise_level: >= 0, at most 1 for "cps". At 0 the step is the ODE's; the "sde" log-probability is
        then NaN, as in Flow-GRPO.
    prev_sample: None draws it, with noise from `generator` (a list: one a sample) or torch's own:
        the peer's seeds give the peer's noise. Given, it is scored and returned as float32; giving
        a generator as well is an error.
    sde_type: "sde" (Flow-GRPO) or "cps" (Flow-CPS; the peer's later versions, and what
        IamCreateAI/FlowCPS always does: functools.partial(..., sde_type="cps")).
    return_sqrt_dt: appends sqrt(-dt), shaped like std_dev_t.
    determistic, return_step_std: of the peer's first versions. The first replaces prev_sample by
        the ODE's step and scores that; the second returns std_dev_t * sqrt(-dt), as they did.

    Returns
        prev_sample: if drawn, mean + noise, differentiable through the mean.
        log_prob: nats an element (mean over S) of the detached prev_sample; differentiable in
            model_output and sample. "cps": -(prev_sample - mean)^2, without constants.
        prev_sample_mean: differentiable in model_output and sample.
        std_dev_t: "sde": noise_level * sqrt(sigma / (1 - sigma)), without sqrt(-dt). "cps": the
            standard deviation of the step, sigma_next * sin(noise_level * pi / 2).

    Raises TypeError or ValueError naming the argument, its value and what was expected.

    Source: yifan123/flow_grpo, flow_grpo/diffusers_patch/sd3_sde_with_logprob.py.
    """
    _step.check_tensors(
        ("model_output", model_output), ("sample", sample), ("prev_sample", prev_sample)
    )
    _step.refuse_both(prev_sample, generator)
    dynamics = _DYNAMICS[_schedule.check_choice("sde_type", sde_type, _DYNAMICS)]
    noise_level = _schedule.check_noise_level("noise_level", noise_level, dynamics)
    sigmas = _schedule.check_sigmas("scheduler.sigmas", _schedule.attribute(scheduler, "sigmas"))
    indices = _schedule.timestep_indices(scheduler, timestep, len(sample))
    for index in indices:
        _schedule.check_index("the step of timestep", index, sigmas)
    rows = [
        _schedule.make_row(
            "scheduler.sigmas", sigmas[i], sigmas[i + 1], noise_level, sigmas[1], dynamics
        )
        for i in indices
    ]
    steps = _schedule.steps(rows, dynamics, model_output.device)
    model_output, sample = model_output.float(), sample.float()
    log_prob = None
    if prev_sample is None:
        # Drawn even where it is not used, to leave the generator where the peer leaves it.
        noise = _step.randn(model_output.shape, generator, sample.device, torch.float32)
        if not determistic:
            prev_sample, log_prob = _step.draw_next(model_output, sample, steps.coefficients, noise)
    else:
        prev_sample = prev_sample.float()
    if determistic:
        prev_sample = _step.ode_mean(model_output, sample, rows)
    if log_prob is None:
        log_prob = _step.log_prob(model_output, sample, prev_sample, steps.coefficients)
    mean = step_mean(model_output, sample, steps.coefficients)
    per_step = steps.coefficients.table[:, 2]
    std = per_step if return_step_std or dynamics == "cps" else _step.step_std(steps)
    returned = (prev_sample, log_prob, mean, _step.per_row(std, len(rows), sample))
    if return_sqrt_dt:
        returned += (_step.per_row((-steps.dt).sqrt(), len(rows), sample),)
    return returned
