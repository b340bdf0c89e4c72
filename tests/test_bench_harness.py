"""`pytest benchmarks` as a whole at toy size, and the benchmark of the rollout."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")


def benchmarks(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """pytest in a process of its own, since xdist would disable the benchmarks of this one.

    folder: of .benchmarks; pytest-benchmark 5.3 crashes as it warns of one elsewhere.
    """
    inner = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-p", "no:cacheprovider",
         "--benchmark-only", "--toy", "--no-compile", "--rounds", "5", *arguments],
        cwd=folder, env=inner, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run of every kind of benchmark has stored."""
    storage = tmp_path_factory.mktemp("storage")
    # Of the ops a few: tests/test_benchmarks.py and test_bench_flux.py measure all of them.
    done = benchmarks(
        storage, "-k", "policy_loss or ode_step or gelu_tanh-forward or adamw8bit or reward",
        "--benchmark-save=before",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = storage.glob(".benchmarks/*/*_before.json")
    return file


def test_every_kind_of_benchmark_runs_and_says_what_it_moved(saved: Path) -> None:
    content = json.loads(saved.read_text())
    groups: dict[str, list[dict]] = {}
    for row in content["benchmarks"]:
        groups.setdefault(row["group"], []).append(row)
    assert {name: len(rows) >= 2 for name, rows in groups.items()} == {
        "flow ops": True, "block ops": True, "adamw8bit": True, "rewards": True,
    }  # fmt: skip
    for row in groups["flow ops"] + groups["block ops"]:
        info = row["extra_info"]
        speed = info["variants"][info["ours"]]["gb_per_second"]
        assert info["gb_per_second"] == speed and info["bytes"] > 0
        assert info["of_ceiling"] == pytest.approx(speed / info["ceiling_gb_per_second"])
        assert row["options"]["timer"] == "block_clock" and row["stats"]["rounds"] == 5
        # The clock is the block's: nothing of what surrounds a call is in it.
        assert 0 < row["stats"]["min"] <= row["stats"]["median"] < 1
    machine = content["machine_info"]["g2rpo"]["machine"]
    assert machine["name"] and "load" not in machine.get("host", machine)


def test_a_baseline_of_this_machine_is_compared_and_of_another_refused(saved: Path) -> None:
    storage = saved.parents[2]
    again = ["-k", "ode_step", "--benchmark-compare"]
    done = benchmarks(storage, *again, "--benchmark-compare-fail=min:100000%")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "another machine" not in done.stdout + done.stderr
    same = saved.read_text()
    content = json.loads(same)
    content["machine_info"]["g2rpo"]["machine"]["name"] = "Z80"
    saved.write_text(json.dumps(content))
    try:
        warned = benchmarks(storage, *again)
        refused = benchmarks(storage, *again, "--benchmark-compare-fail=min:15%")
    finally:
        saved.write_text(same)
    what = "on another machine: name is 'Z80'"
    assert warned.returncode == 0 and what in warned.stdout + warned.stderr
    assert refused.returncode == 4 and what in refused.stdout + refused.stderr


def test_the_clock_goes_on_by_what_a_block_says() -> None:
    import tracking

    before = tracking.block_clock()
    tracking.timed(lambda: 0.25)
    tracking.timed(lambda: 0.5)
    assert tracking.block_clock() - before == pytest.approx(0.75)


def test_the_rollouts_benchmark_at_toy_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollout = importlib.import_module("rollout")
    ways = {name: rollout.WAYS[name] for name in ("as it is", "bfloat16")}
    for name, value in {"PLAIN_BATCHES": (192,), "ROLLOUT_BATCHES": (192,), "WAYS": ways,
                        "WAYS_BATCHES": (192,)}.items():  # fmt: skip
        monkeypatch.setattr(rollout, name, value)
    file = tmp_path / "rollout.json"
    monkeypatch.setattr(sys, "argv", ["rollout.py", "--rounds", "1", "--json", str(file)])
    rollout.main()
    rates = json.loads(file.read_text())["evaluations_per_second"]
    assert list(rates) == ["plain loop, batch 192", "rollout, branch_batch 192, as it is",
                           "rollout, branch_batch 192, bfloat16"]  # fmt: skip
    assert all(len(values) == 1 and values[0] > 0 for values in rates.values())
    assert "1.00x" in capsys.readouterr().out
