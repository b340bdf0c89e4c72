"""One step of AdamW8bit under pytest-benchmark, beside its reference, torch's and bitsandbytes'.

    pytest benchmarks -k adamw --benchmark-only

The parameters are those of one double and one single block of FLUX.1-dev: of its widths on a GPU,
of a sixteenth of them on a CPU, where the reference takes seconds already. The gradients are known
to be finite: grad_scale is given, as after clipping. `extra_info` of ours has the ratios of
interleaved rounds.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from timing import interleave, ratio, synchronizer
from torch import nn

import g2rpo_kernels as gk

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

OURS, REFERENCE = "ours", "reference"
TORCH, THEIRS = "torch fused, float32", "bitsandbytes"
CONTENDERS = (OURS, REFERENCE, TORCH, THEIRS)
# Of a bfloat16 parameter at 24 bits: weight, low bits and two codes both ways, gradient read, and
# both ways two float32 scales a block of 256.
BYTES = 2 * (2 + 1 + 1 + 1) + 2 + 2 * 2 * 4 / 256
ROUNDS, BUDGET = 7, 20.0  # seconds


def shapes(device: str, toy: bool) -> list[tuple[int, ...]]:
    """Of the parameters of a double and a single block."""
    width = 3072 if device == "cuda" else 3072 // 16
    width = 3072 // 64 if toy else width
    double = [(6 * width, width), *[(width, width)] * 4, (4 * width, width), (width, 4 * width)]
    single = [(3 * width, width), *[(width, width)] * 3, (4 * width, width), (width, 5 * width)]
    weights = [*double, *double, *single]
    return [*weights, *[shape[:1] for shape in weights], *[(128,)] * 6]


def make_step(name: str, device: str, toy: bool) -> Callable[[], object]:
    """One step of one contender, on parameters of its own."""
    dtype = torch.float32 if name == TORCH else torch.bfloat16
    given = []
    for shape in shapes(device, toy):
        p = nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype))
        p.grad = (torch.randn(shape, device=device) * 1e-6).to(dtype)
        given.append(p)
    if name == TORCH:
        return torch.optim.AdamW(given, lr=2e-6, fused=True).step
    if name == THEIRS:
        return importlib.import_module("bitsandbytes.optim").AdamW8bit(given, lr=2e-6).step
    opt = gk.AdamW8bit(given, lr=2e-6)
    if name == OURS:
        return lambda: opt.step(grad_scale=1.0)

    def step() -> None:
        with gk.use_backend("reference"):
            opt.step(grad_scale=1.0)

    return step


def installed(name: str) -> bool:
    return name != THEIRS or importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.benchmark(group="adamw8bit")
@pytest.mark.parametrize("name", CONTENDERS)
def test_adamw8bit_step(
    name: str, benchmark, device: str, toy: bool, ceiling: float
) -> None:
    if not installed(name):
        pytest.skip("bitsandbytes is not installed: pip install bitsandbytes")
    synchronize = synchronizer(device)
    names = [n for n in CONTENDERS if installed(n)] if name == OURS else [name]
    steps = {n: make_step(n, device, toy) for n in names}

    def timed(step: Callable[[], object]) -> float:
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        return time.perf_counter() - began

    for step in steps.values():  # which makes the states
        step()
    elements = sum(torch.Size(shape).numel() for shape in shapes(device, toy))
    benchmark.extra_info["elements"] = elements
    if name == OURS:
        blocks = {n: lambda step=step: timed(step) for n, step in steps.items()}
        seconds = interleave(blocks, ROUNDS, BUDGET)
        ours = statistics.median(seconds[OURS])
        benchmark.extra_info.update(
            seconds={n: statistics.median(values) for n, values in seconds.items()},
            over_ours={n: ratio(values, seconds[OURS]) for n, values in seconds.items()},
            bytes=BYTES * elements, gb_per_second=BYTES * elements / ours / 1e9,
            ceiling_gb_per_second=ceiling / 1e9, of_ceiling=BYTES * elements / ours / ceiling,
        )  # fmt: skip
    benchmark.pedantic(timed, args=(steps[name],), rounds=ROUNDS, warmup_rounds=1)
