"""joint_linear: one GEMM of several linears, eager and traced, its weights together or apart."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode

from g2rpo_kernels import joint_linear as joint

ROWS = (16, 16, 16, 40)
WIDTH = 24


def new_linears(bias: bool = True, together: bool = True) -> nn.ModuleList:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linears = nn.ModuleList(nn.Linear(WIDTH, n, bias=bias) for n in ROWS)
    if together:
        joint.share_storage(linears)
    return linears


def given(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))


def separately(x: Tensor, linears: nn.ModuleList) -> Tensor:
    return torch.cat([linear(x) for linear in linears], dim=-1)


def run(linears: nn.ModuleList, x: Tensor, function: Callable = joint.joint_linear) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    linears.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x, linears)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y.float() * weights).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in linears.parameters())]


def concatenated(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The matrices that torch.cat is given from here on."""
    matrices, cat = [], torch.cat

    def watched(parts, *arguments, **options):
        matrices.extend(part for part in parts if part.ndim == 2)
        return cat(parts, *arguments, **options)

    monkeypatch.setattr(joint.torch, "cat", watched)
    return matrices


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
@pytest.mark.parametrize("shape", [(2, 5), (7,), (), (0, 3)], ids=str)
def test_the_same_as_each_by_itself(bias: bool, together: bool, shape: tuple[int, ...]) -> None:
    linears, x = new_linears(bias, together), given(*shape)
    for got, want in zip(run(linears, x), run(linears, x, separately), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradcheck() -> None:
    linears = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 1)]).double()
    joint.share_storage(linears)
    x = given(2)[:, :3].double().requires_grad_()

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return joint.joint_linear(x, linears)

    assert torch.autograd.gradcheck(function, (x, *linears.parameters()))


