"""Which backends this installation has: the native extension, Triton, and why one is missing.

Called once, when the package has defined its ops. Nothing here touches a GPU: whether kernels run
on one is asked at its first use, by the probes.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from . import _library
from .native import native_implementations
from .optim import native as native_optim

REBUILD = "reinstall g2rpo from source where nvcc is (G2RPO_BUILD=cuda)"


def load_backends() -> None:
    """Add every backend that is there; keep the reason for every one that is not."""
    extension = _load_extension()
    if extension is not None:
        _add("cpu", native_implementations(extension.cpu, cuda=False), _probe_cpu)
        native_optim.EXTENSIONS["cpu"] = extension.cpu
        if hasattr(extension, "cuda"):
            probe = _cuda_probe(extension.cuda)
            _add("cuda", native_implementations(extension.cuda, cuda=True), probe)
            native_optim.EXTENSIONS["cuda"] = extension.cuda
        else:
            why = _left_out("cuda") or "G2RPO_BUILD asked for none"
            _library._absent["cuda"] = f"the extension was built without CUDA ({why}); {REBUILD}"
    if importlib.util.find_spec("triton") is None:
        _library._absent["triton"] = "triton is not installed: pip install triton"
    else:
        _add("triton", {name: _TritonLater(name) for name in _library._ops}, _probe_triton)


def build_facts() -> dict | None:
    """What the build wrote down of itself; None where nothing was built."""
    try:
        return json.loads(Path(__file__).with_name("_build.json").read_text())
    except FileNotFoundError:
        return None


def _add(backend: str, implementations: dict[str, Callable], probe: Callable) -> None:
    for name, implementation in implementations.items():
        _library.add_backend(name, backend, implementation)
    _library.set_probe(backend, probe)


def _load_extension() -> ModuleType | None:
    name = f"{__package__}._C"
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            why = _left_out("extension") or "reinstall g2rpo where a C++17 compiler is"
            reason = f"the native extension was not built: {why}"
        else:
            reason = f"the native extension {name} is there but does not load: {error}"
            warnings.warn(f"g2rpo_kernels: {reason}", RuntimeWarning, stacklevel=2)
        _library._absent.update(cpu=reason, cuda=reason)
        return None


def _left_out(what: str) -> str:
    """Why the build left something out, in its own words; empty if it did not say."""
    left_out = (build_facts() or {}).get("left_out", [])
    return "; ".join(item["why"] for item in left_out if what in item["what"].lower())


def _probe_cpu(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"it runs on CPUs; expected CPU tensors, not {device}"


def _cuda_probe(extension: ModuleType) -> Callable[[torch.device], str | None]:
    """Launches an empty kernel: a static CUDA runtime imports without a driver or a GPU."""

    def probe(device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"it runs on NVIDIA GPUs; expected CUDA tensors, not {device}"
        missing = _no_gpu()
        if missing is not None:
            return missing
        error = extension.probe(device.index or 0)
        if error is None:
            return None
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"no kernel runs on {torch.cuda.get_device_name(device)} (compute capability "
            f"{major}.{minor}): {error}; the extension has code for {extension.archs}; to add this "
            f"one, {REBUILD} with G2RPO_CUDA_ARCHS={major}{minor}"
        )

    return probe


def _no_gpu() -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without GPU support"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _probe_triton(device: torch.device) -> str | None:
    if interpreting():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 is for CPU tensors"
    if device.type != "cuda":
        return f"it runs on GPUs; expected CUDA tensors, not {device} (or set TRITON_INTERPRET=1)"
    missing = _no_gpu()
    if missing is not None:
        return missing
    try:
        importlib.import_module(f"{__package__}.triton")
    except ImportError as error:
        return f"triton is installed but does not load: {error}"
    return None


class _TritonLater:
    """An op's Triton launcher, imported at its first call: triton takes a second to import."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.launcher: Callable | None = None

    def __call__(self, *arguments, **options):
        if self.launcher is None:
            module = importlib.import_module(f"{__package__}.triton")
            self.launcher = module.IMPLEMENTATIONS[self.name]
        return self.launcher(*arguments, **options)
