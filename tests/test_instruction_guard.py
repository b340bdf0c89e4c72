"""The native ops take no more instructions than benchmarks/instructions/ says; and that this holds.

Skipped, with the reason, where nothing can be compared: no valgrind, another compiler, another
architecture. A baseline is written anew by `make bench-instructions`.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from g2rpo_kernels.native import NATIVE

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import callgrind  # noqa: E402

# Those of CMakeLists.txt. The bindings are not counted: they may compile as fast as they can.
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
         "-fvisibility-inlines-hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd",
         "-fopenmp"]  # fmt: skip
LOOP = "for (int64_t i = 0; i < n; ++i) x_next[i] = branch(k, mean[i], eps[i]);"


def counted(library: Path | None = None) -> tuple[dict, dict]:
    """Counts and the baseline they are comparable with, or a skip that says why there are none."""
    try:
        installed, compiler = callgrind.installed()
        baseline = callgrind.load(callgrind.default_path(compiler))
        found = callgrind.count(library or installed, compiler)
    except callgrind.NothingToCount as error:
        pytest.skip(str(error))
    if why := callgrind.why_not_comparable(found, baseline):
        pytest.skip(why)
    return found, baseline


def test_no_op_takes_ten_percent_more_instructions_than_its_baseline() -> None:
    found, baseline = counted()
    assert callgrind.faults(found, baseline) == []
    assert {name.partition("[")[0] for name in found["cases"]} == {*NATIVE, "adamw8bit"}


def test_the_guard_names_the_op_of_a_loop_that_was_slowed(tmp_path: Path) -> None:
    """branch_tile makes x_next twice: sde_step alone calls it, and it alone is named."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    csrc = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    tiles = (csrc / "tiles.h").read_text()
    assert tiles.count(LOOP) == 1
    again = "asm volatile(\"\" ::: \"memory\");\n#pragma omp simd\n  "
    (csrc / "tiles.h").write_text(tiles.replace(LOOP, f"{LOOP}\n  {again}{LOOP}"))
    builds = [
        subprocess.Popen(["g++", *FLAGS, *more, "-c", str(csrc / name), "-o", str(tmp_path / name)
                          + ".o"])
        for name, more in (
            ("cpu.cpp", ()), ("adamw8bit.cpp", ()),
            ("bindings.cpp", ("-O0", f"-I{pybind11.get_include()}",
                              f"-I{sysconfig.get_path('include')}")),
        )
    ]  # fmt: skip
    assert [build.wait() for build in builds] == [0, 0, 0]
    library = tmp_path / "_C.so"
    objects = [str(path) for path in tmp_path.glob("*.o")]
    subprocess.run(["g++", "-shared", *objects, "-fopenmp", "-o", str(library)], check=True)

    found, baseline = counted(library)
    faults = callgrind.faults(found, baseline)
    # With seeds the noise takes most of it: there a loop of one in twenty is below ten percent.
    assert [line.partition(":")[0] for line in faults] == ["sde_step[noise]"], faults
    step = "sde_step[seeds]"
    times = found["cases"][step]["per_element"] / baseline["cases"][step]["per_element"]
    assert 1.005 < times < callgrind.MOST


# The comparison itself

BASELINE = {
    "arch": "x86_64", "compiler": "GNU 12.2.0", "variant": "avx2", "valgrind": "3.19.0",
    "cases": {name: {"elements": 100, "instructions": 200, "per_element": 2.0}
              for name in ("normal", "ode_step")},
}  # fmt: skip


def changed(name: str, per_element: float) -> dict:
    found = copy.deepcopy(BASELINE)
    found["cases"][name] = {"elements": 100, "instructions": 0, "per_element": per_element}
    return found


def test_eleven_percent_is_a_fault_and_nine_are_none() -> None:
    assert callgrind.faults(BASELINE, BASELINE) == []
    assert callgrind.faults(changed("normal", 2.18), BASELINE) == []
    assert callgrind.faults(changed("normal", 1.0), BASELINE) == []
    (fault,) = callgrind.faults(changed("normal", 2.22), BASELINE)
    assert fault.startswith("normal: 2.22 instructions an element, +11.0% over the baseline's 2.00")


def test_a_case_in_one_of_both_is_a_fault() -> None:
    (new,) = callgrind.faults(changed("gelu", 1.0), BASELINE)
    (gone,) = callgrind.faults(BASELINE, changed("gelu", 1.0))
    assert new.startswith("gelu: not in the baseline")
    assert gone.startswith("gelu: in the baseline, but not counted")


@pytest.mark.parametrize("key, value, why", [
    ("compiler", "GNU 13.1.0", "the compiler is GNU 13.1.0, the baseline's GNU 12.2.0"),
    ("compiler", "Clang 12.2.0", "the compiler is Clang 12.2.0"),
    ("arch", "aarch64", "the arch is aarch64"),
    ("variant", "default", "the variant is default"),
])  # fmt: skip
def test_counts_of_something_else_are_not_compared(key: str, value: str, why: str) -> None:
    assert callgrind.why_not_comparable(BASELINE | {key: value}, BASELINE).startswith(why)


def test_a_minor_version_of_the_compiler_is_compared() -> None:
    assert callgrind.why_not_comparable(BASELINE | {"compiler": "GNU 12.3.1"}, BASELINE) is None


PROFILE = """\
fn=g2rpo::cpu::variant()
0 9
fn=void g2rpo::cpu::(anonymous namespace)::for_tiles<int>(long)
12 30
calls=1 7
0 5000
13 4
fn=g2rpo::cpu::sde_step(g2rpo::SdeStep const&)
20 7
fn=pybind11::cpp_function::dispatcher<&g2rpo::cpu::sde_step>(_object*)
0 800
"""


def test_only_what_our_functions_execute_themselves_is_counted() -> None:
    assert callgrind.own_instructions(PROFILE) == 30 + 4 + 7


def test_the_command_says_what_it_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        code = callgrind.main([*arguments, "--library", "_C.so", "--compiler", "GNU 12.2.0"])
        assert code == 3
        return capsys.readouterr().err

    file = tmp_path / "baseline.json"
    assert "does not exist; write it: make bench-instructions" in said(
        "--check", "--baseline", str(file)
    )
    file.write_text("{")
    assert "is not JSON" in said("--check", "--baseline", str(file))
    file.write_text("{}")
    assert "lacks arch, compiler, variant, valgrind, cases" in said(
        "--check", "--baseline", str(file)
    )
    monkeypatch.setattr(callgrind.shutil, "which", lambda name: None)
    assert "valgrind is not installed" in said("--baseline", str(tmp_path / "new.json"))
    with pytest.raises(callgrind.CountError, match="has no native extension"):
        callgrind.installed(tmp_path)


def test_the_command_compares_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With counts changed by hand."""
    monkeypatch.setattr(callgrind, "count", lambda library, compiler: changed("normal", 3.0))
    file = tmp_path / "folder" / "baseline.json"
    options = ["--library", "_C.so", "--compiler", "GNU 12.2.0", "--baseline", str(file)]
    assert callgrind.main(options) == 0
    assert json.loads(file.read_text())["cases"]["normal"]["per_element"] == 3.0
    assert callgrind.main([*options, "--check"]) == 0
    capsys.readouterr()
    file.write_text(json.dumps(BASELINE))
    assert callgrind.main([*options, "--check"]) == 1
    out, err = capsys.readouterr()
    assert "+50.0%" in out and err.startswith("callgrind: error: normal: 3.00 instructions")
