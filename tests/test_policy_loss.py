"""The policy loss: worked examples, gradient against autograd's, options, statistics."""

from __future__ import annotations

import math

import cases
import formulas
import pytest
import torch
from cases import Target
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import g2rpo_kernels as gk

SDES = ("flow", "dance", "cps", "dpm1")


def problem(target: Target, dynamics: str = "flow", branched: bool = True) -> dict:
    """Inputs of the "primes" case in float64 on the reference, float32 on the other backends."""
    dtype = "float64" if target.backend == "reference" else "float32"
    return cases.inputs(
        "policy_loss", "primes", dtype, dynamics=dynamics, branched=branched, device=target.device
    )


def near(velocity: Tensor, name: str, by: float = 0.05) -> Tensor:
    """Another velocity: that of the old policy or of the reference model."""
    move = torch.randn(velocity.shape, generator=cases.generator(name), dtype=torch.float64)
    return velocity + by * move.to(velocity)


def given_ratios(ratios: list[float], advantages: list[float], target: Target) -> dict:
    """One anchor row whose branches have exactly these ratios, up to rounding; clip_range 0.2."""
    draw = torch.randn(2, 1, 8, generator=cases.generator("ratios")).to(target.device)
    step = {"velocity": draw[0], "latents": draw[1]}
    step["coefficients"] = gk.step_coefficients(0.8, 0.7).to(target.device)
    seeds = cases.random_seeds((1, len(ratios)), "ratios").to(target.device)
    x_next, log_prob = gk.sde_step(**step, seeds=seeds)
    return {
        **step,
        "x_next": x_next,
        "old_log_prob": log_prob - torch.tensor([ratios]).log().to(target.device),
        "advantages": torch.tensor([advantages], device=target.device),
        "clip_range": 0.2,
    }


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),  # already likelier than the window allows: no more of it
        (1.5, -1.0, 1.5, 1.5),  # likelier though bad: pushed back
        (0.5, 1.0, -0.5, -0.5),  # less likely though good: pulled up
        (0.5, -1.0, 0.8, 0.0),  # already less likely than the window allows
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_worked_examples(
    ratio: float, advantage: float, loss: float, slope: float, target: Target
) -> None:
    """slope is dloss/dlog_prob: the gradient must be that much of the log-probability's own."""
    given = given_ratios([ratio], [advantage], target)
    leaf = given["velocity"].clone().requires_grad_()
    out = gk.policy_loss(**{**given, "velocity": leaf})
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    out.loss.backward()
    other = given["velocity"].clone().requires_grad_()
    step = {name: given[name] for name in ("latents", "x_next", "coefficients")}
    gk.branch_log_prob(other, **step).backward(torch.full_like(given["advantages"], slope))
    assert other.grad.abs().max() > 1e-3 or slope == 0
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_statistics(target: Target) -> None:
    ratios, advantages = [1.5, 0.5, 1.1, 0.95, 1.0], [1.0, 1.0, -1.0, 2.0, 0.5]
    out = gk.policy_loss(**given_ratios(ratios, advantages, target))
    logs = [math.log(ratio) for ratio in ratios]
    assert out.ratio_mean.item() == pytest.approx(sum(ratios) / 5, abs=1e-6)
    assert out.ratio_max.item() == pytest.approx(1.5, abs=1e-6)
    assert out.clip_fraction.item() == pytest.approx(2 / 5)
    kl = sum(ratio - 1 - log for ratio, log in zip(ratios, logs, strict=True)) / 5
    assert out.approx_kl.item() == pytest.approx(kl, abs=1e-6)
    assert out.kl.item() == 0
    want = (-1.2 - 0.5 + 1.1 - 1.9 - 0.5) / 5
    assert out.loss.item() == pytest.approx(want, abs=1e-6)
    assert out.statistics.shape == (5,)


OPTIONS = {
    "plain": {},
    "advantage_clip": {"advantage_clip": 0.4},
    "kl": {"kl_weight": 0.3, "reference_velocity": True},
    "reference_without_weight": {"reference_velocity": True},
    "ratio_norm": {"old_velocity": True},
    "all": {
        "advantage_clip": 0.4,
        "kl_weight": 0.3,
        "reference_velocity": True,
        "old_velocity": True,
    },
}


