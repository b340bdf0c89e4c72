"""Calls every native CPU op twice, for callgrind.py to count: `python callgrind_driver.py _C.so`.

Only the standard library and the extension are loaded, so that Python starts under valgrind in two
seconds: nothing here imports torch. The first call of a pair warms what a process does once
(symbols that are bound late, pages); the second is counted. Prints, as JSON, the vector variant and
the cases in the order in which they ran.
"""

from __future__ import annotations

import array
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

FLOAT32, BFLOAT16 = 0, 1  # the order of `Dtype` in csrc/ops.h
NOT_GIVEN = (0, 0)
WHERE = (0, 0)  # device and stream, which the CPU ignores
ROWS, BRANCHES, COUNT = 2, 3, 8 * 1024  # P, G, N: eight tiles a row
MODELS, GRANULARITIES, GROUPS, GROUP_SIZE, POSITIONS = 2, 3, 8, 12, 4
PARAMETERS, BLOCK = 32 * 1024, 256
STEPS = ROWS * COUNT
ALIGNMENT = 64


@dataclass(frozen=True)
class Call:
    """One way to call an op.

    name: of its case: the op, or op[use].
    op: the function of csrc/cpu.cpp or csrc/adamw8bit.cpp.
    elements: what its instructions are divided by.
    """

    name: str
    op: str
    elements: int
    run: Callable[[], object]


