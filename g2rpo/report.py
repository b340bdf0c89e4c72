"""What a person looks at after a run: one report.html with its curves, samples and numbers.

Everything here is made from the run directory alone (config.yaml, metrics.jsonl, samples/), so it
can be made again at any time: after a resume, after a crash, or on another machine.
"""

from __future__ import annotations

import base64
import io
import math
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
import yaml
from PIL import Image

from . import __version__, hacking
from .figures import write_curves
from .grids import sample_path, write_before_after
from .metrics import (
    Change,
    MetricsLog,
    Row,
    changes,
    duration,
    number,
    phase_seconds,
)
from .pages import write_html

JPEG_FROM_BYTES = 2**20  # pictures in the page beyond this many bytes


def write_report(run_dir: str | Path) -> Path:
    """Makes curves.png, samples/before_after.png and report.html anew; returns the last one's path.

    The page needs nothing but itself: its pictures are data URIs, and it has no scripts. Raises
    FileNotFoundError without config.yaml or metrics.jsonl, ValueError without an evaluated row.
    """
    run_dir = Path(run_dir)
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    train = (yaml.safe_load(config_text) or {}).get("train", {})
    rows = MetricsLog(run_dir / "metrics.jsonl").rows()
    curves, samples = run_dir / "curves.png", run_dir / "samples"
    write_curves(rows, curves)
    # a grid beyond the last row is left from before a resume
    updates = [update for update in _sampled_updates(samples) if update <= rows[-1]["update"]]
    grids = [sample_path(samples, update) for update in updates[:1]]
    if len(updates) > 1:
        grids = [samples / "before_after.png"]
        write_before_after(samples, grids[0], updates[0], updates[-1])
    images, found = train.get("evaluation_samples"), changes(rows)
    return write_html(
        run_dir / "report.html",
        "report.html.j2",
        name=run_dir.resolve().name,
        rewards=[_headline(change, images) for change in found],
        intervals=any(change.before_interval for change in found),
        alarm=hacking.watch(rows),
        spans=hacking.spans(rows),
        images=images,
        curves=_data_uri(curves),
        samples=[_data_uri(grid) for grid in grids],
        compared=len(updates) > 1,
        facts=_facts(rows, train.get("updates")),
        phases=_phase_totals(rows),
        config=config_text,
    )


def _sampled_updates(samples_dir: Path) -> list[int]:
    names = (re.fullmatch(r"update-(\d{6,})\.png", file.name) for file in samples_dir.glob("*.png"))
    return sorted(int(name[1]) for name in names if name)


def _headline(change: Change, images: int | None) -> dict[str, str]:
    """A line of the table before -> after, as text, with intervals where the rows have them, or
    else with standard errors if images are known."""

    def error(*stds: float | None) -> float | None:
        return None if images is None or None in stds else math.hypot(*stds) / math.sqrt(images)

    def text(value: float | None, error: float | None, sign: bool = False) -> str:
        if value is None or error is None:
            return number(value, sign)
        return f"{number(value, sign)} ± {number(error) if error < 5e-4 else format(error, '.3f')}"

    once = change.first_update == change.last_update
    line = {"kind": change.label, "name": change.name, "direction": change.direction}
    if change.before_interval is not None:
        low, high = change.before_interval
        outside = change.after is not None and not low <= change.after <= high
        return line | {
            "before": _with_interval(change.before, change.before_interval),
            "after": "-" if once else _with_interval(change.after, change.after_interval),
            "change": "-" if once else number(change.difference, sign=True),
            "win_rate": "-" if change.win_rate is None else f"{change.win_rate:.1%}",
            "emphasis": change.direction if outside else "",
        }
    both = error(change.before_std, change.after_std)
    clear = change.difference is not None and abs(change.difference) > 2 * (both or 0.0)
    return line | {
        "before": text(change.before, error(change.before_std)),
        "after": "-" if once else text(change.after, error(change.after_std)),
        "change": "-" if once else text(change.difference, both, sign=True),
        "win_rate": "-",
        "emphasis": change.direction if clear else "",
    }


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        return number(value)
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def _facts(rows: Sequence[Row], planned: int | None) -> list[tuple[str, str]]:
    last = rows[-1]
    evaluations, seconds = last.get("evaluations") or 0, last.get("seconds") or 0.0
    peak = max(row.get("peak_memory_bytes") or 0 for row in rows)
    versions = [f"Python {platform.python_version()}"]
    versions += [f"g2rpo {__version__}", f"torch {torch.__version__}"]  # torch's names its build
    found = next(iter(metadata.distributions(name="diffusers")), None)
    versions += [] if found is None else [f"diffusers {found.version}"]
    return [
        ("Updates", f"{last['update']:,}" + ("" if planned is None else f" of {planned:,}")),
        ("Transformer evaluations, of training", f"{evaluations:,}"),
        ("Training time", duration(seconds)),
        ("Evaluations a second", f"{evaluations / seconds:,.0f}" if seconds else "-"),
        ("Updates skipped", f"{last.get('skipped_updates') or 0:,}"),
        ("Groups without spread", f"{sum(row.get('zero_spread_groups') or 0 for row in rows):,}"),
        *_scorer_facts(rows),
        ("Groups with a failed reward", f"{sum(row.get('failed_groups') or 0 for row in rows):,}"),
        ("Peak memory", f"{peak / 2**30:.2f} GiB" if peak else "-"),
        ("Versions where this page was made", ", ".join(versions)),
    ]


def _scorer_facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Scores that failed and prompts that scorers have cut, where rows tell."""
    facts = []
    keys = {key: None for row in rows for key in row}
    if failed := [key for key in keys if key.endswith("/failed")]:
        sums = {key.removesuffix("/failed"): sum(r.get(key) or 0 for r in rows) for key in failed}
        facts.append(("Scores that failed", _counts(sums)))
    cut = {}
    for key in (key for key in keys if key.startswith("truncated_prompts/")):
        # Every process of a run counts from 0: the sum of what each of them came to.
        counts = [row[key] for row in rows if row.get(key) is not None]
        ends = [before for before, after in zip(counts, counts[1:]) if after < before]
        cut[key.partition("/")[2]] = sum(ends) + counts[-1]
    if cut:
        facts.append(("Prompts that a scorer had to cut", _counts(cut)))
    return facts


def _counts(by_name: dict[str, int]) -> str:
    """'3 of rollout/hps, 1 of heldout/judge', or 0."""
    return ", ".join(f"{count:,} of {name}" for name, count in by_name.items() if count) or "0"


def _phase_totals(rows: Sequence[Row]) -> list[tuple[str, str, float]]:
    """Phase, its total time in words, its percentage of all phases; the longest first."""
    totals = {phase: sum(seconds) for phase, seconds in phase_seconds(rows).items()}
    everything = sum(totals.values())
    ordered = sorted(totals.items(), key=lambda item: -item[1])
    return [(name, duration(total), 100 * total / everything) for name, total in ordered if total]


def _data_uri(picture: Path) -> str:
    """A picture for the page; a grid of photographs, huge as a PNG, goes in as a JPEG."""
    data, kind = picture.read_bytes(), "png"
    if len(data) > JPEG_FROM_BYTES:
        smaller = io.BytesIO()
        Image.open(picture).convert("RGB").save(smaller, format="JPEG", quality=88)
        data, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
