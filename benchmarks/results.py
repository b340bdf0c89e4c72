"""A results file: the machine and its versions, one row a case, written after every case.

A run that is cut short keeps what it had. `load` refuses what is not a whole results file, with a
message that says what is wrong with it, so that no table is ever made of half a row.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch
from _paths import ROOT

import g2rpo_kernels as gk
from g2rpo import __version__, doctor

KIND = "flow-ops"  # other JSON files lie in the same folder
FOLDER = ROOT / "benchmarks" / "results"
KEYS = {"kind", "device", "machine", "versions", "date", "commit", "cases", "calls"}
CASE_KEYS = {"case", "task", "shape", "dtype", "backward", "ours", "bytes", "variants", "copy",
             "errors"}  # fmt: skip
VARIANT_KEYS = {"seconds", "wall_seconds", "gb_per_second", "copy_fraction", "launches", "timer"}


class ResultsError(ValueError):
    """A results file that cannot be used; the message names it and what is wrong."""


def machine(device: str) -> dict:
    """What the numbers depend on, as JSON. `load`: other work on the machine as the run began."""
    cpu = {
        "name": doctor.cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "variant": doctor.vector_variant()[0],
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cpu":
        return cpu
    properties = torch.cuda.get_device_properties(0)
    version, why = doctor.driver()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": version or why,
        "host": cpu,
    }


def versions(device: str) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__,
             "g2rpo": __version__}  # fmt: skip
    if device == "cuda":
        triton = doctor.probe(doctor.Package("triton", "", ""))
        found["cuda"] = str(torch.version.cuda)
        found["triton"] = triton.version or "missing"
    return found


def commit() -> str | None:
    """The commit that was measured, with "+" where the tree differs from it; None outside git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    name = git("rev-parse", "--short", "HEAD")
    if not name:
        return None
    changed = git("status", "--porcelain", "--", "g2rpo_kernels", "csrc", "benchmarks/*.py")
    return name + ("+" if changed else "")


def backend_reasons() -> dict[str, str]:
    return {name: status.reason for name, status in gk.backends().items()}


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def default_path(device: str) -> Path:
    name = slug(machine(device)["name"])
    return FOLDER / (f"{name}.json" if device == "cuda" else f"cpu-{name}.json")


class Store:
    """The file of a run. Every change is written at once, beside the file and then over it."""

    def __init__(self, path: Path, device: str, resume: bool = False) -> None:
        self.path = path
        if resume and path.is_file():
            self.content = load(path)
            if self.content["device"] != device:
                raise ResultsError(f"{path} is of {self.content['device']!r}, not of {device!r}")
            self._close_running()
            self.content["backends"] = backend_reasons()
            return
        self.content = {
            "kind": KIND, "device": device, "machine": machine(device),
            "versions": versions(device), "date": time.strftime("%Y-%m-%d"), "commit": commit(),
            "backends": backend_reasons(),
            "cases": [], "calls": {}, "left_out": [], "parts": {},
        }  # fmt: skip

    def _close_running(self) -> None:
        """The case during which a run ended gets no second chance to end the next one."""
        running = self.content.pop("running", None)
        if running is not None:
            self.content["left_out"].append(
                {"what": running, "why": "the process ended while it was measured"}
            )

    def known(self, case: str) -> bool:
        done = {row["case"] for row in self.content["cases"]}
        crashed = {item["what"] for item in self.content["left_out"] if "ended" in item["why"]}
        return case in done | crashed

    def begin(self, case: str) -> None:
        self.content["running"] = case
        self.save()

    def add(self, row: dict) -> None:
        self.content.pop("running", None)
        self.content["cases"] = [
            old for old in self.content["cases"] if old["case"] != row["case"]
        ] + [row]
        self.save()

    def leave_out(self, what: str, why: str) -> None:
        self.content.pop("running", None)
        self.content["left_out"].append({"what": what, "why": why})
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".json.new")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(beside, self.path)


def load(path: Path) -> dict:
    """A whole results file, or `ResultsError`."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not JSON ({error}); measure again") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ResultsError(f"{path} has no kind {KIND!r}; expected a file of benchmarks/run.py")
    require(path, "it", content, KEYS)
    if content["device"] not in ("cpu", "cuda"):
        raise ResultsError(f"{path} has device {content['device']!r}; expected 'cpu' or 'cuda'")
    for row in content["cases"]:
        require(path, f"case {row.get('case')!r}", row, CASE_KEYS)
        for name, entry in row["variants"].items():
            require(path, f"{name!r} of case {row['case']!r}", entry, VARIANT_KEYS)
    return content


def require(path: Path, what: str, content: dict, keys: set[str]) -> None:
    if missing := sorted(keys - set(content)):
        raise ResultsError(f"{path}: {what} lacks {', '.join(missing)}; measure again")
