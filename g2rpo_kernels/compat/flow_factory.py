"""The step of Flow-Factory's Euler scheduler on our ops: Flow-SDE, Dance-SDE, CPS and ODE.

At the end of the peer's class FlowMatchEulerDiscreteSDEScheduler, inside it:

    from g2rpo_kernels.compat import flow_factory_step as step
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..dynamics import check_number
from ..step_mean import step_mean
from . import _schedule, _step

DYNAMICS_TYPES = {"Flow-SDE": "flow", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}


@dataclass
class SDESchedulerOutput:
    """One step, with Flow-Factory's names. None: not asked for.

    Like diffusers' BaseOutput, it can be read by attribute, by name or by the number of a field
    that is not None.
    """

    next_latents: Tensor | None = None  # [B, *S]
    next_latents_mean: Tensor | None = None  # [B, *S]
    std_dev_t: Tensor | None = None  # [B, 1, ...]
    dt: Tensor | None = None  # [B, 1, ...], negative
    log_prob: Tensor | None = None  # [B]
    noise_pred: Tensor | None = None  # [B, *S]

    def to_dict(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: dict) -> SDESchedulerOutput:
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in names})

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(value for value in self.to_dict().values() if value is not None)

    def __getitem__(self, key: str | int) -> Tensor:
        return self.to_dict()[key] if isinstance(key, str) else self.to_tuple()[key]


_FIELDS = tuple(field.name for field in fields(SDESchedulerOutput))


def step(
    scheduler: object,  # Flow-Factory's FlowMatchEulerDiscreteSDEScheduler, or one like it
    noise_pred: Tensor,  # [B, *S], the velocity
    timestep: Tensor | float,  # [B] or one
    latents: Tensor,  # [B, *S]
    next_latents: Tensor | None = None,  # [B, *S]
    timestep_next: Tensor | float | None = None,  # [B] or one
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise_level: Tensor | float | None = None,  # [B] or one
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] = _FIELDS,
    dynamics_type: str | None = None,
    sigma_max: float | None = None,
) -> SDESchedulerOutput | tuple:
    """One step from `timestep` to the next, or to `timestep_next`.

    scheduler: has sigmas; index_for_timestep() unless timestep_next is given; is_eval,
        dynamics_type unless it is given; noise_level and current_sde_steps unless noise_level is.
    noise_pred, latents, next_latents: float32, bfloat16, float16 or float64; everything is computed
        and returned in float32.
    timestep, timestep_next: 1000 sigma. Without timestep_next, timestep is one of
        scheduler.timesteps and the step leads to the following sigma; a Python or CPU integer is
        taken for an index, with a warning, as in Flow-Factory. On a GPU both are read once a call.
    next_latents: None draws them, with noise from `generator` (a list: one a sample) or torch's
        own; given, they are scored and returned as float32.
    noise_level: >= 0, at most 1 for "CPS", one or one a sample. None: scheduler.noise_level at the
        steps in scheduler.current_sde_steps, 0 at the others. At 0 (and while scheduler.is_eval)
        a sample's step is the ODE's; its log_prob is then NaN, but for "CPS".
    return_kwargs: fields of the output to fill. An unknown one is warned of.
    dynamics_type: "Flow-SDE", "Dance-SDE", "CPS" or "ODE"; None is scheduler.dynamics_type. "ODE"
        draws nothing and has no log-probability: it is zero, as in Flow-Factory.
    sigma_max: stands in for sigma = 1 in "Flow-SDE"; None is scheduler.sigmas[1].

    Returns SDESchedulerOutput or, without return_dict, the tuple (next_latents, next_latents_mean,
    noise_pred, log_prob, std_dev_t, dt); log_prob is None without compute_log_prob.
        next_latents (if drawn) and next_latents_mean: differentiable in noise_pred and latents.
        log_prob: nats an element (mean over S) of the detached next_latents; differentiable in
            noise_pred and latents. "CPS": -(next_latents - mean)^2, without constants.
        std_dev_t: "Flow-SDE": noise_level * sqrt(sigma / (1 - sigma)), without sqrt(-dt);
            "Dance-SDE" and "CPS": the standard deviation of the step; "ODE": 0.

    Raises TypeError or ValueError naming the argument, its value and what was expected.

    Source: X-GenGroup/Flow-Factory, src/flow_factory/scheduler/flow_match_euler_discrete.py. Its
    UniPC scheduler's step rounds drawn latents to their storage dtype and is not this one.
    """
    _step.check_tensors(
        ("noise_pred", noise_pred), ("latents", latents), ("next_latents", next_latents)
    )
    if dynamics_type is None:
        dynamics_type = _schedule.attribute(scheduler, "dynamics_type")
    _schedule.check_choice("dynamics_type", dynamics_type, DYNAMICS_TYPES)
    dynamics = DYNAMICS_TYPES[dynamics_type]
    if not isinstance(return_kwargs, Sequence) or isinstance(return_kwargs, str):
        raise TypeError(f"return_kwargs is {return_kwargs!r}; expected a list of field names")
    for unknown in set(return_kwargs) - set(_FIELDS):
        warnings.warn(f"return_kwargs has {unknown!r}; expected some of {_FIELDS}", stacklevel=2)
    rows = _rows(scheduler, dynamics, len(latents), timestep, timestep_next, noise_level, sigma_max)
    steps = _schedule.steps(rows, dynamics, latents.device)
    coefficients = steps.coefficients
    noise_pred, latents = noise_pred.float(), latents.float()
    next_latents = None if next_latents is None else next_latents.float()
    wanted = set(_FIELDS) if not return_dict else set(return_kwargs)
    made: dict[str, Tensor | None] = {"noise_pred": noise_pred, "log_prob": None}
    if "next_latents_mean" in wanted or (dynamics == "ode" and next_latents is None):
        made["next_latents_mean"] = step_mean(noise_pred, latents, coefficients)
    if dynamics == "ode":
        made["next_latents"] = made["next_latents_mean"] if next_latents is None else next_latents
        if compute_log_prob:
            made["log_prob"] = torch.zeros(len(latents), device=latents.device)
    elif next_latents is None:
        noise = _step.randn(noise_pred.shape, generator, latents.device, torch.float32)
        made["next_latents"], log_prob = _step.draw_next(noise_pred, latents, coefficients, noise)
        made["log_prob"] = log_prob if compute_log_prob else None
    else:
        made["next_latents"] = next_latents
        if compute_log_prob:
            made["log_prob"] = _step.log_prob(noise_pred, latents, next_latents, coefficients)
    std = _step.step_std(steps) if dynamics == "flow" else coefficients.table[:, 2]
    made["std_dev_t"] = _step.per_row(std, len(latents), latents)
    made["dt"] = _step.per_row(steps.dt, len(latents), latents)
    if return_dict:
        return SDESchedulerOutput(**{name: made[name] for name in _FIELDS if name in wanted})
    order = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    return tuple(made[name] for name in order)


def _rows(
    scheduler, dynamics, count, timestep, timestep_next, noise_level, sigma_max
) -> list[_schedule.Row]:
    """Each sample's step; all numbers rounded to float32 where Flow-Factory rounds them."""
    sigmas = _schedule.check_sigmas("scheduler.sigmas", _schedule.attribute(scheduler, "sigmas"))
    if timestep_next is None:
        indices = [
            _schedule.check_index("the step of timestep", index, sigmas)
            for index in _indices(scheduler, timestep, count)
        ]
        sigma, sigma_next = [sigmas[i] for i in indices], [sigmas[i + 1] for i in indices]
        name = "scheduler.sigmas"
    else:
        sigma = _numbers("timestep", timestep, count, per=1000)
        sigma_next = _numbers("timestep_next", timestep_next, count, per=1000)
        name = "timestep and timestep_next"
    if dynamics == "ode" or _schedule.attribute(scheduler, "is_eval"):
        eta = [0.0]
    elif noise_level is not None:
        eta = _numbers("noise_level", noise_level, count)
    else:
        missing = [value for value in sigma if value not in sigmas]
        if missing:
            raise ValueError(
                f"timestep means sigma {missing[0]}; expected one of scheduler.sigmas, or a "
                "noise_level beside it"
            )
        level = check_number("scheduler.noise_level", _schedule.attribute(scheduler, "noise_level"))
        chosen = torch.as_tensor(_schedule.attribute(scheduler, "current_sde_steps"))
        noisy = set(_schedule.on_host(chosen).tolist())
        eta = [level if sigmas.index(value) in noisy else 0.0 for value in sigma]
    for value in eta:
        _schedule.check_noise_level("noise_level", value, dynamics)
    second = check_number("sigma_max", sigma_max or sigmas[1])
    sigma, sigma_next, eta = (
        values * count if len(values) == 1 else values for values in (sigma, sigma_next, eta)
    )
    return [
        _schedule.make_row(name, *numbers, second, dynamics)
        for numbers in zip(sigma, sigma_next, eta, strict=True)
    ]


def _indices(scheduler, timestep, count) -> list[int]:
    whole = isinstance(timestep, Tensor) and timestep.dtype in (torch.int32, torch.int64)
    if isinstance(timestep, int) or (whole and timestep.device.type == "cpu"):
        warnings.warn(
            f"timestep is {timestep}, an integer, and is taken for the index of a step; expected "
            "one of scheduler.timesteps",
            stacklevel=4,
        )
        return [timestep]
    return _schedule.timestep_indices(scheduler, timestep, count)


def _numbers(name: str, value: Tensor | float | Sequence, count: int, per: int = 1) -> list[float]:
    """`value / per` as float32 numbers, one or `count`."""
    if not isinstance(value, Tensor):
        given = list(value) if isinstance(value, (list, tuple)) else [value]
        value = torch.tensor([check_number(name, number) for number in given], dtype=torch.float64)
    if value.ndim > 1 or value.numel() not in (1, count) or value.dtype.is_complex:
        raise ValueError(
            f"{name} has dtype {value.dtype} and shape {tuple(value.shape)}; expected a number or "
            f"real numbers [{count}], one a sample"
        )
    return (value.detach().cpu() / per).float().reshape(-1).tolist()
