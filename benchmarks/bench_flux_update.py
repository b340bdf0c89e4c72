"""Measure one whole G2RPO update of FLUX's shape on one GPU: seconds and peak memory by phase.

    python benchmarks/bench_flux_update.py [--preset NAME] [--prompts 1] [--size flux|toy]

The trainer itself, on a transformer and an autoencoder with random weights, embeddings at random
and a reward that costs nothing: no weights are needed, and no encoders. The preset is flux-dev-1gpu
unless named; --group.key value changes it. An update has one prompt, not the preset's 16, which
take half an hour: --prompts 16 measures the preset as it is. The first update compiles kernels and
makes the optimizer's states, so the last one is the figure. Beside it stands what `g2rpo plan`
predicts of the same.
"""

from __future__ import annotations

import argparse
import sys
import time

import _paths  # noqa: F401
import torch
from flux_results import UPDATE, FluxStore, decides, heading, not_timed, verdict
from flux_shapes import add_arguments, chosen
from measure import first_line
from results import ResultsError, slug
from texts import table, time_text

from g2rpo.errors import ConfigurationError, TrainingError

NEEDS = "that holds all of a preset's update"
PRESET = "flux-dev-1gpu"
GIB = 2**30
MOST_PEAK = 76  # GiB, of PRESET
MOST_APART = 5  # per cent of the measured peak, of its prediction


def gib(count: float | None) -> str:
    return "–" if count is None else f"{count / GIB:.2f} GiB"


def seconds_text(seconds: float | None) -> str:
    return "–" if seconds is None else time_text(seconds)


def peak(row: dict) -> int | None:
    """Of the whole update; None on a CPU."""
    return max(row["peak_bytes"].values(), default=None)


def apart(row: dict) -> float | None:
    """Per cent that the predicted peak is above the measured one."""
    if not row["peak_bytes"] or row["predicted"] is None:
        return None
    return 100 * (row["predicted"]["peak"] / peak(row) - 1)


def cells(row: dict) -> list[dict[str, str]]:
    """A line a phase, and one of the whole update; what is predicted, where it is."""
    told = row["predicted"]

    def line(name: str, took: float, held: int | None, times: float | None, bytes: int | None):
        texts = {"phase": name, "time": time_text(took), "predicted time": seconds_text(times),
                 "peak memory": gib(held), "predicted peak": gib(bytes)}  # fmt: skip
        return {k: v for k, v in texts.items() if told or "predicted" not in k}

    of = told or {"seconds": {}, "peak_bytes": {}, "whole": None, "peak": None}
    lines = [
        line(name, took, row["peak_bytes"].get(name), of["seconds"].get(name),
             of["peak_bytes"].get(name))
        for name, took in row["phases"].items()
    ]  # fmt: skip
    whole = line("whole update", row["seconds"], peak(row), of["whole"], of["peak"])
    return [*lines, whole]


def what(row: dict) -> str:
    """The update: preset, changes, evaluations, batches."""
    prompts = f"{row['prompts']} prompt{'' if row['prompts'] == 1 else 's'}"
    others = " ".join(row["overrides"])
    changed = f" with {others}" if others else ", as it is"
    return (
        f"{row['preset']}{changed}: {prompts} an update, {row['rows']:,} evaluations, up to "
        f"{row['batches']['branch']} rows a forward; update {row['updates']} of the run"
    )


def goals(content: dict) -> list[str]:
    if not decides(content):
        return [f"goals, for FLUX's size on a GPU, not measured here: peak of {PRESET} below "
                f"{MOST_PEAK} GiB, predicted within {MOST_APART} %"]  # fmt: skip
    lines = []
    for row in content["cases"]:
        name, held, away = f"{row['preset']}, {row['prompts']} an update", peak(row), apart(row)
        if row["preset"] == PRESET:
            value = None if held is None else held / GIB
            lines.append(verdict(content, name, "GiB at the peak", value, most=MOST_PEAK))
        value = None if away is None else abs(away)
        lines.append(
            verdict(content, name, "% between predicted and measured peak", value, most=MOST_APART)
        )
    return lines


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Options of this program, and what changes the preset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     epilog="--group.key value changes the preset.")  # fmt: skip
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--prompts", type=int, default=1,
                        help="prompts an update (default: %(default)s)")  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--updates", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=540, help="begin no update that would "
                        "end after these, but for the first")  # fmt: skip
    options, overrides = parser.parse_known_args(arguments)
    for name in ("prompts", "updates"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    return options, overrides


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parse(arguments)
    picked = chosen(options, "bench_flux_update", NEEDS)
    if picked is None:
        return 2
    size, device = picked
    until = time.perf_counter() + options.seconds
    try:
        import flux_update  # the trainer, which needs packages that a table does not
    except ModuleNotFoundError as error:
        print(f"bench_flux_update: error: {error}; pip install 'g2rpo[train]'", file=sys.stderr)
        return 2
    row: dict = {"preset": options.preset, "variants": {}, "errors": {}, "predicted": None}
    try:
        config, changes = flux_update.configure(
            options.preset, size, device, options.prompts, overrides
        )
        store = FluxStore(UPDATE, size, device, options)
    except (ConfigurationError, ResultsError) as error:
        print(f"bench_flux_update: error: {error}", file=sys.stderr)
        return 2
    case = slug(" ".join(["update", size.name, options.preset, *changes]))
    row |= {"case": case, "overrides": changes, "prompts": config.train.prompts_per_update}
    known = {each["case"]: each["updates"] for each in store.content["cases"]}
    if not store.known(case) or known.get(case, options.updates) < options.updates:
        if decides(store.content):
            try:
                row["predicted"] = flux_update.predict(config, flux_update.this_card())
            except ConfigurationError as error:  # of what the trainer may yet do
                row["errors"]["prediction"] = str(error)
        store.begin(case)
        watch = flux_update.Watch(device)
        try:
            run = flux_update.Run(config, size, device, watch)
            for found in run.updates(options.updates, until):
                store.add(row | found)
        except torch.OutOfMemoryError as error:
            store.leave_out(case, f"out of memory in the phase {watch.name!r}: {first_line(error)}")
        except (ConfigurationError, TrainingError) as error:
            store.leave_out(case, str(error))
    store.save()  # what --resume has closed, too
    content = store.content
    print(f"\n{heading(content)}")
    for each in content["cases"]:
        print(f"\n{what(each)}\n\n{table(cells(each))}\n")
        print("\n".join([f"ratio_max {each['ratio_max']}", *each["messages"]]))
    print("\n".join([*not_timed(content), *goals(content)]))
    if store.stored:
        print(f"\nwritten to {store.path}")
    return 0 if any(each["case"] == case for each in content["cases"]) else 3


if __name__ == "__main__":
    sys.exit(main())
