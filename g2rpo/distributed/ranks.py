"""The processes of a run: who they are, and what they tell one another.

torchrun says it in environment variables (RANK, WORLD_SIZE, LOCAL_RANK, ...). A process that was
not launched is a run of its own, `ALONE`, for which every method here returns at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import TrainingError
from .meeting import Launch, come_together, of_torchrun
from .watch import Watch

T = TypeVar("T")
NO_LAUNCH = Launch(None)


class LostRank(TrainingError):
    """Another rank has failed, or did not come; `why` says which, where and in what phase."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class Ranks:
    """`rank` of `count` processes, `per_node` of them on this machine.

    watch: None for a process alone. launch: what torchrun remembers when it starts the ranks again.
    Every method is to be called by all ranks, in the same order.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        per_node: int = 1,
        watch: Watch | None = None,
        launch: Launch = NO_LAUNCH,
    ) -> None:
        self.rank, self.count, self.per_node, self.watch = rank, count, per_node, watch
        self.launch = launch
        self.told = False  # whether another rank has told of this rank's failure in the same words

    @property
    def lead(self) -> bool:
        """Whether this is the rank that writes and shows."""
        return self.rank == 0

    def part(self, values: Sequence[T]) -> Sequence[T]:
        """This rank's of values that all know: as many in a row as every other's."""
        each = len(values) // self.count
        return values[self.rank * each : (self.rank + 1) * each]

    def phase(self, name: str) -> None:
        """Says where this rank is."""
        if self.watch is not None:
            self.watch.post(name)

    def gather(self, value: T) -> list[T]:
        """What every rank gives, in their order. Tensors must be on the CPU."""
        if self.watch is None:
            return [value]
        found: list[Any] = [None] * self.count
        with self._waiting():
            dist.all_gather_object(found, value)
        return found

    def gather_rows(self, rows: Tensor, dim: int = 0) -> Tensor:
        """The rows of all ranks, one after the other, where rows is."""
        if self.watch is None:
            return rows
        return torch.cat(self.gather(rows.cpu()), dim).to(rows.device)

    def rows_to_lead(self, rows: Tensor) -> Tensor | None:  # [M, ...] -> [count * M, ...]
        """The same, of equally many each, on the CPU and for the lead alone; None for others."""
        if self.watch is None:
            return rows
        mine = rows.cpu().contiguous()
        found = [torch.empty_like(mine) for _ in range(self.count)] if self.lead else None
        with self._waiting():
            dist.gather(mine, found, dst=0)
        return torch.cat(found) if found is not None else None

    def from_lead(self, value: T) -> T:
        """What the lead gives."""
        if self.watch is None:
            return value
        box = [value]
        with self._waiting():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether it is true of one of them."""
        if self.watch is None:
            return flag
        found = torch.tensor(int(flag))
        with self._waiting():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def meet(self) -> None:
        """Wait for all."""
        self.any(False)

    def sum_(self, values: Tensor) -> None:
        """Add up what every rank has, in place, on any device."""
        if self.watch is not None:
            with self._waiting():
                dist.all_reduce(values)

    def all_rows(self, rows: Tensor) -> Tensor:  # [M, n] -> [count * M, n]
        """The rows of all ranks, of equally many each, on their device."""
        found = [torch.empty_like(rows) for _ in range(self.count)]
        with self._waiting():
            dist.all_gather(found, rows)
        return torch.cat(found)

    # Stopping -----------------------------------------------------------------------------------

    def ask_to_stop(self) -> None:
        """Have all ranks see `asked_to_stop`, within a second or two."""
        if self.watch is not None:
            self.watch.ask_to_stop()

    @property
    def asked_to_stop(self) -> bool:
        return self.watch is not None and self.watch.asked_to_stop

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        phase = self.watch.phase
        self.watch.post(phase, waiting=True)
        try:
            yield
        except RuntimeError as error:  # a connection that was closed, or out of time
            raise self.lost(error) from error
        self.watch.post(phase)

    def lost(self, error: BaseException) -> LostRank:
        """What to raise where a collective has ended with this error."""
        watch = self.watch
        why = watch.why_in_vain(error)
        return LostRank(
            f"rank {self.rank} on {watch.host} waited in vain in the phase {watch.phase!r}: "
            f"{why}. The newest checkpoint is intact", why,
        )  # fmt: skip


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun, or whoever sets its variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined(timeout: float, device: str) -> Iterator[Ranks]:
    """Within the block this process is one of the ranks, or ALONE where it was not launched.

    timeout: seconds that any wait lasts. device: model.device. An error inside is told to the other
    ranks before it goes on. Raises ConfigurationError where the variables are not all there,
    TrainingError where the ranks do not come together.
    """
    if not launched():
        yield ALONE
        return
    ranks = _join(timeout, device)
    try:
        yield ranks
        ranks.meet()  # the board may go with the lead
    except LostRank as error:
        ranks.watch.post_failure(error.why, lost=True)
        raise
    except BaseException as error:
        if of_a_connection(error):  # in a collective of FSDP's, or at the board
            lost = ranks.lost(error)
            ranks.watch.post_failure(lost.why, lost=True)
            raise lost from error
        text = " ".join(str(error).split()) or type(error).__name__
        ranks.told = ranks.watch.post_failure(text)
        raise
    finally:
        ranks.watch.close()
    dist.destroy_process_group()


def of_a_connection(error: BaseException) -> bool:
    """Whether a collective has raised it, not the work of this rank."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def _join(timeout: float, device: str) -> Ranks:
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        from ..models import choose_device

        torch.cuda.set_device(choose_device(device))
    store, rank, count, launch = come_together(timeout)
    limit, backend = timedelta(seconds=timeout), "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
    except RuntimeError as error:
        raise TrainingError(
            f"rank {rank} on {socket.gethostname()} could not connect to the other ranks by "
            f"{backend}: {str(error).strip().splitlines()[0]}"
        ) from error
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    board, holds = dist.PrefixStore("board", store), rank == 0 and not of_torchrun()
    watch = Watch(board, rank, count, socket.gethostname(), timeout, holds)
    return Ranks(rank, count, per_node, watch, launch)
