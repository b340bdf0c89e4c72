"""The table of ops and shapes that every backend is tested on and every benchmark times.

`OPS` has one row an op: how its inputs are made, and which of `formulas.py` it must agree with. A
test takes `inputs(op, shape)`, calls the public function with them and compares with
`plain(op, arguments)`, in float64 for the truth and in float32 for what eager PyTorch makes of it.
To add an op, add its row; a new backend needs nothing here, `targets()` finds it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import formulas
import torch
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo_kernels import _library


@dataclass(frozen=True)
class Shape:
    """P anchor rows, G branches of each, rows of shape S."""

    name: str
    rows: int
    branches: int
    row_shape: tuple[int, ...]
    large: bool = False  # a size of real use: for benchmarks, and for few tests

    @property
    def elements(self) -> int:
        """N, the elements of one row."""
        return math.prod(self.row_shape)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("one", 1, 1, (1,)),
        Shape("scalars", 3, 2, ()),
        Shape("primes", 3, 5, (7, 11)),
        Shape("image", 2, 3, (3, 5, 9)),
        Shape("past_chunk", 2, 2, (4099,)),  # one more than a reduction chunk, and a prime
        Shape("digits", 4, 12, (16, 4)),
        Shape("flux720", 1, 12, (2025, 64), large=True),
        Shape("flux720x8", 8, 12, (2025, 64), large=True),
        Shape("flux720x64", 64, 12, (2025, 64), large=True),
        Shape("flux1024", 1, 12, (4096, 64), large=True),
        Shape("flux1024x8", 8, 12, (4096, 64), large=True),
        Shape("flux1024x64", 64, 12, (4096, 64), large=True),
    )
}
SMALL = tuple(name for name, shape in SHAPES.items() if not shape.large)
LARGE = tuple(name for name, shape in SHAPES.items() if shape.large)

Dtypes = tuple[torch.dtype, torch.dtype]

# Name: (velocity's dtype, latents' dtype). Arithmetic is float32, or float64 when either is.
DTYPES: dict[str, Dtypes] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "mixed": (torch.bfloat16, torch.float32),
    "float64": (torch.float64, torch.float64),
}


@dataclass(frozen=True)
class Target:
    """A backend and the device it is tested on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def targets() -> list[Target]:
    """What this machine can run: every available backend on every device type it serves."""
    there = [torch.device("cpu")]
    if torch.cuda.is_available():
        there.append(torch.device("cuda", torch.cuda.current_device()))
    return [
        Target(name, device.type)
        for name, status in gk.backends().items()
        for device in there
        if status.available and _library.refusal(name, device) is None
    ]


# Inputs


