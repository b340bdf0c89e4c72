"""Runs: killed, interrupted, resumed, refused. What is killed or gets a signal is a process of its
own; the others are the same command in this one, which spares the seconds of imports."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny_cli
import torch
import yaml
from safetensors.torch import load_file

import g2rpo.run
from g2rpo import cli

HERE = Path(__file__).parent
CLI = [sys.executable, str(HERE / "tiny_cli.py"), "train"]
SMALL = {
    "rollout": {
        "steps": 6, "sde_positions": [0, 1, 2], "group_size": 4, "branch_batch": 8,
    },
    "rewards": [{"name": "tiny:brightness"}, {"name": "tiny:contrast", "heldout": True}],
    "optimizer": {"lr": 1e-3},
    "train": {
        "updates": 6, "prompts_per_update": 2, "save_every": 2, "evaluate_every": 3,
        "evaluation_samples": 6,
    },
}  # fmt: skip


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A YAML file of a run of seconds."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def train(*arguments: object, code: int = 0, **variables: str) -> SimpleNamespace:
    """What tiny_cli.py does as a process: its exit code, and what it says."""
    out, err = io.StringIO(), io.StringIO()
    tiny_cli.calls.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes have: with two, the last bit may be another
    try:
        with redirect_stdout(out), redirect_stderr(err), mock.patch.dict(os.environ, variables):
            with mock.patch.object(g2rpo.run, "load_model", tiny_cli.load_tiny_model):
                found = cli.main(["train", *map(str, arguments)])
    except Exception:  # as Python itself ends
        found = 1
        err.write(traceback.format_exc())
    finally:
        torch.set_num_threads(threads)
    assert found == code, out.getvalue() + err.getvalue()
    return SimpleNamespace(stdout=out.getvalue(), stderr=err.getvalue())


def final_weights(run_dir: Path, update: int = 6) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step-{update:06d}" / "transformer"
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if "second" not in k and k != "peak_memory_bytes"}


def assert_same_run(a: Path, b: Path) -> None:
    first, second = final_weights(a), final_weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert [timeless(row) for row in rows(a)] == [timeless(row) for row in rows(b)]
    assert scores(a) == scores(b) and len(scores(a)) >= 3


def scores(run_dir: Path) -> dict[str, list]:
    """Of every evaluation, by file."""
    files = {path.name: json.loads(path.read_text()) for path in run_dir.glob("scores/*.json")}
    return {name: [*found["scores"].values()] for name, found in files.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """The run all others are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    train(folder / "small.yaml", "--train.output", folder / "run")
    return folder / "run"


def test_a_run_leaves_what_it_promises(undisturbed):
    assert {path.name for path in undisturbed.iterdir()} == {
        "config.yaml", "metrics.jsonl", "curves.png", "report.html", "samples", "scores",
        "checkpoints", ".lock",
    }  # fmt: skip
    checkpoints = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    assert checkpoints == ["step-000004", "step-000006"]  # keep_last: 2
    assert [row["update"] for row in rows(undisturbed)] == list(range(7))
    evaluated = [row["update"] for row in rows(undisturbed) if "reward/brightness/mean" in row]
    assert evaluated == [0, 3, 6]
    config = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert config["rollout"]["group_size"] == 4 and config["objective"]["clip_range"] == 1e-4
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel.from_pretrained(
        undisturbed / "checkpoints" / "step-000006", subfolder="transformer"
    )


