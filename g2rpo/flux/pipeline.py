"""diffusers' FluxPipeline of a `Source`: each file read once, checked, in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..errors import ConfigurationError, TrainingError
from ..metrics import size
from .files import component, read_header, weight_files
from .loading import load_transformer, load_vae, weights_bytes
from .snippet import Source, renamed
from .text import TextEncoders

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import FluxPipeline


def load_pipeline(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    max_sequence_length: int,
    console: Console,
    offload: bool = False,
) -> FluxPipeline:
    """The pipeline on the device; with offload in host memory, from where parts visit the device.

    Raises ConfigurationError where a file is missing or damaged or the LoRA is of another model,
    TrainingError where the device has too little memory.
    """
    from diffusers import FluxPipeline

    component(source.folder, "scheduler")
    place = torch.device("cpu") if offload else device
    if source.transformer is None:
        files = weight_files(component(source.folder, "transformer"))
    else:
        files = [source.transformer]
    total = weights_bytes(files)
    if not console.is_interactive:
        console.out(f"Reading the transformer, {size(total)}, and its encoders")
    with memory(device, "loading the model", offload):
        with progress_bar(console, "reading the transformer", total) as progress:
            with renamed({"model.transformer is": "the transformer's weights are"}):
                transformer = load_transformer(
                    source.folder, source.transformer, dtype, place,
                    on_bytes=lambda size: progress.advance(0, size),
                )  # fmt: skip
        texts = TextEncoders(source.folder, place, dtype, max_sequence_length)
        pipeline = FluxPipeline.from_pretrained(
            source.folder, local_files_only=True, use_safetensors=True, transformer=transformer,
            vae=load_vae(source.folder, dtype, place), tokenizer=texts.tokenizer,
            tokenizer_2=texts.tokenizer_2, text_encoder=texts.text_encoder,
            text_encoder_2=texts.text_encoder_2,
        )  # fmt: skip
        pipeline.set_progress_bar_config(disable=True)  # ours says what image it is, too
        if source.lora is not None:
            _load_lora(pipeline, source.lora)
        if offload:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
    return pipeline


def _load_lora(pipeline: FluxPipeline, file: Path) -> None:
    """Put the adapters on the transformer. Raises ConfigurationError unless all of them fit."""
    read_header(file)  # whole?
    place = {"weight_name": file.name, "use_safetensors": True}
    try:
        _check_lora(pipeline.lora_state_dict(str(file.parent), **place), pipeline.transformer)
        pipeline.load_lora_weights(str(file.parent), **place)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # diffusers and PEFT have many for a file that does not fit
        raise ConfigurationError(
            f"{file} does not fit the model: {error}; expected a LoRA for this FLUX transformer"
        ) from error


def _check_lora(factors: Mapping[str, Tensor], transformer: nn.Module) -> None:
    """Raise ValueError unless every factor of an adapter is of a layer, and of its size.

    diffusers would leave out the adapters of unknown layers, with a warning, and replace a layer by
    a larger one where an adapter is larger.
    """
    layers = dict(transformer.named_modules())
    found, odd = 0, []
    for key, factor in factors.items():
        name, lora, kind = key.partition(".lora")
        if not lora or name.startswith("text_encoder."):  # diffusers says itself what of those fits
            continue
        found += 1
        weight = getattr(layers.get(name.removeprefix("transformer.")), "weight", None)
        side = 1 if kind.startswith(("_A", ".down")) else 0  # [rank, in] and [out, rank]
        if weight is None:
            odd.append(f"{key} is of no layer of the transformer")
        elif factor.ndim > 1 and factor.shape[side] != weight.shape[side]:
            odd.append(f"{key} is {list(factor.shape)}, on a layer of {list(weight.shape)}")
    if odd or not found:
        example = f" ({odd[0]})" if odd else ""
        raise ValueError(f"of its {found} factors of adapters, {len(odd)} have no place{example}")


@contextmanager
def memory(device: torch.device, doing: str, offload: bool) -> Iterator[None]:
    """Too little memory on the device is one sentence that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        mend = "--batch 1, or a smaller --height and --width" if offload else "--offload"
        raise TrainingError(
            f"{device} ran out of memory while {doing}; expected more of it, or {mend}. PyTorch "
            f"says: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def progress_bar(console: Console, description: str, total: int) -> Iterator[Progress]:
    """A bar on a terminal; its one task is number 0. Elsewhere nothing: lines are printed there."""
    columns = TextColumn("{task.description}"), BarColumn(), "{task.percentage:>3.0f}%"
    remaining = TimeRemainingColumn()
    with Progress(
        *columns, remaining, console=console, disable=not console.is_interactive, transient=True
    ) as progress:
        progress.add_task(description, total=total)
        yield progress
