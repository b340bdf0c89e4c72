"""Time one optimizer step over FLUX.1-dev's parameters: AdamW8bit, bitsandbytes, torchao, torch.

    python benchmarks/bench_adamw8bit.py [--size flux|toy] [--only TEXT] [--seconds 240]

Two cases: `others`, AdamW8bit with a master of 24 bits beside the other packages' and torch's fused
AdamW on float32; `masters`, beside its own other masters and codes. Each takes all of FLUX's blocks
or as many as fit beside its optimizers' states. Every gradient is dense and known to be finite.
Bytes are weights and states read and written once, gradients read once, of the real buffers; a copy
of as many goes in the same rounds. Diffusers is not needed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext

import _paths  # noqa: F401
import torch
import torch._inductor.config
from adamw_steps import (
    BITSANDBYTES,
    CASES,
    COPIED,
    OURS,
    TORCHAO,
    TOY,
    Contender,
    Steps,
    bytes_each,
    check,
    copying,
    count,
    fitting,
    host_seconds,
    parameters,
    shapes,
    step_block,
)
from flux_forward import Late, at_most
from flux_results import ADAMW, FluxStore, decides, heading, not_timed, verdict
from flux_shapes import Size, add_arguments, chosen
from measure import first_line
from results import ResultsError
from texts import number_text, over, table, time_text, times_text
from timing import interleave, quartiles, ratio, synchronizer

from g2rpo_kernels.optim import native as native_optim

COPY_GOAL = 0.85  # of the copy bandwidth
AT_LEAST = 0.25  # seconds of steps a round, on a GPU
GIB = 2**30
Say = Callable[[str], None]


def new_steps(
    contender: Contender, given: list[torch.nn.Parameter], device: str, seconds: float
) -> Steps:
    """Checked, with its states made and its code compiled; `Late` if compiling takes longer."""
    with at_most(seconds) if contender.compiles else nullcontext():
        check(contender, device)
        made = Steps(contender, given)
        synchronizer(device)()
    return made


def measure(name: str, size: Size, device: str, options: argparse.Namespace, say: Say) -> dict:
    """A case's row. Raises ResultsError where not even one double block fits."""
    row: dict = {"variants": {}, "errors": {}}
    racing = []
    for contender in CASES[name]:
        if contender.missing:
            row["errors"][contender.name] = f"not installed: pip install {contender.package}"
        elif contender.compiles and options.no_compile:
            row["errors"][contender.name] = "left out by --no-compile"
        else:
            racing.append(contender)
    free = memory(device, options)
    share = fitting(size, bytes_each(racing), free)
    if share is None:
        raise ResultsError(
            f"one double block beside these optimizers, of {bytes_each(racing):.1f} bytes an "
            f"element, takes more than the {free / GIB:.2f} GiB there are"
        )
    of_all = count(shapes(size, size.doubles, size.singles))
    chosen_shapes = shapes(size, *share)
    elements = count(chosen_shapes)
    row |= {"doubles": share[0], "singles": share[1], "parameters": len(chosen_shapes),
            "elements": elements, "of_elements": of_all}  # fmt: skip
    say(f"{name}: {share_text(row)}")
    given = {dtype: parameters(chosen_shapes, dtype, device)
             for dtype in dict.fromkeys(contender.dtype for contender in racing)}  # fmt: skip
    ready: dict[str, Steps] = {}
    for contender in racing:
        say(f"{name}: {contender.name}, first step")
        try:
            ready[contender.name] = new_steps(
                contender, given[contender.dtype], device, options.compile_seconds
            )
        except torch.OutOfMemoryError:
            raise
        except (Exception, Late) as error:  # whatever it is, it becomes this optimizer's row
            row["errors"][contender.name] = f"{type(error).__name__}: {first_line(error)}"
            synchronizer(device)()  # raises if the error has left the GPU unusable
    copy, copied = copying(max((s.moved for s in ready.values() if s.contender.name == OURS),
                               default=12 * elements), device)  # fmt: skip
    timed = {each.variant.name: each.variant for each in ready.values()} | {copy.name: copy}
    say(f"{name}: rounds of {len(ready)} optimizers and a copy")
    blocks = {k: step_block(variant, device, AT_LEAST) for k, variant in timed.items()}
    seconds = interleave(blocks, options.rounds, options.budget)
    row |= {
        "backend": native_optim.backend_for(next(iter(given.values()))[0].device),
        "rounds": len(seconds[copy.name]),
        "copy": {"bytes": copied, "seconds": quartiles(seconds[copy.name])[1]},
    }  # fmt: skip
    for key, steps in ready.items():
        row["variants"][key] = figures(
            steps, elements, seconds[key], seconds.get(OURS), seconds[copy.name], copied
        ) | {"host_seconds": host_seconds(steps.variant, device)}
    return row


def figures(
    steps: Steps, elements: int, times: list[float], ours: list[float] | None,
    copies: list[float], copied: int,
) -> dict:  # fmt: skip
    low, middle, high = quartiles(times)
    speed = ratio([steps.moved / s for s in times], [copied / s for s in copies])
    entry = {
        "seconds": middle, "low": low, "high": high,
        "ns_per_element": middle / elements * 1e9,
        "moved_bytes": steps.moved, "state_bytes": steps.states,
        "gb_per_second": steps.moved / middle / 1e9,
        "copy_fraction": speed["median"],
        "each_round": [float(f"{s:.4g}") for s in times],
    }  # fmt: skip
    return entry | ({"over_ours": ratio(times, ours)} if ours else {})


