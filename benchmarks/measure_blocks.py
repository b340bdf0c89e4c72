"""One case of FLUX's block ops, measured as measure.py measures the flow ops.

with prepared(case, "cuda", Settings()) as ready:
    row = ready.measure()     # a dict for the results file
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch._inductor.config
from flux_ops import OPS, Inputs, Op, Way
from flux_shapes import Size
from measure import (
    EAGER,
    Prepared,
    Settings,
    as_outputs,
    backends_of,
    cache_bytes,
    checked,
    disagreement,
    ours,
)
from timing import Variant, sets_past_cache
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


@dataclass
class PreparedBlock(Prepared):
    """A case of blocks: of its bytes, the first way that runs says how many they are."""

    ways: dict[str, Way] = field(default_factory=dict)  # by the name of a variant
    outputs: int = 0  # of the op; gradients come behind

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.case.op.fp8]

    def comparable(self, variant: Variant, returned: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs and gradients in the form that ours have; what is quantised in numbers again."""
        way = self.ways[variant.name]
        if not self.outputs:
            self.outputs = len(returned) - (len(way.leaves) if self.case.backward else 0)
            self.moved = bytes_of(self.case, self.sets[0], returned[: self.outputs])
        if self.case.op.fp8:
            *first, values, scales = returned
            return *first, values.float() * scales[..., None]
        grads = list(returned[self.outputs :])
        return *returned[: self.outputs], *(way.joined(grads) if grads else ())

    def away(self, got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
        """Of the output or the gradient that is farthest."""
        return max(disagreement((a,), (b,), False) for a, b in zip(got, want, strict=True))


def ready_to_check(case: Case, device: str, settings: Settings) -> PreparedBlock:
    """Eager, torch.compile of it and ours, on sets of inputs that no cache holds together."""
    op, above, sets = case.op, None, [make_inputs(case, device)]
    bytes_of_a_set = sum(sets[0][name].nbytes for name in op.ours.arguments)
    for _ in range(sets_past_cache(bytes_of_a_set, cache_bytes(device)) - 1):
        sets.append(make_inputs(case, device))
    if case.backward:
        with torch.no_grad():
            made = flat(op.eager.function(*(sets[0][name] for name in op.eager.arguments)))
        above = [torch.randn_like(x) for x in made]
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
    return PreparedBlock(case, device, settings, sets, variants,
                         ways={name: way for name, way, *_ in ways})  # fmt: skip


def prepared(case: Case, device: str, settings: Settings) -> AbstractContextManager[Prepared]:
    return checked(ready_to_check(case, device, settings))
