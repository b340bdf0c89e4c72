"""Time FLUX's forward: diffusers, torch.compile, fused blocks, FP8 rollouts, torchao's FP8.

    python benchmarks/bench_flux_forward.py [--size flux|toy] [--batches 12,1] [--pixels 720]
        [--seconds 480]

A FluxTransformer2DModel of FLUX.1-dev's shape with random weights, without gradients, at 720 x 720
(2025 tokens of image, 512 of text) and at 1024 x 1024 (4096), in batches of 1, 4, 12 and 24. All
but torchao run on one model, which is fused and unfused between blocks of calls, in alternating
rounds; torchao replaces the weights, so it comes after the others. torch.compile compiles the
repeated blocks, as diffusers advises; of ours too at the first batch of each size. TFLOP/s are of
the formula of flux_shapes.flops, whatever a way computes; their share is of the most that
bench_ceilings.py has found for matrix products in bfloat16, or in FP8. Beside it stand the
velocity's error at toy size and, of FLUX's own shape, at every sigma.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import _paths  # noqa: F401
import torch
from bench_ceilings import of_this_machine
from flux_errors import errors, sigma_errors
from flux_forward import EAGER, FP8, FUSED, FUSED_COMPILED, TORCHAO, WAYS, Forward
from flux_results import FORWARD, FluxStore, decides, heading, not_timed, verdict
from flux_shapes import Size, add_arguments, chosen, flops, new_transformer
from measure import first_line
from results import ResultsError
from texts import number_text, table, time_text, times_text

GOALS = {FUSED: 1.6, FP8: 2.3}  # times eager
SIDES = {720: 45, 1024: 64}  # tokens along an image of so many pixels
# As they are measured: what decides most first, the largest last.
ORDER = ((720, 12), (720, 1), (1024, 1), (1024, 4), (720, 4), (1024, 12), (720, 24), (1024, 24))
MODEL_NEEDS = "that holds 24 GB of weights, 9 GB of FP8 copies and the activations"


def cases_of(size: Size, batches: tuple[int, ...] | None, pixels: int | None) -> dict:
    """name -> (size, batch), in order. batches, pixels: those asked for; None: all there are."""
    found = {}
    if size.name == "toy":
        for batch in batches or size.batches:
            found[f"forward-toy-b{batch}"] = size, batch
        return found
    order = ORDER if batches is None else [(side, b) for side in SIDES for b in batches]
    for side, batch in order:
        if pixels in (None, side):
            of = "" if side == 720 else f"{side}-"
            found[f"forward-flux-{of}b{batch}"] = replace(size, side=SIDES[side]), batch
    return found


def cells(row: dict) -> list[dict[str, str]]:
    """One line a way of computing one batch."""
    lines = []
    for name in (*WAYS, TORCHAO):
        entry = row["variants"].get(name)
        if name not in row["variants"] and name not in row["errors"]:
            continue  # one that is not measured in such a case
        line = {"tokens": str(row["tokens"]), "batch": str(row["batch"]), "way": name, "time": "–",
                "TFLOP/s": "–", "of peak": "–", "× eager": "–", "peak memory": "–",
                "apart from eager": "–"}  # fmt: skip
        if entry is not None:
            speedup, peak, away = (entry[k] for k in ("speedup", "peak_bytes", "away_from_eager"))
            apart = "" if entry["interleaved"] else " (other rounds)"
            line |= {
                "time": time_text(entry["seconds"]),
                "TFLOP/s": number_text(entry["tflops"]),
                "of peak": percent(entry["of_peak"]),
                "× eager": times_text(speedup["median"]) + apart if speedup else "–",
                "peak memory": f"{peak / 1e9:.1f} GB" if peak else "–",
                "apart from eager": "–" if away is None else f"{away:.2g}",
            }
        elif name in row["errors"]:
            line["time"] = "not timed"
        lines.append(line)
    return lines


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def sigma_lines(found: list[dict]) -> list[dict[str, str]]:
    """A line a sigma: how far the velocity is from another way's."""
    names = {"ours": "fused bf16 against diffusers", "fp8": "FP8 against diffusers",
             "fp8_against_ours": "FP8 against fused bf16"}  # fmt: skip
    lines = []
    for entry in found:
        texts = {text: "–" if entry[key] is None else f"{entry[key]:.3g}"
                 for key, text in names.items()}  # fmt: skip
        lines.append({"velocity at sigma": f"{entry['sigma']:.3f}", **texts})
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
            case = f"{row['tokens']} tokens x {row['batch']}, {name}"
            lines.append(verdict(content, case, "x eager", value, least))
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--batches", help="numbers with commas, the first measured first")
    parser.add_argument("--pixels", type=int, choices=tuple(SIDES), help="one side alone")
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


