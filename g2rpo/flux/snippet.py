"""What `g2rpo sample` draws with: a run's checkpoint or LoRA, or a FLUX pipeline as it is; and the
lines of diffusers that draw the same without this package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..checkpoint import AVERAGE, choose_checkpoint
from ..errors import ConfigurationError
from .files import resolve_folder

FULL = "diffusion_pytorch_model.safetensors"
LORA = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Source:
    folder: Path  # of the FLUX pipeline
    model: str  # the same for FluxPipeline.from_pretrained, wherever it runs: absolute, or a hub id
    transformer: Path | None  # a .safetensors file of all its weights, in place of the folder's
    lora: Path | None  # a .safetensors file of adapters on it
    output: Path  # where its images go unless told otherwise

    @property
    def weights(self) -> str:
        """What the transformer is, for people."""
        return " + ".join(str(file) for file in (self.transformer or self.model, self.lora) if file)


def find_source(
    model: str,
    transformer: str | None = None,
    lora: str | None = None,
    checkpoint: str | None = None,
    ema: bool = False,
) -> Source:
    """The arguments of `g2rpo sample` -> files that are there; a hub id is downloaded.

    Raises ConfigurationError naming the argument, its value and what was expected.
    """
    place = Path(model).expanduser()
    if (place / "model_index.json").is_file() or not (place / "config.yaml").is_file():
        return _pipeline(model, transformer, lora, checkpoint, ema)
    for name, value in (("--transformer", transformer), ("--lora", lora)):
        if value is not None:
            raise ConfigurationError(
                f"{name} is {value!r}, but MODEL is {model!r}, a run, which is drawn with as its "
                f"checkpoint has it; expected no {name}, or a FLUX folder or hub id as MODEL"
            )
    return _run(place, checkpoint, ema)


def _pipeline(
    model: str, transformer: str | None, lora: str | None, checkpoint: str | None, ema: bool
) -> Source:
    place = Path(model).expanduser()
    for name, value in (("--checkpoint", checkpoint), ("--ema", ema or None)):
        if value is not None:
            raise ConfigurationError(
                f"{name} is given, but MODEL is {model!r}, no run; expected the directory of a run "
                f"of `g2rpo train` (with its config.yaml) as MODEL, or no {name}"
            )
    if place.parent.name == "checkpoints" and (place.parent.parent / "config.yaml").is_file():
        raise ConfigurationError(
            f"MODEL is {model!r}, a checkpoint; expected its run: {place.parent.parent} "
            f"--checkpoint {place.name}"
        )
    known = ("model_index.json", "config.json")  # of the latter alone, resolve_folder knows more
    if place.is_dir() and not any((place / name).is_file() for name in known):
        raise ConfigurationError(
            f"MODEL is {model!r}, a folder without config.yaml, which a run of `g2rpo train` has, "
            "and without model_index.json, which a FLUX pipeline has; expected either, or a hub id"
        )
    with renamed({"model.path": "MODEL", "model.transformer": "--transformer"}):
        folder = resolve_folder(model, transformer_weights=transformer is None)
    return Source(
        folder,
        str(folder.resolve()) if place.exists() else model,
        _file("--transformer", transformer, FULL),
        _file("--lora", lora, LORA),
        Path("samples"),
    )


def _run(run_dir: Path, checkpoint: str | None, ema: bool) -> Source:
    config = run_dir / "config.yaml"
    try:
        model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
        path, transformer = model["path"], model.get("transformer")
        if not isinstance(path, str) or not isinstance(transformer, str | None):
            raise TypeError(f"model.path is {path!r}, model.transformer {transformer!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigurationError(
            f"{config} cannot be read ({type(error).__name__}: {error}); expected a run's "
            "configuration, with model.path"
        ) from error
    if path == "digits":
        raise ConfigurationError(
            f"MODEL is {str(run_dir)!r}, a run of the embedded digits model; expected one of FLUX, "
            f"with nothing else does `g2rpo sample` draw. Its samples are in {run_dir / 'samples'}"
        )
    chosen = choose_checkpoint(run_dir, checkpoint, "MODEL")
    is_lora = (chosen / "lora").is_dir()
    inside = AVERAGE if ema else "lora" if is_lora else "transformer"
    if ema and not (chosen / inside).is_dir():
        raise ConfigurationError(
            f"--ema is given, but {chosen} has no moving average; expected a run that keeps one "
            "(train.ema), or no --ema"
        )
    weights = chosen / inside / (LORA if is_lora else FULL)
    if not weights.is_file():
        raise ConfigurationError(f"{weights} is missing; expected a whole checkpoint in {chosen}")
    base = _file("model.transformer", transformer, FULL) if is_lora else weights
    with renamed({"model.path": f"model.path (in {config})"}):
        folder = resolve_folder(path, transformer_weights=base is None)
    return Source(
        folder,
        str(folder.resolve()) if Path(path).expanduser().exists() else path,
        base and base.resolve(),
        weights.resolve() if is_lora else None,
        run_dir / f"samples-{chosen.name}{'-ema' if ema else ''}",
    )


def _file(argument: str, value: str | None, name: str) -> Path | None:
    """A .safetensors file, or the one called `name` in a folder, or else the only one there."""
    if value is None:
        return None
    place = Path(value).expanduser()
    if place.is_dir():
        found = sorted(place.glob("*.safetensors"))
        if (place / name).is_file():
            place = place / name
        elif len(found) == 1:
            place = found[0]
        else:
            deeper = [str(p) for p in sorted(place.rglob(name))]
            raise ConfigurationError(
                f"{argument} is {value!r}, with {len(found)} .safetensors files in it; expected "
                f"one, or {name} among them" + (f"; perhaps {deeper[0]}" if deeper else "")
            )
    if not place.is_file() or place.suffix != ".safetensors":
        raise ConfigurationError(
            f"{argument} is {value!r}; expected a .safetensors file that exists, or its folder"
        )
    return place.resolve()


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors that name keys of a configuration name the arguments, by which they came, instead."""
    try:
        yield
    except ConfigurationError as error:
        text = str(error)
        for key, argument in names.items():
            text = text.replace(key, argument)
        raise ConfigurationError(text) from error


