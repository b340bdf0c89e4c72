"""diffusers and transformers without the bars and notices that say nothing of this run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# What the libraries say of every FLUX: nothing here needs torchvision, and CLIP reads 77 tokens of
# a prompt by design. (`g2rpo sample` says itself which prompts are too long for T5.)
USUAL = (
    "requires torchvision", "was truncated because", "Token indices sequence length",
    "No LoRA keys associated to CLIPTextModel",
)  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loading bars of diffusers and transformers, and without what is USUAL."""
    import diffusers.utils.logging as diffusers
    import transformers.utils.logging as transformers

    def unusual(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in USUAL)

    bars = [library for library in (diffusers, transformers) if library.is_progress_bar_enabled()]
    names = ("diffusers", "transformers")
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
