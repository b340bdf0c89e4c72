"""A complete FLUX pipeline folder of a few megabytes, with random weights: for tests and trials.

Same components, same files and same file formats as the folder that the hub serves as
black-forest-labs/FLUX.1-dev, written by diffusers and transformers themselves: a sharded
transformer with guidance embeddings, an autoencoder of 16 channels that shrinks by 8, CLIP and T5
with tokenizers, the scheduler. Every command of this package takes it; only the pictures are noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import FluxPipeline

TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "latent_channels": 16,
    "norm_num_groups": 4,
    "sample_size": 64,
    "scaling_factor": 0.4,  # neither FLUX's .3611 nor its .1159: whoever hard-codes those is seen
    "shift_factor": 0.2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}


def write_miniature(
    folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the folder; the same seed gives the same weights. Returns its path.

    The transformer comes in three or more shards with an index, as on the hub.
    """
    from .quiet import quiet

    folder = Path(folder)
    with quiet():
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            pipeline = make_pipeline()
        for part in (
            pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2,
        ):  # fmt: skip
            torch.nn.Module.to(part, dtype)  # diffusers' own warns, whatever the model
        pipeline.save_pretrained(folder)
        size = sum(parameter.nbytes for parameter in pipeline.transformer.parameters())
        for file in (folder / "transformer").glob("*.safetensors*"):
            file.unlink()
        pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size=size // 3)
    return folder


def make_pipeline(**transformer: object) -> FluxPipeline:
    """The same as an object, float32, of torch's global generator; arguments change TRANSFORMER."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    clip_tokenizer = CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=77)
    t5_tokenizer = T5TokenizerFast(vocab=_t5_vocabulary(), extra_ids=0, model_max_length=512)
    architecture = {**TRANSFORMER, **transformer}
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer), hidden_size=architecture["pooled_projection_dim"],
            intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer), d_model=architecture["joint_attention_dim"], d_kv=8,
            d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    model = FluxTransformer2DModel(**architecture)
    for parameter in model.parameters():
        # diffusers starts every bias at 0, which would leave the modulations switched off
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=AutoencoderKL(**VAE),
        text_encoder=clip.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=t5.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=model.eval(),
    )


def _clip_vocabulary() -> dict[str, int]:
    """CLIP's alphabet of bytes, inside and at the end of a word, without a single merge."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    return {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def _t5_vocabulary() -> list[tuple[str, float]]:
    """Single characters, the most likely pieces of a unigram model that knows no others."""
    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-&/"
    pieces = [(letter, -2.0) for letter in letters]
    return [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
