"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for three architectures.

The interpreter is chosen when Triton is imported, so a second process runs there: the ops' own
tests on target triton-cpu, and the tests of this file marked `interpreted`.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cases
import formulas
import numpy as np
import pytest
import torch
from cases import Target
from torch import Tensor

import g2rpo_kernels as gk

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from g2rpo_kernels.triton import IMPLEMENTATIONS, _device, ahead_of_time  # noqa: E402

TESTS = Path(__file__).resolve().parent
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETING, reason="runs in the process of test_op_tests_in_the_interpreter"
)
compiled = pytest.mark.skipif(INTERPRETING, reason="needs the compiler, not the interpreter")

# What is left out of the interpreter's run: sizes and numbers of draws for hardware, float64
# (the reference backend's alone), and shapes whose path a smaller one takes as well.
TOO_LONG = (
    "size_of_flux", "tails", "law", "uncorrelated", "any_batch", "float64", "shorter",
    "digits", "company and (4096 or 12345 or 129600)", "dance", "cps",
    "past_chunk and float16", "on_policy and not float32", "misaligned and bfloat16",
)  # fmt: skip


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_the_package_does_not_import_triton() -> None:
    done = python("-c", "import sys, g2rpo_kernels; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False", done.stdout + done.stderr


def test_every_op_has_a_launcher_with_the_signature_of_its_reference() -> None:
    from g2rpo_kernels._library import _ops

    assert IMPLEMENTATIONS.keys() == _ops.keys()
    for name, launcher in IMPLEMENTATIONS.items():
        reference = inspect.signature(_ops[name].implementations["reference"]).parameters
        ours = inspect.signature(launcher).parameters
        assert [(p.name, p.default) for p in ours.values()] == [
            (p.name, p.default) for p in reference.values()
        ]


# ---- In the interpreter ----


@compiled
def test_op_tests_in_the_interpreter(record_property: Callable) -> None:
    chosen = "(triton-cpu or test_words_are)"
    chosen += "".join(f" and not ({what})" for what in TOO_LONG)
    files = ("ops", "native", "normal", "policy_loss", "group_advantages", "triton")
    done = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
        *(str(TESTS / f"test_{name}.py") for name in files),
        "-k", chosen,
        TRITON_INTERPRET="1",
    )  # fmt: skip
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip(f"Triton {triton.__version__}'s interpreter fails with NumPy {np.__version__}")
    counted = re.search(r"triton-cpu: (\d+) passed, 0 failed", done.stdout)
    assert done.returncode == 0 and counted, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(counted[1]) > 250
    record_property("elsewhere", f"triton in its interpreter: {counted[1]} passed, 0 failed")


