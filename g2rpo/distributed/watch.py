"""Who of the ranks is where, on a board that all can read: the store they met at.

Every rank posts the phase it is in, and a heartbeat from a thread of its own; one that fails posts
why. So whoever waits in vain can say for whom, and nobody waits for a rank that has gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

from torch.distributed import Store

PERIOD = 1.0  # seconds between heartbeats
SILENCE = 60.0  # seconds without one after which a rank counts as gone
GRACE = 10.0  # seconds for a rank to end by itself, once another has failed


class Watch:
    """One rank's place on the board, and its look at the others'.

    store: its clone is used by the thread. timeout: distributed.timeout, for messages.
    """

    def __init__(self, store: Store, rank: int, count: int, host: str, timeout: float) -> None:
        self.rank, self.count, self.host, self.timeout = rank, count, host, timeout
        self._store, self._threads_store = store, store.clone()
        self._lock = threading.Lock()  # of _store
        self._beats: dict[int, tuple[bytes, float]] = {}  # last beat, and when it was new
        self._ending, self._stop = threading.Event(), threading.Event()
        self.phase = "start"
        self.post("start")
        self._thread = threading.Thread(target=self._run, name="g2rpo-watch", daemon=True)
        self._thread.start()

    # What this rank says ------------------------------------------------------------------------

    def post(self, phase: str, waiting: bool = False) -> None:
        """The rank is in this phase now, at work or waiting for the others."""
        self.phase = phase
        place = {"phase": phase, "host": self.host, "since": time.time(), "waiting": waiting}
        with self._lock:
            self._store.set(f"place/{self.rank}", json.dumps(place))

    def post_failure(self, error: BaseException) -> bool:
        """The rank ends because of this. Of several that do, the first is kept; whether that one
        is another rank's and reads the same."""
        text = " ".join(str(error).split()) or type(error).__name__
        failure = {"rank": self.rank, "host": self.host, "phase": self.phase, "text": text}
        try:
            with self._lock:
                kept = json.loads(self._store.compare_set("failed", "", json.dumps(failure)))
        except RuntimeError:  # whoever holds the board has ended: nobody is left to be told
            return False
        return kept["rank"] != self.rank and kept["text"] == text

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
        self._ending.set()
        self._thread.join()

    # What it knows of the others ----------------------------------------------------------------

    def why_in_vain(self, error: BaseException) -> str:
        """Why waiting has ended without the others: who failed, who is gone, who is late."""
        found = ""
        try:
            for _ in range(int(4 / PERIOD)):  # a failure may be on its way, a heartbeat at its end
                if found := self._failure():
                    return found
                time.sleep(PERIOD)
            with self._lock:
                gone = self._silent(self._store, 3 * PERIOD)
                late = [r for r in range(self.count) if not self._place(r).get("waiting")]
            for kind, ranks in (("has ended or cannot be reached", gone),
                                (f"did not come within {self.timeout:g} s (distributed.timeout)",
                                 [r for r in late if r != self.rank])):  # fmt: skip
                if ranks:
                    return "; ".join(f"{self._where(r)} {kind}" for r in ranks)
        except RuntimeError:  # the board is rank 0's, or torchrun's, and that has ended
            return "rank 0, or what started the ranks, has ended or cannot be reached"
        return f"the ranks have lost one another: {str(error).strip().splitlines()[0]}"

    def _failure(self) -> str:
        with self._lock:
            if not self._store.check(["failed"]):
                return ""
            failure = json.loads(self._store.get("failed"))
        if failure["rank"] == self.rank:
            return ""
        return (
            f"rank {failure['rank']} on {failure['host']} failed in the phase "
            f"{failure['phase']!r}: {failure['text']}"
        )

    def _place(self, rank: int) -> dict[str, Any]:
        key = f"place/{rank}"
        return json.loads(self._store.get(key)) if self._store.check([key]) else {}

    def _where(self, rank: int) -> str:
        with self._lock:
            place = self._place(rank)
        if not place:
            return f"rank {rank}, which never began,"
        seconds = time.time() - place["since"]
        return f"rank {rank} on {place['host']}, since {seconds:.0f} s in {place['phase']!r},"

    def _silent(self, store: Store, seconds: float) -> list[int]:
        """Other ranks whose heart has not been seen to beat for so long."""
        now, found = time.monotonic(), []
        for rank in range(self.count):
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
            try:
                beats += 1
                store.set(f"beat/{self.rank}", str(beats))
                if store.check(["stop"]):
                    self._stop.set()
                ended = store.check(["failed"]) or bool(self._silent(store, SILENCE))
            except RuntimeError:  # of the store: whoever holds it has ended
                ended = True
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
        except RuntimeError:
            pass  # nobody is left to read it
