"""How the benchmarks time: every variant of a case in alternating rounds, medians and ratios.

A round times each variant once, and the next round begins with the next variant, so a machine that
drifts slows all of them and nobody always follows the same neighbour. The ratio of two variants is
the median of their ratios within a round, never the ratio of two medians of different minutes.

On a CPU a block is wall time over a few calls. On a GPU it is device time, by replaying a CUDA
graph of one call on every input set; wall time of ordinary calls is measured beside it. Input sets
rotate so that together they exceed the last-level cache: no call finds its inputs there.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

Block = Callable[[], float]  # times some calls; returns seconds a call

MIN_ROUNDS = 5  # a budget never cuts a case below this
MAX_SETS = 64


@dataclass(frozen=True)
class Variant:
    """One way to compute a case."""

    name: str
    run: Callable[[int], object]  # the call, on input set i
    context: Callable[[], AbstractContextManager] = nullcontext  # entered outside the timed part
    capturable: bool = True  # False: it synchronises, so no CUDA graph can hold it


def interleave(
    blocks: Mapping[str, Block],
    rounds: int,
    budget: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds a call of every block, one number a round.

    rounds: at most this many. budget: seconds after which no new round begins, but never before
    `MIN_ROUNDS`.
    """
    names = list(blocks)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = clock()
    for i in range(rounds):
        if budget is not None and i >= MIN_ROUNDS and clock() - started > budget:
            break
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            seconds[name].append(blocks[name]())
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Quartiles of numerator / denominator within each round."""
    values = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, middle, high = quartiles(values)
    return {"median": middle, "low": low, "high": high}


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def sets_past_cache(bytes_of_a_set: int, cache_bytes: int) -> int:
    """How many input sets it takes to exceed twice the cache, at most `MAX_SETS`."""
    return max(1, min(MAX_SETS, math.ceil(2 * cache_bytes / max(1, bytes_of_a_set))))


@functools.cache
def cache_bytes(device: str) -> int:
    """Of the last level; 32 MiB where the system does not say."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size") as file:
            text = file.read().strip()
        return int(text.removesuffix("K")) * 1024
    except (FileNotFoundError, ValueError):
        return 32 * 2**20


def calls_for(run: Block, at_least: float, limit: int = 10_000) -> int:
    """How many calls last `at_least` seconds, from one timed call of a warm function."""
    return max(1, min(limit, math.ceil(at_least / max(run(), 1e-9))))


def synchronizer(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def wall_block(variant: Variant, sets: int, calls: int, synchronize: Callable[[], None]) -> Block:
    """Wall time of `calls` calls in a row, one synchronisation at the end."""
    at = itertools.cycle(range(sets))

    def block() -> float:
        with variant.context():
            synchronize()
            started = time.perf_counter()
            for _ in range(calls):
                variant.run(next(at))
            synchronize()
            return (time.perf_counter() - started) / calls

    return block


def wall_blocks(
    variants: list[Variant], sets: int, device: str, at_least: float
) -> dict[str, Block]:
    """A block of at least `at_least` seconds for each variant; all are warm already."""
    synchronize = synchronizer(device)
    blocks = {}
    for variant in variants:
        one = wall_block(variant, sets, 1, synchronize)
        blocks[variant.name] = wall_block(variant, sets, calls_for(one, at_least), synchronize)
    return blocks


def device_block(variant: Variant, sets: int, at_least: float) -> Block:
    """Device time of one call, by replaying a CUDA graph of one call on each input set."""
    graph, outputs = _capture(variant, sets)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(times: int) -> float:
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times / sets

    replay(1)  # the first replay uploads the graph
    times = calls_for(lambda: replay(1) * sets, at_least)

    def block() -> float:
        assert outputs is not None  # their memory belongs to the graph: they live as long as it
        return replay(times)

    return block


def _capture(variant: Variant, sets: int) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """A graph of one call on every set. Outputs stay alive, so that each call writes its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), variant.context():
        for i in range(min(sets, 3)):  # whatever a first call sets up must not be captured
            variant.run(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with variant.context(), torch.cuda.graph(graph):
        outputs = [variant.run(i) for i in range(sets)]
    torch.cuda.synchronize()
    return graph, outputs


def event_block(variant: Variant, sets: int, at_least: float) -> Block:
    """Device time between two events around ordinary calls, where no graph can be captured.

    Includes the gaps in which the device waits for the host.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    at = itertools.cycle(range(sets))

    def run(times: int) -> float:
        with variant.context():
            start.record()
            for _ in range(times):
                variant.run(next(at))
            end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    run(1)
    times = calls_for(lambda: run(1), at_least)
    return lambda: run(times)


def count_launches(variant: Variant) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None if the profiler saw nothing.

    The first profile of a process can miss events while its tracer starts, so it is made twice.
    """
    from torch.profiler import ProfilerActivity, profile

    count = 0
    for _ in range(2):
        with variant.context():
            variant.run(0)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                variant.run(0)
                torch.cuda.synchronize()
        count = sum(
            event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            for event in profiler.events()
        )
    return count or None
