"""What one call costs on tensors so small that nothing but the call itself is left."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import Settings
from timing import Variant, interleave, quartiles, wall_blocks
from workloads import TASKS, Case, another_set, make_inputs

SHAPE = "one"  # anchor, branch and element: no arithmetic to speak of
FORWARD, BACKWARD = "forward", "forward+backward"


def _forward(task: str, device: str) -> Callable[[int], object]:
    inputs = make_inputs(Case(task, SHAPE), device)
    way = TASKS[task].ours
    given = [inputs[name] for name in way.arguments]
    return lambda i: way.function(*given)


def _backward(task: str, device: str) -> Callable[[int], object]:
    inputs = another_set(make_inputs(Case(task, SHAPE), device))
    way = TASKS[task].ours
    leaf = inputs["velocity"] = inputs["velocity"].requires_grad_()
    given = [inputs[name] for name in way.arguments]
    above = None if task == "policy_loss" else torch.ones_like(way.function(*given)[0])
    return lambda i: torch.autograd.grad(way.function(*given)[0], leaf, above)


def measure_calls(device: str, settings: Settings) -> dict:
    """Wall microseconds a call of every op on its default backend, all ops interleaved."""
    variants = [Variant(f"{task} {FORWARD}", _forward(task, device)) for task in TASKS]
    variants += [
        Variant(f"{task} {BACKWARD}", _backward(task, device))
        for task in ("branch_log_prob", "policy_loss", "ode_step", "step_mean")
    ]
    for variant in variants:
        for _ in range(20):
            variant.run(0)
    blocks = wall_blocks(variants, 1, device, at_least=5e-3)
    seconds = interleave(blocks, settings.rounds, settings.budget)
    return {
        "shape": SHAPE,
        "microseconds": {name: quartiles(values)[1] * 1e6 for name, values in seconds.items()},
    }
