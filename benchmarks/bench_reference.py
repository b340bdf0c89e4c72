"""Time the training loop that Granular-GRPO's publication describes beside an update of ours.

    python benchmarks/bench_reference.py [--size flux|toy] [--ours FILE] [--seconds 180]

reference_loop.py has the loop and says what it does. An update of one prompt takes many minutes of
it, so each phase is timed for a share of --seconds and multiplied up to what the update asks for:
"extrapolated" in the results says so, beside how many pieces were timed. Weights are float32 under
bfloat16 autocast where they fit, and bfloat16 where they do not, which "dtypes" says by phase;
AdamW is timed on as many float32 parameters as fit. Ours is the update of one prompt that
bench_flux_update.py measures with the preset flux-dev-1gpu: that of --ours, a results file of this
very machine, or else one made here. Rewards cost nothing in either.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import _paths  # noqa: F401
import torch
from bench_flux_update import PRESET
from flux_results import REFERENCE, FluxStore, heading, not_timed
from flux_shapes import add_arguments, chosen
from measure import first_line
from reference_times import NEEDS, measure, our_update, ours_of, ratios, shape_of
from results import ResultsError, slug
from texts import table, time_text, times_text

from g2rpo.errors import ConfigurationError, TrainingError


def cells(row: dict) -> list[dict[str, str]]:
    """A line a phase, and one of the whole update; our seconds where a phase of ours is the same
    work."""
    ours = (row["ours"] or {}).get("phases", {})
    same = {"decode": "rewards"}  # ours' "update" has its optimizer's step
    lines = []
    for name, each in row["phases"].items():
        timed = f"{min(each['timed'], each['asked'])} of {each['asked']}"
        if each.get("of_elements", 1) < 1:
            timed += f", on {each['of_elements']:.0%} of the parameters"
        mine = ours.get(same.get(name, name))
        lines.append({"phase": name, "timed": timed, "each": time_text(each["seconds_each"]),
                      "reference": time_text(each["seconds"]),
                      "ours": "–" if mine is None else time_text(mine)})  # fmt: skip
    whole = "–" if row["seconds"] is None else time_text(row["seconds"])
    mine = time_text(row["ours"]["seconds"]) if row["ours"] else "–"
    return [*lines, {"phase": "whole update", "timed": "", "each": "", "reference": whole,
                     "ours": mine}]  # fmt: skip


def summary(row: dict) -> str:
    """What the update is, what it was timed with, and the ratios."""
    words = [f"{row['evaluations']:,} evaluations before the gradients where ours makes "
             f"{row['ours_evaluations']:,}"]  # fmt: skip
    words += [f"{phase}: {kind}" for phase, kind in row["dtypes"].items()]
    if row["extrapolated"]:
        words.append("extrapolated from the pieces timed")
    words += [f"the {what} takes {times_text(value)} ours' time"
              for what, value in row["ratio"].items()]  # fmt: skip
    if row["ours"]:
        words.append(f"ours: {row['ours']['from']}")
    return "; ".join(words)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this program, and what changes the preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="--group.key value changes the preset.")  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--ours", type=Path, help="a results file of bench_flux_update.py, of this "
                        "machine; default: an update is made here")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=180,
                        help="for the reference's phases; ours comes on top")  # fmt: skip
    return parser.parse_known_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parse(arguments)
    picked = chosen(options, "bench_reference", NEEDS)
    if picked is None:
        return 2
    size, device = picked
    began = time.perf_counter()
    try:
        import flux_update  # the trainer, which needs packages that a table does not
    except ModuleNotFoundError as error:
        print(f"bench_reference: error: {error}; pip install 'g2rpo[train]'", file=sys.stderr)
        return 2
    try:
        config, changes = flux_update.configure(PRESET, size, device, 1, overrides)
        store = FluxStore(REFERENCE, size, device, options)
        shape = shape_of(config)
        ours = None
        if options.ours is not None:
            ours = ours_of(options.ours, changes, store)
    except (ConfigurationError, ResultsError) as error:
        print(f"bench_reference: error: {error}", file=sys.stderr)
        return 2
    case = slug(" ".join(["reference", size.name, *changes]))
    row: dict = {
        "case": case, "steps": shape.steps, "positions": list(shape.positions),
        "granularities": list(shape.granularities), "group_size": shape.group_size,
        "evaluations": shape.evaluations(), "ours_evaluations": flux_update.evaluations(config),
        "phases": {}, "seconds": None, "dtypes": {}, "ours": ours, "ratio": {},
        "extrapolated": True, "variants": {}, "errors": {},
    }  # fmt: skip
    if not store.known(case):
        store.begin(case)
        try:
            if row["ours"] is None:
                print("our update", flush=True)
                row["ours"] = our_update(size, config, device, began + options.seconds)
            reference, _ = flux_update.configure(PRESET, size, device, 1, overrides)
            measure(size, reference, device, options.seconds, store, row)
            row["ratio"] = ratios(row)
            store.add(row)
        except torch.OutOfMemoryError as error:
            store.leave_out(case, f"out of memory: {first_line(error)}")
        except (ConfigurationError, TrainingError, ResultsError) as error:
            store.leave_out(case, str(error))
    store.save()  # what --resume has closed, too
    content = store.content
    print(f"\n{heading(content)}")
    for each in content["cases"]:
        print(f"\n{summary(each)}\n\n{table(cells(each))}\n")
    print("\n".join(not_timed(content)))
    if store.stored:
        print(f"\nwritten to {store.path}")
    return 0 if any(each["case"] == case and each["ratio"] for each in content["cases"]) else 3


if __name__ == "__main__":
    sys.exit(main())
