"""Measure what this machine can do at most, before anything else is measured on it.

    python benchmarks/bench_ceilings.py [--size flux|toy] [--only TEXT] [--seconds 80]

A copy of a GiB; matrix products in bfloat16 and in FP8 (torch._scaled_mm, a scale a row) at 8192^3
and at FLUX's linears, of 2537 and 4608 tokens (720 x 720 and 1024 x 1024 pixels), one image and
four; attention at as many tokens; launches. What other benchmarks call a share of the peak of
matrix products is of the best rate found here, so this comes first.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import _paths  # noqa: F401
from ceilings import ATTENTION, COPY, GEMM, LAUNCH, cases_of, measured, peaks
from flux_results import CEILINGS, FluxStore, heading, load, not_timed
from flux_shapes import add_arguments, chosen
from results import ResultsError
from texts import number_text, table, time_text

TITLES = {COPY: "copy", GEMM: "matrix product, M × K × N", LAUNCH: "launches",
          ATTENTION: "attention, B × L × H × Dh"}  # fmt: skip


def cells(row: dict) -> list[dict[str, str]]:
    """One line a way of one case; those that are not there are in `not_timed`."""
    return [
        {"what": TITLES[row["task"]], "sizes": row["shape"], "way": name,
         "a call": time_text(entry["seconds"]),
         "rate": f"{number_text(entry['rate'])} {row['unit']}"}
        for name, entry in row["variants"].items()
    ]  # fmt: skip


def peak_text(content: dict) -> str:
    """The ceilings in a sentence."""
    found = peaks(content)
    parts = [f"{name} {number_text(value)} {'GB/s' if name == COPY else 'TFLOP/s'}"
             for name, value in found.items() if name != LAUNCH]  # fmt: skip
    if LAUNCH in found:
        parts.append(f"a launch {time_text(found[LAUNCH])}")
    return f"The most that was seen: {', '.join(parts) or 'nothing'}."


def of_this_machine(folder: Path, content: dict) -> dict[str, float]:
    """`peaks` of the ceilings file in a folder that is of the machine and the size of these
    results; none where there is none, and where it cannot be read, which is said."""
    for path in sorted(folder.glob(f"{CEILINGS}-*.json")):
        try:
            found = load(path, CEILINGS)
        except ResultsError as error:
            print(f"no ceilings: {error}", file=sys.stderr)
            continue
        same = all(found[key] == content[key] for key in ("device", "size"))
        if same and found["machine"]["name"] == content["machine"]["name"]:
            return peaks(found)
    return {}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=1.0,
                        help="seconds of rounds a case")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=80, help="begin no case after these")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    picked = chosen(options, "bench_ceilings", "with a few GB of memory")
    if picked is None:
        return 2
    size, device = picked
    todo = [case for case in cases_of(size) if options.only in case.name]
    try:
        if not todo:
            raise ResultsError(f"--only {options.only!r} leaves no case")
        store = FluxStore(CEILINGS, size, device, options)
    except ResultsError as error:
        print(f"bench_ceilings: error: {error}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    todo = [case for case in todo if not store.known(case.name)]
    until = started + options.seconds
    for case, row in measured(todo, device, options.rounds, options.budget, until, store.begin):
        if isinstance(row, str):
            store.leave_out(case.name, row)
            continue
        store.add(row)
        for line in cells(row):
            print(f"{time.perf_counter() - started:6.0f} s  "
                  f"{case.name:24} {line['way']:22} {line['rate']}", flush=True)  # fmt: skip
    store.save()  # what --resume has closed, too
    content = store.content
    print(f"\n{heading(content)}\n")
    print(table([line for row in content["cases"] for line in cells(row)]) + "\n")
    print("\n".join(dict.fromkeys(not_timed(content))))
    print(peak_text(content))
    if store.stored:
        print(f"\nwritten to {store.path}")
    return 0 if content["cases"] and all(row["variants"] for row in content["cases"]) else 3


if __name__ == "__main__":
    sys.exit(main())
