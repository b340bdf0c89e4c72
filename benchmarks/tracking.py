"""What pytest-benchmark is given of an op: a round is a block of timing.py, its clock the block's.

Device time cannot be read off a clock around a call: kernels are queued. So the clock goes on by
what a block says that one call took, and pytest-benchmark's statistics are of those.
"""

from __future__ import annotations

from measure import Prepared
from timing import Block, wall_blocks

_read = 0.0


def block_clock() -> float:
    """Seconds a call of all blocks that `timed` has run: pytest-benchmark's `timer`."""
    return _read


def timed(block: Block) -> None:
    global _read
    _read += block()


def track(benchmark, ready: Prepared, ceiling: float) -> dict:
    """Measure the case, interleaved, then ours alone under pytest-benchmark; the case's row.

    benchmark: the fixture of a test whose marker has timer=block_clock. ceiling: bytes a second.
    """
    row = ready.measure()
    benchmark.extra_info.update(row)
    assert row["ours"], f"ours was not timed: {row['errors']}"
    mine = row["variants"][row["ours"]]
    ours = next(variant for variant in ready.variants if variant.name == row["ours"])
    timers: dict[str, str] = {}
    if ready.device == "cuda":
        block = ready.on_device(ours, timers)
    else:
        blocks = wall_blocks([ours], len(ready.sets), ready.device, ready.settings.at_least)
        block = blocks[ours.name]
    benchmark.extra_info.update(
        timer=timers.get(ours.name, "wall"), gb_per_second=mine["gb_per_second"],
        ceiling_gb_per_second=ceiling / 1e9, of_ceiling=mine["gb_per_second"] * 1e9 / ceiling,
    )  # fmt: skip
    benchmark.pedantic(timed, args=(block,), rounds=ready.settings.rounds, warmup_rounds=1)
    return row
