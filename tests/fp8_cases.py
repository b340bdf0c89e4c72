"""What the tests of FP8 rows share: the backends that have them, inputs, and what is expected."""

from __future__ import annotations

from collections.abc import Iterator

import cases
import pytest
import torch
from cases import Target
from torch import Tensor

import g2rpo_kernels as gk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = torch.float8_e4m3fn


@pytest.fixture(
    params=[t for t in cases.targets() if t.backend in ("reference", "triton")], ids=str
)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The backends that these ops have; none is native."""
    request.node.user_properties.append(("target", str(request.param)))
    with gk.use_backend(request.param.backend):
        yield request.param


def randn(*shape: int, dtype: torch.dtype = torch.float32, key: str = "", device: str = "cpu"):
    x = torch.randn(*shape, generator=cases.generator("fp8", key, shape))
    return x.to(dtype).to(device)


def same(a: gk.Fp8Tensor | tuple, b: gk.Fp8Tensor | tuple) -> bool:
    """The same bits; a NaN is the same as a NaN."""
    codes = torch.equal(a[0].view(torch.uint8), b[0].view(torch.uint8))
    return codes and torch.allclose(a[1], b[1], rtol=0, atol=0, equal_nan=True)


def assert_quantised(got: gk.Fp8Tensor, exact: Tensor) -> None:
    """Types, one scale a row, and every value within half a step of e4m3 of the exact one."""
    assert got.values.dtype is FP8 and got.scales.dtype is torch.float32
    assert got.values.shape == exact.shape and got.scales.shape == exact.shape[:-1]
    assert got.values.is_contiguous() and got.scales.is_contiguous()
    exact = exact.double()
    largest = exact.abs().amax(-1)
    torch.testing.assert_close(got.scales.double(), largest / 448, rtol=1e-6, atol=1e-38)
    half_a_step = torch.maximum(exact.abs() / 16, got.scales.double()[..., None] / 1024)
    error = (gk.dequantize(got, torch.float64) - exact).abs()
    assert (error <= half_a_step * (1 + 1e-5) + 1e-6 * largest[..., None]).all()
