"""A component's weights, from their files to where they are used, without a second copy in memory.

The model is built without memory (on the meta device); then each tensor is read in pieces of 16 MiB
straight into its place on the device, converted on the way. Beside the weights themselves, host
memory holds one such piece: FLUX.1-dev in bfloat16 takes 24 GB of the GPU and next to nothing of
the host, from shards, from a float32 file of twice the size, or from the checkpoint of a run.

Files are read, not mapped: a mapped file counts as memory while it is in use, and parameters that
are views of it would change or crash when the file does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .files import Stored, component, read_header, read_json, weight_files

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel

PIECE = 16 * 2**20  # bytes read at a time
SHOWN = 4  # keys of a list that an error spells out
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

ModelT = TypeVar("ModelT", bound=nn.Module)


def _nothing(count: int) -> None:
    pass


def load_transformer(
    folder: Path,
    weights: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int], None] = _nothing,
) -> FluxTransformer2DModel:
    """The transformer of a pipeline folder, in eval mode, every parameter trainable.

    The same bits as `FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer",
    torch_dtype=dtype)`. weights: a .safetensors file with all its weights, in any floating dtype,
    that is read instead of the folder's, which need not be there then. on_bytes: called with the
    number of bytes after each piece that was read.

    Raises ConfigurationError when a file is missing or damaged, or its tensors are not the model's.
    """
    from diffusers import FluxTransformer2DModel

    place = component(folder, "transformer")
    if weights is None:
        files = weight_files(place)
    else:
        files = [check_weights_file(weights)]
    name = place if weights is None else f"model.transformer is {str(weights)!r}, which"
    return _load(FluxTransformer2DModel, place, files, str(name), dtype, device, on_bytes)


def check_weights_file(weights: Path) -> Path:
    """The file itself. Raises ConfigurationError when it is none, or not a .safetensors file."""
    if weights.suffix != ".safetensors" or not weights.is_file():
        inside = sorted(weights.rglob("*.safetensors"))  # none of what is no folder
        hint = f"; perhaps {inside[0]}" if inside else ""
        raise ConfigurationError(
            f"model.transformer is {str(weights)!r}; expected a .safetensors file with all of "
            f"the transformer's weights{hint}"
        )
    return weights


def load_vae(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int], None] = _nothing,
) -> AutoencoderKL:
    """The autoencoder of a pipeline folder, in the same way, but without a trainable parameter."""
    from diffusers import AutoencoderKL

    place = component(folder, "vae")
    files = weight_files(place)
    model = _load(AutoencoderKL, place, files, str(place), dtype, device, on_bytes)
    return model.requires_grad_(False)


def weights_bytes(files: Sequence[Path]) -> int:
    """Bytes of all tensors in these .safetensors files: what on_bytes will add up to."""
    return sum(tensor.bytes for file in files for tensor in read_header(file).values())


def _load(
    model_class: type[ModelT],
    place: Path,
    files: Sequence[Path],
    name: str,  # how an error begins
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int], None],
) -> ModelT:
    headers = {file: read_header(file) for file in files}
    model = _skeleton(model_class, place, dtype)
    expected = model.state_dict()
    _check(model_class, expected, headers, name, place)
    in_float32 = getattr(model_class, "_keep_in_fp32_modules", None) or []
    state = {}
    buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for file, header in headers.items():
        with file.open("rb", buffering=0) as opened:
            for key, stored in sorted(header.items(), key=lambda item: item[1].offset):
                kept = any(part in key.split(".") for part in in_float32)
                target = torch.float32 if kept else dtype
                state[key] = torch.empty(stored.shape, dtype=target, device=device)
                _read(opened, file, stored, state[key], buffer, on_bytes)
    model.load_state_dict(state, assign=True)
    for part in model.modules():  # what is in no file was computed while the skeleton was built
        for key, value in part.named_buffers(recurse=False):
            setattr(part, key, value.to(device))
    return model.eval()


def _skeleton(model_class: type[ModelT], place: Path, dtype: torch.dtype) -> ModelT:
    """The model of a config.json, its parameters without memory."""
    from accelerate import init_empty_weights

    config = read_json(place / "config.json")
    kind = config.get("_class_name")
    if kind != model_class.__name__:
        raise ConfigurationError(
            f"{place / 'config.json'} is of a {kind}; expected a {model_class.__name__}"
        )
    if config.get("quantization_config") is not None:
        raise ConfigurationError(
            f"{place / 'config.json'} is of quantized weights, which cannot be trained; expected "
            "those in bfloat16 or float32"
        )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does: of buffers that are in no file
    try:
        with init_empty_weights():
            return model_class.from_config(config)
    finally:
        torch.set_default_dtype(default)


def _read(
    opened: FileIO,
    file: Path,
    stored: Stored,
    target: Tensor,
    buffer: Tensor,  # [PIECE] uint8 on the host
    on_bytes: Callable[[int], None],
) -> None:
    """One tensor into its place, piece by piece."""
    flat = target.view(-1)
    source = DTYPES[stored.dtype]
    view = memoryview(buffer.numpy())
    opened.seek(stored.offset)
    for start in range(0, stored.bytes, PIECE):
        size = min(PIECE, stored.bytes - start)
        filled = 0
        while filled < size:
            count = opened.readinto(view[filled:size])
            if not count:
                raise ConfigurationError(
                    f"{file} ends before its tensors do; it was cut short while it was read"
                )
            filled += count
        first, last = start // source.itemsize, (start + size) // source.itemsize
        flat[first:last].copy_(buffer[:size].view(source))
        on_bytes(size)


def _check(
    model_class: type[nn.Module],
    expected: Mapping[str, Tensor],
    headers: Mapping[Path, Mapping[str, Stored]],
    name: str,
    place: Path,
) -> None:
    """Every key once, in its shape, as floating numbers; or one error that says what is not."""
    found: dict[str, Stored] = {}
    twice = []
    for header in headers.values():
        twice += [key for key in header if key in found]
        found.update(header)
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    known = {key: stored for key, stored in found.items() if key in expected}
    shapes = [
        f"{key} is {list(stored.shape)}, expected {list(expected[key].shape)}"
        for key, stored in known.items()
        if stored.shape != tuple(expected[key].shape)
    ]
    dtypes = [
        f"{key} is {stored.dtype}, expected one of {', '.join(DTYPES)}"
        for key, stored in known.items()
        if stored.dtype not in DTYPES
    ]
    faults = {
        f"of its {len(expected)} keys are missing": missing, "keys are not the model's": unexpected,
        "have another shape": shapes, "are not floating numbers": dtypes,
        "are there more than once": twice,
    }  # fmt: skip
    if not any(faults.values()):
        return
    told = "; ".join(
        f"{len(keys)} {fault} ({_some(keys)})" for fault, keys in faults.items() if keys
    )
    raise ConfigurationError(
        f"{name} does not fit the {model_class.__name__} of {place / 'config.json'}: {told}. "
        f"{_guess(missing, unexpected, shapes, dtypes)}"
    )


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")


def _guess(
    missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str]
) -> str:
    """What the file probably is, and what to do."""
    strange = " ".join(unexpected)
    if "lora_" in strange or ".lora." in strange:
        return "It looks like LoRA adapters; expected the whole transformer's weights"
    if "double_blocks." in strange:
        return (
            "It looks like a single-file checkpoint (ComfyUI's and the FLUX authors' own format); "
            "load it with diffusers' FluxTransformer2DModel.from_single_file and save_pretrained it"
        )
    if any(mark in strange for mark in (".absmax", "scale", "quant")) or dtypes:
        return "It looks quantized; expected weights in bfloat16 or float32"
    other = [*missing, *unexpected]
    if other and all("guidance_embedder" in key for key in other) and not shapes:
        return (
            "One of the two is FLUX.1-dev, with guidance embeddings, the other FLUX.1-schnell, "
            "without"
        )
    if shapes and all(key.startswith("x_embedder") for key in shapes):
        return "One of the two is a FLUX that takes a further image as input (Fill, Depth, Canny)"
    wrappers = ("module.", "_orig_mod.", "transformer.", "model.", "base_model.")
    if unexpected and all(key.startswith(wrappers) for key in unexpected):
        return "Its keys have a prefix, as of a wrapped model; save the transformer itself"
    return "It is perhaps of another FLUX variant or another component"
