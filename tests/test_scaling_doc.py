"""docs/scaling.md: its commands, run as they are written."""

import os
import re
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from ranks import free_port
from test_run import environment, rows

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
TEXT = PAGE.read_text(encoding="utf-8")
PORT = 29500  # in the commands


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def is_taken(port: int) -> bool:
    with closing(socket.socket()) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def run(block: str, folder: Path) -> str:
    """What bash says of a block; `wait` for each line that is left in the background."""
    if str(PORT) in block and is_taken(PORT):
        block = block.replace(str(PORT), str(free_port()))
    assert block.count("&\n") <= 1
    if "&\n" in block:
        block = block.replace("\nwait\n", "\nwait $!\n")  # whose exit code is that of the line
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", block], cwd=folder, env=environment() | {"PATH": path},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, block + done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_of_the_page(tmp_path):
    """In their order and in one folder: what a later one goes on with, an earlier one has left."""
    said = [run(block, tmp_path) for block in blocks("bash")]
    assert len(said) == 6
    assert "2 ranks, distributed.strategy replicate" in said[0]
    assert "| 512 | replicate |" in TEXT and "512" in said[1]
    assert "Resuming after update 2" in said[4] and "Resuming after update 3" in said[4]
    assert "2 ranks, distributed.strategy shard" in said[4]
    runs = {path.name: rows(path)[-1]["update"] for path in (tmp_path / "runs").iterdir()}
    assert runs == {"two": 4, "nodes": 2, "again": 2}
    for name in runs:
        assert (tmp_path / "runs" / name / "report.html").exists()
    config = yaml.safe_load((tmp_path / "runs" / "two" / "config.yaml").read_text())
    assert config["distributed"]["strategy"] == "shard"


def test_what_is_for_a_cluster_is_a_script(tmp_path):
    """And its torchrun a command whose keys are those of g2rpo train."""
    (script,) = blocks("slurm")
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=30).returncode == 0
    # srun and scontrol stand in for SLURM's, and torchrun says how it was called.
    for name, body in (
        ("scontrol", 'echo node-a; echo node-b'), ("srun", '"$@"'), ("torchrun", 'echo "$@"'),
    ):  # fmt: skip
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    told = {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-[a-b]"}
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    script = script.replace("/shared/", f"{tmp_path}/")
    for begun in (False, True):
        if begun:
            (tmp_path / "runs" / "paper").mkdir(parents=True)
            (tmp_path / "runs" / "paper" / "config.yaml").touch()
        done = subprocess.run(
            ["bash", "-e"], input=script, env={**os.environ, **told, "PATH": path}, text=True,
            capture_output=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "--nnodes 2" in done.stdout and "--rdzv-endpoint node-a:29500" in done.stdout
        assert (f"--resume {tmp_path}/runs/paper" in done.stdout) == begun
        assert ("flux-dev-paper" in done.stdout) != begun
