"""Instructions of every native CPU op, counted by valgrind: `make bench-instructions`, or

    python benchmarks/callgrind.py [--check] [--library _C.so] [--baseline FILE]

Writes benchmarks/instructions/<arch>-<compiler>.json, or with --check compares with it: exit code 1
where an op takes more than 10 % above its baseline, 3 where nothing can be compared, said why.
tests/test_instruction_guard.py does that of the installed extension. Unlike a time, a count is the
same on a busy machine; it says nothing about memory.

Counted is what the functions of g2rpo::cpu execute themselves, on one thread: neither Python and
the bindings nor the C library (a memcpy of it is not seen). Valgrind knows no AVX-512, so on x86
the dispatcher of csrc/clones.h picks the AVX2 variant in it, whatever the machine has; counts of
another variant, compiler or architecture are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
FOLDER = BENCHMARKS / "instructions"
DRIVER = BENCHMARKS / "callgrind_driver.py"
PACKAGE = BENCHMARKS.parent / "g2rpo_kernels"
MOST = 1.10  # times the baseline
SEPARATOR = "g2rpo::cpu::variant()"  # the driver calls it before and after what is counted
# A function template has its return type before its name.
OURS = re.compile(r"fn=(?:[\w:]+[ *&]+)?g2rpo::cpu::(?!variant\(\))")
PART = re.compile(r"^part: \d+$", re.MULTILINE)
KEYS = ("arch", "compiler", "variant", "valgrind", "cases")


class CountError(RuntimeError):
    """Counts that cannot be made or compared; the message says why."""


class NothingToCount(CountError):
    """This machine has no valgrind, no native extension or no baseline."""


def arch() -> str:
    return platform.machine().lower()


def installed(package: Path = PACKAGE) -> tuple[Path, str]:
    """The native extension of a source tree and the compiler that it was built with."""
    found = sorted(package.glob("_C*.so"))
    if not found:
        raise NothingToCount(f"{package} has no native extension")
    try:
        compiler = json.loads((package / "_build.json").read_text())["compiler"]
    except FileNotFoundError as error:
        raise NothingToCount(
            f"{package} has no _build.json: who compiled it is not known"
        ) from error
    return found[0], compiler


def valgrind_version() -> str:
    if shutil.which("valgrind") is None:
        raise NothingToCount("valgrind is not installed (apt-get install valgrind)")
    done = subprocess.run(["valgrind", "--version"], capture_output=True, text=True)
    return done.stdout.strip().removeprefix("valgrind-")


def family(compiler: str) -> tuple[str, str]:
    """Name and major version: ("GNU", "12") of "GNU 12.2.0"."""
    name, _, version = compiler.rpartition(" ")
    return name, version.partition(".")[0]


def default_path(compiler: str) -> Path:
    return FOLDER / f"{arch()}-{'-'.join(family(compiler)).lower()}.json"


# Counting


def count(library: Path, compiler: str) -> dict:
    """The contents of a baseline file, of this library. Takes about five seconds."""
    valgrind = valgrind_version()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        # The separator's parts cut the profile; names in full, since every part has its own.
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", f"--dump-before={SEPARATOR}", "--combine-dumps=yes",
             "--compress-strings=no", "--compress-pos=no", f"--callgrind-out-file={out}",
             sys.executable, "-I", "-S", str(DRIVER), str(library)],
            capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode or not out.is_file():
            raise CountError(f"valgrind ended with {done.returncode}: {tail(done.stderr)}")
        text = out.read_text(errors="replace")
    said = json.loads(done.stdout)
    # Each case is a part that warms it and a part that is counted.
    parts = [own_instructions(part) for part in PART.split(text)[1:]]
    counted = parts[1 : 2 * len(said["cases"]) : 2]
    if len(parts) < 2 * len(said["cases"]) or not all(counted):
        raise CountError(
            f"{library}: {len(parts)} parts, of which {counted.count(0)} have no instruction of "
            "g2rpo::cpu; are its symbols stripped?"
        )
    return {
        "arch": arch(), "compiler": compiler, "variant": said["variant"], "valgrind": valgrind,
        "cases": {
            case["name"]: {
                "elements": case["elements"], "instructions": total,
                "per_element": round(total / case["elements"], 4),
            }
            for case, total in zip(said["cases"], counted, strict=True)
        },
    }  # fmt: skip


def own_instructions(part: str) -> int:
    """Of the functions of g2rpo::cpu in one part of a profile; what they call is not theirs."""
    total, ours, inclusive = 0, False, False
    for line in part.splitlines():
        if line.startswith("fn="):
            ours = OURS.match(line) is not None
        elif line.startswith("calls="):
            inclusive = True  # the next line is what the called function took
        elif line[:1].isdigit():
            if ours and not inclusive:
                total += int(line.split()[1])
            inclusive = False
    return total


def tail(text: str, lines: int = 5) -> str:
    return " / ".join(text.strip().splitlines()[-lines:])


# Comparing


def load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise NothingToCount(
            f"{path} does not exist; write it: make bench-instructions"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CountError(f"{path} is not JSON ({error}); write it: make bench-instructions"
                         ) from error  # fmt: skip
    if missing := [key for key in KEYS if key not in content]:
        raise CountError(f"{path} lacks {', '.join(missing)}; write it: make bench-instructions")
    return content


def why_not_comparable(found: dict, baseline: dict) -> str | None:
    """None if both are of one architecture, compiler (to its major version) and vector variant."""
    for key, of in (("arch", str), ("compiler", family), ("variant", str)):
        if of(found[key]) != of(baseline[key]):
            return f"the {key} is {found[key]}, the baseline's {baseline[key]}"
    return None


def faults(found: dict, baseline: dict, most: float = MOST) -> list[str]:
    """A line an op that takes more than `most` times its baseline, or is in one of both alone."""
    lines = []
    for name in dict.fromkeys([*baseline["cases"], *found["cases"]]):
        new, old = found["cases"].get(name), baseline["cases"].get(name)
        if old is None:
            lines.append(f"{name}: not in the baseline; make bench-instructions adds it")
        elif new is None:
            lines.append(f"{name}: in the baseline, but not counted any more")
        elif (times := new["per_element"] / old["per_element"]) > most:
            lines.append(
                f"{name}: {new['per_element']:.2f} instructions an element, {times - 1:+.1%} over "
                f"the baseline's {old['per_element']:.2f}; at most {most - 1:+.0%}"
            )
    return lines


def table(found: dict, baseline: dict | None) -> str:
    lines = [f"{'case':32} {'an element':>12} {'baseline':>10} {'':>8}"]
    for name, new in found["cases"].items():
        old = baseline["cases"].get(name) if baseline else None
        change = f"{new['per_element'] / old['per_element'] - 1:+8.1%}" if old else "new"
        was = f"{old['per_element']:10.2f}" if old else f"{'–':>10}"
        lines.append(f"{name:32} {new['per_element']:12.2f} {was} {change:>8}")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--library", type=Path, help="the extension to count; default: this tree's")
    parser.add_argument("--compiler", help='of --library, such as "GNU 12.2.0"; default: as this '
                        "tree's")  # fmt: skip
    parser.add_argument("--baseline", type=Path, help="the file to compare with or to write; "
                        "default: benchmarks/instructions/<arch>-<compiler>.json")  # fmt: skip
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        library, compiler = options.library, options.compiler
        if library is None or compiler is None:
            there, built_with = installed()
            library, compiler = library or there, compiler or built_with
        path = options.baseline or default_path(compiler)
        baseline = load(path) if options.check or path.is_file() else None
        found = count(library, compiler)
        why = why_not_comparable(found, baseline) if baseline else None
        if options.check and why:
            raise CountError(f"not comparable with {path}: {why}")
    except CountError as error:
        print(f"callgrind: error: {error}", file=sys.stderr)
        return 3
    of = f"{found['arch']}, {found['compiler']}, {found['variant']}"
    print(f"Instructions of the native ops ({of}, valgrind {found['valgrind']})\n")
    print(table(found, None if why else baseline))
    if not options.check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"\nwritten to {path}")
        return 0
    for line in (wrong := faults(found, baseline)):
        print(f"callgrind: error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
