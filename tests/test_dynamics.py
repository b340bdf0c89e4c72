"""The affine coefficients of every dynamics, against the peers' own forms and the theory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import cases
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import g2rpo_kernels as gk

SDES = ("flow", "dance", "cps", "dpm1")
GAUSSIAN = ("flow", "dance", "dpm1")

# The steps as the peers write them, on predictions of image x0 and noise x1 or on the score, in
# float64: (velocity, latents, sigma, sigma_next, eta, sigma_max) -> mean, standard deviation.


def flow_grpo(v, x, sigma, sigma_next, eta, sigma_max):
    dt = sigma_next - sigma
    std_dev_t = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * eta
    mean = x * (1 + std_dev_t**2 / (2 * sigma) * dt)
    mean = mean + v * (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, std_dev_t * torch.sqrt(-dt)


def dance_grpo(v, x, sigma, sigma_next, eta, sigma_max):
    dt = sigma_next - sigma
    x0 = x - sigma * v
    score = -(x - x0 * (1 - sigma)) / sigma**2
    return x + dt * v + -0.5 * eta**2 * score * dt, eta * torch.sqrt(-dt)


def flow_cps(v, x, sigma, sigma_next, eta, sigma_max):
    std = sigma_next * math.sin(eta * math.pi / 2)
    x0, x1 = x - sigma * v, x + (1 - sigma) * v
    return x0 * (1 - sigma_next) + x1 * torch.sqrt(sigma_next**2 - std**2), std


def sde_dpm_solver_pp(v, x, sigma, sigma_next, eta, sigma_max):
    alpha, alpha_next = 1 - sigma, 1 - sigma_next
    h = torch.log(alpha_next / sigma_next) - torch.log(alpha / sigma)
    x0 = x - sigma * v
    mean = sigma_next / sigma * torch.exp(-h) * x + alpha_next * (1 - torch.exp(-2 * h)) * x0
    return mean, sigma_next * torch.sqrt(1 - torch.exp(-2 * h))


PEERS: dict[str, Callable] = {
    "flow": flow_grpo,
    "dance": dance_grpo,
    "cps": flow_cps,
    "dpm1": sde_dpm_solver_pp,
}


def random_steps(count: int = 200) -> tuple[Tensor, Tensor]:
    """sigma > sigma_next in (0, 1), and not so close that the peers' own float64 cancels."""
    draw = torch.rand(2, count, generator=cases.generator("steps"), dtype=torch.float64)
    low, high = draw.sort(0).values
    return 0.02 + 0.96 * high + 1e-3, 0.02 + 0.96 * low


