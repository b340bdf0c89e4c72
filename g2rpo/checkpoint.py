"""Checkpoints: written beside and renamed, so that a killed run leaves whole ones only.

    checkpoints/step-000050/transformer/config.json                         diffusers' layout, or
                            transformer/diffusion_pytorch_model.safetensors
                            lora/pytorch_lora_weights.safetensors           of a run with adapters
                            ema/...                                         the same of the average
                            training_state.pt                               optimizer and counters
                            manifest.json                                   sizes, written last

Nothing is unpickled: safetensors, and `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import ConfigurationError, TrainingError
from .metrics import size
from .weights import TrainedWeights

AVERAGE = "ema"
STATE = "training_state.pt"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    update: int
    weights: dict[str, Tensor]  # by parameter
    average: dict[str, Tensor] | None  # the same of the moving average, where one is kept
    state: dict[str, Any]
    skipped: tuple[str, ...]  # newer checkpoints that could not be used, and why


def save_checkpoint(
    folder: Path,
    update: int,
    weights: TrainedWeights,
    average: Mapping[str, Tensor] | None,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write checkpoints/step-<update> under `folder`, and of this one and those before it keep the
    newest keep_last.

    average: of the weights, by parameter; None: there is none. state: what
    `torch.load(weights_only=True)` can read back. keep_last: 0 keeps all.

    Raises TrainingError when it cannot be written (a full disk); those before are as they were.
    """
    final = folder / f"step-{update:06d}"
    partial = folder / f".step-{update:06d}.partial"
    for leftover in folder.glob(".step-*.partial"):  # of a run that was killed right here
        shutil.rmtree(leftover)
    try:
        _write(partial, update, weights, average, state)
    except Exception as error:  # each writer has its own for a full disk; all are told
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        before = [path.name for path in list_checkpoints(folder)]
        raise TrainingError(
            f"the checkpoint {final} cannot be written: {error} (free on that disk: "
            f"{size(free)}); {f'{before[-1]} is intact' if before else 'there is none before it'}. "
            "Make room, then go on with --resume"
        ) from error
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _sync(folder)
    if keep_last > 0:
        # A later one can only be damaged, passed over by the resume: it must not displace this one.
        for old in [p for p in list_checkpoints(folder) if update_of(p) <= update][:-keep_last]:
            shutil.rmtree(old)
    return final


def _write(
    partial: Path,
    update: int,
    weights: TrainedWeights,
    average: Mapping[str, Tensor] | None,
    state: dict[str, Any],
) -> None:
    (partial / weights.folder).mkdir(parents=True)
    weights.save(partial / weights.folder)
    if average is not None:
        (partial / AVERAGE).mkdir()
        weights.save(partial / AVERAGE, average)
    torch.save(state, partial / STATE)
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
    (partial / MANIFEST).write_text(json.dumps({"update": update, "bytes": sizes}, indent=1))
    folders = sorted(path for path in partial.rglob("*") if path.is_dir())
    for path in (*files, partial / MANIFEST, *folders, partial):
        _sync(path)


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
    return sorted(found, key=update_of)


def update_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def choose_checkpoint(run_dir: Path, name: str | None, argument: str) -> Path:
    """The checkpoint of a run that --checkpoint names; None: the newest.

    argument: what named run_dir, for errors. Raises ConfigurationError where there is none.
    """
    found = list_checkpoints(run_dir / "checkpoints")
    if not found:
        raise ConfigurationError(
            f"{argument} is {str(run_dir)!r}, a run without a checkpoint; expected one that has "
            "been trained up to its first (train.save_every updates, or Ctrl-C)"
        )
    names = [path.name for path in found]
    if name is None:
        return found[-1]
    if name not in names:
        raise ConfigurationError(f"--checkpoint is {name!r}; expected one of {', '.join(names)}")
    return found[names.index(name)]


def _checked_manifest(path: Path, inside: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the sizes it says. Raises OSError if not.

    inside: only the files in that folder of it.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    for name, expected in manifest["bytes"].items():
        if name.startswith(inside) and (found := (path / name).stat().st_size) != expected:
            raise OSError(f"{name} has {found} bytes; expected {expected}")
    return manifest


def check_weights(path: Path, folder: str, average: bool = False) -> None:
    """Whether one checkpoint's weights, or their moving average, are there and whole, by the sizes
    of the files. folder: that of `TrainedWeights`.

    Raises ConfigurationError where there is no average, TrainingError where files are damaged.
    """
    inside = AVERAGE if average else folder
    if average and not (path / inside).is_dir():
        raise ConfigurationError(
            f"--ema is given, but {path} has no moving average; expected a run that keeps one "
            "(train.ema), or no --ema"
        )
    try:
        if not (path / inside).is_dir():
            raise OSError(f"there is no {inside}/")
        _checked_manifest(path, f"{inside}/")
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def read_weights(path: Path, weights: TrainedWeights, average: bool = False) -> dict[str, Tensor]:
    """The weights of one checkpoint, or their moving average, by parameter, on the CPU.

    weights: whose files are read; they are not changed. Nothing else of the checkpoint is needed.
    Raises as `check_weights`.
    """
    check_weights(path, weights.folder, average)
    try:
        return weights.read(path / (AVERAGE if average else weights.folder))
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> TrainingError:
    return TrainingError(
        f"{path} cannot be read: {error}; expected a whole checkpoint, perhaps another one "
        "(--checkpoint)"
    )


def trained_prompts(path: Path) -> list[str] | None:
    """The prompts that the run of a checkpoint trains on; None: its training state is not there.

    Only they are read, of what may be many gigabytes. Raises TrainingError where it is damaged.
    """
    file = path / STATE
    if not file.is_file():
        return None
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["prompts"]
    except (OSError, RuntimeError, ValueError, KeyError, UnpicklingError) as error:
        raise TrainingError(
            f"{file} cannot be read: {error}; expected a whole checkpoint, or one without that file"
        ) from error


def load_checkpoint(
    folder: Path, weights: TrainedWeights, with_average: bool = False
) -> Checkpoint | None:
    """The newest checkpoint that is whole, on the CPU; None if there is none to load.

    weights: whose files are read; they are not changed. with_average: read the average, too.
    A truncated or unreadable one is passed over for the one before, and named in `skipped`.
    Raises TrainingError when there are checkpoints and none is whole.
    """
    skipped = []
    for path in reversed(list_checkpoints(folder)):
        try:
            manifest = _checked_manifest(path)
            values = weights.read(path / weights.folder)
            average = weights.read(path / AVERAGE) if with_average else None
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
            update = int(manifest["update"])
        except Exception as error:  # damage shows in as many ways as there are readers; it is told
            skipped.append(f"{path.name}: {error}")
            continue
        return Checkpoint(update, values, average, state, tuple(skipped))
    if skipped:
        raise TrainingError(
            f"no checkpoint under {folder} can be loaded: " + "; ".join(skipped)
        )
    return None
