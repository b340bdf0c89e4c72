"""What bench_adamw8bit.py steps: FLUX.1-dev's parameters, or whole blocks of them, and who does.

The contenders of a case share weights and gradients where these are of one dtype, so that more of
the list fits beside their states: each steps what the one before has left, at the same cost.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from flux_shapes import SIZES, Size
from timing import Block, Variant, calls_for, synchronizer, wall_block
from torch import Tensor, nn

import g2rpo_kernels as gk

Shape = tuple[int, ...]
# FLUX's blocks at a sixteenth of its widths.
TOY = replace(SIZES["flux"], name="toy", head=8, channels=4, text_width=256, pooled=48,
              axes=(0, 4, 4))  # fmt: skip
TIMESTEP = 256  # features of diffusers' sinusoidal embedding
COPIED = {"cuda": 2**30, "cpu": 2**26}  # bytes of the copy's buffer


# The parameters --------------------------------------------------------------------------------


def shapes(size: Size, doubles: int, singles: int) -> list[Shape]:
    """Of the parameters of a FluxTransformer2DModel with so many blocks, in its order by part."""
    width, norm = size.width, (size.head,)

    def linear(outputs: int, inputs: int) -> list[Shape]:
        return [(outputs, inputs), (outputs,)]

    square, up, down = (linear(width, width), linear(size.mlp, width), linear(width, size.mlp))
    embedder = [*linear(width, TIMESTEP), *square]  # of a timestep; of the guidance
    pooled = [*linear(width, size.pooled), *square]
    ends = [*linear(width, size.text_width), *linear(width, size.channels)]
    double = [*2 * linear(6 * width, width), *4 * [norm], *8 * square, *2 * [*up, *down]]
    single = [*linear(3 * width, width), *up, *linear(width, size.mlp + width), *2 * [norm],
              *3 * square]  # fmt: skip
    last = [*linear(2 * width, width), *linear(size.channels, width)]
    return [*2 * embedder, *pooled, *ends, *doubles * double, *singles * single, *last]


def count(given: Iterable[Shape]) -> int:
    return sum(math.prod(shape) for shape in given)


def fitting(size: Size, bytes_each: float, memory: float) -> tuple[int, int] | None:
    """How many double and single blocks, in their proportion, with all that is no block, take at
    most so much memory at so many bytes an element; None if not even one double block."""
    for doubles in range(size.doubles, 0, -1):
        singles = round(doubles * size.singles / size.doubles)
        if count(shapes(size, doubles, singles)) * bytes_each <= memory:
            return doubles, singles
    return None


def parameters(given: Iterable[Shape], dtype: torch.dtype, device: str) -> list[nn.Parameter]:
    """With gradients, all of them random."""
    made = []
    for shape in given:
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02))
        parameter.grad = torch.empty_like(parameter).normal_(std=1e-6)
        made.append(parameter)
    return made


# The optimizers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """An optimizer; state: bytes a parameter beside the weight, nearly, to choose the share by."""

    name: str
    make: Callable[[list[nn.Parameter], float], torch.optim.Optimizer]  # parameters, lr
    state: float
    dtype: torch.dtype = torch.bfloat16  # of weights and gradients
    package: str = ""
    options: tuple[tuple[str, float], ...] = ()  # of its step

    @property
    def missing(self) -> bool:
        return bool(self.package) and importlib.util.find_spec(self.package) is None

    @property
    def compiles(self) -> bool:
        return self.package == "torchao"


def _ours(name: str, state: float, **given: object) -> Contender:
    # Gradients are known to be finite, as after clipping: they are not read twice.
    return Contender(name, lambda parameters, lr: gk.AdamW8bit(parameters, lr=lr, **given), state,
                     options=(("grad_scale", 1.0),))  # fmt: skip


def _package(name: str, package: str, **given: object) -> Contender:
    def make(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return importlib.import_module(f"{package}.optim").AdamW8bit(parameters, lr=lr, **given)

    return Contender(name, make, 2.07, package=package)


OURS = "ours, 24 bits"
BITSANDBYTES, TORCHAO = "bitsandbytes AdamW8bit", "torchao AdamW8bit"
TORCH = "torch fused AdamW, float32"
_mine = _ours(OURS, 3.07, master_bits=24)
CASES = {
    "others": (
        _mine,
        _package(BITSANDBYTES, "bitsandbytes"),
        _package(TORCHAO, "torchao", bf16_stochastic_round=True),
        Contender(
            TORCH, lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True), 8,
            torch.float32,
        ),
    ),
    "masters": (
        _mine,
        _ours("ours, 16 bits", 2.07, master_bits=16),
        _ours("ours, 32 bits", 4.07, master_bits=32),
        _ours("ours, 24 bits, fp8 codes", 3.07, master_bits=24, codec="fp8"),
    ),
}  # fmt: skip


def bytes_each(contenders: Iterable[Contender]) -> float:
    """What an element takes beside all of these: weights and gradients of each dtype once."""
    there = list(contenders)
    return sum(c.state for c in there) + sum(2 * d.itemsize for d in {c.dtype for c in there})


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the storages that its states lie in, each counted once."""
    found: dict[tuple[torch.device, int], int] = {}

    def visit(value: object) -> None:
        if hasattr(value, "__tensor_flatten__"):  # torchao's: a tensor made of others
            for name in value.__tensor_flatten__()[0]:
                visit(getattr(value, name))
        elif isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)

    visit(dict(optimizer.state))
    return sum(found.values())


