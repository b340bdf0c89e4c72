"""`g2rpo train` as torchrun starts it: what is left, what is printed, and how it starts again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rank_commands import DISTURBANCE, write_small
from ranks import free_port
from test_run import assert_same_run, environment, final_weights, rows, timeless, train

from g2rpo import cli
from g2rpo.digits import pretrained_transformer

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import distributed_overhead  # noqa: E402

slow = pytest.mark.slow
DIGITS = (
    "digits", "--model.device", "cpu", "--train.updates", "2", "--train.evaluation_samples", "20",
    "--train.prompts_per_update", "2", "--rollout.group_size", "4",
)  # fmt: skip
LOCAL = ("--local-addr", "localhost")  # also where the name of the machine cannot be resolved


@pytest.fixture(autouse=True)
def one_thread():
    """As the ranks have: with two, the last bit may be another, and they wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def torchrun(*arguments: object, disturb: str = "- - -") -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *LOCAL, *map(str, arguments)]
    variables = environment() | {DISTURBANCE: disturb}
    # A session of its own: what it has started can be ended with it.
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 240.0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        out, err = process.communicate(timeout=60)
        pytest.fail(f"torchrun has not ended within {seconds} s: {out}{err}")
    assert process.returncode == code, out + err
    return out, err


def children(pid: int) -> dict[str, int]:
    """Process ids of the ranks that a torchrun has started, by RANK."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                told = (folder / "environ").read_bytes().split(b"\0")
                found |= {v[5:].decode(): int(folder.name) for v in told if v.startswith(b"RANK=")}
        except OSError:  # it has ended meanwhile
            continue
    return found


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def digits_alone(run_dir: Path, *keys: str) -> None:
    """The run of DIGITS in this process."""
    assert cli.main(["train", *DIGITS, *keys, "--train.output", str(run_dir)]) == 0


def assert_same_but_for_rounding(a: Path, b: Path) -> None:
    """Rows and weights of two runs of DIGITS."""
    for first, second in zip(map(timeless, rows(a)), map(timeless, rows(b)), strict=True):
        assert first.keys() == second.keys()
        for key, value in second.items():
            assert first[key] == pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True), key
    first, second = final_weights(a, 2), final_weights(b, 2)
    start = pretrained_transformer().state_dict()
    apart = max(float((first[name] - second[name]).abs().max()) for name in second)
    moved = max(float((second[name] - start[name]).abs().max()) for name in second)
    assert apart < 0.2 * moved, (apart, moved)


def test_two_ranks(tmp_path):
    """One run directory, with what one process leaves, and the lead's words alone."""
    two, one = tmp_path / "two", tmp_path / "one"
    process = torchrun("--nproc-per-node", 2, "-m", "g2rpo", "train", *DIGITS,
                       "--train.output", two)  # fmt: skip
    digits_alone(one)
    out, err = finish(process)
    for folder in ("", "samples", "scores", "checkpoints", "checkpoints/step-000002"):
        assert {p.name for p in (two / folder).iterdir()} == {
            p.name for p in (one / folder).iterdir()
        }
    assert (two / "report.html").stat().st_size > 1000
    assert_same_but_for_rounding(two, one)
    assert out.count("update 2/2") == 1 and out.count(f"are in {two}") == 1
    assert out.startswith("2 ranks, distributed.strategy replicate\n")
    assert "rank 1:" not in err and "Traceback" not in err


@slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank by /proc")
@pytest.mark.parametrize("victim", ["1", "0"])
def test_restarted_after_kill_9(tmp_path, victim):
    """A worker killed in the middle of an update: torchrun starts all again, the run goes on by
    itself and ends with the bits of one that was left alone."""
    small = write_small(tmp_path)
    command = (str(Path(__file__).parent / "tiny_cli.py"), "train", small)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(torchrun("--nproc-per-node", 2, *command, "--train.output", alone))
    at = killed / "checkpoints" / "step-000002"
    process = torchrun(
        "--nproc-per-node", 2, "--max-restarts", 1, *command, "--train.output", killed,
        disturb=f"{victim} stall {at}",
    )  # fmt: skip
    wait_for(Path(f"{at}.reached"), process)
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    out, _ = finish(process)
    assert out.count("Resuming after update 2") == 1
    Path(f"{at}.reached").unlink()
    assert_same_run(killed, alone)


