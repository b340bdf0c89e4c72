"""What `define_op` registers: several differentiable outputs, slices of wide tensors, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from g2rpo_kernels import _library
from g2rpo_kernels._library import Operator

SEEN: dict[str, object] = {}  # what the backward pass and the implementation were given last


def waves_reference(x: Tensor, y: Tensor, turns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    SEEN["strides"] = x.stride(), y.stride()
    return x.sin() * y, x.cos() * turns, y.exp(), y * 2


def fake_waves(x: Tensor, y: Tensor, turns: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(4))


def setup_waves(ctx, inputs, output) -> None:  # noqa: ANN001
    x, y, ctx.turns = inputs
    ctx.save_for_backward(x, y, output[2])  # the exponential, which carries no gradient itself


def waves_backward(ctx, grad_first: Tensor | None, grad_second: Tensor | None) -> tuple:  # noqa: ANN001
    x, y, SEEN["kept"] = ctx.saved_tensors
    SEEN["grads"] = grad_first, grad_second
    grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
    if grad_first is not None:
        grad_x, grad_y = grad_x + grad_first * x.cos() * y, grad_y + grad_first * x.sin()
    if grad_second is not None:
        grad_x = grad_x - grad_second * x.sin() * ctx.turns
    return grad_x, grad_y, None


@pytest.fixture(scope="module")
def waves() -> Operator:
    """An op of four outputs, of which the first two are differentiable; torch defines it once."""
    op = _library.define_op(
        "several_outputs_of_a_test(Tensor x, Tensor y, int turns) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference=waves_reference,
        fake=fake_waves,
        backward=waves_backward,
        setup_context=setup_waves,
        differentiable=2,
        strided=(0,),
    )
    del _library._ops[op.name]
    return op


@pytest.fixture(autouse=True)
def nobody_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_warned", set())


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 2, 3, 4, generator=draw, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), y.requires_grad_()


def dispatched(op: Operator) -> Callable:
    return lambda *arguments: op.overload(*arguments)


@pytest.mark.parametrize("way", [lambda op: op, dispatched], ids=["direct", "dispatcher"])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_several_outputs_carry_gradients(
    used: tuple[int, ...], way: Callable, waves: Operator
) -> None:
    x, y = leaves()
    outputs = way(waves)(x, y, 3)
    assert isinstance(outputs, tuple) and len(outputs) == 4
    assert [out.requires_grad for out in outputs] == [True, True, False, False]
    for got, want in zip(outputs, waves_reference(x, y, 3), strict=True):
        assert torch.equal(got, want)
    sum((k + 1) * outputs[k].square().sum() for k in used).backward()
    assert torch.equal(SEEN["kept"], y.exp())
    assert [k for k in (0, 1) if SEEN["grads"][k] is not None] == list(used)
    p, q = leaves()
    plain = waves_reference(p, q, 3)
    sum((k + 1) * plain[k].square().sum() for k in used).backward()
    torch.testing.assert_close(x.grad, p.grad)
    torch.testing.assert_close(y.grad, torch.zeros_like(q) if q.grad is None else q.grad)


def test_both_ways_give_the_same_bits_and_pass_gradcheck(waves: Operator) -> None:
    found = []
    for way in (waves, waves.overload):
        x, y = leaves()
        first, second, *_ = way(x, y, 3)
        (first * second).sum().backward()
        found.append((x.grad, y.grad))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    torch.autograd.gradcheck(lambda x, y: waves(x, y, 3)[:2], leaves(torch.float64))


def test_without_gradients_nothing_is_kept(waves: Operator) -> None:
    x, y = leaves()
    with torch.no_grad():
        assert not any(out.requires_grad for out in waves(x, y, 3))
    assert not any(out.requires_grad for out in waves(x.detach(), y.detach(), 3))


def test_several_outputs_are_traced_and_checked(waves: Operator) -> None:
    x, y = leaves()
    torch.library.opcheck(waves.overload, (x, y, 3))
    torch._dynamo.reset()

    def product(x: Tensor, y: Tensor) -> Tensor:
        first, second, _, fourth = waves(x, y, 3)
        return (first * second + fourth).sum()

    torch.compile(product, fullgraph=True, backend="aot_eager")(x, y).backward()
    p, q = leaves()
    first, second, *_ = waves(p, q, 3)
    (first * second).sum().backward()
    torch.testing.assert_close(x.grad, p.grad)
    torch.testing.assert_close(y.grad, q.grad)


@pytest.mark.parametrize("wrong", [0, -1, True, (0, 1), None])
def test_differentiable_is_a_number_of_outputs(wrong: object) -> None:
    with pytest.raises(ValueError, match="differentiable is .*; expected a number of outputs >="):
        _library.define_op(
            "never(Tensor x) -> Tensor", reference=abs, fake=abs, differentiable=wrong
        )
    assert "never" not in _library._ops


def test_a_slice_of_a_wide_tensor_is_not_copied_where_the_op_takes_it(waves: Operator) -> None:
    wide = torch.randn(2, 6, 12)
    for piece in (wide[..., :4], wide[:, 1:4, :4], wide[..., 4:8], wide[0, :, :4]):
        waves(piece, piece, 3)
        assert SEEN["strides"] == (piece.stride(), piece.contiguous().stride())
    whole = torch.randn(2, 4, 3)
    for other in (whole.transpose(1, 2), wide[:, :1, :4].expand(2, 3, 4), wide[..., ::3]):
        waves(other, other, 3)
        assert SEEN["strides"] == (other.contiguous().stride(),) * 2


def test_a_slice_that_needs_a_gradient_is_not_copied_either(waves: Operator) -> None:
    wide = torch.randn(2, 3, 12, requires_grad=True)
    waves(wide[..., :4], torch.ones(2, 3, 4), 3)[0].sum().backward()
    assert SEEN["strides"][0] == (36, 12, 1)
    want = torch.zeros_like(wide)
    want[..., :4] = wide.detach()[..., :4].cos()
    torch.testing.assert_close(wide.grad, want)


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_an_op_that_no_installation_has_on_cpus_warns_of_nothing(
    waves: Operator, no_warnings: None
) -> None:
    waves.forget()
    waves(torch.ones(1, 1, 1), torch.ones(1, 1, 1), 3)
    assert not _library._warned


def test_on_a_gpu_it_says_that_triton_is_missing(
    waves: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    waves.forget()
    monkeypatch.setattr(_library, "_absent", {"triton": "triton is not installed"})
    monkeypatch.setattr(_library, "_probes", {})
    with pytest.warns(RuntimeWarning, match="cuda: not made for this op; triton: triton is not in"):
        waves.select(torch.device("cuda", 0))
    waves.forget()
