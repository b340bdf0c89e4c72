"""What setup.py and CMake build, leave out and refuse; each of it installs and imports.

The project's own sources are compiled twice: all parts from the sdist into a wheel, and by pip the
C++ part. How the build decides is tested on sources of a few lines, which take a second.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkout import (
    EXTENSIONS,
    built_checkout,
    copy_checkout,
    empty_environment,
    pip_install,
    run,
)

# Where setup.py looks, so that these tests agree with it on what this machine has.
HOMES = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
FOUND = [shutil.which(os.environ.get("CUDACXX", "nvcc"))]
FOUND += [shutil.which(f"{home}/bin/nvcc") for home in HOMES if home]
NVCC = next((path for path in FOUND if path), None)
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc, which this machine has not")
needs_compiler = pytest.mark.skipif(
    not shutil.which("c++") or sys.platform != "linux", reason="needs a C++ compiler on Linux"
)

USE = """
import json, pathlib, torch
import g2rpo_kernels as gk
x_next = gk.ode_step(torch.ones(1, 4), torch.zeros(1, 4), 1.0, 0.5)
assert torch.equal(x_next, torch.full((1, 4), -0.5)), x_next
folder = pathlib.Path(gk.__file__).parent
try:
    from g2rpo_kernels import _C
    print(json.dumps([str(folder), _C.__file__, hasattr(_C, "cuda") and _C.cuda.archs]))
except ImportError:
    print(json.dumps([str(folder), None, False]))
"""


def use(python: Path) -> SimpleNamespace:
    """Run an op with what is installed: its _build.json, the extension, its architectures."""
    done = run(python, "-I", "-c", USE, cwd=python.parent)
    folder, extension, archs = json.loads(done.stdout)
    assert python.parent.parent in Path(folder).parents
    report = json.loads(Path(folder, "_build.json").read_text())
    assert set(report) == REPORTED
    return SimpleNamespace(report=report, extension=extension, archs=archs)


REPORTED = {"build", "cpu", "openmp", "cuda", "cuda_archs", "compiler", "nvcc", "left_out"}


def left_out(report: dict) -> dict[str, str]:
    return {item["what"]: item["why"] for item in report["left_out"]}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The sdist, and the wheel built from it in the mode `auto`, with code for one architecture."""
    tree = built_checkout(tmp_path_factory)
    (sdist,), (wheel,) = tree.glob("dist/*.tar.gz"), tree.glob("dist/*.whl")
    return SimpleNamespace(sdist=sdist, wheel=wheel)


