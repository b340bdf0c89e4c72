"""`g2rpo` as a process of its own, on the tiny model: python tiny_cli.py train ..."""

import os
import sys
import time

from tiny import TinyModel, brightness, contrast

import g2rpo.run
from g2rpo import cli


def slow_brightness(images, prompts):
    """brightness, at a pace that a test can interrupt."""
    time.sleep(0.05)
    return brightness(images, prompts)


calls = []


def fragile_contrast(images, prompts):
    """contrast, by a judge that is gone at its evaluation number $FAILS_AT, counted from 1."""
    calls.append(len(images))
    if len(calls) == int(os.environ.get("FAILS_AT", 0)):
        raise ConnectionError("the judge does not answer")
    return contrast(images, prompts)


def load_tiny_model(config, **callbacks):
    return TinyModel()


if __name__ == "__main__":
    g2rpo.run.load_model = load_tiny_model
    sys.exit(cli.main(sys.argv[1:]))
