"""Rowwise FP8 inside kernels: a row's largest magnitude, its scale, and the nearest e4m3 codes.

    bytes, scales = fp8_bytes(values), scales       # host: pass the values as uint8
    ...
    largest = row_max(x)                            # kernel: masked elements of x must be 0
    codes, scale = quantize_row(x, largest)
    tl.store(bytes + at, codes, mask=inside)
    tl.store(scales + row, scale)

The codes are those of `quantize_fp8`'s reference, bit for bit, on every architecture and in the
interpreter, whose own conversion to float8 rounds wrongly and which therefore takes the integer
arithmetic that GPUs before sm_90 take.
"""

from __future__ import annotations

import re

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # elements of a row that one program keeps in registers
LOOP_BLOCK = 4096  # elements at a time of a row that is wider
ONE_448TH = tl.constexpr(0.002232142857142857)  # float32(1/448) once it meets a float32
LEAST_SCALE = tl.constexpr(1.1754943508222875e-38)  # 2^-126: its reciprocal is finite


def converts_fp8(_semantic=None) -> tl.constexpr:
    """Whether Triton converts float32 to e4m3 in one rounding on the target it compiles for.

    It does from sm_90 on. On sm_89 it cuts float32 off to float16 first, which moves ties.
    """
    if _semantic is None:  # the interpreter calls it as plain Python
        return tl.constexpr(False)
    arch = re.match(r"sm_?(\d+)", str(getattr(_semantic.builder.options, "arch", "")))
    return tl.constexpr(arch is not None and int(arch[1]) >= 90)


converts_fp8.__triton_builtin__ = True


@triton.jit
def magnitude(x):
    """int32 numbers in the order of |x|, a NaN above all: what a loop may take the maximum of.

    Integers, because the hardware's float maximum drops a NaN, which must show in the scale.
    """
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def from_magnitude(m):
    return m.to(tl.float32, bitcast=True)


@triton.jit
def row_max(x):  # [n] -> [] or [R, n] -> [R]
    """The largest |x| of a row, float32; NaN if one is."""
    return from_magnitude(tl.max(magnitude(x), axis=len(x.shape) - 1))


@triton.jit
def scale_of(largest):
    """largest / 448; 1 for a row of zeros, NaN for one with an infinity or a NaN."""
    scale = tl.maximum(largest * ONE_448TH, LEAST_SCALE)
    scale = tl.where(largest == 0.0, 1.0, scale)
    return tl.where(largest < float("inf"), scale, float("nan"))


@triton.jit
def encode(y):
    """e4m3 codes (uint8) nearest to float32 y, ties to even; |y| <= 448 or NaN."""
    if converts_fp8():
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = y.to(tl.int32, bitcast=True)
        size = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448
        # Below 2^-6 codes are multiples of 2^-9, the spacing of floats from 2^14 on.
        small = size.to(tl.float32, bitcast=True) + 16384.0
        small = small.to(tl.int32, bitcast=True) - 0x46800000
        # Else 20 of float32's 23 bits are rounded off, and the exponent's bias falls from 127 to 7.
        large = (size + (0x7FFFF - (120 << 23)) + ((size >> 20) & 1)) >> 20
        code = tl.where(size < 0x3C800000, small, large) | ((bits >> 24) & 0x80)
        return tl.where(y == y, code, 0x7F).to(tl.uint8)


@triton.jit
def quantize_row(x, largest):
    """Codes (uint8) of float32 x and the scale of its row.

    largest: the row_max of x's row; must broadcast against x ([] beside [n], [R, 1] beside [R, n]).
    The scale has its shape.
    """
    scale = scale_of(largest)
    return encode(x * tl.div_rn(1.0, scale)), scale


def row_block(width: int) -> tuple[int, int, bool]:
    """BLOCK and warps for rows of `width`, and whether such a row fits one block.

    16 elements a thread, or 32 in the widest: 16 bytes an access of codes, several of others.
    """
    block = min(WIDEST, max(512, triton.next_power_of_2(width)))
    if width > block:
        return LOOP_BLOCK, LOOP_BLOCK // 512, False
    return block, min(16, block // 512), True


def fp8_bytes(values: Tensor) -> Tensor:
    """float8 values as the uint8 that a kernel writes."""
    return values.view(torch.uint8)


def empty_fp8(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """values float8_e4m3fn `shape` [..., K] and scales float32 [...], to be written."""
    return (
        torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(shape[:-1], dtype=torch.float32, device=device),
    )
