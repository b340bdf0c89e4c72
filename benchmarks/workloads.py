"""What is timed: the cases, their inputs (from `tests/cases.py`), every way to compute them.

A task is an op in one use. Beside our op it names the eager baseline of `eager.py` and the plain
functions of our reference, which `torch.compile` gets to fuse. To time a new op, add its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import _paths  # noqa: F401
import cases
import eager
import torch
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo_kernels.branch_log_prob import log_prob_backward_reference, log_prob_reference
from g2rpo_kernels.group_advantages import group_advantages_reference
from g2rpo_kernels.normal import normal_reference
from g2rpo_kernels.ode_step import ode_step_reference
from g2rpo_kernels.policy_loss import policy_loss_reference
from g2rpo_kernels.sde_step import sde_step_reference
from g2rpo_kernels.step_mean import step_mean_reference

Inputs = dict[str, object]  # one input set, by name

CLIP_RANGE = 0.01  # of cases.make_policy_loss
EPS = 1e-8


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    task: str  # a key of TASKS
    shape: str  # a key of cases.SHAPES
    dtype: str = "float32"  # a key of cases.DTYPES
    backward: bool = False

    @property
    def id(self) -> str:
        direction = "forward+backward" if self.backward else "forward"
        return f"{self.task}-{direction}-{self.shape}-{self.dtype}"


@dataclass(frozen=True)
class Way:
    """One function of a task and the names of its arguments, positional, in an input set.

    `closed_form`: the function returns its gradient itself. Otherwise a case with backward asks
    autograd for the gradient of its first output in its first argument.
    """

    function: Callable
    arguments: tuple[str, ...]
    closed_form: bool = False


@dataclass(frozen=True)
class Task:
    op: str  # a key of cases.OPS: where the inputs come from
    ours: Way
    eager: Way
    reference: Way
    reference_with_gradient: Way | None = None  # a task that has one is timed with backward too
    extra: Mapping[str, Way] | None = None
    random: bool = False  # outputs differ from way to way: only their spread can be compared
    compile_eager: bool = True


SIGMAS = ("sigma", "sigma_next", "sigma_max")
STEP = ("velocity", "latents", *SIGMAS, "branches")
PLAIN = ("velocity_plain", "latents", "x_next", "table")


def _log_prob_and_gradient(velocity, latents, x_next, table, upstream):
    log_prob = log_prob_reference(velocity, latents, x_next, table)
    return log_prob, log_prob_backward_reference(upstream, velocity, latents, x_next, table)


def _loss_of_reference(velocity, latents, x_next, table, old_log_prob, advantages):
    return policy_loss_reference(
        velocity, latents, x_next, old_log_prob, advantages, table,
        CLIP_RANGE, None, None, 0.0, None,
    )  # fmt: skip


def _loss_and_gradient(velocity, latents, x_next, table, old_log_prob, advantages):
    loss, _, grad, _ = _loss_of_reference(
        velocity, latents, x_next, table, old_log_prob, advantages
    )
    return loss, log_prob_backward_reference(grad, velocity, latents, x_next, table)


def _eager_step(velocity, latents, sigma, sigma_next, sigma_max, branches, noise=None):
    sigmas = sigma, sigma_next, sigma_max
    return eager.sde_step_with_log_prob(velocity, latents, sigmas, branches, noise=noise)


def _eager_log_prob(velocity, latents, sigma, sigma_next, sigma_max, branches, x_next):
    sigmas = sigma, sigma_next, sigma_max
    return eager.sde_step_with_log_prob(velocity, latents, sigmas, branches, x_next=x_next)[1:]


def _eager_loss(
    velocity, latents, sigma, sigma_next, sigma_max, branches, x_next, old_log_prob, advantages
):
    sigmas = sigma, sigma_next, sigma_max
    (log_prob,) = _eager_log_prob(velocity, latents, *sigmas, branches, x_next)
    return (eager.clipped_loss(log_prob, old_log_prob, advantages, CLIP_RANGE),)


TASKS: dict[str, Task] = {
    "sde_step[seeds]": Task(
        "sde_step",
        Way(lambda v, x, c, seeds: gk.sde_step(v, x, c, seeds=seeds),
            ("velocity", "latents", "coefficients", "seeds")),
        Way(_eager_step, STEP),
        Way(sde_step_reference, ("velocity", "latents", "table", "seeds", "none")),
        extra={"torch.randn, then ours": Way(
            lambda v, x, c, like: gk.sde_step(v, x, c, noise=torch.randn_like(like)),
            ("velocity", "latents", "coefficients", "noise"))},
        random=True,
    ),
    "sde_step[noise]": Task(
        "sde_step",
        Way(lambda v, x, c, noise: gk.sde_step(v, x, c, noise=noise),
            ("velocity", "latents", "coefficients", "noise")),
        Way(_eager_step, (*STEP, "flat_noise")),
        Way(sde_step_reference, ("velocity", "latents", "table", "none", "noise")),
    ),
    "branch_log_prob": Task(
        "policy_loss",
        Way(lambda v, x, y, c: (gk.branch_log_prob(v, x, y, c),),
            ("velocity", "latents", "x_next", "coefficients")),
        Way(_eager_log_prob, (*STEP, "flat_x_next")),
        Way(lambda *given: (log_prob_reference(*given),), PLAIN),
        Way(_log_prob_and_gradient, (*PLAIN, "upstream"), closed_form=True),
    ),
    "policy_loss": Task(
        "policy_loss",
        Way(lambda v, x, y, old, adv, c: (
                gk.policy_loss(v, x, y, old, adv, c, clip_range=CLIP_RANGE).loss,),
            ("velocity", "latents", "x_next", "old_log_prob", "advantages", "coefficients")),
        Way(_eager_loss, (*STEP, "flat_x_next", "flat_old_log_prob", "flat_advantages")),
        Way(_loss_of_reference, (*PLAIN, "old_log_prob", "advantages")),
        Way(_loss_and_gradient, (*PLAIN, "old_log_prob", "advantages"), closed_form=True),
    ),
    "ode_step": Task(
        "ode_step",
        Way(lambda *given: (gk.ode_step(*given),), ("velocity", "latents", *SIGMAS[:2])),
        Way(lambda *given: (eager.ode_step(*given),), ("velocity", "latents", *SIGMAS[:2])),
        Way(lambda *given: (ode_step_reference(*given),), ("velocity", "latents", *SIGMAS[:2])),
    ),
    "step_mean": Task(
        "step_mean",
        Way(lambda v, x, c: (gk.step_mean(v, x, c),), ("velocity", "latents", "coefficients")),
        Way(lambda v, x, *sigmas: (eager.step_mean(v, x, sigmas),),
            ("velocity", "latents", *SIGMAS)),
        Way(lambda v, x, t: (step_mean_reference(v, x, t),), ("velocity", "latents", "table")),
    ),
    "normal": Task(
        "normal",
        Way(lambda seeds, shape: (gk.normal(seeds, shape),), ("seeds", "shape")),
        Way(lambda like: (torch.randn_like(like),), ("like",)),
        Way(lambda seeds, shape: (normal_reference(seeds, shape),), ("seeds", "shape")),
        random=True,
    ),
    "group_advantages": Task(
        "group_advantages",
        Way(lambda r, g, w: (gk.group_advantages(r, g, w),), ("rewards", "group_size", "weights")),
        Way(lambda r, g, w: (eager.group_advantages(r, g, w),),
            ("rewards", "group_size", "weights")),
        Way(lambda r, g, w: (group_advantages_reference(r, g, w, EPS),),
            ("rewards", "group_size", "weights")),
        compile_eager=False,  # a loop over groups unrolls into a graph that grows with them
    ),
}  # fmt: skip


def cases_of(shapes: list[str], dtypes: list[str]) -> list[Case]:
    """Every case of these shapes, the ones that matter most first: a run may be cut short."""
    order = [
        ("policy_loss", True), ("sde_step[seeds]", False), ("sde_step[noise]", False),
        ("policy_loss", False), ("group_advantages", False), ("branch_log_prob", True),
        ("branch_log_prob", False), ("normal", False), ("ode_step", False), ("step_mean", False),
    ]  # fmt: skip
    return [
        Case(task, shape, dtype, backward)
        for dtype in dtypes
        for shape in shapes
        for task, backward in order
        if dtype == "float32" or task not in ("normal", "group_advantages")
    ]


def make_inputs(case: Case, device: str, shape: cases.Shape | None = None) -> Inputs:
    """One input set of `cases.inputs`, with what the baselines need beside it.

    Of a step only the first anchor row is made, and repeated to P rows: values do not change the
    time of these ops, and making 200 M elements in float64 would take longer than timing them.
    """
    task, shape = TASKS[case.task], shape or cases.SHAPES[case.shape]
    if task.op in ("normal", "group_advantages"):
        made = cases.inputs(task.op, shape, case.dtype, device=device)
        made["like"] = torch.empty(shape.rows, shape.branches, *shape.row_shape, device=device)
        return made
    made = cases.inputs(task.op, replace(shape, rows=1), case.dtype, device=device)
    coefficients = made.pop("coefficients", cases.step_rows(1).to(device))
    made["table"] = coefficients.table
    for name, value in made.items():
        if isinstance(value, Tensor):
            made[name] = value.repeat(shape.rows, *[1] * (value.ndim - 1))
    made["coefficients"] = replace(coefficients, table=made["table"])
    made["branches"], made["none"] = shape.branches, None
    sigma = cases.schedule().to(device)
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    for name, value in zip(SIGMAS, (sigma[0], sigma[1], sigma[1])):  # the step of step_rows(1)
        made[name] = value.to(dtype).repeat(shape.rows)
    for name in ("noise", "x_next", "old_log_prob", "advantages"):
        if name in made:
            made[f"flat_{name}"] = made[name].flatten(0, 1)
    leading = (shape.rows, shape.branches)
    made["seeds"] = cases.random_seeds(leading, shape.name).to(device)
    made["upstream"] = torch.linspace(-1, 1, shape.rows * shape.branches, device=device)
    made["upstream"] = made["upstream"].to(dtype).view(leading)
    made["velocity_plain"] = made["velocity"]
    return made


def another_set(inputs: Inputs) -> Inputs:
    """The same values at other addresses; views of one tensor stay views of one tensor."""
    storage: dict[int, Tensor] = {}

    def copied(value: object) -> object:
        if isinstance(value, gk.StepCoefficients):
            return replace(value, table=copied(value.table))
        if not isinstance(value, Tensor):
            return value
        key = value.data_ptr()
        if key not in storage or storage[key].numel() != value.numel():
            storage[key] = value.clone()
        return storage[key].view(value.shape)

    return {name: copied(value) for name, value in inputs.items()}


def bytes_moved(case: Case, shape: cases.Shape | None = None) -> int:
    """Each input of the fused op read once, each output written once.

    forward+backward is two ops, since a gradient needs finished log-probabilities: what both read
    counts twice, x_next included, and dloss/dlog_prob is written by one and read by the other.
    """
    shape = shape or cases.SHAPES[case.shape]
    rows, branches, count = shape.rows, shape.branches, shape.elements
    velocity, latents = (rows * count * dtype.itemsize for dtype in cases.DTYPES[case.dtype])
    result = 8 if case.dtype == "float64" else 4
    anchors, mean = velocity + latents, rows * count * result
    branched, per_branch = rows * branches * count * result, rows * branches * result
    seeds, table = rows * branches * 8, rows * 5 * 4
    if case.task == "group_advantages":
        models, granularities, samples, positions = cases.inputs("group_advantages", shape)[
            "rewards"
        ].shape
        return (models * granularities + 1) * samples * positions * result
    forward = {
        "sde_step[seeds]": anchors + table + seeds + branched + per_branch,
        "sde_step[noise]": anchors + table + branched + branched + per_branch,
        "branch_log_prob": anchors + table + branched + per_branch,
        "policy_loss": anchors + table + branched + 4 * per_branch + 6 * result,
        "ode_step": anchors + 2 * rows * 4 + mean,
        "step_mean": anchors + table + mean,
        "normal": seeds + branched,
    }[case.task]
    if not case.backward:
        return forward
    scale = result if case.task == "policy_loss" else 0
    return forward + per_branch + anchors + table + branched + scale + velocity
