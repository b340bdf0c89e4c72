"""Rewrite constraints.txt from a fresh resolution of g2rpo[train,test,bench]: `make constraints`.

The comment at the top of the file and its torch pin are kept; every other pin becomes what pip
would install today into an empty environment.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
# torch's CUDA builds pin these exactly, its CPU builds do without them: not ours to pin.
PINNED_BY_TORCH = ("cuda-", "nvidia-", "triton")


def resolve(torch: str) -> dict[str, str]:
    """Version by distribution name, lower case, of all that `torch` and g2rpo's extras bring."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run(
            [*pip, "--report", str(report), ".[train,test,bench]", torch], cwd=ROOT, check=True
        )
        installs = json.loads(report.read_text())["install"]
    found = [item["metadata"] for item in installs]
    return {metadata["name"].lower(): metadata["version"] for metadata in found}


def main() -> None:
    lines = FILE.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    (torch,) = [line for line in lines if line.startswith("torch==")]
    found = resolve(torch)
    names = [n for n in sorted(found) if n != "g2rpo" and not n.startswith(PINNED_BY_TORCH)]
    # 2.13.0+cpu on one machine is 2.13.0 on another: the same release, built for another device.
    pins = [f"{name}=={found[name].split('+')[0]}" for name in names]
    FILE.write_text("\n".join([*header, *pins]) + "\n")


if __name__ == "__main__":
    main()
