"""The policy: diffusers' FLUX transformer, called the one way this trainer calls it.

    velocity = policy.velocity(latents, sigma, conditions)

Latents are packed tokens [B, L, C], sigma has a value per row, the output is the velocity
noise - x0 at that sigma. The anchor, the completions and the update all come through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Conditions:
    """What the transformer is told of the prompts, a row a prompt."""

    prompt_embeds: Tensor  # [B, T, D] token embeddings (T5 for FLUX)
    pooled_embeds: Tensor  # [B, E] pooled embedding (CLIP for FLUX)

    def __len__(self) -> int:
        return self.prompt_embeds.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Conditions:
        return Conditions(self.prompt_embeds[index], self.pooled_embeds[index])

    def to(self, device: torch.device) -> Conditions:
        return Conditions(self.prompt_embeds.to(device), self.pooled_embeds.to(device))


class FluxPolicy:
    """A `FluxTransformer2DModel` of any size, with the position ids of one image size.

    transformer: diffusers' FluxTransformer2DModel (or a wrapper of the same forward).
    image_ids: [L, 3] position ids of the latent tokens.
    guidance: distilled guidance scale, used when the transformer has guidance embeddings.
    """

    def __init__(self, transformer: nn.Module, image_ids: Tensor, guidance: float = 3.5) -> None:
        self.transformer = transformer
        self.image_ids = image_ids
        self.guidance = guidance if transformer.config.guidance_embeds else None

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    def velocity(
        self,
        latents: Tensor,  # [B, L, C] float32
        sigma: Tensor,  # [B] float32, in (0, 1]
        conditions: Conditions,  # B rows
    ) -> Tensor:  # [B, L, C] in the transformer's dtype
        """The velocity noise - x0 the transformer predicts, a sigma per row."""
        guidance = None
        if self.guidance is not None:
            guidance = torch.full_like(sigma, self.guidance)
        text_ids = self.image_ids.new_zeros(conditions.prompt_embeds.shape[1], 3)
        return self.transformer(
            hidden_states=latents.to(self.dtype),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=conditions.prompt_embeds.to(self.dtype),
            pooled_projections=conditions.pooled_embeds.to(self.dtype),
            txt_ids=text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]


class Model(Protocol):
    """What a folder of weights gives the trainer: a policy, and the way to it and from it.

    To train another flow model, give the trainer an object with these five.
    """

    policy: FluxPolicy
    latent_shape: tuple[int, ...]  # (L, C) of one sample
    prompts: Sequence[str]  # the prompts it comes with

    def embed(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of the prompts, on the policy's device."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, L, C] -> images [N, 3 or 1, H, W], float32 in [0, 1], on the same device."""
