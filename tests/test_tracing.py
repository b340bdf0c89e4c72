"""What torch.library asks of an op: opcheck, gradcheck, and a place in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import cases
import formulas
import pytest
import torch
from cases import OPS, Target
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import g2rpo_kernels as gk
from g2rpo_kernels.native import NATIVE


def raw_arguments(op: str, shape: str, branched: bool, device: str) -> list[tuple]:
    """Argument tuples of torch.ops.g2rpo.<op>, with every optional tensor present and absent."""
    if op == "log_prob_backward":
        given = cases.inputs("branch_log_prob", shape, branched=branched, device=device)
    else:
        given = cases.inputs(op, shape, branched=branched, device=device)
    values = list(given.values())
    if op in ("ode_step", "normal"):
        return [tuple(values)]
    if op == "group_advantages":
        return [(*values, 1e-8), (*values[:2], None, 1e-8)]
    table = given["coefficients"].table
    velocity, latents = given["velocity"], given["latents"]
    if op == "step_mean":
        return [(velocity, latents, table)]
    if op == "sde_step":
        seeds = cases.random_seeds(given["noise"].shape[: 1 + branched], "raw").to(device)
        return [
            (velocity, latents, table, None, given["noise"]),
            (velocity, latents, table, seeds, None),
        ]
    x_next = given["x_next"]
    if op == "branch_log_prob":
        return [(velocity, latents, x_next, table)]
    if op == "log_prob_backward":
        upstream = torch.randn(x_next.shape[: 1 + branched], device=device)
        plain = (upstream, velocity, latents, x_next, table)
        return [plain, (*plain, torch.ones((), device=device), latents, latents, 0.5)]
    plain = (velocity, latents, x_next, given["old_log_prob"], given["advantages"], table, 0.01)
    return [(*plain, None, None, 0.0, None), (*plain, 0.5, latents, 0.1, latents)]


@pytest.mark.parametrize("op", NATIVE)
def test_opcheck(op: str, target: Target) -> None:
    """Schema, fake, autograd registration and AOT dispatch, static and dynamic."""
    overload = getattr(torch.ops.g2rpo, op).default
    for shape, branched in (("primes", True), ("scalars", False)):
        for arguments in raw_arguments(op, shape, branched, target.device):
            torch.library.opcheck(overload, arguments)
            if op in OPS and OPS[op].differentiable:
                leaf = arguments[0].clone().requires_grad_()
                torch.library.opcheck(overload, (leaf, *arguments[1:]))


@pytest.mark.parametrize("op", NATIVE)
def test_fake_agrees_with_the_op_on_odd_inputs(op: str, target: Target) -> None:
    """Half precision and transposed storage: shape, dtype and strides as promised."""

    def half(x: object) -> object:
        """velocity, latents and their kin; what has a branch axis stays float32."""
        return x.bfloat16() if isinstance(x, Tensor) and x.shape == (3, 7, 11) else x

    def transposed(x: object) -> object:
        if not isinstance(x, Tensor):
            return x
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)

    overload = getattr(torch.ops.g2rpo, op).default
    for arguments in raw_arguments(op, "primes", True, target.device):
        for given in (tuple(map(half, arguments)), tuple(map(transposed, arguments))):
            real = cases.as_tuple(overload(*given))
            with FakeTensorMode() as mode:
                faked = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given]
                promised = cases.as_tuple(overload(*faked))
            for got, want in zip(real, promised, strict=True):
                assert (got.shape, got.dtype, got.stride()) == (
                    want.shape, want.dtype, want.stride()
                )  # fmt: skip


GRADCHECKS: dict[str, tuple[str, dict]] = {
    "step_mean": ("step_mean", {}),
    "ode_step": ("ode_step", {}),
    "branch_log_prob": ("branch_log_prob", {}),
    "policy_loss": ("policy_loss", {}),
    "policy_loss, advantages clipped": ("policy_loss", {"advantage_clip": 0.5}),
    "policy_loss, KL": ("policy_loss", {"kl_weight": 0.3, "reference_velocity": True}),
    "policy_loss, normalised ratio": ("policy_loss", {"old_velocity": True, "clip_range": 0.0045}),
}


@pytest.mark.parametrize("branched", [True, False], ids=["branches", "no-branches"])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name: str, branched: bool, target: Target) -> None:
    """Against finite differences in float64, with branches inside and outside of the window."""
    if target.backend != "reference":
        pytest.skip("float64 is the reference backend's alone")
    op, options = GRADCHECKS[name]
    shape = cases.Shape("gradcheck", 3, 7, (2, 3))
    given = cases.inputs(op, shape, "float64", branched=branched, device=target.device)
    for option, value in options.items():
        if value is True:
            value = given["velocity"] + 0.3 * given["velocity"].flip(-1)
        given[option] = value
    names = OPS[op].differentiable
    for leaf in names:
        given[leaf].requires_grad_()
    if op == "policy_loss" and branched:
        assert 0 < formulas.policy_loss(**given)[2][2] < 1, "some clipped, some not"

    def function(*leaves: Tensor) -> Tensor:
        out = getattr(gk, op)(**{**given, **dict(zip(names, leaves, strict=True))})
        return cases.as_tuple(out)[0]

    assert torch.autograd.gradcheck(function, tuple(given[leaf] for leaf in names))


def run(op: str, given: dict, function: Callable) -> list[Tensor]:
    """Outputs, then gradients where the op has them."""
    given = {**given, **{name: given[name].clone() for name in OPS[op].differentiable}}
    for name in OPS[op].differentiable:
        given[name].requires_grad_()
    results = cases.as_tuple(function(given))
    if OPS[op].differentiable:
        results[0].square().sum().backward()
    return [*results, *(given[name].grad for name in OPS[op].differentiable)]


def surrounded(op: str) -> Callable[[dict], tuple]:
    """The op between operations of torch's own, as in a model's step."""

    def function(given: dict) -> tuple:
        given = {
            name: value * 2 if name in ("velocity", "rewards") else value
            for name, value in given.items()
        }
        return tuple(result + 1 for result in cases.as_tuple(getattr(gk, op)(**given)))

    return function


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("op", OPS)
def test_compiles_to_one_graph_with_the_same_bits(
    op: str, target: Target, fresh_compiler: None
) -> None:
    function = surrounded(op)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for branched in (True, False):
        given = cases.inputs(op, "primes", branched=branched, device=target.device)
        for got, want in zip(run(op, given, compiled), run(op, given, function), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("op", OPS)
def test_one_dynamic_graph_serves_every_size(op: str, target: Target, fresh_compiler: None) -> None:
    """No recompilation when rows, branches and row sizes change."""
    function = surrounded(op)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    shapes = [(3, 6, (7, 11)), (4, 8, (9, 13)), (11, 12, (15, 17))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, branches, row_shape in shapes:
            shape = cases.Shape("dynamic", rows, branches, row_shape)
            given = cases.inputs(op, shape, device=target.device)
            if op == "group_advantages":
                given["group_size"] = 2  # an integer, and so a constant of the graph
            for got, want in zip(run(op, given, compiled), run(op, given, function), strict=True):
                assert torch.equal(got, want)


def test_seeds_and_options_compile_too(target: Target, fresh_compiler: None) -> None:
    """A whole step in one graph: draw, then the loss with every option, then its gradient."""
    given = cases.inputs("step_mean", "primes", device=target.device)
    seeds = cases.random_seeds((3, 5), "compile").to(target.device)

    def step(velocity: Tensor, latents: Tensor, coefficients: gk.StepCoefficients) -> tuple:
        x_next, old = gk.sde_step(velocity.detach(), latents, coefficients, seeds=seeds)
        noise = gk.normal(seeds, latents.shape[1:])
        out = gk.policy_loss(
            velocity * 1.01, latents, x_next, old, noise.mean((2, 3)), coefficients,
            advantage_clip=1.0, reference_velocity=latents, kl_weight=0.1, old_velocity=latents,
        )  # fmt: skip
        return out.loss, out.ratio_mean, out.clip_fraction, out.kl, out.log_prob, x_next

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaf = given["velocity"].clone().requires_grad_()
        out = function(leaf, given["latents"], given["coefficients"])
        out[0].backward()
        assert not out[1].requires_grad and not out[4].requires_grad
        results.append([*out, leaf.grad])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_wrong_input_is_refused_in_compiled_code(target: Target, fresh_compiler: None) -> None:
    given = cases.inputs("step_mean", "primes", device=target.device)
    given["latents"] = given["latents"][:2]
    compiled = torch.compile(lambda given: gk.step_mean(**given), backend="aot_eager")
    with pytest.raises(ValueError, match=r"latents has shape \(2, 7, 11\); expected \(3, 7, 11\)"):
        compiled(given)
