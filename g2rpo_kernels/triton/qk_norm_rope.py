"""qk_norm_rope and its backward pass: one launch each for the image's tokens and for the text's.

A program has all heads of a token, a tile of them at a time, so that cos, sin and the norms'
weights are read once for 2 H heads. Gradients of the weights are summed in two stages: one partial
sum a program, over its tokens and heads, then all programs in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

TILE = 1024  # numbers of q (and of k) that a program has in flight: 8 a lane of four warps
PROGRAMS = 4096  # of a backward pass that sums gradients of weights, at most
PARTIALS = 256  # partial sums that are added at a time
COLUMNS = 16  # numbers of the weights' gradients that a program of the second stage has


@triton.jit
def pairs(x):  # [R, n] -> [R, n / 2], [R, n / 2]
    """The even numbers of each row, and the odd ones."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def beside(even, odd):
    """The opposite of `pairs`."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])


@triton.jit
def normalised(x, eps, DIM: tl.constexpr):  # [R, n] -> [R, n], [R, 1]
    """x / rms(x), 1 / rms(x); numbers past the DIM of a head are 0."""
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
    return x * inverse, inverse


@triton.jit
def embedded(x, weight, cos_even, cos_odd, sin_even, sin_odd, eps, DIM: tl.constexpr):
    normal, _ = normalised(x.to(tl.float32), eps, DIM)
    even, odd = pairs(normal * weight)
    return beside(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd)


@triton.jit
def embedded_backward(grad, x, weight, cos_even, cos_odd, sin_even, sin_odd, eps,
                      DIM: tl.constexpr):  # fmt: skip
    """Gradients of x, and of the weight by each head."""
    normal, inverse = normalised(x.to(tl.float32), eps, DIM)
    even, odd = pairs(grad.to(tl.float32))
    of_normal = beside(even * cos_even + odd * sin_odd, odd * cos_odd - even * sin_even)
    of_x = of_normal * weight
    mean = (tl.sum(of_x * normal, axis=1) / DIM)[:, None]
    return inverse * (of_x - normal * mean), of_normal * normal


@triton.jit(do_not_specialize=["tokens", "first", "length", "heads"])
def qk_norm_rope_kernel(qkv, q_weight, k_weight, cos, sin, q, k, v,
                        batch_stride, row_stride, tokens, first, length, heads, eps,
                        DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Token t of qkv's `tokens` is token first + t of q, k, v's `length`."""
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < DIM
    every = tl.zeros([HEADS, 1], tl.int32) + column  # of each head: read as q and k are, 16 bytes
    place = (first + token) * DIM
    cos_even, cos_odd = pairs(tl.load(cos + place + every, mask=inside, other=0.0))
    sin_even, sin_odd = pairs(tl.load(sin + place + every, mask=inside, other=0.0))
    of_q = tl.load(q_weight + every, mask=inside, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + every, mask=inside, other=0.0).to(tl.float32)
    source = qkv + batch * batch_stride + token * row_stride
    target = (batch * length + first + token) * heads * DIM
    for head in range(0, heads, HEADS):
        row = head + tl.arange(0, HEADS)[:, None]
        here = (row < heads) & inside
        at = row * DIM + column
        x = tl.load(source + at, mask=here, other=0.0)
        y = tl.load(source + heads * DIM + at, mask=here, other=0.0)
        value = tl.load(source + 2 * heads * DIM + at, mask=here, other=0.0)
        x = embedded(x, of_q, cos_even, cos_odd, sin_even, sin_odd, eps, DIM)
        y = embedded(y, of_k, cos_even, cos_odd, sin_even, sin_odd, eps, DIM)
        tl.store(q + target + at, x.to(q.dtype.element_ty), mask=here)
        tl.store(k + target + at, y.to(k.dtype.element_ty), mask=here)
        tl.store(v + target + at, value, mask=here)


@triton.jit(do_not_specialize=["tokens", "first", "length", "heads", "rows", "share"])
def qk_norm_rope_backward_kernel(qkv, q_weight, k_weight, cos, sin, grad_q, grad_k, grad_v,
                                 grad_qkv, weight_partial,
                                 batch_stride, row_stride, tokens, first, length, heads,
                                 rows, share, eps,
                                 DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
                                 ):  # fmt: skip
    """grad_qkv of `share` of the `rows` tokens, whatever their batch.

    And weight_partial[program, 2, DIM], the weights' gradients summed over those tokens.
    """
    start = tl.program_id(0).to(tl.int64) * share
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < DIM
    every = tl.zeros([HEADS, 1], tl.int32) + column
    of_q = tl.load(q_weight + every, mask=inside, other=0.0).to(tl.float32)
    of_k = tl.load(k_weight + every, mask=inside, other=0.0).to(tl.float32)
    sum_q = tl.zeros([HEADS, BLOCK], tl.float32)
    sum_k = tl.zeros([HEADS, BLOCK], tl.float32)
    for index in range(start, tl.minimum(start + share, rows)):
        batch, token = index // tokens, index % tokens
        place = (first + token) * DIM
        cos_even, cos_odd = pairs(tl.load(cos + place + every, mask=inside, other=0.0))
        sin_even, sin_odd = pairs(tl.load(sin + place + every, mask=inside, other=0.0))
        source = qkv + batch * batch_stride + token * row_stride
        target = grad_qkv + index * 3 * heads * DIM
        upstream = (batch * length + first + token) * heads * DIM
        for head in range(0, heads, HEADS):
            row = head + tl.arange(0, HEADS)[:, None]
            here = (row < heads) & inside
            at = row * DIM + column
            x = tl.load(source + at, mask=here, other=0.0)
            grad = tl.load(grad_q + upstream + at, mask=here, other=0.0)
            of_x, of_weight = embedded_backward(
                grad, x, of_q, cos_even, cos_odd, sin_even, sin_odd, eps, DIM
            )
            tl.store(target + at, of_x.to(grad_qkv.dtype.element_ty), mask=here)
            if weight_partial is not None:
                sum_q += of_weight
            x = tl.load(source + heads * DIM + at, mask=here, other=0.0)
            grad = tl.load(grad_k + upstream + at, mask=here, other=0.0)
            of_x, of_weight = embedded_backward(
                grad, x, of_k, cos_even, cos_odd, sin_even, sin_odd, eps, DIM
            )
            tl.store(target + heads * DIM + at, of_x.to(grad_qkv.dtype.element_ty), mask=here)
            if weight_partial is not None:
                sum_k += of_weight
            grad = tl.load(grad_v + upstream + at, mask=here, other=0.0)
            tl.store(target + 2 * heads * DIM + at, grad, mask=here)
    if weight_partial is not None:
        sums = weight_partial + tl.program_id(0).to(tl.int64) * 2 * DIM + column
        tl.store(sums, tl.sum(sum_q, axis=0)[None, :], mask=inside)
        tl.store(sums + DIM, tl.sum(sum_k, axis=0)[None, :], mask=inside)


