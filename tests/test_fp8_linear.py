"""fp8_linear: exact where it is emulated; on a GPU, what can be said of it without one."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from fp8_cases import DTYPES, FP8, randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import g2rpo_kernels as gk

linear_module = sys.modules["g2rpo_kernels.fp8_linear"]  # the package's name is the function


def operands(rows: tuple[int, ...] = (2, 5), width: int = 48, columns: int = 64):
    x = gk.quantize_fp8(randn(*rows, columns))
    weight = randn(width, columns) * torch.linspace(0.1, 9, width)[:, None]
    return x, gk.quantize_fp8(weight), randn(width, key="bias")


def exact_linear(x: gk.Fp8Tensor, weight: gk.Fp8Tensor, bias: Tensor | None) -> Tensor:
    parts = gk.dequantize(x, torch.float64), gk.dequantize(weight, torch.float64)
    return F.linear(*parts, None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(), (1,), (2, 5), (0, 3)])
def test_emulation_is_exact(rows: tuple, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows)
    bias = bias.to(dtype)
    for b in (bias, None):
        y = gk.fp8_linear(x, weight, b, out_dtype=dtype, emulate=True)
        exact = exact_linear(x, weight, b)
        assert y.dtype is dtype and y.shape == (*rows, 48)
        wrong = (y.double() - exact).abs()  # half a unit in the last place, at most
        assert (wrong <= exact.abs() * torch.finfo(dtype).eps / 2 * 1.001 + 1e-30).all()


def test_a_row_of_the_emulation_does_not_depend_on_its_company() -> None:
    x, weight, bias = operands((7,), columns=1024)
    whole = gk.fp8_linear(x, weight, bias, out_dtype=torch.float32, emulate=True)
    part = gk.Fp8Tensor(x.values[3:4], x.scales[3:4])
    alone = gk.fp8_linear(part, weight, bias, out_dtype=torch.float32, emulate=True)
    assert torch.equal(whole[3:4], alone)


def test_nan_of_a_row_reaches_its_outputs_and_no_others() -> None:
    x = randn(3, 32)
    x[1, 5] = torch.nan
    y = gk.fp8_linear(gk.quantize_fp8(x), operands(columns=32)[1], emulate=True)
    assert y.isnan().all(1).tolist() == [False, True, False]
    assert not y[::2].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rowwise", "tensorwise"])
def test_torchs_product_agrees(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, with the product that torch has on CPUs too; slices as the second use."""
    support = gk.Fp8Support(kind, "as if")
    monkeypatch.setattr(linear_module, "fp8_support", lambda device: support)
    x, weight, bias = operands()
    x = gk.Fp8Tensor(x.values[:, 1:], x.scales[:, 1:])
    for b in (bias, None):
        y = gk.fp8_linear(x, weight, b, out_dtype=dtype)
        want = gk.fp8_linear(x, weight, b, out_dtype=dtype, emulate=True)
        assert y.shape == (2, 4, 48) and y.dtype is dtype
        torch.testing.assert_close(y, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("kind", ["rowwise", "tensorwise"])
@pytest.mark.parametrize("rows", [(1,), (2, 5)])
def test_layouts_are_those_a_gpu_wants(
    kind: str, rows: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch checks strides, scales and multiples of 16 of CUDA tensors without memory as well."""
    monkeypatch.setitem(linear_module._answers, 0, gk.Fp8Support(kind, "as if"))
    with FakeTensorMode():
        values = torch.empty(*rows, 64, dtype=FP8, device="cuda:0")
        weight = torch.empty(48, 64, dtype=FP8, device="cuda:0")
        x = gk.Fp8Tensor(values, torch.empty(rows, device="cuda:0"))
        w = gk.Fp8Tensor(weight, torch.empty(48, device="cuda:0"))
        y = gk.fp8_linear(x, w, torch.empty(48, device="cuda:0"))
        assert y.shape == (*rows, 48) and y.dtype is torch.bfloat16 and y.device.type == "cuda"


def test_support_of_cpus_and_of_gpus_by_what_they_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gk.fp8_support("cpu") == ("none", "FP8 products run on GPUs, not on cpu")
    with pytest.raises(RuntimeError, match="fp8_linear on cpu: FP8 products run .* emulate=True"):
        gk.fp8_linear(*operands())
    ask, cpu = linear_module._ask, torch.device("cpu")  # which can do both products
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert ask(cpu).kind == "none" and "8.0, and FP8 products came with 8.9" in ask(cpu).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ask(cpu).kind == "rowwise"

    def fails(*arguments: object) -> Tensor:
        raise RuntimeError("no such scales\nat Blas.cpp")

    monkeypatch.setattr(linear_module, "_rowwise", fails)
    assert ask(cpu) == ("tensorwise", "torch takes no scale a row: no such scales")
    monkeypatch.setattr(linear_module, "_rowwise", lambda x, w, b: torch.zeros(32, 32))
    assert ask(cpu) == ("tensorwise", "torch takes no scale a row: its product is wrong")
    monkeypatch.setattr(linear_module, "_tensorwise", fails)
    assert ask(cpu) == ("none", "torch has no FP8 product for it: no such scales")


def test_linear_refuses() -> None:
    x, weight, bias = operands()

    def call(*arguments: object, **options: object) -> None:
        gk.fp8_linear(*arguments, emulate=True, **options)

    with pytest.raises(TypeError, match="weight is a Tensor; expected an Fp8Tensor"):
        call(x, weight.values)
    with pytest.raises(ValueError, match=r"weight has shape \(48, 32\); expected \[N, 64\]"):
        call(x, operands(columns=32)[1])
    with pytest.raises(ValueError, match=r"weight has shape \(40, 64\); expected multiples of 16"):
        call(x, operands(width=40)[1])
    with pytest.raises(ValueError, match=r"bias has shape \(47,\); expected \(48,\)"):
        call(x, weight, bias[1:])
    with pytest.raises(ValueError, match="out_dtype is torch.float64; expected float32"):
        call(x, weight, out_dtype=torch.float64)
    with pytest.raises(ValueError, match="bias requires a gradient, which fp8_linear"):
        call(x, weight, bias.requires_grad_())
    with torch.no_grad():
        call(x, weight, bias)
