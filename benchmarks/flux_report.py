"""FLUX's part of the README: its block ops and its forward, from what was measured on GPUs.

Only FLUX's size on a GPU gets there; the toy on any device says nothing about speed.
"""

from __future__ import annotations

import bench_blocks
import bench_flux_forward
from flux_results import BLOCKS, FORWARD, decides, heading, not_timed
from texts import copy_text, markdown_table, rounds_text

SECTIONS = {  # by kind: title, and what the benchmark would do
    BLOCKS: (
        "FLUX's blocks",
        "`python benchmarks/bench_blocks.py`, on a GPU, times every block op at FLUX's shapes "
        "beside diffusers' formula and `torch.compile` of it",
    ),
    FORWARD: (
        "FLUX's forward",
        "`python benchmarks/bench_flux_forward.py`, on a GPU, times a whole forward of FLUX: "
        "diffusers, `torch.compile`, fused blocks, FP8",
    ),
}


def unfit(content: dict) -> str | None:
    """Why these results have no place in the README; None if they have."""
    if decides(content):
        return None
    return f"{content['size']} size on {content['device']}; expected flux on cuda"


def section(kind: str, contents: list[dict]) -> str:
    """What stands between the README's markers of this kind."""
    title, program = SECTIONS[kind]
    if not contents:
        return (
            f"### {title}\n\n**Not yet measured on a GPU.** {program}, and writes "
            f"`benchmarks/results/{kind}-<gpu>.json`; `make gpu-check` runs it too, and `python "
            "benchmarks/report.py` then puts it here."
        )
    markdown = blocks_markdown if kind == BLOCKS else forward_markdown
    return "\n\n".join([f"### {title}", *map(markdown, contents)])


def blocks_markdown(content: dict) -> str:
    """One GPU's table of block ops."""
    rows = content["cases"]
    types = ", ".join(sorted({row["dtype"] for row in rows}))
    text = (
        "Device time by replaying a CUDA graph of one call on every input set; launches are "
        f"kernels, copies and fills, eager → ours; medians of {rounds_text(rows)} alternating "
        "rounds, ratios within rounds, inputs rotated past the last-level cache. Inputs are "
        f"{types}. Eager is diffusers' formula, in FP8 with torch's rowwise quantisation behind "
        "it. MB: each input of the fused op read once, each output written once; fwd + bwd is two "
        f"ops. {copy_text(rows)}"
    )
    lines = [
        head(content), "",
        *markdown_table([bench_blocks.cells(row) for row in rows], {"op": "", "direction": ""}),
        "", text, *goals(bench_blocks.goals(content)),
    ]  # fmt: skip
    by_events = [
        f"{row['case']}, {name}: timed between {entry['timer']}"
        for row in rows for name, entry in row["variants"].items() if entry["timer"] != "graph"
    ]  # fmt: skip
    return "\n".join([*lines, *notes("Not by a graph:", by_events), *left_out(content)])


def forward_markdown(content: dict) -> str:
    """One GPU's table of forwards, and the errors of the velocity."""
    rows = content["cases"]
    tokens = ", ".join(map(str, sorted({row["tokens"] for row in rows})))
    text = (
        f"Time between two events, the host's gaps included; medians of {rounds_text(rows)} "
        f"alternating rounds, ratios within rounds but for those marked; {tokens} tokens an image. "
        "TFLOP/s are of the formula in `benchmarks/flux_shapes.py`, whatever a way computes. Peak "
        "memory: the weights, in FP8 their copies too, and what one forward adds. Apart from "
        "eager: the velocity's difference, relative in norm."
    )
    ways = [line for row in rows for line in bench_flux_forward.cells(row)]
    lines = [head(content), "", *markdown_table(ways, words=2), "", text]
    if errors := bench_flux_forward.error_lines(content["errors"]):
        lines += ["", *markdown_table(errors, words=1)]
    return "\n".join([*lines, *goals(bench_flux_forward.goals(content)), *left_out(content)])


def head(content: dict) -> str:
    name = content["machine"]["name"]
    return f"**{name}.** {heading(content).removeprefix(name).lstrip(', ')}"


def goals(lines: list[str]) -> list[str]:
    """Verdicts, folded away under their count."""
    reached = sum(" reached: " in line for line in lines)
    said = [f"- {' '.join(line.split())}" for line in lines]
    return ["", f"<details><summary>Goals: {reached} of {len(lines)} reached</summary>", "",
            *said, "", "</details>"]  # fmt: skip


def notes(title: str, lines: list[str]) -> list[str]:
    return ["", title, "", *(f"- {line}" for line in lines)] if lines else []


def left_out(content: dict) -> list[str]:
    lines = [line.removeprefix("not timed: ") for line in not_timed(content)]
    return notes("Not timed:", lines)
