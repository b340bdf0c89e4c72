"""What every op keeps, on every backend: accuracy, types, layout, a row's bits in any company.

Accuracy follows flash-attention: the error against float64 may be at most twice the error that the
plain formula makes in float32, plus the floor stated in the op's row of `cases.OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from cases import OPS, SHAPES, Target, as_tuple
from torch import Tensor

import g2rpo_kernels as gk

STEP_OPS = ("step_mean", "ode_step", "sde_step", "branch_log_prob", "policy_loss")
BRANCH_OPS = ("sde_step", "branch_log_prob", "policy_loss")
ROW_SIZES = (1, 77, 4096, 4101, 12345, 129600)


def call(op: str, arguments: dict) -> tuple[Tensor, ...]:
    """The tensors an op returns, as a tuple."""
    returned = as_tuple(getattr(gk, op)(**arguments))
    return tuple(x for x in returned if x is not None)


def assert_accurate(op: str, got: Tensor, exact: Tensor, eager: Tensor) -> None:
    assert got.shape == exact.shape
    scale = max(1.0, exact.abs().max().item())
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + OPS[op].floor * scale
    assert error <= allowed, f"{op} errs by {error:.3g}, allowed {allowed:.3g}"


def skip_float64(target: Target, dtype: str) -> None:
    if dtype == "float64" and target.backend != "reference":
        pytest.skip("float64 is the reference backend's alone")


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.SMALL)
@pytest.mark.parametrize("op", OPS)
def test_accuracy_type_and_layout(op: str, shape: str, dtype: str, target: Target) -> None:
    skip_float64(target, dtype)
    arguments = cases.inputs(op, shape, dtype, device=target.device)
    eager_dtype = torch.float64 if dtype == "float64" else torch.float32
    exact, eager = cases.plain(op, arguments), cases.plain(op, arguments, eager_dtype)
    results = call(op, arguments)
    assert len(results) == len(exact)
    for got, true, plain in zip(results, exact, eager, strict=True):
        assert got.dtype == (torch.float32 if op == "normal" else eager_dtype)
        assert got.is_contiguous() and got.device.type == target.device
        assert_accurate(op, got, true, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", STEP_OPS)
def test_accuracy_at_the_size_of_flux(op: str, dtype: str, target: Target) -> None:
    arguments = cases.inputs(op, "flux720", dtype, device=target.device)
    exact, eager = cases.plain(op, arguments), cases.plain(op, arguments, torch.float32)
    for got, true, plain in zip(call(op, arguments), exact, eager, strict=True):
        assert_accurate(op, got, true, plain)


@pytest.mark.parametrize("dynamics", ["dance", "cps", "dpm1"])
@pytest.mark.parametrize("op", BRANCH_OPS)
def test_accuracy_of_every_dynamics(op: str, dynamics: str, target: Target) -> None:
    arguments = cases.inputs(op, "primes", dynamics=dynamics, device=target.device)
    exact, eager = cases.plain(op, arguments), cases.plain(op, arguments, torch.float32)
    for got, true, plain in zip(call(op, arguments), exact, eager, strict=True):
        assert_accurate(op, got, true, plain)


@pytest.mark.parametrize("shape", ["one", "scalars", "primes", "digits"])
@pytest.mark.parametrize("op", [*BRANCH_OPS, "normal"])
def test_without_a_branch_axis(op: str, shape: str, target: Target) -> None:
    arguments = cases.inputs(op, shape, branched=False, device=target.device)
    exact, eager = cases.plain(op, arguments), cases.plain(op, arguments, torch.float32)
    for got, true, plain in zip(call(op, arguments), exact, eager, strict=True):
        assert_accurate(op, got, true, plain)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("branched", [True, False], ids=["branches", "no-branches"])
@pytest.mark.parametrize("shape", ["scalars", "primes", "past_chunk"])
@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].differentiable])
def test_gradients(op: str, shape: str, branched: bool, dtype: str, target: Target) -> None:
    skip_float64(target, dtype)
    arguments = cases.inputs(op, shape, dtype, branched=branched, device=target.device)

    def gradients(arguments: dict, function: Callable[[dict], tuple]) -> list[Tensor]:
        leaves = {name: arguments[name].clone().requires_grad_() for name in OPS[op].differentiable}
        out = as_tuple(function({**arguments, **leaves}))[0]
        draw = cases.generator("gradient")
        weight = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out)
        out.backward(weight)
        return [leaf.grad for leaf in leaves.values()]

    ours = gradients(arguments, lambda given: call(op, given))
    exact = gradients(cases.at_dtype(arguments, torch.float64), lambda g: cases.plain(op, g))
    eager = gradients(arguments, lambda g: cases.plain(op, g, torch.float32))
    for name, got, true, plain in zip(OPS[op].differentiable, ours, exact, eager, strict=True):
        assert got.dtype == arguments[name].dtype and got.is_contiguous()
        assert_accurate(op, got, true, plain)


def test_x0_prediction_is_the_step_to_sigma_zero(target: Target) -> None:
    arguments = cases.inputs("ode_step", "digits", device=target.device)
    velocity, latents, sigma = (arguments[name] for name in ("velocity", "latents", "sigma"))
    x0 = gk.ode_step(velocity, latents, sigma, 0.0)
    assert torch.equal(x0, latents + -sigma.view(-1, 1, 1) * velocity)
    assert torch.equal(gk.ode_step(velocity, latents, 0.75, 0.5), latents - 0.25 * velocity)


def test_one_row_of_coefficients_serves_every_row(target: Target) -> None:
    arguments = cases.inputs("branch_log_prob", "digits", device=target.device)
    velocity, latents, x_next = (arguments[n] for n in ("velocity", "latents", "x_next"))
    one = gk.step_coefficients(0.8, 0.7).to(target.device)
    four = gk.step_coefficients(torch.full((4,), 0.8, dtype=torch.float64), 0.7).to(target.device)
    assert one.table.shape == (1, 5) and four.table.shape == (4, 5)
    seeds = cases.random_seeds((4, 3), "broadcast").to(target.device)
    for run in (
        lambda c: gk.step_mean(velocity, latents, c),
        lambda c: gk.branch_log_prob(velocity, latents, x_next, c),
        lambda c: torch.cat([y.flatten() for y in gk.sde_step(velocity, latents, c, seeds=seeds)]),
    ):
        assert torch.equal(run(one), run(four))
    grads = []
    for c in (one, four):
        leaf = velocity.clone().requires_grad_()
        options = {"old_velocity": latents, "reference_velocity": latents, "kl_weight": 0.5}
        old, advantages = x_next.flatten(2).mean(2), x_next.flatten(2).amax(2)
        out = gk.policy_loss(leaf, latents, x_next, old, advantages, c, clip_range=10.0, **options)
        out.loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and grads[0].abs().max() > 0


def test_sigma_of_one_row_serves_every_row(target: Target) -> None:
    arguments = cases.inputs("ode_step", "digits", device=target.device)
    velocity, latents = arguments["velocity"], arguments["latents"]
    one = torch.tensor([0.75], device=target.device)
    assert torch.equal(
        gk.ode_step(velocity, latents, one, 0.5),
        gk.ode_step(velocity, latents, one.expand(4), one.expand(4) - 0.25),
    )


@pytest.mark.parametrize("op", [op for op in STEP_OPS if op != "policy_loss"])  # which refuses
def test_no_rows(op: str, target: Target) -> None:
    for name in ("primes", "past_chunk"):
        arguments = cases.inputs(op, name, device=target.device)
        for key, value in arguments.items():
            if isinstance(value, gk.StepCoefficients):
                arguments[key] = gk.StepCoefficients(value.table[:0], value.dynamics)
            else:
                arguments[key] = value[:0]
        for name in OPS[op].differentiable:
            arguments[name].requires_grad_()
        results = call(op, arguments)
        for got, like in zip(results, cases.plain(op, arguments), strict=True):
            assert got.shape == like.shape and got.shape[0] == 0
        if OPS[op].differentiable:
            results[0].sum().backward()
            assert arguments["velocity"].grad.shape == arguments["velocity"].shape


@pytest.mark.parametrize("branched", [True, False], ids=["branches", "no-branches"])
@pytest.mark.parametrize("dtype", ["float32", "mixed", "float64"])
def test_seeds_and_the_noise_they_draw_give_the_same_bits(
    dtype: str, branched: bool, target: Target
) -> None:
    skip_float64(target, dtype)
    shape = SHAPES["primes"]
    arguments = cases.inputs("sde_step", shape, dtype, branched=branched, device=target.device)
    seeds = cases.random_seeds(tuple(arguments["noise"].shape[: 1 + branched]), "bits")
    seeds = seeds.to(target.device)
    del arguments["noise"]
    drawn = gk.sde_step(**arguments, seeds=seeds)
    given = gk.sde_step(**arguments, noise=gk.normal(seeds, shape.row_shape))
    assert torch.equal(drawn[0], given[0]) and torch.equal(drawn[1], given[1])


def test_ode_dynamics_gives_the_mean_and_no_log_prob(target: Target) -> None:
    arguments = cases.inputs("sde_step", "primes", dynamics="ode", device=target.device)
    x_next, log_prob = gk.sde_step(**arguments)
    del arguments["noise"]
    assert log_prob is None
    assert torch.equal(x_next, gk.step_mean(**arguments).unsqueeze(1).expand_as(x_next))


@pytest.mark.parametrize("dynamics", ["flow", "dance", "cps", "dpm1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_one_log_prob_everywhere(dtype: str, dynamics: str, target: Target) -> None:
    """The same bits at rollout, alone and inside the loss, for rows within and past a chunk."""
    for shape in ("primes", "past_chunk"):
        arguments = cases.inputs("sde_step", shape, dtype, dynamics=dynamics, device=target.device)
        x_next, log_prob = gk.sde_step(**arguments)
        step = {name: arguments[name] for name in ("velocity", "latents", "coefficients")}
        out = gk.policy_loss(**step, x_next=x_next, old_log_prob=log_prob, advantages=log_prob)
        assert torch.equal(log_prob, gk.branch_log_prob(**step, x_next=x_next))
        assert torch.equal(log_prob, out.log_prob)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", ROW_SIZES)
def test_bits_of_a_row_do_not_depend_on_its_company(
    count: int, target: Target, two_threads: None
) -> None:
    rows, branches = (3, 5) if count < 100_000 else (2, 2)
    draw = cases.generator("company", count)
    velocity, latents = (
        torch.randn(rows, count, generator=draw).to(target.device) for _ in range(2)
    )
    coefficients = cases.step_rows(rows).to(target.device)
    seeds = cases.random_seeds((rows, branches), "company").to(target.device)
    upstream = torch.randn(rows, branches, generator=draw).to(target.device)

    def run(p: slice, g: slice) -> tuple[Tensor, ...]:
        table = gk.StepCoefficients(coefficients.table[p], coefficients.dynamics)
        leaf = velocity[p].clone().requires_grad_()
        with torch.no_grad():
            x_next, log_prob = gk.sde_step(leaf, latents[p], table, seeds=seeds[p, g])
        again = gk.branch_log_prob(leaf, latents[p], x_next, table)
        again.backward(upstream[p, g])
        return x_next, log_prob, again.detach(), leaf.grad

    together = run(slice(None), slice(None))
    for p in range(rows):
        row = slice(p, p + 1)
        for whole, alone in zip(together, run(row, slice(None)), strict=True):
            assert torch.equal(whole[row], alone)
        for g in range(branches):
            branch = slice(g, g + 1)
            for whole, alone in zip(together[:3], run(row, branch)[:3], strict=True):
                assert torch.equal(whole[row, branch], alone)


def strided(x: Tensor) -> Tensor:
    """The same values, every other element of something twice as long."""
    wide = torch.full((*x.shape, 2), -1, dtype=x.dtype, device=x.device)
    wide[..., 0] = x
    return wide[..., 0]


def transposed(x: Tensor) -> Tensor:
    """The same values and shape, stored with the dimensions in the opposite order."""
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


@pytest.mark.parametrize("layout", [strided, transposed])
@pytest.mark.parametrize("op", OPS)
def test_layout_of_the_inputs_changes_no_bit(
    op: str, layout: Callable[[Tensor], Tensor], target: Target
) -> None:
    arguments = cases.inputs(op, "primes", device=target.device)
    changed = {}
    for name, value in arguments.items():
        if isinstance(value, gk.StepCoefficients):
            value = gk.StepCoefficients(layout(value.table), value.dynamics)
        elif isinstance(value, Tensor):
            value = layout(value)
        changed[name] = value
    assert any(isinstance(v, Tensor) and not v.is_contiguous() for v in changed.values())
    for got, want in zip(call(op, changed), call(op, arguments), strict=True):
        assert torch.equal(got, want) and got.is_contiguous()


def test_layout_changes_no_bit_of_a_gradient(target: Target) -> None:
    arguments = cases.inputs("policy_loss", "primes", device=target.device)
    grads = []
    for layout in (lambda x: x, transposed):
        leaf = layout(arguments["velocity"].clone()).requires_grad_()
        gk.policy_loss(**{**arguments, "velocity": leaf}).loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
