"""What a machine can do at most: copies, matrix products, attention, launches.

Of each case every way there is, in alternating rounds; `peaks` are the best that was seen, which
the shares in the other benchmarks' rows are of. A way that this machine lacks says why.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from flux_shapes import Size
from measure import first_line
from timing import Block, Variant, device_block, event_block, interleave, quartiles, wall_block
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import g2rpo_kernels as gk

COPY, GEMM, ATTENTION, LAUNCH = "copy", "gemm", "attention", "launch"
BFLOAT16, FP8, FLOAT32 = "bfloat16", "FP8, rowwise", "float32"
# torch's own; then packages, by module, function and how they are had.
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
PACKAGES = {
    "flash-attn": ("flash_attn", "flash_attn_func", "pip install flash-attn"),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_func", "built from flash-attn's sources"),
}
UNITS = {COPY: ("GB/s", 1e9), GEMM: ("TFLOP/s", 1e12), ATTENTION: ("TFLOP/s", 1e12),
         LAUNCH: ("launches/s", 1.0)}  # fmt: skip
AT_LEAST = 20e-3  # seconds a round and way, on a GPU
LAUNCHES = {"cuda": 1000, "cpu": 50}  # in a graph, or in a row

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row: a task and its sizes. work: bytes, FLOPs or launches of a call, in all."""

    task: str
    name: str
    sizes: tuple[int, ...]
    work: float

    @property
    def shape(self) -> str:
        return " × ".join(map(str, self.sizes))


def linears(size: Size) -> list[tuple[int, int]]:
    """(K, N) of the token linears of a fused block: q, k and v are one, as are a single block's
    with its MLP's first."""
    width, mlp = size.width, size.mlp
    return [(width, 3 * width), (width, width), (width, mlp), (mlp, width),
            (width, 3 * width + mlp), (width + mlp, width)]  # fmt: skip


def cases_of(size: Size) -> list[Case]:
    """What decides most comes first. Tokens: of 720 x 720 and of 1024 x 1024 pixels, as one image
    and as four."""
    toy = size.name == "toy"
    bytes_, square = (2**22, 256) if toy else (2**30, 8192)
    launches = LAUNCHES["cpu" if toy else "cuda"]
    found = [Case(COPY, "copy", (bytes_,), 2.0 * bytes_),
             gemm(square, square, square),
             Case(LAUNCH, "launch", (launches,), 1.0)]  # fmt: skip
    tokens = [replace(size, side=side).tokens for side in ((size.side,) if toy else (45, 64))]
    batches = (1,) if toy else (1, 4)
    for batch, count in itertools.product(batches, tokens):
        sizes = batch, count, size.heads, size.head
        flops = 4.0 * batch * count**2 * size.width
        found.append(Case(ATTENTION, f"attention-{batch}x{count}", sizes, flops))
    rows = sorted(batch * count for batch in batches for count in tokens)
    return found + [gemm(m, k, n) for m in rows for k, n in linears(size)]


def gemm(rows: int, inner: int, columns: int) -> Case:
    return Case(GEMM, f"gemm-{rows}x{inner}x{columns}", (rows, inner, columns),
                2.0 * rows * inner * columns)  # fmt: skip


# The ways of a case: name -> a call, or why there is none -----------------------------------------


def ways_of(case: Case, device: str) -> tuple[dict[str, Run], dict[str, str]]:
    """Calls by name, and why others cannot be made here."""
    return {COPY: _copies, GEMM: _products, ATTENTION: _attentions, LAUNCH: _launches}[case.task](
        case, device
    )


