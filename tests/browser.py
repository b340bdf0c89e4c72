"""Pages in a real browser: headless Chromium, without a driver package and without a network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage"
    " --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars"
).split()
NOBODY = "--host-resolver-rules=MAP * ~NOTFOUND"  # whatever a page asks for, it gets nothing
SECONDS = 60


def find_chromium() -> str | None:
    """The environment's CHROMIUM, or the first of NAMES on the PATH."""
    named = os.environ.get("CHROMIUM")
    if named:
        if shutil.which(named) is None:
            raise RuntimeError(f"CHROMIUM is {named!r}; expected a program, or no such variable")
        return named
    return next((found for found in map(shutil.which, NAMES) if found), None)


needs_chromium = pytest.mark.skipif(
    find_chromium() is None,
    reason="no Chromium: apt-get install chromium, or name one in CHROMIUM",
)


def dump_dom(page: Path) -> str:
    """The page's HTML after the browser has read it."""
    return _run(page, "--dump-dom")


def screenshot(
    page: Path, picture: Path, width: int = 1200, height: int = 1600, dark: bool = False
) -> np.ndarray:  # uint8 [height, width, 3]
    """The window's pixels, from the page's beginning, also written as a PNG."""
    picture.unlink(missing_ok=True)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _run(page, scheme, f"--screenshot={picture}", f"--window-size={width},{height}")
    with Image.open(picture) as opened:
        return np.asarray(opened.convert("RGB"))


def _run(page: Path, *options: str) -> str:
    # Its helpers may still be writing into the profile when it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [find_chromium(), *FLAGS, NOBODY, f"--user-data-dir={profile}", *options]
        process = subprocess.Popen(
            [*command, page.resolve().as_uri()],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
            start_new_session=True,
        )  # fmt: skip
        try:
            output, errors = process.communicate(timeout=SECONDS)
        except BaseException:  # also an interrupt: a browser is a family of processes
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
    assert process.returncode == 0, errors
    return output
