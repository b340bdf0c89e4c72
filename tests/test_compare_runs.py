"""The processes of `g2rpo compare`: interrupted, killed, failing; on the digits, since a process of
its own knows nothing of a test's stand-ins."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
import yaml
from comparisons import DIGITS, DIGITS_UPDATE, in_this_process, rows_of, scores_of
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from g2rpo import cli
from g2rpo.compare.workers import LOG, LOG_END

HERE = Path(__file__).parent
UPDATES = 9
FOLDERS = ("digits", "digits_sampling=trajectories")


def command(folder: Path, jobs: int, *more: str) -> list[str]:
    """A comparison of two methods from one seed."""
    file = folder.parent / "digits.yaml"
    file.write_text(yaml.safe_dump(DIGITS))
    return [
        "compare", str(file), f"{file} rollout.sampling=trajectories", "--seeds", "1",
        "--budget", str(UPDATES * DIGITS_UPDATE), "--points", "4", "--jobs", str(jobs),
        "--output", str(folder), *more,
    ]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen:
    """As from a shell: with a process group of its own, which Ctrl-C goes to."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "g2rpo", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # a test run in the background has it ignored, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def made(run_dir: Path) -> int:
    """Updates in its log."""
    log = run_dir / "metrics.jsonl"
    return max(0, log.read_bytes().count(b"\n") - 1) if log.exists() else 0


def newest_checkpoint(run_dir: Path) -> int:
    found = (run_dir / "checkpoints").glob("step-*/manifest.json")
    return max((int(path.parent.name[-6:]) for path in found), default=0)


def is_free(run_dir: Path) -> bool:
    """Whether no process is training there."""
    try:
        with FileLock(run_dir / ".lock").acquire(blocking=False):
            return True
    except Timeout:
        return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    threads = torch.get_num_threads()
    assert cli.main(command(folder, 1)) == 0
    assert torch.get_num_threads() == threads
    return folder


def test_a_comparison_leaves_what_it_promises(undisturbed, capsys):
    assert {path.name for path in undisturbed.iterdir()} == {
        "comparison.json", "comparison.md", "curves.png", "samples.png", ".lock", *FOLDERS,
    }  # fmt: skip
    facts = json.loads((undisturbed / "comparison.json").read_text())
    for folder, figures in zip(FOLDERS, facts["methods"].values(), strict=True):
        run_dir = undisturbed / folder / "seed-0"
        rows = rows_of(run_dir)
        assert abs(rows[-1]["evaluations"] - UPDATES * DIGITS_UPDATE) <= DIGITS_UPDATE / 2
        assert rows[-1]["update"] == figures["updates"]["mean"] == made(run_dir)
        assert rows[-1]["heldout/judge_probability/mean"] == figures["judge_probability"]["mean"]
        assert 5 <= len(scores_of(run_dir)) <= 7
        assert "slow_probability" in (run_dir / LOG).read_text()  # what the run has said
        assert (run_dir / "report.html").exists()
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/*/*")}
    assert cli.main(command(undisturbed, 2)) == 0
    assert "2 runs, 2 made already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.glob("*/*/*")}


def test_interrupted_and_gone_on_with(undisturbed, tmp_path):
    """The numbers of a comparison that was left alone, bit for bit, though that made one run at a
    time and this one two."""
    folder = tmp_path / "out"
    run_dirs = [folder / name / "seed-0" for name in FOLDERS]
    process = start(command(folder, 2))
    wait_for(lambda: all(made(run_dir) for run_dir in run_dirs), process)
    process.terminate()
    asked = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - asked < 30
    assert "2 runs; 2 at a time" in out and "interrupted" in err and "Traceback" not in err
    assert "runs under way end with a checkpoint, and the same command goes on" in err
    for run_dir in run_dirs:
        assert is_free(run_dir) and newest_checkpoint(run_dir) == made(run_dir) < UPDATES
        assert "Stopped after update" in (run_dir / LOG).read_text()
    with in_this_process(tiny=False) as names:
        assert cli.main(command(folder, 1)) == 0
    assert len(names) == 2
    for name in FOLDERS:
        run_dir, expected = folder / name / "seed-0", undisturbed / name / "seed-0"
        assert rows_of(run_dir) == rows_of(expected)
        assert scores_of(run_dir) == scores_of(expected)
        weights, others = (
            load_file(next(d.glob(f"checkpoints/step-{made(d):06d}/transformer/*.safetensors")))
            for d in (run_dir, expected)
        )
        assert all(torch.equal(weights[key], others[key]) for key in others)
    facts, expected = (
        json.loads((d / "comparison.json").read_text())["methods"] for d in (folder, undisturbed)
    )
    for label, figures in expected.items():
        for heading in figures.keys() - {"seconds"}:
            assert facts[label][heading] == figures[heading]


@pytest.mark.slow
def test_workers_of_a_killed_command_stop(tmp_path):
    """By themselves, with a checkpoint: or the same command would find its runs taken."""
    folder = tmp_path / "out"
    first = folder / FOLDERS[0] / "seed-0"
    process = start(command(folder, 1))
    wait_for(lambda: made(first) >= 1, process)
    process.kill()
    process.communicate(timeout=60)  # until the worker has gone, which could write
    assert is_free(first) and 1 <= newest_checkpoint(first) == made(first) < UPDATES


def test_ctrl_c_before_the_first_update(tmp_path):
    """Workers that have yet to import anything are of the terminal's process group no more."""
    process = start(command(tmp_path / "out", 2))
    said = ""
    while "at a time" not in said:
        line = process.stdout.readline()
        assert line, process.communicate()
        said += line
    time.sleep(0.7)  # into the imports of the workers
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)  # until nobody is left who could write
    assert process.returncode == 130 and "interrupted" in err
    assert "Traceback" not in err
    assert not any(made(tmp_path / "out" / name / "seed-0") for name in FOLDERS)


def test_a_run_that_fails_is_named_with_its_log(tmp_path, capfd):
    folder = tmp_path / "out"
    rewards = '[{"name": "comparisons:broken_reward"}]'
    assert cli.main(command(folder, 1, "--rewards", rewards)) == 1
    err = capfd.readouterr().err
    log = folder / "digits" / "seed-0" / LOG
    assert "the run digits, seed 0 failed: ConnectionError: the scorer does not answer" in err
    assert str(log) in err and "in broken_reward" in log.read_text()
    shown = log.read_text()[-LOG_END:].strip()  # of its traceback, what long paths leave room for
    assert shown in err and "Traceback" not in err.replace(shown, "")
    assert not active_children()


def test_a_killed_worker_is_named(tmp_path, capfd):
    """As by the system, when memory runs out."""
    folder, killed = tmp_path / "out", []

    def kill():
        wait_for((folder / "digits" / "seed-0" / LOG).exists)
        (worker,) = active_children()
        os.kill(worker.pid, signal.SIGKILL)
        killed.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    assert cli.main(command(folder, 1)) == 1
    killer.join()
    assert killed
    err = capfd.readouterr().err
    assert "the run digits, seed 0 failed: its process was ended by SIGKILL" in err
    assert "Traceback" not in err and not active_children()
