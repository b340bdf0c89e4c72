"""Runs of a miniature FLUX as `g2rpo train` leaves them, with weights that show in the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from g2rpo.flux import sample

RANK, ALPHA = 4, 12
TARGETS = ["attn.to_q", "attn.to_out.0", "ff.net.2"]
SIZE = ("--height", "32", "--width", "48", "--steps", "2")


def write_run(
    folder: Path, model: Path, write: Callable[[Path, int], object], **keys: object
) -> Path:
    """A run with the checkpoints step-000010 and step-000020, whose weights `write` writes."""
    folder.mkdir()
    config = {"model": {"path": str(model), **keys}, "train": {"updates": 20}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for update in (10, 20):
        checkpoint = folder / "checkpoints" / f"step-{update:06d}"
        write(checkpoint, update)
        (checkpoint / "manifest.json").write_text(json.dumps({"update": update, "bytes": {}}))
    return folder


def perturbed(miniature: Path, seed: int):
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel.from_pretrained(miniature / "transformer").bfloat16()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return transformer


def write_lora(folder: Path, transformer, seed: int, targets=tuple(TARGETS)) -> None:
    import peft
    from diffusers import FluxPipeline

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(targets))
    transformer.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    transformer.delete_adapters("default")


def write_full_run(folder: Path, miniature: Path) -> Path:
    """Full fine-tuning: two checkpoints, the newer of them with a moving average in float32."""

    def write(checkpoint: Path, update: int) -> None:
        perturbed(miniature, update).save_pretrained(checkpoint / "transformer")
        if update == 20:
            perturbed(miniature, 30).float().save_pretrained(checkpoint / "ema")

    return write_run(folder, miniature, write)


def write_lora_run(folder: Path, miniature: Path) -> Path:
    """The same with adapters."""

    def write(checkpoint: Path, update: int) -> None:
        write_lora(checkpoint / "lora", perturbed(miniature, 0), update)
        if update == 20:
            write_lora(checkpoint / "ema", perturbed(miniature, 0), 30)

    return write_run(folder, miniature, write)


def draw(output: Path, *arguments: object) -> list[Path]:
    """Runs the command; the images, in their order."""
    output_given = () if "--output" in arguments else ("--output", output)
    assert sample.main([str(a) for a in (*arguments, *output_given)]) == 0
    return sorted(output.glob("*.png"))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)
