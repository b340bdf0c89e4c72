"""Ranks that fail, stall, freeze and are stopped: what the others do and say, and what is left."""

import json
import re
import signal
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from rank_commands import Commands, write_small
from ranks import free_port
from test_run import assert_same_run, final_weights, rows, train
from torch.distributed import HashStore, PrefixStore

from g2rpo.distributed import joined, meeting, watch
from g2rpo.distributed.meeting import Launch, _answer, _ask
from g2rpo.distributed.watch import Watch
from g2rpo.errors import TrainingError

HOST = socket.gethostname()
SECOND = "checkpoints/step-000002"  # once this is there, rewards are disturbed
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def undisturbed(small) -> Path:
    """The run of two ranks that all others are compared with."""
    run_dir = small.parent / "undisturbed"
    ranks = Commands(small.parent / "said", small, "--train.output", run_dir)
    assert ranks.codes() == [0, 0], ranks.said
    return run_dir


def disturb(small: Path, run_dir: Path, rank: int, kind: str, *keys: object, **more) -> Commands:
    told = f"{rank} {kind} {run_dir / SECOND}"
    arguments = (small, "--train.output", run_dir, *keys)
    return Commands(run_dir.parent / "said", *arguments, disturb=told, **more)


def assert_goes_on(run_dir: Path, undisturbed: Path, update: int = 2) -> None:
    """Two ranks resume after this update and end where undisturbed ones have, bit for bit."""
    ranks = Commands(run_dir.parent / "resumed", "--resume", run_dir)
    assert ranks.codes() == [0, 0], ranks.said
    assert f"Resuming after update {update}" in ranks.out(0)
    assert_same_run(run_dir, undisturbed)


def test_two_ranks_leave_what_one_process_does(small, tmp_path, undisturbed):
    """The same files, the same rows but for rounding, and a word from the lead alone."""
    train(small, "--train.output", tmp_path / "one", G2RPO_TEST_DISTURBANCE="- - -")
    for folder in ("", "samples", "scores", "checkpoints"):
        names = [sorted(p.name for p in (run / folder).iterdir()) for run in
                 (undisturbed, tmp_path / "one")]  # fmt: skip
        assert names[0] == names[1] and names[0]
    two, one = rows(undisturbed), rows(tmp_path / "one")
    assert [row["update"] for row in two] == list(range(7))
    for a, b in zip(two, one, strict=True):
        assert a.keys() - b.keys() <= {"seconds/waiting"} and b.keys() <= a.keys()
        for key in b:
            if "second" not in key and key != "peak_memory_bytes":
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
    said = undisturbed.parent / "said"
    assert "2 ranks, distributed.strategy replicate" in (said / "0.out").read_text()
    assert [(said / name).read_text() for name in ("0.err", "1.out", "1.err")] == [""] * 3


@pytest.mark.parametrize("bad", [1, 0])
def test_a_reward_that_raises_on_one_rank(small, tmp_path, bad):
    """Also on the lead, with which the board goes."""
    ranks = disturb(small, tmp_path / "run", bad, "raise")
    assert ranks.codes(30) == [1, 1], ranks.said
    assert "ConnectionError: the judge has burnt down" in ranks.err(bad)
    why = f"rank {bad} on {HOST} failed in the phase 'rewards': the judge has burnt down"
    assert why in ranks.err(1 - bad) and "ConnectionError" not in ranks.err(1 - bad)
    assert final_weights(tmp_path / "run", 2)


def test_a_stop_of_both_ranks(small, tmp_path, undisturbed):
    """SIGTERM to both, twice, as torchrun and a cluster may send it: one checkpoint, 143."""
    ranks = disturb(small, tmp_path / "run", 0, "slow")
    ranks.wait_for(tmp_path / "run" / SECOND)
    ranks.send(signal.SIGTERM)
    ranks.send(signal.SIGTERM)
    assert ranks.codes() == [143, 143], ranks.said
    done = rows(tmp_path / "run")[-1]["update"]
    assert f"Stopped after update {done}. Go on with: g2rpo train --resume" in ranks.out(0)
    assert (tmp_path / "run" / f"checkpoints/step-{done:06d}/manifest.json").exists()
    assert ranks.out(1) == ranks.err(1) == "" and done < 6
    assert_goes_on(tmp_path / "run", undisturbed, done)


