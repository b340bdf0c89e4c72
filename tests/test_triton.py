"""Triton kernels without a GPU: run by Triton's interpreter, and compiled for three architectures.

The interpreter is chosen when Triton is imported, so a second process runs there: the ops' own
tests on target triton-cpu, and the tests of this file marked `interpreted`.
"""

from __future__ import annotations

import importlib
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
# (the reference backend's alone), shapes whose path a smaller one takes as well, and graphs, which
# hold an op and no backend.
TOO_LONG = (
    "size_of_flux", "tails", "law", "uncorrelated", "any_batch", "float64", "shorter",
    "digits", "company and (4096 or 12345 or 129600)", "dance", "cps",
    "past_chunk and float16", "on_policy and not float32", "misaligned and bfloat16",
    "3072 and (float16 or mixed)", "diffusers", "opcheck", "as_torch_checks", "torch_compile",
    "graph",
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
    chosen = "(triton-cpu or test_words_are or test_offsets)"
    chosen += "".join(f" and not ({what})" for what in TOO_LONG)
    files = ["ops", "native", "normal", "policy_loss", "group_advantages", "triton"]
    files += (path.stem.removeprefix("test_") for path in sorted(TESTS.glob("test_block_*.py")))
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
    assert int(counted[1]) > 500
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


@interpreted
def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Rows of 2^30 elements in sparse memory: the third begins at 2^31, past what an int32 holds.

    One program a row, told that a row has one chunk, so that three programs are enough.
    """
    rows, elements, block = 3, 2**30, 16

    def sparse(name: str, dtype: torch.dtype) -> Tensor:
        x = torch.from_file(str(tmp_path / name), True, rows * elements, dtype=dtype)
        return x.view(rows, elements)

    velocity, latents = sparse("velocity", torch.bfloat16), sparse("latents", torch.bfloat16)
    mean, table = sparse("mean", torch.float32), cases.step_rows(rows).table
    velocity[:, :block] = torch.randn(rows, block, generator=cases.generator("offsets")).bfloat16()
    latents[:, :block] = torch.randn(rows, block, generator=cases.generator("more")).bfloat16()
    kernel = importlib.import_module("g2rpo_kernels.triton.step_mean").step_mean_kernel
    kernel[(rows,)](
        velocity, latents, table, mean, elements, 1, table.stride(0), BLOCK=block
    )
    first = gk.StepCoefficients(table, "flow")
    with gk.use_backend("reference"):
        want = gk.step_mean(velocity[:, :block], latents[:, :block], first)
    assert torch.equal(mean[:, :block], want)


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
    assert launched == kernels and len(kernels) >= len(ahead_of_time.MODULES)
    names = {path.stem for path in Path(_device.__file__).parent.glob("*.py")}
    assert {m.__name__.rpartition(".")[2] for m in ahead_of_time.MODULES} <= names


@compiled
@pytest.mark.parametrize("dtype", ahead_of_time.DTYPES, ids=str)
@pytest.mark.parametrize("arch", ahead_of_time.ARCHES)
def test_kernels_compile_without_spills_or_narrow_accesses(arch: int, dtype: torch.dtype) -> None:
    report = kernel_report()
    rows = list(report.triton_rows([arch], (dtype,)))
    assert not [(row.kernel, row.variant, row.faults) for row in rows if row.faults]
    launched = {launch.kernel.__name__ for _, launch in ahead_of_time.launches((dtype,))}
    assert {row.kernel for row in rows} == launched
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
