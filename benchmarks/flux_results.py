"""Results files of the benchmarks at FLUX's size, and what all of them print of them."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import _paths  # noqa: F401
from flux_shapes import Size
from results import (
    CASE_KEYS,
    FOLDER,
    VARIANT_KEYS,
    ResultsError,
    Store,
    machine,
    require,
    slug,
)
from texts import machine_text

from g2rpo import doctor

# The kinds that the README shows.
CEILINGS, BLOCKS, FORWARD = "ceilings", "flux-blocks", "flux-forward"
ADAMW, UPDATE, REFERENCE = "adamw8bit", "flux-update", "reference-loop"
PACKAGES = ("diffusers", "torchao", "bitsandbytes")  # whose versions matter
KEYS = {"kind", "size", "device", "machine", "versions", "date", "commit", "cases", "left_out"}
ROW_KEYS = {  # by kind, of a case and of each of its variants
    CEILINGS: (
        {"case", "task", "shape", "work", "unit", "rounds", "variants", "errors"},
        {"seconds", "rate"},
    ),
    BLOCKS: (CASE_KEYS | {"rounds"}, VARIANT_KEYS),
    FORWARD: (
        {"case", "batch", "tokens", "flops", "rounds", "peaks", "variants", "errors"},
        {"seconds", "tflops", "of_peak", "speedup", "peak_bytes", "away_from_eager",
         "interleaved"},
    ),
    UPDATE: (
        {"case", "preset", "overrides", "prompts", "updates", "seconds", "rows", "phases",
         "peak_bytes", "predicted", "batches", "messages", "variants", "errors"},
        set(),
    ),
    ADAMW: (
        {"case", "task", "doubles", "singles", "elements", "of_elements", "backend", "rounds",
         "copy", "variants", "errors"},
        {"seconds", "ns_per_element", "moved_bytes", "state_bytes", "gb_per_second",
         "copy_fraction", "host_seconds"},
    ),
    REFERENCE: (
        {"case", "steps", "positions", "granularities", "group_size", "extrapolated",
         "evaluations", "ours_evaluations", "phases", "seconds", "dtypes", "ours", "ratio",
         "variants", "errors"},
        set(),
    ),
}  # fmt: skip


class FluxStore(Store):
    """A results file of a kind of `ROW_KEYS`; kept in memory without a path."""

    def __init__(self, kind: str, size: Size, device: str, options: argparse.Namespace) -> None:
        path = options.output
        if path is None and device == "cuda" and size.name == "flux":
            path = FOLDER / f"{kind}-{slug(machine(device)['name'])}.json"
        self.stored = path is not None
        super().__init__(path or Path(f"{kind}.json"), device)
        self.content |= {"kind": kind, "size": size.name}
        self.content["versions"] |= {
            name: doctor.probe(doctor.Package(name, "", "")).version or "missing"
            for name in PACKAGES
        }
        if not self.stored or not path.is_file():
            return
        if f'"kind": "{kind}"' not in path.read_text(errors="replace"):
            raise ResultsError(f"{path} has no kind {kind!r}, so it is not written over; "
                               "name another --output")  # fmt: skip
        if options.resume:
            fresh, self.content = self.content, load(path, kind)
            for key in ("size", "device"):
                if self.content[key] != fresh[key]:
                    raise ResultsError(f"{path} is of {key} {self.content[key]!r}, "
                                       f"not of {fresh[key]!r}")  # fmt: skip
            self._close_running()
            # What was cut short is taken up again, but for what has killed the process.
            self.content["left_out"] = [
                item for item in self.content["left_out"] if "ended" in item["why"]
            ]

    def save(self) -> None:
        if self.stored:
            super().save()


def load(path: Path, kind: str) -> dict:
    """A whole results file of this kind, or `ResultsError`."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is not JSON ({error}); measure again") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        raise ResultsError(f"{path} has no kind {kind!r}; measure again")
    of_file = {"errors", "sigma_errors"} if kind == FORWARD else set()
    require(path, "it", content, KEYS | of_file)
    of_case, of_variant = ROW_KEYS[kind]
    for row in content["cases"]:
        require(path, f"case {row.get('case')!r}", row, of_case)
        for name, entry in row["variants"].items():
            require(path, f"{name!r} of case {row['case']!r}", entry, of_variant)
    return content


def heading(content: dict) -> str:
    toy = "TOY SIZE, which says nothing about FLUX. " if content["size"] == "toy" else ""
    packages = ", ".join(
        f"{name} {content['versions'][name]}" for name in PACKAGES if name in content["versions"]
    )
    return f"{toy}{machine_text(content).removesuffix('.')}; {packages}."


def not_timed(content: dict) -> list[str]:
    """A line for each way and each case that has no time, with the reason."""
    lines = [f"not timed: {row['case']}, {name}: {why}"
             for row in content["cases"] for name, why in row["errors"].items()]  # fmt: skip
    return lines + [f"not timed: {item['what']}: {item['why']}" for item in content["left_out"]]


def decides(content: dict) -> bool:
    """Whether these figures can reach or miss a goal: FLUX's size on a GPU."""
    return content["size"] == "flux" and content["device"] == "cuda"


def verdict(
    content: dict, name: str, what: str, value: float | None, least: float = -math.inf,
    most: float = math.inf,
) -> str:  # fmt: skip
    """A goal of which one side is open: least or most, and how it was met."""
    bound = f"{least:g}" if math.isinf(most) else f"at most {most:g}"
    if value is None or not decides(content):
        return f"{name:44} not measured (goal {bound} {what})"
    word = "reached" if least <= value <= most else "MISSED"
    return f"{name:44} {word}: {value:.2f} {what}, goal {bound}"
