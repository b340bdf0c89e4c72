"""The CUDA kernel of AdamW8bit, run on the CPU: see cuda_emulation/cuda_runtime.h.

What this shows needs no GPU: the bits are those of `step_reference` for every dtype, code and
alignment, whatever the order of threads and blocks; nothing outside of the arrays is touched; and
what the kernel does in fewer instructions than csrc/adamw8bit.h has the same bits. The tests of
test_adamw8bit_native.py run on this kernel in test_cuda_emulation.py.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_adamw8bit_native import (
    COUNTS,
    GRADS,
    PARAMS,
    K,
    Member,
    as_integers,
    assert_same,
    draw,
    moved,
    native,
    reference,
)
from torch import Tensor

from g2rpo_kernels.optim import native as native_optim
from g2rpo_kernels.optim.arithmetic import Constants, constants, dynamic_code, step_reference

sys.path.insert(0, str(Path(__file__).resolve().parent / "cuda_emulation"))

import emulated_cuda  # noqa: E402

CPU = torch.device("cpu")
CHUNK = 32768
EVERY_BLOCK = 2**31


class Operation(ctypes.Structure):
    """Adamw8bit of csrc/ops.h."""

    _fields_ = [
        ("tensors", ctypes.c_void_p), ("tensor_count", ctypes.c_int64),
        ("chunks", ctypes.c_void_p), ("chunk_count", ctypes.c_int64),
        ("block_size", ctypes.c_int64), ("param_dtype", ctypes.c_int),
        ("grad_dtype", ctypes.c_int), ("low_bytes", ctypes.c_int), ("dynamic", ctypes.c_bool),
        ("zero_grad", ctypes.c_bool), ("constants", ctypes.c_float * 9),
    ]  # fmt: skip


class Emulated:
    """In the place of `_C.cuda`."""

    adamw_chunk = CHUNK

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def adamw8bit(self, *arguments) -> None:
        *fields, k, device, _stream = arguments
        operation = Operation(*fields, (ctypes.c_float * 9)(*k))
        error = self.library.emulated_adamw8bit(ctypes.byref(operation), device)
        if error:
            raise RuntimeError(f"CUDA: {error.decode()}")


@pytest.fixture(autouse=True)
def the_same_numbers_every_time() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = emulated_cuda.build_adamw8bit(tmp_path_factory.mktemp("cuda_emulation"))
    library = ctypes.CDLL(str(built))
    library.emulated_adamw8bit.restype = ctypes.c_char_p
    library.emulated_blocks.restype = ctypes.c_int64
    library.emulate.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return library


@pytest.fixture
def emulator(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """`native` runs the emulated kernel."""
    monkeypatch.setattr(native_optim, "EXTENSIONS", {"cuda": Emulated(library)})
    monkeypatch.setattr(native_optim, "backend_for", lambda device: "cuda")
    yield library
    library.emulate(0, 0, EVERY_BLOCK)


def pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


# Whole steps


@pytest.mark.parametrize("codec", ["dynamic", "fp8"])
@pytest.mark.parametrize("grad", GRADS, ids=str)
@pytest.mark.parametrize(("param", "low_bytes"), PARAMS, ids=str)
def test_bits_from_the_last_thread_and_block_to_the_first(
    param: torch.dtype, low_bytes: int, grad: torch.dtype, codec: str, emulator: ctypes.CDLL
) -> None:
    """Parameters of many sizes in one launch, each from another element of its whole on."""
    emulator.emulate(1, 0, EVERY_BLOCK)
    emulator.emulated_blocks()
    for block_size in (64, 128, 256, 512, 1024):
        before = [
            draw(count, block_size, param, low_bytes, grad, codec, 8 * 1001 * i, i)
            for i, count in enumerate((*COUNTS, 40000) if block_size == 256 else COUNTS)
        ]
        want, got = moved(before, CPU), moved(before, CPU)
        reference(want, block_size, codec)
        native(got, block_size, CPU, codec)
        assert_same(got, want)
        for x, y in zip(got, before, strict=True):
            assert torch.equal(as_integers(x.grad), as_integers(y.grad))
    assert emulator.emulated_blocks() == 5 * len(COUNTS) + 2


GUARD, ROOM = 0xA5, 64  # bytes


def guarded(
    of_bytes: int, of_others: int, storages: list[tuple[Tensor, slice]]
) -> Callable[[Tensor], Tensor]:
    """A copy so many elements after a 16-byte boundary, among bytes that must stay as they are."""

    def embed(x: Tensor) -> Tensor:
        size = x.numel() * x.itemsize
        offset = of_bytes if x.itemsize == 1 else of_others
        storage = torch.full((size + 2 * ROOM + 32,), GUARD, dtype=torch.uint8)
        start = -storage.data_ptr() % 16 + ROOM + offset * x.itemsize
        storages.append((storage, slice(start, start + size)))
        storage[start : start + size] = x.view(torch.uint8)
        return storage[start : start + size].view(x.dtype)

    return embed


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero_grad"])
@pytest.mark.parametrize("offsets", [(0, 0), (8, 8), (1, 1), (1, 0), (0, 1)], ids=str)
def test_nothing_outside_is_touched_at_any_alignment(
    offsets: tuple[int, int], zero: bool, emulator: ctypes.CDLL
) -> None:
    for (param, low_bytes), grad in itertools.product(PARAMS, GRADS):
        storages: list[tuple[Tensor, slice]] = []
        want = [draw(n, 256, param, low_bytes, grad, seed=n) for n in (1, 6, 256, 1029)]
        got = [x.mapped(guarded(*offsets, storages)) for x in want]
        reference(want, 256)
        native(got, 256, CPU, zero=zero)
        assert_same(got, want)
        for x, y in zip(got, want, strict=True):
            assert not as_integers(x.grad).any() if zero else torch.equal(x.grad, y.grad)
        for storage, inside in storages:
            assert (storage[: inside.start] == GUARD).all()
            assert (storage[inside.stop :] == GUARD).all()


def vast(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros, of which only the pages that are touched take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags), dtype=dtype)


def test_a_parameter_beyond_32_bit_offsets(emulator: ctypes.CDLL) -> None:
    """The last chunk alone, of one that is shorter, of 2^32 elements and some; the first of them
    lies further on in the whole parameter."""
    count, block_size, first = 2**32 + 8 * CHUNK + 1003, 256, 2**37
    begin = count // CHUNK * CHUNK
    want = draw(count - begin, block_size, grad=torch.bfloat16, first=first + begin)
    whole = want.mapped(
        lambda x: vast(count if x.numel() == count - begin else -(-count // block_size), x.dtype)
    )
    whole.first = first

    def tail(member: Member) -> Member:
        parts = member.mapped(lambda x: x[begin if x.numel() == count else begin // block_size :])
        parts.first += begin
        return parts

    for name, x in vars(tail(whole)).items():
        if isinstance(x, Tensor):
            x.copy_(getattr(want, name))
    reference([want], block_size)
    emulator.emulate(0, begin // CHUNK, begin // CHUNK + 1)
    native([whole], block_size, CPU)
    assert_same([tail(whole)], [want])


def test_a_device_that_is_not_there_is_an_error(emulator: ctypes.CDLL) -> None:
    member = draw(8, 64)
    with pytest.raises(RuntimeError, match="CUDA: invalid device ordinal"):
        native([member], 64, torch.device("cpu", 7))
    assert emulator.emulated_device() == 0


# What takes fewer instructions


@pytest.mark.parametrize("signed", [True, False])
def test_codes_by_table_are_those_by_arithmetic(signed: bool, library: ctypes.CDLL) -> None:
    """Around every border between codes and between entries of the table, and anywhere."""
    value = dynamic_code(signed).value
    values = value[value > 0].sort().values
    borders = ((values[1:] + values[:-1]) / 2).view(torch.int32)
    spread = torch.arange(-300, 301, dtype=torch.int32)
    entries = torch.arange(103 * 128, 127 * 128 + 1, dtype=torch.int32) << 16
    edges = dynamic_code(signed).start.view(torch.int32)
    bits = torch.cat([
        (borders[:, None] + spread).flatten(),
        (edges[:, None] + spread).flatten(),
        (entries[:, None] + torch.arange(-3, 4, dtype=torch.int32)).flatten(),
        torch.randint(0, 0x3F800001, (200_000,), dtype=torch.int32),
        torch.randint(0x38000000, 0x3F800001, (200_000,), dtype=torch.int32),
    ])  # fmt: skip
    y = bits.clamp(0, 0x3F800001).view(torch.float32)
    y = torch.cat([y, -y] if signed else [y])
    y = torch.nn.functional.pad(y, (0, -y.numel() % 8))
    by_table, by_arithmetic = (torch.empty(y.numel(), dtype=torch.uint8) for _ in range(2))
    library.emulated_codes(
        signed, pointer(y), ctypes.c_int64(y.numel()), pointer(by_table), pointer(by_arithmetic)
    )
    assert torch.equal(by_table, by_arithmetic)
    assert by_table.unique().numel() == 256


def weights(
    library: ctypes.CDLL, k: Constants, w: Tensor, m: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel's few instructions, by `adamw_weight`, and where the kernel keeps the first."""
    fast, exact = torch.empty_like(w), torch.empty_like(w)
    library.emulated_weights(
        (ctypes.c_float * 9)(*k), pointer(w), pointer(m), pointer(v), ctypes.c_int64(w.numel()),
        pointer(fast), pointer(exact),
    )  # fmt: skip
    return fast, exact, fast.abs() >= 2.0**-32


