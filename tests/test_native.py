"""What the compiled backends add to the contract: bits that agree across backends, vector variants
and threads, addresses of any alignment, outputs that were garbage before."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import cases
import formulas
import numpy as np
import pytest
import torch
from cases import OPS, Target
from test_normal import COUNTERS, SEEDS
from torch import Tensor

import g2rpo_kernels as gk

CSRC = Path(__file__).resolve().parent.parent / "csrc"


def skip_reference(target: Target) -> None:
    if target.backend == "reference":
        pytest.skip("the reference draws with torch's own logarithm: within 1e-5, see test_normal")


def test_the_integers_of_the_header_are_philoxs() -> None:
    """csrc/flow.h, which C++ and CUDA share; counters beyond 2^32 are offsets beyond 2^34."""
    extension = pytest.importorskip("g2rpo_kernels._C", reason="no native extension here")
    for seed in SEEDS:
        for counter in COUNTERS:
            key = (seed & formulas.MASK, (seed >> 32) & formulas.MASK)
            want = formulas.philox4x32((counter & formulas.MASK, counter >> 32, 0, 0), key)
            assert extension.cpu.philox(counter, seed & (2**64 - 1)) == want


@pytest.mark.parametrize("count", [1, 3, 4, 77, 2048, 2050, 12345])
def test_the_noise_has_the_same_bits_on_every_compiled_backend(count: int, target: Target) -> None:
    skip_reference(target)
    seeds = torch.cat([cases.random_seeds((5,), "bits"), torch.tensor([0, -1, 2**63 - 1])])
    noise = gk.normal(seeds.to(target.device), (count,)).cpu()
    assert torch.equal(noise, formulas.noise_bits(seeds, count))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("shape", cases.SMALL)
def test_a_step_has_the_same_bits_on_every_backend(
    shape: str, dtype: str, target: Target
) -> None:
    """Given the noise, x_next and the means are two products and two sums, never contracted."""
    for op in ("sde_step", "step_mean", "ode_step"):
        arguments = cases.inputs(op, shape, dtype)
        (want, *_) = cases.plain(op, arguments, torch.float32)
        moved = {name: cases.move(value, target.device) for name, value in arguments.items()}
        (got, *_) = cases.as_tuple(getattr(gk, op)(**moved))
        assert torch.equal(got.cpu(), want)


def misaligned(x: Tensor) -> Tensor:
    """The same values, contiguous, one element past an aligned address."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    view = room[1:].view(x.shape)
    view.copy_(x)
    assert view.is_contiguous() and view.data_ptr() % 16
    return view


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
def test_misaligned_inputs_change_no_bit(op: str, dtype: str, target: Target) -> None:
    for shape in ("digits", "primes", "past_chunk"):  # rows of 64, 77 and 4099 elements
        arguments = cases.inputs(op, shape, dtype, device=target.device)
        moved = {
            name: misaligned(value) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
        want = cases.as_tuple(getattr(gk, op)(**arguments))
        for x, y in zip(cases.as_tuple(getattr(gk, op)(**moved)), want, strict=True):
            assert torch.equal(x, y)


@pytest.fixture
def garbage() -> Iterator[None]:
    """Fresh memory is filled with NaN, so that an element nobody wrote is seen."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("shape", cases.SMALL)
@pytest.mark.parametrize("op", OPS)
def test_every_element_of_every_output_is_written(
    op: str, shape: str, target: Target, garbage: None
) -> None:
    for branched in (True, False):
        arguments = cases.inputs(op, shape, branched=branched, device=target.device)
        for name in OPS[op].differentiable:
            arguments[name].requires_grad_()
        results = cases.as_tuple(getattr(gk, op)(**arguments))
        assert all(x.isfinite().all() for x in results)
        if OPS[op].differentiable:
            results[0].sum().backward()
            assert all(arguments[name].grad.isfinite().all() for name in OPS[op].differentiable)


def test_threads_change_no_bit(target: Target) -> None:
    if target.backend not in ("reference", "cpu") or target.device != "cpu":
        pytest.skip("threads of the host")
    before = torch.get_num_threads()
    # Large enough to be shared out, and with few enough tiles for runs of another length each.
    shape = cases.Shape("threads", 1, 2, (25011,))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = []
        for op in OPS:
            arguments = cases.inputs(op, shape)
            for name in OPS[op].differentiable:
                arguments[name].requires_grad_()
            found += cases.as_tuple(getattr(gk, op)(**arguments))
            if OPS[op].differentiable:
                found[-1 if op != "policy_loss" else -3].sum().backward()
                found.append(arguments["velocity"].grad)
        results.append(found)
    torch.set_num_threads(before)
    assert len(results[0]) == len(results[1]) > len(OPS)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


VARIANTS = r"""
#include "cpu.cpp"
using namespace g2rpo;
extern "C" void run(const float* v, const float* x, const float* table, const int64_t* seeds,
                    int64_t rows, int64_t branches, int64_t count, float* x_next, float* log_prob,
                    uint16_t* halves) {
  const Step step{{v, Dtype::float32}, {x, Dtype::float32}, table, 5, rows, branches, count};
  cpu::sde_step({step, seeds, {nullptr, Dtype::float32}, x_next, log_prob, nullptr});
  for (int64_t i = 0; i < rows * count; ++i) halves[2 * i] = bf16_of(x_next[i]);
  for (int64_t i = 0; i < rows * count; ++i) halves[2 * i + 1] = f16_of(x_next[i]);
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_vector_variant_changes_no_bit(tmp_path: Path) -> None:
    """cpu.cpp compiled for each instruction set by itself, as far as this machine has them."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    levels = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512dq"}
    able = [level for level, flag in levels.items() if flag in flags]
    if len(able) < 2:
        pytest.skip("this machine has one vector variant alone")
    (tmp_path / "variants.cpp").write_text(VARIANTS)
    rows, branches, count = 2, 3, 4321
    draw = torch.randn(2, rows, count, generator=cases.generator("variants"))
    table, seeds = cases.step_rows(rows).table, cases.random_seeds((rows, branches), "variants")
    outcomes = []
    for level in able:
        library = tmp_path / f"{level}.so"
        subprocess.run(
            ["g++", "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared",
             "-fno-trapping-math", "-fPIC", "-fopenmp-simd", "-DG2RPO_ONE_VARIANT",
             f"-march={level}", f"-I{CSRC}", str(tmp_path / "variants.cpp"), "-o", str(library)],
            check=True,
        )  # fmt: skip
        x_next, log_prob = torch.empty(rows, branches, count), torch.empty(rows, branches)
        halves = np.zeros((rows * count, 2), dtype=np.uint16)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*draw, table, seeds)]
        ctypes.CDLL(str(library)).run(
            *pointers, *map(ctypes.c_int64, (rows, branches, count)),
            *(ctypes.c_void_p(x.data_ptr()) for x in (x_next, log_prob)),
            halves.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        outcomes.append((x_next, log_prob, torch.from_numpy(halves.view(np.int16))))
    for other in outcomes[1:]:
        assert all(torch.equal(x, y) for x, y in zip(outcomes[0], other, strict=True))
    flat = outcomes[0][0].flatten()[: rows * count]
    assert torch.equal(outcomes[0][2][:, 0].view(torch.bfloat16), flat.bfloat16())
    assert torch.equal(outcomes[0][2][:, 1].view(torch.float16), flat.half())


def skip_interpreted_bfloat16(target: Target, dtype: torch.dtype) -> None:
    if target == Target("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16's rounding and subnormals; GPUs do not")


HALVES = [
    0.0, -0.0, 1.0, -1.0, 65504.0, 65519.9, 65520.0, 1e6, 3.4e38, 6.1e-5, 6.0e-5, 5.97e-8, 2.9e-8,
    2.99e-8, 1e-30, 1.0009765625, 1.00048828125, math.inf, -math.inf, math.nan,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_round_to_half_precision_as_torch_does(
    dtype: torch.dtype, target: Target
) -> None:
    """Subnormals, ties, overflow, NaN: through the backward, whose gradient is velocity's dtype."""
    skip_interpreted_bfloat16(target, dtype)
    values = torch.tensor(HALVES, device=target.device)
    table = gk.StepCoefficients(torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]), "cps")
    velocity = torch.zeros(1, len(HALVES), dtype=dtype, device=target.device, requires_grad=True)
    latents = torch.zeros_like(velocity, requires_grad=False)
    log_prob = gk.branch_log_prob(velocity, latents, values.view(1, 1, -1), table.to(target.device))
    log_prob.backward(torch.full_like(log_prob, len(HALVES) / 2))  # 2 w b / N * grad is 1
    want = values.to(dtype)
    assert torch.equal(velocity.grad[0].isnan(), want.isnan())
    assert torch.equal(velocity.grad[0].nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_is_read_exactly(dtype: torch.dtype, target: Target) -> None:
    """All 65,536 bit patterns, as latents of a step that changes nothing."""
    skip_interpreted_bfloat16(target, dtype)
    latents = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    latents = latents[latents.isfinite()].to(target.device).unsqueeze(0)
    same = gk.StepCoefficients(torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]]), "cps").to(target.device)
    got = gk.step_mean(torch.zeros_like(latents), latents, same)
    assert torch.equal(got, latents.float())
