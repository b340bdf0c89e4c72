"""Two versions of the ops, interleaved: `make bench-compare BASE=main`, or

    python benchmarks/compare_versions.py --base REF [--only TEXT] [--threshold 1.10]

BASE is any commit of this repository. Its tree is unpacked into a temporary folder and built there
as this tree is (its own setup.py, this interpreter); the other side is the working tree as it lies
here. A process each takes turns with the other: absolute times drift by more than the changes that
matter, the ratio of two neighbours does not. Where its memory lies, too, makes a process faster or
slower for as long as it lives (two of the same tree differed by 18 % in one op), so that a pair of
processes is followed by others. A pair gives one ratio, the median of its rounds; the interval lies
between order statistics of those, and holds at 95 % whatever their distribution.

Exit code 1 where an op takes more than --threshold times BASE's time, with the whole interval
beyond it; 2 where nothing could be compared; 3 where an op fails. The cases call public functions
alone (version_worker.py), so that BASE may be old: an op that it lacks is listed as new.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
THRESHOLD = 1.10  # times BASE's time
PAIRS, ROUNDS = 9, 8  # an even number: each begins as many rounds as the other
LEAST_PAIRS = 6
SHAPE = "1x12x129600"
OLD, NEW = "old", "new"
ABSENT = "absent"


class CompareError(RuntimeError):
    """Two versions that cannot be compared; the message says why."""


# The other version


def git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    except FileNotFoundError as error:
        raise CompareError("git is not installed") from error
    if done.returncode:
        raise CompareError(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def commit_of(ref: str) -> str:
    """The full name of a commit; CompareError if git knows none by this one."""
    try:
        return git("rev-parse", "--verify", "--end-of-options", ref + "^{commit}").decode().strip()
    except CompareError as error:
        raise CompareError(f"--base {ref!r} is no commit of {ROOT} ({error})") from error


def unpack(commit: str, folder: Path) -> None:
    """A commit's files. No git worktree: of that a process that is killed leaves an entry."""
    with zipfile.ZipFile(io.BytesIO(git("archive", "--format=zip", commit))) as archive:
        archive.extractall(folder)


def built_as_here(tree: Path, built: dict | None) -> None:
    """Build a tree's native extension with the parts that this tree's has, `built` of its
    _build.json; CompareError with the end of the log if that fails."""
    if built is None or not built["cpu"]:
        return  # both are pure Python then
    if not (tree / "setup.py").is_file():
        raise CompareError("it has no setup.py: there is no native code of that version to build")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["G2RPO_BUILD"] = "cuda" if built["cuda"] else "cpu"
    environment["G2RPO_CUDA_ARCHS"] = ",".join(map(str, built["cuda_archs"]))
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode or not list((tree / "g2rpo_kernels").glob("_C*.so")):
        end = "\n".join(done.stdout.strip().splitlines()[-20:])
        raise CompareError(f"its build failed ({done.returncode}); the end of the log:\n{end}")


def build_facts() -> dict | None:
    """What this tree's extension was built of; None where it was not built."""
    try:
        return json.loads((ROOT / "g2rpo_kernels" / "_build.json").read_text())
    except FileNotFoundError:
        return None


# Measuring


