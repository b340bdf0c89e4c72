"""A copy of the checkout, to be built there, and empty virtual environments to install it into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("g2rpo", "g2rpo_kernels")
FOLDERS = (*PACKAGES, "csrc", "docs", "examples", "tests", "benchmarks", ".ci")
# What a build writes into g2rpo_kernels/, in a wheel as in a working checkout.
EXTENSIONS = {f"g2rpo_kernels/_C{suffix}" for suffix in EXTENSION_SUFFIXES}
GENERATED = EXTENSIONS | {"g2rpo_kernels/_build.json"}

# A make, a PYTHONPATH or a choice of build around a test run must not reach what it starts.
OUTER = {"PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
OUTER |= {"G2RPO_BUILD", "G2RPO_CUDA_ARCHS"}


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """The finished command; its output is the message if it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in OUTER}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def files_under(folder: Path) -> set[str]:
    """Paths below `folder`, package by package, without bytecode and what a build generates."""
    found = (path for name in PACKAGES for path in (folder / name).rglob("*") if path.is_file())
    names = {str(p.relative_to(folder)) for p in found if "__pycache__" not in p.parts}
    return names - GENERATED


def copy_checkout(tree: Path) -> Path:
    """What git would have of the checkout, in the empty folder `tree`."""
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
    for entry in ROOT.iterdir():
        if entry.is_file():
            shutil.copy(entry, tree)
        elif entry.name in FOLDERS:
            shutil.copytree(entry, tree / entry.name, ignore=skip)
    return tree


def built_checkout(factory: pytest.TempPathFactory) -> Path:
    """A copy with dist/ (the sdist, and the wheel made from it) and dist-tree/ (a wheel of itself).

    The first wheel has all that this machine can compile, for one architecture; the other nothing.
    """
    # pytest-xdist's workers each have a folder in a common one: whoever comes first builds for all.
    base = factory.getbasetemp()
    tree = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built-checkout"
    with FileLock(f"{tree}.lock"):
        if not tree.exists():
            unfinished = tree.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            _build(copy_checkout(unfinished))
            unfinished.rename(tree)
    return tree


def _build(tree: Path) -> None:
    # What lies about in a working checkout and belongs in no wheel.
    litter = ["benchmarks/__init__.py", "build/lib/g2rpo/litter.py", "runs/digits/litter.py"]
    for path in [*litter, *GENERATED]:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text("")
    build = [sys.executable, "-m", "build", "--no-isolation"]
    run(*build, cwd=tree, G2RPO_CUDA_ARCHS="90, 90")
    shutil.rmtree(tree / "build")  # setuptools would reuse it; `make dist` builds from the sdist
    run(*build, "--wheel", "--outdir", "dist-tree", cwd=tree, G2RPO_BUILD="off")


def empty_environment(folder: Path) -> Path:
    """Python of a new virtual environment: nothing installed, this one's packages behind it."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    # Plain folders, behind site-packages itself and without the .pth files in them: torch is found
    # there, an editable install of the checkout is not.
    borrowed = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    borrowed.append(str(Path(torch.__file__).parent.parent))
    (site / "borrowed.pth").write_text("\n".join(dict.fromkeys(borrowed)) + "\n")
    return folder / "bin" / "python"


def pip_install(python: Path, *what: str | Path, **environment: str) -> None:
    """Install with this environment's pip and build requirements, and nothing from an index."""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    pip += ["--no-deps", "--no-build-isolation"]
    run(*pip, *what, cwd=python.parent, **environment)