def any_float(count: int, low: int, high: int) -> Tensor:
    """Of either sign, from 2^low to 2^high."""
    exponent = torch.rand(count, dtype=torch.float64) * (high - low) + low
    return (torch.exp2(exponent) * torch.randn(count).sign()).float()


def test_every_root(library: ctypes.CDLL) -> None:
    """Of all mantissas and both parities of the exponent."""
    k = constants(1.0, (0.9, 0.999), 1e-8, 0.0, 1, 1.0)
    for part in torch.arange(2**24, dtype=torch.int32).split(2**22):
        v = (part + (97 << 23)).view(torch.float32)  # from 2^-30 on
        w, m = torch.zeros_like(v), torch.full_like(v, 1e-3)
        fast, exact, taken = weights(library, k, w, m, v)
        assert taken.all() and torch.equal(fast, exact)


@pytest.mark.parametrize("eps", [1.0, 1e-5, 1e-8, 1e-12])
@pytest.mark.parametrize("lr", [1e30, 3.0, 1e-3, 1e-30])
@pytest.mark.parametrize(("step", "beta2"), [(1, 0.999), (1, 0.999999), (100, 0.99), (1, 0.0)])
def test_weights_by_few_instructions(
    step: int, beta2: float, lr: float, eps: float, library: ctypes.CDLL
) -> None:
    k, n = constants(lr, (0.9, beta2), eps, 0.01, step, 1.0), 20_000
    odd = torch.tensor([0.0, -0.0, 2.0**-149, 2.0**-140, 2.0**-126, 2.0**100, 1.0])
    pick = lambda: odd[torch.randint(0, len(odd), (n,))]  # noqa: E731
    for w, m, v in [
        (any_float(n, -40, 3), any_float(n, -149, 127), any_float(n, -149, 127).abs()),
        (any_float(n, -34, -28), any_float(n, -149, -60), any_float(n, -149, -100).abs()),
        (pick(), pick(), pick().abs()),
        (any_float(n, -149, 127), pick(), any_float(n, -110, -60).abs()),
        (0.02 * torch.randn(n), 1e-4 * torch.randn(n), 1e-8 * torch.rand(n)),  # as they are
    ]:
        fast, exact, taken = weights(library, k, w, m, v)
        assert torch.equal(fast[taken].view(torch.int32), exact[taken].view(torch.int32))
    serves = k.eps >= 2.0**-40 and k.inv_sqrt_bias2 <= k.eps * 2.0**44
    assert taken.float().mean() > 0.999 if serves else not taken.any()


