"""Imported for its effect: `cases` and `formulas` are those of the tests, the package this tree's.

Where the package is installed the second path changes nothing; on a bare machine with a GPU, where
only torch is, it is what makes `python3 benchmarks/gpu_check.py` work.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
