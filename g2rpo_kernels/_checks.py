"""Argument checks of the public ops: shape, dtype and device, never values.

A value check on a GPU tensor would force a synchronisation, so values are checked only where they
are on the host already (`step_coefficients`, Python scalars). Every message names the argument,
what it is and what was expected.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dynamics import StepCoefficients

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64 (gradcheck on the reference), else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; expected a torch.Tensor")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected float32, bfloat16, float16 or float64"
        )


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """x must be a floating tensor of other's shape, on its device. `other` has been checked."""
    if (
        type(x) is Tensor
        and x.dtype is other.dtype
        and x.shape == other.shape
        and x.device == other.device
    ):
        return  # nearly every call; these checks are a third of one on small tensors
    check_floating(name, x)
    check_device(name, x, other_name, other)
    if x.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected {tuple(other.shape)}, "
            f"the shape of {other_name}"
        )


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(
            f"{name} is on {x.device}; expected {other.device}, the device of {other_name}"
        )


def check_rows(velocity: Tensor, latents: Tensor) -> None:
    """velocity, latents: [P, *S] with at least one element a row."""
    check_floating("velocity", velocity)
    if velocity.ndim < 1:
        raise ValueError("velocity has no dimensions; expected [P, *S] with P rows first")
    check_like("latents", latents, "velocity", velocity)
    if velocity.numel() == 0 and 0 in velocity.shape[1:]:
        raise ValueError(
            f"velocity has shape {tuple(velocity.shape)}; expected at least one element a row"
        )


def check_table(coefficients: StepCoefficients, velocity: Tensor) -> Tensor:
    """The coefficients' table [P, 5] or [1, 5], checked against velocity [P, *S]."""
    if not isinstance(coefficients, StepCoefficients):
        raise TypeError(
            f"coefficients is a {type(coefficients).__name__}; expected the StepCoefficients "
            "that step_coefficients() returns"
        )
    table = coefficients.table
    if not isinstance(table, Tensor):
        check_floating("coefficients.table", table)
    shape = table.shape
    if table.dtype is not torch.float32 or len(shape) != 2 or shape[1] != 5:
        raise ValueError(
            f"coefficients.table has dtype {table.dtype} and shape {tuple(table.shape)}; expected "
            "torch.float32 [P, 5], as step_coefficients() returns"
        )
    if table.device != velocity.device:
        raise ValueError(
            f"coefficients.table is on {table.device}; expected {velocity.device}, the device of "
            "velocity: use coefficients.to(velocity.device)"
        )
    if shape[0] != 1 and shape[0] != velocity.shape[0]:
        raise ValueError(
            f"coefficients.table has {table.shape[0]} rows; expected 1 or {velocity.shape[0]}, "
            f"the rows of velocity {tuple(velocity.shape)}"
        )
    return table


def check_branches(name: str, x: Tensor, velocity: Tensor) -> tuple[int, ...]:
    """x: [P, G, *S] or [P, *S] beside velocity [P, *S]. Returns (P, G) or (P,)."""
    check_floating(name, x)
    check_device(name, x, "velocity", velocity)
    shape, row = x.shape, velocity.shape
    if shape == row:
        return (row[0],)
    if len(shape) == len(row) + 1 and shape[0] == row[0] and shape[2:] == row[1:]:
        return (shape[0], shape[1])
    raise ValueError(
        f"{name} has shape {tuple(x.shape)}; expected [P, G, *S] or [P, *S] with [P, *S] = "
        f"{tuple(velocity.shape)}, the shape of velocity"
    )


def check_per_branch(name: str, x: Tensor, leading: tuple[int, ...], velocity: Tensor) -> None:
    """x: one number a branch, [P, G] or [P]."""
    check_floating(name, x)
    check_device(name, x, "velocity", velocity)
    if x.shape != leading:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; expected {leading}, one value a branch of x_next"
        )


def check_seeds(seeds: Tensor) -> None:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        what = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"seeds is {what}; expected a torch.int64 tensor (64 unsigned bits each)")


def check_gaussian(coefficients: StepCoefficients) -> None:
    if coefficients.dynamics == "ode":
        raise ValueError(
            "coefficients.dynamics is 'ode', which has no log-probability; expected one of "
            "'flow', 'dance', 'cps', 'dpm1'"
        )


def refuse_grad(op: str, instead: str, **tensors: Tensor | None) -> None:
    """Raise when autograd would need a gradient that this op does not give."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, which {op} does not give; expected a detached "
                f"tensor or torch.no_grad(): {instead}"
            )
