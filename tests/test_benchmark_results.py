"""The benchmarks' results files, the README made of them, and gpu_check's bookkeeping."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MARKERS = [  # of each of the README's sections
    tuple(mark.format(name) for mark in ("<!-- {}:begin -->", "<!-- {}:end -->"))
    for name in ("bench", "flux-blocks", "flux-forward")
]
BEGIN, END = MARKERS[0]
EMPTY = "\n".join(mark for pair in MARKERS for mark in pair) + "\n"
sys.path.append(str(ROOT / "benchmarks"))

import goals  # noqa: E402
import gpu_check  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def small_machine() -> Iterator[None]:
    """A machine with a cache of 64 KiB, so that no test moves hundreds of megabytes."""
    buffers = torch.arange(2**12, dtype=torch.int32), torch.empty(2**12, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "cache_bytes", lambda device: 2**16)
        patch.setattr(measure, "copy_buffers", lambda device: buffers)
        yield


@pytest.fixture(scope="module")
def measured(small_machine: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What run.py writes of two cases on a tiny shape."""
    path = tmp_path_factory.mktemp("measured") / "cpu.json"
    code = run.main([
        "--device", "cpu", "--shapes", "digits", "--only", "policy_loss", "--no-compile",
        "--rounds", "5", "--budget", "0.1", "--results", str(path),
    ])  # fmt: skip
    assert code == 0
    return path.read_text()


@pytest.fixture
def file(measured: str, tmp_path: Path) -> Path:
    path = tmp_path / "results" / "cpu-test.json"
    path.parent.mkdir()
    path.write_text(measured)
    return path


