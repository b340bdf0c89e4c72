"""One case, measured: every way of computing it, checked against eager, in alternating rounds.

    with prepared(case, "cpu", Settings()) as ready:
        row = ready.measure()     # a dict for the results file

A way that cannot be built, fails or disagrees with eager is not timed; its row says why.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
import torch._inductor.config
from timing import (
    Block,
    Variant,
    cache_bytes,
    count_launches,
    device_block,
    event_block,
    interleave,
    quartiles,
    ratio,
    sets_past_cache,
    synchronizer,
    wall_blocks,
)
from torch import Tensor
from workloads import TASKS, Case, Inputs, Way, another_set, bytes_moved, make_inputs

import g2rpo_kernels as gk

EAGER, COMPILED_EAGER, COMPILED_REFERENCE = "eager", "compiled eager", "compiled reference"
COPY = "copy"
TOLERANCE = 1e-2  # relative, in norm: is it the same computation? How exact, the tests say


@dataclass(frozen=True)
class Settings:
    rounds: int = 21
    budget: float = 6.0  # seconds of rounds a case, after compiling
    at_least: float = 2e-3  # seconds a block
    compile: bool = True
    others: bool = True  # our backends beside the one that is used


def backends_of(device: str) -> list[str]:
    """Available backends that can serve this device, the one in use first."""
    serve = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}[device]
    status = gk.backends()
    there = [name for name in serve if status[name].available]
    return sorted(there, key=lambda name: device not in status[name].used_for)


def ours(backend: str) -> str:
    return f"ours ({backend})"


@functools.cache
def copy_buffers(device: str) -> tuple[Tensor, Tensor]:
    """Four times the last-level cache, at most a GiB: what the copy bandwidth is measured on."""
    count = min(4 * cache_bytes(device), 2**30) // 4
    source = torch.arange(count, dtype=torch.int32, device=device)
    return source, torch.empty_like(source)


def as_outputs(returned: object) -> tuple[Tensor, ...]:
    return returned if isinstance(returned, tuple) else (returned,)


def caller(way: Way, function: Callable, sets: list[Inputs], backward: bool) -> Callable:
    """way's function on input set i; with backward, the gradient is one more output."""
    arguments = [tuple(inputs[name] for name in way.arguments) for inputs in sets]
    if not backward or way.closed_form:
        return lambda i: function(*arguments[i])
    upstream = [inputs["upstream"] for inputs in sets]

    def run(i: int) -> tuple[Tensor, ...]:
        out = as_outputs(function(*arguments[i]))
        above = upstream[i].view(out[0].shape) if out[0].ndim else None
        return (*out, *torch.autograd.grad(out[0], arguments[i][0], above))

    return run


def variants_of(case: Case, sets: list[Inputs], device: str, settings: Settings) -> list[Variant]:
    """Ways of computing the case, best chances for each: what is compiled is one full graph."""
    task, backward = TASKS[case.task], case.backward
    made = [
        Variant(EAGER, caller(task.eager, task.eager.function, sets, backward),
                capturable=case.task != "group_advantages"),
    ]  # fmt: skip
    reference = task.reference_with_gradient if backward else task.reference
    if settings.compile:
        # Else inductor starts worker processes, which load torch while the first case is timed.
        torch._inductor.config.compile_threads = 1
        ways = {COMPILED_EAGER: task.eager if task.compile_eager else None}
        ways[COMPILED_REFERENCE] = reference
        for name, way in ways.items():
            if way is not None:
                compiled = torch.compile(way.function, fullgraph=True, dynamic=False)
                made.append(Variant(name, caller(way, compiled, sets, backward)))
    used, *others = backends_of(device)
    run = caller(task.ours, task.ours.function, sets, backward)
    for backend in [used, *(others if settings.others else ())]:
        context = functools.partial(gk.use_backend, backend)
        # there the reference copies its weights to the GPU
        capturable = (case.task, backend) != ("group_advantages", "reference")
        made.append(Variant(ours(backend), run, context, capturable))
    for name, way in (task.extra or {}).items():
        context = functools.partial(gk.use_backend, used)
        made.append(Variant(name, caller(way, way.function, sets, backward), context))
    return made


def disagreement(got: tuple, want: tuple, random: bool) -> float:
    """Relative difference of the first output, and of the last where both return as many.

    Of random outputs only the spread of the first is compared, less six of its standard errors.
    """
    if random:
        spread, expected = (x[0].double().square().mean().sqrt().item() for x in (got, want))
        away = abs(spread / expected - 1) - 6 / got[0].numel() ** 0.5
        return away if math.isfinite(away) else math.inf
    pairs = [(got[0], want[0])]
    if len(got) == len(want):
        pairs.append((got[-1], want[-1]))
    worst = 0.0
    for a, b in pairs:
        a, b = a.detach().flatten().double(), b.detach().flatten().double()
        away = ((a - b).norm() / b.norm()).item()
        worst = max(worst, away if math.isfinite(away) else math.inf)
    return worst


