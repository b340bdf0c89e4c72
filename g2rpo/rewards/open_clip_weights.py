"""Checkpoints of open_clip, read into transformers' CLIPModel: no open_clip, no torchvision.

The two are one architecture under two sets of names (github.com/mlfoundations/open_clip,
src/open_clip/transformer.py). open_clip keeps query, key and value in one `in_proj`, and its
projections transposed. The size of everything follows from the tensors' shapes; two things do not:

The width of a head. open_clip's is 64, except in the vision towers of ViT-H (width 1280, 80),
ViT-g (1408, 88) and ViT-bigG (1664, 104); arguments say otherwise.

The activation. OpenAI trained with x * sigmoid(1.702 x), "quick-GELU", and so did who started from
its code or weights: DFN, MetaCLIP, and what open_clip calls "-quickgelu". All others have GELU. The
weights do not tell: the argument does, or else these names in the file's or its folder's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigurationError
from .tensors import AGAIN, read_tensors

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel

GELU, QUICK_GELU = "gelu", "quick_gelu"  # transformers' names
QUICK_NAMES = ("openai", "dfn", "metaclip", "quickgelu")
HEAD_WIDTH = 64
VISION_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # by width: ViT-H, ViT-g, ViT-bigG
PREFIXES = ("module.", "_orig_mod.", "model.")  # of data-parallel, compiled and wrapped models
IGNORED = {"attn_mask", "context_length", "input_resolution", "vocab_size"}  # not weights
BLOCK = {  # of a transformer block, but for its in_proj
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
TRANSPOSED = ("visual.proj", "text_projection")


@dataclass(frozen=True)
class Tower:
    width: int
    layers: int
    heads: int
    mlp: int


@dataclass(frozen=True)
class Architecture:
    vision: Tower
    text: Tower
    patch: int
    resolution: int
    context: int  # tokens of a prompt, with the two at its ends
    vocabulary: int
    embedding: int  # of images and texts alike

    def config(self, activation: str) -> CLIPConfig:
        from transformers import CLIPConfig

        def common(tower: Tower) -> dict[str, int | str]:
            return {
                "hidden_size": tower.width, "num_hidden_layers": tower.layers,
                "num_attention_heads": tower.heads, "intermediate_size": tower.mlp,
                "projection_dim": self.embedding, "hidden_act": activation,
            }  # fmt: skip

        text = {
            "vocab_size": self.vocabulary, "max_position_embeddings": self.context,
            "bos_token_id": self.vocabulary - 2, "eos_token_id": self.vocabulary - 1,
        }  # fmt: skip
        vision = {"image_size": self.resolution, "patch_size": self.patch}
        return CLIPConfig(
            text_config={**common(self.text), **text},
            vision_config={**common(self.vision), **vision},
            projection_dim=self.embedding,
        )


def load_open_clip(
    file: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    activation: str | None = None,
    vision_head_width: int | None = None,
    text_head_width: int | None = None,
    mend: str = AGAIN,
) -> CLIPModel:
    """The model of an open_clip checkpoint, in eval mode, without gradients.

    activation: "gelu" or "quick_gelu"; None: by the name, as `choose_activation` says. Head widths:
    None: open_clip's own. mend: what an error of a damaged file advises.

    Raises ConfigurationError naming the file and what is wrong with it.
    """
    from accelerate import init_empty_weights
    from transformers import CLIPModel

    chosen, _ = choose_activation(file, activation)
    state = plain_names(read_tensors(file, mend))
    shape = architecture(state, str(file), vision_head_width, text_head_width)
    with init_empty_weights():
        model = CLIPModel(shape.config(chosen))
    expected = model.state_dict()
    placed = {}
    for name, tensor in converted(state, shape):
        if tensor.shape != expected[name].shape:
            raise ConfigurationError(
                f"{file}: what becomes {name!r} has shape {tuple(tensor.shape)}; expected "
                f"{tuple(expected[name].shape)} beside its other tensors"
            )
        # a copy, and never a view of the file's mapping
        placed[name] = tensor.detach().to(device, dtype, copy=True).contiguous()
    model.load_state_dict(placed, assign=True)
    return model.to(device).eval().requires_grad_(False)


def choose_activation(file: Path, given: str | None = None) -> tuple[str, str]:
    """The activation of a checkpoint, and why: given, or its name, or what open_clip defaults to.

    Raises ConfigurationError for another than "gelu" and "quick_gelu".
    """
    if given is not None:
        if given not in (GELU, QUICK_GELU):
            raise ConfigurationError(
                f"activation is {given!r}; expected {GELU!r}, {QUICK_GELU!r} or None"
            )
        return given, "given"
    for name in QUICK_NAMES:
        if name in f"{file.parent.name}/{file.name}".lower():
            return QUICK_GELU, f"{name!r} in its name: trained with quick-GELU"
    return GELU, "no name of a model that was trained with quick-GELU"


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers leave, and with the text tower where CLIP has it."""
    stripped = dict(state)
    while prefix := next((p for p in PREFIXES if _all_begin(stripped, p)), None):
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
    return {key.removeprefix("text."): value for key, value in stripped.items()}


