"""What bench_blocks.py and bench_flux_forward.py share: FLUX's sizes, the device, results files.

`flux` is FLUX.1-dev at 720 x 720, as the paper trains it; `toy` runs anywhere in seconds and says
nothing about speed. Floating-point operations are counted by formula, in `flops`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import _paths  # noqa: F401
import torch
from report import machine_text
from results import FOLDER, ResultsError, Store, machine, slug
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


# The command line, the file and the table of both benchmarks


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


class FluxStore(Store):
    """A results file of another kind, `flux-blocks` or `flux-forward`; kept in memory without a
    path."""

    def __init__(self, kind: str, size: Size, device: str, options: argparse.Namespace) -> None:
        path = options.output
        if path is None and device == "cuda" and size.name == "flux":
            path = FOLDER / f"{kind}-{slug(machine(device)['name'])}.json"
        self.stored = path is not None
        super().__init__(path or Path(f"{kind}.json"), device)
        self.content |= {"kind": kind, "size": size.name}
        self.content["versions"] |= {
            name: doctor.probe(doctor.Package(name, "", "")).version or "missing"
            for name in ("diffusers", "torchao")
        }
        if options.resume and self.stored and path.is_file():
            fresh, self.content = self.content, load(path, kind)
            for key in ("size", "device"):
                if self.content[key] != fresh[key]:
                    raise ResultsError(f"{path} is of {key} {self.content[key]!r}, "
                                       f"not of {fresh[key]!r}")  # fmt: skip
            self._close_running()
            # What was cut short is taken up again, but for what has killed the process.
            self.content["left_out"] = [
                item for item in self.content["left_out"] if "ended" in item["why"]
            ]

    def save(self) -> None:
        if self.stored:
            super().save()


KEYS = {"kind", "size", "device", "machine", "versions", "date", "commit", "cases", "left_out"}


def load(path: Path, kind: str) -> dict:
    """A whole results file of this kind, or `ResultsError`."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not JSON ({error}); measure again") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ResultsError(f"{path} has no kind {kind!r}; measure again")
    if missing := sorted(KEYS - set(content)):
        raise ResultsError(f"{path} lacks {', '.join(missing)}; measure again")
    return content


def heading(content: dict) -> str:
    toy = "TOY SIZE, which says nothing about FLUX. " if content["size"] == "toy" else ""
    packages = ", ".join(f"{name} {content['versions'][name]}" for name in ("diffusers", "torchao"))
    return f"{toy}{machine_text(content).removesuffix('.')}; {packages}."


def table(rows: list[dict[str, str]]) -> str:
    """For a terminal."""
    if not rows:
        return "nothing was measured"
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return "\n".join(
        "  ".join(f"{line[name]:{width}}" for name, width in widths.items()).rstrip()
        for line in lines
    )


def not_timed(content: dict) -> list[str]:
    """A line for each way and each case that has no time, with the reason."""
    lines = [f"not timed: {row['case']}, {name}: {why}"
             for row in content["cases"] for name, why in row["errors"].items()]  # fmt: skip
    return lines + [f"not timed: {item['what']}: {item['why']}" for item in content["left_out"]]


def decides(content: dict) -> bool:
    """Whether these figures can reach or miss a goal: FLUX's size on a GPU."""
    return content["size"] == "flux" and content["device"] == "cuda"


def verdict(content: dict, name: str, what: str, value: float | None, least: float) -> str:
    if value is None or not decides(content):
        return f"{name:44} not measured (goal {least:g} {what})"
    word = "reached" if value >= least else "MISSED"
    return f"{name:44} {word}: {value:.2f} {what}, goal {least:g}"
