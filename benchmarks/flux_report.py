"""FLUX's part of the README: what the GPU can do at most, block ops, a forward, an update, the
published loop and the optimizer's step, from what was measured on GPUs.

Only FLUX's size on a GPU gets there; the toy on any device says nothing about speed.
"""

from __future__ import annotations

import bench_adamw8bit
import bench_blocks
import bench_ceilings
import bench_flux_forward
import bench_flux_update
import bench_reference
from ceilings import BFLOAT16, FP8
from flux_results import (
    ADAMW,
    BLOCKS,
    CEILINGS,
    FORWARD,
    REFERENCE,
    UPDATE,
    decides,
    heading,
    not_timed,
)
from texts import copy_text, markdown_table, number_text, rounds_text

PRODUCTS = (BFLOAT16, FP8)  # whose peaks a forward's share is of

SECTIONS = {  # by kind: title, and what the benchmark would do
    CEILINGS: (
        "What the GPU can do at most",
        "`python benchmarks/bench_ceilings.py`, on a GPU, times a copy, matrix products in "
        "bfloat16 and FP8 at FLUX's shapes, attention and launches, of which the shares elsewhere "
        "are shares",
    ),
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
    UPDATE: (
        "A whole update of FLUX",
        "`python benchmarks/bench_flux_update.py`, on a GPU, makes updates of one prompt on random "
        "weights of FLUX.1-dev's shape with the preset `flux-dev-1gpu`: seconds and peak memory by "
        "phase beside the prediction of `g2rpo plan`",
    ),
    REFERENCE: (
        "Beside the published loop",
        "`python benchmarks/bench_reference.py`, on a GPU, times the training loop as "
        "Granular-GRPO's publication describes it, re-created, beside an update of ours",
    ),
    ADAMW: (
        "A step of AdamW8bit",
        "`python benchmarks/bench_adamw8bit.py`, on a GPU, times one step over FLUX.1-dev's "
        "parameters beside bitsandbytes', torchao's and torch's AdamW and a copy of as many bytes",
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
    markdown = {
        CEILINGS: ceilings_markdown, BLOCKS: blocks_markdown, FORWARD: forward_markdown,
        UPDATE: update_markdown, REFERENCE: reference_markdown, ADAMW: adamw_markdown,
    }[kind]  # fmt: skip
    return "\n\n".join([f"### {title}", *map(markdown, contents)])


def ceilings_markdown(content: dict) -> str:
    """One GPU's ceilings: the peaks, and every case folded away."""
    rows = content["cases"]
    lines = [line for row in rows for line in bench_ceilings.cells(row)]
    text = (
        f"{bench_ceilings.peak_text(content)} Medians of {rounds_text(rows)} alternating rounds; "
        "FP8 is `torch._scaled_mm` with a scale a row; attention is a forward."
    )
    return "\n".join(
        [head(content), "", text, "", f"<details><summary>{len(rows)} cases</summary>", "",
         *markdown_table(lines), "", "</details>", *left_out(content)]
    )  # fmt: skip


def reference_markdown(content: dict) -> str:
    """One GPU's comparison with the published loop: a table each."""
    lines = [head(content)]
    for row in content["cases"]:
        lines += ["", f"{bench_reference.summary(row)}.", ""]
        lines += markdown_table(bench_reference.cells(row), words=2)
    text = (
        "The loop is re-created from its description (`benchmarks/reference_loop.py`): one image "
        "a forward, nothing shared, diffusers' transformer as it is, torch's AdamW on float32. Its "
        "seconds are those of the pieces timed times the pieces asked for. Rewards cost nothing "
        "in either."
    )
    return "\n".join([*lines, "", text, *left_out(content)])


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
    found = {name: value for row in rows for name, value in row["peaks"].items()
             if name in PRODUCTS}  # fmt: skip
    peaks = " and ".join(f"{name} {number_text(value)} TFLOP/s" for name, value in found.items())
    peaks = peaks or "not measured"
    text = (
        f"Time between two events, the host's gaps included; medians of {rounds_text(rows)} "
        f"alternating rounds, ratios within rounds but for those marked; {tokens} tokens an image. "
        "TFLOP/s are of the formula in `benchmarks/flux_shapes.py`, whatever a way computes; of "
        f"peak: of the most that was seen in matrix products ({peaks}). Peak memory: the weights, "
        "in FP8 their copies too, and what one forward adds. Apart from eager: the velocity's "
        "difference, relative in norm."
    )
    ways = [line for row in rows for line in bench_flux_forward.cells(row)]
    lines = [head(content), "", *markdown_table(ways, words=3), "", text]
    if errors := bench_flux_forward.error_lines(content["errors"]):
        lines += ["", *markdown_table(errors, words=1)]
    if errors := bench_flux_forward.sigma_lines(content["sigma_errors"]):
        lines += ["", "One image of FLUX's own shape on random weights, relative in norm:", "",
                  *markdown_table(errors, words=0)]  # fmt: skip
    return "\n".join([*lines, *goals(bench_flux_forward.goals(content)), *left_out(content)])


def update_markdown(content: dict) -> str:
    """One GPU's updates: a table each."""
    lines = [head(content)]
    for row in content["cases"]:
        lines += ["", f"{bench_flux_update.what(row)}.", ""]
        lines += markdown_table(bench_flux_update.cells(row), words=1)
        lines += notes("The trainer said:", row["messages"])
    text = (
        "Random weights and embeddings, a reward that costs nothing, no text encoders. Peak "
        "memory: the most that PyTorch had allocated in a phase. Predicted: what `g2rpo plan` says "
        "of the same; its time of an update has the optimizer's states come and go, of which "
        "they go in the phase `offload`."
    )
    return "\n".join(
        [*lines, "", text, *goals(bench_flux_update.goals(content)), *left_out(content)]
    )


def adamw_markdown(content: dict) -> str:
    """One GPU's steps: a table a case."""
    rows, lines = content["cases"], [head(content)]
    for row in rows:
        lines += ["", f"{bench_adamw8bit.share_text(row)}; ours on backend `{row['backend']}`:", ""]
        lines += markdown_table(bench_adamw8bit.cells(row), words=1)
    text = (
        "Time a step between two events around several; medians of "
        f"{rounds_text(rows)} alternating rounds, ratios within rounds. Every gradient is dense "
        "and known to be finite. Bytes an element: weight and state read and written once, "
        "gradient read once, of the real buffers; state: those beside the weight. Host: until a "
        f"step has returned, the GPU idle before. {copy_text(rows)}"
    )
    return "\n".join([*lines, "", text, *goals(bench_adamw8bit.goals(content)), *left_out(content)])


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
