"""What the peers' steps read from a schedule: one row's numbers, and the coefficients they give.

Computed on the host and kept there: a step on a GPU never waits for its own schedule.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_floating
from ..dynamics import StepCoefficients, check_number, step_coefficients


class Row(NamedTuple):
    """One row's step: all that its coefficients depend on, as numbers on the host."""

    sigma: float
    sigma_next: float
    eta: float
    sigma_max: float | None = None  # stands in for sigma = 1 in `flow`; None: sigma_next


class Steps(NamedTuple):
    """Coefficients of a batch on its device. One row serves every row of the batch."""

    coefficients: StepCoefficients  # table [P or 1, 5]
    dt: Tensor  # [P or 1], sigma_next - sigma < 0


# Coefficients


@torch.compiler.disable  # numbers on the host: nothing for a graph to hold
def steps(
    rows: Sequence[Row],
    dynamics: str,
    device: torch.device,
    *,
    drift: str | None = None,  # another dynamics, whose mean is taken instead
    constant: bool = True,  # False: log_prob without its constant c
) -> Steps:
    """The coefficients of `rows` on `device`, made once for each distinct value of the arguments.

    They are keyed by the numbers they are computed from, so they cannot go stale; the cache keeps
    the 1024 last used, a megabyte on a GPU at most. Without it every step would copy a table there,
    and such a copy waits for the GPU. The tensors never leave this package: no one changes them.
    """
    rows = tuple(rows[:1] if len(set(rows)) == 1 else rows)
    return _steps(rows, dynamics, device, drift or dynamics, constant)


@lru_cache(maxsize=1024)
def _steps(
    rows: tuple[Row, ...], dynamics: str, device: torch.device, drift: str, constant: bool
) -> Steps:
    # Made in inference mode (a rollout), it could not be saved for the backward of an update.
    with torch.inference_mode(False):
        table = torch.cat([_row_table(row, dynamics, drift, constant) for row in rows])
        dt = torch.tensor([row.sigma_next - row.sigma for row in rows], dtype=torch.float32)
        return Steps(StepCoefficients(table, dynamics).to(device), dt.to(device))


def _row_table(row: Row, dynamics: str, drift: str, constant: bool) -> Tensor:
    """float32 [1, 5] = (a, b, s, w, c)."""
    if row.eta == 0:
        # Every dynamics tends to the ODE. What is left of the log-probability is the peer's own
        # 0/0: NaN (-inf without the constant), but for `cps`, which weighs by no variance.
        table = step_coefficients(row.sigma, row.sigma_next, dynamics="ode").table
        limits = (1.0, 0.0) if dynamics == "cps" else (math.inf, math.inf)
        table[:, 3:] = torch.tensor(limits)
    else:
        table = step_coefficients(
            row.sigma, row.sigma_next, row.eta, dynamics, sigma_max=row.sigma_max
        ).table
    if drift != dynamics:
        table[:, :2] = step_coefficients(row.sigma, row.sigma_next, dynamics=drift).table[:, :2]
    if not constant:
        table[:, 4] = 0
    return table


def make_row(
    name: str, sigma: float, sigma_next: float, eta: float, second: float, dynamics: str
) -> Row:
    """name: the schedule's, for messages; second: its second sigma, in the place of sigma = 1."""
    if not 0 <= sigma_next < sigma <= 1:
        raise ValueError(
            f"{name} give a step from sigma {sigma} to {sigma_next}; "
            "expected 0 <= sigma_next < sigma <= 1"
        )
    if dynamics != "flow" or sigma != 1 or second == sigma_next:
        return Row(sigma, sigma_next, eta)
    if not 0 < second < 1:
        raise ValueError(
            f"{name} put {second} in the place of sigma = 1; expected a number in (0, 1)"
        )
    return Row(sigma, sigma_next, eta, second)


# Reading a schedule

_on_host: dict[int, tuple[weakref.ref, int, Tensor]] = {}


