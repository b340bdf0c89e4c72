"""`g2rpo sample`: images of a trained checkpoint, of a LoRA or of FLUX as it is, by FluxPipeline.

    g2rpo sample runs/flux --prompt "a red fox in the snow" "a street at night"

diffusers' pipeline draws, unchanged: this adds the weights, a seed for each image, so that its
noise does not depend on the images beside it, and files that say what is in them.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from rich.console import Console

from ..data import read_prompts
from ..errors import ConfigurationError, TrainingError
from ..metrics import count, duration
from ..models import choose_device
from ..pictures import picture_name, write_picture
from .pipeline import load_pipeline, memory, progress_bar
from .quiet import quiet
from .snippet import Source, find_source, renamed, snippet

if TYPE_CHECKING:
    from diffusers import FluxPipeline

SIDE = 16  # pixels of a token's side; FluxPipeline would round sizes down to it


@dataclass(frozen=True)
class Job:
    """One image to draw."""

    prompt: str
    seed: int
    path: Path


def main(arguments: Sequence[str]) -> int:
    """The command. Raises ConfigurationError or TrainingError; returns 0."""
    options = _parser().parse_args(list(arguments))
    prompts = _check(options)
    source = find_source(
        options.model, options.transformer, options.lora, options.checkpoint, options.ema
    )
    output = Path(options.output).expanduser() if options.output else source.output
    jobs = _jobs(prompts, options.images_per_prompt, options.seed, output)
    if not options.overwrite and (there := [job.path for job in jobs if job.path.exists()]):
        raise ConfigurationError(
            f"--output is {str(output)!r}, where {count(len(there), 'image')} would be overwritten "
            f"({there[0].name}); expected another folder, or --overwrite"
        )
    with renamed({"model.device": "--device"}):
        device = choose_device(options.device)
    if options.offload and device.type == "cpu":
        raise ConfigurationError(
            "--offload is given, and --device is cpu; expected a GPU, for parts of FLUX to visit"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--output is {str(output)!r}; expected a folder, or one that can be made: {error}"
        ) from error
    console = Console()
    with quiet():
        pipeline = load_pipeline(
            source, device, getattr(torch, options.dtype), options.max_sequence_length, console,
            options.offload,
        )  # fmt: skip
        _tell_of_cuts(pipeline, prompts, options.max_sequence_length, console)
        draw(pipeline, jobs, source, device, options, console)
    which = "it" if len(jobs) == 1 else "the first"
    print(f"{count(len(jobs), 'image')} in {output}\nWith diffusers alone, {which} is drawn by:\n")
    print(
        snippet(
            source, jobs[0].prompt, steps=options.steps, guidance=options.guidance,
            height=options.height, width=options.width, seed=options.seed, dtype=options.dtype,
            max_sequence_length=options.max_sequence_length, device=str(device),
            offload=options.offload,
        )
    )  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="g2rpo sample", allow_abbrev=False,
        description="Draw images with the checkpoint of a run, with a LoRA, or with FLUX as it is.",
    )  # fmt: skip
    add = parser.add_argument
    add("model", metavar="MODEL", help="run directory of g2rpo train; or FLUX folder or hub id")
    add("--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help="what to draw")
    add("--prompts", metavar="FILE", help="more of them: text, one a line; .jsonl or .csv")
    add("--column", default="prompt", help="key or column of the prompt in .jsonl and .csv")
    add("--checkpoint", metavar="NAME", help="of a run, such as step-000050; default: the newest")
    add("--ema", action="store_true", help="the moving average that the checkpoint keeps")
    add("--transformer", metavar="FILE", help="all weights of a transformer, on a FLUX folder")
    add("--lora", metavar="FILE", help="LoRA (file or its folder), on a FLUX folder")
    add("--output", metavar="DIR", help="default: RUN/samples-step-000050, or ./samples")
    add("--overwrite", action="store_true", help="replace images that are there")
    add("--steps", type=int, default=50, help="default: 50")
    add("--guidance", type=float, default=3.5, help="distilled guidance scale, default: 3.5")
    add("--height", type=int, default=1024, help="pixels, default: 1024")
    add("--width", type=int, default=1024, help="pixels, default: 1024")
    add("--max-sequence-length", type=int, default=512, help="T5 tokens, default: 512")
    add("--images-per-prompt", type=int, default=1, help="default: 1")
    add("--seed", type=int, default=0, help="of the first image, the next has the next; default: 0")
    add("--batch", type=int, default=1, help="images drawn at once, default: 1")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    add("--device", default="auto", help="default: the GPU when there is one")
    add("--offload", action="store_true", help="parts of the model visit the GPU in turn")
    return parser


def _check(options: argparse.Namespace) -> list[str]:
    """Raise ConfigurationError for values that cannot be. Returns the prompts."""
    for name, ok, expected in (
        ("steps", options.steps >= 1, "at least 1"),
        ("guidance", math.isfinite(options.guidance), "a finite number"),
        ("height", options.height >= SIDE and options.height % SIDE == 0, f"a multiple of {SIDE}"),
        ("width", options.width >= SIDE and options.width % SIDE == 0, f"a multiple of {SIDE}"),
        ("max_sequence_length", 1 <= options.max_sequence_length <= 512, "1 to 512"),
        ("images_per_prompt", options.images_per_prompt >= 1, "at least 1"),
        ("seed", 0 <= options.seed < 2**63, "0 to 2^63 - 1"),
        ("batch", options.batch >= 1, "at least 1"),
    ):
        if not ok:
            argument = f"--{name.replace('_', '-')}"
            raise ConfigurationError(f"{argument} is {getattr(options, name)}; expected {expected}")
    prompts = list(options.prompt)
    if blank := [prompt for prompt in prompts if not prompt.strip()]:
        raise ConfigurationError(f"--prompt is {blank[0]!r}; expected what to draw")
    if options.prompts is not None:
        with renamed({"data.prompts": "--prompts", "data.column": "--column"}):
            prompts += read_prompts(options.prompts, options.column)
    if not prompts:
        raise ConfigurationError("no prompt is given; expected --prompt TEXT ... or --prompts FILE")
    return prompts


def _jobs(prompts: Sequence[str], images: int, seed: int, output: Path) -> list[Job]:
    """Prompt by prompt, seeds counting on: 0000-first-words-of-the-prompt.png, 0001-..."""
    jobs = []
    for index, prompt in enumerate(prompt for prompt in prompts for _ in range(images)):
        jobs.append(Job(prompt, seed + index, output / picture_name(index, prompt)))
    return jobs


def _tell_of_cuts(
    pipeline: FluxPipeline, prompts: Sequence[str], limit: int, console: Console
) -> None:
    tokens = pipeline.tokenizer_2(list(prompts), truncation=False, verbose=False).input_ids
    long = [(prompt, len(ids)) for prompt, ids in zip(prompts, tokens) if len(ids) > limit]
    if long:
        console.out(
            f"{count(len(long), 'prompt')} longer than --max-sequence-length {limit} will be cut: "
            f"{long[0][0][:60]!r}... has {long[0][1]} tokens", highlight=False,
        )  # fmt: skip


def draw(
    pipeline: FluxPipeline,
    jobs: Sequence[Job],
    source: Source,
    device: torch.device,
    options: argparse.Namespace,
    console: Console,
) -> None:
    """Draw the images and write them, a batch after the other.

    Raises TrainingError for an image with pixels that are not finite, or too little memory.
    """
    size, steps = options.batch, options.steps
    what = f"drawing {size} image(s) of {options.height} x {options.width} at once"
    with progress_bar(console, "drawing", len(jobs) * steps) as progress:
        for start in range(0, len(jobs), size):
            batch, began = jobs[start : start + size], time.monotonic()

            def step(pipe: object, number: int, timestep: object, values: dict) -> dict:
                progress.advance(0, size)
                return values

            progress.update(0, description=f"image {start + 1}/{len(jobs)}")
            with memory(device, what, options.offload):
                images = pipeline(
                    [job.prompt for job in batch], num_inference_steps=steps,
                    guidance_scale=options.guidance, height=options.height, width=options.width,
                    max_sequence_length=options.max_sequence_length, output_type="pt",
                    generator=[torch.Generator().manual_seed(job.seed) for job in batch],
                    callback_on_step_end=step,
                ).images  # [B, 3, H, W] in [0, 1]  # fmt: skip
            finite = images.isfinite().flatten(1).all(dim=1).tolist()
            if not all(finite):
                job = batch[finite.index(False)]
                raise TrainingError(
                    f"the image of {job.prompt!r} (seed {job.seed}) has NaN or infinite pixels and "
                    f"would be black, {count(start, 'image')} before it being written; expected "
                    f"finite weights in {source.weights}, or --dtype float32"
                )
            processor = pipeline.image_processor
            for job, picture in zip(batch, processor.numpy_to_pil(processor.pt_to_numpy(images))):
                _write(picture, job, source, options)
            if not console.is_interactive:
                spent = duration(time.monotonic() - began)
                console.out(f"{start + len(batch)}/{len(jobs)}  {spent}  {batch[-1].path}")


def _write(picture: Image.Image, job: Job, source: Source, options: argparse.Namespace) -> None:
    said = {
        "prompt": job.prompt, "seed": job.seed, "steps": options.steps,
        "guidance": options.guidance, "size": f"{options.width}x{options.height}",
        "max_sequence_length": options.max_sequence_length, "dtype": options.dtype,
        "model": source.model, "weights": source.weights,
    }  # fmt: skip
    write_picture(picture, job.path, said)
