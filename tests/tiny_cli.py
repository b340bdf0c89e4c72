"""`g2rpo` as a process of its own, on the tiny model: python tiny_cli.py train ..."""

import sys
import time

from tiny import TinyModel, brightness

import g2rpo.run
from g2rpo import cli


def slow_brightness(images, prompts):
    """brightness, at a pace that a test can interrupt."""
    time.sleep(0.05)
    return brightness(images, prompts)


if __name__ == "__main__":
    g2rpo.run.load_model = lambda config, on_step=None: TinyModel()
    sys.exit(cli.main(sys.argv[1:]))