@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_bits_are_eager_bits(
    backend: str, together: bool, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    linears, x = new_linears(together=together), given(2, 5)
    eager = run(linears, x)
    compiled = torch.compile(joint.joint_linear, backend=backend, fullgraph=True)
    first = run(linears, x, compiled)
    copied = concatenated(monkeypatch)
    again = run(linears, x, compiled)
    # Where the weights lie apart, forward and backward put them together, and keep no copy.
    assert len(copied) == (0 if together else 2 * len(ROWS))
    for want, *others in zip(eager, first, again, strict=True):
        for got in others:
            if backend == "inductor" and want.ndim == 1:  # sums a bias' gradient in its own order
                torch.testing.assert_close(got, want)
            else:
                assert torch.equal(got, want)


def test_one_graph_serves_weights_together_and_apart(fresh_compiler: None) -> None:
    """Whether they lie together is seen when the graph runs, not when it is traced."""
    linears, x = new_linears(), given(2, 5)
    compiled = torch.compile(joint.joint_linear, backend="aot_eager", fullgraph=True)
    together = run(linears, x, compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        joint.separate(linears)
        apart = run(linears, x, compiled)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_the_traced_graph_holds_no_concatenation_of_weights(fresh_compiler: None) -> None:
    recorded = AotEagerAndRecordGraphs()
    linears = new_linears()
    run(linears, given(2, 5), torch.compile(joint.joint_linear, backend=recorded, fullgraph=True))
    (traced,), (forward,), (backward,) = recorded.graphs, recorded.fw_graphs, recorded.bw_graphs
    targets = [
        [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        for graph in (traced, forward, backward)
    ]
    assert targets[0] == ["g2rpo.joint_linear"]
    assert "g2rpo.joint_linear.default" in targets[1]
    assert "g2rpo.joint_linear_input_gradient.default" in targets[2]
    assert not [name for names in targets for name in names if "cat" in name]
    # What the backward keeps is the parameters themselves and x.
    kept = [node for node in backward.graph.nodes if node.op == "placeholder"]
    assert {tuple(node.meta["val"].shape) for node in kept} == {
        *((n, WIDTH) for n in ROWS), (10, WIDTH), (2, 5, sum(ROWS)),
    }  # fmt: skip


def test_one_dynamic_graph_serves_every_batch(fresh_compiler: None) -> None:
    linears = new_linears()
    compiled = torch.compile(joint.joint_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((2, 5), (3, 7), (4, 9)):
            x = given(*shape)
            pairs = zip(run(linears, x, compiled), run(linears, x), strict=True)
            assert all(torch.equal(got, want) for got, want in pairs)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_opcheck(bias: bool) -> None:
    linears = new_linears(bias)
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears] if bias else []
    for x in (given(2, 5).requires_grad_(), given(7), given(5, 2).transpose(0, 1)):
        torch.library.opcheck(torch.ops.g2rpo.joint_linear.default, (x, weights, biases))
    for grad in (torch.randn(2, 5, sum(ROWS)), torch.randn(5, 2, sum(ROWS)).transpose(0, 1)):
        torch.library.opcheck(
            torch.ops.g2rpo.joint_linear_input_gradient.default,
            (grad, [weight.detach() for weight in weights]),
        )


def test_no_copy_of_the_weights_and_none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    linears, x = new_linears(), given(2, 5).requires_grad_()
    copied = concatenated(monkeypatch)
    run(linears, x.detach())
    assert not copied
    joint.separate(linears)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = joint.joint_linear(x, linears)
    assert len(copied) == len(ROWS)
    parameters = {p.data_ptr() for p in linears.parameters()} | {x.data_ptr()}
    assert kept and all(tensor.data_ptr() in parameters for tensor in kept)
    y.sum().backward()


def test_weights_moved_between_forward_and_backward() -> None:
    """Looked at again: FSDP frees and gathers them in between."""
    linears, x = new_linears(), given(2, 5).requires_grad_()
    (want,) = torch.autograd.grad(joint.joint_linear(x, linears).sum(), x)
    y = joint.joint_linear(x, linears)
    joint.separate(linears)
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, want)


def test_a_frozen_weight_gets_no_gradient() -> None:
    linears, x = new_linears(), given(2, 5)
    full = run(linears, x)
    linears[1].weight.requires_grad_(False)
    part = run(linears, x)
    assert part.pop(4) is None and full.pop(4) is not None
    assert all(torch.equal(a, b) for a, b in zip(part, full, strict=True))
    linears.requires_grad_(False)
    y = joint.joint_linear(x.requires_grad_(), linears)
    (grad,) = torch.autograd.grad(y.sum(), x)
    columns = sum(linear.weight.sum(0) for linear in linears)
    torch.testing.assert_close(grad, columns.expand(2, 5, -1))


def test_a_second_derivative_is_refused() -> None:
    linears, x = new_linears(), given(2, 5).requires_grad_()
    (grad,) = torch.autograd.grad(
        joint.joint_linear(x, linears).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_under_autocast(compile: bool, fresh_compiler: None) -> None:
    linears, x = new_linears(), given(2, 5)

    def function(x: Tensor, linears: nn.ModuleList) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return joint.joint_linear(x, linears)

    want = run(linears, x, separately)
    if compile:
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    got = run(linears, x, function)
    assert got[0].dtype is torch.bfloat16
    for a, b in zip(got, want, strict=True):
        assert (a.float() - b).norm() <= 1e-2 * b.norm()


def test_without_values() -> None:
    """On the meta device and under FakeTensorMode, where tensors have no address."""
    for where in (torch.device("meta"), FakeTensorMode()):
        with where:
            linears = nn.ModuleList(nn.Linear(WIDTH, n) for n in ROWS)
            joint.share_storage(linears)
            y = joint.joint_linear(torch.empty(2, 5, WIDTH), linears)
            y.sum().backward()
        assert y.shape == (2, 5, sum(ROWS))
        assert all(linear.weight.grad.shape == linear.weight.shape for linear in linears)


def test_torch_func_differentiates_and_batches() -> None:
    linears, x = new_linears(), given(2, 5)

    def loss(x: Tensor) -> Tensor:
        return joint.joint_linear(x, linears).square().sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), want)
    each = torch.func.vmap(lambda row: joint.joint_linear(row, linears))(x)
    torch.testing.assert_close(each, separately(x, linears))


def hooked(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda module, given, out: 2 * out)


def replaced(linear: nn.Linear) -> None:
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


def without_bias(linear: nn.Linear) -> None:
    linear.bias = None


@pytest.mark.parametrize("change", [hooked, replaced, without_bias])
def test_what_is_not_plain_runs_by_its_own_forward(change: Callable[[nn.Linear], None]) -> None:
    linears, x = new_linears(), given(2, 5)
    before = joint.joint_linear(x, linears)
    change(linears[1])
    after = joint.joint_linear(x, linears)
    assert torch.equal(after, separately(x, linears))
    assert not torch.equal(after, before)


def test_what_is_not_alike_is_not_moved() -> None:
    linears = new_linears(together=False)
    linears[2].bfloat16()
    before = copy.deepcopy(linears.state_dict())
    joint.share_storage(linears)
    after = linears.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(after[name].dtype is value.dtype for name, value in before.items())
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == len(ROWS)