def schedule(steps: int = 16, shift: float = 3.0) -> Tensor:
    """float64 [steps + 1], from 1 to 0."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)


def step_rows(rows: int, dynamics: str = "flow") -> gk.StepCoefficients:
    """A different step of the schedule each row; the first is sigma = 1 where that is defined."""
    sigma = schedule()
    at = torch.arange(rows) % 13 + (dynamics == "dpm1")
    return gk.step_coefficients(sigma[at], sigma[at + 1], eta=0.7, dynamics=dynamics)


def generator(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def random_seeds(shape: tuple[int, ...], *key: object) -> Tensor:
    """int64 over the whole range, negative ones included."""
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator("seeds", *key))


def step_inputs(shape: Shape, dtypes: Dtypes, dynamics: str, branched: bool) -> dict:
    """velocity, latents, coefficients, noise, x_next, with the values every step op shares."""
    draw = generator(shape.name)
    leading = (shape.rows, shape.branches) if branched else (shape.rows,)
    velocity = torch.randn(shape.rows, *shape.row_shape, generator=draw).to(dtypes[0])
    latents = torch.randn(shape.rows, *shape.row_shape, generator=draw).to(dtypes[1])
    noise = torch.randn(*leading, *shape.row_shape, generator=draw)
    noise = noise.to(torch.float64 if torch.float64 in dtypes else torch.float32)
    made = {"velocity": velocity, "latents": latents, "noise": noise}
    made["coefficients"] = step_rows(shape.rows, dynamics)
    made["x_next"] = formulas.sde_step(**at_dtype(made, torch.float64))[0].to(noise.dtype)
    return made


def make_step_mean(shape: Shape, dtypes: Dtypes, dynamics: str, branched: bool) -> dict:
    made = step_inputs(shape, dtypes, dynamics, branched)
    return {name: made[name] for name in ("velocity", "latents", "coefficients")}


def make_ode_step(shape: Shape, dtypes: Dtypes, dynamics: str, branched: bool) -> dict:
    made = step_inputs(shape, dtypes, dynamics, branched)
    at, sigma = torch.arange(shape.rows) % 13, schedule().float()
    return {
        **{name: made[name] for name in ("velocity", "latents")},
        "sigma": sigma[at],
        "sigma_next": sigma[at + 1],
    }


def make_sde_step(shape: Shape, dtypes: Dtypes, dynamics: str, branched: bool) -> dict:
    made = step_inputs(shape, dtypes, dynamics, branched)
    return {name: made[name] for name in ("velocity", "latents", "coefficients", "noise")}


def make_branch_log_prob(shape: Shape, dtypes: Dtypes, dynamics: str, branched: bool) -> dict:
    made = step_inputs(shape, dtypes, dynamics, branched)
    return {name: made[name] for name in ("velocity", "latents", "x_next", "coefficients")}


def make_policy_loss(shape: Shape, dtypes: Dtypes, dynamics: str, branched: bool) -> dict:
    """Ratios inside and outside of the window on both sides, each with advantages of both signs.

    None lies near the window's edge, where float32 and float64 may decide differently.
    """
    made = make_branch_log_prob(shape, dtypes, dynamics, branched)
    log_prob = formulas.branch_log_prob(**at_dtype(made, torch.float64))
    moves = torch.tensor([0.03, 0.004, -0.004, -0.03, 0.002, -0.05, 0.05], dtype=torch.float64)
    number = torch.arange(log_prob.numel())
    signs = torch.where(number % 2 == 0, 1.0, -1.0)
    sizes = torch.rand(log_prob.numel(), generator=generator(shape.name, "advantages")) + 0.25
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    made["old_log_prob"] = (log_prob - moves[number % 7].view(log_prob.shape)).to(dtype)
    made["advantages"] = (signs * sizes).view(log_prob.shape).to(dtype)
    made["clip_range"] = 0.01
    return made


def make_group_advantages(shape: Shape, dtypes: Dtypes, dynamics: str, branched: bool) -> dict:
    group_size = max(2, shape.branches)
    draw = generator(shape.name, "rewards")
    rewards = torch.rand(2, 3, shape.rows * group_size, 5, generator=draw).to(dtypes[0])
    return {"rewards": rewards, "group_size": group_size, "weights": [1.0, 0.25]}


def make_normal(shape: Shape, dtypes: Dtypes, dynamics: str, branched: bool) -> dict:
    leading = (shape.rows, shape.branches) if branched else (shape.rows,)
    return {"seeds": random_seeds(leading, shape.name), "shape": shape.row_shape}


@dataclass(frozen=True)
class Op:
    """One op: its inputs, what it computes, and the error it may make however lucky eager is.

    The rule is flash-attention's: error against float64 at most twice that of the plain formula in
    float32, plus floor * max(1, largest true value).
    """

    make: Callable[..., dict]
    plain: Callable
    differentiable: tuple[str, ...] = ()  # arguments that may require gradients
    floor: float = 5e-7  # four roundings of float32


OPS: dict[str, Op] = {
    "step_mean": Op(make_step_mean, formulas.step_mean, ("velocity", "latents")),
    "ode_step": Op(make_ode_step, formulas.ode_step, ("velocity", "latents")),
    "sde_step": Op(make_sde_step, formulas.sde_step),
    "branch_log_prob": Op(make_branch_log_prob, formulas.branch_log_prob, ("velocity",)),
    "policy_loss": Op(make_policy_loss, formulas.policy_loss, ("velocity",)),
    "group_advantages": Op(make_group_advantages, formulas.group_advantages),
    "normal": Op(make_normal, formulas.normal, floor=1e-5),  # the contract between backends
}


def inputs(
    op: str,
    shape: str | Shape,
    dtype: str = "float32",
    *,
    dynamics: str = "flow",
    branched: bool = True,
    device: str = "cpu",
) -> dict:
    """Keyword arguments for `getattr(gk, op)`; the same values every time, on every device."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    made = OPS[op].make(shape, DTYPES[dtype], dynamics, branched)
    return {name: move(value, device) for name, value in made.items()}


def move(value: object, device: str) -> object:
    return value.to(device) if isinstance(value, (Tensor, gk.StepCoefficients)) else value


def at_dtype(arguments: Mapping, dtype: torch.dtype) -> dict:
    """The same arguments, every floating tensor (and the table) in one dtype."""

    def cast(value: object) -> object:
        if isinstance(value, gk.StepCoefficients):
            return replace(value, table=value.table.to(dtype))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: cast(value) for name, value in arguments.items()}


def plain(op: str, arguments: Mapping, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """What the op should return, computed in `dtype`."""
    arguments = at_dtype(arguments, dtype)
    if op == "normal":
        arguments["dtype"] = dtype
    return as_tuple(OPS[op].plain(**arguments))


def as_tuple(returned: Tensor | tuple) -> tuple[Tensor, ...]:
    return tuple(returned) if isinstance(returned, tuple) else (returned,)
