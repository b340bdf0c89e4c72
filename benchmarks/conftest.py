"""`pytest benchmarks --benchmark-only`: what run.py and bench_blocks.py time, and the optimizer and
the rewards beside it, tracked by pytest-benchmark.

    pytest benchmarks --benchmark-only --benchmark-save=before
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=min:15%

What pytest-benchmark times is ours; its `extra_info` carries the interleaved comparison, the bytes,
GB/s and the share of the bandwidth of a copy, measured once a session. A round of an op is a block
of timing.py: on a GPU device time of a CUDA graph's replay, on sets of inputs that rotate past the
cache; on a CPU wall time over such sets.

A stored baseline is of one machine. Comparing with another's warns, and with
--benchmark-compare-fail it is refused. The threshold is of the minimum, and for a machine that does
nothing else: a busy one, of which the header warns, has none. Two runs of the flow ops, one after
the other, on two cores with a load of 7: medians differed by up to 7 times, the minima of seven in
ten by less than 15 % and the others by up to 7 times as well. The same hour `make bench-compare`
found a tree to take 0.99 to 1.03 times as long as itself: it is what says that a commit is slower.
"""

from __future__ import annotations

import _paths  # noqa: F401
import pytest
from flux_shapes import SIZES
from measure import COPY, Settings, copy_buffers
from measure_blocks import cases_of as cases_of_blocks
from results import machine, versions
from run import default_device, shapes_of
from timing import Variant, device_block, interleave, quartiles, wall_blocks
from workloads import cases_of

# What two machines are told apart by; `load` and the like differ from run to run.
SAME = ("name", "cores", "threads", "variant", "system", "capability", "driver", "memory_bytes")


@pytest.fixture(scope="session")
def device() -> str:
    return default_device()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("g2rpo benchmarks")
    group.addoption("--shapes", help="names of tests/cases.py with commas, or all; "
                    "default: 1 x 12 at 720^2 on a CPU, all on a GPU")  # fmt: skip
    group.addoption("--dtypes", default="float32", help="float32,bfloat16,float16,mixed")
    group.addoption("--blocks", choices=tuple(SIZES), help="the size of FLUX's block ops; default: "
                    "flux on a GPU, toy on a CPU")  # fmt: skip
    group.addoption("--rounds", type=int, default=Settings.rounds)
    group.addoption("--toy", action="store_true", help="sizes that run anywhere in seconds and say "
                    "nothing about speed: no goal is asserted")  # fmt: skip
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")


@pytest.fixture(scope="session")
def settings(pytestconfig: pytest.Config) -> Settings:
    return Settings(pytestconfig.option.rounds, compile=not pytestconfig.option.no_compile)


@pytest.fixture(scope="session")
def toy(pytestconfig: pytest.Config) -> bool:
    return pytestconfig.option.toy


@pytest.fixture(scope="session")
def ceiling(device: str, settings: Settings) -> float:
    """Bytes a second of a copy, read and written, of buffers larger than the cache."""
    source, target = copy_buffers(device)
    copy = Variant(COPY, lambda i: target.copy_(source))
    copy.run(0)
    if device == "cuda":
        blocks = {COPY: device_block(copy, 1, settings.at_least)}
    else:
        blocks = wall_blocks([copy], 1, device, settings.at_least)
    seconds = interleave(blocks, settings.rounds, settings.budget)[COPY]
    return 2 * source.nbytes / quartiles(seconds)[1]


def pytest_report_header(config: pytest.Config) -> str | None:
    this = machine(default_device())
    host = this.get("host", this)
    if host["load"] and host["load"] > 0.5 * host["cores"]:
        return (f"Warning: this machine is busy (load {host['load']:.1f} on {host['cores']} "
                "cores): times are not to be trusted")  # fmt: skip
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.option

    def refuse(message: str) -> None:
        raise pytest.UsageError(message)

    if "case" in metafunc.fixturenames:
        shapes = option.shapes or ("digits" if option.toy else None)
        shapes = shapes_of(shapes, default_device(), refuse)
        made = cases_of(shapes, option.dtypes.split(","))
        metafunc.parametrize("case", made, ids=lambda c: c.id)
    if "block_case" in metafunc.fixturenames:
        large = default_device() == "cuda" and not option.toy
        size = SIZES[option.blocks or ("flux" if large else "toy")]
        metafunc.parametrize("block_case", cases_of_blocks(size), ids=lambda c: c.id)


@pytest.hookimpl(optionalhook=True)  # without pytest-benchmark there is no such hook
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Only what stays from run to run, since pytest-benchmark warns of every difference."""
    device = default_device()
    this = machine(device)
    this.get("host", this).pop("load", None)
    machine_info["g2rpo"] = {"machine": this, "versions": versions(device)}
    for changing in ("hz_actual", "hz_actual_friendly"):
        machine_info.get("cpu", {}).pop(changing, None)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: object, machine_info: dict, compared_benchmark: dict
) -> None:
    """A warning if the baseline is another machine's; an error with --benchmark-compare-fail."""
    found = differences(machine_info, compared_benchmark["machine_info"])
    if not found:
        return
    message = f"the baseline was measured on another machine: {'; '.join(found)}"
    if config.option.benchmark_compare_fail:
        raise pytest.UsageError(
            f"{message}. Its times are no measure here: save one with --benchmark-save, or compare "
            "two commits with make bench-compare BASE=REF"
        )
    benchmarksession.logger.warning(message)


def differences(here: dict, there: dict) -> list[str]:
    """What says that two machine_info are of different machines."""
    mine, others = (info.get("g2rpo", {}).get("machine", {}) for info in (here, there))
    return [
        f"{key} is {others.get(key)!r}, here {mine.get(key)!r}"
        for key in SAME if mine.get(key) != others.get(key)
    ]  # fmt: skip