@slow
@pytest.mark.parametrize("number, rank", [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_a_stop_of_one_rank_stops_both(small, tmp_path, undisturbed, number, rank):
    ranks = disturb(small, tmp_path / "run", 0, "slow")
    ranks.wait_for(tmp_path / "run" / SECOND)
    ranks.send(number, rank)
    codes = ranks.codes()
    assert codes[rank] == 128 + number and codes[1 - rank] == 143, ranks.said
    done = rows(tmp_path / "run")[-1]["update"]
    assert (tmp_path / "run" / f"checkpoints/step-{done:06d}/manifest.json").exists() and done < 6
    assert_goes_on(tmp_path / "run", undisturbed, done)


@slow
@pytest.mark.parametrize("bad", [1, 0])
def test_kill_9_of_one_rank(small, tmp_path, undisturbed, bad):
    """In the middle of an update: the other ends long before the timeout of 30 minutes."""
    ranks = disturb(small, tmp_path / "run", bad, "stall")
    ranks.wait_for(tmp_path / "run" / f"{SECOND}.reached")
    time.sleep(1.5)  # the other has seen where it is
    ranks.send(signal.SIGKILL, bad)
    began = time.monotonic()
    codes = ranks.codes()
    seconds = time.monotonic() - began
    print(f"\n  rank {bad} killed: the other has ended after {seconds:.1f} s")
    assert codes[bad] == -signal.SIGKILL and codes[1 - bad] == 1 and seconds < 15, ranks.said
    assert f"rank {bad} on {HOST}, since " in ranks.err(1 - bad)
    assert "s in 'rewards'" in ranks.err(1 - bad)
    assert "has ended or cannot be reached" in ranks.err(1 - bad)
    (tmp_path / "run" / f"{SECOND}.reached").unlink()
    assert_goes_on(tmp_path / "run", undisturbed)


@slow
@pytest.mark.parametrize("bad", [1, 0])
def test_a_reward_that_outlasts_the_timeout(small, tmp_path, bad):
    """The one that waits says for whom; the one that stalls is ended by its watch."""
    began = time.monotonic()
    ranks = disturb(
        small, tmp_path / "run", bad, "stall", "--distributed.timeout", 3, grace=3.0
    )
    assert ranks.codes(45) == [1, 1], ranks.said
    print(f"\n  rank {bad} stalled: both have ended after {time.monotonic() - began:.1f} s")
    late = "s in 'rewards', did not come within 3 s (distributed.timeout)"
    for rank in (0, 1):
        assert f"rank {bad} on {HOST}, since " in ranks.err(rank) and late in ranks.err(rank)
    assert f"rank {1 - bad} on {HOST} waited in vain in the phase 'waiting'" in ranks.err(1 - bad)
    assert f"rank {bad} on {HOST} ends in the phase 'rewards'" in ranks.err(bad)


@slow
@pytest.mark.parametrize("bad", [1, 0])
def test_a_frozen_rank(small, tmp_path, bad):
    """SIGSTOP: its connections stay open, and where it is the lead, the board is silent."""
    ranks = disturb(small, tmp_path / "run", bad, "stall", "--distributed.timeout", 8)
    ranks.wait_for(tmp_path / "run" / f"{SECOND}.reached")
    time.sleep(1.5)
    ranks.send(signal.SIGSTOP, bad)
    began = time.monotonic()
    ranks.processes[1 - bad].join(50)
    seconds = time.monotonic() - began
    codes = ranks.codes(0.1)  # kills the frozen one
    print(f"\n  rank {bad} frozen: the other has ended after {seconds:.1f} s")
    assert codes[1 - bad] == 1 and codes[bad] is None and seconds < 45, ranks.said
    assert f"rank {bad} on {HOST}, since " in ranks.err(1 - bad)
    assert "s in 'rewards'" in ranks.err(1 - bad)


@pytest.mark.parametrize("keys, said", [
    (["--train.nonsense", "3"], "unrecognized arguments: --train.nonsense"),
    (["--train.updates", "0"], "train.updates is 0"),
    (["--rewards", '[{"name": "rank_commands:nothing"}]'], "rank_commands:nothing"),
])  # fmt: skip
def test_what_all_ranks_find_wrong_is_said_once(small, tmp_path, keys, said):
    ranks = Commands(tmp_path / "said", small, "--train.output", tmp_path / "run", *keys)
    assert ranks.codes(30) == [2, 2], ranks.said
    assert ranks.said.count(said) == 1 and "Traceback" not in ranks.said, ranks.said
    assert not (tmp_path / "run").exists()


# Within this process ----------------------------------------------------------------------------


def watches() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "g2rpo-watch"]


def alone(port: int) -> dict[str, str]:
    return {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_one_launched_process(small, tmp_path):
    """RANK 0 of a WORLD_SIZE of 1 is a run like any other, and its watch ends with it."""
    done = train(
        small, "--train.output", tmp_path / "run", "--train.updates", 1,
        G2RPO_TEST_DISTURBANCE="- - -", **alone(free_port()),
    )  # fmt: skip
    assert [row["update"] for row in rows(tmp_path / "run")] == [0, 1] and not done.stderr
    assert not watches()


def test_a_port_that_is_taken(small, tmp_path):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        done = train(small, "--train.output", tmp_path / "run", code=1, **alone(port))
    assert f"rank 0 of 1 could not meet the others at 127.0.0.1:{port}" in done.stderr
    assert "expected a port that is free" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("variables, said", [
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2; expected a smaller RANK"),
    ({"RANK": "one"}, "RANK is 'one' in the environment; expected a number"),
])  # fmt: skip
def test_variables_that_make_no_sense(small, tmp_path, variables, said):
    told = {**alone(29500), **variables}
    assert said in train(small, "--train.output", tmp_path / "run", code=2, **told).stderr


def test_variables_that_are_missing(small, tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    told = {name: value for name, value in alone(1).items() if name != "MASTER_PORT"}
    done = train(small, "--train.output", tmp_path / "run", code=2, **told)
    assert "RANK and WORLD_SIZE are set and MASTER_PORT are not" in done.stderr


def test_restarts_need_a_directory(small):
    done = train(small, code=2, TORCHELASTIC_MAX_RESTARTS="1")
    assert "train.output is null, and torchrun may restart this run" in done.stderr


def test_a_thread_of_a_run_that_fails_ends_with_it(monkeypatch):
    for name, value in alone(free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ZeroDivisionError), joined(30.0, "cpu") as ranks:
        assert watches() and ranks.gather(3) == [3] and ranks.lead
        raise ZeroDivisionError
    assert not watches()
    import torch.distributed as dist

    dist.destroy_process_group()  # a process that fails ends, and leaves that to its end


def test_a_store_that_remembers_another_start():
    """Tokens, names and a failure of before are there: the new ranks meet all the same."""
    store = HashStore()
    for rank in (1, 2):
        store.set(f"g2rpo/here/{rank}", "of before")
    store.set("g2rpo/answer/of before", "the former meeting")
    PrefixStore("g2rpo/the former meeting/board", store).set("failed", json.dumps({}))
    names: list[str] = []
    late = threading.Timer(0.2, lambda: names.append(_ask(store, 2, 10.0)))
    others = [threading.Thread(target=lambda: names.append(_ask(store, 1, 10.0))), late]
    for thread in others:
        thread.start()
    names.append(_answer(store, 3, 10.0))
    for thread in others:
        thread.join(10)
    assert len(names) == 3 and len(set(names)) == 1 and names[0] != "the former meeting"


def test_a_rank_that_never_comes_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "here")
    monkeypatch.setenv("MASTER_PORT", "1")
    told = "rank 1 and 1 more of 3 did not come to here:1 within 0.1 s"
    with pytest.raises(TrainingError, match=re.escape(told)):
        _answer(HashStore(), 3, 0.1)


def test_a_launch_knows_its_runs(tmp_path, monkeypatch):
    """By their place, however it is written; a process that torchrun has not started, none."""
    launch = Launch(HashStore())
    launch.note(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert launch.noted(Path("run")) and not launch.noted(Path("other"))
    nobody = Launch(None)
    nobody.note(tmp_path / "run")
    assert not nobody.noted(tmp_path / "run") and not meeting.of_torchrun()


def test_who_goes_silent_is_told_to_all_by_its_neighbour(monkeypatch):
    """Of five ranks the third stops: the second listens to it, the fifth hears of it."""
    monkeypatch.setattr(watch, "PERIOD", 0.02)
    monkeypatch.setattr(watch, "SILENCE", 0.3)
    store, all_ranks = HashStore(), range(5)
    ranks = [Watch(store, rank, 5, f"node{rank}", 5.0) for rank in all_ranks]
    heard = [rank._neighbours for rank in ranks]
    assert set.union(*heard) == set(all_ranks) and max(map(len, heard)) <= 2
    for rank in ranks:
        rank.post("anchor")
    time.sleep(0.2)
    ranks[2]._ending.set()
    ranks[2]._thread.join()
    store.set("beat/2", "7")  # no farewell
    end = time.monotonic() + 5
    while not ranks[4]._seen_failure and time.monotonic() < end:
        time.sleep(0.02)
    why = ranks[4].why_in_vain(RuntimeError())
    assert re.fullmatch(r"rank 2 on node2, since \d s in 'anchor', has gone silent", why)
    for rank in ranks:
        rank.close()


def test_a_board_that_never_answers(monkeypatch):
    """A machine that froze keeps its connections: questions end all the same, and say so."""
    store, frozen = HashStore(), threading.Event()
    monkeypatch.setattr(watch, "PERIOD", 0.05)
    monkeypatch.setattr(watch, "ANSWER", 0.2)

    class Frozen:
        """Answers until it is frozen."""

        def check(self, keys):
            if frozen.is_set():
                time.sleep(3)
            return store.check(keys)

        def __getattr__(self, name):
            return getattr(store, name)

        def clone(self):
            return self

    lead = {"phase": "anchor", "host": "there", "since": time.time(), "waiting": False}
    store.set("place/0", json.dumps(lead))
    mine = Watch(Frozen(), 1, 2, "here", 5.0)
    time.sleep(0.3)  # the thread has looked
    frozen.set()
    began = time.monotonic()
    why = mine.why_in_vain(RuntimeError("timed out"))
    last = r"rank 0 on there, since \d s in 'anchor' when last seen, has ended or cannot be reached"
    assert re.fullmatch(last, why), why
    assert not mine.post_failure("anything") and time.monotonic() - began < 1.5
    mine.close()
