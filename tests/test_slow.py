"""What takes minutes: `make test-slow`."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flux_small import environment, write_run
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
UPDATES, KILLS = 60, 20


def train(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "g2rpo", "train", *map(str, arguments)], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def rows(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if "second" not in k and "memory" not in k}
        for line in lines
    ]


def lines_of(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def _written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_kill_9_at_random_moments(tmp_path, miniature, weights):
    """Ten each for both kinds of weights, twenty in all: wherever a run dies, starting, training or
    writing a checkpoint, it goes on, and ends with the bits of a run that was left alone."""
    model = {"full": {"lora": {"rank": 0}, "dtype": "float32"}, "lora": {}}[weights]
    config = write_run(
        tmp_path, miniature, model=model,
        train={"updates": UPDATES, "save_every": 2, "evaluate_every": 7, "ema": 0.9},
    )  # fmt: skip
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    process = train(config, "--train.output", undisturbed)
    while not lines_of(undisturbed):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    starting = time.monotonic() - began
    finish(process)
    training = time.monotonic() - began - starting

    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 2**32))
    print(f"\n{weights}: KILL_SEED={seed}, {starting:.1f} s to start, {training:.1f} s to train")
    moments = random.Random(seed)
    done = 0
    while done < KILLS // 2:
        # A run that has not written its configuration yet has nothing to go on with.
        begun = (killed / "config.yaml").exists()
        arguments = ("--resume", killed) if begun else (config, "--train.output", killed)
        before, process = _written(killed / "config.yaml"), train(*arguments)
        if moments.random() < 0.25:  # while it starts: imports, loading, restoring
            time.sleep(moments.uniform(0, starting))
        else:
            while _written(killed / "config.yaml") == before:  # it is, as training begins
                assert process.poll() is None, process.communicate()
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 2.5 * training / KILLS))
        alive = process.poll() is None
        process.kill()
        output, _ = process.communicate()
        if not alive:
            assert process.returncode == 0, output
            pytest.fail(f"the run ended after {done} kills: UPDATES is too small")
        assert process.returncode == -signal.SIGKILL
        done += 1
        partial = list((killed / "checkpoints").glob(".step-*.partial"))
        where = ", inside a checkpoint" if partial else ""
        print(f"  kill {done} after row {lines_of(killed) - 1}{where}", flush=True)
    output = finish(train("--resume", killed))
    assert re.search(r"Resuming after update \d+", output), output
    assert rows(killed) == rows(undisturbed)
    scores = [
        {path.name: path.read_bytes() for path in (run / "scores").iterdir()}
        for run in (undisturbed, killed)
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 2 + (UPDATES - 1) // 7
    folder = f"checkpoints/step-{UPDATES:06d}"
    found = (undisturbed / folder).rglob("*.safetensors")
    files = sorted(path.relative_to(undisturbed) for path in found)
    assert len(files) == 3  # weights, their average, the optimizer's state
    for file in files:
        first, second = load_file(undisturbed / file), load_file(killed / file)
        assert all(torch.equal(first[name], second[name]) for name in first), file


def test_the_example(tmp_path):
    """examples/flux_miniature.py: every command, and the authors' inference code."""
    example = Path(__file__).parent.parent / "examples" / "flux_miniature.py"
    done = subprocess.run(
        [sys.executable, str(example), str(tmp_path / "it")], env=environment(),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "both work" in done.stdout and "Traceback" not in done.stderr
    assert (tmp_path / "it" / "authors.png").exists()
    shutil.rmtree(tmp_path / "it")
