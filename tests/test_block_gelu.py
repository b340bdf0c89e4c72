"""gelu_tanh and gelu_tanh_beside, alone and into FP8, on every backend."""

from __future__ import annotations

import os
from collections.abc import Callable

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Target
from fp8_cases import DTYPES, assert_quantised, randn, same, target
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo_kernels.gelu_tanh import gelu_tanh_beside_reference
from g2rpo_kernels.quantize_fp8 import quantize_fp8_reference

__all__ = ["target"]  # the fixture of these tests

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ALL_CHECKS = (
    "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic",
)  # fmt: skip


def exact_gelu(x: Tensor) -> Tensor:
    x = x.double()
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def assert_accurate(got: Tensor, exact: Tensor, eager: Tensor) -> None:
    """At most twice the error of eager torch at the same dtype, plus four roundings of float32."""
    assert got.shape == exact.shape and got.dtype == eager.dtype and got.is_contiguous()
    allowed = 2 * (eager.double() - exact).abs().max() + 5e-7 * max(1.0, exact.abs().max().item())
    if INTERPRETING and got.dtype is torch.bfloat16:  # which it cuts off instead of rounding
        allowed = allowed + exact.abs() * 2**-7
    assert ((got.double() - exact).abs() <= allowed).all()


def assert_bits(target: Target, got: Tensor, want: Tensor) -> None:
    """Kernels give an element the same bits wherever it is; torch's gelu on CPUs, to a rounding."""
    if target.backend == "reference":
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(got, want)


def wide_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, key: str = "") -> Tensor:
    """From within the bend to far outside of it, and 1e4."""
    x = 3 * randn(*shape, key=key)
    x.view(-1)[::7] *= 20
    x.view(-1)[0] = -1e4
    x.view(-1)[-1] = 1e4
    return x.to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 77), (2, 5, 32), (2, 4099)])
def test_gelu_and_its_gradient(shape: tuple, dtype: torch.dtype, target: Target) -> None:
    x = wide_inputs(shape, dtype, target.device).requires_grad_()
    upstream = randn(*shape, dtype=dtype, key="upstream", device=target.device)
    y = gk.gelu_tanh(x)
    y.backward(upstream)
    eager = x.detach().clone().requires_grad_()
    F.gelu(eager, approximate="tanh").backward(upstream)
    leaf = x.detach().double().requires_grad_()
    exact_gelu(leaf).backward(upstream.double())
    assert_accurate(y, exact_gelu(x.detach()), F.gelu(x.detach(), approximate="tanh"))
    assert_accurate(x.grad, leaf.grad, eager.grad)


@pytest.mark.parametrize("slice_of", [False, True], ids=["alone", "slice"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(2, 5, 32, 128), (1, 3, 7, 11), (2, 1, 1030, 1), (1, 1, 1, 2049)]
)
def test_beside_and_its_gradients(
    sizes: tuple, dtype: torch.dtype, slice_of: bool, target: Target
) -> None:
    batch, length, left, right = sizes
    attention = randn(batch, length, left, dtype=dtype, device=target.device).requires_grad_()
    wide = wide_inputs((batch, length, right + 3), dtype, target.device)
    mlp = (wide[:, :, 3:] if slice_of else wide[:, :, 3:].contiguous()).detach().requires_grad_()
    assert mlp.is_contiguous() != slice_of or batch * length == 1
    y = gk.gelu_tanh_beside(attention, mlp)
    upstream = randn(*y.shape, dtype=dtype, key="upstream", device=target.device)
    y.backward(upstream)
    assert torch.equal(y[..., :left], attention)
    assert_bits(target, y[..., left:], gk.gelu_tanh(mlp))
    assert torch.equal(attention.grad, upstream[..., :left])
    again = mlp.detach().requires_grad_()
    gk.gelu_tanh(again).backward(upstream[..., left:])
    assert_bits(target, mlp.grad, again.grad)
    assert mlp.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 5, 32, 128), (1, 3, 7, 11), (1, 2, 3072, 14000)])
def test_gelu_into_fp8(sizes: tuple, dtype: torch.dtype, target: Target) -> None:
    """Rounded once: the float32 gelu is not rounded to bfloat16 first."""
    batch, length, left, right = sizes
    attention = 4 * randn(batch, length, left, dtype=dtype, device=target.device)
    mlp = 3 * randn(batch, length, right + 5, dtype=dtype, device=target.device)[:, :, 5:]
    assert_quantised(gk.gelu_tanh(mlp, fp8=True), exact_gelu(mlp))
    joint = torch.cat([attention.double(), exact_gelu(mlp)], 2)
    got = gk.gelu_tanh_beside(attention, mlp, fp8=True)
    assert_quantised(got, joint)
    # A code may differ from the reference's where float32 gelus differ and a tie is between them.
    reference = quantize_fp8_reference(gelu_tanh_beside_reference(attention.float(), mlp.float()))[
        0
    ]
    differ = (reference.float() != got.values.float()).float().mean().item()
    assert differ <= 2e-4, differ
    narrow = quantize_fp8_reference(gelu_tanh_beside_reference(attention, mlp))[0]
    if dtype is torch.bfloat16 and left > 7:
        assert (narrow.float() != got.values.float()).float().mean() > 0.005


def test_a_row_does_not_depend_on_its_company(target: Target) -> None:
    attention = randn(3, 4, 40, device=target.device)
    mlp = 3 * randn(3, 4, 1100, device=target.device)
    for fp8 in (False, True):
        for run in (lambda a, m, **o: gk.gelu_tanh(m, **o)), gk.gelu_tanh_beside:
            whole = run(attention, mlp, fp8=fp8)
            alone = run(attention[2:, 1:2], mlp[2:, 1:2], fp8=fp8)
            if fp8 and target.backend == "triton":
                assert same((whole.values[2:, 1:2], whole.scales[2:, 1:2]), alone)
            elif fp8:
                torch.testing.assert_close(whole.scales[2:, 1:2], alone.scales)
            else:
                assert_bits(target, whole[2:, 1:2], alone)


