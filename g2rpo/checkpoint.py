"""Checkpoints: written beside and renamed, so that a killed run leaves whole ones only.

    checkpoints/step-000050/transformer/config.json                         diffusers' layout
                            transformer/diffusion_pytorch_model.safetensors
                            training_state.pt                               optimizer and counters
                            manifest.json                                   sizes, written last
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .errors import TrainingError

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
STATE = "training_state.pt"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    update: int
    weights: dict[str, torch.Tensor]
    state: dict[str, Any]
    skipped: tuple[str, ...]  # newer checkpoints that could not be used, and why


def save_checkpoint(
    folder: Path, update: int, transformer: nn.Module, state: dict[str, Any], keep_last: int
) -> Path:
    """Write checkpoints/step-<update> under `folder`, and of this one and those before it keep the
    newest keep_last.

    state: what `torch.load(weights_only=True)` can read back. keep_last: 0 keeps all.
    """
    final = folder / f"step-{update:06d}"
    partial = folder / f".step-{update:06d}.partial"
    for leftover in folder.glob(".step-*.partial"):  # of a run that was killed right here
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    transformer.save_pretrained(partial / "transformer", max_shard_size="1TB")
    torch.save(state, partial / STATE)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    (partial / MANIFEST).write_text(json.dumps({"update": update, "bytes": sizes}, indent=1))
    for path in (*files, partial / MANIFEST, partial / "transformer", partial):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(folder)
    if keep_last > 0:
        # A later one can only be damaged, passed over by the resume: it must not displace this one.
        for old in [p for p in list_checkpoints(folder) if _update_of(p) <= update][:-keep_last]:
            shutil.rmtree(old)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first. Half-written ones carry another name."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if re.fullmatch(r"step-\d{6,}", p.name)]
    return sorted(found, key=_update_of)


def _update_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, on the CPU; None if there is none to load.

    A truncated or unreadable one is passed over for the one before, and named in `skipped`.
    Raises TrainingError when there are checkpoints and none is whole.
    """
    skipped = []
    for path in reversed(list_checkpoints(folder)):
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            for name, size in manifest["bytes"].items():
                found = (path / name).stat().st_size
                if found != size:
                    raise OSError(f"{name} has {found} bytes; expected {size}")
            weights = load_file(path / WEIGHTS)
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
            update = int(manifest["update"])
        except Exception as error:  # damage shows in as many ways as there are readers; it is told
            skipped.append(f"{path.name}: {error}")
            continue
        return Checkpoint(update, weights, state, tuple(skipped))
    if skipped:
        raise TrainingError(
            f"no checkpoint under {folder} can be loaded: " + "; ".join(skipped)
        )
    return None
