"""Time the flow ops on this machine: `make bench`, or

    python benchmarks/run.py [--device cpu|cuda] [--shapes all|a,b] [--only TEXT] [--limit SECONDS]

Every case is written to benchmarks/results/<device>.json as soon as it is measured; a table and the
goals come last. `python benchmarks/report.py` turns the file into the README's tables and plots.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import _paths  # noqa: F401
import cases
import torch
from calls import measure_calls
from goals import verdicts
from measure import Settings, first_line, prepared
from report import text_table
from results import ResultsError, Store, default_path
from workloads import cases_of

# Cases that matter most come first, since a run may be cut short.
SHAPES = {
    "cpu": ["flux720"],
    "cuda": ["flux720", "flux720x64", "flux720x8", "flux1024x64", "flux1024", "flux1024x8"],
}


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device())
    parser.add_argument("--shapes", help="names of tests/cases.py with commas, or all")
    parser.add_argument("--dtypes", default="float32", help="float32,bfloat16,float16,mixed")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--budget", type=float, default=Settings.budget,
                        help="seconds of rounds a case, compiling not counted")  # fmt: skip
    parser.add_argument("--limit", type=float, help="seconds after which no case is begun")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--results", type=Path, help="the file to write")
    parser.add_argument("--resume", action="store_true", help="keep the cases the file has")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    options.shapes = shapes_of(options.shapes, options.device, parser.error)
    options.dtypes = options.dtypes.split(",")
    for name in options.dtypes:
        if name not in cases.DTYPES or name == "float64":
            parser.error(f"--dtypes: {name!r}; expected some of float32,bfloat16,float16,mixed")
    return options


def shapes_of(text: str | None, device: str, error=sys.exit) -> list[str]:
    if text is None:
        return SHAPES[device]
    names = SHAPES["cuda"] if text == "all" else text.split(",")
    for name in names:
        if name not in cases.SHAPES:
            error(f"--shapes: {name!r}; expected all, or some of {', '.join(cases.SHAPES)}")
    return names


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = Settings(options.rounds, options.budget, compile=not options.no_compile)
    try:
        store = Store(options.results or default_path(options.device), options.device,
                      options.resume)  # fmt: skip
    except ResultsError as error:
        print(f"benchmarks: error: --resume: {error}", file=sys.stderr)
        return 2
    host = store.content["machine"].get("host", store.content["machine"])
    if host["load"] and host["load"] > 0.5 * host["cores"]:
        print(f"Warning: this machine is busy (load {host['load']:.1f} on {host['cores']} cores): "
              "the times below are not to be trusted.", flush=True)  # fmt: skip
    started = time.perf_counter()
    todo = [case for case in cases_of(options.shapes, options.dtypes) if options.only in case.id]
    if not todo:
        print(f"benchmarks: error: --only {options.only!r} leaves no case", file=sys.stderr)
        return 2
    for case in todo:
        if store.known(case.id):
            continue
        if options.limit is not None and time.perf_counter() - started > options.limit:
            store.leave_out(case.id, f"--limit of {options.limit:g} s reached")
            continue
        print(f"{time.perf_counter() - started:6.0f} s  {case.id}", flush=True)
        store.begin(case.id)
        try:
            with prepared(case, options.device, settings) as ready:
                store.add(ready.measure())
        except torch.OutOfMemoryError as error:
            store.leave_out(case.id, f"out of memory: {first_line(error)}")
    if not store.content["calls"]:
        store.content["calls"] = measure_calls(options.device, settings)
        store.save()
    print(f"\n{text_table(store.content)}\n")
    print("\n".join(verdicts(store.content)))
    print(f"\n{time.perf_counter() - started:.0f} s; written to {store.path}")
    lost = [row["case"] for row in store.content["cases"] if row["ours"] is None]
    for name in lost:
        print(f"benchmarks: error: {name}: ours was not timed; the file says why", file=sys.stderr)
    return 3 if lost else 0  # not 1, which a traceback ends with


if __name__ == "__main__":
    sys.exit(main())