def snippet(
    source: Source,
    prompt: str,
    *,
    steps: int,
    guidance: float,
    height: int,
    width: int,
    max_sequence_length: int,
    seed: int,
    dtype: str,
    device: str,
    offload: bool = False,
) -> str:
    """Lines of Python that draw one image and save it as image.png, by diffusers alone."""
    lines = ["import torch", "from diffusers import FluxPipeline"]
    if source.transformer is not None:
        lines.append("from safetensors.torch import load_file")
    place = "" if offload else f'.to("{device}")'
    lines.append(
        f"\npipe = FluxPipeline.from_pretrained({_quoted(source.model)}, "
        f"torch_dtype=torch.{dtype}){place}"
    )
    if source.transformer is not None:
        file = _quoted(source.transformer)
        lines.append(f"pipe.transformer.load_state_dict(load_file({file}), strict=True)")
    if source.lora is not None:
        name = "" if source.lora.name == LORA else f", weight_name={_quoted(source.lora.name)}"
        lines.append(f"pipe.load_lora_weights({_quoted(source.lora.parent)}{name})")
    if offload:
        lines.append(f'pipe.enable_model_cpu_offload(device="{device}")')
    lines.append(
        f"pipe({_quoted(prompt)}, num_inference_steps={steps}, guidance_scale={guidance}, "
        f"max_sequence_length={max_sequence_length}, height={height}, width={width}, "
        f'generator=torch.Generator().manual_seed({seed})).images[0].save("image.png")'
    )
    return "\n".join(lines)


def _quoted(value: str | Path) -> str:
    return json.dumps(str(value), ensure_ascii=False)  # a string of Python's as well
