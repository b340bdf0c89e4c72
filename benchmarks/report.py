"""Results files -> the README's tables and plots.

    python benchmarks/report.py           # rewrite the README between its markers, and docs/*.png
    python benchmarks/report.py --check   # exit 1 if the README is not what the files give

What the README says of speed comes from the files in benchmarks/results/ and from nowhere else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _paths
import flux_report
import flux_results
from results import FOLDER, KIND, ResultsError, load, slug
from texts import (
    copy_text,
    machine_text,
    markdown_table,
    number_text,
    over,
    rounds_text,
    table,
    time_text,
    times_text,
)

README, DOCS = _paths.ROOT / "README.md", _paths.ROOT / "docs"
MARKS = "<!-- {}:begin -->", "<!-- {}:end -->"
NO_GPU = (
    "**Not yet measured on a GPU.** `make gpu-check` tests every backend on the card it finds, "
    "times the same cases there and writes `benchmarks/results/<gpu>.json`; `python "
    "benchmarks/report.py` then puts them here."
)
BASELINES = ("eager", "compiled eager", "compiled reference")
HEADS = {"op": "", "direction": "", "shape": "P × G × row"}
HEADLINE = ("flux720", "flux720x64")  # shown first and drawn; other shapes are folded away


def shape_text(row: dict) -> str:
    """P × G of rows of S, as in the README: 1 × 12 × 2025 × 64."""
    import cases

    shape = cases.SHAPES[row["shape"]]
    dims = shape.row_shape if row["task"] != "group_advantages" else ()
    return " × ".join(map(str, (shape.rows, shape.branches, *dims)))


def cells(row: dict) -> dict[str, str]:
    """Column -> text of one case. A way that was not timed shows why in the notes."""
    entries, errors = row["variants"], row["errors"]

    def cell(name: str | None) -> str:
        if name not in entries:
            return "failed" if name in errors else "–"
        entry = entries[name]
        text = time_text(entry["seconds"])
        if entry["timer"] != "wall":
            text += f" ({time_text(entry['wall_seconds'])})"
        return text

    mine = entries.get(row["ours"])
    faster, compiled = over(row, BASELINES[:1]), over(row, BASELINES[1:])
    return {
        "op": row["task"],
        "direction": "fwd + bwd" if row["backward"] else "fwd",
        "shape": shape_text(row) + ("" if row["dtype"] == "float32" else f" {row['dtype']}"),
        **{name: cell(name) for name in BASELINES},
        "ours": cell(row["ours"]),
        "× eager": "–" if faster is None else times_text(faster),
        "× best compiled": "–" if compiled is None else times_text(compiled),
        "MB": number_text(row["bytes"] / 1e6),
        "GB/s": number_text(mine["gb_per_second"]) if mine else "–",
        "of copy": f"{mine['copy_fraction']:.0%}".replace("%", " %") if mine else "–",
        "launches": f"{entries['eager']['launches']} → {mine['launches']}"
        if mine and mine["launches"] and "eager" in entries else "–",
        "triton": cell("ours (triton)"),
    }  # fmt: skip


def headline(content: dict) -> tuple[list[dict], list[dict]]:
    """Cases of the headline shapes in float32, and the others; all are headline if none is."""
    first = [
        row for shape in HEADLINE for row in content["cases"]
        if row["shape"] == shape and row["dtype"] == "float32"
    ]  # fmt: skip
    if not first:
        return content["cases"], []
    return first, [row for row in content["cases"] if row not in first]


def table_of(content: dict, cases_shown: list[dict]) -> list[dict[str, str]]:
    """The rows of `cells`; ours is named after the backend, or on a CPU its vector variant."""
    backends = {row["ours"] for row in content["cases"]}
    ours = backends.pop() if len(backends) == 1 else "ours"
    if ours == "ours (cpu)" and content["device"] == "cpu":
        ours = f"ours ({content['machine']['variant']})"
    unwanted = {"launches", "triton"} if content["device"] == "cpu" else set()
    return [
        {ours if k == "ours" else k: v for k, v in cells(row).items() if k not in unwanted}
        for row in cases_shown
    ]


def text_table(content: dict) -> str:
    """For a terminal."""
    return table(table_of(content, content["cases"]))


def caption(content: dict) -> str:
    rows, gpu = content["cases"], content["device"] == "cuda"
    how = (
        "Device time by replaying a CUDA graph of one call on every input set, in brackets the "
        "wall time of ordinary calls; launches are kernels, copies and fills, eager → ours"
        if gpu else "Wall time"
    )  # fmt: skip
    return (
        f"{how}; medians of {rounds_text(rows)} alternating rounds, ratios within rounds, inputs "
        "rotated past the last-level cache. "
        "Eager is written as the trainers of flow models write it: one repeated row a branch, "
        "`torch.randn`. Compiled are `torch.compile` of that and of our plain reference, whose "
        "closed-form gradient it gets in one graph with the loss. MB: each input of the fused op "
        "read once, each output written once; fwd + bwd is two ops, so `x_next` counts twice. "
        + copy_text(rows)
    )


def markdown(content: dict) -> str:
    """One device's part of the README."""
    name = content["machine"]["name"]
    if not content["cases"]:
        raise ResultsError(f"the results of {name} hold no case; measure again")
    first, others = headline(content)
    lines = [f"**{name}.** {machine_text(content).removeprefix(name).lstrip(', ')}", ""]
    lines += markdown_table(table_of(content, first), HEADS)
    lines += ["", caption(content), "", f"![Times faster than eager](docs/{plot_name(content)})",
              "", f"![Share of what the device does at most](docs/{roofline_name(content)})"]
    if others:
        lines += ["", f"<details><summary>{len(others)} more cases</summary>", ""]
        lines += [*markdown_table(table_of(content, others), HEADS), "", "</details>"]
    notes = [f"- {row['case']}, {name}: {why}"
             for row in content["cases"] for name, why in row["errors"].items()]  # fmt: skip
    notes += [f"- {item['what']}: {item['why']}" for item in content["left_out"]]
    if notes:
        lines += ["", "Not timed:", "", *notes]
    if content["calls"]:
        lines += ["", calls_text(content)]
    return "\n".join(lines)