@triton.jit(do_not_specialize=["partials"])
def finish_qk_norm_rope_kernel(partial, grad_weights, partials,
                               WIDTH: tl.constexpr, PARTIALS: tl.constexpr, COLUMNS: tl.constexpr,
                               ):  # fmt: skip
    """grad_weights[i] = sum over p of partial[p, i], for the WIDTH numbers of q and k."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([PARTIALS, COLUMNS], tl.float32)
    for start in range(0, partials, PARTIALS):
        row = start + tl.arange(0, PARTIALS)[:, None]
        total += tl.load(partial + row * WIDTH + column, mask=row < partials, other=0.0)
    tl.store(grad_weights + column, tl.sum(total, axis=0)[None, :])


def tiles(heads: int, size: int) -> dict[str, int]:
    """The kernels' constants, of the shape of a token alone."""
    block = triton.next_power_of_2(size)
    at_once = min(triton.next_power_of_2(heads), max(1, TILE // block))
    return {"DIM": size, "HEADS": at_once, "BLOCK": block, "num_warps": 4}


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    text_qkv: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, (length, size) = qkv.shape[0], cos.shape
    shape = batch, length, heads, size
    q, k, v = (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(3))
    before = 0
    for rows, *weights in ((text_qkv, text_q_weight, text_k_weight), (qkv, q_weight, k_weight)):
        if rows is None:
            continue
        tokens = rows.shape[1]
        launch(
            qk_norm_rope_kernel, batch * tokens,
            rows, *weights, cos, sin, q, k, v,
            *rows.stride()[:2], tokens, before, length, heads, float(eps),
            **tiles(heads, size),
        )  # fmt: skip
        before = tokens
    return q, k, v


def qk_norm_rope_backward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    text_qkv: Tensor | None,
    text_q_weight: Tensor | None,
    text_k_weight: Tensor | None,
    heads: int,
    eps: float,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, (length, size) = qkv.shape[0], cos.shape
    streams = [(qkv, q_weight, k_weight, 0 if text_qkv is None else text_qkv.shape[1])]
    if text_qkv is not None:
        streams.append((text_qkv, text_q_weight, text_k_weight, 0))
    count = 2 * len(streams) if of_weights else 0
    grad_weights = torch.empty((count, size), dtype=torch.float32, device=qkv.device)
    results = []
    for i, (rows, *weights, first) in enumerate(streams):
        grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        tokens = rows.shape[1]
        total = batch * tokens
        share = max(1, triton.cdiv(total, PROGRAMS)) if of_weights else 1
        programs = triton.cdiv(total, share)
        partial = None
        if of_weights:
            partial = torch.empty((programs, 2, size), dtype=torch.float32, device=qkv.device)
        launch(
            qk_norm_rope_backward_kernel, programs,
            rows, *weights, cos, sin, grad_q, grad_k, grad_v, grad, partial,
            *rows.stride()[:2], tokens, first, length, heads, total, share, float(eps),
            **tiles(heads, size),
        )  # fmt: skip
        if of_weights:
            launch(
                finish_qk_norm_rope_kernel, 2 * size // COLUMNS,
                partial, grad_weights[2 * i :], programs,
                WIDTH=2 * size, PARTIALS=PARTIALS, COLUMNS=COLUMNS, num_warps=4,
            )  # fmt: skip
        results.append(grad)
    if text_qkv is None:
        results.append(qkv.new_empty(0))
    return *results, grad_weights


def examples(given) -> None:
    """A double block's text and image, and a single block's slice of a wider row."""
    heads, size = 24, 128
    new = given.rows.new_empty
    table, weight = new((48, size), dtype=torch.float32), new(size)
    image, text = (new((2, tokens, 3 * heads * size)) for tokens in (32, 16))
    joint = new((2, 48, 7 * heads * size))[..., : 3 * heads * size]
    grads = [new((2, 48, heads, size))] * 3
    weights, text_weights = (weight, weight, table, table), (text, weight, weight)
    alone = joint, *weights, None, None, None, heads, 1e-6
    both = image, *weights, *text_weights, heads, 1e-6
    for arguments in (alone, both):
        qk_norm_rope(*arguments)
        for of_weights in (True, False):
            qk_norm_rope_backward(*arguments, *grads, of_weights)