def _copies(case: Case, device: str) -> tuple[dict[str, Run], dict[str, str]]:
    source = torch.arange(case.sizes[0] // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return {COPY: lambda: target.copy_(source)}, {}


def _products(case: Case, device: str) -> tuple[dict[str, Run], dict[str, str]]:
    rows, inner, columns = case.sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.bfloat16)

    x, weight = draw(rows, inner), draw(columns, inner)
    ways: dict[str, Run] = {BFLOAT16: lambda: F.linear(x, weight)}
    support = gk.fp8_support(device)
    if support.kind != "rowwise":
        if device == "cpu":
            wide = x.float(), weight.float()
            ways[FLOAT32] = lambda: F.linear(*wide)
        return ways, {FP8: support.reason}
    a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    scales = torch.ones(rows, 1, device=device), torch.ones(1, columns, device=device)
    ways[FP8] = lambda: torch._scaled_mm(
        a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return ways, {}


def _attentions(case: Case, device: str) -> tuple[dict[str, Run], dict[str, str]]:
    q, k, v = (torch.randn(*case.sizes, device=device).to(torch.bfloat16) for _ in range(3))
    ways: dict[str, Run] = {name: partial(_sdpa, SDPA[name], q, k, v) for name in SDPA}
    why = {}
    for name, (module, function, get) in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            why[name] = f"not installed: {get}"
            continue
        try:
            attend = getattr(importlib.import_module(module), function)
        except (ImportError, OSError, AttributeError) as error:  # made for another torch or CUDA
            why[name] = f"{type(error).__name__}: {first_line(error)}"
            continue
        ways[name] = partial(attend, q, k, v)
    return ways, why


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of tensors [B, L, H, Dh], as FLUX's blocks have them."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))


def _launches(case: Case, device: str) -> tuple[dict[str, Run], dict[str, str]]:
    """A kernel that does nothing, an op on one element, and what an op costs within a graph."""
    one = torch.zeros(1, device=device)
    ways: dict[str, Run] = {"an op on one element": lambda: one.add_(1)}
    if device == "cpu":
        why = "there is nothing to launch on a CPU"
        return ways, {"an empty kernel": why, "the same, waited for": why, "in a graph": why}
    ways["an empty kernel"] = lambda: torch.cuda._sleep(0)

    def waited() -> None:
        torch.cuda._sleep(0)
        torch.cuda.synchronize()

    ways["the same, waited for"] = waited
    ways["in a graph"] = lambda: one.add_(1)
    return ways, {}


# Measuring ---------------------------------------------------------------------------------------


def block(case: Case, name: str, run: Run, device: str) -> Block:
    """Seconds a call, after one call that sets up whatever is set up."""
    variant = Variant(name, lambda i: run())
    if device == "cpu":
        calls = case.sizes[0] if case.task == LAUNCH else 1
        return wall_block(variant, 1, calls, lambda: None)
    if name == "in a graph":
        return device_block(variant, case.sizes[0], AT_LEAST)
    if case.task == LAUNCH:  # the host's time is what is asked for
        return wall_block(variant, 1, case.sizes[0], torch.cuda.synchronize)
    return event_block(variant, 1, AT_LEAST)


@torch.no_grad()
def measure(case: Case, device: str, rounds: int, budget: float) -> dict:
    """The case's row of the results file."""
    unit, scale = UNITS[case.task]
    row: dict = {"case": case.name, "task": case.task, "shape": case.shape, "work": case.work,
                 "unit": unit, "variants": {}}  # fmt: skip
    ways, row["errors"] = ways_of(case, device)
    blocks = {}
    for name, run in ways.items():
        try:
            run()
            blocks[name] = block(case, name, run, device)
            blocks[name]()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it is, it becomes this way's row
            row["errors"][name] = f"{type(error).__name__}: {first_line(error)}"
            if device == "cuda":
                torch.cuda.synchronize()  # raises if the error has left the GPU unusable
    seconds = interleave({k: v for k, v in blocks.items() if k not in row["errors"]},
                         rounds, budget)  # fmt: skip
    row["rounds"] = len(next(iter(seconds.values()), []))
    for name, times in seconds.items():
        low, middle, high = quartiles(times)
        row["variants"][name] = {
            "seconds": middle, "low": low, "high": high, "rate": case.work / middle / scale,
            "each_round": [float(f"{s:.4g}") for s in times],
        }  # fmt: skip
    return row


def measured(
    cases: list[Case], device: str, rounds: int, budget: float, until: float,
    on_case: Callable[[str], None],
) -> Iterator[tuple[Case, dict | str]]:  # fmt: skip
    """Each case with its row, or with why there is none; none is begun after `until`, a time of
    `time.perf_counter`. on_case: called with the name of a case that begins."""
    for case in cases:
        if time.perf_counter() > until:
            yield case, "the seconds that --seconds gives were over"
            continue
        on_case(case.name)
        try:
            yield case, measure(case, device, rounds, budget)
        except torch.OutOfMemoryError as error:
            yield case, f"out of memory: {first_line(error)}"
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def peaks(content: dict) -> dict[str, float]:
    """The best there is in a ceilings file: GB/s of `copy`, TFLOP/s of matrix products by dtype and
    of `attention`; seconds of `launch` (an empty kernel). What was not measured is not there."""
    best: dict[str, float] = {}
    for row in content["cases"]:
        for name, entry in row["variants"].items():
            if row["task"] == LAUNCH:
                if name == "an empty kernel":
                    best[LAUNCH] = entry["seconds"]
                continue
            key = name if row["task"] == GEMM else row["task"]
            best[key] = max(best.get(key, 0.0), entry["rate"])
    return best
