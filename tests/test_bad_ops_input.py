"""Wrong input to any public op: the error names the argument, what it is and what was expected.

One row a mistake: the op, what to change in good arguments, the error's type and the three things
its message must say. Good arguments are the "primes" case: P = 3, G = 5, S = (7, 11).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cases
import pytest
import torch

import g2rpo_kernels as gk

INT32_SEEDS = torch.zeros(3, 5, dtype=torch.int32)
SEEDS = torch.zeros(3, 5, dtype=torch.int64)
ONE_STEP = gk.step_coefficients(0.8, 0.7)
TWO_STEPS = gk.step_coefficients(torch.tensor([0.8, 0.7]), torch.tensor([0.7, 0.6]))
ODE = gk.step_coefficients(0.8, 0.7, dynamics="ode")


def rows(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def grad(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


META = rows(3, 7, 11, device="meta")
STEP = ("step_mean", "ode_step", "sde_step", "branch_log_prob", "policy_loss")
WITH_TABLE = ("step_mean", "sde_step", "branch_log_prob", "policy_loss")
WITH_X_NEXT = ("branch_log_prob", "policy_loss")
PER_BRANCH = ("old_log_prob", "advantages")
OTHER_VELOCITY = ("reference_velocity", "old_velocity")

# op, changed arguments, error, (argument, value, expectation)
Mistake = tuple[str, dict, type[Exception], tuple[str, str, str]]
MISTAKES: list[Mistake] = []
for op in STEP:
    MISTAKES += [
        (op, {"velocity": 1.0}, TypeError, ("velocity", "float", "torch.Tensor")),
        (op, {"velocity": rows(3, 7, 11, dtype=torch.int32)}, TypeError,
         ("velocity", "torch.int32", "float32, bfloat16, float16 or float64")),
        (op, {"velocity": rows()}, ValueError, ("velocity", "no dimensions", "[P, *S]")),
        (op, {"velocity": rows(3, 0, 11), "latents": rows(3, 0, 11)}, ValueError,
         ("velocity", "(3, 0, 11)", "at least one element a row")),
        (op, {"latents": None}, TypeError, ("latents", "NoneType", "torch.Tensor")),
        (op, {"latents": rows(3, 11, 7)}, ValueError, ("latents", "(3, 11, 7)", "(3, 7, 11)")),
        (op, {"latents": rows(1, 7, 11)}, ValueError, ("latents", "(1, 7, 11)", "(3, 7, 11)")),
        (op, {"latents": rows(3, 7, 11, dtype=torch.complex64)}, TypeError,
         ("latents", "torch.complex64", "float32")),
        (op, {"latents": META}, ValueError, ("latents", "meta", "cpu, the device of velocity")),
    ]  # fmt: skip
for op in WITH_TABLE:
    MISTAKES += [
        (op, {"coefficients": ONE_STEP.table}, TypeError,
         ("coefficients", "Tensor", "StepCoefficients")),
        (op, {"coefficients": TWO_STEPS}, ValueError,
         ("coefficients.table", "2 rows", "expected 1 or 3")),
        (op, {"coefficients": ONE_STEP.to("meta")}, ValueError,
         ("coefficients.table", "meta", "coefficients.to(velocity.device)")),
        (op, {"coefficients": gk.StepCoefficients(rows(3, 4), "flow")}, ValueError,
         ("coefficients.table", "(3, 4)", "[P, 5]")),
        (op, {"coefficients": gk.StepCoefficients(rows(5), "flow")}, ValueError,
         ("coefficients.table", "(5,)", "[P, 5]")),
        (op, {"coefficients": gk.StepCoefficients(ONE_STEP.table.double(), "flow")}, ValueError,
         ("coefficients.table", "torch.float64", "torch.float32")),
        (op, {"coefficients": gk.StepCoefficients([1.0], "flow")}, TypeError,
         ("coefficients.table", "list", "torch.Tensor")),
    ]  # fmt: skip
for op in WITH_X_NEXT:
    MISTAKES += [
        (op, {"x_next": [1.0]}, TypeError, ("x_next", "list", "torch.Tensor")),
        (op, {"x_next": rows(3, 5, 7, 11, dtype=torch.int64)}, TypeError,
         ("x_next", "torch.int64", "float32")),
        (op, {"x_next": rows(3, 5, 11, 7)}, ValueError,
         ("x_next", "(3, 5, 11, 7)", "[P, G, *S] or [P, *S] with [P, *S] = (3, 7, 11)")),
        (op, {"x_next": rows(5, 3, 7, 11)}, ValueError,
         ("x_next", "(5, 3, 7, 11)", "(3, 7, 11)")),
        (op, {"x_next": rows(3, 77)}, ValueError, ("x_next", "(3, 77)", "(3, 7, 11)")),
        (op, {"x_next": rows(3, 5, 7, 11, device="meta")}, ValueError,
         ("x_next", "meta", "cpu, the device of velocity")),
        (op, {"coefficients": ODE}, ValueError,
         ("coefficients.dynamics", "'ode'", "'flow', 'dance', 'cps', 'dpm1'")),
        (op, {"x_next": grad(3, 5, 7, 11)}, ValueError, ("x_next", "requires a gradient", op)),
        (op, {"latents": grad(3, 7, 11)}, ValueError, ("latents", "requires a gradient", op)),
    ]  # fmt: skip
for name in PER_BRANCH:
    MISTAKES += [
        ("policy_loss", {name: 1.0}, TypeError, (name, "float", "torch.Tensor")),
        ("policy_loss", {name: rows(3, 5, dtype=torch.int64)}, TypeError,
         (name, "torch.int64", "float32")),
        ("policy_loss", {name: rows(5, 3)}, ValueError, (name, "(5, 3)", "(3, 5)")),
        ("policy_loss", {name: rows(3)}, ValueError, (name, "(3,)", "(3, 5)")),
        ("policy_loss", {name: rows(3, 5, device="meta")}, ValueError, (name, "meta", "cpu")),
        ("policy_loss", {name: grad(3, 5)}, ValueError,
         (name, "requires a gradient", "only velocity is differentiable")),
    ]  # fmt: skip
for name in OTHER_VELOCITY:
    MISTAKES += [
        ("policy_loss", {name: 1.0}, TypeError, (name, "float", "torch.Tensor")),
        ("policy_loss", {name: rows(1, 7, 11)}, ValueError, (name, "(1, 7, 11)", "(3, 7, 11)")),
        ("policy_loss", {name: META}, ValueError, (name, "meta", "cpu")),
        ("policy_loss", {name: grad(3, 7, 11)}, ValueError,
         (name, "requires a gradient", "only velocity is differentiable")),
    ]  # fmt: skip
for name, value in (("clip_range", 0.0), ("clip_range", math.nan), ("advantage_clip", -1)):
    MISTAKES.append(
        ("policy_loss", {name: value}, ValueError, (name, str(value), "expected a number > 0"))
    )
for name in ("clip_range", "advantage_clip", "kl_weight"):
    MISTAKES.append(("policy_loss", {name: "0.1"}, TypeError, (name, "'0.1'", "expected a number")))
MISTAKES += [
    ("policy_loss", {"kl_weight": -0.1}, ValueError, ("kl_weight", "-0.1", "a number >= 0")),
    ("policy_loss", {"kl_weight": 0.1}, ValueError,
     ("kl_weight", "0.1 without reference_velocity", "expected both")),
    ("policy_loss", {"x_next": rows(3, 0, 7, 11)}, ValueError,
     ("x_next", "(3, 0, 7, 11)", "at least one row and one branch")),
    ("policy_loss", {"velocity": rows(0, 7, 11), "latents": rows(0, 7, 11),
                     "x_next": rows(0, 5, 7, 11)}, ValueError,
     ("x_next", "(0, 5, 7, 11)", "at least one row and one branch")),
    # sde_step
    ("sde_step", {"noise": None}, ValueError, ("seeds and noise", "neither", "exactly one")),
    ("sde_step", {"seeds": SEEDS}, ValueError, ("seeds and noise", "both", "exactly one")),
    ("sde_step", {"noise": None, "seeds": INT32_SEEDS}, TypeError,
     ("seeds", "torch.int32", "torch.int64")),
    ("sde_step", {"noise": None, "seeds": 7}, TypeError, ("seeds", "int", "torch.int64")),
    ("sde_step", {"noise": None, "seeds": SEEDS[:2]}, ValueError, ("seeds", "(2, 5)", "P = 3")),
    ("sde_step", {"noise": None, "seeds": SEEDS[..., None]}, ValueError,
     ("seeds", "(3, 5, 1)", "[P, G] or [P]")),
    ("sde_step", {"noise": None, "seeds": SEEDS[0, 0]}, ValueError,
     ("seeds", "()", "[P, G] or [P]")),
    ("sde_step", {"noise": None, "seeds": SEEDS.to("meta")}, ValueError, ("seeds", "meta", "cpu")),
    ("sde_step", {"noise": rows(3, 5, 7)}, ValueError, ("noise", "(3, 5, 7)", "(3, 7, 11)")),
    ("sde_step", {"noise": rows(3, 7, 11, dtype=torch.int64)}, TypeError,
     ("noise", "torch.int64", "float32")),
    ("sde_step", {"noise": grad(3, 7, 11)}, ValueError,
     ("noise", "requires a gradient", "no_grad")),
    ("sde_step", {"velocity": grad(3, 7, 11)}, ValueError,
     ("velocity", "requires a gradient", "branch_log_prob or policy_loss")),
    ("sde_step", {"latents": grad(3, 7, 11)}, ValueError,
     ("latents", "requires a gradient", "branch_log_prob or policy_loss")),
    # ode_step
    ("ode_step", {"sigma": "high"}, TypeError, ("sigma", "'high'", "expected a number")),
    ("ode_step", {"sigma": 1.5}, ValueError, ("sigma", "1.5", "in [0, 1]")),
    ("ode_step", {"sigma": math.nan}, ValueError, ("sigma", "nan", "in [0, 1]")),
    ("ode_step", {"sigma_next": -0.1}, ValueError, ("sigma_next", "-0.1", "in [0, 1]")),
    ("ode_step", {"sigma": 0.4, "sigma_next": 0.5}, ValueError,
     ("sigma is 0.4", "sigma_next is 0.5", "0 <= sigma_next < sigma <= 1")),
    ("ode_step", {"sigma": 0.5, "sigma_next": 0.5}, ValueError,
     ("sigma is 0.5", "sigma_next is 0.5", "0 <= sigma_next < sigma <= 1")),
    ("ode_step", {"sigma": rows(2)}, ValueError, ("sigma", "(2,)", "[1] or [3]")),
    ("ode_step", {"sigma_next": rows()}, ValueError, ("sigma_next", "()", "[1] or [3]")),
    ("ode_step", {"sigma": rows(3, 1)}, ValueError, ("sigma", "(3, 1)", "[1] or [3]")),
    ("ode_step", {"sigma": torch.tensor([1])}, TypeError, ("sigma", "torch.int64", "float32")),
    ("ode_step", {"sigma": rows(3, device="meta")}, ValueError, ("sigma", "meta", "cpu")),
    ("ode_step", {"sigma": grad(3)}, ValueError,
     ("sigma", "requires a gradient", "sigmas are constants")),
    # normal
    ("normal", {"seeds": [1, 2]}, TypeError, ("seeds", "list", "torch.int64")),
    ("normal", {"seeds": rows(3)}, TypeError, ("seeds", "torch.float32", "torch.int64")),
    ("normal", {"shape": (3, -1)}, ValueError, ("shape", "(3, -1)", "0 or more")),
    ("normal", {"shape": 5}, TypeError, ("shape", "5", "a sequence of integers")),
    ("normal", {"shape": (2.5,)}, TypeError, ("shape", "2.5", "a sequence of integers")),
    # group_advantages; the good rewards are [2, 3, 15, 5]
    ("group_advantages", {"rewards": [1.0]}, TypeError, ("rewards", "list", "torch.Tensor")),
    ("group_advantages", {"rewards": rows(2, 3, 15, 5, dtype=torch.int64)}, TypeError,
     ("rewards", "torch.int64", "float32")),
    ("group_advantages", {"rewards": rows(15, 5)}, ValueError,
     ("rewards", "(15, 5)", "[R, J, N, K]")),
    ("group_advantages", {"rewards": rows(0, 3, 15, 5)}, ValueError,
     ("rewards", "(0, 3, 15, 5)", "at least one reward model")),
    ("group_advantages", {"rewards": rows(2, 0, 15, 5)}, ValueError,
     ("rewards", "(2, 0, 15, 5)", "one granularity")),
    ("group_advantages", {"rewards": grad(2, 3, 15, 5)}, ValueError,
     ("rewards", "requires a gradient", "constants of the policy loss")),
    ("group_advantages", {"group_size": 4}, ValueError,
     ("group_size", "4, which does not divide", "N = 15")),
    ("group_advantages", {"group_size": 1}, ValueError,
     ("group_size", "1", "an integer of at least 2")),
    ("group_advantages", {"group_size": 5.0}, ValueError, ("group_size", "5.0", "an integer")),
    ("group_advantages", {"group_size": True}, ValueError, ("group_size", "True", "an integer")),
    ("group_advantages", {"weights": [1.0]}, ValueError, ("weights", "1 numbers", "expected 2")),
    ("group_advantages", {"weights": 2.0}, TypeError, ("weights", "float", "a sequence")),
    ("group_advantages", {"weights": [1.0, "2"]}, TypeError, ("weights[1]", "'2'", "a number")),
    ("group_advantages", {"weights": [1.0, math.nan]}, ValueError, ("weights", "nan", "finite")),
    ("group_advantages", {"eps": -1e-8}, ValueError, ("eps", "-1e-08", "a number >= 0")),
    ("group_advantages", {"eps": math.nan}, ValueError, ("eps", "nan", "a number >= 0")),
    ("group_advantages", {"eps": None}, TypeError, ("eps", "None", "a number")),
]  # fmt: skip


def refused(call: Callable, error: type[Exception], says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    missing = [part for part in says if part not in str(caught.value)]
    assert not missing, f"{caught.value!s} does not say {missing}"


@pytest.mark.parametrize(
    ("op", "changes", "error", "says"),
    MISTAKES,
    ids=[f"{op}-{'-'.join(changes)}-{says[1]}" for op, changes, _, says in MISTAKES],
)
def test_mistake(op: str, changes: dict, error: type[Exception], says: tuple[str, ...]) -> None:
    arguments = {**cases.inputs(op, "primes"), **changes}
    refused(lambda: getattr(gk, op)(**arguments), error, says)


IN_ROW_1 = (torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.6]))
RANGE = "0 <= sigma_next < sigma <= 1"
BAD_COEFFICIENTS: list[tuple[dict, type[Exception], tuple[str, ...]]] = [
    ({"sigma": 0.5, "sigma_next": 0.5}, ValueError, ("sigma is 0.5", "sigma_next is 0.5", RANGE)),
    ({"sigma": 0.4, "sigma_next": 0.5}, ValueError, ("sigma is 0.4", "sigma_next is 0.5", RANGE)),
    ({"sigma": 1.1}, ValueError, ("sigma is 1.1", RANGE)),
    ({"sigma_next": -0.1}, ValueError, ("sigma_next is -0.1", RANGE)),
    ({"sigma": math.nan}, ValueError, ("sigma is nan", RANGE)),
    (
        {"sigma": IN_ROW_1[0], "sigma_next": IN_ROW_1[1]},
        ValueError,
        ("sigma is 0.5", "row 1", RANGE),
    ),
    ({"sigma": rows(3), "sigma_next": rows(2)}, ValueError, ("sigma_next", "2 rows", "expected 3")),
    ({"sigma": rows(3, 1)}, ValueError, ("sigma", "(3, 1)", "[P] or a number")),
    ({"sigma": rows(3, device="meta")}, ValueError, ("sigma", "meta", "a CPU tensor")),
    ({"sigma": grad(3)}, ValueError, ("sigma", "requires a gradient", "sigma.detach()")),
    ({"sigma": "1"}, TypeError, ("sigma", "'1'", "a number")),
    ({"sigma_next": None}, TypeError, ("sigma_next", "None", "a number")),
    ({"sigma": True}, TypeError, ("sigma", "True", "a number")),
    ({"sigma": torch.tensor(True)}, TypeError, ("sigma", "torch.bool", "real numbers")),
    ({"dynamics": "euler"}, ValueError, ("dynamics", "'euler'", "'dance'", "'flow'", "'dpm1'")),
    ({"dynamics": ["flow"]}, ValueError, ("dynamics", "['flow']", "expected one of")),
    ({"eta": 0.0}, ValueError, ("eta is 0.0", "'flow' expects eta > 0")),
    ({"eta": -0.7, "dynamics": "dance"}, ValueError, ("eta is -0.7", "'dance' expects eta > 0")),
    ({"eta": math.inf}, ValueError, ("eta is inf", "eta > 0")),
    ({"eta": math.nan}, ValueError, ("eta is nan", "eta > 0")),
    ({"eta": 1.01, "dynamics": "cps"}, ValueError, ("eta is 1.01", "'cps' expects 0 < eta <= 1")),
    ({"eta": "0.7"}, TypeError, ("eta", "'0.7'", "a number")),
    ({"sigma_max": 1.0}, ValueError, ("sigma_max is 1.0", "a number in (0, 1), or None")),
    ({"sigma_max": 0.0}, ValueError, ("sigma_max is 0.0", "a number in (0, 1), or None")),
    ({"sigma_max": "0.9"}, TypeError, ("sigma_max", "'0.9'", "a number")),
    ({"sigma": 1.0, "dynamics": "dpm1"}, ValueError, ("'dpm1'", "sigma = 1", "[1.0]")),
    ({"sigma_next": 0.0, "dynamics": "dpm1"}, ValueError, ("'dpm1'", "sigma_next = 0", "[0.0]")),
    ({"eta": 1e30}, ValueError, ("eta 1e+30", "row 0", "float32")),
]


@pytest.mark.parametrize(("changes", "error", "says"), BAD_COEFFICIENTS)
def test_bad_coefficients(changes: dict, error: type[Exception], says: tuple[str, ...]) -> None:
    good = {"sigma": 0.8, "sigma_next": 0.7}
    refused(lambda: gk.step_coefficients(**{**good, **changes}), error, says)


def test_gradients_are_refused_only_where_autograd_would_want_them() -> None:
    """Under no_grad a parameter's output may be stepped: that is how a rollout runs."""
    with torch.no_grad():
        for op in ("sde_step", "branch_log_prob", "policy_loss"):
            arguments = cases.inputs(op, "primes")
            for name, value in arguments.items():
                if isinstance(value, torch.Tensor):
                    arguments[name] = value.clone().requires_grad_()
            for result in cases.as_tuple(getattr(gk, op)(**arguments)):
                assert not result.requires_grad
