"""What is published is what is in the tree, and it works where the tree is not.

Builds the sdist and the wheels from a copy of the checkout, installs one into an empty virtual
environment that borrows only third-party packages from this one, and uses it there. Then the rules
that keep a package publishable: imports are declared, pins cover what is declared, and the Makefile
installs once and only once.
"""

import ast
import email
import importlib.metadata
import os
import re
import shutil
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkout import (
    EXTENSIONS,
    GENERATED,
    ROOT,
    built_checkout,
    empty_environment,
    files_under,
    pip_install,
    run,
)
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """sdist; wheel (made from the sdist); tree_wheel (without the extension); metadata."""
    tree = built_checkout(tmp_path_factory)
    (sdist,) = (tree / "dist").glob("*.tar.gz")
    (wheel,) = (tree / "dist").glob("*.whl")
    (tree_wheel,) = (tree / "dist-tree").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_string(archive.read(path).decode())
    return SimpleNamespace(sdist=sdist, wheel=wheel, tree_wheel=tree_wheel, metadata=metadata)


@pytest.fixture(scope="module")
def installed(built: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it and this environment's packages behind it."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    pip_install(empty_environment(folder), built.wheel)
    return folder


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def requirements(metadata: Message, extra: str = "") -> dict[str, Requirement]:
    """What the distribution, or one of its extras, adds to an installation, by canonical name."""
    marked = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    if extra:
        marked = [r for r in marked if f'extra == "{extra}"' in str(r.marker)]
    else:
        marked = [r for r in marked if "extra ==" not in str(r.marker)]
    return {canonicalize_name(r.name): r for r in marked}


def test_wheel_holds_the_packages_and_nothing_else(built: SimpleNamespace) -> None:
    names = wheel_files(built.wheel)
    packaged = {name for name in names if ".dist-info/" not in name}
    generated = packaged & GENERATED
    assert packaged - generated == files_under(ROOT)
    assert "g2rpo_kernels/_build.json" in generated and len(generated) <= 2
    assert {"g2rpo/presets/digits.yaml", "g2rpo/py.typed", "g2rpo_kernels/py.typed"} <= packaged
    assert any(re.fullmatch(r"g2rpo/templates/[^/]+\.j2", name) for name in packaged)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_from_sdist_equals_wheel_from_tree(built: SimpleNamespace) -> None:
    assert wheel_files(built.wheel) - EXTENSIONS == wheel_files(built.tree_wheel)


def test_sdist_can_be_built_and_tested(built: SimpleNamespace) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_under(ROOT) <= names
    root = ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "setup.py")
    assert {*root, "pyproject.toml", "CMakeLists.txt", ".ci/run"} <= names
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert not names & GENERATED
    for folder in ("tests", "benchmarks"):
        assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")} <= names
    assert not [name for name in names if name.startswith(("build/", "runs/", ".git/", ".venv"))]


def test_metadata(built: SimpleNamespace) -> None:
    metadata = built.metadata
    assert metadata["Name"] == "g2rpo"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(requirements(metadata)) == {"torch"}
    extras = {"train", "flash", "bnb", "torchao", "test", "bench"}
    assert set(metadata.get_all("Provides-Extra")) == extras
    assert {"diffusers", "transformers", "safetensors"} <= set(requirements(metadata, "train"))
    assert set(requirements(metadata, "flash")) == {"flash-attn"}
    assert set(requirements(metadata, "bnb")) == {"bitsandbytes"}
    assert set(requirements(metadata, "torchao")) == {"torchao"}
    assert {"pytest", "triton"} <= set(requirements(metadata, "test"))
    assert set(requirements(metadata, "bench")) == {"pytest-benchmark"}
    assert "torchvision" not in str(metadata.get_all("Requires-Dist"))


def test_version_is_written_once_and_has_a_changelog_entry(built: SimpleNamespace) -> None:
    version = built.metadata["Version"]
    sources = [name for name in files_under(ROOT) if name.endswith(".py")] + ["pyproject.toml"]
    written = [name for name in sources if version in (ROOT / name).read_text()]
    assert written == ["g2rpo/__init__.py"]
    latest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest is not None and latest[1] == version


def provided(distributions: set[str]) -> set[str]:
    """Top-level modules that installed distributions consist of."""
    # importlib.metadata.packages_distributions() does this only from Python 3.11 on.
    paths = [path for name in distributions for path in importlib.metadata.files(name) or []]
    return {p.parts[0].partition(".")[0] for p in paths if p.suffix in (".py", ".so", ".pyd")}


USE_KERNELS_ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"not a dependency of g2rpo_kernels: {{name}}", name=name)

sys.meta_path.insert(0, Absent())
import torch
import g2rpo_kernels as gk

x_next = gk.ode_step(torch.ones(1, 4), torch.zeros(1, 4), 1.0, 0.5)
assert torch.equal(x_next, torch.full((1, 4), -0.5)), x_next
print(gk.__file__)
"""


def test_kernels_need_only_torch(built: SimpleNamespace, installed: Path, tmp_path: Path) -> None:
    """g2rpo_kernels imports and computes where torch is and the trainer's libraries are not."""
    # jinja2 is torch's own requirement as well.
    absent = provided(set(requirements(built.metadata, "train")) - {"jinja2"})
    assert {"diffusers", "transformers", "sklearn", "matplotlib", "numpy"} <= absent
    code = USE_KERNELS_ALONE.format(absent=absent | {"g2rpo", "torchvision"})
    done = run(installed / "bin" / "python", "-I", "-c", code, cwd=tmp_path)
    assert installed in Path(done.stdout.strip()).parents


