"""Checkpoints: written beside and renamed, so that a killed run leaves whole ones only.

    checkpoints/step-000050/transformer/config.json                         diffusers' layout, or
                            transformer/diffusion_pytorch_model.safetensors
                            lora/pytorch_lora_weights.safetensors           of a run with adapters
                            ema/...                                         the same of the average
                            optimizer/*.safetensors                         see optimizer_files.py
                            training_state.pt                               counters
                            manifest.json                                   sizes, written last

Weights are written whole by the lead, however they are sharded; of the optimizer every rank writes
its part. Nothing is unpickled: safetensors, and `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .distributed import ALONE, Ranks
from .distributed.ranks import LostRank, of_a_connection
from .distributed.shards import whole_values
from .errors import ConfigurationError, TrainingError
from .metrics import size
from .optimizer_files import read_optimizer, write_optimizer
from .weights import TrainedWeights

AVERAGE = "ema"
OPTIMIZER = "optimizer"
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
    ranks: Ranks = ALONE,
) -> Path:
    """Write checkpoints/step-<update> under `folder`, and of this one and those before it keep the
    newest keep_last.

    average: of the weights, by parameter; None: there is none. state: what
    `torch.load(weights_only=True)` can read back. keep_last: 0 keeps all. ranks: all of them call
    this, with a folder that all can write and each with its own state.

    Raises TrainingError when it cannot be written (a full disk); those before are as they were.
    """
    final = folder / f"step-{update:06d}"
    partial = folder / f".step-{update:06d}.partial"
    if ranks.lead:
        for leftover in folder.glob(".step-*.partial"):  # of a run that was killed right here
            shutil.rmtree(leftover)
    ranks.meet()
    try:
        _write(partial, update, weights, average, state, ranks)
    except LostRank:
        raise
    except Exception as error:  # each writer has its own for a full disk; all are told
        if ranks.count > 1 and of_a_connection(error):
            raise ranks.lost(error) from error
        free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
        if ranks.lead:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        before = [path.name for path in list_checkpoints(folder)]
        raise TrainingError(
            f"the checkpoint {final} cannot be written: {error} (free on that disk: "
            f"{size(free)}); {f'{before[-1]} is intact' if before else 'there is none before it'}. "
            "Make room, then go on with --resume"
        ) from error
    ranks.meet()
    if not ranks.lead:
        return final
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
    ranks: Ranks,
) -> None:
    for inside, parts in ((weights.folder, None), (AVERAGE, average)):
        if inside == AVERAGE and parts is None:
            continue
        if ranks.lead:
            (partial / inside).mkdir(parents=True)
        values = {
            name: value.cpu() if weights.sharded else value  # whole ones do not fit the device
            for name, value in whole_values(weights.parameters, parts, keep=ranks.lead)
        }
        if ranks.lead:
            weights.save(partial / inside, values if weights.sharded or parts else None)
        del values
    ranks.meet()
    if "optimizer" in state:
        rest = write_optimizer(
            partial / OPTIMIZER, state["optimizer"], list(weights.parameters), ranks.watch is None
        )
        state = {**state, "optimizer": rest}
    if not ranks.lead:
        return
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
    folder: Path,
    weights: TrainedWeights,
    optimizer: torch.optim.Optimizer | None = None,
    with_average: bool = False,
    ranks: Ranks = ALONE,
) -> Checkpoint | None:
    """The newest checkpoint that is whole, on the CPU; None if there is none to load.

    weights: whose files are read; they are not changed. optimizer: which state["optimizer"] is to
    be for; None: that is not all there. with_average: read the average, too. ranks: all of them
    call this.
    A truncated or unreadable one is passed over for the one before, and named in `skipped`.
    Raises TrainingError when there are checkpoints and none is whole.
    """
    skipped: list[str] = []
    for path in ranks.from_lead(list(reversed(list_checkpoints(folder)))):
        fault, found = "", None
        try:
            found = _read(path, weights, optimizer, with_average, ranks.watch is None)
        except LostRank:
            raise
        except Exception as error:  # damage shows in as many ways as there are readers; it is told
            fault = f"{path.name}: {error}"
        faults = [fault for fault in ranks.gather(fault) if fault]
        if not faults and found is not None:
            return replace(found, skipped=tuple(skipped))
        skipped.append(faults[0])
    if skipped:
        raise TrainingError(
            f"no checkpoint under {folder} can be loaded: " + "; ".join(skipped)
        )
    return None


def _read(
    path: Path,
    weights: TrainedWeights,
    optimizer: torch.optim.Optimizer | None,
    with_average: bool,
    alone: bool,
) -> Checkpoint:
    manifest = _checked_manifest(path)
    values = weights.read(path / weights.folder)
    average = weights.read(path / AVERAGE) if with_average else None
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    if optimizer is not None:
        state["optimizer"] = read_optimizer(
            path / OPTIMIZER, state["optimizer"], optimizer, weights.parameters, alone
        )
    return Checkpoint(int(manifest["update"]), values, average, state, ())
