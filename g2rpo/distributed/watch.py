"""Who of the ranks is where, on a board that all can read: the store they met at.

Every rank posts the phase it is in, and a heartbeat from a thread of its own; one that fails posts
why. So whoever waits in vain can say for whom, and nobody waits for a rank that has gone. The board
may be rank 0's: what is to be known when that has gone, too, the thread looks up beforehand.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch.distributed import Store

from .meeting import of_torchrun

T = TypeVar("T")
PERIOD = 1.0  # seconds between heartbeats
SILENCE = 60.0  # seconds without one after which a rank counts as gone
GRACE = 10.0  # seconds for a rank to end by itself, once another has failed
ANSWER = 10.0  # seconds for the board to answer, of a machine that may have frozen


class Watch:
    """One rank's place on the board, and its look at the others'.

    store: its clone is used by the thread. timeout: distributed.timeout, for messages. holds:
    whether the board goes with this rank.
    """

    def __init__(
        self, store: Store, rank: int, count: int, host: str, timeout: float, holds: bool = False
    ) -> None:
        self.rank, self.count, self.host, self.timeout = rank, count, host, timeout
        self._holds, self._has_posted, self._silent_board = holds, False, False
        self._seen_failure: dict[str, Any] = {}  # what the thread has seen, for when
        self._seen_lead: dict[str, Any] = {}  # the board has gone
        self._store, self._threads_store = store, store.clone()
        self._lock = threading.Lock()  # of _store
        self._beats: dict[int, tuple[bytes, float]] = {}  # last beat, and when it was new
        # Whom the thread listens to: with all of hundreds of ranks the board could not keep up.
        # Every rank is another's neighbour, and what one of them hears all are told.
        self._neighbours = {0, (rank + 1) % count} - {rank}
        self._ending, self._stop = threading.Event(), threading.Event()
        self.phase = "start"
        self.post("start")
        self._thread = threading.Thread(target=self._run, name="g2rpo-watch", daemon=True)
        self._thread.start()

    # What this rank says ------------------------------------------------------------------------

    def post(self, phase: str, waiting: bool = False) -> None:
        """The rank is in this phase now, at work or waiting for the others."""
        self.phase = phase
        if self._silent_board:
            return
        place = {"phase": phase, "host": self.host, "since": time.time(), "waiting": waiting}
        with self._lock:
            self._store.set(f"place/{self.rank}", json.dumps(place))

    def post_failure(self, text: str, lost: bool = False) -> bool:
        """The rank ends because of this. Of several that do, the first is kept; whether that one
        is another rank's and reads the same. lost: it is why this one has waited in vain."""
        mine = {
            "rank": self.rank, "host": self.host, "phase": self.phase, "text": text, "lost": lost,
        }  # fmt: skip
        try:
            kept = json.loads(
                self._asked(lambda: self._store.compare_set("failed", "", json.dumps(mine)))
            )
        except RuntimeError:  # whoever holds the board has ended: nobody is left to be told
            return False
        self._has_posted = True
        return kept["rank"] != self.rank and kept["text"] == text and not lost

    def ask_to_stop(self) -> None:
        """All ranks are to stop at the next point where they can."""
        if not self._stop.is_set():
            self._stop.set()
            with self._lock:
                self._store.set("stop", "1")

    @property
    def asked_to_stop(self) -> bool:
        return self._stop.is_set()

    def close(self) -> None:
        """The rank ends. Where the board ends with it, the others may read first why."""
        if self._holds and self._has_posted:
            self._wait_until_known()
        self._ending.set()
        self._thread.join(2 * PERIOD)  # it may be asking a board that never answers

    def _wait_until_known(self) -> None:
        """Until every other rank has seen a failure or ended; not for those that cannot."""
        end = time.monotonic() + 3 * PERIOD
        others = [rank for rank in range(self.count) if rank != self.rank]
        with self._lock:
            while others and time.monotonic() < end:
                gone = self._silent(self._store, others, 3 * PERIOD)
                others = [
                    r for r in others if r not in gone and not self._store.check([f"knows/{r}"])
                ]
                time.sleep(PERIOD / 20)

    # What it knows of the others ----------------------------------------------------------------

    def why_in_vain(self, error: BaseException) -> str:
        """Why waiting has ended without the others: who failed, who is gone, who is late."""
        try:
            if found := self._asked(self._who_is_missing, 4 * PERIOD):
                return found
        except RuntimeError:  # the board is rank 0's, or torchrun's, and that has ended
            if found := self._told(self._seen_failure):
                return found
            first = self._described(0, self._seen_lead, " when last seen")
            holder = "what started the ranks" if of_torchrun() else first
            return f"{holder} has ended or cannot be reached"
        return f"the ranks have lost one another: {str(error).strip().splitlines()[0]}"

    def _who_is_missing(self) -> str:
        everyone = range(self.count)
        for _ in range(int(4 / PERIOD)):  # a failure may be on its way, a heartbeat at its end
            if found := self._told(self._seen_failure or self._failure(self._store)):
                return found
            self._silent(self._store, everyone, SILENCE)  # from here on all are listened to
            time.sleep(PERIOD)
        gone = self._silent(self._store, everyone, 3 * PERIOD)
        places = {rank: self._place(self._store, rank) for rank in range(self.count)}
        late = [r for r, at in places.items() if r != self.rank and not at.get("waiting")]
        for kind, ranks in (("has ended or cannot be reached", gone),
                            (f"did not come within {self.timeout:g} s (distributed.timeout)",
                             late)):  # fmt: skip
            if ranks:
                return "; ".join(f"{self._described(r, places[r])} {kind}" for r in ranks)
        return ""

    def _asked(self, question: Callable[[], T], seconds: float = 0.0) -> T:
        """What the board answers within these seconds and ANSWER. Raises RuntimeError where it has
        gone or is silent; it is not asked again, then."""
        if self._silent_board:
            raise RuntimeError("the board does not answer")
        answers: list[T | RuntimeError] = []

        def ask() -> None:
            try:
                with self._lock:
                    answers.append(question())
            except RuntimeError as error:
                answers.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds + ANSWER)
        found = answers[0] if answers else RuntimeError("the board does not answer")
        if isinstance(found, RuntimeError):
            self._silent_board = True
            raise found
        return found

    @staticmethod
    def _failure(store: Store) -> dict[str, Any]:
        return json.loads(store.get("failed")) if store.check(["failed"]) else {}

    def _told(self, failure: dict[str, Any]) -> str:
        if not failure or failure["rank"] == self.rank and not failure["lost"]:
            return ""
        if failure["lost"]:
            return failure["text"]
        return (
            f"rank {failure['rank']} on {failure['host']} failed in the phase "
            f"{failure['phase']!r}: {failure['text']}"
        )

    @staticmethod
    def _place(store: Store, rank: int) -> dict[str, Any]:
        key = f"place/{rank}"
        return json.loads(store.get(key)) if store.check([key]) else {}

    @staticmethod
    def _described(rank: int, place: dict[str, Any], when: str = "") -> str:
        if not place:
            return f"rank {rank}, which never began,"
        seconds = max(time.time() - place["since"], 0.0)
        return f"rank {rank} on {place['host']}, since {seconds:.0f} s in {place['phase']!r}{when},"

    def _silent(self, store: Store, ranks: Iterable[int], seconds: float) -> list[int]:
        """Those of the other ranks whose heart has not been seen to beat for so long."""
        now, found = time.monotonic(), []
        for rank in ranks:
            key = f"beat/{rank}"
            if rank == self.rank or not store.check([key]):
                continue
            beat = store.get(key)
            last, since = self._beats.get(rank, (b"", now))
            if beat != last:
                since = now
            self._beats[rank] = beat, since
            if beat != b"end" and now - since > seconds:
                found.append(rank)
        return found

    # The thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        """Beat, and end a process that would wait for ever: a collective cannot be interrupted."""
        store, beats = self._threads_store, 0
        failed_since = None
        while not self._ending.wait(PERIOD):
            ended = self._silent_board
            try:
                if not ended:
                    beats += 1
                    store.set(f"beat/{self.rank}", str(beats))
                    ended = self._look(store)
            except RuntimeError:  # of the store: whoever holds it has ended
                ended = self._silent_board = True
            if not ended:
                failed_since = None
            elif failed_since is None:
                failed_since = time.monotonic()
            elif time.monotonic() - failed_since > GRACE:
                why = self.why_in_vain(RuntimeError("a rank has failed"))
                print(f"g2rpo: rank {self.rank} on {self.host} ends in the phase {self.phase!r}: "
                      f"{why}", file=sys.stderr, flush=True)  # fmt: skip
                os._exit(1)
        try:
            store.set(f"beat/{self.rank}", "end")
            store.set(f"knows/{self.rank}", "1")
        except RuntimeError:
            pass  # nobody is left to read it

    def _look(self, store: Store) -> bool:
        """Whether a rank has failed or is gone."""
        if store.check(["stop"]):
            self._stop.set()
        if not self._seen_failure and (failure := self._failure(store)):
            self._seen_failure = failure
            store.set(f"knows/{self.rank}", "1")
        if self.rank:
            self._seen_lead = self._place(store, 0)
        if gone := self._silent(store, self._neighbours, SILENCE):
            why = f"{self._described(gone[0], self._place(store, gone[0]))} has gone silent"
            mine = {"rank": self.rank, "host": self.host, "phase": self.phase, "text": why}
            store.compare_set("failed", "", json.dumps({**mine, "lost": True}))
        return bool(self._seen_failure) or bool(gone)
