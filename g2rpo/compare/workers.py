"""Runs side by side, each worker a process that makes one after the other.

A worker imports torch and fits the judges once, which is much of the time of a small run. It is in
a process group of its own, so that Ctrl-C reaches the parent alone, which then asks each worker
once to stop: a run that is training ends with a checkpoint, and the same command goes on from it.
Should the parent be killed instead, each worker asks itself.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from .. import hacking
from ..config import Config
from ..errors import TrainingError
from ..metrics import MetricsLog
from .methods import Run

LOG = "train.log"  # what a run has printed, beside its directory's files
LOG_END = 2000  # characters of it that an error shows


def is_done(run: Run) -> bool:
    """Whether its last update has been made and evaluated, or train.hacking_stop has ended it."""
    log = run.directory / "metrics.jsonl"
    rows = MetricsLog(log).rows() if log.is_file() else []
    if not rows or "seconds/evaluation" not in rows[-1]:
        return False
    train = run.config.train
    ended = 0 < train.hacking_stop <= hacking.in_a_row(rows)
    return ended or rows[-1]["update"] == train.updates


def train_all(runs: Sequence[Run], jobs: int, on_done: Callable[[Run, float], None]) -> None:
    """Make all runs, `jobs` at a time; those that are there already are gone on with.

    on_done(run, seconds): after each. Raises TrainingError when one fails, with the end of its
    log, and KeyboardInterrupt on Ctrl-C or SIGTERM; the runs that were under way then have a
    checkpoint each, as far as they had made an update.
    """
    waiting = list(reversed(runs))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    workers: list[_Worker] = []
    try:
        with _sigterm_as_interrupt():
            for _ in range(min(jobs, len(runs))):
                workers.append(_Worker(threads))
                workers[-1].begin(waiting.pop())
            while busy := {worker.connection: worker for worker in workers if worker.run}:
                for ready in connection.wait(list(busy)):
                    worker = busy[ready]
                    run, seconds = worker.finish()
                    on_done(run, seconds)
                    if waiting:
                        worker.begin(waiting.pop())
    except KeyboardInterrupt:
        print(
            "Stopping: runs under way end with a checkpoint, and the same command goes on.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        raise
    finally:
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.process.join()


class _Worker:
    def __init__(self, threads: int) -> None:
        context = get_context("spawn")  # torch's threads do not survive a fork
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, threads), daemon=False)
        with _without_interrupts():  # until it has a process group of its own
            self.process.start()
        other.close()  # so that the death of the worker is the end of the pipe
        self.run: Run | None = None

    def begin(self, run: Run) -> None:
        self.run, self.began = run, time.monotonic()
        try:
            self.connection.send((run.config, run.directory))
        except OSError:
            pass  # it has died since its last run: `finish` says so

    def finish(self) -> tuple[Run, float]:
        """What has ended. Raises TrainingError where it failed."""
        run, self.run = self.run, None
        assert run is not None
        try:
            fault = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            fault = _how_it_ended(self.process.exitcode)
        if fault:
            log = run.directory / LOG
            end = log.read_text(errors="replace")[-LOG_END:].strip() if log.is_file() else ""
            raise TrainingError(f"the run {run.name} failed: {fault}\nThe end of {log}:\n{end}")
        return run, time.monotonic() - self.began

    def stop(self) -> None:
        """An idle worker ends; one that trains stops with a checkpoint first."""
        if self.run is not None and self.process.is_alive():
            self.process.terminate()
        self.connection.close()


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _work(parent: Connection, threads: int) -> None:
    os.setpgrp()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    while True:
        try:
            config, directory = parent.recv()
        except EOFError:
            return
        try:
            fault = _train(config, directory, threads)
        except Exception as error:  # told to the person by the parent
            fault = f"{type(error).__name__}: {error}"
        try:
            parent.send(fault)
        except OSError:  # the parent has stopped listening: Ctrl-C
            return


def _stop_with_parent() -> None:
    """A killed parent can ask for nothing, and a run that goes on alone would be in the way of the
    same command."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _train(config: Config, directory: Path, threads: int) -> str:
    """Begin a run or go on with it, what it prints in its log. Returns "" or what went wrong."""
    import torch

    from .. import run
    from ..models import choose_device

    # On a CPU the last bits depend on the number of threads, and a comparison's must not depend on
    # how many runs it makes at a time.
    on_cpu = choose_device(config.model.device).type == "cpu"
    torch.set_num_threads(1 if on_cpu else threads)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOG).open("a", encoding="utf-8", buffering=1) as log:  # line by line
        with redirect_stdout(log), redirect_stderr(log):
            try:
                if run.holds_run(directory):
                    code = run.resume(config, directory)
                else:
                    code = run.start(config, directory, overwrite=False)
            except Exception:
                traceback.print_exc()
                raise
    return "" if code == 0 else f"exit code {code}"


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C does nothing, here and in processes that start here, until they say otherwise."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
