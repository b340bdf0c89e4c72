"""Time the ops of FLUX's blocks: diffusers' formula, torch.compile of it, ours.

    python benchmarks/bench_blocks.py [--size flux|toy] [--only TEXT] [--seconds 300]

At FLUX's shapes (12 images of 2025 tokens and 512 of text, width 3072, bfloat16) on a GPU; bytes
are counted as flux_ops.py says, bandwidth is compared with that of a copy in the same rounds. Every
case is written to benchmarks/results/ as soon as it is measured; a table comes last.
"""

from __future__ import annotations

import argparse
import sys
import time

import _paths  # noqa: F401
import torch
from flux_results import BLOCKS, FluxStore, decides, heading, not_timed, verdict
from flux_shapes import add_arguments, chosen
from measure import EAGER, Settings, first_line
from measure_blocks import COMPILED, cases_of, prepared
from results import ResultsError
from texts import number_text, over, table, time_text, times_text

COPY_GOAL = 0.85  # of the copy bandwidth


def cells(row: dict) -> dict[str, str]:
    """Column -> text of one case."""
    entries = row["variants"]

    def cell(name: str | None) -> str:
        if name not in entries:
            return "failed" if name in row["errors"] else "–"
        return time_text(entries[name]["seconds"])

    mine, eager = entries.get(row["ours"]), entries.get(EAGER)
    faster = {name: over(row, (name,)) for name in (EAGER, COMPILED)}
    return {
        "op": row["task"],
        "direction": "fwd + bwd" if row["backward"] else "fwd",
        "shape": row["shape"],
        **{name: cell(name) for name in (EAGER, COMPILED)},
        "ours": cell(row["ours"]) if row["ours"] else "failed",
        **{f"× {name}": "–" if x is None else times_text(x) for name, x in faster.items()},
        "MB": number_text(row["bytes"] / 1e6),
        "GB/s": number_text(mine["gb_per_second"]) if mine else "–",
        "of copy": f"{mine['copy_fraction']:.0%}".replace("%", " %") if mine else "–",
        "launches": f"{eager['launches']} → {mine['launches']}"
        if mine and eager and mine["launches"] else "–",
    }  # fmt: skip


def goals(content: dict) -> list[str]:
    """A line a goal and case; a toy decides none."""
    lines = []
    for row in content["cases"]:
        entries, name = row["variants"], row["case"].removesuffix(f"-{content['size']}")
        fraction = entries[row["ours"]]["copy_fraction"] if row["ours"] else None
        lines.append(verdict(content, name, "of the copy bandwidth", fraction, COPY_GOAL))
        lines.append(verdict(content, name, "x torch.compile", over(row, (COMPILED,)), 1.0))
    return lines if decides(content) else [
        f"goals, for FLUX's size on a GPU, not measured here: {COPY_GOAL:.0%} of the copy "
        "bandwidth, faster than torch.compile"
    ]  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--budget", type=float, default=2.0,
                        help="seconds of rounds a case, compiling not counted")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=300, help="begin no case after these")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    picked = chosen(options, "bench_blocks", "with a few GB of memory")
    if picked is None:
        return 2
    size, device = picked
    settings = Settings(options.rounds, options.budget, compile=not options.no_compile)
    todo = [case for case in cases_of(size) if options.only in case.id]
    try:
        if not todo:
            raise ResultsError(f"--only {options.only!r} leaves no case")
        store = FluxStore(BLOCKS, size, device, options)
    except ResultsError as error:
        print(f"bench_blocks: error: {error}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    for case in todo:
        if store.known(case.id):
            continue
        if time.perf_counter() - started > options.seconds:
            store.leave_out(case.id, f"--seconds {options.seconds:g} reached")
            continue
        print(f"{time.perf_counter() - started:6.0f} s  {case.id}", flush=True)
        store.begin(case.id)
        try:
            with prepared(case, device, settings) as ready:
                store.add(ready.measure())
        except torch.OutOfMemoryError as error:
            store.leave_out(case.id, f"out of memory: {first_line(error)}")
    content = store.content
    print(f"\n{heading(content)}\n\n{table([cells(row) for row in content['cases']])}\n")
    print("\n".join([*not_timed(content), *goals(content)]))
    if store.stored:
        print(f"\nwritten to {store.path}")
    return 3 if any(row["ours"] is None for row in content["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
