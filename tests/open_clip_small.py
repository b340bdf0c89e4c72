"""A small random CLIP in open_clip's format, and its forward in plain torch, without transformers.

Written from open_clip's published definition (github.com/mlfoundations/open_clip,
src/open_clip/transformer.py: VisionTransformer, TextTransformer, ResidualAttentionBlock), without a
line in common with what it checks.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

CONTEXT = 77
HPS, HEAD = "HPS_v2.1_compressed.pt", "sac+logos+ava1-l14-linearMSE.pth"
DFN = "open_clip_pytorch_model.bin"
STATE = dict[str, Tensor]


def make_state(
    vision_width: int = 160,
    text_width: int = 128,
    layers: int = 2,
    patch: int = 8,
    resolution: int = 32,
    embedding: int = 48,
    vocabulary: int = 514,
    seed: int = 0,
) -> STATE:
    """open_clip's keys with random float32 tensors, none of them neutral."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    def norm(name: str, width: int) -> STATE:
        return {f"{name}.weight": normal(width, std=0.2, mean=1.0),
                f"{name}.bias": normal(width, std=0.2)}  # fmt: skip

    def linear(name: str, outputs: int, inputs: int) -> STATE:
        return {f"{name}.weight": normal(outputs, inputs, std=1.5 * inputs**-0.5),
                f"{name}.bias": normal(outputs, std=0.2)}  # fmt: skip

    def tower(name: str, width: int) -> STATE:
        made: STATE = {}
        for i in range(layers):
            place = f"{name}.resblocks.{i}"
            made |= norm(f"{place}.ln_1", width) | norm(f"{place}.ln_2", width)
            made[f"{place}.attn.in_proj_weight"] = normal(3 * width, width, std=2 * width**-0.5)
            made[f"{place}.attn.in_proj_bias"] = normal(3 * width, std=0.2)
            made |= linear(f"{place}.attn.out_proj", width, width)
            made |= linear(f"{place}.mlp.c_fc", 4 * width, width)
            made |= linear(f"{place}.mlp.c_proj", width, 4 * width)
        return made

    places = (resolution // patch) ** 2 + 1
    return {
        "positional_embedding": normal(CONTEXT, text_width, std=0.3),
        "text_projection": normal(text_width, embedding, std=text_width**-0.5),
        "logit_scale": torch.tensor(3.0),
        "visual.class_embedding": normal(vision_width),
        "visual.positional_embedding": normal(places, vision_width, std=0.3),
        "visual.proj": normal(vision_width, embedding, std=vision_width**-0.5),
        "visual.conv1.weight": normal(vision_width, 3, patch, patch, std=0.5 / patch),
        **norm("visual.ln_pre", vision_width),
        **tower("visual.transformer", vision_width),
        **norm("visual.ln_post", vision_width),
        **tower("transformer", text_width),
        "token_embedding.weight": normal(vocabulary, text_width),
        **norm("ln_final", text_width),
    }


def image_features(state: STATE, pixels: Tensor, head_width: int, quick: bool) -> Tensor:
    """[N, 3, R, R] normalised -> [N, D] of length 1."""
    kernel = state["visual.conv1.weight"]
    patch = kernel.shape[-1]
    patches = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [N, 3, rows, columns, p, p]
    x = torch.einsum("ncrspq,wcpq->nrsw", patches, kernel).flatten(1, 2)
    first = state["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + state["visual.positional_embedding"]
    x = _norm(state, "visual.ln_pre", x)
    x = _tower(state, "visual.transformer", x, head_width, quick, causal=False)
    x = _norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]
    return x / x.square().sum(-1, keepdim=True).sqrt()


def text_features(state: STATE, ids: Tensor, head_width: int, quick: bool) -> Tensor:
    """[N, context] of open_clip's tokens, zeros after the end -> [N, D] of length 1."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = _tower(state, "transformer", x, head_width, quick, causal=True)
    x = _norm(state, "ln_final", x)
    x = x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ state["text_projection"]
    return x / x.square().sum(-1, keepdim=True).sqrt()


def _tower(state: STATE, name: str, x: Tensor, head: int, quick: bool, causal: bool) -> Tensor:
    i = 0
    while (place := f"{name}.resblocks.{i}") + ".ln_1.weight" in state:
        x = x + _attention(state, f"{place}.attn", _norm(state, f"{place}.ln_1", x), head, causal)
        y = _linear(state, f"{place}.mlp.c_fc", _norm(state, f"{place}.ln_2", x))
        y = y / (1 + torch.exp(-1.702 * y)) if quick else y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + _linear(state, f"{place}.mlp.c_proj", y)
        i += 1
    return x


def _attention(state: STATE, name: str, x: Tensor, head: int, causal: bool) -> Tensor:
    n, length, width = x.shape
    projected = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    q, k, v = (
        part.reshape(n, length, width // head, head).transpose(1, 2)
        for part in projected.split(width, dim=-1)
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(head)
    if causal:
        scores = scores + torch.full((length, length), -torch.inf).triu(1)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return _linear(state, f"{name}.out_proj", (weights @ v).transpose(1, 2).reshape(x.shape))


def _linear(state: STATE, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: STATE, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def write_tokenizer(folder: Path) -> Path:
    """CLIP's alphabet of bytes without a single merge, 514 tokens, as transformers stores it."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CONTEXT).save_pretrained(folder)
    return folder


def tokens(prompt: str) -> list[int]:
    """Of a prompt without capitals or quotes, as open_clip's SimpleTokenizer, had it no merges."""
    import regex
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    bytes_to_letter = _bytes_to_unicode()
    ids = [512]
    for word in regex.findall(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", prompt):
        word_ids = [letters.index(bytes_to_letter[byte]) for byte in word.encode()]
        ids += [*word_ids[:-1], word_ids[-1] + len(letters)]
    ids.append(513)
    if len(ids) > CONTEXT:
        ids = [*ids[: CONTEXT - 1], 513]
    return ids + [0] * (CONTEXT - len(ids))


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's: printable bytes stand for themselves, the others for what follows 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in table]
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


def write_scorers(folder: Path, state: STATE) -> Path:
    """A folder a scorer, as their download commands leave them: hps, dfn, pick, laion."""
    from g2rpo.rewards.open_clip_weights import load_open_clip

    for name in ("hps", "dfn"):
        write_tokenizer(folder / name / "tokenizer")
    torch.save({"state_dict": state}, folder / "hps" / HPS)
    torch.save(state, folder / "dfn" / DFN)
    for name, activation in (("pick", "gelu"), ("laion", "quick_gelu")):
        load_open_clip(folder / "hps" / HPS, activation=activation).save_pretrained(folder / name)
    write_tokenizer(folder / "pick")
    torch.save(make_head().state_dict(), folder / "laion" / HEAD)
    return folder


def make_head(features: int = 48) -> nn.Module:
    """As LAION's file has it, by its author's class."""
    mlp = nn.Module()
    mlp.layers = nn.Sequential(
        nn.Linear(features, 32), nn.Dropout(0.2), nn.Linear(32, 16), nn.Dropout(0.2),
        nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 4), nn.Linear(4, 1),
    )  # fmt: skip
    return mlp.eval()