def test_trainer_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import sys, g2rpo; print(g2rpo.__file__, 'diffusers' in sys.modules)"
    done = run(installed / "bin" / "python", "-I", "-c", code, cwd=tmp_path)
    where, imports_diffusers = done.stdout.split()
    assert installed in Path(where).parents
    assert imports_diffusers == "False", "`import g2rpo` alone should be light"
    helped = run(installed / "bin" / "g2rpo", "--help", cwd=tmp_path).stdout
    assert "g2rpo" in helped and "train" in helped


def imported_modules(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("package", "extra", "others"),
    # (diffusers: of whoever gives fuse_flux a model of it)
    [
        ("g2rpo_kernels", "", {"triton", "diffusers"}),
        ("g2rpo", "train", {"g2rpo_kernels", "torch"}),
    ],
)
def test_imports_are_declared(
    built: SimpleNamespace, package: str, extra: str, others: set[str]
) -> None:
    """Every third-party module a package names is a dependency of ours, not of a dependency."""
    declared = provided(set(requirements(built.metadata, extra))) | others | {package}
    for path in sorted((ROOT / package).rglob("*.py")):
        undeclared = imported_modules(path) - declared
        assert not undeclared, f"{path.relative_to(ROOT)} imports {undeclared}"


def test_constraints_pin_what_is_declared(built: SimpleNamespace) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            # A release, not a build or a place: the file must serve every machine.
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()
            pins[canonicalize_name(name)] = version
    assert "torchvision" not in pins
    for extra in ("", "train", "test", "bench"):
        for name, requirement in requirements(built.metadata, extra).items():
            assert pins[name] in requirement.specifier, f"{name}=={pins[name]}: {requirement}"


def test_build_requirements_are_there_for_builds_without_isolation(built: SimpleNamespace) -> None:
    """The [test] extra brings what build-system.requires asks for, in the same versions."""
    text = (ROOT / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^requires = (\[.*\])$", text, re.MULTILINE)
    asked = {canonicalize_name(r.name): r for r in map(Requirement, ast.literal_eval(listed))}
    assert set(asked) == {"cmake", "ninja", "pybind11", "setuptools"}, "torch is not one of them"
    brought = requirements(built.metadata, "test")
    assert {n: r.specifier for n, r in asked.items()} == {n: brought[n].specifier for n in asked}


def test_triton_is_pinned_as_torch_pins_it() -> None:
    """A CUDA build of torch requires one Triton; constraints.txt must not name another."""
    asked = [Requirement(line) for line in importlib.metadata.requires("torch") or []]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (torch_pin,) = [line.partition("==")[2] for line in pins if line.startswith("torch==")]
    (pin,) = [line.partition("==")[2] for line in pins if line.startswith("triton==")]
    triton = [r for r in asked if r.name == "triton" and (not r.marker or r.marker.evaluate())]
    if importlib.metadata.version("torch").partition("+")[0] != torch_pin or not triton:
        pytest.skip("needs a CUDA build of the pinned torch: this one requires no triton")
    assert all(pin in requirement.specifier for requirement in triton)


# Stands in for python3, for the .venv's python and for pip: writes down what it was asked to do.
FAKE_PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
    "-m venv "*)
        mkdir -p "$3/bin"
        for name in python pip g2rpo; do cp "$0" "$3/bin/$name"; done ;;
    "-m pip install "*) exit "$PIP_STATUS" ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_installs_once(tmp_path: Path) -> None:
    """A failed install is taken up again, a good one is not repeated, one of older sources is."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "ops.h").touch()
    fake, log = tmp_path / "python3", tmp_path / "log"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)

    def asked(pip_status: str = "0", target: str = "test", env: str = "env") -> list[str]:
        """First words of what `make` asked of Python: -m venv, -m pip, -m pytest."""
        log.write_text("")
        make = ["make", target, f"PYTHON={fake}", f"VENV={env}", "ARGS=", "WORKERS=2"]
        if pip_status == "0":
            run(*make, cwd=tmp_path, LOG=str(log), PIP_STATUS=pip_status)
        else:
            with pytest.raises(AssertionError, match="Error"):
                run(*make, cwd=tmp_path, LOG=str(log), PIP_STATUS=pip_status)
        calls = [line.split() for line in log.read_text().splitlines()]
        return [call[1] for call in calls if call[:1] == ["-m"]]

    assert asked(pip_status="1") == ["venv", "pip"]
    assert asked() == ["pip", "pytest"]
    assert asked() == ["pytest"]
    assert asked(target="demo") == []  # which needs less
    assert asked(target="demo", env="other") == ["venv", "pip"]
    assert asked(target="demo", env="other") == []
    assert asked(env="other") == ["pip", "pytest"]
    for changed in ("constraints.txt", "csrc/ops.h"):
        stamp = (tmp_path / "env" / ".installed").stat().st_mtime
        os.utime(tmp_path / changed, (stamp + 5, stamp + 5))
        assert asked() == ["pip", "pytest"]
        os.utime(tmp_path / changed, (stamp, stamp))
