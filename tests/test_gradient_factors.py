"""Weight gradients as factors: multiplied out they are autograd's, under all that wraps it."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyModel
from torch import nn
from torch.utils.checkpoint import checkpoint

import g2rpo_kernels as gk

# Relative to the largest element of the float64 gradient: a few roundings of the dtype.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}
WIDTHS = 24, 40  # in, out


def linear_of(dtype=torch.float32, bias=True, seed=0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(*WIDTHS, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear.to(dtype)


def factored(**given) -> nn.Linear:
    linear = linear_of(**given)
    gk.factor_gradients([linear])
    return linear


def inputs(*shape, dtype=torch.float32, seed=1) -> torch.Tensor:
    x = torch.randn(*shape, WIDTHS[0], generator=torch.Generator().manual_seed(seed))
    return x.to(dtype).requires_grad_()


def loss_of(y: torch.Tensor, seed=2) -> torch.Tensor:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return (y.double() * weight).sum()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (), (2, 3), (1,)])
def test_gradients_are_autograds(dtype, bias, shape):
    plain, linear = linear_of(torch.float64, bias), factored(dtype=dtype, bias=bias)
    with torch.no_grad():
        for a, b in zip(plain.parameters(), linear.parameters(), strict=True):
            a.copy_(b)  # the same values, in float64
    x = inputs(*shape, dtype=dtype)
    exact = x.detach().double().requires_grad_()
    y = linear(x)
    assert torch.equal(y, F.linear(x, linear.weight, linear.bias))
    loss_of(y).backward()
    loss_of(plain(exact)).backward()
    assert linear.weight.grad is None
    factors, tolerance = linear.weight.grad_factors, TOLERANCES[dtype]
    assert factors.rows == torch.Size(shape).numel()
    wide = torch.promote_types(dtype, torch.float32)
    assert factors.dense(wide).dtype == wide and factors.dense(dtype).dtype == dtype
    assert error(factors.dense(wide), plain.weight.grad) <= tolerance
    assert error(factors.dense(dtype), plain.weight.grad) <= tolerance
    assert error(x.grad, exact.grad) <= tolerance and x.grad.dtype == dtype
    if bias:
        assert error(linear.bias.grad, plain.bias.grad) <= tolerance
        assert linear.bias.grad.dtype == dtype
    norm = factors.squared_norm()
    assert norm.shape == () and norm.dtype == torch.float64
    torch.testing.assert_close(norm.sqrt(), plain.weight.grad.norm(), rtol=tolerance, atol=0)


def test_rows_of_several_backwards_add_up():
    plain, linear = linear_of(), factored()
    for seed in range(3):
        for module in (plain, linear):
            loss_of(module(inputs(2, seed=seed)), seed + 9).backward()
    factors = linear.weight.grad_factors
    assert factors.rows == 6
    torch.testing.assert_close(factors.dense(), plain.weight.grad)
    torch.testing.assert_close(factors.squared_norm().sqrt().float(), plain.weight.grad.norm())
    torch.testing.assert_close(linear.bias.grad, plain.bias.grad)
    assert factors.scale_(0.25) is factors
    torch.testing.assert_close(factors.dense(), 0.25 * plain.weight.grad)
    factors.scale_(torch.tensor(2.0))
    torch.testing.assert_close(factors.dense(), 0.5 * plain.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_rows_that_cancel(dtype):
    """What is left is a millionth of the terms of the trace: far below float32's resolution."""
    linear = factored(dtype=dtype)
    x = inputs(1, dtype=dtype)
    large = torch.randn(1, WIDTHS[1], generator=torch.Generator().manual_seed(3)).to(dtype) * 1024
    small = torch.zeros_like(large)
    small[0, 5] = large[0, 5] / 256  # representable beside it in both
    linear(x).backward(large)
    linear(x).backward(small - large)
    exact = (small - large).double() + large.double()
    expected = (exact.T @ x.detach().double()).square().sum()
    assert 0 < expected < 1e-6 * large.double().square().sum() * x.double().square().sum()
    squared = linear.weight.grad_factors.squared_norm()
    torch.testing.assert_close(squared, expected, rtol=1e-6, atol=0)
    linear(x).backward(-(small - large))
    linear(x).backward(-large)
    assert 0 <= linear.weight.grad_factors.squared_norm() <= 1e-6 * expected


def test_the_callers_tensors_may_be_used_again():
    linear = factored()
    x, grad = inputs(2).detach(), torch.ones(2, WIDTHS[1])
    linear(x).backward(grad)
    expected = linear.weight.grad_factors.dense()
    x.zero_()
    grad.zero_()
    assert expected.abs().max() > 0
    assert torch.equal(linear.weight.grad_factors.dense(), expected)