@pytest.mark.parametrize("branched", [True, False], ids=["branches", "no-branches"])
@pytest.mark.parametrize("dynamics", SDES)
@pytest.mark.parametrize("options", OPTIONS)
def test_value_and_gradient_are_those_of_the_plain_formula(
    options: str, dynamics: str, branched: bool, target: Target
) -> None:
    given = problem(target, dynamics, branched)
    given |= {
        name: near(given["velocity"], name) if name.endswith("velocity") else value
        for name, value in OPTIONS[options].items()
    }
    if "old_velocity" in given:  # else the normalised ratios could lie at the window's edge
        given["clip_range"] = 0.0045
    leaves = [given["velocity"].clone().requires_grad_() for _ in range(2)]
    ours = gk.policy_loss(**{**given, "velocity": leaves[0]})
    loss, log_prob, statistics = formulas.policy_loss(**{**given, "velocity": leaves[1]})
    (3 * ours.loss).backward()
    (3 * loss).backward()
    close = {"rtol": 1e-9, "atol": 1e-11} if loss.dtype == torch.float64 else {}
    # The table is float32 in both, but 2 w b is rounded once more in one of them.
    torch.testing.assert_close(ours.loss, loss, **close)
    torch.testing.assert_close(ours.log_prob, log_prob, **close)
    torch.testing.assert_close(ours.statistics, statistics, **close)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, **close)
    assert leaves[0].grad.abs().max() > 1e-5
    if options == "plain":
        assert 0 < statistics[2] < 1, "some branches must be clipped and some not"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("dynamics", SDES)
def test_on_policy_the_ratio_is_exactly_one(dynamics: str, dtype: str, target: Target) -> None:
    for shape in ("primes", "past_chunk", "digits"):
        given = cases.inputs("sde_step", shape, dtype, dynamics=dynamics, device=target.device)
        x_next, old_log_prob = gk.sde_step(**given)
        del given["noise"]
        advantages = torch.randn(old_log_prob.shape, generator=cases.generator(shape))
        advantages = advantages.to(target.device)
        for old_velocity in (None, given["velocity"]):
            leaf = given["velocity"].clone().requires_grad_()
            out = gk.policy_loss(
                **{**given, "velocity": leaf}, x_next=x_next, old_log_prob=old_log_prob,
                advantages=advantages, old_velocity=old_velocity,
            )  # fmt: skip
            assert out.ratio_mean == 1 and out.ratio_max == 1
            assert out.clip_fraction == 0 and out.approx_kl == 0
            torch.testing.assert_close(out.loss.detach(), -advantages.mean())
            out.loss.backward()
            assert leaf.grad.abs().max() > 0  # the gradient is there though the loss is flat


def test_only_the_loss_carries_a_gradient(target: Target) -> None:
    given = problem(target)
    given["velocity"].requires_grad_()
    out = gk.policy_loss(**given)
    assert out.loss.requires_grad
    for name in ("log_prob", "statistics", "ratio_mean", "ratio_max", "clip_fraction", "kl"):
        assert not getattr(out, name).requires_grad, name
    with torch.no_grad():
        assert not gk.policy_loss(**given).loss.requires_grad


@pytest.mark.parametrize("spoiled", ["old_log_prob", "advantages", "x_next", "latents", "velocity"])
def test_nan_reaches_the_loss_and_the_gradient(spoiled: str, target: Target) -> None:
    """A silent 0 would train on; and what is healthy elsewhere stays so."""
    given = problem(target)
    given[spoiled] = given[spoiled].clone()
    given[spoiled][1].view(-1)[0] = torch.nan
    given["velocity"].requires_grad_()
    out = gk.policy_loss(**given)
    out.loss.backward()
    assert out.loss.isnan()
    assert out.ratio_mean.isnan() == out.ratio_max.isnan() == (spoiled != "advantages")
    nan = given["velocity"].grad.flatten(1).isnan()
    assert nan[1].any() and not nan[0].any() and not nan[2].any()


def test_nan_log_prob_reaches_the_gradient_of_branch_log_prob(target: Target) -> None:
    given = cases.inputs("branch_log_prob", "primes", device=target.device)
    given["x_next"][1, 2] = torch.nan
    given["velocity"].requires_grad_()
    log_prob = gk.branch_log_prob(**given)
    log_prob.sum().backward()
    assert log_prob.isnan().nonzero().tolist() == [[1, 2]]
    assert given["velocity"].grad.flatten(1).isnan().all(1).tolist() == [False, True, False]


def test_advantage_clip_clamps_first(target: Target) -> None:
    given = problem(target)
    clipped = gk.policy_loss(**given, advantage_clip=0.5).loss
    given["advantages"] = given["advantages"].clamp(-0.5, 0.5)
    assert torch.equal(clipped, gk.policy_loss(**given).loss)
    assert torch.equal(clipped, gk.policy_loss(**given, advantage_clip=0.5).loss)


