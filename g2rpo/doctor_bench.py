"""`g2rpo doctor --bench`: in some twenty seconds, what this machine does at most and how the main
ops compare with the same in eager PyTorch.

For a first look: benchmarks/ in a checkout measures many more cases, beside torch.compile too.
Ours and eager take turns, and what is printed are medians; nothing is written.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import g2rpo_kernels as gk

from .doctor_packages import first_line

SECONDS = 2.0  # a line
Call = Callable[[], object]
# Of a latent of 720 x 720 pixels and its branches; of FLUX's width; of the steps' parameters.
SIZES = {
    "cuda": {"copy": 2**29, "product": 8192, "tokens": 2537, "latent": (12, 2025, 64),
             "parameters": 2**27},
    "cpu": {"copy": 2**26, "product": 1024, "tokens": 512, "latent": (12, 2025, 64),
            "parameters": 2**22},
    "tiny": {"copy": 2**12, "product": 32, "tokens": 16, "latent": (3, 8, 4), "parameters": 2**13},
}  # fmt: skip
ETA, SIGMAS = 0.7, (0.9, 0.8)


@dataclass(frozen=True)
class Line:
    """What is timed: ours, eager PyTorch where there is such, and what a call moves or computes."""

    name: str
    ours: Call
    eager: Call | None = None
    work: float = 0.0
    unit: str = ""  # of work: "GB/s" or "TFLOP/s"


def median_seconds(calls: list[Call], seconds: float, synchronize: Call) -> list[float]:
    """Of each call, which take turns until so many seconds are over, thrice at least."""
    times: list[list[float]] = [[] for _ in calls]
    repeats = []
    for call in calls:
        call()
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        # So that a round is long against the clock and a synchronisation.
        repeats.append(max(1, min(1000, math.ceil(2e-3 / max(time.perf_counter() - began, 1e-7)))))
    began = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - began < seconds:
        for call, count, found in zip(calls, repeats, times, strict=True):
            synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            synchronize()
            found.append((time.perf_counter() - start) / count)
    return [statistics.median(found) for found in times]


# What is timed -----------------------------------------------------------------------------------


def ceilings(device: str, size: dict) -> list[Callable[[], Line]]:
    """Each makes its tensors when it is called, so that one line's are gone with it."""

    def copy() -> Line:
        source = torch.zeros(size["copy"] // 4, device=device)
        target = torch.empty_like(source)
        return Line("copy", lambda: target.copy_(source), work=2 * source.nbytes, unit="GB/s")

    def product(dtype: torch.dtype) -> Line:
        n = size["product"]
        x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        name = f"matrix product, {str(dtype).removeprefix('torch.')}"
        if dtype is not torch.float8_e4m3fn:
            return Line(name, lambda: x @ y, work=2.0 * n**3, unit="TFLOP/s")
        support = gk.fp8_support(device)
        if support.kind != "rowwise":
            raise RuntimeError(support.reason)
        one = torch.ones(n, 1, device=device), torch.ones(1, n, device=device)
        return Line(name, lambda: torch._scaled_mm(x, y.t(), *one, out_dtype=torch.bfloat16),
                    work=2.0 * n**3, unit="TFLOP/s")  # fmt: skip

    def attention() -> Line:
        shape = 1, 24, size["tokens"], 128
        q, k, v = (torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(3))
        return Line("attention, bfloat16", lambda: F.scaled_dot_product_attention(q, k, v),
                    work=4.0 * 24 * 128 * size["tokens"] ** 2, unit="TFLOP/s")  # fmt: skip

    def launch() -> Line:
        one = torch.zeros(1, device=device)
        return Line("an op on one element", lambda: one.add_(1))

    other = torch.float32 if device == "cpu" else torch.float8_e4m3fn
    return [copy, lambda: product(torch.bfloat16), lambda: product(other), attention, launch]


def ops(device: str, size: dict) -> list[Callable[[], Line]]:
    branches, *row = size["latent"]

    def inputs() -> tuple[Tensor, Tensor, gk.StepCoefficients, Tensor]:
        velocity, latents = (torch.randn(1, *row, device=device) for _ in range(2))
        seeds = torch.arange(branches, device=device).view(1, branches)
        return velocity, latents, gk.step_coefficients(*SIGMAS, ETA).to(device), seeds

    def sde_step() -> Line:
        velocity, latents, c, seeds = inputs()
        return Line("sde_step", lambda: gk.sde_step(velocity, latents, c, seeds=seeds),
                    lambda: eager_step(velocity, latents, branches))  # fmt: skip

    def policy_loss() -> Line:
        velocity, latents, c, seeds = inputs()
        x_next, old = gk.sde_step(velocity, latents, c, seeds=seeds)
        advantages, leaf = torch.randn_like(old), velocity.requires_grad_()

        def ours() -> object:
            loss = gk.policy_loss(leaf, latents, x_next, old, advantages, c).loss
            return torch.autograd.grad(loss, leaf)

        def eager() -> object:
            _, log_prob = eager_step(leaf, latents, branches, x_next.flatten(0, 1))
            ratio = (log_prob - old.flatten()).exp()
            clipped = ratio.clamp(1 - 1e-4, 1 + 1e-4)
            wanted = advantages.flatten()
            return torch.autograd.grad(
                torch.maximum(-wanted * ratio, -wanted * clipped).mean(), leaf
            )

        return Line("policy_loss, with its gradient", ours, eager)

    def adamw8bit() -> Line:
        count = size["parameters"]
        mine = nn.Parameter(torch.randn(count, device=device, dtype=torch.bfloat16))
        theirs = nn.Parameter(mine.detach().float())
        mine.grad, theirs.grad = torch.randn_like(mine), torch.randn_like(theirs)
        steps = gk.AdamW8bit([mine], lr=1e-6), torch.optim.AdamW([theirs], lr=1e-6)
        return Line(f"AdamW8bit, {count / 1e6:.3g} M parameters", steps[0].step, steps[1].step)

    return [sde_step, policy_loss, adamw8bit]


def eager_step(
    velocity: Tensor, latents: Tensor, branches: int, x_next: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same step as the trainers of flow models write it, a row a branch; of branches that are
    there their log-probabilities."""
    sigma, sigma_next = SIGMAS
    v, x = (t.repeat_interleave(branches, dim=0) for t in (velocity, latents))
    dt, std = sigma_next - sigma, ETA * math.sqrt(sigma / (1 - sigma))
    mean = x * (1 + std**2 / (2 * sigma) * dt)
    mean = mean + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    scale = std * math.sqrt(-dt)
    if x_next is None:
        x_next = mean + scale * torch.randn_like(mean)
    log_prob = -((x_next - mean) ** 2) / (2 * scale**2) - math.log(scale * math.sqrt(2 * math.pi))
    return x_next, log_prob.flatten(1).mean(1)


# The table ---------------------------------------------------------------------------------------

HEAD = ("", "time", "rate", "torch eager", "times")


def measure(made: Callable[[], Line], seconds: float, synchronize: Call) -> tuple[str, ...]:
    """A line of the table."""
    line = made()
    calls = [line.ours] + ([line.eager] if line.eager else [])
    ours, *eager = median_seconds(calls, seconds, synchronize)
    scale = {"GB/s": 1e9, "TFLOP/s": 1e12}.get(line.unit)
    rate = f"{line.work / ours / scale:.3g} {line.unit}" if scale else ""
    beside = (time_text(eager[0]), f"{eager[0] / ours:.3g}x") if eager else ("", "")
    return line.name, time_text(ours), rate, *beside


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def run(device: str, seconds: float = SECONDS, size: str | None = None) -> int:
    """Print the table, a line as soon as it is measured. Returns 1 where an op of ours failed.

    device: "cpu" or "cuda". seconds: a line. size: a key of SIZES; None: the device's.
    """
    sizes = SIZES[size or device]
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    print("{:32}{:>11}  {:>15}{:>13}{:>8}".format(*HEAD).rstrip())
    failed = False
    for kind, lines in (("", ceilings(device, sizes)), ("ours", ops(device, sizes))):
        for made in lines:
            try:
                cells = measure(made, seconds, synchronize)
            except Exception as error:  # this is what the command is there to show
                name = getattr(made, "__name__", "matrix product").replace("<lambda>", "product")
                print(f"{name}: not timed: {first_line(error)}", flush=True)
                failed |= kind == "ours"
                continue
            print("{:32}{:>11}  {:>15}{:>13}{:>8}".format(*cells).rstrip(), flush=True)
    return int(failed)
