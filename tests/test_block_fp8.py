"""quantize_fp8, dequantize and refresh_fp8 on every backend.

The interpreter's own conversion to float8 rounds wrongly, so there the kernels take the integer
arithmetic that GPUs before sm_90 take. The conversion by instruction is compiled here, not run.
"""

from __future__ import annotations

import os

import pytest
import torch
from cases import Target
from fp8_cases import DTYPES, FP8, assert_quantised, randn, same, target

import g2rpo_kernels as gk
from g2rpo_kernels.quantize_fp8 import quantize_fp8_reference

__all__ = ["target"]  # the fixture of these tests

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
WIDTHS = [1, 32, 77, 3072, 17000]  # the last: more than a program keeps in registers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_rounded_to_the_nearest(width: int, dtype: torch.dtype, target: Target) -> None:
    x = randn(2, 3, width, dtype=dtype, device=target.device)
    x = x * torch.tensor([1e-3, 1.0, 70.0], device=target.device, dtype=dtype)[:, None]
    got = gk.quantize_fp8(x)
    assert_quantised(got, x)
    assert same(got, quantize_fp8_reference(x))  # the bits of the reference on every backend
    assert (gk.dequantize(got).abs().amax(-1) - x.float().abs().amax(-1)).abs().max() < 1e-4


def test_codes_are_those_of_torch(target: Target) -> None:
    """Ties, subnormals, zeros of both signs: beside a 448 the scale is 1."""
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([ties * (1 - 1e-6), ties, ties * (1 + 1e-6), codes, torch.tensor([1e-30])])
    x = torch.cat([near, -near, torch.tensor([448.0])]).to(target.device)
    got = gk.quantize_fp8(x)
    assert got.scales.item() == 1
    assert torch.equal(got.values.view(torch.uint8), x.to(FP8).view(torch.uint8))
    assert len(set(got.values.view(torch.uint8).tolist())) == 254


@pytest.mark.parametrize("width", [33, 17000])
def test_rows_of_zeros_infinities_and_extremes(width: int, target: Target) -> None:
    x = randn(8, width, device=target.device)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 4], x[3, width - 1] = torch.inf, -torch.inf
    x[4] *= 1e-40  # below float32's normal numbers
    x[5] *= 1e37
    x[6] = -3.5
    got = gk.quantize_fp8(x)
    assert same(got, quantize_fp8_reference(x))
    assert got.scales[0] == 1 and gk.dequantize(got)[0].abs().max() == 0
    assert got.scales[1:4].isnan().all() and gk.dequantize(got)[1:4].isnan().all()
    assert got.scales[4] == 2.0**-126
    assert torch.equal(gk.dequantize(got)[6], x[6])
    assert_quantised(gk.Fp8Tensor(got.values[5:], got.scales[5:]), x[5:])


def test_layout_leading_shape_and_company(target: Target) -> None:
    x = randn(5, 4, 80, device=target.device)
    whole = gk.quantize_fp8(x)
    assert same(gk.quantize_fp8(x.transpose(0, 1).contiguous().transpose(0, 1)), whole)
    assert same(gk.quantize_fp8(torch.cat([x, x], 2)[..., :80]), whole)
    alone = gk.quantize_fp8(x[3, 2])
    assert alone.scales.shape == () and same(alone, (whole.values[3, 2], whole.scales[3, 2]))
    none = gk.quantize_fp8(x[:0])
    assert none.values.shape == (0, 4, 80) and none.scales.shape == (0, 4)


def test_dequantize_rounds_once() -> None:
    x = gk.quantize_fp8(randn(6, 40))
    exact = x.values.double() * x.scales.double()[:, None]
    assert torch.equal(gk.dequantize(x, torch.float64), exact)
    for dtype in DTYPES:
        assert torch.equal(
            gk.dequantize(x, dtype), (x.values.float() * x.scales[:, None]).to(dtype)
        )


def test_quantize_refuses() -> None:
    with pytest.raises(ValueError, match="x requires a gradient, which quantize_fp8"):
        gk.quantize_fp8(randn(4).requires_grad_())
    with pytest.raises(ValueError, match=r"x has shape \(3, 0\); expected \[..., K\]"):
        gk.quantize_fp8(torch.zeros(3, 0))
    with pytest.raises(TypeError, match="x has dtype torch.int64; expected float32"):
        gk.quantize_fp8(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="quantized is a Tensor; expected an Fp8Tensor"):
        gk.dequantize(randn(4))
    with pytest.raises(
        ValueError, match=r"quantized.scales has shape \(1,\) beside values \(2, 4\)"
    ):
        gk.dequantize(gk.Fp8Tensor(randn(2, 4).to(FP8), torch.ones(1)))
    with pytest.raises(
        TypeError, match="quantized.scales is torch.float64; expected a torch.float32"
    ):
        gk.dequantize(gk.Fp8Tensor(randn(2, 4).to(FP8), torch.ones(2).double()))