@pytest.mark.parametrize("eta", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("dynamics", SDES)
def test_coefficients_are_the_peers_step_to_half_a_float32_ulp(dynamics: str, eta: float) -> None:
    sigma, sigma_next = random_steps()
    table = gk.step_coefficients(sigma, sigma_next, eta, dynamics).table
    one, zero = torch.ones_like(sigma), torch.zeros_like(sigma)
    arguments = (sigma, sigma_next, eta, sigma_next)
    a, s = PEERS[dynamics](zero, one, *arguments)  # a step is affine: x = 1, v = 0 gives a
    b, _ = PEERS[dynamics](one, zero, *arguments)
    for ours, peer in zip(table.T[:3], (a, b, s), strict=True):
        torch.testing.assert_close(ours.double(), peer, rtol=2**-24 * 1.0001, atol=1e-13)


@pytest.mark.parametrize("dynamics", SDES)
def test_steps_are_the_peers_steps(dynamics: str) -> None:
    sigma, sigma_next = random_steps()
    draw = cases.generator("peers")
    v, x, eps = torch.randn(3, len(sigma), 8, generator=draw, dtype=torch.float64)
    coefficients = gk.step_coefficients(sigma, sigma_next, 0.7, dynamics)
    x_next, log_prob = gk.sde_step(v, x, coefficients, noise=eps)
    mean, s = PEERS[dynamics](v, x, sigma[:, None], sigma_next[:, None], 0.7, sigma_next[:, None])
    torch.testing.assert_close(x_next, mean + s * eps, rtol=1e-6, atol=1e-6)
    if dynamics == "cps":
        want = -((x_next - mean) ** 2).mean(1)
    else:
        want = Normal(mean, s).log_prob(x_next).mean(1)
    torch.testing.assert_close(log_prob, want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("step", "q", "a", "b", "s"),
    [
        (0, 4.748, 0.7550, -0.0217, 0.7000),
        (1, 4.696, 0.7327, -0.0295, 0.7231),
        (7, 1.375, 0.9475, -0.0549, 0.2888),
    ],
)
def test_golden_values(step: int, q: float, a: float, b: float, s: float) -> None:
    sigma = cases.schedule(steps=16, shift=3)
    table = gk.step_coefficients(sigma[step], sigma[step + 1], eta=0.7).table
    assert table.shape == (1, 5)
    torch.testing.assert_close(table[0, :3], torch.tensor([a, b, s]), rtol=0, atol=5e-5)
    rate = table[0, 2].item() / (sigma[step] - sigma[step + 1]).sqrt().item()
    assert abs(rate - q) < 5e-4


@pytest.mark.parametrize("dynamics", GAUSSIAN)
def test_gaussian_weights(dynamics: str) -> None:
    _, _, s, w, c = gk.step_coefficients(*random_steps(), 0.7, dynamics).table.double().T
    torch.testing.assert_close(w, 0.5 / s**2, rtol=3e-7, atol=0)
    torch.testing.assert_close(c, Normal(0.0, s).log_prob(torch.zeros(1)), rtol=0, atol=5e-7)


def test_weights_of_the_others() -> None:
    sigma, sigma_next = random_steps()
    cps = gk.step_coefficients(sigma, sigma_next, 0.7, "cps").table
    assert (cps[:, 3] == 1).all() and (cps[:, 4] == 0).all()
    ode = gk.step_coefficients(sigma, sigma_next, dynamics="ode").table
    assert (ode[:, 0] == 1).all() and (ode[:, 2:] == 0).all()
    assert torch.equal(ode[:, 1], (sigma_next - sigma).float())


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps"])
def test_ode_is_the_limit_of_no_noise(dynamics: str) -> None:
    """Drift and noise approach the ODE's as eta^2 and eta."""
    steps = random_steps()
    ode = gk.step_coefficients(*steps, dynamics="ode").table[:, :3]
    for eta, drift, noise in ((1e-2, 3e-3, 0.2), (1e-4, 1e-6, 2e-3)):
        table = gk.step_coefficients(*steps, eta, dynamics).table[:, :3]
        torch.testing.assert_close(table[:, :2], ode[:, :2], rtol=0, atol=drift)
        assert (table[:, 2] > 0).all() and table[:, 2].max() < noise


@pytest.mark.parametrize("dynamics", ["flow", "dance", "dpm1", "ode"])
@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.9])
def test_a_step_keeps_the_marginals_to_second_order(dynamics: str, sigma: float) -> None:
    """In a Gaussian world every marginal is known; the error of one step falls with dt squared.

    x0 ~ N(m, tau^2) and noise ~ N(0, 1) make x_sigma ~ N((1 - sigma) m, V), and the exact velocity
    is the affine E[noise - x0 | x_sigma].
    """
    m, tau = 0.8, 0.5

    def variance(at: float) -> float:
        return (1 - at) ** 2 * tau**2 + at**2

    def errors(dt: float) -> tuple[float, float]:
        coefficients = gk.step_coefficients(sigma, sigma - dt, 0.7, dynamics)
        a, b, s = coefficients.table[0, :3].tolist()
        slope = (sigma - (1 - sigma) * tau**2) / variance(sigma)
        mean = a * (1 - sigma) * m + b * -m  # E[velocity] = -m
        spread = (a + b * slope) ** 2 * variance(sigma) + s**2
        return mean - (1 - sigma + dt) * m, spread - variance(sigma - dt)

    for large, middle, small in zip(*(errors(dt) for dt in (0.02, 0.01, 0.005)), strict=True):
        # A factor of 4 at each halving; 3e-7 is what float32 coefficients leave behind.
        assert abs(middle) < abs(large) / 3 + 3e-7
        assert abs(small) < abs(middle) / 3 + 3e-7


