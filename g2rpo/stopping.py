"""How a person, or a cluster's manager, ends a run before its time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .tracking import Display, Quiet


class StopRequest:
    """Ctrl-C and SIGTERM ask the run to stop at the next safe point; a second Ctrl-C insists. A
    second SIGTERM does not: a cluster's manager and torchrun may each send one."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal is not None else 0

    @contextmanager
    def listening(self, display: Display | Quiet) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread only
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                return
            self.signal = number
            if isinstance(display, Display):  # all ranks may have been sent it
                how = "once more" if number == signal.SIGINT else "Ctrl-C"
                display.message(f"Stopping with a checkpoint; {how} to stop at once.")

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
