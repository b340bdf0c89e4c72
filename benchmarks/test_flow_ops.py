"""Ours under pytest-benchmark, one test a case, with the interleaved comparison beside it."""

from __future__ import annotations

import pytest
from measure import Settings, prepared
from tracking import block_clock, track
from workloads import Case

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark, or benchmarks/run.py")


@pytest.mark.benchmark(group="flow ops", timer=block_clock)
def test_flow_op(
    case: Case, benchmark, device: str, settings: Settings, ceiling: float
) -> None:
    with prepared(case, device, settings) as ready:
        track(benchmark, ready, ceiling)
