"""One case of FLUX's block ops, measured as measure.py measures the flow ops.

with prepared(case, "cuda", Settings()) as ready:
    row = ready.measure()     # a dict for the results file
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch._inductor.config
from flux_ops import OPS, Inputs, Op, Way
from flux_shapes import Size
from measure import (
    COPY,
    EAGER,
    Prepared,
    Settings,
    as_outputs,
    backends_of,
    cache_bytes,
    copy_buffers,
    disagreement,
    first_line,
    ours,
)
from timing import (
    Variant,
    count_launches,
    interleave,
    quartiles,
    ratio,
    sets_past_cache,
    synchronizer,
    wall_blocks,
)
from torch import Tensor

import g2rpo_kernels as gk

COMPILED = "torch.compile"
TOLERANCE = 1e-2, 5e-2  # relative, in norm: of bfloat16, of e4m3 where a rounding more can flip it


@dataclass(frozen=True)
class Case:
    """One row of the results, with what `Prepared` asks of a case."""

    task: str  # a key of OPS
    size: Size
    backward: bool = False
    dtype: str = "bfloat16"

    @property
    def op(self) -> Op:
        return OPS[self.task]

    @property
    def id(self) -> str:
        return f"{self.task}-{'forward+backward' if self.backward else 'forward'}-{self.size.name}"

    @property
    def shape(self) -> str:
        return " × ".join(map(str, self.op.shape(self.size)))


def cases_of(size: Size) -> list[Case]:
    return [
        Case(task, size, backward)
        for task, op in OPS.items()
        for backward in ((False,) if op.fp8 else (False, True))
    ]


def make_inputs(case: Case, device: str) -> Inputs:
    """One set, at addresses of its own; with backward, the op's leaves require gradients."""
    made = case.op.inputs(case.size, device)
    wanted = {*case.op.ours.arguments, *case.op.eager.arguments}
    made = {name: x for name, x in made.items() if name in wanted}
    if case.backward:
        for name in {*case.op.ours.leaves, *case.op.eager.leaves}:
            made[name] = made[name].detach().requires_grad_()
    return made


def bytes_of(case: Case, inputs: Inputs, outputs: tuple[Tensor, ...]) -> int:
    """As flux_ops.py counts them."""
    op = case.op

    def total(names: tuple[str, ...]) -> int:
        known = {**inputs, "hidden": outputs[0]}
        return sum(known[name].nbytes for name in names)

    written = sum(x.nbytes for x in outputs)
    forward = total(op.ours.arguments) + written
    return forward + written + total(op.reads) + total(op.writes) if case.backward else forward


def caller(way: Way, function: Callable, sets: list[Inputs], above: list[Tensor] | None):
    """The way on input set i; with gradients above its outputs, those of its leaves come behind."""
    arguments = [tuple(inputs[name] for name in way.arguments) for inputs in sets]
    leaves = [[inputs[name] for name in way.leaves] for inputs in sets]

    def run(i: int) -> tuple[Tensor, ...]:
        out = flat(function(*arguments[i]))
        return out if above is None else (*out, *torch.autograd.grad(out, leaves[i], above))

    return run


def flat(out: object) -> tuple[Tensor, ...]:
    parts = as_outputs(out)
    return tuple(x for part in parts for x in (part if isinstance(part, tuple) else (part,)))


def comparable(case: Case, way: Way, got: tuple[Tensor, ...], outputs: int) -> list[Tensor]:
    """Outputs and gradients in the form that ours have; what is quantised in numbers again."""
    if case.op.fp8:
        *first, values, scales = got
        return [*first, values.float() * scales[..., None]]
    grads = list(got[outputs:])
    return [*got[:outputs], *(way.joined(grads) if grads else ())]