def test_gelu_of_what_is_not_finite_or_nearly_not(target: Target) -> None:
    x = torch.tensor([[1e30, -1e30, torch.inf, 0.0, -0.0, 1.0], [torch.nan] + [1.0] * 5])
    x = x.to(target.device)
    y = gk.gelu_tanh(x)
    assert y[0, 0] == 1e30 and y[0, 1] == 0 and y[0, 2] == torch.inf and (y[0, 3:5] == 0).all()
    assert y[1].isnan().tolist() == [True] + [False] * 5
    assert gk.gelu_tanh(x, fp8=True).scales.isnan().all()  # an infinity, a NaN
    x = x[1:].clone().requires_grad_()
    gk.gelu_tanh(x).sum().backward()
    assert x.grad.isnan().tolist() == [[True] + [False] * 5]
    if target.backend == "triton":  # torch's own multiplies 0 by infinity there
        huge = torch.tensor([1e30, -1e30, torch.inf], device=target.device, requires_grad=True)
        gk.gelu_tanh(huge).sum().backward()
        assert huge.grad.tolist() == [1, 0, 1]


def test_no_rows(target: Target) -> None:
    none = torch.zeros(0, 3, 16, device=target.device)
    for fp8 in (False, True):
        for y in (gk.gelu_tanh(none, fp8=fp8), gk.gelu_tanh_beside(none, none, fp8=fp8)):
            assert (y.values if fp8 else y).shape[:2] == (0, 3)


def test_gradcheck_of_the_references() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=cases.generator("check"))
    x.requires_grad_()
    a = torch.randn(2, 3, 4, dtype=torch.float64, generator=cases.generator("a")).requires_grad_()
    assert torch.autograd.gradcheck(gk.gelu_tanh, (x,))
    assert torch.autograd.gradcheck(gk.gelu_tanh_beside, (a, x))
    assert torch.autograd.gradcheck(lambda w: gk.gelu_tanh_beside(a.detach(), w[..., 2:]), (x,))


def test_gelu_refuses() -> None:
    x = randn(2, 3, 8)
    with pytest.raises(ValueError, match="x requires a gradient, which gelu_tanh with fp8=True"):
        gk.gelu_tanh(randn(4).requires_grad_(), fp8=True)
    with pytest.raises(ValueError, match=r"x has shape \(2, 0\)"):
        gk.gelu_tanh(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="mlp requires a gradient"):
        gk.gelu_tanh_beside(x, randn(2, 3, 8).requires_grad_(), fp8=True)
    with pytest.raises(ValueError, match=r"attention has shape \(3, 8\); expected \[B, L, D\]"):
        gk.gelu_tanh_beside(x[0], x)
    with pytest.raises(ValueError, match=r"mlp has shape \(2, 2, 8\); expected \[2, 3, M\]"):
        gk.gelu_tanh_beside(x, x[:, :2])
    with pytest.raises(ValueError, match="mlp has dtype torch.bfloat16; expected torch.float32"):
        gk.gelu_tanh_beside(x, x.bfloat16())


def test_ops_as_torch_checks_them(target: Target) -> None:
    ops = torch.ops.g2rpo
    a, m = randn(2, 3, 16, device=target.device), randn(2, 3, 40, device=target.device)[:, :, 8:]
    y = randn(2, 3, 48, device=target.device)
    for op, arguments in (
        (ops.quantize_fp8, (a,)),
        (ops.gelu_tanh, (a.clone().requires_grad_(),)),
        (ops.gelu_tanh_backward, (a, a)),
        (ops.gelu_tanh_fp8, (a,)),
        (ops.gelu_tanh_beside, (a.clone().requires_grad_(), m.detach().requires_grad_())),
        (ops.gelu_tanh_beside_backward, (y, m)),
        (ops.gelu_tanh_beside_fp8, (a, m)),
    ):
        # What a backend can get wrong; the reference shows that the rest is well defined.
        checks = ("test_schema", "test_faketensor") if target.backend == "triton" else ALL_CHECKS
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_compiles_in_one_graph(target: Target) -> None:
    weight = gk.quantize_fp8(randn(48, 64))

    def forward(attention: Tensor, mlp: Tensor, values: Tensor, scales: Tensor) -> Tensor:
        joint = gk.gelu_tanh_beside(attention, gk.gelu_tanh(mlp))
        with torch.no_grad():
            row = gk.quantize_fp8(joint.detach())
            other = gk.gelu_tanh_beside(attention, mlp, fp8=True)
            y = gk.fp8_linear(row, gk.Fp8Tensor(values, scales), emulate=True)
            y = y + gk.fp8_linear(other, gk.Fp8Tensor(values, scales), emulate=True)
        return joint.sum() + y.float().sum()

    def run(function: Callable) -> tuple[Tensor, ...]:
        attention, mlp = (randn(2, 5, 32, key=k, device=target.device) for k in "am")
        attention.requires_grad_(), mlp.requires_grad_()
        loss = function(
            attention, mlp, weight.values.to(target.device), weight.scales.to(target.device)
        )
        loss.backward()
        return loss.detach(), attention.grad, mlp.grad

    torch._dynamo.reset()
    compiled = run(torch.compile(forward, fullgraph=True, backend="aot_eager"))
    for got, want in zip(compiled, run(forward)):
        torch.testing.assert_close(got, want)