def test_many_rows_become_a_dense_gradient():
    """15 rows of 24 + 40 hold as many elements as 24 x 40: from there on the gradient is whole."""
    plain, linear = linear_of(), factored()
    for rows in (10, 4, 1, 2):
        for module in (plain, linear):
            loss_of(module(inputs(rows, seed=rows))).backward()
        if rows in (10, 4):
            assert linear.weight.grad is None and linear.weight.grad_factors.rows <= 14
        else:
            assert not hasattr(linear.weight, "grad_factors")
            torch.testing.assert_close(linear.weight.grad, plain.weight.grad)
    bfloat16 = factored(dtype=torch.bfloat16)
    loss_of(bfloat16(inputs(15, dtype=torch.bfloat16))).backward()
    assert bfloat16.weight.grad.dtype == torch.bfloat16


def test_another_term_of_the_loss_on_the_weight():
    """Its gradient is a dense one, before or after: the two are added, wherever both are."""
    plain, linear = linear_of(), factored()
    for module in (plain, linear):
        loss_of(module(inputs(2))).backward()
        module.weight.square().sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad_factors.rows == 2
    norm = gk.total_grad_norm(linear.parameters())
    torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(
        [p.grad for p in plain.parameters()]
    ))  # fmt: skip
    assert not hasattr(linear.weight, "grad_factors")
    for module in (plain, linear):
        loss_of(module(inputs(3))).backward()
    assert not hasattr(linear.weight, "grad_factors")
    torch.testing.assert_close(linear.weight.grad, plain.weight.grad)


def test_what_is_not_a_plain_linear_is_refused():
    class Mine(nn.Linear):
        pass

    good, mine = linear_of(), Mine(*WIDTHS)
    for bad, message in (
        (mine, r"linears\[1\] is a Mine; expected exactly an nn.Linear"),
        (nn.Conv1d(2, 2, 1), r"linears\[1\] is a Conv1d"),
        (factored(), r"linears\[1\] is a FactoredLinear"),
    ):
        with pytest.raises(TypeError, match=message):
            gk.factor_gradients([good, bad])
    assert type(good) is nn.Linear
    other = linear_of()
    other.weight = nn.Parameter.__new__(type("Sharded", (nn.Parameter,), {}), other.weight.data)
    with pytest.raises(TypeError, match=r"linears\[0\] has a weight of type Sharded"):
        gk.factor_gradients([other])
    with pytest.raises(TypeError, match=r"linears\[0\] is a Linear; expected what factor_grad"):
        gk.unfactor_gradients([good])