@dataclass
class PreparedBlock(Prepared):
    """A case of blocks. Its bytes and its comparison with eager are not those of the flow ops."""

    ways: dict[str, Way] = field(default_factory=dict)  # by the name of a variant
    moved: int = 0  # bytes, once a variant has run

    def check(self) -> None:
        """Run every variant, keep those whose every output and gradient agree with eager's."""
        case, want, kept, outputs = self.case, None, [], 0
        for variant in self.variants:
            way = self.ways[variant.name]
            try:
                with variant.context():
                    got = variant.run(0)
                    synchronizer(self.device)()
                if want is None:
                    outputs = len(got) - (len(way.leaves) if case.backward else 0)
                    self.moved = bytes_of(case, self.sets[0], got[:outputs])
                numbers = comparable(case, way, got, outputs)
                want = want or numbers
                pairs = zip(numbers, want, strict=True)
                away = max(disagreement((a,), (b,), False) for a, b in pairs)
            except Exception as error:  # whatever it is, it becomes this variant's row
                self.errors[variant.name] = f"{type(error).__name__}: {first_line(error)}"
                synchronizer(self.device)()  # raises if the error has left the GPU unusable
                continue
            if away > TOLERANCE[case.op.fp8]:
                self.errors[variant.name] = f"disagrees with eager by {away:.2g}"
                continue
            kept.append(variant)
        self.variants = kept

    def measure(self) -> dict:
        """The case's row of the results file, with the keys of run.py's."""
        source, target = copy_buffers(self.device)
        copy = Variant(COPY, lambda i: target.copy_(source))
        timed, settings, timers = [*self.variants, copy], self.settings, {}
        wall = wall_blocks(timed, len(self.sets), self.device, settings.at_least)
        blocks = wall
        if self.device == "cuda":
            blocks = {v.name: self.on_device(v, timers) for v in timed}
        seconds = interleave(blocks, settings.rounds, settings.budget)
        walls = seconds if blocks is wall else interleave(wall, settings.rounds, settings.budget)
        row = {
            "case": self.case.id, "task": self.case.task, "shape": self.case.shape,
            "dtype": self.case.dtype, "backward": self.case.backward, "ours": self.ours,
            "bytes": self.moved, "input_sets": len(self.sets), "rounds": len(seconds[COPY]),
            "copy": {"bytes": 2 * source.nbytes, "seconds": quartiles(seconds[COPY])[1]},
            "variants": {}, "errors": self.errors,
        }  # fmt: skip
        for variant in self.variants:
            times = seconds[variant.name]
            low, middle, high = quartiles(times)
            copied = [2 * source.nbytes / s for s in seconds[COPY]]
            row["variants"][variant.name] = entry = {
                "seconds": middle, "low": low, "high": high,
                "wall_seconds": quartiles(walls[variant.name])[1],
                "gb_per_second": self.moved / middle / 1e9,
                "copy_fraction": ratio([self.moved / s for s in times], copied)["median"],
                "timer": timers.get(variant.name, "wall"),
                "launches": count_launches(variant) if self.device == "cuda" else None,
                "each_round": [float(f"{s:.4g}") for s in times],
            }  # fmt: skip
            if self.ours:
                entry["over_ours"] = ratio(times, seconds[self.ours])
        return row


@contextmanager
def prepared(case: Case, device: str, settings: Settings) -> Iterator[PreparedBlock]:
    """A case ready to be measured; its memory and its compiled code are given up on leaving."""
    op, above, sets = case.op, None, [make_inputs(case, device)]
    bytes_of_a_set = sum(sets[0][name].nbytes for name in op.ours.arguments)
    for _ in range(sets_past_cache(bytes_of_a_set, cache_bytes(device)) - 1):
        sets.append(make_inputs(case, device))
    if case.backward:
        with torch.no_grad():
            made = flat(op.eager.function(*(sets[0][name] for name in op.eager.arguments)))
        above = [torch.randn_like(x) for x in made]
        del made
    ways = [(EAGER, op.eager, op.eager.function, nullcontext)]
    if settings.compile:
        torch._inductor.config.compile_threads = 1  # else its processes start while we measure
        compiled = torch.compile(op.eager.function, fullgraph=True, dynamic=False)
        ways.append((COMPILED, op.eager, compiled, nullcontext))
    # Of the backends that serve the device, the first that has block ops.
    backend = next(name for name in backends_of(device) if name in ("triton", "reference"))
    ways.append((ours(backend), op.ours, op.ours.function, partial(gk.use_backend, backend)))
    variants = [
        Variant(name, caller(way, function, sets, above), context)
        for name, way, function, context in ways
    ]
    ready = PreparedBlock(case, device, settings, sets, variants,
                          ways={name: way for name, way, *_ in ways})  # fmt: skip
    try:
        ready.check()
        yield ready
    finally:
        ready.variants, ready.sets = [], []
        del sets, variants, ways, above
        torch._dynamo.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
