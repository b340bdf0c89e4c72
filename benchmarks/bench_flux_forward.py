"""Time FLUX's forward: diffusers, torch.compile, fused blocks, FP8 rollouts, torchao's FP8.

    python benchmarks/bench_flux_forward.py [--size flux|toy] [--batches 12,1] [--seconds 480]

A FluxTransformer2DModel of FLUX.1-dev's shape with random weights, without gradients, at 720 x 720
(2025 tokens of image, 512 of text). All but torchao run on one model, which is fused and unfused
between blocks of calls, in alternating rounds; torchao replaces the weights, so it comes after the
others. torch.compile compiles the repeated blocks, as diffusers advises. TFLOP/s are of the formula
of flux_shapes.flops, whatever a way computes. Beside it stands the velocity's error at toy size.
"""

from __future__ import annotations

import argparse
import sys
import time

import _paths  # noqa: F401
import torch
from flux_forward import EAGER, FP8, FUSED, TORCHAO, WAYS, Forward, errors
from flux_results import FORWARD, FluxStore, decides, heading, not_timed, verdict
from flux_shapes import add_arguments, chosen, flops, new_transformer
from measure import first_line
from results import ResultsError
from texts import number_text, table, time_text, times_text

GOALS = {FUSED: 1.6, FP8: 2.3}  # times eager
MODEL_NEEDS = "that holds 24 GB of weights, 9 GB of FP8 copies and the activations"


def cells(row: dict) -> list[dict[str, str]]:
    """One line a way of computing one batch."""
    lines = []
    for name in (*WAYS, TORCHAO):
        entry = row["variants"].get(name)
        line = {"batch": str(row["batch"]), "way": name, "time": "–", "TFLOP/s": "–",
                "× eager": "–", "peak memory": "–", "apart from eager": "–"}  # fmt: skip
        if entry is not None:
            speedup, peak, away = (entry[k] for k in ("speedup", "peak_bytes", "away_from_eager"))
            apart = "" if entry["interleaved"] else " (other rounds)"
            line |= {
                "time": time_text(entry["seconds"]),
                "TFLOP/s": number_text(entry["tflops"]),
                "× eager": times_text(speedup["median"]) + apart if speedup else "–",
                "peak memory": f"{peak / 1e9:.1f} GB" if peak else "–",
                "apart from eager": "–" if away is None else f"{away:.2g}",
            }
        elif name in row["errors"]:
            line["time"] = "not timed"
        lines.append(line)
    return lines


def error_lines(found: dict) -> list[dict[str, str]]:
    return [
        {"velocity at toy size": name, "error against float32": f"{entry['float32']:.3g}",
         "against eager bfloat16": f"{entry['eager']:.3g}"}
        for name, entry in found.items()
    ]  # fmt: skip


def goals(content: dict) -> list[str]:
    if not decides(content):
        named = ", ".join(f"{name}: {least:g} x eager" for name, least in GOALS.items())
        return [f"goals, for FLUX's size on a GPU, not measured here: {named}"]
    lines = []
    for row in content["cases"]:
        for name, least in GOALS.items():
            speedup = row["variants"].get(name, {}).get("speedup")
            value = speedup["median"] if speedup else None
            lines.append(verdict(content, f"batch {row['batch']}, {name}", "x eager", value, least))
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--batches", help="numbers with commas, the first measured first")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=45.0,
                        help="seconds of rounds a batch, compiling not counted")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=480, help="begin no batch after these")
    parser.add_argument("--compile-seconds", type=float,
                        help="seconds after which a torch.compile is given up")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.batches is not None:
        try:
            options.batches = tuple(int(part) for part in options.batches.split(","))
        except ValueError:
            options.batches = ()
        if not options.batches or min(options.batches) < 1:
            parser.error("--batches: expected numbers >= 1 with commas, such as 12,1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    picked = chosen(options, "bench_flux_forward", MODEL_NEEDS)
    if picked is None:
        return 2
    size, device = picked
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    try:
        store = FluxStore(FORWARD, size, device, options)
    except ResultsError as error:
        print(f"bench_flux_forward: error: {error}", file=sys.stderr)
        return 2
    content = store.content
    if "errors" not in content:
        say("velocity errors at toy size")
        content["errors"] = {}
        try:
            content["errors"] = errors(device)
        except Exception as error:  # the times are worth having without them
            store.leave_out("velocity errors", f"{type(error).__name__}: {first_line(error)}")
        store.save()
    say(f"weights of a model of {size.name} size on {device}")
    try:
        forward = Forward(new_transformer(size, device), size, device, options)
    except torch.OutOfMemoryError as error:
        print(f"bench_flux_forward: error: this GPU does not hold the model ({first_line(error)}); "
              f"expected one {MODEL_NEEDS}", file=sys.stderr)  # fmt: skip
        return 2
    for batch in options.batches or size.batches:
        case = f"forward-{size.name}-b{batch}"
        if store.known(case):
            continue
        if time.perf_counter() - started > options.seconds:
            store.leave_out(case, f"--seconds {options.seconds:g} reached")
            continue
        store.begin(case)
        row = {"case": case, "batch": batch, "tokens": size.tokens, "flops": flops(size, batch)}
        try:
            store.add(row | forward.measure(batch, say))
        except torch.OutOfMemoryError as error:
            store.leave_out(case, f"out of memory: {first_line(error)}")
    why = forward.become_torchao()
    for row in content["cases"]:
        if TORCHAO in row["variants"]:  # of the run that --resume goes on with
            continue
        late = time.perf_counter() - started > options.seconds
        if why or late:
            row["errors"][TORCHAO] = why or f"--seconds {options.seconds:g} reached"
        else:
            row["errors"].pop(TORCHAO, None)
            forward.measure_torchao(row, say)
        store.save()
    print(f"\n{heading(content)}\n\n{table(error_lines(content['errors']))}\n")
    print(table([line for row in content["cases"] for line in cells(row)]) + "\n")
    print("\n".join([*not_timed(content), *goals(content)]))
    if store.stored:
        print(f"\nwritten to {store.path}")
    needed = {EAGER, FUSED} if forward.why_no_fp8 else {EAGER, FUSED, FP8}
    return 0 if all(needed <= row["variants"].keys() for row in content["cases"]) else 3


if __name__ == "__main__":
    sys.exit(main())
