"""The evaluation of a folder of images, alone or in pairs with those of another."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ..config import Config
from ..errors import ConfigurationError
from ..models import choose_device
from ..rewards import Reward
from ..scoring import diversity
from .files import common_facts
from .folder import Folder, check_pairs, load_image, prompts_of, read_folder
from .result import Evaluation
from .scores import Batch, check_channels, score_sources
from .settings import marks

CHUNK_BYTES = 2**30  # of images on the host at once, as float32


def read_folders(
    place: Path, base: Path | None, samples: int | None, config: Config
) -> tuple[Folder, Folder | None, list[str], str]:
    """Both folders, the prompts and where those are from; the first `samples` of them by name."""
    folder = read_folder(place, "IMAGES_DIR", config.data.column)
    prompts, source = prompts_of(folder, config)
    partner = None if base is None else read_folder(base, "--base", config.data.column)
    if partner is not None:
        check_pairs(folder, partner, prompts, "--base")
    if samples is not None and samples > len(prompts):
        raise ConfigurationError(
            f"--samples is {samples}; expected at most {len(prompts)}, the images in {place}"
        )
    return folder, partner, prompts[:samples], source


def evaluate_folders(
    folder: Folder,
    base: Folder | None,
    prompts: list[str],
    source: str,
    config: Config,
    rewards: Sequence[Reward],
    output: Path,
    console: Console,
) -> Evaluation:
    """Score, and compare with the base where there is one. source: where prompts are from."""
    batch = Batch(config.rollout.branch_batch, lambda text: console.out(text, highlight=False))
    folders = [folder] if base is None else [base, folder]
    grey = all(f.grey for f in folders)
    check_channels(rewards, 1 if grey else 3)
    every = range(len(prompts))
    sources = [_chunks(f, every, grey) for f in folders]
    device = choose_device(config.model.device)
    *base_scores, scores = score_sources(sources, prompts, rewards, batch, device, console)
    spreads = [_folder_diversity(f, prompts, grey) for f in folders]
    heldout, trained = marks(config.rewards, None)
    sizes = sorted({f.sizes[i] for f in folders for i in every})
    said = f"{sizes[0][0]} x {sizes[0][1]} pixels" if len(sizes) == 1 else f"{len(sizes)} sizes"
    number = f"{len(prompts):,}" + ("" if base is None else " of each")
    return Evaluation(
        name=_name(folder),
        prompts=prompts,
        rewards=[reward.name for reward in rewards],
        heldout=heldout,
        trained=trained,
        scores=scores,
        images=_relative(folder, len(prompts), output),
        base_name=None if base is None else _name(base),
        base_scores=base_scores[0] if base_scores else None,
        base_images=None if base is None else _relative(base, len(prompts), output),
        diversity=spreads[-1],
        base_diversity=None if base is None else spreads[0],
        facts={
            "Prompts": f"{len(set(prompts)):,}, from {source}",
            "Images": f"{number}, {said}" + (", greyscale" if grey else ""),
            **common_facts(None if base is None else spreads[0], spreads[-1]),
        },
    )


def _name(folder: Folder) -> str:
    """The folder's, and that above it, which for images/ and the like says more."""
    place = folder.files[0].parent.resolve()
    return f"{place.parent.name}/{place.name}"


def _relative(folder: Folder, images: int, output: Path) -> list[Path]:
    start = output.resolve()
    return [Path(os.path.relpath(file.resolve(), start)) for file in folder.files[:images]]


def _chunks(
    folder: Folder, places: Sequence[int], grey: bool
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Images of one size together, no more at once than fit into CHUNK_BYTES."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i in places:
        by_size.setdefault(folder.sizes[i], []).append(i)
    for (height, width), group in by_size.items():
        step = max(1, CHUNK_BYTES // (4 * (1 if grey else 3) * height * width))
        for start in range(0, len(group), step):
            some = group[start : start + step]
            yield some, torch.stack([load_image(folder.files[i], grey) for i in some])


def _folder_diversity(folder: Folder, prompts: Sequence[str], grey: bool) -> float | None:
    """`scoring.diversity`, a prompt at a time; None where no prompt has two images, or a prompt's
    are of several sizes."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    repeated = {prompt: group for prompt, group in groups.items() if len(group) > 1}
    if not repeated or any(len({folder.sizes[i] for i in g}) > 1 for g in repeated.values()):
        return None
    spreads = []
    for prompt, group in repeated.items():
        images = torch.stack([load_image(folder.files[i], grey) for i in group])
        spreads.append(diversity(images, [prompt] * len(group)))
    return math.fsum(spreads) / len(spreads)
