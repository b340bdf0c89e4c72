"""Processes that find what torchrun would have told them in their environment, for tests.

All ranks do the same cases, one after the other, within one `joined`; what each returns goes to
a file. They are forked from a server that has imported once what takes each of them six seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from g2rpo.distributed import Ranks, joined

IMPORTS = [
    "diffusers.models.transformers.transformer_flux", "diffusers.loaders.lora_pipeline", "peft",
    "torch.distributed.checkpoint", "torch.distributed.fsdp", "g2rpo.trainer", "g2rpo.checkpoint",
    "pytest",
]  # fmt: skip
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Case = Callable[[Ranks], Any]


class Started:
    """`count` ranks that are doing `cases`, or have; 0: a process alone, which was not launched.

    folder: for what they return, which `torch.save` can write. per_node: LOCAL_WORLD_SIZE.
    """

    def __init__(
        self, count: int, cases: Mapping[str, Case], folder: Path, per_node: int | None = None
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        port, self._processes = free_port(), []
        for rank in range(max(count, 1)):
            here = per_node or count
            told = (rank, count, rank % here, here, "127.0.0.1", port) if count else ()
            variables = dict(zip(VARIABLES, map(str, told)))
            given = (variables, dict(cases), folder, rank)
            self._processes.append(context.Process(target=_work, args=given, daemon=True))
        for process in self._processes:
            process.start()

    def wait(self, seconds: float = 240.0) -> Started:
        """Until all have ended; those that have not by then are killed."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(end - time.monotonic(), 0.1))
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
        return self

    def results(self, name: str) -> list[Any]:
        """What each rank has returned from a case. Raises AssertionError where one has not."""
        files = [self.folder / f"{name}.{rank}.pt" for rank in range(len(self._processes))]
        if not all(file.is_file() for file in files):
            raise AssertionError(f"{name}: {self.failures()}")
        return [torch.load(file, weights_only=False) for file in files]

    def failures(self) -> str:
        """What the ranks have raised, or how they have ended."""
        told = [file.read_text() for file in sorted(self.folder.glob("failed.*"))]
        return "\n".join(told) or f"no rank has raised; {_ends(self._processes)}"


def _ends(processes: Sequence[BaseProcess]) -> str:
    return f"exit codes {[process.exitcode for process in processes]}"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _work(variables: dict[str, str], cases: dict[str, Case], folder: Path, rank: int) -> None:
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    loopback = {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}
    if loopback:  # where the name of the machine cannot be resolved
        os.environ["GLOO_SOCKET_IFNAME"] = loopback.pop()
    torch.set_num_threads(1)
    try:
        with joined(120.0, "cpu") as ranks:
            for name, case in cases.items():
                partial = folder / f"{name}.{rank}.partial"
                torch.save(case(ranks), partial)
                partial.rename(folder / f"{name}.{rank}.pt")
    except BaseException:  # to be shown by the test; the other ranks end by themselves
        (folder / f"failed.{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None