class Worker:
    """A process that times the ops of one tree when it is asked to."""

    def __init__(self, tree: Path, device: str, shape: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / "version_worker.py"), str(tree), device, shape],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.tree = tree

    def ask(self, **request: object) -> dict:
        """Its answer to one line of JSON. CompareError if it has ended."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise CompareError(f"the process of {self.tree} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def interval(values: list[float]) -> tuple[float, float]:
    """Between which two order statistics the median lies, at 95 % (that of signs).

    Below six values that is less, even from the least to the greatest.
    """
    values, n = sorted(values), len(values)
    outside, tail = 0, 0.5**n
    while outside + 1 < (n + 1) // 2 and tail <= 0.025:
        outside += 1
        tail += math.comb(n, outside) * 0.5**n
    first = max(outside - 1, 0)
    return values[first], values[n - 1 - first]


def prepared(sides: dict[str, Worker], case: str) -> dict | None:
    """Have both ready to time a case, on as many calls. If one cannot: its row, which says why."""
    said = {side: worker.ask(prepare=case) for side, worker in sides.items()}
    if "error" in said[NEW]:
        return {"case": case, "error": said[NEW]["error"]}
    if said[OLD].get(ABSENT):
        return {"case": case, "is_new": True}
    if "error" in said[OLD]:
        return {"case": case, "error": f"in BASE: {said[OLD]['error']}"}
    calls = max(of["calls"] for of in said.values())
    for worker in sides.values():
        worker.ask(calls=calls, case=case)
    return None


def time_pair(sides: dict[str, Worker], case: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of both in alternating rounds, each begun by the other; a round before is not
    counted."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(rounds + 1):
        for side in list(sides)[:: -1 if i % 2 else 1]:
            took = sides[side].ask(time=case)["seconds"]
            if i:
                seconds[side].append(took)
    return seconds


def row_of(case: str, pairs: list[dict[str, list[float]]]) -> dict:
    ratios = [
        statistics.median(new / old for old, new in zip(pair[OLD], pair[NEW])) for pair in pairs
    ]
    low, high = interval(ratios)
    old, new = (statistics.median(s for pair in pairs for s in pair[side]) for side in (OLD, NEW))
    return {"case": case, "old": old, "new": new, "ratio": statistics.median(ratios),
            "low": low, "high": high}  # fmt: skip


# Telling


def is_slower(row: dict, threshold: float) -> bool:
    return "ratio" in row and row["low"] > threshold


def table(rows: list[dict], threshold: float) -> str:
    lines = [f"{'case':36} {'old, us':>11} {'new, us':>11} {'new / old':>9}  95 % interval"]
    for row in rows:
        name = f"{row['case']:36}"
        if "ratio" not in row:
            lines.append(f"{name} {'new' if row.get('is_new') else 'not timed: ' + row['error']}")
            continue
        verdict = "  SLOWER" if is_slower(row, threshold) else ""
        lines.append(
            f"{name} {row['old'] * 1e6:11.1f} {row['new'] * 1e6:11.1f} {row['ratio']:9.3f}  "
            f"{row['low']:.3f} to {row['high']:.3f}{verdict}"
        )
    return "\n".join(lines)


def compare(tree: Path, options: argparse.Namespace) -> list[dict]:
    """The rows of every case of two built trees, `tree` and this one."""
    rows: dict[str, dict] = {}
    pairs: dict[str, list[dict[str, list[float]]]] = {}
    for i in range(options.pairs):
        with ExitStack() as stack:
            # In turns, too, who is first to start and to prepare, and finds the emptier memory.
            trees = [(OLD, tree), (NEW, ROOT)][:: -1 if i % 2 else 1]
            made = {side: Worker(at, options.device, options.shape) for side, at in trees}
            for worker in made.values():
                stack.callback(worker.close)
            said = {side: worker.ask(describe=True) for side, worker in made.items()}
            if i == 0:
                print(*(f"  {side}: {said[side]['what']}" for side in (OLD, NEW)), sep="\n")
            cases = [name for name in said[NEW]["cases"] if options.only in name]
            if not cases:
                names = ", ".join(said[NEW]["cases"])
                raise CompareError(f"--only {options.only!r} leaves none of {names}")
            for case in cases:
                if case in rows:
                    continue
                if row := prepared(made, case):
                    rows[case] = row
                    continue
                pairs.setdefault(case, []).append(time_pair(made, case, options.rounds))
        print(f"  pair {i + 1} of {options.pairs}", flush=True)
    return [rows.get(case) or row_of(case, pairs[case]) for case in cases]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, metavar="REF", help="the commit to compare with")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--shape", default=SHAPE, help="P x G x N (%(default)s: FLUX at 720^2)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of processes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of a pair (%(default)s)")
    parser.add_argument("--threshold", type=float, default=THRESHOLD,
                        help="times BASE's time that is too slow (%(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2}", options.shape):
        parser.error(f"--shape is {options.shape!r}; expected P x G x N such as {SHAPE}")
    if options.pairs < LEAST_PAIRS:
        parser.error(f"--pairs is {options.pairs}; expected {LEAST_PAIRS} or more: fewer have no "
                     "interval of 95 %")  # fmt: skip
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; expected 1 or more")
    if not options.threshold >= 1:
        parser.error(f"--threshold is {options.threshold:g}; expected 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > 0.5 * cores:
        print(f"Warning: this machine is busy (load {load:.1f} on {cores} cores): intervals will "
              "be wide.", flush=True)  # fmt: skip
    try:
        commit = commit_of(options.base)
        with tempfile.TemporaryDirectory(prefix="g2rpo-compare-") as folder:
            print(f"Building {options.base} ({commit[:7]})", flush=True)
            tree = Path(folder).resolve()
            unpack(commit, tree)
            try:
                built_as_here(tree, build_facts())
                rows = compare(tree, options)
            except CompareError as error:
                raise CompareError(f"{options.base} ({commit[:7]}): {error}") from error
    except CompareError as error:
        print(f"compare_versions: error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(rows, options.threshold)}")
    slower = [row["case"] for row in rows if is_slower(row, options.threshold)]
    if slower:
        print(f"\ncompare_versions: error: more than {options.threshold:g} times the time of "
              f"{options.base}: {', '.join(slower)}", file=sys.stderr)  # fmt: skip
        return 1
    return 3 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
