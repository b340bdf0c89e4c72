"""The arithmetic of AdamW8bit in PyTorch: the codes, the weights' extra bits, one step.

csrc/adamw8bit.h has the same, line by line; here it is the reference, on any device, with the same
bits. Everything is float32 and rounds once an operation.

    m = decode(codes) * scale          scale: the largest |m| of a block of `block_size` elements
    w = bfloat16, and what it lacks of a master of 24 or 32 bits

Dynamic code: Dettmers et al. 2022, arXiv 2110.02861, section 2.1 and bitsandbytes' dynamic map.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..normal import philox

DECADES = 7
CODECS = ("dynamic", "fp8")
LOW_BITS = {16: 0, 24: 8, 32: 16}  # of the masters, beside a bfloat16
LOW_DTYPES = {8: torch.int8, 16: torch.int16}
LEAST_SCALE = 2.0**-126  # below it a scale has no finite reciprocal: the block's codes are 0
MASK = 0xFFFFFFFF
MASK64 = 0xFFFFFFFFFFFFFFFF


class Constants(NamedTuple):
    """Of one step of one parameter group; `AdamwConstants` of adamw8bit.h."""

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    inv_sqrt_bias2: float
    eps: float
    decay: float
    grad_scale: float


def constants(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int,
    grad_scale: float,
) -> Constants:  # fmt: skip
    """Of step number `step`, from 1: made in float64, rounded to float32."""
    beta1, beta2 = betas
    exact = (
        beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step), eps, 1 - lr * weight_decay, grad_scale,
    )  # fmt: skip
    return Constants(*torch.tensor(exact, dtype=torch.float64).float().tolist())


# The codes --------------------------------------------------------------------------------------


class DynamicCode(NamedTuple):
    """Segments of |y| in [0, 1], and the value of each code; see adamw8bit.h."""

    start: Tensor  # [8] |y| from here on is in the next segment
    slope: Tensor  # [9]
    offset: Tensor  # [9]
    last: Tensor  # [9]
    value: Tensor  # [256]


@functools.cache
def dynamic_code(signed: bool, device: torch.device | str = "cpu") -> DynamicCode:
    first = 1 if signed else 2
    start, slope, offset, last = [], [0.0], [first - 0.5], [first - 0.5]
    value, below = [0.0] * 256, 0.0
    for decade in range(DECADES):
        steps, ten = first << decade, float(f"1e{decade - DECADES + 1}")
        values = [ten * (0.1 + 0.9 * (i + 0.5) / steps) for i in range(steps)]
        start.append((below + values[0]) / 2)
        slope.append(steps / (0.9 * ten))
        offset.append(steps * 8.0 / 9.0)
        last.append(2 * steps - 0.5)
        below = values[-1]
        for i, x in enumerate(values):
            if signed:
                value[127 + steps + i], value[127 - steps - i] = x, -x
            else:
                value[steps + i - 1] = x
    start.append((below + 1) / 2)
    slope.append(0.0)
    offset.append((first << DECADES) + 0.5)
    last.append((first << DECADES) + 0.5)
    value[255] = 1.0
    parts = (start, slope, offset, last, value)
    return DynamicCode(
        *(torch.tensor(part, dtype=torch.float64).float().to(device) for part in parts)
    )


def encode(x: Tensor, scale: Tensor, codec: str, signed: bool) -> Tensor:  # [B, S], [B] -> uint8
    """Nearest codes of the rows of x, relative to a scale each."""
    inverse = torch.where(scale >= LEAST_SCALE, scale.reciprocal(), 0.0)[:, None]
    y = x * inverse
    if codec == "fp8":
        return (y * 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    code = dynamic_code(signed, x.device)
    segment = torch.bucketize(y.abs(), code.start, right=True)
    q = torch.minimum(y.abs() * code.slope[segment] + code.offset[segment], code.last[segment])
    q = q.to(torch.int32)
    if not signed:
        return (q - 1).to(torch.uint8)
    return torch.where(y < 0, 127 - q.clamp(max=127), 127 + q).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, codec: str, signed: bool) -> Tensor:  # [B, S], [B]
    if codec == "fp8":
        value = codes.view(torch.float8_e4m3fn).float() * (1.0 / 448.0)
    else:
        value = dynamic_code(signed, codes.device).value[codes.int()]
    return value * scale[:, None]


# Weights of more bits than bfloat16 -------------------------------------------------------------


def join_master(weight: Tensor, low: Tensor | None, low_bits: int) -> Tensor:
    """float32 masters of bfloat16 weights and what these lack."""
    if low is None:
        return weight.float()
    high = weight.view(torch.int16).int()
    low = low.int()
    # Nothing lies below zero: someone else has written this weight.
    low = torch.where((high & 0x7FFF == 0) & (low < 0), 0, low)
    return ((high << 16) + (low << (16 - low_bits))).view(torch.float32)


def split_master(
    w: Tensor, low_bits: int, random: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The nearest bfloat16 and the rest, of w rounded stochastically to that many bits more.

    random: int64, 16 bits an element; not needed for 16 low bits.
    """
    cut = 16 - low_bits
    bits = w.view(torch.int32).long() & MASK
    if cut:
        bits = (bits + (random >> (16 - cut))) & MASK
    bits = bits >> cut
    half = 1 << (low_bits - 1) if low_bits else 0
    nearest = (bits + half) >> low_bits
    weight = nearest.to(torch.int16).view(torch.bfloat16)
    if not low_bits:
        return weight, None
    return weight, (bits - (nearest << low_bits)).to(LOW_DTYPES[low_bits])


