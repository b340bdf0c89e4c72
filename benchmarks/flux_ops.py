"""FLUX's block ops as bench_blocks.py times them: inputs, diffusers' formula, ours, bytes moved.

Formulas are those of diffusers' transformer_flux.py, each written as its blocks compute it; in FP8
they go on to torch's own rowwise quantisation, which diffusers does not have. Inputs lie as each
side has them: diffusers' q, k and v come from a linear each, ours are slices of one GEMM's output.

Bytes: each input of the fused op read once, each output written once. forward+backward is two ops:
the second reads the gradients of the outputs and the tensors its formula needs, and writes every
gradient that is not the outputs' own or a slice of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from flux_shapes import Size
from torch import Tensor

import g2rpo_kernels as gk

EPS = 1e-6
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Way:
    """A function and the names of its arguments; with backward, gradients of `leaves`, all of which
    `joined` brings into the order and the form of ours."""

    function: Callable
    arguments: tuple[str, ...]
    leaves: tuple[str, ...] = ()
    joined: Callable[[list[Tensor]], list[Tensor]] = list


@dataclass(frozen=True)
class Op:
    ours: Way
    eager: Way
    inputs: Callable[[Size, str], Inputs]
    shape: Callable[[Size], tuple[int, ...]]
    fp8: bool = False  # its last output is values and scales; not differentiable
    reads: tuple[str, ...] = ()  # of the backward, beside the gradients; "hidden" is an output
    writes: tuple[str, ...] = ()  # of the backward: gradients of these


# Diffusers' formulas


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1).float()
    scales = torch.where(largest == 0, 1.0, largest / 448)
    return (x.float() / scales[..., None]).to(torch.float8_e4m3fn), scales


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def added(residual: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    return residual + gate.unsqueeze(1) * update


def added_and_modulated(residual, update, gate, shift, scale) -> tuple[Tensor, Tensor]:
    hidden = added(residual, update, gate)
    return hidden, modulated(hidden, shift, scale)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, L, H, Dh]
    """diffusers' apply_rotary_emb(x, (cos, sin), sequence_dim=1)."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(x.dtype)


def single_heads(q, k, v, q_weight, k_weight, cos, sin) -> tuple[Tensor, Tensor, Tensor]:
    head = (len(q_weight),)
    q, k, v = (x.unflatten(-1, (-1, *head)) for x in (q, k, v))
    q, k = F.rms_norm(q, head, q_weight, EPS), F.rms_norm(k, head, k_weight, EPS)
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def double_heads(q, k, v, q_weight, k_weight, cos, sin, tq, tk, tv, tq_weight, tk_weight):
    head = (len(q_weight),)
    q, k, v, tq, tk, tv = (x.unflatten(-1, (-1, *head)) for x in (q, k, v, tq, tk, tv))
    q, k = F.rms_norm(q, head, q_weight, EPS), F.rms_norm(k, head, k_weight, EPS)
    tq, tk = F.rms_norm(tq, head, tq_weight, EPS), F.rms_norm(tk, head, tk_weight, EPS)
    q, k, v = (torch.cat(pair, dim=1) for pair in ((tq, q), (tk, k), (tv, v)))
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def beside(attention: Tensor, mlp: Tensor) -> Tensor:
    return torch.cat([attention, gelu(mlp)], dim=2)


def then_quantised(function: Callable) -> Callable:
    """function, whose last output is quantised: what torch.compile gets is one graph."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        out = function(*given)
        *first, last = out if isinstance(out, tuple) else (out,)
        return *first, *quantise(last)

    return run


# Inputs


def draws(device: str) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(
        *shape, generator=generator, device=device, dtype=torch.bfloat16
    )


def sequence_inputs(size: Size, device: str) -> Inputs:
    """An image stream of a double block; shift, scale and gate are parts of a linear's output."""
    draw = draws(device)
    of_timestep = draw(size.batch, 3 * size.width).mul_(0.3).chunk(3, dim=1)
    shape = size.batch, size.image, size.width
    return {"x": draw(*shape), "update": draw(*shape),
            **dict(zip(("shift", "scale", "gate"), of_timestep))}  # fmt: skip


def head_inputs(size: Size, device: str) -> Inputs:
    draw, width = draws(device), size.width
    angles = torch.rand(size.tokens, size.head // 2, device=device).mul_(6).repeat_interleave(2, 1)
    made = {"cos": angles.cos(), "sin": angles.sin()}
    # A double block's text and image, and a single block's both together, before the MLP's input.
    lengths = {"t": size.text, "": size.image, "s": size.tokens}
    for prefix, length in lengths.items():
        row = 3 * width + (size.mlp if prefix == "s" else 0)
        whole = draw(size.batch, length, row)[..., : 3 * width]
        made[f"{prefix}qkv"] = whole
        parts = (part.contiguous() for part in whole.chunk(3, dim=2))
        made |= dict(zip((f"{prefix}q", f"{prefix}k", f"{prefix}v"), parts))
        made |= {f"{prefix}{name}_weight": 1 + 0.1 * draw(size.head) for name in "qk"}
    return made


def mlp_inputs(size: Size, device: str) -> Inputs:
    """A double block's MLP, x; a single block's, a slice of one GEMM's output and alone."""
    draw = draws(device)
    wide = draw(size.batch, size.tokens, 3 * size.width + size.mlp)[..., 3 * size.width :]
    return {"x": draw(size.batch, size.image, size.mlp), "slice": wide, "mlp": wide.contiguous(),
            "attention": draw(size.batch, size.tokens, size.width)}  # fmt: skip


# The ops


def joined_heads(text: bool) -> Callable[[list[Tensor]], list[Tensor]]:
    """Gradients of q, k, v as one of qkv; then those of the weights."""

    def joined(grads: list[Tensor]) -> list[Tensor]:
        if not text:
            return [torch.cat(grads[:3], 2), *grads[3:]]
        q, k, v, of_q, of_k, tq, tk, tv, of_tq, of_tk = grads
        return [torch.cat([q, k, v], 2), of_q, of_k, torch.cat([tq, tk, tv], 2), of_tq, of_tk]

    return joined


def our_single_heads(qkv, q_weight, k_weight, cos, sin):
    heads = qkv.shape[2] // (3 * len(q_weight))
    return gk.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads=heads)


