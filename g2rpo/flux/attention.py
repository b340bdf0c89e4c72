"""Which attention serves FLUX on this GPU: measured once, through diffusers' own dispatcher.

PyTorch picks flash attention 2 first, whatever the card; on some others are faster. What was found
is kept in the user's cache, by GPU, versions and sizes, and in the run's config.yaml, so that a
resumed run has the bits of the one it goes on with.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigurationError
from ..metrics import write_beside
from .quiet import quiet

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

# model.attention -> diffusers' name; the order in which they are tried.
BACKENDS = {
    "cudnn": "_native_cudnn",
    "flash-attn-3": "_flash_3",
    "flash-attn": "flash",
    "flash": "_native_flash",
    "efficient": "_native_efficient",
    "math": "_native_math",
}
CACHE = "attention.json"

Sizes = tuple[int, int, int, int]  # batch, tokens, heads, width of a head


def set_attention(
    transformer: FluxTransformer2DModel,
    name: str,
    batch: int,
    tokens: int,
    on_message: Callable[[str], None] = print,
    cache_dir: Path | None = None,
) -> str:
    """Have the transformer use the attention of that name, or with "auto" the fastest there is.

    batch, tokens: of the completions' forwards, text tokens included. Returns the name that is used
    now: one of BACKENDS, or "native" on a CPU, where torch itself decides.

    Raises ConfigurationError when the one that was asked for does not run here.
    """
    device, dtype = transformer.device, transformer.dtype
    config = transformer.config
    sizes = (batch, tokens, config.num_attention_heads, config.attention_head_dim)
    if name == "auto":
        if device.type != "cuda":
            name = "native"
        else:
            name = _fastest(sizes, dtype, device, on_message, cache_dir)
    elif name != "native":
        fault = try_backend(name, (1, *sizes[1:]), dtype, device)
        if fault is not None:
            raise ConfigurationError(
                f"model.attention is {name!r}, which does not run on {device} in {dtype}: {fault}; "
                "expected 'auto', or one that does"
            )
    with quiet("diffusers"):
        transformer.set_attention_backend(BACKENDS.get(name, name))
    return name


def try_backend(
    name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> str | None:
    """None if it computes attention and its gradient there, or else why not, in a line."""
    try:
        q, k, v = _inputs(sizes, dtype, device)
        _attend(name, q.requires_grad_(), k, v).sum().backward()
        if not bool(q.grad.isfinite().all()):
            return "its gradient is not finite"
    except Exception as error:  # each has its own way of saying that it is not there
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return None


def _fastest(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    on_message: Callable[[str], None],
    cache_dir: Path | None,
    measure: Callable[..., float] | None = None,
) -> str:
    import diffusers
    import platformdirs

    file = (cache_dir or Path(platformdirs.user_cache_dir("g2rpo"))) / CACHE
    key = " ".join(
        str(part)
        for part in (torch.cuda.get_device_name(device), torch.__version__, diffusers.__version__,
                     dtype, *sizes)
    )  # fmt: skip
    known = _read(file)
    if known.get(key) in BACKENDS:
        return known[key]
    times = {}
    for name in BACKENDS:
        if try_backend(name, (1, *sizes[1:]), dtype, device) is None:
            times[name] = (measure or milliseconds)(name, sizes, dtype, device)
    if not times:
        raise ConfigurationError(
            f"model.attention is 'auto', and none of {', '.join(BACKENDS)} runs on {device} in "
            f"{dtype}"
        )
    best = min(times, key=times.__getitem__)
    told = ", ".join(f"{name} {time:.2f} ms" for name, time in sorted(times.items(), key=_time))
    on_message(f"Attention: {best} (at batch {sizes[0]}, {sizes[1]} tokens: {told})")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_beside(file, json.dumps({**_read(file), key: best}, indent=1).encode())
    return best


def _time(item: tuple[str, float]) -> float:
    return item[1]


def _read(file: Path) -> dict[str, str]:
    """What is in the cache; a damaged one is measured anew, which costs a second."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def milliseconds(
    name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int = 10
) -> float:
    """Median time of one forward, in ms, by the GPU's clock."""
    q, k, v = _inputs(sizes, dtype, device)
    found = []
    with torch.no_grad():
        for round_ in range(rounds + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            _attend(name, q, k, v)
            end.record()
            end.synchronize()
            if round_ >= 3:
                found.append(start.elapsed_time(end))
    return statistics.median(found)


def _inputs(
    sizes: Sizes, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, heads, width = sizes
    generator = torch.Generator(device).manual_seed(0)
    shape, options = (batch, tokens, heads, width), {"dtype": dtype, "device": device}
    q, k, v = (torch.randn(shape, generator=generator, **options) for _ in range(3))
    return q, k, v


def _attend(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _check_attention_backend_requirements,
        dispatch_attention_fn,
    )

    backend = AttentionBackendName(BACKENDS[name])
    _check_attention_backend_requirements(backend)
    return dispatch_attention_fn(q, k, v, backend=backend)
