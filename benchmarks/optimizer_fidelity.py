"""How true AdamW8bit is to float32 AdamW where steps are tiny, beside bitsandbytes and torchao.

    python benchmarks/optimizer_fidelity.py [--elements N] [--steps 300] [--json FILE]

Bfloat16 weights ~ N(0, .02), lr 2e-6, gradients of rms 1e-5, 1e-6 and 1e-7 whose mean is a tenth of
their noise, the same ones (rounded to bfloat16) for all. Against what float32 AdamW adds up to from
the same start:

    error        norm of the difference over the norm of the true change
    bias         projection of the change on the true one, less 1, and its standard error
    never moved  share of the weights, with what is kept beside them, that no step has changed

Writes benchmarks/results/optimizer-fidelity-<machine>.json. Exit code 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import _paths  # noqa: F401
import torch
from results import FOLDER, commit, machine, slug, versions
from texts import table
from torch import Tensor, nn

import g2rpo_kernels as gk
from g2rpo_kernels.optim.arithmetic import LOW_BITS, join_master

LR, BETAS, EPS, SPREAD, MEAN = 2e-6, (0.9, 0.999), 1e-8, 0.02, 0.1
SIZES = (1e-5, 1e-6, 1e-7)  # rms of the gradients
NUMBERS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
MOST_ERROR, MOST_BIAS = 0.10, 0.01  # of 24 bits; of 16 bits
TRUTH = "float32 AdamW"
PACKAGES = ("bitsandbytes", "torchao")


class Contender(NamedTuple):
    """One optimizer on one parameter a size of gradients."""

    name: str
    step: Callable[[list[Tensor]], None]  # with gradients, bfloat16
    read: Callable[[], list[Tensor]]  # the weights, float32


def _stepped(opt: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> Callable:
    def step(gradients: list[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.to(parameter.dtype)
        opt.step()

    return step


def ours(start: list[Tensor], master_bits: int, codec: str) -> Contender:
    parameters = [nn.Parameter(w.clone()) for w in start]
    opt = gk.AdamW8bit(parameters, **NUMBERS, master_bits=master_bits, codec=codec, seed=1)

    def read() -> list[Tensor]:
        low_bits = [opt.state[p].get("low_bits") for p in parameters]
        return [
            join_master(p.detach(), low, LOW_BITS[master_bits])
            for p, low in zip(parameters, low_bits)
        ]

    opt.init_state()
    return Contender(f"AdamW8bit, {master_bits} bits, {codec}", _stepped(opt, parameters), read)


def float32(start: list[Tensor]) -> Contender:
    parameters = [nn.Parameter(w.float()) for w in start]
    opt = torch.optim.AdamW(parameters, **NUMBERS, fused=True)
    return Contender(TRUTH, _stepped(opt, parameters), lambda: [p.detach() for p in parameters])


def nearest(start: list[Tensor]) -> Contender:
    """float32 moments and arithmetic; what is kept of a weight is the nearest bfloat16."""
    inner = float32(start)

    def step(gradients: list[Tensor]) -> None:
        inner.step(gradients)
        for w in inner.read():
            w.copy_(w.bfloat16())

    return Contender("bfloat16 to nearest, float32 moments", step, inner.read)


def package(start: list[Tensor], module: str, name: str, **options) -> Contender:
    opt_class = importlib.import_module(module).AdamW8bit
    parameters = [nn.Parameter(w.clone()) for w in start]
    opt = opt_class(parameters, **NUMBERS, **options)
    read = lambda: [p.detach().float() for p in parameters]  # noqa: E731
    return Contender(name, _stepped(opt, parameters), read)


def makers() -> dict[str, Callable[[list[Tensor]], Contender]]:
    """The others, by the package that they need, "" for none."""
    theirs = (
        ("bitsandbytes.optim", "bitsandbytes AdamW8bit", {}),
        ("torchao.optim", "torchao AdamW8bit, bf16_stochastic_round",
         {"bf16_stochastic_round": True}),
    )  # fmt: skip
    made = {
        f"{bits} {codec}": lambda start, bits=bits, codec=codec: ours(start, bits, codec)
        for codec in ("dynamic", "fp8")
        for bits in (32, 24, 16)
    }
    made["nearest"] = nearest
    for module, name, options in theirs:
        made[name] = lambda start, m=module, n=name, o=options: package(start, m, n, **o)
    return made


def compete(elements: int, steps: int, device: str) -> tuple[list[dict], dict[str, str]]:
    """A row an optimizer and size of gradients; and why an optimizer has none."""
    draw = torch.Generator(device).manual_seed(0)
    normal = lambda: torch.randn(elements, generator=draw, device=device)  # noqa: E731
    start = [(normal() * SPREAD).bfloat16() for _ in SIZES]
    mean = normal() * MEAN
    contenders, left_out = [float32(start)], {}
    for name, make in makers().items():
        try:
            contenders.append(make(start))
        except Exception as error:  # whatever the import of a package finds missing: it is told
            if name.split()[0] not in PACKAGES:
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    still = {c.name: [torch.ones(elements, dtype=torch.bool, device=device) for _ in SIZES]
             for c in contenders}  # fmt: skip
    torch.manual_seed(0)  # torchao rounds with it
    for _ in range(steps):
        unit = mean + normal()
        gradients = [(unit * size).bfloat16() for size in SIZES]
        for contender in contenders:
            contender.step(gradients)
            for same, w, first in zip(still[contender.name], contender.read(), start):
                same &= w == first
    truth = [w.double() - first.double() for w, first in zip(contenders[0].read(), start)]
    rows = []
    for contender in contenders[1:]:
        read = zip(SIZES, contender.read(), start, truth, still[contender.name])
        for size, w, first, true, same in read:
            error = (w.double() - first.double()) - true
            along, square = error * true, true.square().sum()
            bias = (along.sum() / square).item()
            deviation = (along - bias * true.square()).square().sum().sqrt()
            rows.append({
                "optimizer": contender.name,
                "gradient_rms": size,
                "error": (error.norm() / true.norm()).item(),
                "bias": bias,
                "bias_standard_error": (deviation / square).item(),
                "never_moved": same.float().mean().item(),
            })  # fmt: skip
    return rows, left_out


def _packages(left_out: dict[str, str]) -> dict[str, str]:
    there = [name for name in PACKAGES if not any(left.startswith(name) for left in left_out)]
    return {name: importlib.metadata.version(name) for name in there}


def verdicts(rows: list[dict]) -> list[tuple[bool, str]]:
    """A goal each: whether it is reached, and how."""
    found = []
    for bits, key, most in ((24, "error", MOST_ERROR), (16, "bias", MOST_BIAS)):
        values = [abs(r[key]) for r in rows if r["optimizer"] == f"AdamW8bit, {bits} bits, dynamic"]
        worst = max(values)
        reached = worst <= most if key == "error" else worst < most
        found.append((
            reached,
            f"{'reached' if reached else 'MISSED'}: {bits} bits, {key} {worst:.2%} at most, goal "
            f"{most:.0%}",
        ))  # fmt: skip
    return found


def shown(rows: list[dict]) -> list[dict[str, str]]:
    """A line an optimizer; sizes of gradients beside one another, in per cent."""
    lines = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        mine = [row for row in rows if row["optimizer"] == name]

        def cell(text: Callable[[dict], str], mine: list[dict] = mine) -> str:
            return " / ".join(text(row) for row in mine)

        lines.append({
            "optimizer": name,
            "error": cell(lambda r: f"{100 * r['error']:.1f}"),
            "bias ± standard error": cell(
                lambda r: f"{100 * r['bias']:+.2f} ± {100 * r['bias_standard_error']:.2f}"
            ),
            "never moved": cell(lambda r: f"{100 * r['never_moved']:.1f}"),
        })  # fmt: skip
    return lines


def main(arguments: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    native = device == "cuda" or gk.backends()["cpu"].available
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**18 if native else 2**16,
                        help="weights a size of gradients (default: %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=300)
    name = slug(machine(device)["name"])
    parser.add_argument("--json", type=Path, default=FOLDER / f"optimizer-fidelity-{name}.json")
    options = parser.parse_args(arguments)
    for what in ("elements", "steps"):
        if getattr(options, what) < 1:
            parser.error(f"--{what} is {getattr(options, what)}; expected at least 1")
    began = time.perf_counter()
    rows, left_out = compete(options.elements, options.steps, device)
    print(
        f"{options.steps} steps of lr {LR:g}, {options.elements:,} weights ~ N(0, {SPREAD}), "
        f"against {TRUTH}; {time.perf_counter() - began:.0f} s\n"
        f"in per cent, for gradients of rms {' / '.join(f'{size:g}' for size in SIZES)}:\n"
    )
    print(table(shown(rows)))
    for left, why in left_out.items():
        print(f"{left}: not installed, {why}")
    goals = verdicts(rows)
    print("\n" + "\n".join(text for _, text in goals))
    doubtful = [r for r in rows if not math.isfinite(r["error"])]
    report = {
        "kind": "optimizer-fidelity", "device": device, "machine": machine(device),
        "versions": versions(device) | _packages(left_out),
        "date": time.strftime("%Y-%m-%d"), "commit": commit(),
        "elements": options.elements, "steps": options.steps, "lr": LR, "rows": rows,
        "left_out": left_out, "goals": [text for _, text in goals],
    }  # fmt: skip
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.json}")
    return 0 if all(reached for reached, _ in goals) and not doubtful else 1


if __name__ == "__main__":
    sys.exit(main())
