"""What `g2rpo plan` plans for: the sizes of a configuration's model, counted without weights.

Parameters are counted on the meta device, where a tensor has a shape and no memory. FLUX.1-dev's
architecture is known; that of a folder is read from its configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import Config
from ..digits.model import ARCHITECTURE
from ..digits.scans import LATENT_SHAPE
from ..errors import ConfigurationError
from ..flux.files import component, read_header, read_json
from ..flux.images import latent_shape
from ..flux.model import SIDE
from ..optimizers import modulation_linears

# transformer/config.json and vae/config.json of black-forest-labs/FLUX.1-dev; in FLUX.1-schnell's
# guidance_embeds is false and the rest the same.
FLUX_DEV = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
FLUX_VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 16, "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": True,
    "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True,
}  # fmt: skip
# Parameters of their text encoders: T5 v1.1 XXL's encoder and CLIP ViT-L/14's text model.
FLUX_ENCODERS = 4_762_310_656 + 123_060_480
HUB = {
    "black-forest-labs/FLUX.1-dev": {},
    "black-forest-labs/FLUX.1-Krea-dev": {},
    "black-forest-labs/FLUX.1-schnell": {"guidance_embeds": False},
}


@dataclass(frozen=True)
class Linear:
    """A linear of a block that sees every token: its name in the block, inputs and outputs."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Sizes:
    """Of a FLUX transformer, what it sees, and what stands around it."""

    source: str  # where the architecture is from
    width: int  # D
    heads: int
    head: int  # Dh
    doubles: int
    singles: int
    channels: int  # C of a latent token
    text_width: int
    pooled: int
    image: int  # tokens of an image
    text: int  # tokens of a prompt
    parameters: int
    modulation: int  # weights (no biases) of the linears that make shifts, scales and gates
    modulation_features: int  # inputs and outputs of these linears, summed
    largest: int  # elements of the largest parameter, which is one of these linears' in FLUX
    double_linears: tuple[Linear, ...]  # of one block
    single_linears: tuple[Linear, ...]
    pixels: tuple[int, int] = (0, 0)  # height and width of an image
    vae_parameters: int = 0
    vae_width: int = 0  # channels at the images' own resolution
    vae_flops: int = 0  # of decoding one image
    encoder_bytes: int = 0  # of the text encoders, in bfloat16
    double_parameters: int = 0  # of one block
    single_parameters: int = 0

    @property
    def tokens(self) -> int:  # L
        return self.image + self.text

    @property
    def latent(self) -> int:
        """Elements of one image's latents."""
        return self.image * self.channels

    @property
    def fp8_bytes(self) -> int:
        """Of the FP8 copies: a byte a weight of the token linears, a float32 scale a row."""
        blocks = (self.doubles, self.double_linears), (self.singles, self.single_linears)
        return sum(
            count * (linear.inputs + 4) * linear.outputs
            for count, linears in blocks
            for linear in linears
        )

    def adapters(self, rank: int, targets: Sequence[str]) -> int:
        """Parameters that LoRA adapters of this rank on these linears have."""
        blocks = (self.doubles, self.double_linears), (self.singles, self.single_linears)
        return sum(count * self.adapters_of(each, rank, targets) for count, each in blocks)

    @staticmethod
    def adapters_of(linears: Sequence[Linear], rank: int, targets: Sequence[str]) -> int:
        """Those of one block with these linears."""
        return rank * sum(
            linear.inputs + linear.outputs for linear in linears if targeted(linear.name, targets)
        )


