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
from results import FOLDER, KIND, ResultsError, load

README, DOCS = _paths.ROOT / "README.md", _paths.ROOT / "docs"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_GPU = (
    "**Not yet measured on a GPU.** `make gpu-check` tests every backend on the card it finds, "
    "times the same cases there and writes `benchmarks/results/<gpu>.json`; `python "
    "benchmarks/report.py` then puts them here."
)
BASELINES = ("eager", "compiled eager", "compiled reference")
HEADLINE = ("flux720", "flux720x64")  # shown first and drawn; other shapes are folded away


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 999 * scale else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} µs"


def times_text(value: float) -> str:
    return f"{value:.0f}×" if value >= 99.5 else f"{value:.2g}×" if value < 10 else f"{value:.3g}×"


def shape_text(row: dict) -> str:
    """P × G of rows of S, as in the README: 1 × 12 × 2025 × 64."""
    import cases

    shape = cases.SHAPES[row["shape"]]
    dims = shape.row_shape if row["task"] != "group_advantages" else ()
    return " × ".join(map(str, (shape.rows, shape.branches, *dims)))


def over(row: dict, names: tuple[str, ...]) -> float | None:
    """How many times the fastest of these takes what ours takes."""
    found = [row["variants"][n] for n in names if n in row["variants"]]
    values = [entry["over_ours"]["median"] for entry in found if "over_ours" in entry]
    return min(values, default=None)


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
        "MB": f"{row['bytes'] / 1e6:.3g}",
        "GB/s": f"{mine['gb_per_second']:.3g}" if mine else "–",
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
    rows = table_of(content, content["cases"])
    if not rows:
        return "no case was measured"
    widths = {k: max(len(k), *(len(row[k]) for row in rows)) for k in rows[0]}
    lines = ["  ".join(f"{k:{w}}" for k, w in widths.items())]
    lines += ["  ".join(f"{row[k]:{w}}" for k, w in widths.items()) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def machine_text(content: dict) -> str:
    machine, versions = content["machine"], content["versions"]
    parts = [f"torch {versions['torch']}", f"Python {versions['python']}"]
    if content["device"] == "cuda":
        head = f"{machine['name']}, driver {machine['driver']}"
        parts += [f"CUDA {versions['cuda']}", f"Triton {versions['triton']}"]
    else:
        variant = machine["variant"]
        ran = f"vector variant {variant}" if variant else "no native extension: the reference ran"
        head = f"{machine['name']}, {machine['threads']} threads, {ran}"
    when = content["date"] + (f", commit {content['commit']}" if content["commit"] else "")
    return f"{head}; {', '.join(parts)}, g2rpo {versions['g2rpo']}; {when}."


def caption(content: dict) -> str:
    rows, gpu = content["cases"], content["device"] == "cuda"
    copies = sorted(row["copy"]["bytes"] / row["copy"]["seconds"] / 1e9 for row in rows)
    span = f"{copies[0]:.3g}" + (f" to {copies[-1]:.3g}" if len(copies) > 1 else "")
    rounds = sorted({row["rounds"] for row in rows})
    how = (
        "Device time by replaying a CUDA graph of one call on every input set, in brackets the "
        "wall time of ordinary calls; launches are kernels, copies and fills, eager → ours"
        if gpu else "Wall time"
    )  # fmt: skip
    return (
        f"{how}; medians of {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} "
        "alternating rounds, ratios within rounds, inputs rotated past the last-level cache. "
        "Eager is written as the trainers of flow models write it: one repeated row a branch, "
        "`torch.randn`. Compiled are `torch.compile` of that and of our plain reference, whose "
        "closed-form gradient it gets in one graph with the loss. MB: each input of the fused op "
        "read once, each output written once; fwd + bwd is two ops, so `x_next` counts twice. "
        f"Of copy: GB/s over those of a copy of {rows[0]['copy']['bytes'] / 2**21:.0f} MiB in the "
        f"same rounds ({span} GB/s, bytes read and bytes written counted)."
    )


def markdown(content: dict) -> str:
    """One device's part of the README."""
    name = content["machine"]["name"]
    if not content["cases"]:
        raise ResultsError(f"the results of {name} hold no case; measure again")
    first, others = headline(content)
    lines = [f"**{name}.** {machine_text(content).removeprefix(name).lstrip(', ')}", ""]
    lines += markdown_table(table_of(content, first))
    lines += ["", caption(content), "", f"![Times faster than eager](docs/{plot_name(content)})"]
    if others:
        lines += ["", f"<details><summary>{len(others)} more cases</summary>", ""]
        lines += [*markdown_table(table_of(content, others)), "", "</details>"]
    notes = [f"- {row['case']}, {name}: {why}"
             for row in content["cases"] for name, why in row["errors"].items()]  # fmt: skip
    notes += [f"- {item['what']}: {item['why']}" for item in content["left_out"]]
    if notes:
        lines += ["", "Not timed:", "", *notes]
    if content["calls"]:
        lines += ["", calls_text(content)]
    return "\n".join(lines)


def markdown_table(rows: list[dict[str, str]]) -> list[str]:
    names = {"op": "", "direction": "", "shape": "P × G × row"}
    lines = ["| " + " | ".join(names.get(k, k) for k in rows[0]) + " |"]
    lines.append("|" + "---|" * 3 + "--:|" * (len(rows[0]) - 3))
    for row in rows:
        row = {k: f"**{v}**" if k.startswith("ours") else v for k, v in row.items()}
        lines.append("| " + " | ".join([f"`{row.pop('op')}`", *row.values()]) + " |")
    return lines


def calls_text(content: dict) -> str:
    times: dict[str, list[str]] = {}
    for name, value in content["calls"]["microseconds"].items():
        op, direction = name.split()
        times.setdefault(op, []).append(f"{value:.3g}" + (" fwd + bwd" if "+" in direction else ""))
    listed = "; ".join(f"`{op}` {', '.join(values)}" for op, values in times.items())
    return f"One call on tensors of a single element, µs: {listed}."


def plot_name(content: dict) -> str:
    from results import slug

    prefix = "bench-" if content["device"] == "cuda" else "bench-cpu-"
    return f"{prefix}{slug(content['machine']['name'])}.png"


def block(contents: list[dict]) -> str:
    """What stands between the README's markers: GPUs first, or that there is none yet."""
    gpus = [content for content in contents if content["device"] == "cuda"]
    cpus = [content for content in contents if content["device"] == "cpu"]
    parts = [markdown(content) for content in gpus] or [NO_GPU]
    return "\n\n".join([*parts, *(markdown(content) for content in cpus)])


def splice(readme: str, text: str) -> str:
    """The README with `text` between its markers; ValueError if it has not one pair of them."""
    once = readme.count(BEGIN) == readme.count(END) == 1
    if not once or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"expected one line {BEGIN} and, after it, one line {END}")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def load_folder(folder: Path) -> list[dict]:
    """Every results file of this kind in a folder; what else lies there is named, not read."""
    contents, others = [], []
    for path in sorted(folder.glob("*.json")):
        if f'"kind": "{KIND}"' in path.read_text(errors="replace"):
            contents.append(load(path))
        else:
            others.append(path.name)
    if others:
        print(f"not results of benchmarks/run.py, left alone: {', '.join(others)}")
    return contents


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; is it up to date?")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    try:
        contents = load_folder(options.results)
        before = options.readme.read_text()
        after = splice(before, block(contents))
    except ValueError as error:
        where = "" if isinstance(error, ResultsError) else f"{options.readme}: "
        print(f"benchmarks/report.py: error: {where}{error}", file=sys.stderr)
        return 2
    if options.check:
        lost = [plot_name(c) for c in contents if not (options.docs / plot_name(c)).is_file()]
        if after != before or lost:
            print(f"{options.readme} is not what {options.results} gives; "
                  "run python benchmarks/report.py", file=sys.stderr)  # fmt: skip
            return 1
        return 0
    from plots import plot

    for content in contents:
        plot(content, options.docs / plot_name(content))
    options.readme.write_text(after)
    print(f"wrote {options.readme} and {len(contents)} plots into {options.docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
