"""Wrong input to any compat function: the error names the argument, its value, what was expected.

One row a mistake: the function, what to change in good arguments, the error's type and the three
things its message must say. Good arguments are a batch [2, 3, 4] at step 4 of 16.
"""

from __future__ import annotations

import math

import pytest
import torch
from peers import Scheduler, schedule

from g2rpo_kernels import compat

SIGMAS = schedule()
GOOD = torch.ones(2, 3, 4)
META = GOOD.to("meta")
GENERATOR = torch.Generator()
EARLY = SIGMAS.clone()
EARLY[1] = 1.0  # nothing to put in the place of sigma = 1

FLOW_GRPO = {
    "scheduler": Scheduler(SIGMAS), "model_output": GOOD, "timestep": SIGMAS[4:5] * 1000,
    "sample": GOOD,
}  # fmt: skip
ARRAYS = {
    "model_output": GOOD, "latents": GOOD, "eta": 0.7, "sigmas": SIGMAS, "index": 4,
    "prev_sample": None,
}  # fmt: skip
SOLVER = {"grpo": True, "sde_solver": True}
FLOW_FACTORY = {
    "scheduler": Scheduler(SIGMAS), "noise_pred": GOOD, "timestep": SIGMAS[4:5] * 1000,
    "latents": GOOD,
}  # fmt: skip
ARGUMENTS = {
    "sde_step_with_logprob": FLOW_GRPO,
    "flux_step": {**ARRAYS, **SOLVER},
    "dance_grpo_step": {**ARRAYS, **SOLVER},
    "flow_grpo_step": ARRAYS,
    "mix_grpo_step": ARRAYS,
    "flow_factory_step": FLOW_FACTORY,
}
# What each function calls its velocity, latents and next latents.
TENSORS = {
    "sde_step_with_logprob": ("model_output", "sample", "prev_sample"),
    "flow_factory_step": ("noise_pred", "latents", "next_latents"),
    **dict.fromkeys(
        ("flux_step", "dance_grpo_step", "flow_grpo_step", "mix_grpo_step"),
        ("model_output", "latents", "prev_sample"),
    ),
}
WITH_GENERATOR = ("sde_step_with_logprob", "flow_grpo_step", "mix_grpo_step", "flow_factory_step")

# function, changed arguments, error, (argument, value, expectation)
Mistake = tuple[str, dict, type[Exception], tuple[str, str, str]]
MISTAKES: list[Mistake] = []
for function, (velocity, latents, x_next) in TENSORS.items():
    MISTAKES += [
        (function, {velocity: 1.0}, TypeError, (velocity, "float", "torch.Tensor")),
        (function, {velocity: GOOD.int()}, TypeError, (velocity, "torch.int32", "float32")),
        (function, {velocity: GOOD.to(torch.float8_e4m3fn)}, TypeError,
         (velocity, "float8_e4m3fn", "bfloat16")),
        (function, {velocity: torch.ones(4)}, ValueError, (velocity, "(4,)", "[B, *S]")),
        (function, {velocity: torch.ones(2, 0), latents: torch.ones(2, 0)}, ValueError,
         (velocity, "(2, 0)", "at least one element a sample")),
        (function, {latents: None}, TypeError, (latents, "NoneType", "torch.Tensor")),
        (function, {latents: GOOD.to(torch.complex64)}, TypeError,
         (latents, "complex64", "float32")),
        (function, {latents: torch.ones(2, 4, 3)}, ValueError, (latents, "(2, 4, 3)", "(2, 3, 4)")),
        (function, {latents: META}, ValueError,
         (latents, "meta", f"cpu, the device of {velocity}")),
        (function, {x_next: torch.ones(2, 5, 3, 4)}, ValueError,
         (x_next, "(2, 5, 3, 4)", "(2, 3, 4)")),
        (function, {x_next: META}, ValueError, (x_next, "meta", f"cpu, the device of {velocity}")),
        (function, {x_next: GOOD.long()}, TypeError, (x_next, "int64", "float32")),
    ]  # fmt: skip
for function in ("flux_step", "dance_grpo_step", "flow_grpo_step", "mix_grpo_step"):
    MISTAKES += [
        (function, {"eta": "0.7"}, TypeError, ("eta", "'0.7'", "a number")),
        (function, {"eta": -0.1}, ValueError, ("eta", "-0.1", ">= 0")),
        (function, {"eta": math.nan}, ValueError, ("eta", "nan", "finite")),
        (function, {"eta": math.inf}, ValueError, ("eta", "inf", "finite")),
        (function, {"index": 1.0}, TypeError, ("index", "1.0", "an integer")),
        (function, {"index": True}, TypeError, ("index", "True", "an integer")),
        (function, {"index": torch.tensor(1.0)}, TypeError, ("index", "1.", "an integer")),
        (function, {"index": 16}, ValueError, ("index", "16", "0 to 15")),
        (function, {"index": -1}, ValueError, ("index", "-1", "0 to 15")),
        (function, {"sigmas": SIGMAS.tolist()}, TypeError, ("sigmas", "list", "torch.Tensor")),
        (function, {"sigmas": SIGMAS.long()}, TypeError, ("sigmas", "int64", "float32")),
        (function, {"sigmas": SIGMAS[None]}, ValueError, ("sigmas", "(1, 17)", "[steps + 1]")),
        (function, {"sigmas": SIGMAS[:1]}, ValueError, ("sigmas", "(1,)", "at least two")),
        (function, {"sigmas": SIGMAS.flip(0)}, ValueError, ("sigmas", "sigma 0.5", "sigma_next <")),
        (function, {"sigmas": SIGMAS * 1000}, ValueError, ("sigmas", "sigma 900", "<= 1")),
    ]  # fmt: skip
