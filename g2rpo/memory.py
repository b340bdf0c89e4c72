"""Memory: how much a run has needed, and what to do when a GPU's runs out."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import TrainingError

Result = TypeVar("Result")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of the process so far: allocated on the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def within_memory(work: Callable[[], Result], make_room: Callable[[str], None]) -> Result:
    """Do the work, again after make_room(reason) whenever the GPU's memory runs out."""
    while True:
        try:
            return work()
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
        # Here, not above: the exception's frames held the tensors that did not fit.
        make_room(reason)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def refuse(phase: str, reason: str) -> None:
    """Raise TrainingError: nothing can be made smaller."""
    raise TrainingError(
        f"out of memory in the phase {phase!r}, which no smaller batch could mend ({reason}); "
        "expected more GPU memory, model.gradient_checkpointing, optimizer.name adamw8bit, "
        "model.lora.rank > 0, model.dtype bfloat16 or smaller images"
    )