@dataclass
class Prepared:
    """A case whose variants have run once and agree.

    Another kind of case overrides what is compared: `comparable`, `away` and `tolerance`.
    """

    case: Case
    device: str
    settings: Settings
    sets: list[Inputs]
    variants: list[Variant]
    moved: int = 0  # bytes of one call
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def tolerance(self) -> float:
        return TOLERANCE

    def comparable(self, variant: Variant, returned: object) -> tuple[Tensor, ...]:
        """What a variant returned, as numbers that are compared with eager's."""
        return as_outputs(returned)

    def away(self, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
        """How far from eager's, relative in norm."""
        return disagreement(got, want, TASKS[self.case.task].random)

    @property
    def ours(self) -> str | None:
        """The variant that a user gets: the first of ours that works."""
        return next((v.name for v in self.variants if v.name.startswith("ours")), None)

    def check(self) -> None:
        """Run every variant once, compare with eager, keep those that agree."""
        want, kept = None, []
        for variant in self.variants:
            try:
                with variant.context():
                    for i in range(min(2, len(self.sets))):
                        returned = variant.run(i)
                    synchronizer(self.device)()
                got = self.comparable(variant, returned)
                want = got if want is None else want
                away = self.away(got, want)
            except Exception as error:  # whatever it is, it becomes this variant's row
                self.errors[variant.name] = f"{type(error).__name__}: {first_line(error)}"
                synchronizer(self.device)()  # raises if the error has left the GPU unusable
                continue
            if away > self.tolerance:
                self.errors[variant.name] = f"disagrees with eager by {away:.2g}"
                continue
            kept.append(variant)
        self.variants = kept

    def measure(self) -> dict:
        """The case's row of the results file."""
        moved, sets = self.moved, len(self.sets)
        source, target = copy_buffers(self.device)
        copy = Variant(COPY, lambda i: target.copy_(source))
        timed = [*self.variants, copy]
        at_least, rounds = self.settings.at_least, self.settings.rounds
        budget, timers = self.settings.budget, {}
        wall = wall_blocks(timed, sets, self.device, at_least)
        blocks = wall
        if self.device == "cuda":
            blocks = {v.name: self.on_device(v, timers) for v in timed}
        seconds = interleave(blocks, rounds, budget)
        walls = seconds if blocks is wall else interleave(wall, rounds, budget)
        row = {
            "case": self.case.id, "task": self.case.task, "shape": self.case.shape,
            "dtype": self.case.dtype, "backward": self.case.backward, "ours": self.ours,
            "bytes": moved, "input_sets": sets, "rounds": len(seconds[COPY]), "variants": {},
            "copy": {"bytes": 2 * source.nbytes, "seconds": quartiles(seconds[COPY])[1]},
            "errors": self.errors,
        }  # fmt: skip
        for variant in self.variants:
            name = variant.name
            low, middle, high = quartiles(seconds[name])
            speed = ratio([moved / s for s in seconds[name]],
                          [2 * source.nbytes / s for s in seconds[COPY]])  # fmt: skip
            entry = {
                "seconds": middle, "low": low, "high": high,
                "wall_seconds": quartiles(walls[name])[1],
                "gb_per_second": moved / middle / 1e9,
                "copy_fraction": speed["median"],
                "timer": timers.get(name, "wall"),
                "launches": count_launches(variant) if self.device == "cuda" else None,
                "each_round": [float(f"{s:.4g}") for s in seconds[name]],
            }  # fmt: skip
            if self.ours:
                entry["over_ours"] = ratio(seconds[name], seconds[self.ours])
            row["variants"][name] = entry
        return row

    def on_device(self, variant: Variant, timers: dict[str, str]) -> Block:
        sets = 1 if variant.name == COPY else len(self.sets)
        if variant.capturable:
            try:
                block = device_block(variant, sets, self.settings.at_least)
                timers[variant.name] = "graph"
                return block
            except RuntimeError as error:
                timers[variant.name] = f"events, since no graph was captured: {first_line(error)}"
                torch.cuda.synchronize()
        else:
            timers[variant.name] = "events"
        return event_block(variant, sets, self.settings.at_least)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:200]


def ready_to_check(case: Case, device: str, settings: Settings) -> Prepared:
    """Every way of computing the case, on sets of inputs that no cache holds together."""
    first, moved = make_inputs(case, device), bytes_moved(case)
    count = sets_past_cache(moved, cache_bytes(device))
    sets = [first, *(another_set(first) for _ in range(count - 1))]
    if case.backward:
        for inputs in sets:
            inputs["velocity"] = inputs["velocity"].detach().requires_grad_()
    variants = variants_of(case, sets, device, settings)
    return Prepared(case, device, settings, sets, variants, moved)


@contextmanager
def checked(ready: Prepared) -> Iterator[Prepared]:
    """A case ready to be measured; its memory and its compiled code are given up on leaving.

    That frees memory only because nobody but `ready` holds the inputs and the variants.
    """
    try:
        ready.check()
        yield ready
    finally:
        ready.variants, ready.sets = [], []
        torch._dynamo.reset()
        gc.collect()
        if ready.device == "cuda":
            torch.cuda.empty_cache()


def prepared(case: Case, device: str, settings: Settings) -> AbstractContextManager[Prepared]:
    return checked(ready_to_check(case, device, settings))
