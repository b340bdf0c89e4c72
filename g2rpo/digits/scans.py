"""The scans, their two halves, and the maps between what people see and what the model sees.

People see images [N, 1, 8, 8] in [0, 1] and the names of digits; the model sees latents [N, 16, 4]
in [-1, 1] (each 2x2 block of pixels is one token, in FLUX's packing order) and embeddings [., 32].
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

PROMPTS: tuple[str, ...] = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip

IMAGE_SHAPE = (1, 8, 8)
LATENT_SHAPE = (16, 4)
EMBEDDING_SIZE = 32


@cache
def _scans() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # two seconds: only when scans are wanted

    pixels, labels = load_digits(return_X_y=True)  # pixels are the integers 0..16
    images = torch.from_numpy(pixels).float().div(16).view(-1, *IMAGE_SHAPE)
    return images, torch.from_numpy(labels).long()


def load_scans(half: str | None = None) -> tuple[Tensor, Tensor]:
    """The handwritten digits, all of them or one of the two disjoint halves.

    Scans sorted by digit (in file order within a digit) are dealt out in turn, so the halves hold
    equally many of each digit, give or take one, and no random generator is involved.

    Args:
        half: None for all 1,797; "fit" for the 899 the reward classifier is fitted on; "judge" for
            the 898 the held-out judge is fitted on.
    Returns:
        images float32 [N, 1, 8, 8] in [0, 1] (white strokes on black) and labels int64 [N] in 0..9;
        fresh copies, safe to modify.
    """
    if half not in (None, "fit", "judge"):
        raise ValueError(f"half must be None, 'fit' or 'judge', got {half!r}")
    images, labels = _scans()
    if half is None:
        return images.clone(), labels.clone()
    by_digit = torch.argsort(labels, stable=True)
    index = by_digit[0::2] if half == "fit" else by_digit[1::2]
    return images[index], labels[index]


def check_images(images: Tensor) -> None:
    """ValueError unless images is a floating-point tensor [N, 1, 8, 8]."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a floating-point tensor, got {kind}")
    if images.ndim != 4 or images.shape[1:] != IMAGE_SHAPE:
        raise ValueError(f"images must have shape [N, 1, 8, 8], got {list(images.shape)}")


def pack(images: Tensor) -> Tensor:  # [N,1,8,8] in [0,1] -> [N,16,4] in [-1,1]
    """Latents of images: pixels moved to [-1, 1], one token of 4 channels per 2x2 block.

    Tokens run row by row over the 4x4 grid of blocks, channels row by row within a block: the
    order of diffusers' `FluxPipeline._pack_latents`. Returns float32 on the images' device.
    """
    check_images(images)
    blocks = images.float().mul(2).sub(1).reshape(-1, 4, 2, 4, 2)  # row, y, column, x
    return blocks.permute(0, 1, 3, 2, 4).reshape(-1, *LATENT_SHAPE)


def unpack(latents: Tensor) -> Tensor:  # [N,16,4] -> [N,1,8,8] in [0,1]
    """Images of latents, the inverse of `pack`: float32, clamped to [0, 1]; NaN stays NaN."""
    if latents.ndim != 3 or latents.shape[1:] != LATENT_SHAPE:
        raise ValueError(f"latents must have shape [N, 16, 4], got {list(latents.shape)}")
    blocks = latents.float().reshape(-1, 4, 4, 2, 2)  # row, column, y, x
    images = blocks.permute(0, 1, 3, 2, 4).reshape(-1, *IMAGE_SHAPE)
    return images.add(1).div(2).clamp(0, 1)


def digits_of(prompts: Sequence[str]) -> Tensor:  # [B] int64 on the CPU
    """The digit each prompt names; ValueError on a prompt that is not one of the ten names."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a sequence of digit names, got the string {prompts!r}")
    for prompt in prompts:
        if prompt not in PROMPTS:
            raise ValueError(f"prompts holds {prompt!r}; expected one of {', '.join(PROMPTS)}")
    return torch.tensor([PROMPTS.index(prompt) for prompt in prompts], dtype=torch.int64)


@cache
def _embeddings() -> Tensor:  # [10,32]
    # Rows 1..10 of Sylvester's Hadamard matrix, (-1)^(number of ones in row AND column): entries
    # +-1, mutually orthogonal, and no random generator that could differ between versions.
    signs = [
        [(-1.0) ** bin(row & column).count("1") for column in range(EMBEDDING_SIZE)]
        for row in range(1, len(PROMPTS) + 1)
    ]
    return torch.tensor(signs, dtype=torch.float32)


def embed_prompts(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:  # [B,1,32], [B,32]
    """Fixed embeddings in place of text encoders: (prompt_embeds, pooled), float32 on the CPU.

    A prompt is one text token, and its pooled embedding is the same vector. ValueError on a prompt
    that is not one of the ten names.
    """
    pooled = _embeddings()[digits_of(prompts)]
    return pooled[:, None].clone(), pooled