class Steps:
    """An optimizer that has stepped its parameters once, so that its states are made."""

    def __init__(self, contender: Contender, given: list[nn.Parameter]) -> None:
        self.contender, options = contender, dict(contender.options)
        self.optimizer = contender.make(given, 2e-6)
        self.variant = Variant(contender.name, lambda i: self.optimizer.step(**options),
                               capturable=False)  # fmt: skip
        self.variant.run(0)
        self.states = state_bytes(self.optimizer)
        # What every step must move: weights and states both ways, gradients one way.
        self.moved = 2 * self.states + sum(2 * p.nbytes + p.grad.nbytes for p in given)


def check(contender: Contender, device: str) -> None:
    """ValueError unless its first step is AdamW's: by lr, against the sign of the gradient."""
    lr = 0.01
    # More elements than the 4096 below which the packages keep float32 moments.
    (parameter,) = parameters([(64, 256)], contender.dtype, device)
    parameter.grad.normal_()
    before = parameter.detach().clone().float()
    contender.make([parameter], lr).step(**dict(contender.options))
    away = before - parameter.detach().float()
    step = (away * parameter.grad.sign()).mean().item() / lr
    if not abs(step - 1) < 0.05:
        raise ValueError(f"its first step is {step:.3g} times AdamW's")


# Timing ----------------------------------------------------------------------------------------


def step_block(variant: Variant, device: str, at_least: float) -> Block:
    """Seconds a step: on a GPU between two events around several, on a CPU wall time of one.

    Before the first event goes one step more: while the GPU is at it, the host queues what follows.
    What an optimizer's host needs longer than its kernels is then seen, and nothing else of it.

    Not a CUDA graph: a step of ours copies a new table of addresses and seeds from the host, and
    its number is among the arguments of the launch, so a replay would be the same step again.
    """
    if device == "cpu":
        return wall_block(variant, 1, 1, synchronizer(device))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(times: int) -> float:
        variant.run(0)
        start.record()
        for _ in range(times):
            variant.run(0)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    run(1)
    times = calls_for(lambda: run(2), at_least)
    return lambda: run(times)


def host_seconds(variant: Variant, device: str) -> float:
    """Until a step has returned, the device idle before: what its Python and launches take."""
    synchronize, found = synchronizer(device), []
    for _ in range(5):
        synchronize()
        began = time.perf_counter()
        variant.run(0)
        found.append(time.perf_counter() - began)
    synchronize()
    return statistics.median(found)


def copying(moved: int, device: str) -> tuple[Variant, int]:
    """A copy that moves nearly so many bytes, by one buffer again and again, and how many."""
    part = max(4, min(moved // 2, COPIED[device]) // 4 * 4)
    times = max(1, round(moved / 2 / part))
    source = torch.arange(part // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)

    def run(i: int) -> None:
        for _ in range(times):
            target.copy_(source)

    return Variant("copy", run), 2 * part * times
