"""`pytest benchmarks --benchmark-only`: the cases of run.py, tracked by pytest-benchmark.

    pytest benchmarks --benchmark-only --benchmark-save=before
    pytest benchmarks --benchmark-only --benchmark-compare

What pytest-benchmark times is ours; its `extra_info` carries the interleaved comparison.
"""

from __future__ import annotations

import _paths  # noqa: F401
import pytest
from measure import Settings
from results import machine, versions
from run import default_device, shapes_of
from workloads import cases_of


@pytest.fixture(scope="session")
def device() -> str:
    return default_device()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("g2rpo benchmarks")
    group.addoption("--shapes", help="names of tests/cases.py with commas, or all; "
                    "default: 1 x 12 at 720^2 on a CPU, all on a GPU")  # fmt: skip
    group.addoption("--dtypes", default="float32", help="float32,bfloat16,float16,mixed")
    group.addoption("--rounds", type=int, default=Settings.rounds)
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    return Settings(pytestconfig.option.rounds, compile=not pytestconfig.option.no_compile)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    option = metafunc.config.option

    def refuse(message: str) -> None:
        raise pytest.UsageError(message)

    shapes = shapes_of(option.shapes, default_device(), refuse)
    metafunc.parametrize("case", cases_of(shapes, option.dtypes.split(",")), ids=lambda c: c.id)


@pytest.hookimpl(optionalhook=True)  # without pytest-benchmark there is no such hook
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    device = default_device()
    machine_info["g2rpo"] = {"machine": machine(device), "versions": versions(device)}
