"""gpu_check.py: which parts run, in which time, and what is kept of them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402

BENCHMARKS = {  # by the name of the program: the kind of its file
    "bench_ceilings": "ceilings", "bench_blocks": "flux-blocks",
    "bench_flux_forward": "flux-forward", "bench_adamw8bit": "adamw8bit",
    "bench_flux_update": "flux-update", "bench_reference": "reference-loop",
}  # fmt: skip
ENTRY = {"seconds": 2e-3, "wall_seconds": 2e-3, "gb_per_second": 1.0, "copy_fraction": 0.5,
         "launches": 1, "timer": "graph", "over_ours": {"median": 1.0}}  # fmt: skip


def row(direction: str) -> dict:
    """A case as benchmarks/run.py writes it."""
    return {
        "case": f"policy_loss-{direction}-digits-float32", "task": "policy_loss",
        "shape": "digits", "dtype": "float32", "backward": "+" in direction,
        "ours": "ours (cuda)", "bytes": 10**6, "rounds": 5, "errors": {},
        "copy": {"bytes": 2**20, "seconds": 1e-3},
        "variants": {"eager": ENTRY, "ours (cuda)": ENTRY},
    }  # fmt: skip


ROWS = [row("forward"), row("forward+backward")]


class Card:
    """A GPU on which every command is written down and `run` instead of being run."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.path, self.commands, self.run = folder / "mine.json", [], {}
        cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda: (9, 0))
        patch.setattr(gpu_check, "torch", SimpleNamespace(cuda=cuda, __version__="2"))
        patch.setattr(gpu_check.doctor, "gpus", lambda: (["A Card"], ""))
        patch.setattr(gpu_check, "build", lambda limit: {"did": "nothing", "why": "no nvcc"})
        patch.setattr(gpu_check, "call", self.call)
        patch.setattr(results, "machine", lambda device: {"name": "A Card", "driver": "1"})
        patch.setattr(results, "versions", lambda device: {
            "python": "3", "torch": "2", "g2rpo": "0", "cuda": "13", "triton": "3"})  # fmt: skip

    def call(self, command: list[str], limit: float, **variables: str):
        name = "pytest" if "pytest" in command else Path(command[1]).stem
        self.commands.append((name, command, limit))
        code = self.run[name]() if name in self.run else 0
        return code, 1.0, f"begun\nend of {name}"

    def check(self, *arguments: str) -> int:
        self.commands.clear()
        return gpu_check.main(["--results", str(self.path), *arguments])

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.commands]

    @property
    def parts(self) -> dict[str, dict]:
        return results.load(self.path)["parts"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Card:
    return Card(monkeypatch, tmp_path)


def test_gpu_check_goes_on_without_the_case_that_killed_it(card: Card, capsys) -> None:
    def ops() -> int:
        store = results.Store(card.path, "cuda", resume=True)
        if "died" not in str(store.content["left_out"]):
            store.begin("died")
            return -6
        for row in ROWS:
            store.add(row)
        return 0

    codes = [-6, 0]
    card.run = {"run": ops, "bench_flux_forward": lambda: codes.pop(0)}
    assert card.check("--rounds", "3") == 0 and codes == []
    assert card.names == ["pytest", "bench_ceilings", "run", "run", "bench_blocks",
                          *["bench_flux_forward"] * 2, "bench_adamw8bit", "bench_flux_update",
                          "bench_reference"]  # fmt: skip
    for _, command, _ in card.commands[2:4]:
        assert command[-5:-1] == ["--rounds", "3", "--resume", "--limit"]
    others = [card.commands[1], *card.commands[4:]]
    for name, command, limit in others:
        assert command[-2] == "--seconds" and 0 < float(command[-1]) < limit and "3" not in command
        output = card.path.parent / f"{BENCHMARKS[name]}-a-card.json"
        assert command[command.index("--output") + 1] == str(output)
        assert command[command.index("--size") + 1] == "flux"
    resumed = ["--resume" in command for _, command, _ in others]
    assert resumed == [*[False] * 3, True, *[False] * 3]  # measured anew, what died goes on
    content = results.load(card.path)
    assert list(content["parts"]) == list(gpu_check.LIMITS)
    assert len(content["cases"]) == 2 and "A Card" in report.markdown(content)
    assert [item["what"] for item in content["left_out"]] == ["died"]
    lines = capsys.readouterr().out.splitlines()
    closing = {line.split()[0]: line for line in lines if line.split()[:1] and ";" in line}
    assert closing["build"].endswith("nothing; no nvcc")
    assert closing["ops"].endswith("run.py; exit code 0; end of run")
    assert closing["flux-blocks"].endswith("bench_blocks.py; exit code 0; end of bench_blocks")


def test_gpu_check_keeps_what_other_parts_had(card: Card, capsys) -> None:
    def ops() -> int:
        results.Store(card.path, "cuda", resume=True).add(ROWS[0])
        return 0

    card.run = {"run": ops, "bench_blocks": lambda: None, "bench_flux_forward": lambda: 3}
    assert card.check("--only", "ops", "tests") == 0 and card.names == ["pytest", "run"]
    assert "flux-blocks    not done" in capsys.readouterr().out
    assert card.check("--only", "flux-blocks", "--limit", "50", "--no-compile") == 1
    ((name, command, limit),) = card.commands
    assert name == "bench_blocks" and 49 < limit <= 50 and "--no-compile" in command
    assert "bench_blocks.py; out of time; end of" in capsys.readouterr().out
    assert len(results.load(card.path)["cases"]) == 1  # those of the ops are left alone
    assert card.parts["tests"]["end"] and card.parts["flux-blocks"]["code"] is None
    assert card.check("--only", "flux-forward", "--resume") == 1
    assert card.names == ["bench_flux_forward"] and "--resume" in card.commands[0][1]
    card.run = {"run": lambda: 0}
    assert card.check("--only", "ops", "--resume") == 0
    assert len(results.load(card.path)["cases"]) == 1
    assert card.check("--only", "ops") == 0  # measures anew
    assert results.load(card.path)["cases"] == [] and set(card.parts) > {"tests", "flux-forward"}
    card.path.write_text("{}")
    assert card.check() == 2 and card.names == []
    assert "mine.json has no kind 'flow-ops'" in capsys.readouterr().err


def test_gpu_check_skips_what_a_missing_package_forbids(
    card: Card, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    find = importlib.util.find_spec
    lost = {"diffusers"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: (
        None if name in lost else find(name)))  # fmt: skip
    assert card.check() == 0
    assert card.names == ["pytest", "bench_ceilings", "run", "bench_adamw8bit"]
    said = capsys.readouterr().out
    assert said.count("nothing; diffusers not installed: pip install diffusers") == 4
    (listed,) = (line for line in said.splitlines() if line.startswith("not installed: "))
    assert listed.startswith("not installed: diffusers")
    assert "tests/test_flux_rollout.py left out: diffusers not installed" in said
    assert not any("flux_rollout" in word for word in card.commands[0][1])
    lost.add("jsonargparse")
    assert card.check("--only", "flux-update") == 0 and card.names == []
    assert "nothing; diffusers, jsonargparse not installed: pip install" in capsys.readouterr().out
    lost.add("pytest")
    assert card.check("--only", "tests") == 0 and card.names == []
    assert "tests          nothing; pytest is not installed" in capsys.readouterr().out


def test_the_published_loop_stands_beside_the_update_that_was_measured(card: Card) -> None:
    update = card.path.parent / "flux-update-a-card.json"
    card.run = {"bench_flux_update": lambda: update.write_text("{}") and 0}
    assert card.check("--only", "reference") == 0 and "--ours" not in card.commands[0][1]
    assert card.check("--only", "reference", "flux-update") == 0
    assert card.names == ["bench_flux_update", "bench_reference"]
    command = card.commands[1][1]
    assert command[command.index("--ours") + 1] == str(update)


def test_gpu_check_begins_without_more_than_torch() -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['diffusers', 'jsonargparse', 'safetensors', "
        "'yaml', 'rich']); import gpu_check, run, report, bench_adamw8bit; print(1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks",
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--only", "tests", "block"], "'block'; expected some of build, tests, ceilings, ops, flux-"),
    (["--only", "tests", "--rounds", "3"], "--rounds 3: for benchmarks/run.py"),
    (["--limit", "0"], "--limit: 0; expected seconds > 0"),
])  # fmt: skip
def test_gpu_check_refuses(arguments: list[str], message: str, card: Card, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        card.check(*arguments)
    assert message in capsys.readouterr().err and not card.path.exists()


def test_gpu_check_runs_every_test_of_a_backend() -> None:
    """Those that take the `target` fixture, and those that are skipped without a GPU."""
    found = {
        path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")
        if re.search(r"^(def \w+\(.*|    )target: Target\b|^@pytest.mark.skipif\(not torch.cuda",
                     path.read_text(), re.MULTILINE)
    }  # fmt: skip
    assert {"block_attention", "flux_rollout", "adamw8bit_native", "optim"} <= found
    assert found <= set(gpu_check.TESTS)
    assert all((ROOT / f"tests/test_{name}.py").is_file() for name in gpu_check.TESTS)


def test_three_runs_of_ten_minutes_do_every_part() -> None:
    runs = [line.split()[3:] for line in gpu_check.__doc__.splitlines() if "py --only" in line]
    assert sorted(part for run in runs for part in run) == sorted(gpu_check.LIMITS)
    for run in runs:
        assert run == [part for part in gpu_check.LIMITS if part in run]  # as they are done
        assert sum(gpu_check.LIMITS[part] for part in run) <= 585


def test_a_part_out_of_time_is_stopped_with_its_workers(capsys) -> None:
    code = "import subprocess, sys; print('begun', flush=True); " \
           "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"  # fmt: skip
    ended, seconds, end = gpu_check.call([sys.executable, "-c", code], limit=2)
    assert ended is None and seconds < 30 and end == "begun"
    assert gpu_check.call([sys.executable, "-c", "raise SystemExit(3)"], limit=60)[0] == 3
    assert "out of time" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_check_without_a_gpu_says_so() -> None:
    done = subprocess.run([sys.executable, "benchmarks/gpu_check.py"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "no GPU to check" in done.stderr
