"""Seconds of an update of the reference's loop by phase, of ours, and how they compare."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from adamw_steps import count, fitting, parameters, shapes
from bench_flux_update import PRESET
from flux_results import UPDATE as OURS
from flux_results import FluxStore, load
from flux_shapes import Size
from reference_loop import (
    ANCHOR,
    BRANCHES,
    COMPLETIONS,
    OPTIMIZER,
    UPDATE,
    ReferenceLoop,
    Shape,
    clip_and_step,
    phase_row,
    timed,
)
from results import ResultsError
from texts import time_text
from timing import synchronizer

if TYPE_CHECKING:
    from g2rpo.config import Config

NEEDS = "that holds FLUX's weights in bfloat16 and their gradients"
SPARE = {"rollout": 5e9, "update": 9e9}  # bytes of activations, more than one image has
SHARES = {"rollout": 0.45, "decode": 0.05, "update": 0.25, "optimizer": 0.1}  # of the seconds


def fits(elements: int, bytes_each: int, phase: str, free: float) -> bool:
    return elements * bytes_each + SPARE[phase] <= free


def dtypes(elements: int, free: float) -> dict[str, str | None]:
    """By phase what the weights are, for so many free bytes; None: not even bfloat16 fits.

    The rollout has weights; the update gradients too, and autocast's bfloat16 copies of both kinds'
    weights, which live as long as its forward.
    """
    autocast = "float32 weights, bfloat16 autocast"
    rollout = autocast if fits(elements, 4, "rollout", free) else "bfloat16"
    update = autocast if fits(elements, 10, "update", free) else "bfloat16"
    return {
        "rollout": rollout if fits(elements, 2, "rollout", free) else None,
        "update": update if fits(elements, 4, "update", free) else None,
    }


def free_bytes(device: str) -> float:
    if device == "cpu":
        return math.inf
    gc.collect()
    torch.cuda.empty_cache()
    return 0.97 * torch.cuda.mem_get_info()[0]


def step_row(size: Size, device: str, seconds: float) -> dict:
    """AdamW and clipping, on as many parameters in float32 as fit with gradients and moments."""
    elements = count(shapes(size, size.doubles, size.singles))
    share = fitting(size, 24, 0.9 * free_bytes(device))  # foreach's temporaries too
    if share is None:
        raise ResultsError("not even one double block fits with its optimizer's states")
    given = parameters(shapes(size, *share), torch.float32, device)
    optimizer = torch.optim.AdamW(given, lr=2e-6, weight_decay=1e-4)

    def steps() -> Iterator[str]:
        for _ in range(5):
            clip_and_step(optimizer, given)
            yield OPTIMIZER

    row = phase_row(timed(steps(), seconds, synchronizer(device))[OPTIMIZER], 1)
    part = count(shapes(size, *share)) / elements
    row["seconds_each"] /= part
    return row | {"seconds": row["seconds_each"], "extrapolated": part < 1, "of_elements": part}


def measure(
    size: Size, config: Config, device: str, seconds: float, store: FluxStore, row: dict
) -> None:
    """Every phase of the loop into row["phases"], which is written as each ends. Raises
    ResultsError where not even the weights fit."""
    row["dtypes"] = dtypes(count(shapes(size, size.doubles, size.singles)), free_bytes(device))
    if row["dtypes"]["rollout"] is None:
        raise ResultsError(f"the weights do not fit in bfloat16; expected a GPU {NEEDS}")

    def keep(found: dict[str, list[float]]) -> None:
        for name, times in found.items():
            each = row["phases"][name] = phase_row(times, shape_of(config).asked()[name])
            print(f"{name:12} {each['timed']} of {each['asked']} timed, "
                  f"{time_text(each['seconds_each'])} each", flush=True)  # fmt: skip
        store.add(row)

    _of_the_weights(size, config, device, seconds, row, keep)
    row["phases"][OPTIMIZER] = step_row(size, device, SHARES["optimizer"] * seconds)
    if not set(shape_of(config).asked()) - set(row["phases"]):
        row["seconds"] = sum(each["seconds"] for each in row["phases"].values())
    row["extrapolated"] = any(each["extrapolated"] for each in row["phases"].values())
    store.add(row)


def _of_the_weights(
    size: Size, config: Config, device: str, seconds: float, row: dict,
    keep: Callable[[dict[str, list[float]]], None],
) -> None:  # fmt: skip
    """Rollout, decoding and gradients; on return the model is given up."""
    from flux_update import RandomModel  # the trainer, for which packages are needed

    kinds, synchronize = row["dtypes"], synchronizer(device)
    autocast = "autocast" in kinds["rollout"]
    config.model.dtype = "float32" if autocast else "bfloat16"
    model = RandomModel(size, config, device)
    loop = ReferenceLoop(model, shape_of(config), autocast)

    def of(pieces: Iterator[str], share: str) -> dict[str, list[float]]:
        # What is there to decode and to learn from comes with the first image that is finished.
        return timed(pieces, SHARES[share] * seconds, synchronize, lambda: bool(loop.finished))

    keep(of(loop.rollout(), "rollout"))
    keep(of(loop.decode(), "decode"))
    transformer = model.policy.transformer
    if kinds["update"] is None:
        row["errors"][UPDATE] = "weights and gradients do not fit in bfloat16"
        return
    if autocast and "autocast" not in kinds["update"]:
        transformer.bfloat16()
        model.policy.dtype, loop.autocast = torch.bfloat16, False
    transformer.requires_grad_(True).enable_gradient_checkpointing()
    keep(of(loop.update(), "update"))


def shape_of(config: Config) -> Shape:
    of = config.rollout
    return Shape(of.steps, of.shift, of.eta, tuple(of.sde_positions), tuple(of.granularities),
                 of.group_size)  # fmt: skip


def ours_of(path: Path, overrides: list[str], store: FluxStore) -> dict | None:
    """Our update in a results file, where that is of this machine and of this very update."""
    content = load(path, OURS)
    for key in ("device", "size"):
        if content[key] != store.content[key]:
            raise ResultsError(f"{path} is of {key} {content[key]!r}, "
                               f"not of {store.content[key]!r}")  # fmt: skip
    if content["machine"]["name"] != store.content["machine"]["name"]:
        raise ResultsError(f"{path} is of {content['machine']['name']}, not of this machine")
    for case in content["cases"]:
        if case["preset"] == PRESET and case["overrides"] == overrides:
            return {key: case[key] for key in ("seconds", "phases", "rows", "updates")} | {
                "from": path.name, "date": content["date"], "commit": content["commit"],
            }  # fmt: skip
    return None


def our_update(size: Size, config: Config, device: str, until: float) -> dict:
    """An update of ours made here; the second, where there is time for it."""
    import flux_update

    run = flux_update.Run(config, size, device, flux_update.Watch(device))
    *_, found = run.updates(2, until)
    return {key: found[key] for key in ("seconds", "phases", "rows", "updates")} | {
        "from": "this run"
    }


def ratios(row: dict) -> dict[str, float]:
    """How many times as long as ours the loop takes: the rollout, and the whole update."""
    names, ours = (ANCHOR, BRANCHES, COMPLETIONS), row["ours"]
    found = {}
    if ours and all(name in row["phases"] for name in names):
        rollout = sum(row["phases"][name]["seconds"] for name in names)
        found["rollout"] = rollout / (ours["phases"]["anchor"] + ours["phases"]["completions"])
    if ours and row["seconds"] is not None:
        found["update"] = row["seconds"] / ours["seconds"]
    return found