def our_double_heads(qkv, q_weight, k_weight, cos, sin, tqkv, tq_weight, tk_weight):
    return gk.qk_norm_rope(
        qkv, q_weight, k_weight, cos, sin, heads=qkv.shape[2] // (3 * len(q_weight)),
        text_qkv=tqkv, text_q_weight=tq_weight, text_k_weight=tk_weight,
    )  # fmt: skip


def image(size: Size) -> tuple[int, ...]:
    return size.batch, size.image, size.width


def every(size: Size) -> tuple[int, ...]:
    return size.batch, size.tokens, size.width


MODULATE, ADD = ("x", "shift", "scale"), ("x", "update", "gate")
BOTH = (*ADD, "shift", "scale")
NORMS, TEXT_NORMS, ANGLES = ("q_weight", "k_weight"), ("tq_weight", "tk_weight"), ("cos", "sin")
SINGLE_NORMS = ("sq_weight", "sk_weight")
TEXT = ("tqkv", *TEXT_NORMS)
OURS_DOUBLE, DOUBLE = ("qkv", *NORMS, *TEXT), ("q", "k", "v", *NORMS, "tq", "tk", "tv", *TEXT_NORMS)
OURS_SINGLE, SINGLE = ("sqkv", *SINGLE_NORMS), ("sq", "sk", "sv", *SINGLE_NORMS)

# Looked up when called: an op that is missing fails by name, in its own row.
OPS: dict[str, Op] = {
    "adaln_modulate": Op(
        Way(lambda *given: gk.adaln_modulate(*given), MODULATE, MODULATE),
        Way(modulated, MODULATE, MODULATE),
        sequence_inputs, image, reads=("x", "scale"), writes=MODULATE,
    ),
    "gated_residual": Op(
        Way(lambda *given: gk.gated_residual(*given), ADD, ADD),
        Way(added, ADD, ADD),
        sequence_inputs, image, reads=("update", "gate"), writes=("update", "gate"),
    ),
    "gated_residual_modulate": Op(
        Way(lambda *given: gk.gated_residual_modulate(*given), BOTH, BOTH),
        Way(added_and_modulated, BOTH, BOTH),
        sequence_inputs, image, reads=("hidden", "update", "gate", "scale"), writes=BOTH,
    ),
    "qk_norm_rope[double]": Op(
        Way(our_double_heads, ("qkv", *NORMS, *ANGLES, *TEXT), OURS_DOUBLE),
        Way(double_heads, ("q", "k", "v", *NORMS, *ANGLES, "tq", "tk", "tv", *TEXT_NORMS), DOUBLE,
            joined_heads(text=True)),
        head_inputs, every, reads=(*OURS_DOUBLE, *ANGLES), writes=OURS_DOUBLE,
    ),
    "qk_norm_rope[single]": Op(
        Way(our_single_heads, (*OURS_SINGLE, *ANGLES), OURS_SINGLE),
        Way(single_heads, (*SINGLE, *ANGLES), SINGLE, joined_heads(text=False)),
        head_inputs, every, reads=(*OURS_SINGLE, *ANGLES), writes=OURS_SINGLE,
    ),
    "gelu_tanh": Op(
        Way(lambda x: gk.gelu_tanh(x), ("x",), ("x",)),
        Way(gelu, ("x",), ("x",)),
        mlp_inputs, lambda size: (size.batch, size.image, size.mlp), reads=("x",), writes=("x",),
    ),
    "gelu_tanh_beside": Op(
        Way(lambda *given: gk.gelu_tanh_beside(*given), ("attention", "slice"),
            ("attention", "slice")),
        Way(beside, ("attention", "mlp"), ("attention", "mlp")),
        mlp_inputs, lambda size: (size.batch, size.tokens, size.width + size.mlp),
        reads=("slice",), writes=("slice",),
    ),
    "adaln_modulate[fp8]": Op(
        Way(lambda *given: gk.adaln_modulate(*given, fp8=True), MODULATE),
        Way(then_quantised(modulated), MODULATE), sequence_inputs, image, fp8=True,
    ),
    "gated_residual_modulate[fp8]": Op(
        Way(lambda *given: gk.gated_residual_modulate(*given, fp8=True), BOTH),
        Way(then_quantised(added_and_modulated), BOTH), sequence_inputs, image, fp8=True,
    ),
    "gelu_tanh[fp8]": Op(
        Way(lambda x: gk.gelu_tanh(x, fp8=True), ("x",)),
        Way(then_quantised(gelu), ("x",)),
        mlp_inputs, lambda size: (size.batch, size.image, size.mlp), fp8=True,
    ),
    "gelu_tanh_beside[fp8]": Op(
        Way(lambda *given: gk.gelu_tanh_beside(*given, fp8=True), ("attention", "slice")),
        Way(then_quantised(beside), ("attention", "mlp")),
        mlp_inputs, lambda size: (size.batch, size.tokens, size.width + size.mlp), fp8=True,
    ),
    "quantize_fp8": Op(
        Way(lambda x: gk.quantize_fp8(x), ("attention",)),
        Way(quantise, ("attention",)), mlp_inputs, every, fp8=True,
    ),
}  # fmt: skip