# ---- refresh_fp8 ----


def weights_and_copies(device: str, *shapes: tuple[int, ...], dtype: torch.dtype):
    weights = [randn(*shape, dtype=dtype, device=device) for shape in shapes]
    copies = [gk.Fp8Tensor(torch.zeros(shape, device=device).to(FP8),
                           torch.zeros(shape[:-1], device=device)) for shape in shapes]  # fmt: skip
    return weights, copies


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_refresh_is_quantize_of_each(dtype: torch.dtype, target: Target) -> None:
    """Widths that are multiples of 16 and of nothing, one longer than a block, a single row."""
    for shapes in (
        [(5, 64), (3, 2064), (1, 16), (7, 1024), (2, 3, 48)],
        [(5, 33), (3, 2063), (1, 1), (0, 5), (4,)],
    ):
        weights, copies = weights_and_copies(target.device, *shapes, dtype=dtype)
        weights[0].requires_grad_()  # a parameter
        versions = [copy.values.data_ptr() for copy in copies]
        gk.refresh_fp8(weights, copies)
        for weight, copy in zip(weights, copies):
            assert same(copy, gk.quantize_fp8(weight.detach()))
        assert versions == [copy.values.data_ptr() for copy in copies]


def test_refresh_into_parts_of_one_matrix_and_of_several_dtypes(target: Target) -> None:
    (one, two), _ = weights_and_copies(target.device, (4, 32), (3, 32), dtype=torch.float32)
    two = two.bfloat16()
    whole = gk.Fp8Tensor(
        torch.zeros(8, 32, device=target.device).to(FP8),
        torch.full((8,), -1.0, device=target.device),
    )
    parts = [
        gk.Fp8Tensor(v, s)
        for v, s in zip(whole.values.split([4, 3, 1]), whole.scales.split([4, 3, 1]))
    ]
    wide = torch.cat([one, one], 1)[:, :32]  # not contiguous
    gk.refresh_fp8([wide, two], parts[:2])
    assert same(parts[0], gk.quantize_fp8(one)) and same(parts[1], gk.quantize_fp8(two))
    assert whole.scales[7] == -1 and whole.values[7].float().abs().max() == 0
    gk.refresh_fp8([], [])


def test_refresh_refuses() -> None:
    (weight,), (copy,) = weights_and_copies("cpu", (4, 32), dtype=torch.float32)
    with pytest.raises(ValueError, match="out has 0 tensors; expected 1"):
        gk.refresh_fp8([weight], [])
    with pytest.raises(
        ValueError, match=r"out\[1\].values has shape \(4, 32\) beside weights\[1\]"
    ):
        gk.refresh_fp8([weight, weight[:2]], [copy, copy])
    with pytest.raises(TypeError, match=r"weights\[0\] has dtype torch.int32"):
        gk.refresh_fp8([weight.int()], [copy])
    turned = gk.Fp8Tensor(torch.zeros(32, 4).to(FP8).t(), copy.scales)
    with pytest.raises(ValueError, match=r"out\[0\] is not contiguous"):
        gk.refresh_fp8([weight], [turned])


# ---- Ahead of time ----


@pytest.mark.skipif(INTERPRETING, reason="needs the compiler, not the interpreter")
def test_the_conversion_is_an_instruction_or_integers_but_never_two_roundings() -> None:
    """On sm_89 Triton would cut float32 off to float16 first."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
    from g2rpo_kernels.triton import _launch, ahead_of_time, quantize_fp8

    with _launch.recording() as launches:
        quantize_fp8(torch.empty(8, 4096, dtype=torch.bfloat16, device="meta"))
    for arch, there in ((80, False), (89, False), (90, True), (100, True)):
        ptx = ahead_of_time.compile_launch(launches[0], arch).asm["ptx"]
        assert ("cvt.rn.satfinite.e4m3x2.f32" in ptx) == there and "f16x2" not in ptx
