"""AdamW8bit's native backends have the bits of `step_reference`."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import cases
import pytest
import torch
from cases import Target
from torch import Tensor

from g2rpo_kernels import _library
from g2rpo_kernels.optim import native as native_optim
from g2rpo_kernels.optim.arithmetic import constants, seed_word, step_reference

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COUNTS = (1, 7, 8, 255, 256, 257, 5000)
PARAMS = [(torch.bfloat16, 0), (torch.bfloat16, 1), (torch.bfloat16, 2), (torch.float32, 0)]
GRADS = [torch.float32, torch.bfloat16, torch.float16]
LOW = {1: torch.int8, 2: torch.int16}
K = constants(2e-3, (0.9, 0.999), 1e-8, 0.01, 3, 0.5)


@dataclass
class Member:
    """One parameter: what a step reads and writes of it."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_scale: Tensor
    exp_avg_sq_scale: Tensor
    low_bits: Tensor | None
    first: int = 0
    seed: int = 0

    @property
    def written(self) -> tuple[Tensor, ...]:
        fields = (
            self.param, self.exp_avg, self.exp_avg_sq, self.exp_avg_scale, self.exp_avg_sq_scale,
            self.low_bits,
        )  # fmt: skip
        return tuple(x for x in fields if x is not None)

    def mapped(self, function) -> Member:
        tensors = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def draw(
    count: int, block_size: int, param=torch.bfloat16, low_bytes=1, grad=torch.float32,
    codec="dynamic", first=0, seed=0, magnitude=None,
) -> Member:  # fmt: skip
    """Any codes, weights of any size, blocks of gradients from 1e-12 to 1e3, some of them zero.

    magnitude: of all gradients instead.
    """
    generator = cases.generator("adamw8bit", count, seed)

    def integers(low: int, high: int, dtype: torch.dtype, size: int = count) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator).to(dtype)

    blocks = -(-count // block_size)
    size = 10.0 ** (torch.rand(blocks, generator=generator) * 15 - 12)
    size[torch.rand(blocks, generator=generator) < 0.1] = 0
    if magnitude is not None:
        size.fill_(magnitude)
    grads = torch.randn(count, generator=generator) * size.repeat_interleave(block_size)[:count]
    weights = torch.randn(count, generator=generator) * 0.02
    odd = torch.tensor([0.0, -0.0, 1e-38, -1e-40, 1e30, -3e38, 1.0])
    which = torch.rand(count, generator=generator) < 0.05
    weights = torch.where(which, odd[integers(0, len(odd), torch.int64)], weights)
    fp8 = codec == "fp8"
    m = integers(0, 127, torch.uint8) + 128 * integers(0, 2, torch.uint8)
    v = integers(0, 127, torch.uint8)
    return Member(
        param=weights.to(param),
        grad=grads.clamp(-6e4, 6e4).half() if grad is torch.float16 else grads.to(grad),
        exp_avg=m if fp8 else integers(0, 256, torch.uint8),
        exp_avg_sq=v if fp8 else integers(0, 256, torch.uint8),
        exp_avg_scale=size * 2,
        exp_avg_sq_scale=size * size * 3,
        low_bits=integers(-(2**15), 2**15, torch.int64).to(LOW[low_bytes]) if low_bytes else None,
        first=first,
        seed=seed_word(seed, 3, 1),
    )


def native(
    members: list[Member], block_size: int, device: torch.device, codec="dynamic", k=K, zero=False
) -> None:
    """One step in place, on the backend in force."""
    rows = []
    for x in members:
        tensors = (
            x.param, x.grad, x.exp_avg, x.exp_avg_sq, x.exp_avg_scale, x.exp_avg_sq_scale,
            x.low_bits,
        )  # fmt: skip
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        seed = x.seed - (1 << 64) if x.seed >> 63 else x.seed
        rows.append([*pointers, x.param.numel(), x.first, seed])
    low = members[0].low_bits
    native_optim.step(
        native_optim.backend_for(device), torch.tensor(rows), k, device, members[0].param.dtype,
        members[0].grad.dtype, 0 if low is None else low.element_size(), block_size, codec, zero,
    )  # fmt: skip


def reference(members: list[Member], block_size: int, codec="dynamic", k=K) -> None:
    for x in members:
        step_reference(
            x.param, x.grad, x.exp_avg, x.exp_avg_sq, x.exp_avg_scale, x.exp_avg_sq_scale,
            x.low_bits, k, block_size, codec, x.seed, x.first,
        )  # fmt: skip


def as_integers(x: Tensor) -> Tensor:
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32}
    return x.cpu().view(sizes[x.element_size()])


