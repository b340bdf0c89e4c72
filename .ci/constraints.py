"""Rewrite constraints.txt from a fresh resolution of g2rpo[train,test,bench]: `make constraints`.

The comment at the top of the file and the pins set by hand, torch's and triton's, are kept; every
other pin becomes what pip would install today into an empty environment.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
# torch's CUDA builds pin these exactly, its CPU builds do without them: not ours to pin.
PINNED_BY_TORCH = ("cuda-", "nvidia-")
BY_HAND = ("torch", "triton")


def resolve(by_hand: dict[str, str]) -> dict[str, str]:
    """Version by distribution name, lower case, of all that g2rpo's extras bring with `by_hand`."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        constraint = Path(folder, "constraints.txt")
        constraint.write_text("".join(f"{name}=={by_hand[name]}\n" for name in by_hand))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        pip += ["--report", str(report), "--constraint", str(constraint), ".[train,test,bench]"]
        subprocess.run(pip, cwd=ROOT, check=True)
        installs = json.loads(report.read_text())["install"]
    found = [item["metadata"] for item in installs]
    return {metadata["name"].lower(): metadata["version"] for metadata in found}


def main() -> None:
    lines = FILE.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    pinned = dict(line.split("==") for line in lines if "==" in line)
    by_hand = {name: pinned[name] for name in BY_HAND}
    found = resolve(by_hand)
    names = [n for n in found if n != "g2rpo" and not n.startswith(PINNED_BY_TORCH)]
    # 2.13.0+cpu on one machine is 2.13.0 on another: the same release, built for another device.
    # By hand last: triton is found on Linux only.
    pins = {name: found[name].split("+")[0] for name in names} | by_hand
    pins = [f"{name}=={pins[name]}" for name in sorted(pins)]
    FILE.write_text("\n".join([*header, *pins]) + "\n")


if __name__ == "__main__":
    main()
