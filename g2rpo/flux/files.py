"""Where a FLUX pipeline's files are, and whether they are whole, before anything large is read.

A pipeline is a folder as diffusers writes it: model_index.json, and a folder for each component
with its config.json and its weights, in one .safetensors file or in shards with an index. It lies
on this machine, or on the Hugging Face hub under an id such as black-forest-labs/FLUX.1-dev.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigurationError

COMPONENTS = (
    "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae",
)  # fmt: skip
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers, transformers
HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Bytes of one element, by safetensors' names.
SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor in a .safetensors file."""

    dtype: str  # safetensors' name, one of SIZES
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    bytes: int


def resolve_folder(
    path: str, transformer_weights: bool = True, text_encoder_weights: bool = True
) -> Path:
    """model.path -> the folder of a FluxPipeline, downloaded from the hub where it is a hub id.

    What the hub's cache holds is not downloaded again. transformer_weights, text_encoder_weights:
    False spares the download of 24 and of 10 GB, where a run has others or embeddings already.

    Raises ConfigurationError, which says how to mend it.
    """
    folder = Path(path).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(path):
        spared = [] if transformer_weights else ["transformer"]
        spared += [] if text_encoder_weights else ["text_encoder", "text_encoder_2"]
        folder = _download(path, spared)
    elif not folder.is_dir():
        raise ConfigurationError(
            f"model.path is {path!r}, which is no folder here; expected a folder with a "
            "model_index.json, or a hub id such as black-forest-labs/FLUX.1-dev"
        )
    index = folder / "model_index.json"
    if not index.is_file():
        only = folder / "config.json"
        hint = ""
        if only.is_file() and read_json(only).get("_class_name") == "FluxTransformer2DModel":
            hint = (
                ". This is a transformer alone: give its .safetensors file as model.transformer, "
                "and the pipeline it belongs to as model.path"
            )
        raise ConfigurationError(
            f"model.path is {path!r}, a folder without model_index.json; expected that of a whole "
            f"FLUX pipeline, as diffusers saves it{hint}"
        )
    kind = read_json(index).get("_class_name")
    if kind != "FluxPipeline":
        raise ConfigurationError(
            f"model.path is {path!r}, a {kind} by its model_index.json; expected a FluxPipeline, "
            "such as black-forest-labs/FLUX.1-dev"
        )
    return folder