def assert_same(got: list[Member], want: list[Member]) -> None:
    for one, other in zip(got, want, strict=True):
        for x, y in zip(one.written, other.written, strict=True):
            assert torch.equal(as_integers(x), as_integers(y))


def moved(members: list[Member], device: torch.device) -> list[Member]:
    return [x.mapped(lambda t: t.to(device, copy=True)) for x in members]


@pytest.fixture
def device(target: Target) -> torch.device:
    """Of a backend that steps natively."""
    if target.backend not in native_optim.EXTENSIONS:
        pytest.skip("AdamW8bit is native on cpu and cuda; test_optim has its reference")
    return torch.device(target.device, 0 if target.device == "cuda" else None)


@pytest.mark.parametrize("codec", ["dynamic", "fp8"])
@pytest.mark.parametrize("grad", GRADS, ids=str)
@pytest.mark.parametrize(("param", "low_bytes"), PARAMS, ids=str)
def test_the_bits_are_the_references(
    param: torch.dtype, low_bytes: int, grad: torch.dtype, codec: str, device: torch.device
) -> None:
    for block_size in (64, 128, 256, 512, 1024):
        want = [
            draw(count, block_size, param, low_bytes, grad, codec, 8 * 1001 * i, i)
            for i, count in enumerate(COUNTS)
        ]
        got = moved(want, device)
        before = [x.grad.clone() for x in want]
        reference(want, block_size, codec)
        native(got, block_size, device, codec)
        assert_same(got, want)
        for x, grads in zip(got, before, strict=True):
            assert torch.equal(as_integers(x.grad), as_integers(grads))


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-30, 1e-22, 1.0, 1e17])
@pytest.mark.parametrize("codec", ["dynamic", "fp8"])
def test_steps_from_nothing_on_gradients_of_any_size(
    codec: str, magnitude: float, device: torch.device
) -> None:
    """1e-38: scales below the smallest normal number, which have no reciprocal: codes of zero."""
    block_size = 128
    member = draw(1000, block_size, codec=codec, magnitude=magnitude)
    member.exp_avg_scale.zero_()
    member.exp_avg_sq_scale.zero_()
    want, got = [member], moved([member], device)
    for step in (1, 2, 3):
        k = constants(1e-3, (0.9, 0.95), 1e-8, 0.0, step, 1.0)
        reference(want, block_size, codec, k)
        native(got, block_size, device, codec, k)
        assert_same(got, want)
    (member,) = moved(got, torch.device("cpu"))
    assert member.exp_avg_scale.bool().all() == (magnitude > 0)
    if magnitude <= 1e-38:
        zeros = {127} if codec == "dynamic" else {0, 128}
        assert set(member.exp_avg.tolist()) <= zeros and not member.exp_avg_sq.any()
    else:
        assert member.exp_avg.unique().numel() > 100


def test_the_gradients_are_zeroed_in_the_same_pass(device: torch.device) -> None:
    for grad in GRADS:
        want = [draw(count, 64, grad=grad, seed=count) for count in COUNTS]
        got = moved(want, device)
        reference(want, 64)
        native(got, 64, device, zero=True)
        assert_same(got, want)
        assert not any(x.grad.any() for x in got)