def seed_word(seed: int, step: int, index: int) -> int:
    """64 bits for one parameter at one step: a splitmix64 chain."""
    state = 0
    for part in (seed, step, index):
        state = _splitmix64((state ^ (part & MASK64)) & MASK64)
    return state


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def random_halves(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """int64 [count] of 16 random bits: of elements `first` on, eight a Philox call.

    first: a multiple of 8.
    """
    calls = torch.arange(first // 8, first // 8 + -(-count // 8), device=device)
    words = torch.stack(philox(calls, torch.full_like(calls, _as_int64(seed))), dim=1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)  # [calls, 4, 2]
    return halves.flatten()[:count]


def _as_int64(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


# One step ---------------------------------------------------------------------------------------


@torch.no_grad()
def step_reference(
    param: Tensor,  # [n] bfloat16 or float32, written
    grad: Tensor,  # [n]
    exp_avg: Tensor,  # uint8 [n], and the four below: written
    exp_avg_sq: Tensor,  # uint8 [n]
    exp_avg_scale: Tensor,  # float32 [B]
    exp_avg_sq_scale: Tensor,  # float32 [B]
    low_bits: Tensor | None,  # int8 or int16 [n]
    k: Constants,
    block_size: int,
    codec: str,
    seed: int,
    first: int,  # index of element 0 in the whole parameter
) -> None:
    """One step of one parameter, in place."""
    count, blocks = param.numel(), exp_avg_scale.numel()

    def rows(x: Tensor) -> Tensor:  # [n] -> [B, block_size], the last row filled up with zeros
        return torch.nn.functional.pad(x, (0, blocks * block_size - count)).view(blocks, -1)

    g = grad.float() * k.grad_scale
    m = decode(rows(exp_avg), exp_avg_scale, codec, True).view(-1)[:count]
    v = decode(rows(exp_avg_sq), exp_avg_sq_scale, codec, False).view(-1)[:count]
    m = k.beta1 * m + k.one_minus_beta1 * g
    v = k.beta2 * v + (k.one_minus_beta2 * g) * g
    low = 0 if low_bits is None else low_bits.element_size() * 8
    w = param if param.dtype is torch.float32 else join_master(param, low_bits, low)
    root = v.double().sqrt().float()  # torch's own of float32 on CPUs is not rounded correctly
    w = w * k.decay - (m * k.step_size) / (root * k.inv_sqrt_bias2 + k.eps)
    for x, codes, scale, signed in (
        (m, exp_avg, exp_avg_scale, True), (v, exp_avg_sq, exp_avg_sq_scale, False)
    ):  # fmt: skip
        x = rows(x)
        scale.copy_(x.abs().amax(1))
        codes.copy_(encode(x, scale, codec, signed).view(-1)[:count])
    if param.dtype is torch.float32:
        param.copy_(w)
        return
    random = None if low == 16 else random_halves(seed, first, count, param.device)
    weight, rest = split_master(w, low, random)
    param.copy_(weight)
    if low_bits is not None:
        low_bits.copy_(rest)