def _download(name: str, without_weights: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    # By component: FLUX.1-dev's repository also has the same weights in its authors' own format.
    files = [
        f"{component}/*.{suffix}"
        for component in COMPONENTS
        for suffix in ("json", "txt", "model", "safetensors")
        if suffix != "safetensors" or component not in without_weights
    ]
    at = f"model.path is {name!r}, a Hugging Face hub id since there is no such folder here"
    try:
        return Path(snapshot_download(name, allow_patterns=["model_index.json", *files]))
    except Exception as error:  # of the hub, of the network's library, of the disk: all are told
        gated = isinstance(error, GatedRepoError) or 403 in _statuses(error)
        if gated:
            text = (
                "this machine may not download it; accept its licence at "
                f"https://huggingface.co/{name}, then run `hf auth login` with that account's token"
            )
        elif isinstance(error, RepositoryNotFoundError) or 404 in _statuses(error):
            text = (
                "the hub has no such repository, or shows it only to some; check the spelling, and "
                "run `hf auth login` if it is private"
            )
        else:
            text = (
                "it could not be downloaded and is not (wholly) in the hub's cache; expected a "
                "network connection (and HF_HUB_OFFLINE not set), or a folder that was copied "
                f"here. The hub's client says: {' '.join(str(error).split())}"
            )
        raise ConfigurationError(f"{at}: {text}") from error


def _statuses(error: BaseException | None) -> Iterator[int]:
    """HTTP statuses of an error and of those it was raised from."""
    while error is not None:
        yield getattr(getattr(error, "response", None), "status_code", 0)
        error = error.__cause__


def component(folder: Path, name: str) -> Path:
    """The folder of a component, which has its configuration. Raises ConfigurationError if not."""
    found = folder / name
    config = {"scheduler": "scheduler_config.json"}.get(name, "config.json")
    if name.startswith("tokenizer"):
        config = "tokenizer_config.json"
    if not (found / config).is_file():
        raise ConfigurationError(
            f"{found / config} is missing; expected the {name} of a FLUX pipeline: "
            f"{_mend(found / config)}"
        )
    return found


def weight_files(component: Path) -> list[Path]:
    """The .safetensors files that hold a component's weights, each of them whole.

    Sharded weights are those of the index. Only headers are read. Raises ConfigurationError naming
    the file that is missing or damaged.
    """
    for name in WEIGHTS:
        index = component / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
        if (component / name).exists():
            read_header(component / name)
            return [component / name]
    kinds = (".bin", ".pt", ".safetensors")
    others = sorted(path.name for path in component.glob("*") if path.suffix in kinds)
    raise ConfigurationError(
        f"{component} has no weights (it has {others or 'no file of weights at all'}); expected "
        f"{' or '.join(WEIGHTS)}, whole or in shards with an index: {_mend(component / WEIGHTS[0])}"
    )


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ConfigurationError(
            f"{index} has no weight_map, from keys to files; it is damaged: {_mend(index)}"
        )
    files = {}
    for name in dict.fromkeys(places.values()):
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigurationError(f"{index} names the file {name!r}; expected one beside it")
        files[name] = set(read_header(index.with_name(name)))
    unknown = [key for key, name in places.items() if key not in files[name]]
    if unknown:
        key = unknown[0]
        more = f", nor {len(unknown) - 1} more of its keys" if len(unknown) > 1 else ""
        raise ConfigurationError(
            f"{index} says that {places[key]} holds {key!r}, which it does not{more}; the index "
            f"and its files are not of one download: {_mend(index)}"
        )
    return [index.with_name(name) for name in sorted(files)]


def read_header(file: Path) -> dict[str, Stored]:
    """What a .safetensors file holds, from its first bytes, checked against its size.

    Raises ConfigurationError when it is missing, or not what its header says.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            beginning = opened.read(8)
            length = int.from_bytes(beginning, "little")
            text = opened.read(length) if length <= min(size - 8, HEADER_LIMIT) else b""
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read ({error}): {_mend(file)}") from error
    if beginning.startswith(b"version "):
        raise ConfigurationError(
            f"{file} is a pointer of git-lfs, not the file; run `git lfs pull` in its repository"
        )
    if size == 0:
        raise ConfigurationError(f"{file} is empty: {_mend(file)}")
    try:
        header = json.loads(text)
        stored = {}
        for key, entry in header.items():
            if key == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            tensor = Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + start, stop - start)
            if start < 0 or tensor.bytes != SIZES[tensor.dtype] * math.prod(tensor.shape):
                found = f"{tensor.dtype} {tensor.shape}"
                raise ValueError(f"{key} has {tensor.bytes} bytes for {found}")
            stored[key] = tensor
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{file} has no readable header of a .safetensors file ({type(error).__name__}: "
            f"{error}); it is damaged or another kind of file: {_mend(file)}"
        ) from error
    expected = max([8 + length, *(tensor.offset + tensor.bytes for tensor in stored.values())])
    if size != expected:
        raise ConfigurationError(
            f"{file} has {size:,} bytes; expected {expected:,} by its header. It was not "
            f"downloaded or copied whole: {_mend(file)}"
        )
    return stored


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a pipeline. Raises ConfigurationError naming the file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} cannot be read ({error}): {_mend(file)}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{file} holds no JSON object: {_mend(file)}")
    return found


def _mend(file: Path) -> str:
    """How to get a file again: from the hub, where it lies in the hub's cache."""
    for parent in file.parents:
        if parent.name.startswith("models--") and "snapshots" in file.parts:
            inside = file.relative_to(parent).parts[2:]  # snapshots/<revision>/...
            name = parent.name.removeprefix("models--").replace("--", "/")
            return f"run `hf download {name} {'/'.join(inside)} --force-download`"
    return "copy or download it again (`hf download`, from the hub)"
