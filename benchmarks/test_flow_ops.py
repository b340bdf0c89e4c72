"""Ours under pytest-benchmark, one test a case, with the interleaved comparison beside it."""

from __future__ import annotations

import itertools

import pytest
from measure import Settings, prepared
from timing import synchronizer
from workloads import Case

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark, or benchmarks/run.py")


@pytest.mark.benchmark(group="flow ops")
def test_flow_op(case: Case, benchmark, device: str, settings: Settings) -> None:
    with prepared(case, device, settings) as ready:
        row = ready.measure()
        benchmark.extra_info.update(row)
        assert row["ours"], f"ours was not timed: {row['errors']}"
        ours = next(v for v in ready.variants if v.name == row["ours"])
        synchronize, count = synchronizer(device), len(ready.sets)
        at = itertools.cycle(range(count))

        def call() -> None:
            ours.run(next(at))
            synchronize()

        with ours.context():
            benchmark.pedantic(call, rounds=settings.rounds, iterations=count, warmup_rounds=1)
