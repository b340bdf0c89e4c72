"""A complete `policy.Model` of a quarter of a million parameters, for tests of the trainer.

The transformer is diffusers' own, untrained; images are its latents, squashed into [0, 1].

Widths and token counts are multiples of 16 for a reason: torch's CPU kernels compute the odd ends
of a tensor with other instructions than its body, so with crooked sizes the last bit of a row would
depend on where in the batch it stands, whatever the trainer does.
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from g2rpo.config import Config, RewardConfig
from g2rpo.policy import Conditions, FluxPolicy

PROMPTS = ("north", "east", "south", "west", "up", "down")


class TinyModel:
    latent_shape = (16, 4)  # a grid of 4 x 4 tokens

    def __init__(
        self,
        seed: int = 0,
        guidance_embeds: bool = False,
        prompts=PROMPTS,
        evaluation_prompts=None,  # None: the same
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            transformer = FluxTransformer2DModel(
                patch_size=1,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                guidance_embeds=guidance_embeds,
                axes_dims_rope=(4, 6, 6),
            )
            for parameter in transformer.parameters():
                # diffusers starts every bias at 0, which would leave the modulations switched off
                if parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, std=0.3)
        image_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
        self.policy = FluxPolicy(transformer.eval(), image_ids)
        self.prompts = list(prompts)
        self.evaluation_prompts = list(evaluation_prompts or prompts)
        self.known = list(dict.fromkeys([*self.prompts, *self.evaluation_prompts]))
        count = len(self.known)
        self.embeds = torch.randn(count, 1, 32, generator=generator)
        self.pooled = torch.randn(count, 32, generator=generator)

    def embed(self, prompts) -> Conditions:
        rows = [self.known.index(prompt) for prompt in prompts]
        return Conditions(self.embeds[rows], self.pooled[rows])

    def decode(self, latents: Tensor) -> Tensor:  # [N, 16, 4] -> [N, 1, 16, 4]
        return (latents * 0.25 + 0.5).clamp(0, 1).unsqueeze(1)


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward with a smooth optimum: bright images."""
    return images.flatten(1).mean(1)


def contrast(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).std(1)


def broken(images: Tensor, prompts: list[str]) -> Tensor:
    """A judge that always fails."""
    return torch.full((len(images),), torch.nan)


def constant(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward that cannot tell one image from another."""
    return torch.full((len(images),), 0.1)


def tiny_config(**rollout) -> Config:
    """A run small enough for a test: T 6, positions 0..2, G 4, {1, 2}."""
    config = Config()
    for name, value in {
        "steps": 6,
        "sde_positions": [0, 1, 2],
        "granularities": [1, 2],
        "group_size": 4,
        "branch_batch": 8,
        **rollout,
    }.items():
        assert hasattr(config.rollout, name), name
        setattr(config.rollout, name, value)
    config.rewards = [RewardConfig("tiny:brightness")]
    config.optimizer.lr = 1e-3
    config.train.prompts_per_update = 2
    config.train.evaluation_samples = 6
    config.validate()
    return config


def roll_out(trainer, update: int = 1):
    """The draws of a trainer's update, without the update."""
    ids = trainer.sampler.ids(update)
    prompts = [trainer.sampler.prompts[i] for i in ids]
    return trainer.roll_out(update, ids, trainer.model.embed(prompts))
