"""The forward of FLUX's two kinds of blocks on the fused ops; `fuse_flux` puts them in place.

Both compute what diffusers' do, rounding once where those round several times. Within an
`Fp8Rollout` they hand over to its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adaln_modulate import adaln_modulate
from .gated_residual import gated_residual, gated_residual_modulate
from .gelu_tanh import gelu_tanh, gelu_tanh_beside
from .joint_linear import joint_linear
from .qk_norm_rope import qk_norm_rope

EPS = 1e-6  # of FLUX's LayerNorms


def double_forward(
    self: nn.Module,
    hidden_states: Tensor,  # [B, Li, D]
    encoder_hidden_states: Tensor,  # [B, Lt, D]
    temb: Tensor | tuple[Tensor, ...],  # [B, D]; see `modulations`
    image_rotary_emb: tuple[Tensor, Tensor],  # cos, sin [Lt + Li, Dh]
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:  # text [B, Lt, D], image [B, Li, D]
    _refuse(joint_attention_kwargs)
    if (fp8 := self.__dict__.get("fp8")) is not None:
        return fp8(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb)
    attn = self.attn
    of_image, of_text = modulations(self, temb)
    shift, scale, gate, shift2, scale2, gate2 = of_image
    t_shift, t_scale, t_gate, t_shift2, t_scale2, t_gate2 = of_text
    image, text = joint_linears(self)
    qkv = joint_linear(adaln_modulate(hidden_states, shift, scale, eps=EPS), image)
    text_qkv = joint_linear(adaln_modulate(encoder_hidden_states, t_shift, t_scale, eps=EPS), text)
    out = attend(attn, qkv, image_rotary_emb, text_qkv)
    text_out, image_out = out.split([text_qkv.shape[1], qkv.shape[1]], dim=1)

    hidden, x = gated_residual_modulate(
        hidden_states, attn.to_out[0](image_out), gate, shift2, scale2, eps=EPS
    )
    hidden = gated_residual(hidden, _feed_forward(self.ff, x), gate2)
    text_hidden, x = gated_residual_modulate(
        encoder_hidden_states, attn.to_add_out(text_out), t_gate, t_shift2, t_scale2, eps=EPS
    )
    text_hidden = gated_residual(text_hidden, _feed_forward(self.ff_context, x), t_gate2)
    return in_range(text_hidden), hidden


def single_forward(
    self: nn.Module,
    hidden_states: Tensor,  # [B, Li, D]
    encoder_hidden_states: Tensor | None,  # [B, Lt, D]; None: hidden_states has text and image
    temb: Tensor | tuple[Tensor, ...],  # [B, D]; see `modulations`
    image_rotary_emb: tuple[Tensor, Tensor],  # cos, sin [Lt + Li, Dh]
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor] | Tensor:  # text [B, Lt, D], image [B, Li, D]; joint where it was
    _refuse(joint_attention_kwargs)
    joint = hidden_states
    if encoder_hidden_states is not None:
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    joint_forward = self.__dict__.get("fp8") or _joint_forward
    joint = joint_forward(self, joint, temb, image_rotary_emb)
    if encoder_hidden_states is None:
        return joint
    length = encoder_hidden_states.shape[1]
    return joint[:, :length], joint[:, length:]


def _joint_forward(
    self: nn.Module,
    joint: Tensor,  # [B, L, D]
    temb: Tensor | tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor],
) -> Tensor:  # [B, L, D]
    width = joint.shape[2]
    ((shift, scale, gate),) = modulations(self, temb)
    projected = joint_linear(adaln_modulate(joint, shift, scale, eps=EPS), joint_linears(self)[0])
    qkv, mlp = projected.split([3 * width, projected.shape[2] - 3 * width], dim=2)
    out = attend(self.attn, qkv, rotary)
    return in_range(gated_residual(joint, self.proj_out(gelu_tanh_beside(out, mlp)), gate))


def _refuse(joint_attention_kwargs: dict[str, Any] | None) -> None:
    if joint_attention_kwargs:
        raise RuntimeError(
            f"joint_attention_kwargs has {sorted(joint_attention_kwargs)}; expected nothing, since "
            "fused blocks know no image-prompt adapters (unfuse_flux brings diffusers' own back)"
        )


def modulations(
    block: nn.Module, temb: Tensor | tuple[Tensor, ...]
) -> list[tuple[Tensor, ...]]:  # a norm each: its shifts, scales and gates, [B, D] each
    """What the block's AdaLayerNormZero(Single) make of temb [B, D], or in its place of what their
    linears have already made of it, [B, 6 * D] or [B, 3 * D] a norm: see `FluxRollout`."""
    parts = 6 if is_double(block) else 3
    if not isinstance(temb, tuple):
        embedding = F.silu(temb)
        temb = tuple(norm.linear(embedding) for norm in norms_of(block))
    return [made.chunk(parts, dim=1) for made in temb]


def norms_of(block: nn.Module) -> list[nn.Module]:
    return [block.norm1, block.norm1_context] if is_double(block) else [block.norm]


def attend(
    attn: nn.Module,
    qkv: Tensor,  # [B, Li, 3 * H * Dh]
    rotary: tuple[Tensor, Tensor],
    text_qkv: Tensor | None = None,  # [B, Lt, 3 * H * Dh]
) -> Tensor:  # [B, Lt + Li, H * Dh]
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    check_processor(attn)
    text = {}
    if text_qkv is not None:
        text = {
            "text_qkv": text_qkv,
            "text_q_weight": attn.norm_added_q.weight,
            "text_k_weight": attn.norm_added_k.weight,
        }
    cos, sin = rotary
    q, k, v = qk_norm_rope(
        qkv, attn.norm_q.weight, attn.norm_k.weight, cos, sin,
        heads=attn.heads, eps=attn.norm_q.eps, **text,
    )  # fmt: skip
    out = dispatch_attention_fn(q, k, v, backend=attn.processor._attention_backend)
    return out.flatten(2, 3)


def _feed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    """diffusers' FeedForward with GELU(approximate="tanh"): net is (GELU, Dropout, Linear, ...)."""
    return ff.net[2](gelu_tanh(ff.net[0].proj(x)))


def in_range(x: Tensor) -> Tensor:
    """As diffusers does, for float16 alone."""
    return x.clip(-65504, 65504) if x.dtype is torch.float16 else x


def check_processor(attention: nn.Module) -> None:
    name = type(attention.processor).__name__
    if name != "FluxAttnProcessor":
        raise ValueError(
            f"transformer has the attention processor {name}; expected FluxAttnProcessor, whose "
            "work the fused blocks do themselves"
        )


def is_double(block: nn.Module) -> bool:
    return hasattr(block, "norm1_context")


def joint_linears(block: nn.Module) -> list[list[nn.Module]]:
    """The linears of a block that read the same input: one GEMM each list."""
    attn = block.attn
    if is_double(block):
        text = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        return [[attn.to_q, attn.to_k, attn.to_v], text]
    return [[attn.to_q, attn.to_k, attn.to_v, block.proj_mlp]]
