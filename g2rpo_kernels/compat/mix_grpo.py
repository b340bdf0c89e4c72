"""The steps of Granular-GRPO (arXiv 2510.01982) and MixGRPO (arXiv 2507.21802) on our ops.

Both call their step `flow_grpo_step`. Granular-GRPO's returns three things, MixGRPO's five:

    from g2rpo_kernels.compat import flow_grpo_step                      # Granular-GRPO
    from g2rpo_kernels.compat import mix_grpo_step as flow_grpo_step     # MixGRPO
    from g2rpo_kernels.compat import dance_grpo_step                     # MixGRPO's other step
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dynamics import StepCoefficients
from ..ode_step import ode_step
from ..step_mean import step_mean
from . import _schedule, _step

_CPS_NOISE_LEVEL = 0.8  # MixGRPO's, where noise_level is None: its "cps" never looks at eta


def flow_grpo_step(
    model_output: Tensor,  # [B, *S], the velocity
    latents: Tensor,  # [B, *S]
    eta: float,
    sigmas: Tensor,  # [steps + 1], from 1 to 0
    index: int,
    prev_sample: Tensor | None,  # [B, *S]
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, *S], [B, *S], [B]
    """One step of Granular-GRPO: (prev_sample, pred_original_sample, log_prob).

    model_output, latents, prev_sample: float32, bfloat16, float16 or float64, each its own.
        Everything is computed and returned in float32 (float64 if an input is).
    eta: >= 0. At 0 the step is the ODE's and log_prob is NaN, as in the peer (noise is drawn and
        multiplied by 0, so that random states agree).
    sigmas: on the CPU, or on a GPU (read once for as long as it lives unchanged). sigmas[1] stands
        in for sigma = 1.
    index: an integer, or a tensor of one.
    prev_sample: None draws it, with noise in model_output's dtype from `generator` (a list: one a
        sample) or torch's own: the peer's seeds give the peer's noise. Given, it is scored and
        returned as it is; a generator beside it is an error, as in MixGRPO.

    Returns
        prev_sample: if drawn, differentiable through the mean.
        pred_original_sample: latents - sigma * model_output, differentiable in both.
        log_prob: nats an element (mean over S) of the detached prev_sample; differentiable in
            model_output and latents.

    Raises TypeError or ValueError naming the argument, its value and what was expected.

    Source: bcmi/Granular-GRPO, fastvideo/train_g2rpo_hps.py; Flow-GRPO's SDE (arXiv 2505.05470).
    """
    returned, _ = _flow_step(
        model_output, latents, eta, sigmas, index, prev_sample, generator, False, "flow", "eta"
    )
    return returned


def mix_grpo_step(
    model_output: Tensor,  # [B, *S], the velocity
    latents: Tensor,  # [B, *S]
    eta: float,
    sigmas: Tensor,  # [steps + 1], from 1 to 0
    index: int,
    prev_sample: Tensor | None,  # [B, *S]
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    determistic: bool = False,
    sde_type: str = "sde",
    noise_level: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # [B, *S], [B, *S], [B], [B, *S], []
    """MixGRPO's `flow_grpo_step`: as above, and then prev_sample_mean and the step's std.

    determistic: prev_sample becomes the ODE's step, whether it was given or drawn, and is scored
        under the SDE.
    sde_type: "sde", or "cps" (Flow-CPS), whose log_prob is -(prev_sample - mean)^2.
    noise_level: in the place of eta; None is eta for "sde" and 0.8 for "cps", as in MixGRPO.

    Returns (prev_sample, pred_original_sample, log_prob, prev_sample_mean, std):
        prev_sample_mean: differentiable in model_output and latents.
        std: of the step, sqrt(-dt) included, no dimensions.

    Source: Tencent-Hunyuan/MixGRPO, fastvideo/utils/sampling_utils.py; earlier versions have
    neither sde_type nor noise_level.
    """
    eta, name, dynamics = _noise(eta, sde_type, noise_level, "flow")
    returned, coefficients = _flow_step(
        model_output, latents, eta, sigmas, index, prev_sample, generator, determistic, dynamics,
        name,
    )  # fmt: skip
    mean = step_mean(model_output, latents, coefficients)
    return *returned, mean, coefficients.table[0, 2].clone()


def dance_grpo_step(
    model_output: Tensor,  # [B, *S], the velocity
    latents: Tensor,  # [B, *S]
    eta: float,
    sigmas: Tensor,  # [steps + 1], from 1 to 0
    index: int,
    prev_sample: Tensor | None,  # [B, *S]
    grpo: bool,
    sde_solver: bool,
    sde_type: str = "sde",
    noise_level: float | None = None,
) -> tuple[Tensor, ...]:  # [B, *S], [B, *S], [B]; or [B, *S], [B, *S]
    """MixGRPO's variant of DanceGRPO's step: (prev_sample, pred_original_sample, log_prob).

    As `flux_step`, with these differences, which are MixGRPO's: without sde_solver prev_sample is
    the mean itself and no noise is drawn; sde_type and noise_level as in `mix_grpo_step`; at
    eta = 0 log_prob is 0/0. log_prob has no constants.

    Source: Tencent-Hunyuan/MixGRPO, fastvideo/utils/sampling_utils.py.
    """
    _step.check_tensors(
        ("model_output", model_output), ("latents", latents), ("prev_sample", prev_sample)
    )
    eta, name, dynamics = _noise(eta, sde_type, noise_level, "dance")
    eta = _schedule.check_noise_level(name, eta, dynamics)
    row = _schedule.scheduled_row(sigmas, index, eta, dynamics)
    # "cps" keeps its own mean without the solver.
    drift = "ode" if dynamics == "dance" and not sde_solver else dynamics
    coefficients = _schedule.steps(
        [row], dynamics, latents.device, drift=drift, constant=False
    ).coefficients
    x0 = ode_step(model_output, latents, row.sigma, 0.0)
    if not grpo:
        return step_mean(model_output, latents, coefficients), x0
    if prev_sample is None and sde_solver:
        noise = torch.randn_like(latents, dtype=torch.result_type(latents, model_output))
        prev_sample, log_prob = _step.draw_next(model_output, latents, coefficients, noise)
        return prev_sample, x0, log_prob
    if prev_sample is None:
        prev_sample = step_mean(model_output, latents, coefficients)
    return prev_sample, x0, _step.log_prob(model_output, latents, prev_sample, coefficients)


def _noise(
    eta: float, sde_type: str, noise_level: float | None, dynamics: str
) -> tuple[float, str, str]:
    """The noise level in force, the argument it came from, and our name of the dynamics."""
    _schedule.check_choice("sde_type", sde_type, ("sde", "cps"))
    dynamics = dynamics if sde_type == "sde" else "cps"
    if noise_level is not None:
        return noise_level, "noise_level", dynamics
    return (eta if sde_type == "sde" else _CPS_NOISE_LEVEL), "eta", dynamics


def _flow_step(
    model_output, latents, eta, sigmas, index, prev_sample, generator, determistic, dynamics, name
) -> tuple[tuple[Tensor, Tensor, Tensor], StepCoefficients]:
    _step.check_tensors(
        ("model_output", model_output), ("latents", latents), ("prev_sample", prev_sample)
    )
    _step.refuse_both(prev_sample, generator)
    eta = _schedule.check_noise_level(name, eta, dynamics)
    row = _schedule.scheduled_row(sigmas, index, eta, dynamics)
    coefficients = _schedule.steps([row], dynamics, latents.device).coefficients
    log_prob = None
    if prev_sample is None:
        # Drawn even where it is not used, to leave the generator where the peer leaves it.
        noise = _step.randn(model_output.shape, generator, latents.device, model_output.dtype)
        if not determistic:
            prev_sample, log_prob = _step.draw_next(model_output, latents, coefficients, noise)
    if determistic:
        prev_sample = _step.ode_mean(model_output, latents, [row])
    if log_prob is None:
        log_prob = _step.log_prob(model_output, latents, prev_sample, coefficients)
    x0 = ode_step(model_output, latents, row.sigma, 0.0)
    return (prev_sample, x0, log_prob), coefficients
