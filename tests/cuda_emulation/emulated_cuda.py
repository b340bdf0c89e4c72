"""Builds csrc/*.cu for the CPU and makes them the `cuda` backend, for CPU tensors.

As a pytest plugin (`-p emulated_cuda`, with G2RPO_EMULATION naming the built module) it makes this
backend the only target of the op tests.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from g2rpo_kernels import _library, native
from g2rpo_kernels.optim import native as native_optim

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
VARIABLE = "G2RPO_EMULATION"


# A 16-byte access that is not aligned ends the process, as it would on a GPU.
CAREFUL = ["-fsanitize=alignment", "-fno-sanitize-recover=all"]
ADAMW8BIT = {HERE / f"{name}.cpp": ["-O1", *CAREFUL] for name in ("control", "entry_adamw8bit")}


def build(folder: Path) -> Path:
    """Compile the extension with the emulated kernels; skip where that cannot be done."""
    pybind11 = pytest.importorskip("pybind11", reason="builds the extension's bindings")
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    built = ["-DG2RPO_CUDA", '-DG2RPO_CUDA_ARCHS="none"', '-DG2RPO_NVCC_VERSION="none"']
    sources = {
        CSRC / "bindings.cpp": ["-O0", *python, *built],
        HERE / "entry.cpp": ["-O1", *CAREFUL],
        **ADAMW8BIT,
        CSRC / "cpu.cpp": ["-O0"],  # only there to be linked, as is the next
        CSRC / "adamw8bit.cpp": ["-O0"],
    }
    return compile_library(sources, folder / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}")


def build_adamw8bit(folder: Path) -> Path:
    """A library of entry_adamw8bit.cpp alone, for ctypes: a fifth of the time of `build`."""
    return compile_library(ADAMW8BIT, folder / "adamw8bit.so")


def compile_library(sources: dict[Path, list[str]], library: Path) -> Path:
    """sources: with flags of their own. Skips where this cannot be done."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sysconfig.get_platform().split("-")[0] != "linux":
        pytest.skip("the emulation of CUDA needs Linux and g++")
    flags = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    flags += [f"-I{HERE}", f"-I{CSRC}"]
    objects = {source: str(library.parent / f"{source.stem}.o") for source in sources}
    running = {
        source: subprocess.Popen(
            [compiler, *flags, *own, "-c", str(source), "-o", objects[source]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for source, own in sources.items()
    }
    for source, process in running.items():
        output, _ = process.communicate()
        assert process.returncode == 0, f"{source.name} does not compile:\n{output}"
    linked = [compiler, "-shared", *CAREFUL, *objects.values(), "-o", str(library)]
    subprocess.run(linked, check=True)
    return library


def load(library: Path) -> ModuleType:
    """The extension's submodule `cuda`."""
    loader = importlib.machinery.ExtensionFileLoader("_C", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(module)
    return module.cuda


class Launchers(native._Launchers):
    """The package's own, but with device 0 and a null stream for CPU tensors."""

    def where(self, x: torch.Tensor) -> tuple[int, int]:
        return 0, 0


def install(ops: ModuleType) -> None:
    launchers = Launchers(ops, cuda=True)
    for name in _library._ops:
        if hasattr(launchers, name):
            _library.add_backend(name, "cuda", getattr(launchers, name))
    native_optim.EXTENSIONS["cuda"] = ops
    _library.set_probe("cuda", lambda device: None)


def poison(on: bool) -> None:
    """Outputs and scratch start as NaN, so that what a kernel leaves out shows.

    What torch.use_deterministic_algorithms does, less its import of the compiler: four seconds.
    """
    torch._C._set_deterministic_algorithms(on, warn_only=False)


def _become_the_only_target(library: str) -> None:
    import cases

    install(load(Path(library)))
    cases.targets = lambda: [cases.Target("cuda", "cpu")]
    poison(True)


if VARIABLE in os.environ:  # on import, which for a plugin is before any conftest.py
    _become_the_only_target(os.environ[VARIABLE])