def test_a_run_writes_what_report_reads(file: Path, tmp_path: Path, capsys) -> None:
    content = results.load(file)
    assert [row["case"] for row in content["cases"]] == [
        "policy_loss-forward+backward-digits-float32", "policy_loss-forward-digits-float32",
    ]  # fmt: skip
    assert content["device"] == "cpu" and content["versions"]["torch"] == torch.__version__
    assert content["calls"]["microseconds"]["policy_loss forward+backward"] > 0
    assert "not measured" in "\n".join(goals.verdicts(content)) and not list(
        file.parent.glob("*.new")
    )

    (file.parent / "other.json").write_text("{}")
    readme = tmp_path / "README.md"
    others = EMPTY.replace(f"{BEGIN}\n{END}\n", "")
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nrest\n{others}")
    arguments = ["--results", str(file.parent), "--readme", str(readme), "--docs", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    once = readme.read_text()
    assert report.main([*arguments, "--check"]) == 0
    assert report.main(arguments) == 0 and readme.read_text() == once
    assert once.startswith("# Title\n") and f"{END}\n\nrest\n{MARKERS[1][0]}\n" in once
    assert "Not yet measured on a GPU" in once and "| `policy_loss` | fwd + bwd |" in once
    assert "4 × 12 × 16 × 4" in once and "old" not in once
    assert "left alone: other.json (of another kind)" in capsys.readouterr().out
    assert (tmp_path / report.plot_name(content)).stat().st_size > 10_000


def test_a_gpu_file_takes_the_place_of_not_yet_measured(file: Path) -> None:
    content = results.load(file)
    gpu = json.loads(json.dumps(content))
    gpu["device"] = "cuda"
    gpu["machine"] = {"name": "A Card", "driver": "1.2", "host": content["machine"]}
    gpu["versions"] |= {"cuda": "13.0", "triton": "3.6.0"}
    for row in gpu["cases"]:
        for entry in row["variants"].values():
            entry |= {"timer": "graph", "launches": 3}
    text = report.block([gpu, content])
    assert "Not yet measured" not in text and text.index("A Card") < text.index("threads")
    assert "3 → 3" in text and "bench-a-card.png" in text and "CUDA graph" in text


@pytest.mark.parametrize("mark", [begin for begin, _ in MARKERS])
@pytest.mark.parametrize("spoil", [
    lambda mark: "", lambda mark: f"{mark}\n{mark}",
    lambda mark: f"{mark.replace('begin', 'end')}\n{mark}",
])  # fmt: skip
def test_a_readme_without_its_markers_is_refused(spoil, mark: str, tmp_path: Path, capsys) -> None:
    end = mark.replace("begin", "end")
    readme = EMPTY.replace(f"{mark}\n{end}", spoil(mark))
    (tmp_path / "README.md").write_text(readme)
    assert report.main(["--results", str(tmp_path), "--readme", str(tmp_path / "README.md")]) == 2
    assert f"expected one line {mark}" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == readme


@pytest.mark.parametrize("spoil, message", [
    (lambda text: text[: len(text) // 2], "is not JSON"),
    (lambda text: text.replace('"date"', '"day"'), "it lacks date"),
    (lambda text: text.replace('"bytes": ', '"size": '), "lacks bytes"),
    (lambda text: text.replace('"copy_fraction"', '"share"'), "lacks copy_fraction"),
    (lambda text: text.replace('"device": "cpu"', '"device": "tpu"'), "device 'tpu'"),
])  # fmt: skip
def test_a_spoiled_file_is_refused(spoil, message: str, file: Path, capsys) -> None:
    file.write_text(spoil(file.read_text()))
    with pytest.raises(results.ResultsError, match=message):
        results.load(file)
    readme = file.parent / "README.md"
    readme.write_text(EMPTY)
    assert report.main(["--results", str(file.parent), "--readme", str(readme)]) == 2
    assert file.name in capsys.readouterr().err


def test_a_run_cut_short_keeps_what_it_had(file: Path) -> None:
    store = results.Store(file, "cpu", resume=True)
    store.begin("a case that ends the process")
    again = results.Store(file, "cpu", resume=True)
    assert again.known("a case that ends the process") and not again.known("another")
    assert again.known("policy_loss-forward-digits-float32")
    assert "running" not in again.content and len(again.content["cases"]) == 2
    with pytest.raises(results.ResultsError, match="not of 'cuda'"):
        results.Store(file, "cuda", resume=True)


def test_a_limit_leaves_cases_out_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    assert run.main(["--device", "cpu", "--shapes", "primes", "--only", "ode_step", "--limit", "-1",
                     "--no-compile", "--rounds", "5", "--results", str(path)]) == 0  # fmt: skip
    content = results.load(path)
    assert content["cases"] == [] and "--limit" in content["left_out"][0]["why"]
    with pytest.raises(results.ResultsError, match="hold no case"):
        report.markdown(content)
    assert report.load_folder(tmp_path)["flow-ops"] == []


@pytest.mark.parametrize("arguments", [["--shapes", "flux9"], ["--dtypes", "float64"],
                                       ["--only", "no such case"]])  # fmt: skip
def test_wrong_options_are_refused(arguments: list[str], tmp_path: Path, capsys) -> None:
    try:
        code = run.main(["--device", "cpu", *arguments, "--results", str(tmp_path / "x.json")])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and arguments[1] in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


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


def test_gpu_check_goes_on_without_the_case_that_killed_it(file: Path, card: Card, capsys) -> None:
    def ops() -> int:
        store = results.Store(card.path, "cuda", resume=True)
        if "died" not in str(store.content["left_out"]):
            store.begin("died")
            return -6
        for row in results.load(file)["cases"]:
            store.add(row)
        return 0

    codes = [-6, 0]
    card.run = {"run": ops, "bench_flux_forward": lambda: codes.pop(0)}
    assert card.check("--rounds", "3") == 0 and codes == []
    assert card.names == ["pytest", "run", "run", *["bench_flux_forward"] * 2, "bench_blocks"]
    for _, command, _ in card.commands[1:3]:
        assert command[-5:-1] == ["--rounds", "3", "--resume", "--limit"]
    for name, command, limit in card.commands[3:]:
        assert command[-2] == "--seconds" and 0 < float(command[-1]) < limit and "3" not in command
        kind = {"bench_blocks": "flux-blocks"}.get(name, "flux-forward")
        output = card.path.parent / f"{kind}-a-card.json"
        assert command[command.index("--output") + 1] == str(output)
    resumed = ["--resume" in command for _, command, _ in card.commands[3:]]
    assert resumed == [False, True, False]  # a new run measures anew, what has died goes on
    content = results.load(card.path)
    assert list(content["parts"]) == ["build", "tests", "ops", "flux-forward", "flux-blocks"]
    assert len(content["cases"]) == 2 and "A Card" in report.markdown(content)
    assert [item["what"] for item in content["left_out"]] == ["died"]
    lines = capsys.readouterr().out.splitlines()
    closing = {line.split()[0]: line for line in lines if line.split()[:1] and ";" in line}
    assert closing["build"].endswith("nothing; no nvcc")
    assert closing["ops"].endswith("run.py; exit code 0; end of run")
    assert closing["flux-blocks"].endswith("bench_blocks.py; exit code 0; end of bench_blocks")


def test_gpu_check_keeps_what_other_parts_had(file: Path, card: Card, capsys) -> None:
    def ops() -> int:
        results.Store(card.path, "cuda", resume=True).add(results.load(file)["cases"][0])
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
    assert card.check() == 0 and card.names == ["pytest", "run"]
    said = capsys.readouterr().out
    assert said.count("nothing; diffusers is not installed: pip install diffusers") == 2
    assert "tests/test_flux_rollout.py left out: diffusers not installed" in said
    assert not any("flux_rollout" in word for word in card.commands[0][1])
    lost.add("pytest")
    assert card.check("--only", "tests") == 0 and card.names == []
    assert "tests          nothing; pytest is not installed" in capsys.readouterr().out


def test_gpu_check_begins_without_diffusers() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import gpu_check, run, report; print(1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks",
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--only", "tests", "block"], "'block'; expected some of build, tests, ops, flux-forward, "),
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
        if re.search(r"(target: Target\))|(^@pytest.mark.skipif\(not torch.cuda)",
                     path.read_text(), re.MULTILINE)
    }  # fmt: skip
    assert {"block_attention", "flux_rollout"} <= found and found <= set(gpu_check.TESTS)
    assert all((ROOT / f"tests/test_{name}.py").is_file() for name in gpu_check.TESTS)


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
