"""`python -m g2rpo COMMAND ...`: the command line, also under launchers that take a module."""

import sys

from .cli import main

sys.exit(main())