def test_an_eps_too_small_is_left_to_the_exact_way(emulator: ctypes.CDLL) -> None:
    k = K._replace(eps=torch.tensor(1e-16).item())
    want = [draw(4096, 256, seed=5)]
    got = moved(want, CPU)
    reference(want, 256, k=k)
    native(got, 256, CPU, k=k)
    assert_same(got, want)
    assert not weights(emulator, k, *(torch.full((8,), x) for x in (0.02, 1e-4, 1e-8)))[2].any()


def test_not_a_number_stays_visible(emulator: ctypes.CDLL) -> None:
    """A block's scales and the weights that a NaN reaches, as in the reference."""
    want = [draw(512, 256, param=torch.float32, low_bytes=0)]
    want[0].grad[3] = math.nan
    got = moved(want, CPU)
    (x,) = want
    step_reference(
        x.param, x.grad, x.exp_avg, x.exp_avg_sq, x.exp_avg_scale, x.exp_avg_sq_scale, None, K,
        256, "dynamic", x.seed, 0,
    )  # fmt: skip
    native(got, 256, CPU)
    for name in ("param", "exp_avg_scale", "exp_avg_sq_scale"):
        ours, theirs = getattr(got[0], name), getattr(x, name)
        assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()
        assert torch.equal(ours[~ours.isnan()], theirs[~ours.isnan()])
