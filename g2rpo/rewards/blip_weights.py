"""Checkpoints of BLIP, as Salesforce writes them, read into transformers' BLIP modules.

One architecture under two sets of names (github.com/salesforce/BLIP, models/vit.py and med.py). The
size of everything follows from the tensors' shapes; what does not is

- the heads of the vision tower: 64 wide in both of BLIP's, ViT-B and ViT-L;
- its layer norms' epsilon, 1e-6, and its activation, the exact GELU: vit.py sets them;
- the text tower's heads, epsilon and activation: med_config.json says them.

transformers' defaults are others (epsilon 1e-5, 8 heads), so none is left to it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..flux.files import read_json

if TYPE_CHECKING:
    from transformers import BlipTextModel, BlipVisionModel

ModelT = TypeVar("ModelT", bound=nn.Module)

VISION, TEXT = "visual_encoder.", "text_encoder."
VISION_HEAD = 64  # channels
VISION_EPS = 1e-6
SHOWN = 3  # keys that an error spells out
# BLIP's names of the vision tower's parts -> transformers'; the text tower's are the same in both.
RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def vision_tower(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> BlipVisionModel:
    """The ViT of tensors with BLIP's names, `visual_encoder.` and on; in eval mode, on the host.

    Its last_hidden_state is what BLIP's visual_encoder returns. name: how an error begins.

    Raises ConfigurationError where the tensors are not those of a BLIP.
    """
    from accelerate import init_empty_weights
    from transformers import BlipVisionConfig, BlipVisionModel

    found = {}
    for key in tensors:
        if key.startswith(VISION):
            renamed = key.removeprefix(VISION)
            for pattern, replacement in RENAMED:
                renamed = re.sub(pattern, replacement, renamed)
            found[renamed] = key
    shapes = _Shapes(tensors, name)
    width, _, patch, _ = shapes(f"{VISION}patch_embed.proj.weight", 4)
    positions = shapes(f"{VISION}pos_embed", 3)[1]
    side = round((positions - 1) ** 0.5)
    if side * side != positions - 1 or width % VISION_HEAD:
        raise ConfigurationError(
            f"{name} has {positions} positions and a width of {width}; expected those of a BLIP: a "
            f"square of patches and one more, and heads of {VISION_HEAD} channels"
        )
    config = BlipVisionConfig(
        hidden_size=width, intermediate_size=shapes(f"{VISION}blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=_layers(tensors, rf"{re.escape(VISION)}blocks\.(\d+)\."),
        num_attention_heads=width // VISION_HEAD, image_size=side * patch, patch_size=patch,
        hidden_act="gelu", layer_norm_eps=VISION_EPS,
    )  # fmt: skip
    with init_empty_weights():
        model = BlipVisionModel(config)
    return fill(model, tensors, found, name, dtype)


def text_tower(
    tensors: Mapping[str, Tensor], med_config: Path, name: str, dtype: torch.dtype
) -> BlipTextModel:
    """The BERT with cross attention of tensors with BLIP's names, `text_encoder.` and on.

    In eval mode, on the host, without a pooler: BLIP's `mode="multimodal"`. med_config: the file of
    that name beside the weights. name: how an error begins.

    Raises ConfigurationError where the tensors are not those of a BLIP, or not of that file.
    """
    from accelerate import init_empty_weights
    from transformers import BlipTextConfig, BlipTextModel

    shapes = _Shapes(tensors, name)
    said = read_json(med_config)
    layer = f"{TEXT}encoder.layer.0."
    vocabulary, width = shapes(f"{TEXT}embeddings.word_embeddings.weight", 2)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes(f"{layer}intermediate.dense.weight", 2)[0],
        "num_hidden_layers": _layers(tensors, rf"{re.escape(TEXT)}encoder\.layer\.(\d+)\."),
        "max_position_embeddings": shapes(f"{TEXT}embeddings.position_embeddings.weight", 2)[0],
    }
    for key, size in sizes.items():
        if said.get(key, size) != size:
            raise ConfigurationError(
                f"{med_config} says {key} {said[key]}, the tensors of {name} have {size}; expected "
                "the two of one model"
            )
    heads = said.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ConfigurationError(
            f"{med_config} says num_attention_heads {heads!r}; expected a divisor of {width}"
        )
    config = BlipTextConfig(
        **sizes, num_attention_heads=heads, layer_norm_eps=said.get("layer_norm_eps", 1e-12),
        hidden_act=said.get("hidden_act", "gelu"), is_decoder=True,  # that is, with cross attention
        encoder_hidden_size=shapes(f"{layer}crossattention.self.key.weight", 2)[1],
        bos_token_id=None, eos_token_id=None, sep_token_id=None,  # of generation
    )  # fmt: skip
    with init_empty_weights():
        model = BlipTextModel(config, add_pooling_layer=False)
    # older transformers wrote a buffer of theirs into the checkpoints
    keys = (key for key in tensors if key.startswith(TEXT) and not key.endswith("position_ids"))
    return fill(model, tensors, {key.removeprefix(TEXT): key for key in keys}, name, dtype)


def fill(
    model: ModelT,
    tensors: Mapping[str, Tensor],
    places: Mapping[str, str],  # the model's key -> the file's
    name: str,
    dtype: torch.dtype,
) -> ModelT:
    """The model, its parameters copies of the tensors; in eval mode, without gradients.

    Warns of tensors that have no place in it. Raises ConfigurationError where one is missing or has
    another shape.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in places]
    shapes = [
        f"{places[key]} is {list(tensors[places[key]].shape)}, expected {list(value.shape)}"
        for key, value in expected.items()
        if key in places and tensors[places[key]].shape != value.shape
    ]
    faults = {"are missing": missing, "have other shapes": shapes}
    if any(faults.values()):
        told = "; ".join(
            f"{len(keys)} {fault} ({_some(keys)})" for fault, keys in faults.items() if keys
        )
        raise ConfigurationError(
            f"{name} does not fit a {type(model).__name__} of its sizes: of the tensors {told}"
        )
    if unused := [file_key for key, file_key in places.items() if key not in expected]:
        warnings.warn(
            f"{name} holds {len(unused)} tensors that a {type(model).__name__} has no use for "
            f"({_some(unused)})", stacklevel=4,
        )  # fmt: skip
    state = {key: tensors[places[key]].to(dtype, copy=True) for key in expected}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


class _Shapes:
    """Shapes of tensors that have to be there."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        self.tensors, self.name = tensors, name

    def __call__(self, key: str, dimensions: int) -> tuple[int, ...]:
        if key not in self.tensors or self.tensors[key].ndim != dimensions:
            found = list(self.tensors[key].shape) if key in self.tensors else "missing"
            raise ConfigurationError(
                f"{self.name}: {key} is {found}; expected the weights of a BLIP, where it has "
                f"{dimensions} dimensions (it holds {_some(list(self.tensors))})"
            )
        return tuple(self.tensors[key].shape)


def _layers(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number in the keys: what lies below it has to be there."""
    numbers = [int(match[1]) for key in tensors if (match := re.match(pattern, key))]
    return max(numbers, default=-1) + 1


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
