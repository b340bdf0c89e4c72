"""Which backends the op tests ran on, said at the end of every run.

A test that takes the `target` fixture runs once on every backend and device this machine has. The
summary counts them, so that a run without a GPU is not mistaken for one with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import Target, targets

import g2rpo_kernels as gk


@pytest.fixture(params=targets(), ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every op in the test runs on this backend; the test puts its tensors on target.device."""
    request.node.user_properties.append(("target", str(request.param)))
    with gk.use_backend(request.param.backend):
        yield request.param


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete FLUX pipeline folder, to read only: whoever damages it damages a copy."""
    from g2rpo.flux.miniature import write_miniature

    return write_miniature(tmp_path_factory.mktemp("flux") / "miniature")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed, failed = (
        Counter(
            value
            for report in terminalreporter.stats.get(outcome, [])
            for name, value in getattr(report, "user_properties", [])
            if name == "target"
        )
        for outcome in ("passed", "failed")
    )
    if not passed and not failed:
        return
    terminalreporter.section("backends of g2rpo_kernels")
    for name, status in gk.backends().items():
        ran = [str(target) for target in targets() if target.backend == name]
        counts = [f"{t}: {passed[t]} passed, {failed[t]} failed" for t in ran]
        terminalreporter.line("; ".join(counts) or f"{name}: not run, {status.reason}")
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "elsewhere":  # in a process of its own, on a machine without a GPU
                terminalreporter.line(value)