def memory(device: str, options: argparse.Namespace) -> float:
    """Bytes to fill; room for the copy's buffers and for what a step needs besides is left."""
    if options.memory is not None:
        return options.memory * GIB
    if device == "cpu":
        return GIB / 4
    torch.cuda.empty_cache()
    return 0.92 * torch.cuda.mem_get_info()[0] - 2 * COPIED[device]


def share_text(row: dict) -> str:
    return (
        f"{row['doubles']} double and {row['singles']} single blocks and all that is no block, "
        f"{row['elements'] / 1e6:,.0f} of {row['of_elements'] / 1e6:,.0f} million parameters"
    )


def cells(row: dict) -> list[dict[str, str]]:
    """A line an optimizer."""
    lines = []
    for name in (contender.name for contender in CASES[row["task"]]):
        line = dict.fromkeys(
            ("optimizer", "a step", "ns an element", "bytes an element", "GB/s", "of copy",
             "× ours' time", "state, bytes", "host"), "–",
        ) | {"optimizer": name}  # fmt: skip
        entry, slower = row["variants"].get(name), over(row, (name,))
        if entry is not None:
            elements = row["elements"]
            line |= {
                "a step": time_text(entry["seconds"]),
                "ns an element": f"{entry['ns_per_element']:.3g}",
                "bytes an element": f"{entry['moved_bytes'] / elements:.2f}",
                "GB/s": number_text(entry["gb_per_second"]),
                "of copy": f"{100 * entry['copy_fraction']:.0f} %",
                "× ours' time": "–" if slower is None else times_text(slower),
                "state, bytes": f"{entry['state_bytes'] / elements:.3f}",
                "host": time_text(entry["host_seconds"]),
            }
        elif name in row["errors"]:
            line["a step"] = "not timed"
        lines.append(line)
    return lines


def goals(content: dict) -> list[str]:
    if not decides(content):
        return [f"goals, for FLUX's size on a GPU, not measured here: {COPY_GOAL:.0%} of the copy "
                "bandwidth, 1 x bitsandbytes, faster than torchao"]  # fmt: skip
    lines = []
    for row in content["cases"]:
        mine = row["variants"].get(OURS, {}).get("copy_fraction")
        name = f"{row['task']}, {OURS}"
        lines.append(verdict(content, name, "of the copy bandwidth", mine, COPY_GOAL))
        if row["task"] == "others":
            for other in (BITSANDBYTES, TORCHAO):
                lines.append(verdict(content, name, f"x {other}", over(row, (other,)), 1.0))
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=30.0,
                        help="seconds of rounds a case, compiling not counted")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=240, help="begin no case after these")
    parser.add_argument("--compile-seconds", type=float, default=120.0,
                        help="seconds after which torchao's torch.compile is given up")  # fmt: skip
    parser.add_argument("--memory", type=float, metavar="GIB", help="how much to fill; default: "
                        "what is free on a GPU, 0.25 on a CPU")  # fmt: skip
    options = parser.parse_args(arguments)
    if not any(options.only in name for name in CASES):
        parser.error(f"--only {options.only!r}; expected part of one of {', '.join(CASES)}")
    if options.memory is not None and not options.memory > 0:
        parser.error(f"--memory is {options.memory:g}; expected GiB > 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    picked = chosen(options, "bench_adamw8bit", "with a few GB of memory")
    if picked is None:
        return 2
    size, device = picked
    size = TOY if size.name == "toy" else size
    torch._inductor.config.compile_threads = 1  # else its processes start while we measure
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    try:
        store = FluxStore(ADAMW, size, device, options)
    except ResultsError as error:
        print(f"bench_adamw8bit: error: {error}", file=sys.stderr)
        return 2
    for name in CASES:
        case = f"adamw8bit-{name}-{size.name}"
        if options.only not in name or store.known(case):
            continue
        if time.perf_counter() - started > options.seconds:
            store.leave_out(case, f"--seconds {options.seconds:g} reached")
            continue
        store.begin(case)
        try:
            row = measure(name, size, device, options, say)
            store.add({"case": case, "task": name, **row})
        except ResultsError as error:
            store.leave_out(case, str(error))
        except torch.OutOfMemoryError as error:
            store.leave_out(case, f"out of memory: {first_line(error)}")
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    store.save()  # what --resume has closed, too
    content = store.content
    print(f"\n{heading(content)}")
    for row in content["cases"]:
        print(f"\n{row['task']}: {share_text(row)}; ours on backend {row['backend']}\n")
        print(table(cells(row)))
    print("\n" + "\n".join([*not_timed(content), *goals(content)]))
    if store.stored:
        print(f"\nwritten to {store.path}")
    measured = [OURS in row["variants"] for row in content["cases"]]
    return 0 if measured and all(measured) else 3


if __name__ == "__main__":
    sys.exit(main())
