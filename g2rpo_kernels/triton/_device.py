"""Device functions that several kernels share: the mean of a step, its noise, and exact-order sums.

Kernels are launched without contraction (`_launch.py`), so every product and every sum below is
rounded on its own, in the order in which it is written: that is what makes the bits of the noise
and of x_next those of the native backends.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def affine(x, v, a, b):
    """mean = a*x + b*v, in float32."""
    return a * x.to(tl.float32) + b * v.to(tl.float32)


@triton.jit
def row_sum(x):  # [R, n] -> [R]
    """Sum over the last axis by additions of two operands, in an order that n alone decides.

    `tl.sum` over more than two elements adds in the order in which the compiler laid them out over
    threads, which differs between kernels and dtypes; every log_prob must come with the same bits.
    Neighbours first (they share a thread), then halves (other registers, then other lanes).
    """
    for _ in tl.static_range(2):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), axis=1)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def sum_partials(partial, chunks, mask, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of each row's partial sums: pointers partial [ROWS, 1] to rows of `chunks` -> [ROWS]."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, chunks, BLOCK):
        columns = first + tl.arange(0, BLOCK)[None, :]
        total += tl.load(partial + columns, mask=mask & (columns < chunks), other=0.0)
    return row_sum(total)


@triton.jit
def log_prob_of(square_sum, count, w, c):
    """log_prob = -w * (square_sum / N) + c, for the N = count elements of a row."""
    return -w * tl.div_rn(square_sum, tl.full(square_sum.shape, count, tl.float32)) + c


@triton.jit
def logarithm(u):
    """log(u) of normal float32 u > 0, after Cephes' logf.

    Relatively accurate next to 1 too, where the hardware's logarithm is not.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # u = 2^exponent * m with m in [sqrt(1/2), sqrt(2))
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    z = f * f
    p = 7.0376836292e-2 * f + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    y = (f * z) * p
    e = exponent.to(tl.float32)
    y = y + e * -2.12194440e-4
    y = y - 0.5 * z
    return (f + y) + e * 0.693359375


@triton.jit
def cosine_and_sine(u):
    """cos(2 pi u), sin(2 pi u) of float32 u in [0, 1): Cephes' polynomials in an eighth turn."""
    t = 4.0 * u
    quarter = (t + 0.5).to(tl.int32)
    r = (t - quarter.to(tl.float32)) * 1.57079632679489662
    z = r * r
    s = -1.9515295891e-4 * z + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = (s * z) * r + r
    c = 2.443315711809948e-5 * z + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = (c * z) * z + (1.0 - 0.5 * z)
    swap = (quarter & 1) == 1
    cosine, sine = tl.where(swap, s, c), tl.where(swap, c, s)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)  # quarters 1 and 2
    return cosine, tl.where((quarter & 2) == 2, -sine, sine)  # quarters 2 and 3


@triton.jit
def uniform(word):
    """32 random bits -> float32 in [0, 1): read as int32, negative values folded onto -x - 1."""
    folded = tl.minimum(word, word ^ 0xFFFFFFFF).to(tl.int32, bitcast=True)
    return folded.to(tl.float32) * 4.6566127342e-10


@triton.jit
def box_muller(word1, word2):
    radius = tl.sqrt_rn(-2.0 * logarithm(tl.maximum(uniform(word1), 1e-7)))
    cosine, sine = cosine_and_sine(uniform(word2))
    return radius * cosine, radius * sine


@triton.jit
def philox(seeds, start, COUNT: tl.constexpr):
    """Philox4x32-10 of the counters that elements start .. start + COUNT of each seed need.

    seeds: int64 [R, 1], the keys; start: int64, a multiple of COUNT.
    Returns four uint32 [R, COUNT // 4], the words of counter (lo32(e // 4), hi32(e // 4), 0, 0).
    """
    counter = start >> 2
    # COUNT is a power of two, so the low word cannot carry into the high one within a chunk.
    low = (counter & 0xFFFFFFFF).to(tl.uint32) + tl.arange(0, COUNT // 4).to(tl.uint32)[None, :]
    zero = low * 0
    return tl.philox(seeds, low, zero + (counter >> 32).to(tl.uint32), zero, zero)


@triton.jit
def normal_chunk(seeds, start, COUNT: tl.constexpr):  # [R, 1] -> [R, COUNT]
    """Elements start .. start + COUNT of the noise of each seed."""
    w0, w1, w2, w3 = philox(seeds, start, COUNT)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
