"""Everything a GPU is needed for, in bounded time: `make gpu-check`, or

    python3 benchmarks/gpu_check.py [--only PART ...] [--limit SECONDS] [--resume]

Parts, in this order: `build` the extension in place where it lacks CUDA and nvcc is there; `tests`
of what runs on every backend of this card; `ceilings`, what the card does at most, of which shares
are shares; and the benchmarks, each with the cases that matter most first: `ops`, `flux-blocks`,
`flux-forward` (720 x 720 and 1024 x 1024 pixels, batches 1 to 24, and what FP8 adds to the velocity
at each sigma), `optimizer` (a step of AdamW8bit), `flux-update` (a whole update of one prompt),
`reference` (the published loop, beside that update). In three runs of at most ten minutes each:

    python3 benchmarks/gpu_check.py --only build tests ceilings
    python3 benchmarks/gpu_check.py --only ops flux-blocks flux-forward
    python3 benchmarks/gpu_check.py --only optimizer flux-update reference

What was done is in benchmarks/results/ at every moment, so a run that is cut short keeps what it
had and --resume goes on with it: `--only flux-forward --resume` measures the batches that a first
run had no time for. The flow ops are in <gpu>.json, which also says what became of each part; other
kinds of results, whose rows are others, are beside it in <kind>-<gpu>.json. Needs torch; a part
that needs a package more (pytest, diffusers, jsonargparse) is skipped without it, and what is
missing is listed at the end. Nothing need be installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import _paths  # noqa: F401
import torch
from flux_results import ADAMW, BLOCKS, CEILINGS, FORWARD, REFERENCE, UPDATE
from goals import verdicts
from report import text_table
from results import ResultsError, Store, commit, default_path, load

import g2rpo_kernels as gk
from g2rpo import doctor

TESTS = {  # file -> packages it needs. All that run on the backends of a GPU
    **dict.fromkeys(
        ("ops", "native", "normal", "policy_loss", "group_advantages", "compat", "tracing",
         "block_modulate", "block_modulate_gradients", "block_attention",
         "block_attention_contract", "block_gelu", "block_fp8", "adamw8bit_native", "optim",
         "optim_states", "streamed_adamw"), ()
    ),
    "flux_rollout": ("diffusers",),
    "flux_text": ("diffusers", "transformers", "tokenizers", "safetensors"),
}  # fmt: skip
CRASHES = 3  # how often the benchmarks are taken up again after their process has died
OPTIMIZER, PUBLISHED = "optimizer", "reference"
# Seconds, in order; those of each run that the docstring names fit ten minutes.
LIMITS = {"build": 150, "tests": 345, CEILINGS: 85, "ops": 110, BLOCKS: 100, FORWARD: 370,
          OPTIMIZER: 130, UPDATE: 260, PUBLISHED: 190}  # fmt: skip
OPTIONAL = ("bitsandbytes", "torchao", "flash_attn")  # beside which ours stands, where they are
# What a benchmark needs beside torch, the kind of its file, and the share of its time after which
# it begins no case.
BENCHMARKS = {
    CEILINGS: ("bench_ceilings", (), CEILINGS, 0.8),
    BLOCKS: ("bench_blocks", ("diffusers",), BLOCKS, 0.8),
    FORWARD: ("bench_flux_forward", ("diffusers",), FORWARD, 0.5),
    OPTIMIZER: ("bench_adamw8bit", (), ADAMW, 0.8),
    UPDATE: ("bench_flux_update", ("diffusers", "jsonargparse", "safetensors"), UPDATE, 0.95),
    PUBLISHED: ("bench_reference", ("diffusers", "jsonargparse", "safetensors"), REFERENCE, 0.6),
}


def call(command: list[str], limit: float, **variables: str) -> tuple[int | None, float, str]:
    """Run and show a command. Exit code (None: out of time), seconds, the end of its output."""
    started = time.perf_counter()
    print(f"\n$ {' '.join(command)}    (at most {limit:.0f} s)", flush=True)
    # The package of this tree, wherever the command's own start puts sys.path.
    path = os.pathsep.join(filter(None, (str(_paths.ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**variables, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=_paths.ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        errors="replace", stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    last: deque[str] = deque(maxlen=40)

    def show() -> None:
        for line in process.stdout:
            last.append(line.rstrip())
            print(line, end="", flush=True)

    reader = threading.Thread(target=show)
    reader.start()
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own workers too, and nobody else's
        process.wait()
        code = None
    reader.join()
    seconds = time.perf_counter() - started
    print(f"-> {'out of time' if code is None else f'exit code {code}'}, {seconds:.0f} s")
    return code, seconds, "\n".join(last)


def build(limit: float) -> dict:
    """The extension with CUDA, in place; what was done and the reason where nothing was."""
    status = gk.backends()["cuda"]
    if status.available:
        return {"did": "nothing: the cuda backend is there"}
    nvcc, why = doctor.toolkit()
    if not nvcc:
        return {"did": "nothing", "why": f"{status.reason}; {why}"}
    major, minor = torch.cuda.get_device_capability()
    # For this card alone, which takes a fraction of the time; what the user has set goes before.
    code, seconds, end = call([sys.executable, "setup.py", "build_ext", "--inplace"], limit,
                              G2RPO_BUILD="cuda", G2RPO_CUDA_ARCHS=f"{major}{minor}")  # fmt: skip
    return {"did": "setup.py build_ext --inplace", "code": code, "seconds": seconds, "end": end}


def missing(packages: Iterable[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def test(limit: float) -> dict:
    if missing(["pytest"]):
        return {"did": "nothing", "why": "pytest is not installed: pip install pytest"}
    left_out = {name: lacks for name, needed in TESTS.items() if (lacks := missing(needed))}
    files = [f"tests/test_{name}.py" for name in TESTS if name not in left_out]
    many = [] if missing(["xdist"]) else ["-n", str(min(8, os.cpu_count() or 1))]
    code, seconds, end = call(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *many, *files], limit
    )
    done = {"did": f"pytest, {len(files)} files", "files": files, "code": code, "seconds": seconds,
            "end": end}  # fmt: skip
    if left_out:
        done["why"] = "; ".join(
            f"tests/test_{name}.py left out: {', '.join(lacks)} not installed"
            for name, lacks in left_out.items()
        )
    return done


def bench(command: list[str], limit: float, stop: str, share: float, resume: bool) -> dict:
    """A benchmark in a process of its own: a kernel that faults takes its process along, not the
    run, and the benchmark is taken up again behind the case that it died in.

    stop: its option for the seconds after which it begins no case; those are `share` of its time.
    """
    began = time.perf_counter()
    code, end = None, ""
    for attempt in range(CRASHES):
        left = limit - (time.perf_counter() - began)
        if left < 10:
            break
        again = ["--resume"] if resume or attempt else []
        arguments = [*command, *again, stop, f"{share * left:.0f}"]
        code, _, end = call([sys.executable, *arguments], left)
        if code in (0, 2, 3, None):  # an end of its own, or out of time
            break
    return {"did": Path(command[0]).name, "code": code, "seconds": time.perf_counter() - began,
            "end": end}  # fmt: skip


def do(part: str, path: Path, options: argparse.Namespace, rest: list[str]) -> dict:
    """One part: what was done, and the reason where nothing was."""
    limit = options.limit or LIMITS[part]
    if part == "build":
        return build(limit)
    if part == "tests":
        return test(limit)
    given = ["--device", "cuda", *(["--no-compile"] if options.no_compile else [])]
    if part == "ops":  # goes on with the store that main has begun
        command = ["benchmarks/run.py", *given, "--results", str(path), *rest]
        return bench(command, limit, "--limit", 0.8, resume=True)
    program, needed, kind, share = BENCHMARKS[part]
    if lacks := missing(needed):
        why = f"{', '.join(lacks)} not installed: pip install {' '.join(lacks)}"
        return {"did": "nothing", "why": why}
    output = flux_path(path, kind)
    command = [f"benchmarks/{program}.py", *given, "--size", "flux", "--output", str(output)]
    update = flux_path(path, UPDATE)
    if part == PUBLISHED and update.is_file():
        command += ["--ours", str(update)]
    return bench(command, limit, "--seconds", share, options.resume)


def begin(path: Path, anew: bool) -> None:
    """The file of the flow ops, with what is known of the parts; anew, without its cases."""
    store = Store(path, "cuda", resume=True)
    parts = store.content["parts"]
    if anew:
        store = Store(path, "cuda")
        store.content["parts"] = parts
    store.save()


def record(path: Path, part: str, done: dict) -> None:
    known = load(path).get("backends")
    store = Store(path, "cuda", resume=True)
    store.content["backends"] = known  # by a process since the build, which this is not
    store.content["parts"][part] = {
        **done, "date": time.strftime("%Y-%m-%d"), "commit": commit(),
    }  # fmt: skip
    store.save()


def flux_path(path: Path, kind: str) -> Path:
    """Beside the file of the flow ops, under the name that the benchmark itself would give it."""
    return path.parent / f"{kind}-{default_path('cuda').name}"


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this program, and those of benchmarks/run.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="Other options go to benchmarks/run.py.")  # fmt: skip
    parser.add_argument("--only", nargs="+", default=list(LIMITS), metavar="PART",
                        help=f"some of {', '.join(LIMITS)}")  # fmt: skip
    parser.add_argument("--limit", type=float, help="seconds each part may take; default: "
                        + ", ".join(f"{name} {most}" for name, most in LIMITS.items()))  # fmt: skip
    parser.add_argument("--results", type=Path,
                        help="the file to write; FLUX's are written beside it")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="keep the cases the files have")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options, rest = parser.parse_known_args(arguments)
    picked = [name for text in options.only for name in text.split(",")]
    for name in picked:
        if name not in LIMITS:
            parser.error(f"--only: {name!r}; expected some of {', '.join(LIMITS)}")
    options.only = [name for name in LIMITS if name in picked]
    if options.limit is not None and not options.limit > 0:
        parser.error(f"--limit: {options.limit:g}; expected seconds > 0")
    if rest and "ops" not in options.only:
        parser.error(f"{' '.join(rest)}: for benchmarks/run.py, which --only leaves out")
    return options, rest


def closing(content: dict) -> list[str]:
    """A line a part: what was done, how it ended, its last words."""
    lines = []
    for name in LIMITS:
        part = content["parts"].get(name)
        if part is None:
            lines.append(f"{name:14} not done")
            continue
        ended = ""
        if "code" in part:
            ended = "out of time" if part["code"] is None else f"exit code {part['code']}"
        said = [*part.get("end", "").splitlines()[-1:], part.get("why", "")]
        words = "; ".join(filter(None, [part["did"], ended, *said]))
        lines.append(f"{name:14} {words}")
    return lines


def lacking() -> str:
    """A line that lists the packages that some part would have used."""
    needed = [name for _, names, _, _ in BENCHMARKS.values() for name in names]
    tested = [name for names in TESTS.values() for name in names]
    found = missing(dict.fromkeys([*needed, *tested, "pytest", *OPTIONAL]))
    return f"not installed: {', '.join(found)}" if found else "every package is installed"


def main(arguments: list[str] | None = None) -> int:
    options, rest = parse(arguments)
    if not torch.cuda.is_available():
        why = doctor.gpus()[1]
        print(f"gpu_check: error: no GPU to check: {why}", file=sys.stderr)
        return 2
    print(f"{doctor.gpus()[0][0]}; torch {torch.__version__}, Python {sys.version.split()[0]}")
    path = (options.results or default_path("cuda")).resolve()
    try:
        begin(path, anew="ops" in options.only and not options.resume)
    except ResultsError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    done = {}
    for part in options.only:
        done[part] = do(part, path, options, rest)
        record(path, part, done[part])
    content = load(path)
    if "ops" in options.only:
        print(f"\n{text_table(content)}\n")
        print("\n".join(verdicts(content)))
    print()
    print("\n".join(closing(content)))
    print(f"\n{lacking()}")
    print(f"written to {path.parent}; python benchmarks/report.py puts it into the README")
    return 0 if all(part.get("code", 0) == 0 for part in done.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
