"""Dynamics: (sigma, sigma_next, eta) -> the affine coefficients of one step. Every SDE lives here.

A step of a flow-matching sampler from sigma to sigma_next < sigma is affine in the latents x and
the velocity v, whatever SDE it discretises. With eps ~ N(0, 1) and dt = sigma_next - sigma < 0:

    mean = a*x + b*v      x_next = mean + s*eps      log_prob = -w * mean_N((x_next - mean)^2) + c

so the kernels know five numbers a row and nothing of the SDE. To add an SDE, add a function here
and its name to `DYNAMICS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Each takes float64 tensors [P] (sigma, sigma_next, eta, sigma_tilde) and returns (a, b, s).


def _ode(sigma, sigma_next, eta, sigma_tilde):
    """Euler step of the probability-flow ODE, dx = v dsigma."""
    return torch.ones_like(sigma), sigma_next - sigma, torch.zeros_like(sigma)


def _marginal_preserving(sigma, sigma_next, diffusion):
    """dx = [v + q^2/(2 sigma) (x + (1 - sigma) v)] dt + q sqrt(-dt) eps, for a given q.

    The drift's second term is minus q^2/2 times the score, so marginals are those of the ODE
    (Flow-GRPO, arXiv 2505.05470, eq. 8-9; DanceGRPO, arXiv 2505.07818).
    """
    dt = sigma_next - sigma
    half = diffusion**2 / (2 * sigma)
    return 1 + half * dt, (1 + half * (1 - sigma)) * dt, diffusion * (-dt).sqrt()


def _flow(sigma, sigma_next, eta, sigma_tilde):
    """Flow-GRPO and G2RPO: q = eta sqrt(sigma / (1 - sigma_tilde))."""
    return _marginal_preserving(sigma, sigma_next, eta * (sigma / (1 - sigma_tilde)).sqrt())


def _dance(sigma, sigma_next, eta, sigma_tilde):
    """DanceGRPO: a constant q = eta."""
    return _marginal_preserving(sigma, sigma_next, eta)


def _cps(sigma, sigma_next, eta, sigma_tilde):
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952): noise is replaced, not added.

    x_next = (1 - sigma') x0 + sigma' (cos(eta pi/2) x1 + sin(eta pi/2) eps), where x0 and x1 are
    the predicted image and noise: x0 = x - sigma v, x1 = x + (1 - sigma) v.
    """
    keep = sigma_next * torch.cos(eta * (math.pi / 2))
    return (
        (1 - sigma_next) + keep,
        -sigma * (1 - sigma_next) + (1 - sigma) * keep,
        sigma_next * torch.sin(eta * (math.pi / 2)),
    )


def _dpm1(sigma, sigma_next, eta, sigma_tilde):
    """First-order SDE-DPM-Solver++ (arXiv 2211.01095), h = the step in log-SNR/2."""
    h = (torch.log1p(-sigma_next) - sigma_next.log()) - (torch.log1p(-sigma) - sigma.log())
    gain = (1 - sigma_next) * -torch.expm1(-2 * h)
    return (
        sigma_next / sigma * torch.exp(-h) + gain,
        -sigma * gain,
        sigma_next * (-torch.expm1(-2 * h)).sqrt(),
    )


DYNAMICS: dict[str, Callable] = {
    "ode": _ode,
    "flow": _flow,
    "dance": _dance,
    "cps": _cps,
    "dpm1": _dpm1,
}


@dataclass(frozen=True, eq=False)  # a tensor has no one truth value to compare by
class StepCoefficients:
    """One set of affine coefficients a row.

    table: float32 [P, 5], columns (a, b, s, w, c). A table of one row serves any number of rows.
    dynamics: the name it was made from, a key of `DYNAMICS`.
    """

    table: Tensor
    dynamics: str

    def to(self, device: torch.device | str) -> StepCoefficients:
        return StepCoefficients(self.table.to(device), self.dynamics)


