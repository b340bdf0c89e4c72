"""fuse_flux(transformer): diffusers' FLUX blocks on the fused ops, with the same parameters.

    fuse_flux(transformer)        # a FluxTransformer2DModel: same parameters, same state-dict keys
    unfuse_flux(transformer)      # diffusers' own forward again

Only the blocks' `forward` changes, by giving them a subclass of their class: gradient
checkpointing, torch.compile, FSDP and PEFT's adapters find the modules they know. What is new:

    norm, scale, shift                        adaln_modulate, behind a gated residual in one pass
    q, k, v (and the MLP's input)             one GEMM
    RMSNorm, rotary embedding, text | image   qk_norm_rope, written where attention reads
    GELU, concatenation                       gelu_tanh, gelu_tanh_beside

diffusers is not needed to import this module; version 0.35 or newer is, to fuse.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from .flux_blocks import check_processor, double_forward, is_double, joint_linears, single_forward
from .joint_linear import separate, share_storage

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


def fuse_flux(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Run the transformer's blocks on the fused ops, in place; returns the same object.

    transformer: diffusers' FluxTransformer2DModel, on its device and in its dtype already, with
        adapters or without; they may also be added later. Heads of a multiple of 16.
    Its parameters stay the same objects under the same names. The weights of one GEMM move side by
    side into one storage; whoever replaces them by others (`.to(dtype)`, FSDP) loses that alone:
    they are then put together anew in every forward.

    Raises TypeError for another model, ValueError for one that is fused already, or whose heads or
    attention processors these ops do not have.
    """
    blocks = _check(transformer)
    if any(is_fused(block) for block in blocks):
        raise ValueError("transformer is fused already; expected one that is not (unfuse_flux)")
    double, single = _fused_classes()
    for block in blocks:
        block.__class__ = double if is_double(block) else single
        for linears in joint_linears(block):
            share_storage(linears)
    return transformer


def unfuse_flux(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Undo `fuse_flux`, in place; returns the same object. Raises ValueError if it is not fused."""
    blocks = _check(transformer)
    if not all(is_fused(block) for block in blocks):
        raise ValueError("transformer is not fused; expected one that fuse_flux was given")
    for block in blocks:
        for linears in joint_linears(block):
            separate(linears)
        block.__class__ = type(block).__mro__[1]
    return transformer


def is_fused(block: nn.Module) -> bool:
    return type(block) in _fused_classes()


def blocks_of(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def _check(transformer: Any) -> list[nn.Module]:
    from diffusers import FluxTransformer2DModel

    if not isinstance(transformer, FluxTransformer2DModel):
        raise TypeError(
            f"transformer is a {type(transformer).__name__}; expected diffusers' "
            "FluxTransformer2DModel"
        )
    blocks = blocks_of(transformer)
    for block in blocks:
        if block.attn.head_dim % 16:
            raise ValueError(
                f"transformer has heads of {block.attn.head_dim}; expected a multiple of 16"
            )
        check_processor(block.attn)
    return blocks


@functools.cache
def _fused_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """Subclasses of diffusers' two blocks, under the names by which compile_repeated_blocks and
    FSDP's policies know them."""
    from diffusers.models.transformers import transformer_flux as theirs

    double = type(
        theirs.FluxTransformerBlock.__name__,
        (theirs.FluxTransformerBlock,),
        {"forward": double_forward, "__module__": __name__},
    )
    single = type(
        theirs.FluxSingleTransformerBlock.__name__,
        (theirs.FluxSingleTransformerBlock,),
        {"forward": single_forward, "__module__": __name__},
    )
    return double, single
