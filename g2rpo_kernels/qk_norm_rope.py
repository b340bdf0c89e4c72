"""qk_norm_rope: from a joint projection to what attention reads, in one pass.

    n = x * rsqrt(mean(x^2) + eps) * w                       a head of q or k, Dh numbers
    q[2i]     = n[2i]     * cos[2i]     - n[2i + 1] * sin[2i]
    q[2i + 1] = n[2i + 1] * cos[2i + 1] + n[2i]     * sin[2i + 1]

Text comes before image in the results, each with weights of its own; v is copied. Nothing is kept
for the backward pass but the inputs: it reads them again and finds rsqrt(...) anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_device, check_floating, compute_dtype, refuse_grad
from ._library import define_op
from .dynamics import check_number


def qk_norm_rope(
    qkv: Tensor,  # [B, Li, 3 * H * Dh]
    q_weight: Tensor,  # [Dh]
    k_weight: Tensor,  # [Dh]
    cos: Tensor,  # [Lt + Li, Dh]
    sin: Tensor,  # [Lt + Li, Dh]
    *,
    text_qkv: Tensor | None = None,  # [B, Lt, 3 * H * Dh]
    text_q_weight: Tensor | None = None,  # [Dh]
    text_k_weight: Tensor | None = None,  # [Dh]
    heads: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:  # q, k, v [B, Lt + Li, H, Dh]
    """RMSNorm of each head of q and k, FLUX's rotary embedding, and text before image.

    qkv: float32, bfloat16 or float16 (float64 on the reference backend), a row q | k | v. It may be
        a slice `[..., :3 * H * Dh]` of a wider tensor, which is not copied.
    q_weight, k_weight: of the norms, any floating dtype; Dh is a multiple of 16.
    cos, sin: float32, for the positions of text and image; both numbers of a pair have an entry.
    text_qkv, text_q_weight, text_k_weight: all three, or none where qkv holds every token.
    heads: H. eps: of the norms, >= 0.

    Returns q, k, v of qkv's dtype, contiguous. Arithmetic in float32, rounded once (float64 if an
    input is). Differentiable in qkv, text_qkv and the weights; cos and sin are constants.

    Equivalent to:
        def prepare(qkv, q_weight, k_weight):
            q, k, v = qkv.unflatten(2, (3, heads, -1)).unbind(2)
            return F.rms_norm(q, (Dh,), q_weight, eps), F.rms_norm(k, (Dh,), k_weight, eps), v
        parts = zip(prepare(text_qkv, text_q_weight, text_k_weight),
                    prepare(qkv, q_weight, k_weight))
        q, k, v = (torch.cat(part, dim=1) for part in parts)
        q, k = (apply_rotary_emb(x, (cos, sin), sequence_dim=1) for x in (q, k))   # diffusers

    Source: RMSNorm (arXiv 1910.07467), rotary embeddings (arXiv 2104.09864) as FLUX.1 arranges
    them.
    """
    if type(heads) is not int or heads < 1:
        raise ValueError(f"heads is {heads!r}; expected an integer >= 1")
    if not check_number("eps", eps) >= 0:
        raise ValueError(f"eps is {eps}; expected a number >= 0")
    size = _check_weight("q_weight", q_weight, None)
    _check_weight("k_weight", k_weight, size)
    _check_qkv("qkv", qkv, heads, size)
    check_device("q_weight", q_weight, "qkv", qkv)
    check_device("k_weight", k_weight, "qkv", qkv)
    text = dict(text_qkv=text_qkv, text_q_weight=text_q_weight, text_k_weight=text_k_weight)
    missing = [name for name, x in text.items() if x is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"{missing[0]} is None; expected all of {sorted(text)}, or none of them")
    length = qkv.shape[1]
    if text_qkv is not None:
        _check_weight("text_q_weight", text_q_weight, size)
        _check_weight("text_k_weight", text_k_weight, size)
        _check_qkv("text_qkv", text_qkv, heads, size)
        for name, x in text.items():
            check_device(name, x, "qkv", qkv)
        if text_qkv.dtype is not qkv.dtype:
            raise TypeError(f"text_qkv has dtype {text_qkv.dtype}; expected {qkv.dtype}, qkv's")
        if text_qkv.shape[0] != qkv.shape[0]:
            raise ValueError(
                f"text_qkv has shape {tuple(text_qkv.shape)}; expected {qkv.shape[0]} rows, "
                "those of qkv"
            )
        length += text_qkv.shape[1]
    for name, x in (("cos", cos), ("sin", sin)):
        check_floating(name, x)
        check_device(name, x, "qkv", qkv)
        if x.dtype is not torch.float32 or x.shape != (length, size):
            raise ValueError(
                f"{name} has dtype {x.dtype} and shape {tuple(x.shape)}; expected torch.float32 "
                f"{(length, size)}, a row for each token of text and image"
            )
    refuse_grad("qk_norm_rope", "the positions are constants", cos=cos, sin=sin)
    return _qk_norm_rope(
        qkv, q_weight, k_weight, cos, sin, text_qkv, text_q_weight, text_k_weight, heads, eps
    )


def _check_weight(name: str, weight: Tensor, size: int | None) -> int:
    check_floating(name, weight)
    if weight.ndim != 1 or weight.shape[0] % 16 or not weight.shape[0]:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; expected [Dh], Dh a multiple of 16"
        )
    if size is not None and weight.shape[0] != size:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; expected {(size,)}, the shape of q_weight"
        )
    return weight.shape[0]


def _check_qkv(name: str, qkv: Tensor, heads: int, size: int) -> None:
    check_floating(name, qkv)
    if qkv.ndim != 3 or qkv.shape[2] != 3 * heads * size:
        raise ValueError(
            f"{name} has shape {tuple(qkv.shape)}; expected [B, L, 3 * H * Dh] with "
            f"3 * {heads} * {size} = {3 * heads * size}"
        )


# ---- Reference ----


def _streams(qkv, q_weight, k_weight, text_qkv, text_q_weight, text_k_weight) -> list[tuple]:
    """(qkv, q_weight, k_weight, first position) of the image and, where there is one, the text."""
    if text_qkv is None:
        return [(qkv, q_weight, k_weight, 0)]
    image = qkv, q_weight, k_weight, text_qkv.shape[1]
    return [image, (text_qkv, text_q_weight, text_k_weight, 0)]


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[B, L, 3 * H * Dh] -> three [B, L, H, Dh]."""
    return qkv.unflatten(2, (3, heads, qkv.shape[2] // (3 * heads))).unbind(2)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x), of each head [..., Dh]."""
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * inverse, inverse


def _turned(x: Tensor) -> Tensor:
    """(x[2i], x[2i + 1]) -> (-x[2i + 1], x[2i])."""
    even, odd = x.unflatten(-1, (x.shape[-1] // 2, 2)).unbind(-1)
    return torch.stack([-odd, even], -1).flatten(-2)


def qk_norm_rope_reference(
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
    dtype = compute_dtype(qkv, q_weight, k_weight)
    q, k, v = (_like(qkv, cos, heads) for _ in range(3))
    streams = _streams(qkv, q_weight, k_weight, text_qkv, text_q_weight, text_k_weight)
    for rows, *weights, first in streams:
        here = slice(first, first + rows.shape[1])
        c, s = cos[here, None].to(dtype), sin[here, None].to(dtype)
        *parts, value = _split(rows, heads)
        for out, part, weight in zip((q, k), parts, weights, strict=True):
            normal = _normalise(part.to(dtype), eps)[0] * weight.to(dtype)
            out[:, here] = (normal * c + _turned(normal) * s).to(out.dtype)
        v[:, here] = value
    return q, k, v


def _like(qkv: Tensor, cos: Tensor, heads: int) -> Tensor:
    """A new [B, Lt + Li, H, Dh]."""
    return qkv.new_empty(qkv.shape[0], cos.shape[0], heads, cos.shape[1])


def _fake(qkv, q_weight, k_weight, cos, sin, text_qkv, text_q_weight, text_k_weight, heads, eps):
    return tuple(_like(qkv, cos, heads) for _ in range(3))


# ---- Backward ----


def qk_norm_rope_backward_reference(
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
    """Returns the gradients of qkv, of text_qkv ([0] without one), and of the weights.

    Those of the weights are float32 [2 or 4, Dh]: image q, k, text q, k; [0, Dh] unless of_weights.
    """
    dtype = compute_dtype(qkv, q_weight, k_weight)
    results, of_norms = [], []
    streams = _streams(qkv, q_weight, k_weight, text_qkv, text_q_weight, text_k_weight)
    for rows, *weights, first in streams:
        here = slice(first, first + rows.shape[1])
        c, s = cos[here, None].to(dtype), sin[here, None].to(dtype)
        grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        *outs, grad_value = _split(grad, heads)
        grad_value.copy_(grad_v[:, here])
        for out, x, weight, upstream in zip(
            outs, _split(rows, heads)[:2], weights, (grad_q, grad_k), strict=True
        ):
            upstream = upstream[:, here].to(dtype)
            x, inverse = _normalise(x.to(dtype), eps)
            of_normal = upstream * c - _turned(upstream * s)
            of_x = of_normal * weight.to(dtype)
            out.copy_(inverse * (of_x - x * (of_x * x).mean(-1, keepdim=True)))
            if of_weights:
                of_norms.append((of_normal * x).sum((0, 1, 2)))
        results.append(grad)
    if text_qkv is None:
        results.append(qkv.new_empty(0))
    none = qkv.new_empty((0, cos.shape[1]), dtype=dtype)
    return *results, torch.stack(of_norms) if of_weights else none


def _fake_backward(
    qkv, q_weight, k_weight, cos, sin, text_qkv, text_q_weight, text_k_weight, heads, eps,
    grad_q, grad_k, grad_v, of_weights,
):  # fmt: skip
    count = (2 if text_qkv is None else 4) if of_weights else 0
    return (
        qkv.new_empty(qkv.shape),
        qkv.new_empty(0 if text_qkv is None else text_qkv.shape),
        qkv.new_empty((count, cos.shape[1]), dtype=compute_dtype(qkv, q_weight, k_weight)),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, *grads):
    given, needed = ctx.saved_tensors, ctx.needs_input_grad
    if all(grad is None for grad in grads):
        return (None,) * 10
    qkv, q_weight, k_weight, cos, _, text_qkv, text_q_weight, text_k_weight = given
    grads = [_like(qkv, cos, ctx.heads).zero_() if grad is None else grad for grad in grads]
    of_weights = needed[1] or needed[2] or needed[6] or needed[7]
    grad_qkv, grad_text, of_norms = _qk_norm_rope_backward(
        *given, ctx.heads, ctx.eps, *grads, of_weights
    )
    results = [None] * 10
    results[0] = grad_qkv if needed[0] else None
    results[5] = grad_text if needed[5] else None
    for row, (i, weight) in enumerate(
        ((1, q_weight), (2, k_weight), (6, text_q_weight), (7, text_k_weight))
    ):
        if needed[i]:
            results[i] = of_norms[row].to(weight.dtype)
    return tuple(results)


def _no_second_gradient(ctx, *grads):
    raise RuntimeError("qk_norm_rope can be differentiated once; its gradient has none")


_INPUTS = (
    "Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, Tensor? text_qkv, "
    "Tensor? text_q_weight, Tensor? text_k_weight, int heads, float eps"
)
_qk_norm_rope = define_op(
    f"qk_norm_rope({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    reference=qk_norm_rope_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
    differentiable=3,
    strided=(0, 5),
)
_qk_norm_rope_backward = define_op(
    f"qk_norm_rope_backward({_INPUTS}, Tensor grad_q, Tensor grad_k, Tensor grad_v, "
    "bool of_weights) -> (Tensor, Tensor, Tensor)",
    reference=qk_norm_rope_backward_reference,
    fake=_fake_backward,
    backward=_no_second_gradient,
    differentiable=3,
    strided=(0, 5),
)