def step_coefficients(
    sigma: float | Tensor,  # [P] or a number
    sigma_next: float | Tensor,  # [P] or a number
    eta: float = 0.7,
    dynamics: str = "flow",
    sigma_max: float | None = None,
) -> StepCoefficients:  # table [P, 5]
    """The affine coefficients of one step per row, computed in float64, stored as float32.

    Host code, for use outside compiled regions: numbers or CPU tensors.

    sigma, sigma_next: noise levels, 0 <= sigma_next < sigma <= 1.
    eta: stochasticity. `flow`, `dance`: eta > 0; `cps`: 0 < eta <= 1; `ode` and `dpm1` ignore it.
    dynamics: "ode", "flow" (G2RPO, Flow-GRPO), "dance" (DanceGRPO), "cps" (Flow-CPS) or "dpm1".
    sigma_max: stands in for sigma = 1 in `flow`, whose diffusion is infinite there; in (0, 1).
        None: that row's own sigma_next (the schedule's second sigma).

    log_prob's weights are w = 1/(2 s^2), c = -log(s) - log(2 pi)/2 (a Gaussian's log-density,
    averaged over the elements), but w = 1, c = 0 for `cps`, as its authors do, and 0, 0 for `ode`.

    Raises TypeError or ValueError naming the argument, its value and what was expected.
    """
    if not isinstance(dynamics, str) or dynamics not in DYNAMICS:
        raise ValueError(f"dynamics is {dynamics!r}; expected one of {sorted(DYNAMICS)}")
    sigma, sigma_next = _column("sigma", sigma), _column("sigma_next", sigma_next)
    if 1 not in (len(sigma), len(sigma_next)) and len(sigma) != len(sigma_next):
        raise ValueError(
            f"sigma_next has {len(sigma_next)} rows; expected {len(sigma)}, the rows of sigma"
        )
    sigma, sigma_next = torch.broadcast_tensors(sigma, sigma_next)
    ordered = (0 <= sigma_next) & (sigma_next < sigma) & (sigma <= 1)
    if not bool(ordered.all()):
        row = int(ordered.logical_not().nonzero()[0])
        raise ValueError(
            f"sigma is {sigma[row].item()} and sigma_next is {sigma_next[row].item()} in row "
            f"{row}; expected 0 <= sigma_next < sigma <= 1"
        )
    eta = _check_eta(eta, dynamics)
    if sigma_max is not None and not 0 < check_number("sigma_max", sigma_max) < 1:
        raise ValueError(f"sigma_max is {sigma_max}; expected a number in (0, 1), or None")
    if dynamics == "dpm1" and bool(((sigma == 1) | (sigma_next == 0)).any()):
        raise ValueError(
            "dynamics 'dpm1' is undefined at sigma = 1 and at sigma_next = 0 (infinite log-SNR); "
            f"got sigma {sigma.tolist()}, sigma_next {sigma_next.tolist()}"
        )
    at_one = sigma_next if sigma_max is None else torch.full_like(sigma, sigma_max)
    sigma_tilde = torch.where(sigma == 1, at_one, sigma)
    a, b, s = DYNAMICS[dynamics](sigma, sigma_next, torch.full_like(sigma, eta), sigma_tilde)
    if dynamics == "ode":
        w, c = torch.zeros_like(s), torch.zeros_like(s)
    elif dynamics == "cps":
        w, c = torch.ones_like(s), torch.zeros_like(s)
    else:
        w, c = 1 / (2 * s**2), -s.log() - 0.5 * math.log(2 * math.pi)
    table = torch.stack([a, b, s, w, c], dim=1).float()
    finite = table.isfinite().all(1)
    if not bool(finite.all()):
        row = int(finite.logical_not().nonzero()[0])
        raise ValueError(
            f"sigma {sigma[row].item()}, sigma_next {sigma_next[row].item()} and eta {eta} in row "
            f"{row} give {table[row].tolist()}; expected a step whose coefficients float32 holds"
        )
    return StepCoefficients(table, dynamics)


def _column(name: str, value: float | Tensor) -> Tensor:
    """A number or a CPU tensor of at most one dimension -> float64 [P]."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ValueError(
                f"{name} is on {value.device}; expected a number or a CPU tensor "
                "(coefficients are computed on the host, then moved with .to(device))"
            )
        if value.dtype == torch.bool or value.dtype.is_complex:
            raise TypeError(f"{name} has dtype {value.dtype}; expected real numbers")
        if value.ndim > 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected [P] or a number")
        if value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient; expected constants, e.g. {name}.detach()"
            )
        return value.double().reshape(-1)
    return torch.tensor([check_number(name, value)], dtype=torch.float64)


def check_number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; expected a number")
    return value


def _check_eta(eta: float, dynamics: str) -> float:
    if dynamics in ("ode", "dpm1"):
        return 0.0
    check_number("eta", eta)
    high = 1.0 if dynamics == "cps" else math.inf
    if not (0 < eta <= high and math.isfinite(eta)):
        expected = "0 < eta <= 1" if dynamics == "cps" else "eta > 0"
        raise ValueError(f"eta is {eta}; dynamics {dynamics!r} expects {expected}")
    return float(eta)