@pytest.mark.parametrize("dynamics", ["flow", "dance", "dpm1"])
def test_kl_is_that_of_the_two_gaussians(dynamics: str, target: Target) -> None:
    given = problem(target, dynamics)
    reference = near(given["velocity"], "reference_velocity")
    out = gk.policy_loss(**given, reference_velocity=reference, kl_weight=0.25)
    # The true means: float32 ones lie so close to each other that their gap would lose digits.
    step = cases.at_dtype({n: given[n] for n in ("latents", "coefficients")}, torch.float64)
    s = given["coefficients"].table[:, 2].view(-1, 1, 1).double()
    policies = [
        Normal(formulas.step_mean(v.double(), **step), s) for v in (given["velocity"], reference)
    ]
    want = kl_divergence(*policies).mean().to(out.kl.dtype)
    torch.testing.assert_close(out.kl, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss - gk.policy_loss(**given).loss, 0.25 * want)
    without_weight = gk.policy_loss(**given, reference_velocity=reference)
    assert torch.equal(without_weight.kl, out.kl)
    assert torch.equal(without_weight.loss, gk.policy_loss(**given).loss)


@pytest.mark.parametrize("dynamics", ["flow", "dance", "dpm1"])
def test_normalised_ratio_is_the_noise_along_the_drift(dynamics: str, target: Target) -> None:
    """GRPO-Guard's ratio has the closed form exp(mean(eps * (mean - mean_old))) at every step."""
    if target.backend != "reference":
        pytest.skip("float64 is the reference backend's alone")
    given = cases.inputs("sde_step", "primes", "float64", dynamics=dynamics, device=target.device)
    x_next, old_log_prob = gk.sde_step(**given)
    noise, old = given.pop("noise"), given["velocity"]
    new = near(old, "drift", by=0.5)
    step = {name: given[name] for name in ("latents", "coefficients")}
    drift = gk.step_mean(new, **step) - gk.step_mean(old, **step)
    want = (noise * drift.unsqueeze(1)).flatten(2).mean(2).exp()
    zero = torch.zeros_like(old_log_prob)
    ratios = []
    for p, g in torch.cartesian_prod(torch.arange(3), torch.arange(5)).tolist():
        row = {"latents": step["latents"][p : p + 1], "coefficients": row_of(step, p)}
        out = gk.policy_loss(
            new[p : p + 1], x_next=x_next[p : p + 1, g : g + 1], advantages=zero[:1, :1],
            old_log_prob=old_log_prob[p : p + 1, g : g + 1], old_velocity=old[p : p + 1], **row,
        )  # fmt: skip
        ratios.append(out.ratio_mean)
    torch.testing.assert_close(torch.stack(ratios).view(3, 5), want, rtol=1e-6, atol=0)
    assert (want - 1).abs().max() > 1e-3


def row_of(step: dict, p: int) -> gk.StepCoefficients:
    coefficients = step["coefficients"]
    return gk.StepCoefficients(coefficients.table[p : p + 1], coefficients.dynamics)


def test_rows_in_one_call_are_already_averaged(target: Target) -> None:
    """K rows in one call are the mean of K calls, gradients included."""
    given = problem(target)
    per_row = ("velocity", "latents", "x_next", "old_log_prob", "advantages")
    together = given["velocity"].clone().requires_grad_()
    whole = gk.policy_loss(**{**given, "velocity": together})
    whole.loss.backward()
    apart = given["velocity"].clone().requires_grad_()
    losses = []
    for p in range(3):
        row = {name: given[name][p : p + 1] for name in per_row}
        row["velocity"] = apart[p : p + 1]
        out = gk.policy_loss(**row, coefficients=row_of(given, p), clip_range=given["clip_range"])
        (out.loss / 3).backward()
        losses.append(out.loss.detach())
    torch.testing.assert_close(whole.loss.detach(), torch.stack(losses).mean())
    torch.testing.assert_close(together.grad, apart.grad)


def test_a_gradient_has_no_gradient(target: Target) -> None:
    """Differentiating twice is refused rather than answered with a silent zero."""
    given = problem(target)
    leaf = given["velocity"].requires_grad_()
    step = {name: given[name] for name in ("velocity", "latents", "x_next", "coefficients")}
    for out in (gk.policy_loss(**given).loss, gk.branch_log_prob(**step).sum()):
        (gradient,) = torch.autograd.grad(out, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            gradient.sum().backward()
