"""Where ranks find one another: a store that may still hold what others before them have said.

torchrun keeps its store over restarts, and of several nodes only those whose own ranks have failed
count one. So neither a key nor a counter tells this start from the one before; an answer to a
token that nobody has had before does.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store

from ..errors import ConfigurationError, TrainingError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOOK = 0.02  # seconds between two looks at who has come


class Launch:
    """What outlasts a restart of the ranks: the store of torchrun, if that has started them."""

    def __init__(self, store: Store | None) -> None:
        self._store = store

    def note(self, run_dir: Path) -> None:
        """A run of this launch begins there."""
        if self._store is not None:
            self._store.set(self._key(run_dir), "1")

    def noted(self, run_dir: Path) -> bool:
        """Whether one has, before a restart."""
        return self._store is not None and self._store.check([self._key(run_dir)])

    @staticmethod
    def _key(run_dir: Path) -> str:
        return f"g2rpo/begun/{run_dir.resolve()}"


def of_torchrun() -> bool:
    """Whether torchrun holds the store; else rank 0 does, and it ends with that."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def told_by_environment() -> tuple[int, int]:
    """RANK and WORLD_SIZE. Raises ConfigurationError where they or those beside them make no
    sense."""
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise ConfigurationError(
            f"RANK and WORLD_SIZE are set and {', '.join(missing)} are not; expected all that "
            "torchrun sets, or none of them"
        )
    told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    for name, text in told.items():
        if not text.isdecimal():
            raise ConfigurationError(f"{name} is {text!r} in the environment; expected a number")
    rank, count = int(told["RANK"]), int(told["WORLD_SIZE"])
    if rank >= count:
        raise ConfigurationError(f"RANK is {rank} and WORLD_SIZE {count}; expected a smaller RANK")
    return rank, count


def come_together(timeout: float) -> tuple[Store, int, int, Launch]:
    """A store that only the ranks of this start write to, RANK, WORLD_SIZE, and the launch.

    timeout: seconds to wait for the others. Raises ConfigurationError for the environment, else
    TrainingError, which names the address and who did not come.
    """
    rank, count = told_by_environment()
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        name = _answer(store, count, timeout) if rank == 0 else _ask(store, rank, timeout)
    except dist.DistError as error:
        expected = "a port that is free" if rank == 0 else "rank 0 there"
        if of_torchrun():
            expected = "torchrun's store there"
        raise TrainingError(
            f"rank {rank} of {count} could not meet the others at {place} (MASTER_ADDR, "
            f"MASTER_PORT) within {timeout:g} s (distributed.timeout): "
            f"{str(error).strip().splitlines()[0]}; expected {expected}"
        ) from error
    launch = Launch(store if of_torchrun() else None)
    return PrefixStore(f"g2rpo/{name}", store), rank, count, launch


def _ask(store: Store, rank: int, timeout: float) -> str:
    """The name of this meeting, from the lead."""
    token = uuid.uuid4().hex
    store.set(f"g2rpo/here/{rank}", token)
    store.wait([f"g2rpo/answer/{token}"], timedelta(seconds=timeout))
    name = store.get(f"g2rpo/answer/{token}").decode()
    store.set(f"g2rpo/{name}/came/{rank}", "1")
    return name


def _answer(store: Store, count: int, timeout: float) -> str:
    """Name this meeting and tell all others, of whom an old token may lie where a new one will."""
    name, end = uuid.uuid4().hex, time.monotonic() + timeout
    missing = list(range(1, count))
    while missing:
        for rank in missing:
            if store.check([f"g2rpo/here/{rank}"]):
                store.set(f"g2rpo/answer/{store.get(f'g2rpo/here/{rank}').decode()}", name)
        missing = [rank for rank in missing if not store.check([f"g2rpo/{name}/came/{rank}"])]
        if missing and time.monotonic() > end:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise TrainingError(
                f"rank {missing[0]}{more} of {count} did not come to {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} within {timeout:g} s (distributed.timeout)"
            )
        if missing:
            time.sleep(LOOK)
    return name
