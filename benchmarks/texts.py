"""Numbers, machines and tables as text: for the terminal, and for the README."""

from __future__ import annotations


def time_text(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 999 * scale else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} µs"


def times_text(value: float) -> str:
    return f"{value:.0f}×" if value >= 99.5 else f"{value:.2g}×" if value < 10 else f"{value:.3g}×"


def number_text(value: float) -> str:
    """Three digits, or a whole number of more."""
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def over(row: dict, names: tuple[str, ...]) -> float | None:
    """How many times the fastest of these takes what ours takes."""
    found = [row["variants"][n] for n in names if n in row["variants"]]
    values = [entry["over_ours"]["median"] for entry in found if "over_ours" in entry]
    return min(values, default=None)


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


def rounds_text(rows: list[dict]) -> str:
    rounds = sorted({row["rounds"] for row in rows})
    return " to ".join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))


def copy_text(rows: list[dict]) -> str:
    """What "of copy" is a fraction of, and the bandwidths that were found."""
    copies = sorted(row["copy"]["bytes"] / row["copy"]["seconds"] / 1e9 for row in rows)
    span = " to ".join(dict.fromkeys(map(number_text, (copies[0], copies[-1]))))
    return (
        f"Of copy: GB/s over those of a copy of {rows[0]['copy']['bytes'] / 2**21:.0f} MiB in the "
        f"same rounds ({span} GB/s, bytes read and bytes written counted)."
    )


def table(rows: list[dict[str, str]]) -> str:
    """For a terminal."""
    if not rows:
        return "no case was measured"
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [{name: name for name in widths}, *rows]
    return "\n".join(
        "  ".join(f"{line[name]:{width}}" for name, width in widths.items()).rstrip()
        for line in lines
    )


def markdown_table(
    rows: list[dict[str, str]], heads: dict[str, str] | None = None, words: int = 3
) -> list[str]:
    """Lines of a table; ours is bold, an op is code.

    heads: by column, where it is not to be its own name. words: so many columns are not numbers.
    """
    names = [(heads or {}).get(name, name) for name in rows[0]]
    lines = ["| " + " | ".join(names) + " |"]
    lines.append("|" + "---|" * words + "--:|" * (len(names) - words))
    for row in rows:
        texts = {k: f"**{v}**" if k.startswith("ours") else v for k, v in row.items()}
        if "op" in texts:
            texts["op"] = f"`{texts['op']}`"
        lines.append("| " + " | ".join(texts.values()) + " |")
    return lines
