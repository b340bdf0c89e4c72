"""`g2rpo train` on the tiny model as the ranks of one run, and rewards that disturb it.

Real processes, each with its own standard streams, exit code and signals, as whoever sets RANK by
hand starts them; forked from a server that has imported what takes each of them seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from ranks import IMPORTS, VARIABLES, free_port
from test_run import SMALL
from tiny import brightness

from g2rpo import cli, run
from g2rpo.distributed import watch

DISTURBANCE = "G2RPO_TEST_DISTURBANCE"  # RANK KIND FILE, see `disturbed`


def disturbed(images, prompts):
    """brightness, but on one rank, once FILE is there: `raise`, or `stall` for a minute, having
    made FILE.reached; `slow`: always, by a twentieth of a second, on all ranks."""
    rank, kind, file = os.environ[DISTURBANCE].split(" ", 2)
    if kind == "slow":
        time.sleep(0.05)
    elif rank == os.environ.get("RANK") and Path(file).exists():
        reached = Path(f"{file}.reached")
        if kind == "raise":
            raise ConnectionError("the judge has burnt down")
        if kind == "stall" and not reached.exists():
            reached.touch()
            time.sleep(60)
    return brightness(images, prompts)


def write_small(folder: Path) -> Path:
    """A YAML file of a run of six updates, whose trained reward can be disturbed."""
    folder.mkdir(exist_ok=True)
    trained = {"name": "rank_commands:disturbed", "label": "brightness"}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"rewards": [trained, *SMALL["rewards"][1:]]}))
    return path


class Commands:
    """`count` ranks of `g2rpo train ARGUMENTS`. disturb: RANK KIND FILE. variables: more of the
    environment. grace: seconds that a rank has to end by itself, once another has failed."""

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        count: int = 2,
        disturb: str = "- - -",
        grace: float = 10.0,
        **variables: str,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*IMPORTS, "g2rpo.run", "g2rpo.cli"])
        folder.mkdir(exist_ok=True)
        self.folder, self.processes, port = folder, [], free_port()
        for rank in range(count):
            told = (rank, count, rank, count, "127.0.0.1", port)
            environment = dict(zip(VARIABLES, map(str, told))) | {DISTURBANCE: disturb}
            given = ([*map(str, arguments)], environment | variables, folder, rank, grace)
            self.processes.append(context.Process(target=_work, args=given, daemon=True))
        for process in self.processes:
            process.start()

    def wait_for(self, path: Path, seconds: float = 90.0) -> None:
        """Until the file is there. Raises AssertionError where a rank has ended before."""
        end = time.monotonic() + seconds
        while not path.exists():
            assert all(process.is_alive() for process in self.processes), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.01)

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def codes(self, seconds: float = 60.0) -> list[int | None]:
        """Exit codes, minus a signal's number where that has killed; those that are still there
        after this time are killed, and have None."""
        end, found = time.monotonic() + seconds, []
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.01))
            found.append(process.exitcode)
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
        return found

    def out(self, rank: int) -> str:
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text()

    @property
    def said(self) -> str:
        files = sorted(self.folder.glob("[0-9].*"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)


def _work(
    arguments: list[str], variables: dict[str, str], folder: Path, rank: int, grace: float
) -> None:
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(variables)
    torch.set_num_threads(1)
    watch.GRACE = grace
    run.load_model = _load_tiny_model
    code = cli.main(["train", *arguments])
    sys.stdout.flush()
    sys.exit(code)


def _load_tiny_model(config: Any, **callbacks: Any) -> Any:
    import tiny_cli

    return tiny_cli.load_tiny_model(config)