@triton.jit
def draw_kernel(seeds, starts, ours, theirs, ours_noise, theirs_noise, COUNT: tl.constexpr):
    """Elements start .. start + COUNT of a seed: words [COUNT // 4, 4] and noise, both ways."""
    row = tl.program_id(0)
    seed, start = tl.load(seeds + row), tl.load(starts)
    i = tl.arange(0, COUNT // 4)
    counter = (start >> 2) + i.to(tl.int64)
    key = tl.load(seeds + row + tl.arange(0, 1)[:, None])
    a, b, c, d = _device.philox(key, start, COUNT)
    e, f, g, h = tl.randint4x(seed, counter)
    at = row * COUNT + 4 * i
    tl.store(ours + at[None, :], a.to(tl.int64))
    tl.store(ours + 1 + at[None, :], b.to(tl.int64))
    tl.store(ours + 2 + at[None, :], c.to(tl.int64))
    tl.store(ours + 3 + at[None, :], d.to(tl.int64))
    tl.store(theirs + at, e.to(tl.int64))
    tl.store(theirs + 1 + at, f.to(tl.int64))
    tl.store(theirs + 2 + at, g.to(tl.int64))
    tl.store(theirs + 3 + at, h.to(tl.int64))
    at_all = row * COUNT + tl.arange(0, COUNT)
    tl.store(ours_noise + at_all[None, :], _device.normal_chunk(key, start, COUNT))
    p, q, r, s = tl.randn4x(seed, counter)
    tl.store(theirs_noise + at, p)
    tl.store(theirs_noise + 1 + at, q)
    tl.store(theirs_noise + 2 + at, r)
    tl.store(theirs_noise + 3 + at, s)


@interpreted
@pytest.mark.parametrize("counter", [0, 2**32 - 128, 2**32, 2**40 + 256, 2**60])
def test_words_are_those_of_randint4x_and_noise_that_of_randn4x(counter: int) -> None:
    """Seeds of 64 bits, counters beyond 32; the words those of the plain transcription too."""
    count = 512
    seeds = torch.cat([cases.random_seeds((9,), counter), torch.tensor([0, -1, 2**63 - 1])])
    ours, theirs = torch.full((2, len(seeds), count), -1)
    our_noise, their_noise = torch.full((2, len(seeds), count), torch.nan)
    start = torch.tensor([4 * counter])
    draw_kernel[(len(seeds),)](seeds, start, ours, theirs, our_noise, their_noise, COUNT=count)
    theirs &= 0xFFFFFFFF  # randint4x gives int32 in some versions
    assert torch.equal(ours, theirs)
    words = formulas.words_of(seeds.numpy(), count, counter)
    assert np.array_equal(ours.numpy(), words.astype(np.int64))
    torch.testing.assert_close(our_noise, their_noise, rtol=0, atol=1e-5)


def simulated_normal(seeds: Tensor, count: int) -> np.ndarray:
    """The noise in NumPy's float32, operation by operation: the bits that backends agree on."""
    f = np.float32

    def polynomial(x: np.ndarray, *coefficients: float) -> np.ndarray:
        value = f(coefficients[0]) * x + f(coefficients[1])
        for c in coefficients[2:]:
            value = value * x + f(c)
        return value

    words = formulas.words_of(seeds.numpy(), -(-count // 4) * 4).astype(np.uint32)
    uniform = np.minimum(words, ~words).astype(f) * f(4.6566127342e-10)
    u1, u2 = np.maximum(uniform[..., 0::2], f(1e-7)), uniform[..., 1::2]
    bits = u1.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) >> 23
    x = (bits - (exponent << 23)).view(f) - f(1)
    z, e = x * x, exponent.astype(f)
    p = polynomial(
        x, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
    )  # fmt: skip
    y = ((x * z) * p + e * f(-2.12194440e-4)) - f(0.5) * z
    radius = np.sqrt(f(-2) * ((x + y) + e * f(0.693359375)))
    t = f(4) * u2
    quarter = np.floor(t + f(0.5))
    r = (t - quarter) * f(1.57079632679489662)
    z = r * r
    sine = (polynomial(z, -1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1) * z) * r + r
    cosine = polynomial(z, 2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
    cosine = (cosine * z) * z + (f(1) - f(0.5) * z)
    k = quarter.astype(int) & 3
    both = np.stack(
        [np.choose(k, [cosine, -sine, -cosine, sine]), np.choose(k, [sine, cosine, -sine, -cosine])]
    )
    return np.moveaxis(radius * both, 0, -1).reshape(*seeds.shape, -1)[..., :count]


def test_the_noise_has_the_bits_of_its_description(target: Target) -> None:
    """Compared as integers, on every backend but the reference, which calls torch's functions."""
    if target.backend == "reference":
        pytest.skip("the reference computes the same noise with torch.log, cos and sin, to 1e-5")
    seeds = cases.random_seeds((8,), "simulated")
    noise = gk.normal(seeds.to(target.device), (4099,)).cpu().numpy()
    simulated = simulated_normal(seeds, 4099)
    assert np.array_equal(noise.view(np.int32), simulated.view(np.int32))


def test_x_next_has_the_bits_of_its_description(target: Target) -> None:
    """Products and sums rounded one by one: no backend contracts them."""
    draw = cases.generator("x_next")
    velocity, latents = torch.randn(2, 3, 1051, generator=draw)
    seeds, coefficients = cases.random_seeds((3, 2), "x_next"), cases.step_rows(3)
    noise = gk.normal(seeds.to(target.device), (1051,)).cpu()
    moved = [x.to(target.device) for x in (velocity, latents)]
    got, _ = gk.sde_step(*moved, coefficients.to(target.device), seeds=seeds.to(target.device))
    a, b, s = (coefficients.table[:, i].view(-1, 1, 1) for i in range(3))
    mean = a * latents.unsqueeze(1) + b * velocity.unsqueeze(1)
    assert torch.equal(got.cpu(), mean + s * noise)


# ---- Compiled ahead of time ----


@compiled
def test_every_kernel_is_compiled_ahead_of_time() -> None:
    """A kernel that no `examples` launches would go unchecked."""
    kernels = {
        value.__name__
        for module in ahead_of_time.MODULES
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction) and value.__name__.endswith("_kernel")
    }
    launched = {launch.kernel.__name__ for _, launch in ahead_of_time.launches()}
    assert launched == kernels and len(kernels) >= len(IMPLEMENTATIONS)
    names = {path.stem for path in Path(_device.__file__).parent.glob("*.py")}
    assert {m.__name__.rpartition(".")[2] for m in ahead_of_time.MODULES} <= names


@compiled
@pytest.mark.parametrize("dtype", ahead_of_time.DTYPES, ids=str)
@pytest.mark.parametrize("arch", ahead_of_time.ARCHES)
def test_kernels_compile_without_spills_or_narrow_accesses(arch: int, dtype: torch.dtype) -> None:
    report = kernel_report()
    rows = list(report.triton_rows([arch], (dtype,)))
    assert not [(row.kernel, row.variant, row.faults) for row in rows if row.faults]
    assert len({row.kernel for row in rows}) >= len(IMPLEMENTATIONS)
    assert all(row.spills == 0 and row.registers <= 168 for row in rows)


@compiled
@pytest.mark.parametrize("shape", [(4099,), (77,), (1,)])
def test_kernels_compile_for_any_row(shape: tuple[int, ...]) -> None:
    for _, launch in ahead_of_time.launches((torch.float16,), shape):
        kernel = ahead_of_time.compile_launch(launch, 90)
        contracted = re.findall(r"fma\.rn(?:\.ftz)?\.f32", kernel.asm["ptx"])
        assert not contracted, launch.kernel.__name__


class NoGpu:
    """As much of Triton's driver as choosing a specialisation and compiling it takes."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@compiled
@pytest.mark.parametrize("shape", [(64,), (77,), (1,)])
def test_ahead_of_time_is_what_a_call_compiles(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own binding of a launch's arguments gives the very code that is checked here."""
    monkeypatch.setattr(triton.runtime.driver, "_active", NoGpu())
    for _, launch in ahead_of_time.launches((torch.float16,), shape):
        options = {**launch.constants, **launch.options}
        called = launch.kernel.warmup(*launch.arguments, grid=(1,), **options)
        assert called.asm["ptx"] == ahead_of_time.compile_launch(launch, 90).asm["ptx"]


def kernel_report():
    sys.path.insert(0, str(TESTS.parent / "benchmarks"))
    try:
        import kernel_report
    finally:
        sys.path.pop(0)
    return kernel_report
