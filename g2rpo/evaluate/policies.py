"""A run's images: those of its base policy, then those of a checkpoint, from the same noises.

One model is loaded, and the checkpoint's weights are put into it between the two: there are never
two sets of weights on the device. Images go to the host and to files as they are made, and the
model is gone before anything is scored.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import g2rpo_kernels as gk

from ..checkpoint import AVERAGE, read_weights, trained_prompts
from ..config import Config
from ..flux.pipeline import progress_bar
from ..flux.snippet import renamed
from ..metrics import count, duration
from ..models import be_deterministic, choose_device, load_model
from ..pictures import picture_name, to_picture, write_picture
from ..policy import Model
from ..schedule import noise_schedule
from ..scoring import sample_policy
from ..weights import assign, make_weights
from .scores import Batch

LINE_SECONDS = 10.0  # between two lines of progress, where there is no terminal


@dataclass(frozen=True)
class Images:
    """Of one policy: on the host [M, 3 or 1, H, W], and in files."""

    pixels: Tensor
    files: list[Path]


@dataclass(frozen=True)
class Drawn:
    """What a run has been asked for, and what its two policies made of it."""

    prompts: list[str]  # M
    base: Images
    policy: Images
    trained_on: list[str] | None  # prompts; None: the checkpoint does not say
    has_average: bool  # whether the checkpoint keeps one
    parameters: int
    seconds: float  # of drawing


def draw_run(
    config: Config,
    checkpoint: Path,
    ema: bool,
    samples: int,
    folders: tuple[Path, Path],  # of the base's images and of the policy's
    batch: Batch,
    console: Console,
) -> Drawn:
    """Draw both policies' images, `samples` of each. ema: the checkpoint's moving average.

    Raises ConfigurationError naming the key or the file, TrainingError where memory does not
    suffice or a file cannot be written.
    """

    def say(text: str) -> None:
        console.out(text, highlight=False)

    trained_on = trained_prompts(checkpoint)
    device = choose_device(config.model.device)
    if config.train.deterministic:
        be_deterministic(device)
    key = "data.evaluation_prompts" if config.data.evaluation_prompts else "data.prompts"
    told = {
        "data.prompts": key,
        "run `g2rpo embed` with the same arguments": "expected --data.embeddings null, to embed as "
        "it goes, or these prompts embedded before: `g2rpo embed RUN_DIR/config.yaml "
        "--data.prompts FILE --everything`",
    }
    with renamed(told):
        model = load_model(_drawn_alone(config, samples), _pretraining(say), say)
    asked = list(model.evaluation_prompts)
    prompts = [asked[i % len(asked)] for i in range(samples)]
    if config.model.fuse:
        gk.fuse_flux(model.policy.transformer)
    painter = _Painter(model, prompts, config, batch, console)
    base = painter.draw("base policy", folders[0])
    weights = make_weights(
        model.policy.transformer, config.model.lora, config.train.seed, keep_start=False
    )
    assign(weights.parameters, read_weights(checkpoint, weights, ema))
    policy = painter.draw(f"{checkpoint.name}{', its average' if ema else ''}", folders[1])
    drawn = Drawn(
        prompts, base, policy, trained_on, (checkpoint / AVERAGE).is_dir(),
        sum(p.numel() for p in model.policy.transformer.parameters()), painter.seconds,
    )  # fmt: skip
    del model, painter, weights
    gc.collect()  # its modules know one another
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return drawn


def _drawn_alone(config: Config, samples: int) -> Config:
    """As if of a run that evaluates and makes no update: so no file of other prompts is needed, and
    stored embeddings need hold no more than is drawn."""
    config = copy.deepcopy(config)
    data, train = config.data, config.train
    data.prompts, data.evaluation_prompts = data.evaluation_prompts or data.prompts, None
    train.updates, train.prompts_per_update, train.evaluation_samples = 0, 1, samples
    return config


def _pretraining(say: Callable[[str], None]) -> Callable[[int, int, float], None]:
    def on_step(step: int, steps: int, loss: float) -> None:
        if step == 1:
            say("Pre-training the digits model by flow matching (once, then cached)")

    return on_step


class _Painter:
    """Draws the same prompts from the same noises with whatever weights the model has."""

    def __init__(
        self, model: Model, prompts: list[str], config: Config, batch: Batch, console: Console
    ) -> None:
        self.model, self.prompts, self.batch, self.console = model, prompts, batch, console
        rollout = config.rollout
        schedule = noise_schedule(rollout.steps, rollout.shift)
        self.sigmas = schedule.float().to(model.policy.device)
        self.said = {
            "steps": rollout.steps, "shift": rollout.shift, "guidance": rollout.guidance,
            "model": config.model.path,
        }  # fmt: skip
        self.seconds = 0.0

    def draw(self, policy: str, folder: Path) -> Images:
        """All images, each written as it is made. policy: whose they are, for people."""
        pixels: Tensor | None = None
        files: list[Path] = []
        total, began = len(self.prompts), time.monotonic()
        told, broken = began, 0

        def some(size: int) -> Tensor:
            rows = slice(len(files), len(files) + size)
            places = range(total)[rows]
            return sample_policy(self.model, self.prompts[rows], self.sigmas, size, places)

        with progress_bar(self.console, f"drawing: {policy}", total) as progress:
            while len(files) < total:
                images = self.batch.within_memory("drawing", some).cpu()
                if pixels is None:  # once: all of them twice may be more than the host has
                    pixels = images.new_empty((total, *images.shape[1:]))
                pixels[len(files) : len(files) + len(images)] = images
                broken += int((~images.isfinite()).flatten(1).any(1).sum())
                for image in images:
                    files.append(self._write(image, len(files), policy, folder))
                progress.advance(0, len(images))
                now = time.monotonic()
                if not self.console.is_interactive and now - told >= LINE_SECONDS:
                    self.console.out(f"{policy}: {len(files)} of {total} images", highlight=False)
                    told = now
        seconds = time.monotonic() - began
        self.seconds += seconds
        self.console.out(
            f"{policy}: {count(total, 'image')} in {duration(seconds)}", highlight=False
        )
        if broken:
            self.console.out(
                f"{policy}: {count(broken, 'image')} with NaN or infinite pixels, which are black "
                "in the files; their scores have failed", highlight=False,
            )  # fmt: skip
        return Images(pixels, files)

    def _write(self, image: Tensor, index: int, policy: str, folder: Path) -> Path:
        prompt = self.prompts[index]
        file = folder / picture_name(index, prompt)
        said = {"prompt": prompt, "index": index, **self.said, "policy": policy}
        write_picture(to_picture(image), file, said)
        return file

