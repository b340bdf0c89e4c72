"""FLUX's block ops under pytest-benchmark, as bench_blocks.py times them.

On a CPU, where their reference serves and a block takes seconds, the sizes are a toy's.
"""

from __future__ import annotations

import pytest
from measure import Settings
from measure_blocks import Case, prepared
from tracking import block_clock, track

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark, or bench_blocks.py")


@pytest.mark.benchmark(group="block ops", timer=block_clock)
def test_block_op(
    block_case: Case, benchmark, device: str, settings: Settings, ceiling: float
) -> None:
    with prepared(block_case, device, settings) as ready:
        track(benchmark, ready, ceiling)