class Memory:
    """Arrays that live as long as it, each at a multiple of 64 bytes as torch's are."""

    def __init__(self) -> None:
        self.kept: list[array.array] = []

    def new(self, code: str, count: int, values: Sequence[float] = (0,)) -> int:
        """The address of `count` items of an array type code: these values, again and again."""
        item = array.array(code).itemsize
        made = array.array(code, bytes(count * item + ALIGNMENT))
        first = -made.buffer_info()[0] % ALIGNMENT // item
        # a slice of the same length: the array does not move
        made[first : first + count] = (array.array(code, values) * -(-count // len(values)))[:count]
        self.kept.append(made)
        return made.buffer_info()[0] + first * item

    def floats(self, count: int) -> int:
        """Between -1 and 1."""
        return self.new("f", count, [(37 * i % 101 - 50) / 50 for i in range(101)])

    def halves(self, count: int) -> int:
        """bfloat16 between 1 and 2, of either sign."""
        return self.new("H", count, [0x3F80 + 37 * i % 101 + 0x8000 * (i % 2) for i in range(101)])


def flow_calls(ops: ModuleType, memory: Memory) -> Iterator[Call]:
    new, floats, branched = memory.new, memory.floats, ROWS * BRANCHES
    velocity, latents, x_next = floats(STEPS), floats(STEPS), floats(branched * COUNT)
    other, out, wide = floats(STEPS), new("f", STEPS), new("f", branched * COUNT)
    half = memory.halves(STEPS)
    # a, b, s, 1 / (2 s^2), -log(s) - log(2 pi) / 2 of a step with s = 1/2
    table = new("f", 5 * ROWS, (0.9, -0.2, 0.5, 2.0, -0.2257914))
    seeds = new("q", branched, range(-3, 3))
    sigma, sigma_next = new("f", ROWS, [0.9]), new("f", ROWS, [0.8])
    of_branches = [floats(branched) for _ in range(5)]
    old_log_prob, advantages, log_prob, grad, scratch = of_branches
    loss, statistics, scale = new("f", 1), new("f", 5), new("f", 1, [1.0])

    def step(velocity: int = velocity, dtype: int = FLOAT32) -> tuple[int, ...]:
        return velocity, dtype, latents, FLOAT32, table, 5, ROWS

    def shaped(*given: int) -> tuple[int, ...]:
        return *step(*given), BRANCHES, COUNT

    def call(name: str, elements: int, *arguments: object) -> Call:
        op = name.partition("[")[0]
        return Call(name, op, elements, lambda: getattr(ops, op)(*arguments, *WHERE))

    given = (x_next, FLOAT32)
    reference, old, plain = (other, FLOAT32), (velocity, FLOAT32), (NOT_GIVEN, NOT_GIVEN)
    options, results = (0.99, 1.01, 0.01, 5.0), (loss, log_prob, grad, statistics, scratch)
    known = old_log_prob, advantages
    yield call("step_mean", STEPS, *step(), COUNT, out)
    yield call("step_mean[bfloat16]", STEPS, *step(half, BFLOAT16), COUNT, out)
    yield call("ode_step", STEPS, velocity, FLOAT32, latents, FLOAT32, sigma, 1, sigma_next, 1,
               ROWS, COUNT, out)  # fmt: skip
    yield call("normal", branched * COUNT, seeds, branched, COUNT, wide)
    for use, source in (("seeds", (seeds, *NOT_GIVEN)), ("noise", (0, *given))):
        yield call(f"sde_step[{use}]", branched * COUNT, *shaped(), *source, wide, log_prob,
                   scratch)  # fmt: skip
    yield call("branch_log_prob", branched * COUNT, *shaped(), *given, log_prob, scratch)
    for name, more, weight in (("", plain, 0.0), ("[kl]", (reference, old), 0.1)):
        first, second = more
        yield call(f"policy_loss{name}", branched * COUNT, *shaped(), *given, *known, *first,
                   *second, *options, weight, *results)  # fmt: skip
        # behind it, the gradient: of branch_log_prob without a scale
        yield call(f"log_prob_backward{name}", branched * COUNT, *shaped(), *given, advantages,
                   scale, *second, *first, weight, out)  # fmt: skip
    yield call("log_prob_backward[bfloat16]", branched * COUNT, *shaped(half, BFLOAT16), *given,
               advantages, 0, *NOT_GIVEN, *NOT_GIVEN, 0.0, out)  # fmt: skip
    rewards = MODELS * GRANULARITIES * GROUPS * GROUP_SIZE * POSITIONS
    yield call("group_advantages", rewards, floats(rewards), FLOAT32, MODELS, GRANULARITIES,
               GROUPS, GROUP_SIZE, POSITIONS, [1.0, 0.5], 1e-8,
               new("f", GROUPS * GROUP_SIZE * POSITIONS))  # fmt: skip


def adamw_calls(ops: ModuleType, memory: Memory) -> Iterator[Call]:
    """The masters and the codes that AdamW8bit has; gradients are bfloat16, or float32 as well."""
    for name, dtype, low_bytes, dynamic in (
        ("16 bits", BFLOAT16, 0, True), ("24 bits", BFLOAT16, 1, True),
        ("32 bits", BFLOAT16, 2, True), ("24 bits, fp8", BFLOAT16, 1, False),
        ("float32", FLOAT32, 0, True),
    ):  # fmt: skip
        fill = memory.halves if dtype == BFLOAT16 else memory.floats
        codes = [memory.new("B", PARAMETERS, range(101)) for _ in range(2)]
        scales = [memory.new("f", PARAMETERS // BLOCK, [1e-6]) for _ in range(2)]
        low = memory.new("b", PARAMETERS * low_bytes) if low_bytes else 0
        words = [fill(PARAMETERS), fill(PARAMETERS), *codes, *scales, low, PARAMETERS, 0, 12345]
        row = memory.new("q", len(words), words)
        # beta1, 1 - beta1, beta2, 1 - beta2, step_size, inv_sqrt_bias2, eps, decay, grad_scale
        constants = [0.9, 0.1, 0.999, 0.001, 2e-6, 1.0, 1e-8, 0.99999, 1.0]
        yield Call(
            f"adamw8bit[{name}]", "adamw8bit", PARAMETERS,
            lambda row=row, given=(BLOCK, dtype, dtype, low_bytes, dynamic, False, constants): (
                ops.adamw8bit(row, 1, 0, 0, *given, *WHERE)
            ),
        )  # fmt: skip


def main(library: str) -> None:
    spec = importlib.util.spec_from_file_location("_C", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ops, memory, ran = module.cpu, Memory(), []
    for calls in (flow_calls, adamw_calls):
        for call in calls(ops, memory):
            call.run()
            ops.variant()
            call.run()
            ops.variant()
            ran.append({"name": call.name, "op": call.op, "elements": call.elements})
    print(json.dumps({"variant": ops.variant(), "cases": ran}))


if __name__ == "__main__":
    main(sys.argv[1])