def wait_for(condition, process, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_slowly(small: Path, run_dir: Path) -> subprocess.Popen:
    """The same run with pauses in its rewards: the same values, but time to interfere."""
    rewards = '[{"name": "tiny_cli:slow_brightness"}, {"name": "tiny:contrast", "heldout": true}]'
    return subprocess.Popen(
        [*CLI, str(small), "--train.output", str(run_dir), "--rewards", rewards],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def named_as_undisturbed(run_dir: Path) -> None:
    """The slow reward and the fragile judge have names of their own; compare under one."""
    text = (run_dir / "metrics.jsonl").read_text()
    for name in ("slow_", "fragile_"):
        text = text.replace(name, "")
    (run_dir / "metrics.jsonl").write_text(text)


def test_kill_9_and_resume(small, tmp_path, undisturbed):
    """Killed during an update: --resume ends with the same weights, bit for bit."""
    run_dir = tmp_path / "killed"
    process = start_slowly(small, run_dir)
    wait_for((run_dir / "checkpoints" / "step-000002").exists, process)
    wait_for(lambda: len((run_dir / "metrics.jsonl").read_text().splitlines()) >= 4, process)
    time.sleep(0.1)  # into the next update
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    saved = max(int(p.name[-6:]) for p in (run_dir / "checkpoints").glob("step-*"))
    assert rows(run_dir)[-1]["update"] > saved, "the kill should have cost an update"
    done = train("--resume", run_dir)
    assert f"Resuming after update {saved}" in done.stdout
    named_as_undisturbed(run_dir)
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_and_resume(small, tmp_path, undisturbed, number):
    """Ctrl-C or SIGTERM: a checkpoint of the last complete update, and how to go on."""
    run_dir = tmp_path / "stopped"
    process = start_slowly(small, run_dir)
    log = run_dir / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(log.read_text().splitlines()) >= 2, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    done = rows(run_dir)[-1]["update"]
    assert f"Go on with: g2rpo train --resume {run_dir}" in output
    assert (run_dir / "checkpoints" / f"step-{done:06d}" / "manifest.json").exists()
    assert (run_dir / "report.html").exists()
    train("--resume", run_dir)
    named_as_undisturbed(run_dir)
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("evaluation, update", [(2, 3), (3, 6)])
def test_failed_evaluation_and_resume(small, tmp_path, undisturbed, evaluation, update):
    """The update before it is kept, and its row, evaluated, is written by the resume."""
    run_dir = tmp_path / "failed"
    judge = '{"name": "tiny_cli:fragile_contrast", "heldout": true}'
    rewards = ("--rewards", f'[{{"name": "tiny:brightness"}}, {judge}]')
    done = train(small, "--train.output", run_dir, *rewards, code=1, FAILS_AT=str(evaluation))
    assert "the judge does not answer" in done.stderr
    assert (run_dir / "checkpoints" / f"step-{update:06d}").exists()
    train("--resume", run_dir)
    named_as_undisturbed(run_dir)
    assert_same_run(run_dir, undisturbed)


def test_a_run_ended_early_is_evaluated_at_its_end(copied):
    shutil.rmtree(copied / "checkpoints" / "step-000006")
    train("--resume", copied, "--train.updates", 4)
    assert [row["update"] for row in rows(copied)] == list(range(5))
    assert "heldout/contrast/mean" in rows(copied)[-1] and "grad_norm" in rows(copied)[-1]


def test_resume_to_fewer_updates_than_made(copied):
    before = (copied / "config.yaml").read_text()
    done = train("--resume", copied, "--train.updates", 5, code=2)
    assert "train.updates is 5; expected at least 6" in done.stderr
    assert (copied / "config.yaml").read_text() == before and len(rows(copied)) == 7


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:
    run_dir = tmp_path / "copied"
    shutil.copytree(undisturbed, run_dir)
    return run_dir


@pytest.mark.parametrize("victim", ["transformer/diffusion_pytorch_model.safetensors",
                                    "training_state.pt", "manifest.json"])  # fmt: skip
def test_truncated_checkpoint(copied, undisturbed, victim):
    """The one before is used, and said; the run ends as if nothing had happened."""
    path = copied / "checkpoints" / "step-000006" / victim
    path.write_bytes(path.read_bytes()[:-100])
    done = train("--resume", copied)
    assert "Checkpoint passed over" in done.stdout and "step-000006" in done.stdout
    assert "Resuming after update 4" in done.stdout
    assert_same_run(copied, undisturbed)


def test_resume_before_the_first_checkpoint(copied, undisturbed):
    shutil.rmtree(copied / "checkpoints")
    done = train("--resume", copied)
    assert "no checkpoint yet: starting from the beginning" in done.stdout
    assert_same_run(copied, undisturbed)


def test_half_written_checkpoint_is_not_one(copied, undisturbed):
    newest = copied / "checkpoints" / "step-000006"
    newest.rename(copied / "checkpoints" / ".step-000006.partial")
    assert "Resuming after update 4" in train("--resume", copied).stdout
    assert_same_run(copied, undisturbed)


def test_no_checkpoint_is_whole(copied):
    for path in (copied / "checkpoints").glob("*/manifest.json"):
        path.write_text("{")
    done = train("--resume", copied, code=1)
    assert "step-000004" in done.stderr and "step-000006" in done.stderr


def test_longer_run(copied):
    """A finished run goes on when asked for more updates."""
    train("--resume", copied, "--train.updates", 8)
    assert [row["update"] for row in rows(copied)] == list(range(9))
    assert "reward/brightness/mean" in rows(copied)[-1]


def test_resume_refuses_to_become_another_run(copied, tmp_path):
    done = train("--resume", copied, "--train.seed", 5, code=2)
    assert "train.seed is 5, but" in done.stderr and "was started with 0" in done.stderr
    done = train("--resume", tmp_path / "nowhere", code=2)
    assert "there is no config.yaml in it" in done.stderr
    done = train("digits", "--resume", copied, code=2)
    assert "expected no preset" in done.stderr


def test_output_that_holds_a_run(copied, small):
    """Refused, and untouched; --overwrite replaces it, and nothing that is not a run's."""
    before = (copied / "metrics.jsonl").read_bytes()
    done = train(small, "--train.output", copied, code=2)
    assert "holds another run" in done.stderr and "--overwrite" in done.stderr
    assert (copied / "metrics.jsonl").read_bytes() == before
    (copied / "notes.txt").write_text("mine")
    train(small, "--train.output", copied, "--overwrite", "--train.updates", 1)
    assert [row["update"] for row in rows(copied)] == [0, 1]
    assert (copied / "notes.txt").read_text() == "mine"


def test_output_that_is_a_file(small, tmp_path):
    (tmp_path / "file").write_text("")
    done = train(small, "--train.output", tmp_path / "file", code=2)
    assert "expected a directory" in done.stderr
    done = train(small, "--train.output", tmp_path / "file" / "run", code=2)
    assert "expected a directory that can be made" in done.stderr


def test_all_judges_failing_saves_and_says(small, tmp_path):
    done = train(
        small, "--train.output", tmp_path / "run", "--rewards", '[{"name": "tiny:broken"}]', code=1
    )
    assert "every reward group failed" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists()
