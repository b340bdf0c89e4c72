"""The CUDA kernels of csrc/*.cu, run on the CPU: see cuda_emulation/cuda_runtime.h.

What this shows needs no GPU: the op tests pass on these kernels, indices hold beyond 2^31 elements,
nothing depends on the order of threads and blocks, nothing outside of the arrays is touched.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import cases
import pytest
import torch
from torch import Tensor

import g2rpo_kernels as gk
from g2rpo_kernels import _library
from g2rpo_kernels.normal import _box_muller, _uniform, philox
from g2rpo_kernels.optim import native as native_optim

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS / "cuda_emulation"))

import emulated_cuda  # noqa: E402

EVERY_BLOCK = 2**31


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_cuda.build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture(scope="module")
def native(library: Path) -> ModuleType:
    return emulated_cuda.load(library)


@pytest.fixture
def emulator(library: Path) -> Iterator[ctypes.CDLL]:
    emulator = ctypes.CDLL(str(library))
    emulator.emulate.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    emulator.emulated_tile.argtypes = [ctypes.c_int64] * 3 + [
        ctypes.c_int, ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_int64),
    ]  # fmt: skip
    yield emulator
    emulator.emulate(0, 0, EVERY_BLOCK)


@pytest.fixture
def emulated(native: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every op runs the emulated kernels, on outputs that start as NaN."""
    for op in _library._ops.values():
        monkeypatch.setattr(op, "implementations", dict(op.implementations))
    for name in ("_absent", "_probes", "_answers"):
        monkeypatch.setattr(_library, name, dict(getattr(_library, name)))
    monkeypatch.setattr(native_optim, "EXTENSIONS", dict(native_optim.EXTENSIONS))
    emulated_cuda.install(native)
    emulated_cuda.poison(True)
    with gk.use_backend("cuda"):
        yield
    emulated_cuda.poison(False)


