"""What the benchmarks of FLUX share: its sizes, a model, the device.

`flux` is FLUX.1-dev at 720 x 720, as the paper trains it; `toy` runs anywhere in seconds and says
nothing about speed. Floating-point operations are counted by formula, in `flops`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import _paths  # noqa: F401
import torch
from torch import Tensor, nn

from g2rpo import doctor


@dataclass(frozen=True)
class Size:
    """A FLUX transformer and the tokens it sees. Names as in diffusers' configuration."""

    name: str
    heads: int
    head: int  # Dh
    side: int  # image tokens are side x side
    text: int
    batch: int  # of the block ops
    batches: tuple[int, ...]  # of the forward, the one that matters most first
    doubles: int
    singles: int
    channels: int
    text_width: int
    pooled: int
    axes: tuple[int, int, int]

    @property
    def width(self) -> int:  # D
        return self.heads * self.head

    @property
    def mlp(self) -> int:  # M
        return 4 * self.width

    @property
    def image(self) -> int:
        return self.side**2

    @property
    def tokens(self) -> int:
        return self.text + self.image

    @property
    def architecture(self) -> dict:
        return {
            "patch_size": 1, "in_channels": self.channels, "num_layers": self.doubles,
            "num_single_layers": self.singles, "attention_head_dim": self.head,
            "num_attention_heads": self.heads, "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled, "guidance_embeds": True,
            "axes_dims_rope": self.axes,
        }  # fmt: skip


SIZES = {
    "flux": Size("flux", heads=24, head=128, side=45, text=512, batch=12, batches=(12, 1, 4, 24),
                 doubles=19, singles=38, channels=64, text_width=4096, pooled=768,
                 axes=(16, 56, 56)),
    "toy": Size("toy", heads=4, head=16, side=4, text=8, batch=2, batches=(2,),
                doubles=2, singles=2, channels=16, text_width=32, pooled=32, axes=(4, 6, 6)),
}  # fmt: skip


def new_transformer(size: Size, device: str) -> nn.Module:
    """diffusers' FluxTransformer2DModel in bfloat16, its random weights made on the device.

    Biases are large enough that the modulations open the gates: blocks contribute to the velocity.
    """
    from diffusers import FluxTransformer2DModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model = FluxTransformer2DModel(**size.architecture)
    finally:
        torch.set_default_dtype(default)
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
    return model


def transformer_inputs(size: Size, batch: int, device: str) -> dict:
    """Keywords of the transformer's forward, bfloat16 where the model is.

    A thousand times a timestep, and times the guidance, are exact in bfloat16: velocities differ by
    what the blocks compute alone.
    """
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    along = torch.arange(float(size.side), device=device)
    return {
        "hidden_states": draw(batch, size.image, size.channels),
        "encoder_hidden_states": draw(batch, size.text, size.text_width),
        "pooled_projections": draw(batch, size.pooled),
        "timestep": torch.tensor([0.5, 0.25] * batch, device=device)[:batch],
        "guidance": torch.full((batch,), 4.0, device=device),
        "img_ids": torch.cartesian_prod(torch.zeros(1, device=device), along, along),
        "txt_ids": torch.zeros(size.text, 3, device=device),
        "return_dict": False,
    }


def flops(size: Size, batch: int) -> int:
    """Of one forward: linears 2 * weights * tokens, attention 4 * L^2 * D a block; no others.

    Modulations, embedders of timestep, guidance and pooled text see one token an image.
    """
    square, rows = size.width**2, size.doubles + size.singles
    # q, k, v, out: 4 D^2; MLP: 8 D^2. A single block's are the same, in other matrices.
    token_linears = 12 * square * rows * size.tokens
    ends = size.width * (2 * size.channels * size.image + size.text_width * size.text)
    modulations = square * (12 * size.doubles + 3 * size.singles + 2)
    embedders = 3 * square + size.width * (2 * 256 + size.pooled)
    attention = 4 * size.tokens**2 * size.width * rows
    return batch * (2 * (token_linears + ends + modulations + embedders) + attention)


# The command line of these benchmarks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), help="default: flux on a GPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="the file to write; default: one in "
                        "benchmarks/results/ for FLUX's size on a GPU, else none")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="keep the cases the file has")


def chosen(options: argparse.Namespace, program: str, needs: str) -> tuple[Size, str] | None:
    """The size and the device to measure; None, said, where the machine has no GPU for them."""
    there = torch.cuda.is_available()
    device = options.device or ("cuda" if there else "cpu")
    name = options.size or ("flux" if device == "cuda" else None)
    if (device == "cuda" and not there) or (device == "cpu" and name != "toy"):
        why = doctor.gpus()[1] if not there else "--device cpu"
        print(f"{program}: error: FLUX's size is measured on a GPU {needs}; here is none ({why}). "
              "--size toy runs the same code on any device, for no figure of use",
              file=sys.stderr)  # fmt: skip
        return None
    return SIZES[name], device