def test_unfactored_it_is_as_before():
    plain, linear = linear_of(), factored()
    for module in (plain, linear):
        loss_of(module(inputs(2))).backward()
    gk.unfactor_gradients([linear])
    assert type(linear) is nn.Linear and not hasattr(linear.weight, "grad_factors")
    for module in (plain, linear):
        loss_of(module(inputs(2, seed=5))).backward()
    torch.testing.assert_close(linear.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forwards_without_gradients(mode):
    linear, x = factored(), inputs(3)
    with mode():
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    linear.weight.requires_grad_(False)
    loss_of(linear(x)).backward()
    assert linear.weight.grad is None and not hasattr(linear.weight, "grad_factors")
    assert x.grad is not None and linear.bias.grad is not None


def test_only_the_weight_is_trained():
    linear = factored()
    linear.bias.requires_grad_(False)
    x = inputs(3).detach()
    loss_of(linear(x)).backward()
    assert linear.weight.grad_factors.rows == 3 and linear.bias.grad is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_adds_rows_once(reentrant):
    """And to the parameter, not to the alias that checkpointing hands to the backward."""
    plain, linear = factored(), factored()
    for module, run in ((plain, lambda f, x: f(x)), (linear, checkpoint)):
        keywords = {"use_reentrant": reentrant} if run is checkpoint else {}

        def body(x, module=module):
            return module(x.sin()).cos()

        loss_of(run(body, inputs(3), **keywords)).backward()
    assert linear.weight.grad_factors.rows == 3
    assert torch.equal(linear.weight.grad_factors.dense(), plain.weight.grad_factors.dense())
    assert torch.equal(linear.bias.grad, plain.bias.grad)


def test_saved_tensors_in_host_memory():
    linear = factored()
    with torch.autograd.graph.save_on_cpu():
        y = linear(inputs(3))
    loss_of(y).backward()
    assert linear.weight.grad_factors.rows == 3


def test_autocast():
    plain, linear = linear_of(), factored()
    for module in (plain, linear):
        x = inputs(3)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        loss_of(y).backward()
    torch.testing.assert_close(
        linear.weight.grad_factors.dense(), plain.weight.grad, rtol=8e-3, atol=8e-2
    )
    assert torch.equal(linear.bias.grad, plain.bias.grad)
    assert linear.weight.grad_factors.factors()[1].dtype == torch.bfloat16


def test_a_compiled_model_leaves_its_graph_for_it():
    plain, linear = factored(), factored()
    compiled = torch.compile(nn.Sequential(nn.SiLU(), linear, nn.SiLU()), backend="eager")
    loss_of(compiled(inputs(3))).backward()
    loss_of(F.silu(plain(F.silu(inputs(3))))).backward()
    assert torch.equal(linear.weight.grad_factors.dense(), plain.weight.grad_factors.dense())
    with torch.no_grad():  # one graph
        whole = torch.compile(linear, backend="eager", fullgraph=True)
        assert torch.equal(whole(inputs(3)), linear(inputs(3)))


def test_copies_files_and_states():
    linear = factored()
    loss_of(linear(inputs(2))).backward()
    plain = linear_of()
    assert linear.state_dict().keys() == plain.state_dict().keys()
    assert all(type(value) is torch.Tensor for value in linear.state_dict().values())
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    file = io.BytesIO()
    torch.save(factored(), file)
    file.seek(0)
    for other in (copy.deepcopy(linear), torch.load(file, weights_only=False)):
        assert not hasattr(other.weight, "grad_factors")
        loss_of(other(inputs(2))).backward()
        assert torch.equal(other.weight.grad_factors.dense(), linear.weight.grad_factors.dense())
    assert linear.weight.grad_factors.rows == 2


# The norm of everything -------------------------------------------------------------------------


def test_norm_is_torchs_where_there_are_no_factors():
    parameters = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(300))]
    assert gk.total_grad_norm(parameters) == 0
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    parameters.append(nn.Parameter(torch.ones(2)))  # without a gradient
    norm = gk.total_grad_norm(iter(parameters))
    expected = torch.nn.utils.get_total_norm([p.grad for p in parameters[:2]])
    assert norm.shape == () and norm.dtype == torch.float32 and torch.equal(norm, expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_norm_of_dense_gradients_and_factors(dtype):
    plain = nn.ModuleList([linear_of(dtype, seed=s) for s in range(3)])
    mixed = copy.deepcopy(plain)
    gk.factor_gradients(list(mixed)[:2])
    for modules in (plain, mixed):
        for module in modules:
            loss_of(module(inputs(3, dtype=dtype))).backward()
    exact = torch.cat([p.grad.double().flatten() for p in plain.parameters()]).norm()
    norm = gk.total_grad_norm(mixed.parameters())
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(exact), rel=1e-3 if dtype is torch.bfloat16 else 1e-6)


def test_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16():
    parameter = nn.Parameter(torch.zeros(10_001, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    assert float(gk.total_grad_norm([parameter])) == pytest.approx(10_001**0.5, rel=1e-6)
    assert float(gk.total_grad_norm([parameter])) != 100.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_the_norm(bad):
    for poison_input in (True, False):
        linear = factored()
        x, grad = inputs(2).detach(), torch.ones(2, WIDTHS[1])
        (x if poison_input else grad)[1, 3] = bad
        linear(x).backward(grad)
        assert not gk.total_grad_norm([linear.weight]).isfinite()


# FLUX -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_flux_with_factored_modulations(fuse, checkpointing):
    """Blocks on the fused ops call the same modules: factoring goes with and without them."""
    from g2rpo.optimizers import modulation_linears

    models = [TinyModel(), TinyModel()]
    for model in models:
        if fuse:
            gk.fuse_flux(model.policy.transformer)
    plain, other = (model.policy.transformer for model in models)
    linears = modulation_linears(other)
    assert len(linears) == 2 + 1 + 1
    gk.factor_gradients(linears)
    if checkpointing:
        other.enable_gradient_checkpointing()
    for model in models:
        conditions = model.embed(model.prompts[:2])
        latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        v = model.policy.velocity(latents, torch.tensor([0.3, 0.8]), conditions)
        loss_of(v).backward()
    found = dict(other.named_parameters())
    kept = {id(linear.weight) for linear in linears}
    for name, parameter in plain.named_parameters():
        if id(found[name]) in kept:
            assert found[name].grad is None and found[name].grad_factors.rows == 2
            torch.testing.assert_close(
                found[name].grad_factors.dense(), parameter.grad, rtol=1e-5, atol=1e-6
            )
        else:
            assert torch.equal(found[name].grad, parameter.grad), name
    torch.testing.assert_close(
        gk.total_grad_norm(other.parameters()), gk.total_grad_norm(plain.parameters())
    )
