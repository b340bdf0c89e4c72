"""The policy: diffusers' FLUX transformer, called the one way this trainer calls it.

    velocity = policy.velocity(latents, sigma, conditions)

Latents are packed tokens [B, L, C], sigma has a value per row, the output is the velocity
noise - x0 at that sigma. The update calls `velocity`; the anchor, the completions and evaluations
`predict`, which is the same forward without gradients.
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


class RotaryTable(nn.Module):
    """diffusers' position embedding, computed once for the ids it is asked for again and again.

    diffusers computes it anew in float64 for every forward: a tenth of the time of a small batch on
    a CPU, nothing that shows on a GPU, where comparing the ids would cost a synchronisation.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.last: tuple[Tensor, object] | None = None

    def forward(self, ids: Tensor) -> object:
        if ids.device.type != "cpu" or torch.compiler.is_compiling():
            return self.embedding(ids)
        if self.last is None or not torch.equal(self.last[0], ids):
            with torch.inference_mode(False), torch.no_grad():
                self.last = ids.clone(), self.embedding(ids.clone())
        return self.last[1]


class FluxPolicy:
    """A `FluxTransformer2DModel` of any size, with the position ids of one image size.

    transformer: diffusers' FluxTransformer2DModel (or a wrapper of the same forward).
    image_ids: [L, 3] position ids of the latent tokens.
    guidance: distilled guidance scale, used when the transformer has guidance embeddings.
    """

    def __init__(self, transformer: nn.Module, image_ids: Tensor, guidance: float = 3.5) -> None:
        self.transformer = transformer
        if not isinstance(transformer.pos_embed, RotaryTable):
            transformer.pos_embed = RotaryTable(transformer.pos_embed)
        self.image_ids = image_ids
        # Of the forward: that of the weights as they are now. Adapters added later have their own.
        self.dtype = next(transformer.parameters()).dtype
        self.guidance = guidance if transformer.config.guidance_embeds else None
        self.sharded = False  # whether FSDP has its weights

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

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

    def predict(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """`velocity` for rollouts: no gradient, the same bits, without autograd's bookkeeping.

        inference_mode spares a small model 4 to 15 % of its time over no_grad. The clone is an
        ordinary tensor again, which the update may save for its backward.
        """
        # FSDP's gathered weights must be ordinary tensors, which the update's backward may save.
        with torch.no_grad() if self.sharded else torch.inference_mode():
            velocity = self.velocity(latents, sigma, conditions)
        return velocity.clone()


class Model(Protocol):
    """What a folder of weights gives the trainer: a policy, and the way to it and from it.

    To train another flow model, give the trainer an object with these six. One that also has
    `state_dict()` and `load_state_dict(state)` finds its own state in every checkpoint; what
    `image_metrics(images, prompts) -> {name: number}` says of an evaluation's images stands in its
    metrics.
    """

    policy: FluxPolicy
    latent_shape: tuple[int, ...]  # (L, C) of one sample
    prompts: Sequence[str]  # those it is trained on
    evaluation_prompts: Sequence[str]  # those of the evaluations; may be the same

    def embed(self, prompts: Sequence[str]) -> Conditions:
        """Embeddings of the prompts, on the policy's device."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, L, C] -> images [N, 3 or 1, H, W], float32 in [0, 1], on the same device."""
