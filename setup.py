"""The build's programmable half: compiles g2rpo_kernels._C with CMake, or says why it did not.

Names, dependencies and package data are static, in pyproject.toml; CMakeLists.txt lists the native
sources and finds the compilers. Environment variables:

    G2RPO_BUILD        auto (default)  all that this machine can compile; it installs without, too
                       cpu             the C++ part, or an error
                       cuda            the C++ and the CUDA part, or an error
                       off             nothing: a pure Python package
    G2RPO_CUDA_ARCHS   such as 80,90; by default those of 80, 90, 100 that nvcc knows
    CUDACXX            nvcc itself; by default looked for in CUDA_HOME, CUDA_PATH, PATH and
                       /usr/local/cuda

pip hides the output of a build that succeeds, so what was built, what was left out and why is also
written beside the extension, in g2rpo_kernels/_build.json; `g2rpo doctor` shows it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class BuildError(Exception):
    """Something cannot be built here; the message says why."""


def read_mode() -> str:
    mode = os.environ.get("G2RPO_BUILD") or "auto"
    if mode not in ("auto", "cpu", "cuda", "off"):
        sys.exit(f"G2RPO_BUILD is {mode!r}; expected auto, cpu, cuda or off")
    return mode


def read_archs() -> str:
    """G2RPO_CUDA_ARCHS as a CMake list; empty if it is not set."""
    text = os.environ.get("G2RPO_CUDA_ARCHS", "").strip()
    if not re.fullmatch(r"(\d{2,3}(\s*[,;\s]\s*\d{2,3})*)?", text):
        sys.exit(f"G2RPO_CUDA_ARCHS is {text!r}; expected compute capabilities such as 80,90,100")
    return ";".join(re.findall(r"\d+", text))


def why_failed(output: str) -> str:
    """What a failed command said of the reason, on one line."""
    errors = re.findall(r"^.*\berror:.*$", output, re.MULTILINE)[:1]
    # CMake: a line with the place, then the message, indented.
    errors = errors or re.findall(r"^CMake Error[^\n]*\n((?:\n?  .*\n)+)", output, re.MULTILINE)[:1]
    errors = errors or output.splitlines()[-3:]
    return " ".join(" ".join(errors).split())[:500].rstrip(".")


def run(*command: str | Path) -> None:
    """Run to success; the output is shown (by pip, with -v or after an error)."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error.strerror}") from error
    print(done.stdout, flush=True)
    if done.returncode:
        raise BuildError(why_failed(done.stdout))


def find_tool(name: str) -> str:
    """cmake or ninja: the build requirement's own, which need not be on PATH, else the system's."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    programs = [f for f in files if f.stem == name and f.parent.name in ("bin", "Scripts")]
    # cmake's package has the program in a folder of its own, and in bin a script that starts it.
    programs.sort(key=lambda file: "data" not in file.parts)
    found = str(programs[0].locate()) if programs else shutil.which(name)
    if found is None:
        raise BuildError(f"{name} was not found; pip install {name}")
    return found


def compile_native(folder: Path, cuda: str, archs: str) -> dict:
    """Configure and build in `folder`; what CMakeLists.txt found out.

    cuda: AUTO, ON or OFF.
    """
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("pybind11 was not found; pip install pybind11") from error
    # An earlier build's objects are kept; what it found out about the machine is not.
    for stale in [folder / "CMakeCache.txt", *folder.glob("CMakeFiles/[0-9]*")]:
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    options = {
        "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "G2RPO_CUDA": cuda,
        "G2RPO_CUDA_ARCHS": archs,
    }
    defined = [f"-D{name}={value}" for name, value in options.items()]
    run(find_tool("cmake"), "-G", "Ninja", "-S", ROOT, "-B", folder, *defined)
    run(find_tool("cmake"), "--build", folder)
    return json.loads((folder / "built.json").read_text())


def build_native(mode: str, archs: str) -> tuple[dict, Path | None]:
    """(the contents of _build.json, the extension if there is one)"""
    report = {"build": mode, "cpu": False, "openmp": False, "cuda": False, "cuda_archs": []}
    report |= {"compiler": None, "nvcc": None, "left_out": []}

    def leave_out(what: str, why: str) -> None:
        report["left_out"].append({"what": what, "why": why})

    extension, kernels = "the native extension", "the CUDA kernels"
    if mode in ("cpu", "off"):
        leave_out(kernels, f"G2RPO_BUILD is {mode}")
    if mode == "off":
        leave_out(extension, "G2RPO_BUILD is off")
    # One folder a Python: its extensions are no other's.
    folder = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
    for cuda in {"auto": ["AUTO", "OFF"], "cpu": ["OFF"], "cuda": ["ON"], "off": []}[mode]:
        try:
            facts = compile_native(folder, cuda, archs)
        except BuildError as error:
            # Architectures that somebody asked for are compiled or refused, in `auto` as well.
            if mode != "auto" or str(error).startswith("G2RPO_CUDA_ARCHS"):
                sys.exit(f"G2RPO_BUILD is {mode}: {error}")
            leave_out(extension if cuda == "OFF" else kernels, str(error))
            continue
        report["left_out"] += facts.pop("left_out")
        report |= {"cpu": True, "cuda": facts["nvcc"] is not None, **facts}
        if not report["openmp"]:
            leave_out("OpenMP", f"CMake finds none for {facts['compiler']}: one thread is used")
        (library,) = folder.glob("_C.*")
        return report, library
    return report, None


class BuildNative(build_ext):
    """Puts the extension and _build.json into the wheel or, editable, into the source folder."""

    def run(self) -> None:
        report, library = build_native(MODE, ARCHS)
        target = Path(self.get_ext_fullpath("g2rpo_kernels._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        for suffix in EXTENSION_SUFFIXES:  # whatever an earlier build left and Python would import
            target.with_name(f"_C{suffix}").unlink(missing_ok=True)
        if library is None:
            self.extensions = self.distribution.ext_modules = []
        else:
            shutil.copy(library, target)
        target.with_name("_build.json").write_text(json.dumps(report) + "\n")
        for part in report["left_out"]:
            print(f"g2rpo: built without {part['what']}: {part['why']}", flush=True)


class BuildWheel(bdist_wheel):
    """Without the extension a wheel is for every platform, which is known only after the build."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


MODE, ARCHS = read_mode(), read_archs()
setup(
    ext_modules=[Extension("g2rpo_kernels._C", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": BuildWheel},
)
