"""fuse_flux(transformer): diffusers' FLUX blocks on the fused ops, with the same parameters.

    fuse_flux(transformer)        # a FluxTransformer2DModel: same parameters, same state-dict keys
    unfuse_flux(transformer)      # diffusers' own forward again

Only the blocks' `forward` changes, by giving them a subclass of their class: gradient
checkpointing, torch.compile, FSDP and PEFT's adapters find the modules they know. Fuse first, then
`fully_shard` each block and the transformer. What is new:

    norm, scale, shift                        adaln_modulate, behind a gated residual in one pass
    q, k, v (and the MLP's input)             one GEMM
    RMSNorm, rotary embedding, text | image   qk_norm_rope, written where attention reads
    GELU, concatenation                       gelu_tanh, gelu_tanh_beside

diffusers is not needed to import this module; version 0.35 or newer is, to fuse.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
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
    they are then put together anew in every forward, and again in every backward.

    Raises TypeError for another model, ValueError for one that is fused already, sharded already or
    wrapped block by block, or whose heads or attention processors these ops do not have.
    """
    blocks = _check(transformer)
    if any(is_fused(block) for block in blocks):
        raise ValueError("transformer is fused already; expected one that is not (unfuse_flux)")
    for block in blocks:
        if type(block) not in _their_classes():
            raise ValueError(
                f"transformer has a block of class {type(block).__name__}; expected diffusers' own "
                "class, since a subclass's forward would be lost"
            )
        if "forward" in block.__dict__:
            raise ValueError(
                "transformer has a block whose forward is replaced, as hooks of accelerate and "
                "diffusers do; expected fuse_flux before them, since the fused one would not run"
            )
    double, single = _fused_classes()
    for block in blocks:
        block.__class__ = double if is_double(block) else single
        for linears in joint_linears(block):
            share_storage(linears)
    return transformer


def unfuse_flux(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Undo `fuse_flux`, in place; returns the same object.

    Raises ValueError if it is not fused, or sharded since.
    """
    blocks = _check(transformer)
    if not all(is_fused(block) for block in blocks):
        raise ValueError("transformer is not fused; expected one that fuse_flux was given")
    their_double, their_single = _their_classes()
    for block in blocks:
        for linears in joint_linears(block):
            separate(linears)
        block.__class__ = their_double if is_double(block) else their_single
    return transformer


def is_fused(block: nn.Module) -> bool:
    """Whether the block runs on the fused ops; also where FSDP has given it a subclass since."""
    return isinstance(block, _fused_classes())


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP's `fully_shard` or tensor parallelism has its parameters, whole or in part."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    # Between its forward and backward FSDP may show whole parameters, which are not DTensors.
    return any(isinstance(each, FSDPModule) for each in module.modules()) or any(
        isinstance(parameter, DTensor) for parameter in module.parameters()
    )


def blocks_of(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def fused_blocks(transformer: FluxTransformer2DModel) -> list[nn.Module]:
    """The blocks, for what reads their weights past their forward: of a fused, unsharded model.

    Raises ValueError for another.
    """
    blocks = blocks_of(transformer)
    if not all(is_fused(block) for block in blocks):
        raise ValueError("transformer is not fused; expected what fuse_flux has returned")
    if is_sharded(transformer):
        raise ValueError(
            "transformer is sharded; expected whole parameters, which are read here outside of the "
            "forwards for which FSDP gathers them"
        )
    return blocks


def _check(transformer: Any) -> list[nn.Module]:
    from diffusers import FluxTransformer2DModel

    if not isinstance(transformer, FluxTransformer2DModel):
        raise TypeError(
            f"transformer is a {type(transformer).__name__}; expected diffusers' "
            "FluxTransformer2DModel"
        )
    blocks = blocks_of(transformer)
    for block in blocks:
        if not isinstance(block, _their_classes()):
            raise ValueError(
                f"transformer has a block of class {type(block).__name__}; expected diffusers' "
                "FluxTransformerBlock or FluxSingleTransformerBlock, not yet wrapped"
            )
    if is_sharded(transformer):
        raise ValueError(
            "transformer is sharded (fully_shard, or parameters that are DTensors); expected one "
            "that is not: fuse_flux and unfuse_flux come before"
        )
    for block in blocks:
        if block.attn.head_dim % 16:
            raise ValueError(
                f"transformer has heads of {block.attn.head_dim}; expected a multiple of 16"
            )
        check_processor(block.attn)
    return blocks


def _their_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    from diffusers.models.transformers import transformer_flux as theirs

    return theirs.FluxTransformerBlock, theirs.FluxSingleTransformerBlock


@functools.cache
def _fused_classes() -> tuple[type[nn.Module], type[nn.Module]]:
    """Subclasses of diffusers' two blocks, under the names by which compile_repeated_blocks and
    FSDP's policies know them."""
    double, single = (
        type(theirs.__name__, (theirs,), {"forward": forward, "__module__": __name__})
        for theirs, forward in zip(_their_classes(), (double_forward, single_forward), strict=True)
    )
    return double, single