@needs_compiler
def test_auto_builds_what_this_machine_can(dist: SimpleNamespace, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    pip_install(python, dist.wheel)
    installed = use(python)
    assert re.search(r"-cp3\d+-cp3\d+t?-linux_", dist.wheel.name)
    report = installed.report
    assert installed.extension and report["build"] == "auto" and report["cpu"]
    assert re.fullmatch(r"(GNU|Clang) [\d.]+", report["compiler"])
    if NVCC:
        assert report["cuda"] and report["cuda_archs"] == [90] and installed.archs == "90"
        assert re.fullmatch(r"\d+\.\d+", report["nvcc"])
        assert not {"the native extension", "the CUDA kernels"} & set(left_out(report))
    else:
        assert not report["cuda"] and not report["cuda_archs"] and not installed.archs
        assert "nvcc was not found" in left_out(report)["the CUDA kernels"]


@needs_nvcc
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_extension_needs_no_cuda_library(dist: SimpleNamespace, tmp_path: Path) -> None:
    """It is linked with the static runtime, so it loads where neither toolkit nor driver is."""
    with zipfile.ZipFile(dist.wheel) as archive:
        (name,) = EXTENSIONS & set(archive.namelist())
        extension = archive.extract(name, tmp_path)
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-dW", extension, cwd=tmp_path).stdout)
    assert any(name.startswith("libc.so") for name in needed)
    assert not [name for name in needed if "cuda" in name or "nv" in name]
    symbols = run("readelf", "-W", "--dyn-syms", extension, cwd=tmp_path).stdout
    assert " PyInit__C" in symbols and " cuda" not in symbols, "the runtime's names stay inside"


@needs_compiler
def test_cpu_from_sdist(dist: SimpleNamespace, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    # Debug: -O0 compiles in half the time.
    pip_install(python, dist.sdist, G2RPO_BUILD="cpu", CMAKE_BUILD_TYPE="Debug")
    installed = use(python)
    assert installed.extension and not installed.archs
    assert installed.report["cpu"] and not installed.report["cuda"]
    assert left_out(installed.report)["the CUDA kernels"] == "G2RPO_BUILD is cpu"


def test_off_from_sdist(dist: SimpleNamespace, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    pip_install(python, dist.sdist, G2RPO_BUILD="off")
    installed = use(python)
    assert not installed.extension and not installed.report["cpu"]
    assert set(left_out(installed.report)) == {"the native extension", "the CUDA kernels"}
    (wheel,) = tmp_path.glob("venv/lib/*/site-packages/*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()


BINDINGS = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout whose native sources are an empty module."""
    tree = copy_checkout(tmp_path_factory.mktemp("small"))
    for path in (tree / "csrc").iterdir():
        path.write_text(BINDINGS if path.name == "bindings.cpp" else "")
    return tree


@pytest.fixture
def build(small: Path) -> Callable:
    """Build in place, as an editable install does; returns _build.json."""

    def build_in_place(**environment: str) -> dict:
        run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=small, **environment)
        report = json.loads((small / "g2rpo_kernels" / "_build.json").read_text())
        assert any((small / name).exists() for name in EXTENSIONS) == report["cpu"]
        return report

    return build_in_place


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_auto_without_a_compiler_installs_and_says_so(small: Path, tmp_path: Path) -> None:
    python = empty_environment(tmp_path / "venv")
    nothing = {"CXX": "/nonexistent/c++", "CUDACXX": "/nonexistent/nvcc", "PATH": str(tmp_path)}
    wheel = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path]
    said = run(*wheel, cwd=small, **nothing).stdout
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl"), "nothing in it is of this platform"
    pip_install(python, built)
    report = use(python).report
    assert not report["cpu"] and not report["cuda"] and report["compiler"] is None
    for what, why in left_out(report).items():
        assert "/nonexistent/c++" in why and f"built without {what}: {why}" in said
    assert set(left_out(report)) == {"the native extension", "the CUDA kernels"}


@needs_compiler
def test_auto_without_nvcc_builds_the_rest(build: Callable) -> None:
    report = build(CUDACXX="/nonexistent/nvcc")
    assert report["cpu"] and not report["cuda"] and report["nvcc"] is None
    why = left_out(report)["the CUDA kernels"]
    assert why == "nvcc was not found (CUDACXX is /nonexistent/nvcc)"


def test_cuda_without_nvcc_says_how_to_get_it(build: Callable) -> None:
    with pytest.raises(AssertionError, match="G2RPO_BUILD is cuda: nvcc was not found.*toolkit"):
        build(G2RPO_BUILD="cuda", CUDACXX="/nonexistent/nvcc")


TOO_NEW = """
case "$*" in --list-gpu-arch) echo compute_80; echo compute_90 ;;
*) echo "host_config.h:143:2: error: #error -- unsupported GNU version!"; exit 1 ;; esac
"""


@needs_compiler
def test_nvcc_that_refuses_the_compiler_costs_only_the_kernels(
    build: Callable, tmp_path: Path
) -> None:
    nvcc = script(tmp_path / "nvcc", TOO_NEW)
    report = build(CUDACXX=nvcc)
    assert report["cpu"] and not report["cuda"] and report["cuda_archs"] == []
    assert "unsupported GNU version" in left_out(report)["the CUDA kernels"]
    with pytest.raises(AssertionError, match="G2RPO_BUILD is cuda: .*unsupported GNU version"):
        build(CUDACXX=nvcc, G2RPO_BUILD="cuda")


@needs_compiler
def test_without_openmp(build: Callable, tmp_path: Path) -> None:
    refuse = 'case " $* " in *" -fopenmp "*) echo "error: unrecognized option"; exit 1 ;; esac\n'
    compiler = script(tmp_path / "c++", f'{refuse}exec {shutil.which("c++")} "$@"\n')
    report = build(G2RPO_BUILD="cpu", CXX=compiler)
    assert report["cpu"] and report["openmp"] is False
    assert left_out(report)["OpenMP"].endswith("one thread is used")


@needs_nvcc
def test_default_architectures_are_those_nvcc_knows(build: Callable, tmp_path: Path) -> None:
    known = 'case "$*" in --list-gpu-arch) echo compute_80; echo compute_90 ;; *) '
    nvcc = script(tmp_path / "nvcc", f'{known} exec {NVCC} "$@" ;; esac\n')
    report = build(G2RPO_BUILD="cuda", CUDACXX=nvcc)
    assert report["cuda"] and report["cuda_archs"] == [80, 90]
    assert "knows 80, 90" in left_out(report)["code for sm_100"]


@needs_compiler
def test_off_leaves_no_extension_of_an_earlier_build(small: Path, build: Callable) -> None:
    assert build(G2RPO_BUILD="cpu")["cpu"]
    for suffix in EXTENSION_SUFFIXES:
        (small / "g2rpo_kernels" / f"_C{suffix}").touch()
    assert not build(G2RPO_BUILD="off")["cpu"]


def test_unknown_values_are_refused(build: Callable, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="G2RPO_BUILD is 'gpu'; expected auto, cpu, cuda or"):
        build(G2RPO_BUILD="gpu")
    for value in ("8.0", "all", "80,,90", "sm_90"):
        expected = f"G2RPO_CUDA_ARCHS is {value!r}; expected compute capabilities such as 80,90"
        with pytest.raises(AssertionError, match=re.escape(expected)):
            build(G2RPO_CUDA_ARCHS=value)
    # One that is well formed is refused by the compiler's own list, not left out, in `auto` too.
    nvcc = script(tmp_path / "nvcc", TOO_NEW)
    with pytest.raises(AssertionError, match="G2RPO_CUDA_ARCHS names 70; .*nvcc knows 80, 90"):
        build(G2RPO_CUDA_ARCHS="70", CUDACXX=nvcc)