def test_the_op_tests_pass_on_the_kernels(library: Path, record_property: Callable) -> None:
    suites = ["ops", "policy_loss", "group_advantages", "normal", "adamw8bit_native"]
    slow = "flux or 129600 or 12345 or 4101 or 2025 or layout or tails or law or uncorrelated"
    slow += " or vector_variant"
    paths = os.pathsep.join([str(TESTS), str(TESTS / "cuda_emulation"), str(TESTS.parent)])
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "emulated_cuda", "-p", "no:cacheprovider",
         "-k", f"not ({slow})", *(str(TESTS / f"test_{suite}.py") for suite in suites)],
        env={**os.environ, emulated_cuda.VARIABLE: str(library), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    counted = re.search(r"cuda-cpu: (\d+) passed, 0 failed", ran.stdout)
    assert counted and int(counted[1]) > 250, ran.stdout[-5000:]
    record_property("elsewhere", f"cuda emulated on the CPU: {counted[1]} passed, 0 failed")


# Which block and thread owns what


def tile(emulator: ctypes.CDLL, *place: int) -> list[int]:
    """row, chunk, first branch, past the last, first element, how many; blocks, chunks."""
    out = (ctypes.c_int64 * 8)()
    emulator.emulated_tile(*place, out)
    return list(out)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(
    ("rows", "branches", "count"),
    [(1, 1, 1), (3, 13, 1025), (2, 4, 2048), (5, 5, 7), (600, 9, 1500)],
)
def test_every_element_has_one_owner(
    rows: int, branches: int, count: int, group: int, emulator: ctypes.CDLL
) -> None:
    owners = torch.zeros(rows, branches, count, dtype=torch.int32)
    blocks = tile(emulator, rows, branches, count, group, 0, 0)[6]
    for block in range(blocks):
        row, _, begin, end, first, _, _, _ = tile(emulator, rows, branches, count, group, block, 0)
        owned = [tile(emulator, rows, branches, count, group, block, t)[4:6] for t in (0, 1, 127)]
        assert [at for at, _ in owned] == [first, first + 8, first + 127 * 8]
        assert all(n == min(max(count - at, 0), 8) for at, n in owned)
        owners[row, begin:end, first : first + 1024] += 1
    assert torch.equal(owners, torch.ones_like(owners))


def test_owners_beyond_32_bits(emulator: ctypes.CDLL) -> None:
    rows, count = 3, 2**40 - 3
    blocks, chunks = tile(emulator, rows, 12, count, 4, 0, 0)[6:]
    assert (blocks, chunks) == (3 * 2**30, 2**30)
    last = tile(emulator, rows, 12, count, 4, blocks - 1, 127)
    assert last[:6] == [2, 2**30 - 1, 0, 12, 2**40 - 8, 5]


# Huge arrays of which only a few pages are ever touched


def vast(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    pages = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize, flags)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def address(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[x.dtype]


TABLE = torch.tensor([[0.75, -0.5, 0.25, 2.0, 0.5]])  # a, b, s, w, c; exact in every product here


@pytest.mark.parametrize("tail", [0, 3], ids=["aligned", "unaligned"])
def test_a_row_beyond_32_bit_offsets(tail: int, native: ModuleType, emulator: ctypes.CDLL) -> None:
    """The last chunk of the last of 3 rows of 2^30 elements, in 3 branches."""
    rows, branches, count = 3, 3, 2**30 + tail
    velocity, latents = vast((rows, count), torch.bfloat16), vast((rows, count), torch.float16)
    noise, x_next = (vast((rows, branches, count), torch.float32) for _ in range(2))
    chunk = 1024 if tail == 0 else tail
    velocity[-1, -chunk:] = 2 * (torch.arange(chunk) % 7)
    latents[-1, -chunk:] = torch.arange(chunk) % 5
    noise[-1, :, -chunk:] = torch.arange(3).view(3, 1) + 4.0
    scratch = vast((native.scratch_size(rows, branches, count, 0),), torch.float32)
    blocks = rows * -(-count // 1024)
    emulator.emulate(0, blocks - 1, blocks)
    native.sde_step(
        *address(velocity), *address(latents), TABLE.data_ptr(), 0, rows, branches, count,
        0, *address(noise), x_next.data_ptr(), 0, scratch.data_ptr(), 0, 0,
    )  # fmt: skip
    mean = 0.75 * latents[-1, -chunk:].float() - 0.5 * velocity[-1, -chunk:].float()
    assert torch.equal(x_next[-1, :, -chunk:], mean + 0.25 * noise[-1, :, -chunk:])
    partial = scratch[: rows * branches * (blocks // rows)].view(rows, branches, -1)
    squares = (0.25 * (torch.arange(3) + 4.0)) ** 2 * chunk
    assert torch.equal(partial[-1, :, -1], squares)


def test_noise_beyond_32_bit_counters(native: ModuleType, emulator: ctypes.CDLL) -> None:
    count, first = 2**34 + 1024, 2**34
    seeds, noise = torch.tensor([-7]), vast((1, count), torch.float32)
    emulator.emulate(0, count // 1024 - 1, count // 1024)
    native.normal(seeds.data_ptr(), 1, count, noise.data_ptr(), 0, 0)
    counters = torch.arange(first // 4, first // 4 + 256)
    words = [_uniform(word) for word in philox(counters, seeds)]
    expected = torch.stack([*_box_muller(*words[:2]), *_box_muller(*words[2:])], dim=-1).flatten()
    assert (noise[0, first:] - expected).abs().max() <= 1e-5


# Orders, splits, alignment


def everything(arguments: dict, **options) -> list[Tensor]:
    """Outputs of the three ops with reductions and the gradient of the loss."""
    step = {k: arguments[k] for k in ("velocity", "latents", "coefficients")}
    velocity = step["velocity"].clone().requires_grad_()
    x_next, sde_log_prob = gk.sde_step(**step, noise=arguments["noise"])
    log_prob = gk.branch_log_prob(**step, x_next=x_next)
    out = gk.policy_loss(
        velocity, step["latents"], x_next, log_prob - 0.01, log_prob.sin(),
        step["coefficients"], clip_range=0.02, **options,
    )  # fmt: skip
    out.loss.backward()
    assert torch.equal(sde_log_prob, log_prob) and torch.equal(out.log_prob, log_prob)
    return [x_next, log_prob, out.loss.detach(), out.statistics, velocity.grad]


def step_arguments(shape: cases.Shape, dtype: str = "float32") -> dict:
    return cases.step_inputs(shape, cases.DTYPES[dtype], "flow", branched=True)


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.isfinite().all()
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
@pytest.mark.parametrize("count", [77, 2048])
def test_order_of_threads_and_blocks_changes_nothing(
    count: int, dtype: str, emulated: None, emulator: ctypes.CDLL
) -> None:
    arguments = step_arguments(cases.Shape("order", 7, 6, (count,)), dtype)
    other = {"reference_velocity": arguments["velocity"] + 0.5, "kl_weight": 0.25,
             "old_velocity": arguments["velocity"] - 0.25}  # fmt: skip
    forwards = everything(arguments, **other)
    emulator.emulate(1, 0, EVERY_BLOCK)
    assert_same_bits(everything(arguments, **other), forwards)


def offset_by(elements: int) -> Callable[[Tensor], Tensor]:
    """A copy that starts `elements` into its storage, NaN on both sides."""

    def embed(x: Tensor) -> Tensor:
        storage = torch.full((x.numel() + 2 * 64,), float("nan"), dtype=x.dtype)
        start = (-storage.data_ptr() // x.itemsize) % 16 + elements
        inside = storage[start : start + x.numel()].view(x.shape)
        return inside.copy_(x)

    return embed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("count", [1024, 1048, 1051])
def test_alignment_changes_nothing(count: int, dtype: str, emulated: None) -> None:
    """count 1051 is unaligned anyway; the NaN around an array shows a read outside of it."""
    arguments = step_arguments(cases.Shape("alignment", 2, 6, (count,)), dtype)
    tensors = ("velocity", "latents", "noise")
    aligned, misaligned = (
        everything({**arguments, **{name: move(arguments[name]) for name in tensors}})
        for move in (offset_by(0), offset_by(1))
    )
    assert_same_bits(misaligned, aligned)


@pytest.mark.parametrize(("count", "backwards"), [(5, False), (1000, True)])
def test_splitting_the_branches_changes_nothing(
    count: int, backwards: bool, native: ModuleType, emulated: None, emulator: ctypes.CDLL
) -> None:
    """With many rows one block does all branches, more than it has room to sum at once."""
    rows, branches = 1024, 66
    few = step_arguments(cases.Shape("split", 2, branches, (count,)))
    expected = everything(few)[1]
    x_next, _ = gk.sde_step(**{k: few[k] for k in few if k != "x_next"})
    pad = lambda x: torch.cat([x, x.new_zeros(rows - 2, *x.shape[1:])])  # noqa: E731
    velocity, latents, x_next = pad(few["velocity"]), pad(few["latents"]), pad(x_next)
    reference, table = velocity + 0.5, pad(few["coefficients"].table)
    zeros = torch.zeros(rows, branches)
    log_prob, grad = zeros.clone(), zeros.clone()
    scratch = torch.full((native.scratch_size(rows, branches, count, 2),), float("nan"))
    emulator.emulated_blocks()
    emulator.emulate(backwards, 0, 2 * branches // 8 + 1)  # of either kernel what two rows need
    native.policy_loss(
        *address(velocity), *address(latents), table.data_ptr(), 5, rows, branches, count,
        *address(x_next), zeros.data_ptr(), zeros.data_ptr(), *address(reference), 0, 0,
        0.9, 1.1, 0.1, float("inf"), 0.0, 0, log_prob.data_ptr(),
        grad.data_ptr(), 0, scratch.data_ptr(), 0, 0,
    )  # fmt: skip
    assert emulator.emulated_blocks() == 2 * (2 * branches // 8 + 1)
    assert torch.equal(log_prob[:2], expected)
    gaps = scratch[: rows * (branches + 1)].view(rows, branches + 1)[:2, -1]
    assert torch.allclose(gaps, torch.tensor(0.25 * count))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("op", ["normal", "step_mean", "ode_step", "sde_step"])
def test_bits_are_those_of_the_cpu(op: str, dtype: str, emulated: None) -> None:
    if "cpu" in _library._absent:
        pytest.skip(_library._absent["cpu"])
    for shape in ("primes", "past_chunk", "digits"):
        arguments = cases.inputs(op, shape, dtype)
        got = cases.as_tuple(getattr(gk, op)(**arguments))[0]
        with gk.use_backend("cpu"):
            assert torch.equal(got, cases.as_tuple(getattr(gk, op)(**arguments))[0])


def test_nothing_is_written_outside_of_the_outputs(native: ModuleType) -> None:
    for rows, count, elements in [(3, 24, 0), (3, 24, 1), (2, 1031, 0), (1, 1, 3)]:
        velocity, latents = torch.randn(rows, count), torch.randn(rows, count)
        guarded = torch.full((rows * count + 64,), 5.0)
        start = (-guarded.data_ptr() // 4) % 16 + elements
        mean = guarded[start : start + rows * count]
        native.step_mean(
            *address(velocity), *address(latents), TABLE.data_ptr(), 0, rows, count,
            mean.data_ptr(), 0, 0,
        )  # fmt: skip
        assert torch.equal(mean.view(rows, count), 0.75 * latents - 0.5 * velocity)
        assert (guarded[:start] == 5).all() and (guarded[start + rows * count :] == 5).all()


# Devices and refusals


def test_the_current_device_is_left_as_it_was(native: ModuleType, emulator: ctypes.CDLL) -> None:
    x, out = torch.ones(1, 8), torch.empty(1, 8)
    one = torch.ones(1)

    def step(device: int) -> None:
        native.ode_step(
            *address(x), *address(x), one.data_ptr(), 0, one.data_ptr(), 0, 1, 8,
            out.data_ptr(), device, 0,
        )  # fmt: skip

    step(1)
    assert emulator.emulated_device() == 0 and torch.equal(out, x)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        step(7)
    assert emulator.emulated_device() == 0
    assert native.probe(1) is None and "invalid device" in native.probe(7)


def test_more_blocks_than_a_grid_has_are_refused(native: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="invalid configuration"):
        native.normal(0, 2**31, 1, 0, 0, 0)