def on_host(values: Tensor) -> Tensor:
    """`values` on the CPU, read from a GPU once and not at every step (each read waits for it).

    A schedule is one tensor that a loop reads hundreds of times. A copy is kept for as long as
    that very tensor lives (a weak reference, so the store is no larger than the schedules alive)
    and is used while its version counter stands still: every in-place change, through views too,
    moves the counter. That is what autograd itself trusts for the tensors it has saved. Inference
    tensors have no counter and are read each time; so are CPU tensors, which others may share.
    """
    if _is_cheap(values) or values.is_inference():
        return values.detach().cpu()
    key, version = id(values), values._version
    reference, seen, copy = _on_host.get(key, (None, None, None))
    if reference is None or reference() is not values or seen != version:
        copy = values.detach().to("cpu", copy=True)
        reference = weakref.ref(values, lambda _: _on_host.pop(key, None))
        _on_host[key] = (reference, version, copy)
    return copy


def _is_cheap(values: Tensor) -> bool:
    return values.device.type == "cpu"


def check_sigmas(name: str, sigmas: Tensor) -> list[float]:
    """A schedule's sigmas as numbers."""
    check_floating(name, sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(
            f"{name} has shape {tuple(sigmas.shape)}; expected [steps + 1], at least two sigmas"
        )
    return on_host(sigmas).tolist()


def check_index(name: str, index: int | Tensor, sigmas: Sequence[float]) -> int:
    """A step's index, with a sigma behind it. A tensor of one integer will do, as in the peers."""
    try:
        number = None if isinstance(index, bool) else operator.index(index)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} is {index!r}, a {type(index).__name__}; expected an integer")
    if not 0 <= number <= len(sigmas) - 2:
        raise ValueError(
            f"{name} is {number}; expected 0 to {len(sigmas) - 2}, a step of {len(sigmas)} sigmas"
        )
    return number


def attribute(scheduler: object, name: str) -> object:
    if not hasattr(scheduler, name):
        raise TypeError(
            f"scheduler is a {type(scheduler).__name__} without {name}; expected one like the "
            "peer's own, FlowMatchEuler..., which has it"
        )
    return getattr(scheduler, name)


def scheduled_row(sigmas: Tensor, index: int | Tensor, eta: float, dynamics: str) -> Row:
    """The step from sigmas[index] to sigmas[index + 1]."""
    numbers = check_sigmas("sigmas", sigmas)
    i = check_index("index", index, numbers)
    return make_row("sigmas", numbers[i], numbers[i + 1], eta, numbers[1], dynamics)


def timestep_indices(scheduler: object, timestep: Tensor | float | Sequence, rows: int) -> list:
    """The step of each timestep by the scheduler's own rule; one timestep, or one a row."""
    find = attribute(scheduler, "index_for_timestep")
    if isinstance(timestep, Tensor):
        if timestep.ndim > 1:
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; expected [B] or one timestep"
            )
        timestep = list(timestep.detach().cpu().reshape(-1))  # one wait for a GPU, not one a row
    else:
        given = timestep if isinstance(timestep, (list, tuple)) else [timestep]
        timestep = [t if isinstance(t, Tensor) else check_number("timestep", t) for t in given]
    if len(timestep) not in (1, rows):
        raise ValueError(f"timestep has {len(timestep)} values; expected 1 or {rows}, one a sample")
    known = getattr(scheduler, "timesteps", None)
    on_gpu = isinstance(known, Tensor) and known.device.type != "cpu"
    extra = (on_host(known),) if on_gpu else ()  # or each search would wait for the GPU
    found: dict[float, int] = {}
    for t in timestep:
        if float(t) not in found:
            try:
                found[float(t)] = int(find(t, *extra))
            except IndexError as error:  # diffusers' answer to a timestep it does not have
                raise ValueError(
                    f"timestep is {float(t)}; expected one of scheduler.timesteps"
                ) from error
    return [found[float(t)] for t in timestep]


def check_noise_level(name: str, value: float, dynamics: str) -> float:
    high = 1.0 if dynamics == "cps" else math.inf
    if not (0 <= check_number(name, value) <= high and math.isfinite(value)):
        expected = "a number in [0, 1] for CPS" if dynamics == "cps" else "a finite number >= 0"
        raise ValueError(f"{name} is {value}; expected {expected}")
    return float(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {sorted(choices)}")
    return value