@pytest.mark.parametrize("low_bytes", [0, 1, 2])
def test_a_shard_has_the_bits_of_the_whole(low_bytes: int, device: torch.device) -> None:
    block_size, cut = 64, 64 * 9
    member = draw(5001, block_size, low_bytes=low_bytes, first=2**36)
    (whole,) = moved([member], device)

    def part(rows: slice) -> Member:
        blocks = slice(rows.start // block_size, None if rows.stop is None else cut // block_size)
        pick = lambda x: x[blocks if x.dtype is torch.float32 else rows].clone()  # noqa: E731
        return replace(whole.mapped(pick), grad=whole.grad[rows], first=2**36 + rows.start)

    halves = [part(slice(0, cut)), part(slice(cut, None))]
    native([whole], block_size, device)
    native(halves, block_size, device)
    for x, *parts in zip(whole.written, *(h.written for h in halves), strict=True):
        assert torch.equal(as_integers(x), as_integers(torch.cat(parts)))


def test_any_address_of_an_element_will_do(device: torch.device) -> None:
    def shifted(x: Tensor) -> Tensor:
        room = torch.empty(x.numel() + 1, dtype=x.dtype, device=device)
        room[1:].copy_(x)
        return room[1:]

    for (param, low_bytes), grad in itertools.product(PARAMS, GRADS):
        want = [draw(700, 256, param, low_bytes, grad)]
        got = [want[0].mapped(shifted)]
        reference(want, 256)
        native(got, 256, device)
        assert_same(got, want)


def test_neither_threads_nor_chunks_change_a_bit(device: torch.device) -> None:
    """Parameters of more than one chunk, and of many sizes."""
    counts = (3, 70001, 1, 40000, 512, 32768, 9)
    want = [draw(count, 256, seed=i) for i, count in enumerate(counts)]
    start, before = moved(want, device), torch.get_num_threads()
    reference(want, 256)
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            got = moved(start, device)
            native(got, 256, device)
            assert_same(got, want)
    finally:
        torch.set_num_threads(before)


def test_no_parameters_are_no_work(device: torch.device) -> None:
    empty = draw(8, 64).mapped(lambda x: x[:0].to(device))
    native([empty, empty], 64, device)


VARIANT = r"""
#include "adamw8bit.cpp"
extern "C" void run(const g2rpo::AdamwTensor* tensors, int64_t count, int64_t block_size,
                    int low_bytes, bool dynamic, const g2rpo::AdamwConstants* k) {
  using g2rpo::Dtype;
  g2rpo::cpu::adamw8bit({tensors, count, nullptr, 0, block_size, Dtype::bfloat16, Dtype::float32,
                         low_bytes, dynamic, false, *k});
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_vector_variant_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """adamw8bit.cpp compiled for each instruction set alone, as far as this machine has them."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    levels = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512dq"}
    able = [level for level, flag in levels.items() if flag in flags]
    if len(able) < 2:
        pytest.skip("this machine has one vector variant alone")
    (tmp_path / "variant.cpp").write_text(VARIANT)
    compilers = [
        subprocess.Popen(
            ["g++", "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-shared",
             "-fno-trapping-math", "-fPIC", "-fopenmp-simd", "-DG2RPO_ONE_VARIANT",
             f"-march={level}", f"-I{CSRC}", str(tmp_path / "variant.cpp"),
             "-o", str(tmp_path / f"{level}.so")]
        )
        for level in able
    ]  # fmt: skip
    assert [compiler.wait() for compiler in compilers] == [0] * len(able)
    for level in able:
        library = ctypes.CDLL(str(tmp_path / f"{level}.so"))

        class Variant:
            @staticmethod
            def adamw8bit(
                tensors, count, chunks, chunk_count, block_size, param_dtype, grad_dtype,
                low_bytes, dynamic, zero_grad, k, device, stream, run=library.run,
            ) -> None:  # fmt: skip
                run(
                    ctypes.c_void_p(tensors), ctypes.c_int64(count), ctypes.c_int64(block_size),
                    low_bytes, ctypes.c_bool(dynamic), (ctypes.c_float * 9)(*k),
                )  # fmt: skip

        monkeypatch.setattr(native_optim, "EXTENSIONS", {"cpu": Variant})
        monkeypatch.setattr(_library, "_forced", "cpu")
        for low_bytes, codec in itertools.product((0, 1, 2), ("dynamic", "fp8")):
            want = [draw(count, 256, low_bytes=low_bytes, codec=codec) for count in COUNTS]
            got = moved(want, torch.device("cpu"))
            reference(want, 256, codec)
            native(got, 256, torch.device("cpu"), codec)
            assert_same(got, want)
