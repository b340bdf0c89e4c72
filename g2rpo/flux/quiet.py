"""diffusers and transformers without the bars and notices that say nothing of this run."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

# What the libraries say of every FLUX: nothing here needs torchvision, CLIP reads 77 tokens of a
# prompt by design, and which weights were found is checked and told by their loaders here.
USUAL = (
    "requires torchvision", "was truncated because", "Token indices sequence length",
    "No LoRA keys associated to CLIPTextModel", "LOAD REPORT",
    "Attention backends are an experimental feature",
)  # fmt: skip


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without the loading bars of the libraries, and without what is USUAL. names: default both."""
    names = names or ("diffusers", "transformers")
    theirs = [importlib.import_module(f"{name}.utils.logging") for name in names]

    def unusual(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in USUAL)

    bars = [library for library in theirs if library.is_progress_bar_enabled()]
    handlers = [handler for name in names for handler in logging.getLogger(name).handlers]
    for library in bars:
        library.disable_progress_bar()
    for handler in handlers:
        handler.addFilter(unusual)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(unusual)
        for library in bars:
            library.enable_progress_bar()
