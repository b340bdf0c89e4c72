"""One side of compare_versions.py: `python version_worker.py TREE cpu|cuda SHAPE`.

Imports the g2rpo_kernels of TREE, never this tree's, and calls public functions with arguments
that every version takes. Reads a line of JSON from standard input, answers with one:

    {"describe": true}            {"what": text, "cases": [names]}
    {"prepare": case}             {"calls": how many take two milliseconds},
                                  {"absent": true, "error": why} or {"error": why}
    {"calls": count, "case": ..}  {}; that many are timed, so that both sides time as many
    {"time": case}                {"seconds": of a call}

On a GPU a time is that of a CUDA graph's replay on sets of inputs larger than the cache together,
or between two events where no graph can be captured; on a CPU wall time over such sets.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

TREE, DEVICE, SHAPE = sys.argv[1:4]
sys.path.insert(0, TREE)

import torch  # noqa: E402
from timing import (  # noqa: E402
    Block,
    Variant,
    cache_bytes,
    calls_for,
    device_block,
    event_block,
    sets_past_cache,
    synchronizer,
    wall_block,
)
from torch import Tensor, nn  # noqa: E402

import g2rpo_kernels as gk  # noqa: E402

ROWS, BRANCHES, COUNT = map(int, SHAPE.split("x"))
AT_LEAST = 2e-3  # seconds a block
PARAMETERS = {"cpu": 4, "cuda": 64}  # millions: of 4, a step on a CPU takes some milliseconds
CLIP_RANGE = 0.01
Call = Callable[[], object]


class Absent(Exception):
    """An op that this version does not have."""


def op(name: str) -> Callable:
    try:
        return getattr(gk, name)
    except AttributeError as error:
        raise Absent(f"g2rpo_kernels has no {name}") from error


@functools.cache
def some() -> Tensor:
    return torch.randn(2**16 + 1, device=DEVICE)


def draw(*shape: int) -> Tensor:
    """Random numbers, the same again after 2^16 + 1: a pair of processes makes many sets."""
    count = math.prod(shape)
    return some().repeat(math.ceil(count / len(some())))[:count].view(shape)


def a_step() -> dict[str, Tensor]:
    """Inputs of the steps' ops; x_next is what a step's noise would give, nearly."""
    sigma, sigma_next = (torch.full((ROWS,), at, dtype=torch.float64) for at in (0.9, 0.85))
    coefficients = op("step_coefficients")(sigma, sigma_next, eta=0.7).to(DEVICE)
    velocity, latents = draw(ROWS, COUNT), draw(ROWS, COUNT)
    noise = draw(ROWS, BRANCHES, COUNT)
    return {
        "velocity": velocity, "latents": latents, "noise": noise, "coefficients": coefficients,
        "x_next": latents[:, None] + 0.1 * noise,
        "seeds": torch.arange(ROWS * BRANCHES, device=DEVICE).view(ROWS, BRANCHES),
        "old": torch.full((ROWS, BRANCHES), -1.0, device=DEVICE),
        "advantages": draw(ROWS, BRANCHES), "upstream": draw(ROWS, BRANCHES),
        "sigma": sigma.float().to(DEVICE), "sigma_next": sigma_next.float().to(DEVICE),
    }  # fmt: skip


def forward(name: str, arguments: str, **options: object) -> Callable[[], tuple[Call, int]]:
    """Makes one set: the call on it, and its bytes; options naming an input are given it."""

    def make() -> tuple[Call, int]:
        function, given = op(name), a_step()
        positional = [given[key] for key in arguments.split()]
        named = {key: given.get(value, value) for key, value in options.items()}
        return lambda: function(*positional, **named), size_of([*positional, *named.values()])

    return make


def gradient(name: str, arguments: str, **options: object) -> Callable[[], tuple[Call, int]]:
    """As `forward`, then the gradient of velocity."""

    def make() -> tuple[Call, int]:
        function, given = op(name), a_step()
        given["velocity"].requires_grad_()
        positional = [given[key] for key in arguments.split()]

        def call() -> object:
            out = function(*positional, **options)
            out = getattr(out, "loss", out)
            above = given["upstream"] if out.ndim else None
            return out, torch.autograd.grad(out, given["velocity"], above)

        return call, size_of(positional)

    return make


def a_normal() -> tuple[Call, int]:
    function, seeds = op("normal"), a_step()["seeds"]
    return lambda: function(seeds, (COUNT,)), 4 * seeds.numel() * COUNT


def advantages() -> tuple[Call, int]:
    function, rewards = op("group_advantages"), draw(2, 3, 4 * 12, 16)
    return lambda: function(rewards, 12, [1.0, 0.5]), rewards.nbytes


def adamw8bit() -> tuple[Call, int]:
    parameters = [
        nn.Parameter(torch.full((1024, 1024), 0.02, dtype=torch.bfloat16, device=DEVICE))
        for _ in range(PARAMETERS[DEVICE])
    ]
    for p in parameters:
        p.grad = (draw(*p.shape) * 1e-6).bfloat16()
    optimizer = op("AdamW8bit")(parameters, lr=2e-6)
    # One set: all of it is read and written at every step, and larger than a cache.
    return lambda: optimizer.step(grad_scale=1.0), 2**62


def size_of(given: list[object]) -> int:
    return sum(x.nbytes for x in given if isinstance(x, Tensor))


STEP, LOG_PROB = "velocity latents coefficients", "velocity latents x_next coefficients"
LOSS = "velocity latents x_next old advantages coefficients"
CASES: dict[str, Callable[[], tuple[Call, int]]] = {
    "policy_loss forward+backward": gradient("policy_loss", LOSS, clip_range=CLIP_RANGE),
    "sde_step[seeds] forward": forward("sde_step", STEP, seeds="seeds"),
    "sde_step[noise] forward": forward("sde_step", STEP, noise="noise"),
    "policy_loss forward": forward("policy_loss", LOSS, clip_range=CLIP_RANGE),
    "branch_log_prob forward+backward": gradient("branch_log_prob", LOG_PROB),
    "branch_log_prob forward": forward("branch_log_prob", LOG_PROB),
    "ode_step forward": forward("ode_step", "velocity latents sigma sigma_next"),
    "step_mean forward": forward("step_mean", STEP),
    "normal forward": a_normal,
    "group_advantages forward": advantages,
    "adamw8bit step": adamw8bit,
}


class Prepared:
    """A case, warm, on as many sets as no cache holds together."""

    def __init__(self, case: str) -> None:
        torch.manual_seed(0)
        call, size = CASES[case]()
        self.sets = sets_past_cache(size, cache_bytes(DEVICE))
        runs = [call, *(CASES[case]()[0] for _ in range(self.sets - 1))]
        self.variant = Variant(case, lambda i: runs[i](), capturable=case != "adamw8bit step")
        for i in range(min(2, self.sets)):
            self.variant.run(i)
        self.calls, self.block = 1, self.on_device() if DEVICE == "cuda" else self.on_cpu(1)
        if DEVICE == "cpu":
            self.calls = calls_for(self.block, AT_LEAST)

    def on_cpu(self, calls: int) -> Block:
        return wall_block(self.variant, self.sets, calls, synchronizer(DEVICE))

    def on_device(self) -> Block:
        synchronizer(DEVICE)()
        if self.variant.capturable:
            try:
                return device_block(self.variant, self.sets, AT_LEAST)
            except RuntimeError as error:
                print(f"{TREE}: {self.variant.name}: timed between events, since no graph was "
                      f"captured: {error}", file=sys.stderr)  # fmt: skip
                synchronizer(DEVICE)()
        return event_block(self.variant, self.sets, AT_LEAST)


def describe() -> dict:
    status = gk.backends()
    there = [name for name, of in status.items() if DEVICE in of.used_for]
    return {
        "what": f"{Path(gk.__file__).parent}, on {', '.join(there) or 'reference'}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "cases": list(CASES),
    }


def main() -> None:
    if Path(TREE).resolve() not in Path(gk.__file__).resolve().parents:
        sys.exit(f"g2rpo_kernels is {gk.__file__}; expected that of {TREE}")
    ready: dict[str, Prepared] = {}
    for line in sys.stdin:
        request, said = json.loads(line), {}
        if "describe" in request:
            said = describe()
        elif "time" in request:
            said = {"seconds": ready[request["time"]].block()}
        elif "calls" in request and DEVICE == "cpu":
            case = ready[request["case"]]
            case.block = case.on_cpu(request["calls"])
        elif "prepare" in request:
            ready.clear()  # the inputs of the case before
            try:
                case = ready[request["prepare"]] = Prepared(request["prepare"])
                said = {"calls": case.calls}
            except Absent as error:
                said = {"absent": True, "error": str(error)}
            except Exception as error:  # whatever it is, it becomes this case's row
                said = {"error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