for function in ("flow_grpo_step", "mix_grpo_step"):
    MISTAKES += [
        (function, {"sigmas": EARLY, "index": 0}, ValueError, ("sigmas", "1.0", "sigma_next <")),
    ]  # fmt: skip
for function in ("dance_grpo_step", "mix_grpo_step"):
    MISTAKES += [
        (function, {"sde_type": "ode"}, ValueError, ("sde_type", "'ode'", "['cps', 'sde']")),
        (function, {"sde_type": "cps", "noise_level": 1.5}, ValueError,
         ("noise_level", "1.5", "[0, 1]")),
        (function, {"noise_level": -1}, ValueError, ("noise_level", "-1", ">= 0")),
    ]  # fmt: skip
for function in ("sde_step_with_logprob", "flow_factory_step"):
    MISTAKES += [
        (function, {"scheduler": object()}, TypeError, ("scheduler", "object", "Flow")),
        (function, {"scheduler": Scheduler(SIGMAS.view(1, -1))}, ValueError,
         ("scheduler.sigmas", "(1, 17)", "[steps + 1]")),
        (function, {"timestep": torch.ones(2, 1)}, ValueError, ("timestep", "(2, 1)", "[B]")),
        (function, {"timestep": SIGMAS[:3] * 1000}, ValueError, ("timestep", "3 values", "1 or 2")),
        (function, {"timestep": 123.0}, ValueError, ("timestep", "123.0", "scheduler.timesteps")),
        (function, {"timestep": "1000"}, TypeError, ("timestep", "'1000'", "a number")),
        (function, {"timestep": ["a", 1.0]}, TypeError, ("timestep", "'a'", "a number")),
        (function, {"noise_level": -0.5}, ValueError, ("noise_level", "-0.5", ">= 0")),
        (function, {"noise_level": "0.5"}, TypeError, ("noise_level", "'0.5'", "a number")),
    ]  # fmt: skip
for function in WITH_GENERATOR:
    MISTAKES += [
        (function, {"generator": 3}, TypeError, ("generator", "int", "torch.Generator")),
        (function, {"generator": [GENERATOR] * 3}, ValueError, ("generator", "3", "1 or 2")),
    ]  # fmt: skip
for function in WITH_GENERATOR[:3]:
    MISTAKES += [
        (function, {"generator": GENERATOR, "prev_sample": GOOD}, ValueError,
         ("generator", "prev_sample", "one of them")),
    ]  # fmt: skip
MISTAKES += [
    ("flux_step", {"eta": 0}, ValueError, ("eta", "0", "> 0 with grpo=True")),
    ("sde_step_with_logprob", {"sde_type": "dance"}, ValueError,
     ("sde_type", "'dance'", "['cps', 'sde']")),
    ("sde_step_with_logprob", {"sde_type": "cps", "noise_level": 1.1}, ValueError,
     ("noise_level", "1.1", "[0, 1]")),
    ("flow_factory_step", {"dynamics_type": "Flow-ODE"}, ValueError,
     ("dynamics_type", "'Flow-ODE'", "'Flow-SDE'")),
    ("flow_factory_step", {"dynamics_type": "CPS", "noise_level": 2}, ValueError,
     ("noise_level", "2", "[0, 1]")),
    ("flow_factory_step", {"noise_level": [0.7] * 3}, ValueError,
     ("noise_level", "(3,)", "[2], one a sample")),
    ("flow_factory_step", {"return_kwargs": "dt"}, TypeError, ("return_kwargs", "'dt'", "a list")),
    ("flow_factory_step", {"timestep_next": "0"}, TypeError, ("timestep_next", "'0'", "a number")),
    ("flow_factory_step", {"timestep_next": 990.0}, ValueError,
     ("timestep and timestep_next", "0.9", "sigma_next < sigma")),
    ("flow_factory_step", {"timestep": 123.0, "timestep_next": 100.0}, ValueError,
     ("timestep", "0.123", "noise_level beside it")),
    ("flow_factory_step", {"timestep": 1000.0, "sigma_max": 1.5}, ValueError,
     ("sigma = 1", "1.5", "(0, 1)")),
    ("flow_factory_step", {"sigma_max": "1"}, TypeError, ("sigma_max", "'1'", "a number")),
]  # fmt: skip


def name_of(mistake: Mistake) -> str:
    function, change, _, (_, value, _) = mistake
    return f"{function}-{'-'.join(change)}-{value}"


@pytest.mark.parametrize("mistake", MISTAKES, ids=name_of)
def test_wrong_input(mistake: Mistake) -> None:
    function, change, error, said = mistake
    with pytest.raises(error) as caught:
        getattr(compat, function)(**{**ARGUMENTS[function], **change})
    assert caught.type is error
    for words in said:
        assert words in str(caught.value), str(caught.value)


@pytest.mark.parametrize("function", ARGUMENTS)
def test_good_arguments_are_good(function: str) -> None:
    """Or the mistakes above would prove nothing."""
    getattr(compat, function)(**ARGUMENTS[function])


def test_every_function_is_tried() -> None:
    assert set(ARGUMENTS) == set(compat.__all__) - {"SDESchedulerOutput"}
