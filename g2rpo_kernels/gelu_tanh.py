"""gelu_tanh: the tanh form of GELU, alone or beside another tensor, in x's dtype or in FP8.

    gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

`gelu_tanh_beside` writes the input of a FLUX single block's last linear in one pass: attention and
gelu(mlp) side by side. In FP8 a scale belongs to the whole row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_device, check_floating, compute_dtype, refuse_grad
from ._library import define_op
from .quantize_fp8 import Fp8Tensor, fake_fp8, quantize_fp8_reference


def gelu_tanh(
    x: Tensor,  # [..., M]
    *,
    fp8: bool = False,
) -> Tensor | Fp8Tensor:  # [..., M]
    """gelu of x, computed in float32 and rounded once: to x's dtype, or by `quantize_fp8`.

    x: float32, bfloat16 or float16 (float64 on the reference backend), at least one element a row;
        non-contiguous tensors are copied. Differentiable; not with fp8=True, which refuses an x
        that requires a gradient.

    Equivalent to:
        y = F.gelu(x, approximate="tanh")                                    # fp8=False
        y = quantize_fp8(F.gelu(x.float(), approximate="tanh"))              # fp8=True
    """
    check_floating("x", x)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [..., M] with at least one element a row"
        )
    if not fp8:
        return _gelu_tanh(x)
    refuse_grad("gelu_tanh with fp8=True", "rounding to e4m3 has none", x=x)
    return Fp8Tensor(*_gelu_tanh_fp8(x))


def gelu_tanh_beside(
    attention: Tensor,  # [B, L, D]
    mlp: Tensor,  # [B, L, M]
    *,
    fp8: bool = False,
) -> Tensor | Fp8Tensor:  # [B, L, D + M]
    """attention as it is and gelu(mlp) beside it, in one pass; in FP8 with a scale a whole row.

    attention, mlp: of one dtype, float32, bfloat16 or float16 (float64 on the reference backend).
        mlp may be a slice of wider rows (mlp[:, :, D:]), which is not copied; other non-contiguous
        tensors are. Differentiable in both; not with fp8=True, which refuses gradients.

    Equivalent to:
        y = torch.cat([attention, F.gelu(mlp, approximate="tanh")], dim=2)   # fp8=False
        y = quantize_fp8(torch.cat([attention.float(),
                                    F.gelu(mlp.float(), approximate="tanh")], dim=2))
    """
    check_floating("attention", attention)
    check_floating("mlp", mlp)
    check_device("mlp", mlp, "attention", attention)
    if attention.ndim != 3 or 0 in attention.shape[2:]:
        raise ValueError(
            f"attention has shape {tuple(attention.shape)}; expected [B, L, D] with at least one "
            "element a row"
        )
    if mlp.ndim != 3 or mlp.shape[:2] != attention.shape[:2] or mlp.shape[2] == 0:
        batch, length = attention.shape[:2]
        raise ValueError(
            f"mlp has shape {tuple(mlp.shape)}; expected [{batch}, {length}, M] beside attention "
            f"{tuple(attention.shape)}, with at least one element a row"
        )
    if mlp.dtype is not attention.dtype:
        raise ValueError(
            f"mlp has dtype {mlp.dtype}; expected {attention.dtype}, the dtype of attention"
        )
    if not fp8:
        return _gelu_tanh_beside(attention, mlp)
    refuse_grad(
        "gelu_tanh_beside with fp8=True", "rounding to e4m3 has none", attention=attention, mlp=mlp
    )
    return Fp8Tensor(*_gelu_tanh_beside_fp8(attention, mlp))


# ---- gelu_tanh ----


def gelu_tanh_reference(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")  # float32 inside, whatever x is


def gelu_tanh_backward_reference(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


def gelu_tanh_fp8_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_fp8_reference(F.gelu(x.to(compute_dtype(x)), approximate="tanh"))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return _gelu_tanh_backward(grad, *ctx.saved_tensors)


_gelu_tanh_backward = define_op(
    "gelu_tanh_backward(Tensor grad, Tensor x) -> Tensor",
    reference=gelu_tanh_backward_reference,
    fake=lambda grad, x: x.new_empty(x.shape),
)
_gelu_tanh = define_op(
    "gelu_tanh(Tensor x) -> Tensor",
    reference=gelu_tanh_reference,
    fake=lambda x: x.new_empty(x.shape),
    backward=_backward,
    setup_context=_setup_context,
)
_gelu_tanh_fp8 = define_op(
    "gelu_tanh_fp8(Tensor x) -> (Tensor, Tensor)",
    reference=gelu_tanh_fp8_reference,
    fake=lambda x: fake_fp8(x, x.shape),
)


# ---- gelu_tanh_beside ----


def gelu_tanh_beside_reference(attention: Tensor, mlp: Tensor) -> Tensor:
    return torch.cat([attention, F.gelu(mlp, approximate="tanh")], dim=2)


def gelu_tanh_beside_backward_reference(grad: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor]:
    width = grad.shape[2] - mlp.shape[2]
    grad_mlp = torch.ops.aten.gelu_backward(grad[:, :, width:], mlp, approximate="tanh")
    grad_attention = grad[:, :, :width].clone(memory_format=torch.contiguous_format)
    return grad_attention, grad_mlp.contiguous()


def gelu_tanh_beside_fp8_reference(attention: Tensor, mlp: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(attention)
    return quantize_fp8_reference(gelu_tanh_beside_reference(attention.to(dtype), mlp.to(dtype)))


def _joint_shape(attention, mlp):
    return (*attention.shape[:2], attention.shape[2] + mlp.shape[2])


def _beside_backward_fake(grad, mlp):
    width = grad.shape[2] - mlp.shape[2]
    return grad.new_empty((*grad.shape[:2], width)), mlp.new_empty(mlp.shape)


def _beside_setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _beside_backward(ctx, grad):
    return _gelu_tanh_beside_backward(grad, *ctx.saved_tensors)


_gelu_tanh_beside_backward = define_op(
    "gelu_tanh_beside_backward(Tensor grad, Tensor mlp) -> (Tensor, Tensor)",
    reference=gelu_tanh_beside_backward_reference,
    fake=_beside_backward_fake,
    strided=(1,),
)
_gelu_tanh_beside = define_op(
    "gelu_tanh_beside(Tensor attention, Tensor mlp) -> Tensor",
    reference=gelu_tanh_beside_reference,
    fake=lambda attention, mlp: attention.new_empty(_joint_shape(attention, mlp)),
    backward=_beside_backward,
    setup_context=_beside_setup_context,
    strided=(1,),
)
_gelu_tanh_beside_fp8 = define_op(
    "gelu_tanh_beside_fp8(Tensor attention, Tensor mlp) -> (Tensor, Tensor)",
    reference=gelu_tanh_beside_fp8_reference,
    fake=lambda attention, mlp: fake_fp8(attention, _joint_shape(attention, mlp)),
    strided=(1,),
)