def attempt(store: FluxStore, key: str, nothing, find: Callable, say: Callable) -> None:
    """content[key] = find(), unless it is there; where that fails, `nothing` and the reason: the
    times are worth having without."""
    content = store.content
    if key in content:
        return
    say(f"velocity {key.replace('_', ' ')}")
    content[key] = nothing
    try:
        content[key] = find()
    except Exception as error:  # whatever it is, it is told among what was left out
        store.leave_out(f"velocity {key}", f"{type(error).__name__}: {first_line(error)}")
    store.save()


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
    attempt(store, "errors", {}, lambda: errors(device), say)
    say(f"weights of a model of {size.name} size on {device}")
    peaks = of_this_machine(store.path.parent, content)
    try:
        forward = Forward(new_transformer(size, device), size, device, options, peaks)
    except torch.OutOfMemoryError as error:
        print(f"bench_flux_forward: error: this GPU does not hold the model ({first_line(error)}); "
              f"expected one {MODEL_NEEDS}", file=sys.stderr)  # fmt: skip
        return 2
    attempt(store, "sigma_errors", [], lambda: sigma_errors(forward, size, device), say)
    cases, begun = cases_of(size, options.batches, options.pixels), set()
    for case, (of, batch) in cases.items():
        first = of.tokens not in begun
        begun.add(of.tokens)
        if store.known(case):
            continue
        if time.perf_counter() - started > options.seconds:
            store.leave_out(case, f"--seconds {options.seconds:g} reached")
            continue
        store.begin(case)
        row = {"case": case, "batch": batch, "tokens": of.tokens, "flops": flops(of, batch)}
        forward.size = of
        ways = WAYS if first else tuple(name for name in WAYS if name != FUSED_COMPILED)
        try:
            store.add(row | forward.measure(batch, say, ways))
        except torch.OutOfMemoryError as error:
            store.leave_out(case, f"out of memory: {first_line(error)}")
            continue
        print(table(cells(content["cases"][-1])), flush=True)
    why = forward.become_torchao()
    for row in content["cases"]:
        if TORCHAO in row["variants"]:  # of the run that --resume goes on with
            continue
        late = time.perf_counter() - started > options.seconds
        if why or late:
            row["errors"][TORCHAO] = why or f"--seconds {options.seconds:g} reached"
        else:
            row["errors"].pop(TORCHAO, None)
            forward.size = replace(size, side=round((row["tokens"] - size.text) ** 0.5))
            forward.measure_torchao(row, say)
        store.save()
    print(f"\n{heading(content)}\n\n{table(error_lines(content['errors']))}\n")
    print(table(sigma_lines(content["sigma_errors"])) + "\n")
    print(table([line for row in content["cases"] for line in cells(row)]) + "\n")
    print("\n".join([*not_timed(content), *goals(content)]))
    if store.stored:
        print(f"\nwritten to {store.path}")
    needed = {EAGER, FUSED} if forward.why_no_fp8 else {EAGER, FUSED, FP8}
    return 0 if all(needed <= row["variants"].keys() for row in content["cases"]) else 3


if __name__ == "__main__":
    sys.exit(main())