def targeted(name: str, targets: Sequence[str]) -> bool:
    """Whether PEFT gives the linear of this name an adapter."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def sizes_of(config: Config) -> Sizes:
    """The sizes of a run's model. Raises ConfigurationError where its architecture is not known."""
    from diffusers import FluxTransformer2DModel

    path, rollout = config.model.path, config.rollout
    vae_config: dict[str, Any] = {}
    encoders, text = 0, config.data.max_sequence_length
    if path == "digits":
        source, architecture = "the embedded digits model", dict(ARCHITECTURE)
        (image, _), height, width, text = LATENT_SHAPE, 8, 8, 1
    else:
        source, architecture, vae_config, encoders = _pipeline(path)
        height, width = rollout.height or SIDE, rollout.width or SIDE
        image, _ = latent_shape(height, width, vae_config)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(architecture)
    sizes = transformer_sizes(model, source, image, text)
    if not vae_config:
        return replace(sizes, pixels=(height, width))
    parameters, features, flops = _vae(vae_config, height, width)
    return replace(
        sizes, pixels=(height, width), encoder_bytes=encoders,
        vae_parameters=parameters, vae_width=features, vae_flops=flops,
    )  # fmt: skip


def transformer_sizes(model: nn.Module, source: str, image: int, text: int) -> Sizes:
    """Of a FluxTransformer2DModel, on any device, that sees so many tokens of image and text."""
    modulations = modulation_linears(model)
    known = model.config
    return Sizes(
        source=source,
        width=model.inner_dim,
        heads=known.num_attention_heads,
        head=known.attention_head_dim,
        doubles=known.num_layers,
        singles=known.num_single_layers,
        channels=known.in_channels,
        text_width=known.joint_attention_dim,
        pooled=known.pooled_projection_dim,
        image=image,
        text=text,
        parameters=sum(p.numel() for p in model.parameters()),
        modulation=sum(linear.weight.numel() for linear in modulations),
        modulation_features=sum(sum(linear.weight.shape) for linear in modulations),
        largest=max(p.numel() for p in model.parameters()),
        double_linears=_linears(model.transformer_blocks),
        single_linears=_linears(model.single_transformer_blocks),
        double_parameters=_parameters(model.transformer_blocks),
        single_parameters=_parameters(model.single_transformer_blocks),
    )


def _parameters(blocks: nn.ModuleList) -> int:
    return sum(p.numel() for p in blocks[0].parameters()) if len(blocks) else 0


def _linears(blocks: nn.ModuleList) -> tuple[Linear, ...]:
    if not len(blocks):
        return ()
    return tuple(
        Linear(name, module.in_features, module.out_features)
        for name, module in blocks[0].named_modules()
        if isinstance(module, nn.Linear) and "norm" not in name
    )


def _pipeline(path: str) -> tuple[str, dict[str, Any], dict[str, Any], int]:
    """Of a folder or hub id: where it is from, the two configurations, bytes of the encoders."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        place = component(folder, "transformer")
        architecture = read_json(place / "config.json")
        kind = architecture.get("_class_name")
        if kind != "FluxTransformer2DModel":
            raise ConfigurationError(
                f"{place / 'config.json'} is of a {kind}; expected a FluxTransformer2DModel"
            )
        files = [f for name in ("text_encoder", "text_encoder_2")
                 for f in sorted((folder / name).glob("*.safetensors"))]  # fmt: skip
        tensors = [tensor for file in files for tensor in read_header(file).values()]
        elements = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
        vae = read_json(component(folder, "vae") / "config.json")
        return str(place / "config.json"), architecture, vae, 2 * elements
    if path not in HUB:
        raise ConfigurationError(
            f"model.path is {path!r}; expected 'digits', the folder of a FLUX pipeline, or one of "
            f"the hub's whose architecture is known without it: {', '.join(HUB)}"
        )
    return path, FLUX_DEV | HUB[path], FLUX_VAE, 2 * FLUX_ENCODERS


def _vae(config: dict[str, Any], height: int, width: int) -> tuple[int, int, int]:
    """Parameters, channels at full resolution, FLOPs of decoding one image."""
    from diffusers import AutoencoderKL
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config).eval()
        side = 2 ** (len(config["block_out_channels"]) - 1)
        latents = torch.empty(1, config["latent_channels"], height // side, width // side)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    parameters = sum(p.numel() for p in vae.parameters())
    return parameters, config["block_out_channels"][0], counter.get_total_flops()