def test_sigma_max_stands_in_for_sigma_one_only() -> None:
    sigma = torch.tensor([1.0, 0.9, 1.0])
    sigma_next = torch.tensor([0.95, 0.8, 0.7])
    default = gk.step_coefficients(sigma, sigma_next).table
    given = gk.step_coefficients(sigma, sigma_next, sigma_max=0.98).table
    assert torch.equal(default[1], given[1])
    for row, stand_in in ((0, 0.95), (2, 0.7)):
        # The default is that row's own sigma_next, whatever stands in the other rows.
        rate = 0.7 / math.sqrt(1 - stand_in)
        s = rate * math.sqrt(1 - sigma_next[row].item())
        assert default[row, 2].item() == pytest.approx(s, rel=1e-6)
        s = 0.7 / math.sqrt(1 - 0.98) * math.sqrt(1 - sigma_next[row].item())
        assert given[row, 2].item() == pytest.approx(s, rel=1e-6)
    for dynamics in ("dance", "cps", "ode"):
        pair = [gk.step_coefficients(1.0, 0.9, 0.7, dynamics, sigma_max=s) for s in (None, 0.5)]
        assert torch.equal(pair[0].table, pair[1].table)


def test_steps_at_the_ends_of_the_schedule_are_finite() -> None:
    for dynamics in ("flow", "dance", "cps", "ode"):
        first = gk.step_coefficients(1.0, 0.97, 0.7, dynamics).table
        last = gk.step_coefficients(0.1, 0.0, 0.7, dynamics).table
        whole = gk.step_coefficients(1, 0, 0.7, dynamics).table
        assert torch.cat([first, last, whole]).isfinite().all()
    # The last step of cps replaces all noise by none: it is the x0-prediction.
    a, b, s, *_ = gk.step_coefficients(0.1, 0.0, 0.7, "cps").table[0].tolist()
    assert (a, b, s) == pytest.approx((1.0, -0.1, 0.0), abs=1e-8)


def test_numbers_tensors_and_broadcasting() -> None:
    sigma = torch.tensor([0.9, 0.7, 0.5], dtype=torch.float64)
    table = gk.step_coefficients(sigma, 0.25).table
    rows = [gk.step_coefficients(value, 0.25).table for value in sigma.tolist()]
    assert table.shape == (3, 5) and torch.equal(table, torch.cat(rows))
    assert torch.equal(gk.step_coefficients(0.95, sigma).table[1], table_of(0.95, 0.7))
    assert torch.equal(gk.step_coefficients(sigma[:1], sigma[1:]).table[1], table_of(0.9, 0.5))
    assert gk.step_coefficients(sigma[:0], sigma[:0]).table.shape == (0, 5)
    # A float32 sigma is widened, not rounded again.
    assert torch.equal(
        gk.step_coefficients(torch.tensor(0.9), 0.5).table,
        gk.step_coefficients(torch.tensor(0.9).double(), 0.5).table,
    )


def table_of(sigma: float, sigma_next: float) -> Tensor:
    return gk.step_coefficients(sigma, sigma_next).table[0]


def test_ode_and_dpm1_ignore_eta() -> None:
    for dynamics in ("ode", "dpm1"):
        tables = [gk.step_coefficients(0.9, 0.8, eta, dynamics).table for eta in (0.7, 0.1, -3)]
        assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])


def test_step_coefficients_are_a_frozen_table_on_one_device() -> None:
    coefficients = gk.step_coefficients(0.9, 0.8, dynamics="dance")
    assert coefficients.table.dtype == torch.float32 and coefficients.dynamics == "dance"
    assert coefficients.table.device.type == "cpu" and not coefficients.table.requires_grad
    moved = coefficients.to("meta")
    assert moved.table.device.type == "meta" and moved.dynamics == "dance"
    with pytest.raises(dataclasses.FrozenInstanceError):
        coefficients.dynamics = "flow"
    assert coefficients == coefficients and coefficients != gk.step_coefficients(0.9, 0.8)
    assert set(gk.DYNAMICS) == {"ode", *SDES}
