"""The packages that g2rpo's features need, and whether they work here; for `g2rpo doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

TRAIN = "pip install 'g2rpo[train]'"
TEST = "pip install 'g2rpo[test,bench]'"


@dataclass(frozen=True)
class Package:
    """A package that some feature needs. `uses`: a name behind which its lazy import waits."""

    module: str
    needed_for: str
    get: str
    distribution: str = ""
    uses: str = ""


@dataclass(frozen=True)
class Found:
    """What there is of a package: no version means not installed, an error that it is broken."""

    version: str | None = None
    error: str = ""

    @property
    def works(self) -> bool:
        return self.version is not None and not self.error


PACKAGES = (
    Package("diffusers", "training", TRAIN, uses="FluxTransformer2DModel"),
    Package("tokenizers", "training: the miniature FLUX", TRAIN),
    Package("transformers", "training: FLUX's text encoders", TRAIN, uses="T5EncoderModel"),
    Package("accelerate", "training", TRAIN),
    Package("safetensors", "training: checkpoints", TRAIN),
    Package("httpx2", "training: a judge over HTTP", TRAIN),
    Package("anyio", "training: a judge over HTTP", TRAIN),
    Package("huggingface_hub", "training: FLUX from the hub", TRAIN),
    Package("peft", "training: LoRA", TRAIN),
    Package("jsonargparse", "training: configuration", TRAIN),
    Package("yaml", "training: configuration", TRAIN, "PyYAML"),
    Package("numpy", "training", TRAIN),
    Package("filelock", "training: one process a run", TRAIN),
    Package("platformdirs", "training: the digits model's cache", TRAIN),
    Package("scipy", "training: intervals of evaluations", TRAIN),
    Package("sklearn", "training digits: scans and judges", TRAIN, "scikit-learn"),
    Package("threadpoolctl", "training digits: the same bits everywhere", TRAIN),
    Package("matplotlib", "training: curves.png", TRAIN),
    Package("PIL", "training: grids of samples", TRAIN, "pillow"),
    Package("jinja2", "training: report.html", TRAIN),
    Package("rich", "training: progress", TRAIN),
    Package("triton", "the triton backend, on GPUs", "comes with torch's CUDA builds for Linux"),
    Package("flash_attn", "model.attention flash-attn", "pip install 'g2rpo[flash]'", "flash-attn"),
    Package("bitsandbytes", "optimizer.name bitsandbytes", "pip install 'g2rpo[bnb]'"),
    Package("torchao", "optimizer.name torchao", "pip install 'g2rpo[torchao]'"),
    Package("tensorboard", "train.tracker tensorboard", "pip install tensorboard"),
    Package("wandb", "train.tracker wandb", "pip install wandb"),
    Package("trackio", "train.tracker trackio", "pip install trackio"),
    Package("pytest", "tests", TEST),
    Package("pytest_benchmark", "benchmarks under pytest", TEST, "pytest-benchmark"),
)


def first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def probe(package: Package, load: Callable = importlib.import_module) -> Found:
    """Import a package for real: that it is installed does not mean that it works here."""
    if package.module not in sys.modules and importlib.util.find_spec(package.module) is None:
        return Found()
    try:
        version = importlib.metadata.version(package.distribution or package.module)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    try:
        module = load(package.module)
        if package.uses:
            getattr(module, package.uses)
    except Exception as error:  # an ImportError, or whatever its initialisation raises
        return Found(version, first_line(error))
    return Found(version)