def architecture(
    state: Mapping[str, Tensor],  # shapes alone are looked at
    name: str,
    vision_head_width: int | None = None,
    text_head_width: int | None = None,
) -> Architecture:
    """Read from the shapes. name: how an error begins.

    Raises ConfigurationError naming what CLIP has and these have not, or these have and CLIP not.
    """
    missing = [key for key in OUTER if key not in state]
    layers = {tower: _layers(state, tower) for tower in TOWERS}
    for tower, count in layers.items():
        keys = [f"{tower}.{i}.{key}" for i in range(max(count, 1)) for key in _block_keys()]
        missing += [key for key in keys if key not in state]
    if missing:
        more = f", {missing[1]!r}" if len(missing) > 1 else ""
        raise ConfigurationError(
            f"{name} is no CLIP of open_clip with a vision transformer: it lacks {len(missing)} "
            f"of that one's tensors, {missing[0]!r}{more} the first; it holds {len(state)}, "
            f"{min(state)!r} the first"
        )
    known = {*OUTER, *IGNORED}
    known |= {f"{t}.{i}.{k}" for t, n in layers.items() for i in range(n) for k in _block_keys()}
    if other := sorted(set(state) - known):
        raise ConfigurationError(
            f"{name} holds {len(other)} tensors that open_clip's CLIP has not, {other[0]!r} the "
            "first; expected a plain vision transformer beside a plain text transformer"
        )

    def tower(place: str, head_width: int) -> Tower:
        first = state[f"{place}.0.mlp.c_fc.weight"]  # [mlp, width]
        mlp, width = first.shape
        if width % head_width:
            raise ConfigurationError(
                f"{name}: {place} is {width} wide, no multiple of a head's {head_width}; give "
                "vision_head_width and text_head_width"
            )
        return Tower(width, layers[place], width // head_width, mlp)

    vision_width = state["visual.class_embedding"].shape[0]
    patch = state["visual.conv1.weight"].shape[-1]
    side = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    vision_place, text_place = TOWERS
    return Architecture(
        vision=tower(
            vision_place, vision_head_width or VISION_HEAD_WIDTHS.get(vision_width, HEAD_WIDTH)
        ),
        text=tower(text_place, text_head_width or HEAD_WIDTH),
        patch=patch,
        resolution=side * patch,
        context=state["positional_embedding"].shape[0],
        vocabulary=state["token_embedding.weight"].shape[0],
        embedding=state["visual.proj"].shape[1],
    )


def converted(
    state: Mapping[str, Tensor], shape: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """transformers' name and tensor, of all weights of open_clip's names."""
    for theirs, ours in OUTER.items():
        tensor = state[theirs]
        if theirs in TRANSPOSED:
            tensor = tensor.T
        yield ours, tensor.reshape(()) if theirs == "logit_scale" else tensor
    for (theirs, ours), tower in zip(TOWERS.items(), (shape.vision, shape.text)):
        for i in range(tower.layers):
            for kind in ("weight", "bias"):
                parts = state[f"{theirs}.{i}.attn.in_proj_{kind}"].chunk(3)
                for name, part in zip("qkv", parts):
                    yield f"{ours}.{i}.self_attn.{name}_proj.{kind}", part
                for name, renamed in BLOCK.items():
                    yield f"{ours}.{i}.{renamed}.{kind}", state[f"{theirs}.{i}.{name}.{kind}"]


def _all_begin(state: Mapping[str, Tensor], prefix: str) -> bool:
    return bool(state) and all(key.startswith(prefix) for key in state)


def _layers(state: Mapping[str, Tensor], tower: str) -> int:
    start = f"{tower}."
    numbers = [key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _block_keys() -> Iterator[str]:
    for kind in ("weight", "bias"):
        yield f"attn.in_proj_{kind}"
        yield from (f"{name}.{kind}" for name in BLOCK)