def calls_text(content: dict) -> str:
    times: dict[str, list[str]] = {}
    for name, value in content["calls"]["microseconds"].items():
        op, direction = name.split()
        times.setdefault(op, []).append(f"{value:.3g}" + (" fwd + bwd" if "+" in direction else ""))
    listed = "; ".join(f"`{op}` {', '.join(values)}" for op, values in times.items())
    return f"One call on tensors of a single element, µs: {listed}."


def plot_name(content: dict, picture: str = "bench") -> str:
    of = "" if content["device"] == "cuda" else "cpu-"
    return f"{picture}-{of}{slug(content['machine']['name'])}.png"


def roofline_name(content: dict) -> str:
    return plot_name(content, "roofline")


def beside(content: dict, found: dict[str, list[dict]]) -> dict[str, dict]:
    """By kind, the other results of the same device."""
    return {
        kind: other for kind, contents in found.items() for other in contents
        if kind != KIND and other["device"] == content["device"]
        and other["machine"]["name"] == content["machine"]["name"]
    }  # fmt: skip


def block(contents: list[dict]) -> str:
    """What stands between the README's markers: GPUs first, or that there is none yet."""
    gpus = [content for content in contents if content["device"] == "cuda"]
    cpus = [content for content in contents if content["device"] == "cpu"]
    parts = [markdown(content) for content in gpus] or [NO_GPU]
    return "\n\n".join([*parts, *(markdown(content) for content in cpus)])


def splice(readme: str, name: str, text: str) -> str:
    """The README with `text` between the markers of this name; ValueError if it has not one pair
    of them."""
    begin, end = (mark.format(name) for mark in MARKS)
    once = readme.count(begin) == readme.count(end) == 1
    if not once or readme.index(begin) > readme.index(end):
        raise ValueError(f"expected one line {begin} and, after it, one line {end}")
    before, rest = readme.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def load_folder(folder: Path) -> dict[str, list[dict]]:
    """The results files of a folder by kind; those with nothing for the README are named."""
    found: dict[str, list[dict]] = {KIND: [], **{kind: [] for kind in flux_report.SECTIONS}}
    others = []
    for path in sorted(folder.glob("*.json")):
        text = path.read_text(errors="replace")
        kind = next((kind for kind in found if f'"kind": "{kind}"' in text), None)
        if kind is None:
            others.append(f"{path.name} (of another kind)")
            continue
        content = load(path) if kind == KIND else flux_results.load(path, kind)
        why = None if kind == KIND else flux_report.unfit(content)
        if why or not content["cases"]:
            others.append(f"{path.name} ({why or 'no case was measured'})")
        else:
            found[kind].append(content)
    if others:
        print(f"left alone: {', '.join(others)}")
    return found


def readme_of(readme: str, found: dict[str, list[dict]]) -> str:
    """The README as these results give it."""
    readme = splice(readme, "bench", block(found[KIND]))
    for kind in flux_report.SECTIONS:
        readme = splice(readme, kind, flux_report.section(kind, found[kind]))
    return readme


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; is it up to date?")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    try:
        found = load_folder(options.results)
        contents = found[KIND]  # these have two pictures each
        before = options.readme.read_text()
        after = readme_of(before, found)
    except ValueError as error:
        where = "" if isinstance(error, ResultsError) else f"{options.readme}: "
        print(f"benchmarks/report.py: error: {where}{error}", file=sys.stderr)
        return 2
    if options.check:
        pictures = [name(c) for c in contents for name in (plot_name, roofline_name)]
        lost = [name for name in pictures if not (options.docs / name).is_file()]
        if after != before or lost:
            print(f"{options.readme} is not what {options.results} gives; "
                  "run python benchmarks/report.py", file=sys.stderr)  # fmt: skip
            return 1
        return 0
    from plots import plot

    for content in contents:
        plot(content, beside(content, found), options.docs / plot_name(content),
             options.docs / roofline_name(content))  # fmt: skip
    options.readme.write_text(after)
    print(f"wrote {options.readme} and {2 * len(contents)} pictures into {options.docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