@slow
def test_a_restart_does_not_take_up_another_run(tmp_path):
    """A directory that holds another run is refused at the first start, and at the second."""
    small, run_dir = write_small(tmp_path), tmp_path / "run"
    train(small, "--train.output", run_dir, "--train.updates", 2, **{DISTURBANCE: "- - -"})
    before = (run_dir / "metrics.jsonl").read_bytes()
    command = (str(Path(__file__).parent / "tiny_cli.py"), "train", small)
    process = torchrun(
        "--nproc-per-node", 2, "--max-restarts", 1, *command, "--train.output", run_dir
    )
    _, err = finish(process, code=1)
    assert err.count("which holds another run") == 2 and "Resuming" not in err
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds a rank by /proc")
def test_two_nodes_start_again_when_one_has_lost_its_rank(tmp_path):
    """The agent of the other counts no restart, and its ranks are started again as well."""
    small, run_dir = write_small(tmp_path), tmp_path / "run"
    at = run_dir / "checkpoints" / "step-000002"
    nodes = [
        torchrun(
            "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 2, "--rdzv-backend", "c10d",
            "--rdzv-endpoint", f"localhost:{port}", Path(__file__).parent / "tiny_cli.py", "train",
            small, "--train.output", run_dir, disturb=f"1 stall {at}",
        )
        for port in [free_port()] for _ in range(2)
    ]  # fmt: skip
    wait_for(Path(f"{at}.reached"), nodes[0])
    victims = [pid for node in nodes for rank, pid in children(node.pid).items() if rank == "1"]
    assert len(victims) == 1
    os.kill(victims[0], signal.SIGKILL)
    said = [finish(node) for node in nodes]
    assert sum(out.count("Resuming after update 2") for out, _ in said) == 1, said
    assert [row["update"] for row in rows(run_dir)] == list(range(7))


@slow
def test_two_nodes_hybrid(tmp_path):
    """Two nodes of two ranks each on this machine: parts within a node, replicas across."""
    run_dir, port = tmp_path / "run", free_port()
    nodes = [
        torchrun(
            "--nnodes", 2, "--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint",
            f"localhost:{port}", "-m", "g2rpo", "train", *DIGITS,
            "--train.prompts_per_update", 4, "--distributed.strategy", "hybrid",
            "--train.output", run_dir,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [finish(node) for node in nodes]
    assert sum("4 ranks, distributed.strategy hybrid" in out for out, _ in said) == 1
    digits_alone(tmp_path / "one", "--train.prompts_per_update", "4")
    assert_same_but_for_rounding(run_dir, tmp_path / "one")


def test_the_overhead_is_measured(capsys, monkeypatch):
    """At toy size, where it decides nothing: both ways there, and the same weights in the end."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT"):  # fmt: skip
        monkeypatch.setenv(name, "")  # and so put back afterwards
    code = distributed_overhead.main(
        ["--pairs", "2", "--rollout.group_size", "3", "--rollout.steps", "4",
         "--rollout.sde_positions", "[0, 1]", "--train.prompts_per_update", "1"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0 and out.startswith("2 pairs of updates")
    for strategy in distributed_overhead.STRATEGIES:
        lines = [line for line in out.splitlines() if line.startswith(strategy)]
        assert [line.split()[1] for line in lines] == ["clock", "processor"]
    for line in out.splitlines()[2:]:
        ratio, low, high = map(float, re.search(r"(\d+\.\d{4}) +(\S+) to (\S+)", line).groups())
        assert 0 < low <= ratio <= high
        assert float(line.split()[-1]) < 1e-4
