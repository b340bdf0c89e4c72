"""The phases of an update: named to whoever watches, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class Phases:
    """`with phases("anchor"): ...` adds the block's seconds to phases.seconds["anchor"].

    on_phase(name): called as a phase begins. name: the newest one, also after its end.
    """

    def __init__(self, device: torch.device, on_phase: Callable[[str], None]) -> None:
        self.device, self.on_phase = device, on_phase
        self.name = ""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.name = name
        self.on_phase(name)
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
