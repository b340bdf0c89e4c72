"""One process at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ConfigurationError


@contextmanager
def alone(folder: Path, taken: str) -> Iterator[None]:
    """Holds folder/.lock, a lock of the system's, which a killed process does not leave behind.

    taken: what to say, as a ConfigurationError, when another process holds it.
    """
    from filelock import FileLock, Timeout  # wanted only here

    try:
        held = FileLock(folder / ".lock").acquire(blocking=False)
    except Timeout as error:
        raise ConfigurationError(taken) from error
    with held:
        yield
