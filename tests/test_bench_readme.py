"""FLUX's sections of the README, as report.py makes them of results files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import flux_report  # noqa: E402
import flux_results  # noqa: E402
import report  # noqa: E402
from flux_forward import COMPILED, EAGER, FUSED, TORCHAO  # noqa: E402

SPREAD = {"median": 2.5, "low": 2.4, "high": 2.6}
BLOCK = {
    "case": "gelu_tanh-forward-flux", "task": "gelu_tanh", "shape": "12 × 2025 × 12288",
    "dtype": "bfloat16", "backward": False, "ours": "ours (triton)", "bytes": 1_194_393_600,
    "rounds": 21, "errors": {}, "copy": {"bytes": 2**30, "seconds": 2**30 / 2e12},
    "variants": {
        name: {"seconds": seconds, "wall_seconds": 1e-3, "gb_per_second": 1500 / times,
               "copy_fraction": 0.75 / times, "timer": "graph", "launches": 1,
               "over_ours": {"median": times}}
        for name, seconds, times in (
            ("eager", 1.2e-3, 1.5), ("torch.compile", 0.72e-3, 0.9), ("ours (triton)", 0.8e-3, 1.0),
        )
    },
}  # fmt: skip
WAY = {"seconds": 2.0, "tflops": 311.0, "of_peak": 0.5, "speedup": {"median": 1.0},
       "peak_bytes": 30e9, "away_from_eager": 0.0, "interleaved": True}  # fmt: skip
FORWARD_ROW = {
    "case": "forward-flux-b12", "batch": 12, "tokens": 2537, "flops": 10**15, "rounds": 7,
    "peaks": {"bfloat16": 622.0, "FP8, rowwise": 1100.0, "copy": 2900.0},
    "errors": {COMPILED: "Late: not compiled within 120 s"},
    "variants": {
        EAGER: WAY, FUSED: WAY | {"seconds": 0.8, "speedup": SPREAD, "away_from_eager": 0.0123},
        TORCHAO: WAY | {"interleaved": False, "speedup": {"median": 1.7}},
    },
}  # fmt: skip


GIB = 2**30
UPDATE_ROW = {
    "case": "update-flux", "preset": "flux-dev-1gpu", "prompts": 1, "updates": 2, "rows": 1512,
    "overrides": ["--train.prompts_per_update", "1"], "seconds": 90.0,
    "messages": ["Out of memory"],
    "phases": {"offload": 0.7, "update": 4.0}, "peak_bytes": {"offload": GIB, "update": 70 * GIB},
    "batches": {"anchor": 1, "branch": 12}, "variants": {}, "errors": {},
    "predicted": {"peak_bytes": {"update": 77 * GIB}, "seconds": {"update": 3.9}, "whole": 86.0,
                  "peak": 77 * GIB},
}  # fmt: skip
STEP = {"seconds": 0.05, "ns_per_element": 0.0125, "moved_bytes": 48 * 10**9, "copy_fraction": 0.86,
        "state_bytes": 12 * 10**9, "gb_per_second": 960.0, "host_seconds": 3e-3,
        "over_ours": {"median": 1.0}}  # fmt: skip
ADAMW_ROW = {
    "case": "adamw8bit-others-flux", "task": "others", "doubles": 6, "singles": 12,
    "elements": 4 * 10**9, "of_elements": 12 * 10**9, "backend": "cuda", "rounds": 7,
    "copy": {"bytes": 2**31, "seconds": 1e-3},
    "errors": {"torchao AdamW8bit": "not installed: pip install torchao"},
    "variants": {
        "ours, 24 bits": STEP,
        "bitsandbytes AdamW8bit": STEP | {"seconds": 0.06, "over_ours": {"median": 1.2}},
    },
}  # fmt: skip
CEILING_ROW = {
    "case": "gemm-2537x3072x9216", "task": "gemm", "shape": "2537 × 3072 × 9216", "work": 1.4e11,
    "unit": "TFLOP/s", "rounds": 7, "errors": {"FP8, rowwise": "RuntimeError: no such product"},
    "variants": {"bfloat16": {"seconds": 2e-4, "rate": 622.0}},
}  # fmt: skip
PHASE = {"asked": 16, "timed": 16, "seconds_each": 0.25, "seconds": 4.0, "extrapolated": False}
REFERENCE_ROW = {
    "case": "reference-flux", "steps": 16, "positions": [0], "granularities": [1, 2],
    "group_size": 12, "evaluations": 1792, "ours_evaluations": 1504, "extrapolated": True,
    "phases": {
        "anchor": PHASE,
        "completions": PHASE | {"asked": 1680, "timed": 90, "seconds": 420.0, "extrapolated": True},
        "optimizer": PHASE | {"asked": 1, "timed": 5, "of_elements": 0.25, "seconds": 1.5},
    },
    "seconds": 600.0, "dtypes": {"rollout": "float32 weights, bfloat16 autocast"},
    "ours": {"seconds": 80.0, "phases": {"anchor": 3.5, "completions": 60.0},
             "from": "flux-update-a-card.json"},
    "ratio": {"rollout": 6.7, "update": 7.5}, "variants": {}, "errors": {},
}  # fmt: skip
ROWS = {flux_results.CEILINGS: CEILING_ROW, flux_results.REFERENCE: REFERENCE_ROW,
        flux_results.BLOCKS: BLOCK, flux_results.FORWARD: FORWARD_ROW,
        flux_results.UPDATE: UPDATE_ROW, flux_results.ADAMW: ADAMW_ROW}  # fmt: skip


def on_a_card(kind: str) -> dict:
    """What a benchmark would have written on a GPU."""
    row = ROWS[kind]
    packages = {name: "9.8.7" for name in ("python", "torch", "g2rpo", "cuda", "triton",
                                           "diffusers", "torchao", "bitsandbytes")}  # fmt: skip
    return {
        "kind": kind, "size": "flux", "device": "cuda", "versions": packages,
        "machine": {"name": "A Card", "driver": "1.2"}, "date": "2031-01-02", "commit": "abc",
        "cases": [row], "left_out": [{"what": "a case", "why": "no time"}],
        "errors": {FUSED: {"float32": 0.00456, "eager": 0.00789}},
        "sigma_errors": [{"sigma": 0.93, "ours": 0.0051, "fp8": 0.0192,
                          "fp8_against_ours": 0.0188}],
    }  # fmt: skip


class Readme:
    """A README of markers alone, and report.py upon it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "README.md"
        names = ("bench", *flux_report.SECTIONS)
        self.path.write_text("".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in names))

    def report(self, *arguments: str) -> int:
        return report.main(["--results", str(self.folder), "--readme", str(self.path), *arguments])

    def section(self, kind: str) -> str:
        return self.path.read_text().split(f"<!-- {kind}:begin -->")[1].split("<!--")[0]


def test_a_card_gets_into_the_readme(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    readme = Readme(tmp_path)
    files = {kind: tmp_path / f"{kind}.json" for kind in flux_report.SECTIONS}
    assert readme.report() == 0 and readme.report("--check") == 0
    for kind, file in files.items():
        assert "**Not yet measured on a GPU.**" in readme.section(kind)
        assert f"results/{kind}-<gpu>.json" in readme.section(kind)
        file.write_text(json.dumps(on_a_card(kind)))
        assert readme.report("--check") == 1  # each counts by itself
        assert readme.report() == 0 and readme.report("--check") == 0
        assert "**A Card.** driver 1.2; torch 9.8.7," in readme.section(kind)
        assert "Not yet measured" not in readme.section(kind)
        assert "- a case: no time" in readme.section(kind)
    found = {kind: readme.section(kind) for kind in files}
    blocks, forward, update, adamw = (found[kind] for kind in (
        flux_results.BLOCKS, flux_results.FORWARD, flux_results.UPDATE, flux_results.ADAMW))
    ceilings, reference = found[flux_results.CEILINGS], found[flux_results.REFERENCE]
    assert "The most that was seen: bfloat16 622 TFLOP/s. Medians of 7" in ceilings
    assert "- gemm-2537x3072x9216, FP8, rowwise: RuntimeError: no such product" in ceilings
    assert "| 2537 × 3072 × 9216 | bfloat16 | 200 µs | 622 TFLOP/s |" in ceilings
    assert "1,792 evaluations before the gradients where ours makes 1,504" in reference
    assert "extrapolated from the pieces timed" in reference
    assert "the update takes 7.5× ours' time; ours: flux-update-a-card.json" in reference
    assert "| completions | 90 of 1680 | 250 ms | 420 s | **60 s** |" in reference
    assert "| optimizer | 1 of 1, on 25% of the parameters | 250 ms | 1.5 s |" in reference
    assert "| whole update |  |  | 600 s | **80 s** |" in reference
    assert (
        "| `gelu_tanh` | fwd | 12 × 2025 × 12288 | 1.2 ms | 720 µs | **800 µs** | 1.5× | 0.9× | "
        "1194 | 1500 | 75 % | 1 → 1 |"
    ) in blocks
    assert "<summary>Goals: 0 of 2 reached" in blocks and "MISSED: 0.75 of the copy" in blocks
    assert f"| 2537 | 12 | {FUSED} | 800 ms | 311 | 50 % | 2.5× | 30.0 GB | 0.012 |" in forward
    assert f"| 2537 | 12 | {TORCHAO} | 2 s | 311 | 50 % | 1.7× (other rounds) |" in forward
    assert "(bfloat16 622 TFLOP/s and FP8, rowwise 1100 TFLOP/s)" in forward
    assert "| 0.930 | 0.0051 | 0.0192 | 0.0188 |" in forward
    assert f"- forward-flux-b12, {COMPILED}: Late: not compiled" in forward
    assert f"| {FUSED} | 0.00456 | 0.00789 |" in forward and "2537 tokens" in forward
    assert f"- 2537 tokens x 12, {FUSED} reached: 2.50 x eager, goal 1.6" in forward
    assert "<summary>Goals: 1 of 2 reached" in forward
    assert "flux-dev-1gpu with --train.prompts_per_update 1: 1 prompt an update" in update
    assert "| update | 4 s | 3.9 s | 70.00 GiB | 77.00 GiB |" in update
    assert "| offload | 700 ms | – | 1.00 GiB | – |" in update and "- Out of memory" in update
    assert "reached: 70.00 GiB at the peak, goal at most 76" in update
    assert "MISSED: 10.00 % between predicted and measured peak, goal at most 5" in update
    assert "6 double and 12 single blocks and all that is no block, 4,000 of 12,000" in adamw
    assert ("| bitsandbytes AdamW8bit | 60 ms | 0.0125 | 12.00 | 960 | 86 % | 1.2× | 3.000 | 3 ms |"
            in adamw)  # fmt: skip
    assert "| torchao AdamW8bit | not timed |" in adamw and "on backend `cuda`" in adamw
    assert "- adamw8bit-others-flux, torchao AdamW8bit: not installed" in adamw
    assert "<summary>Goals: 2 of 3 reached" in adamw


@pytest.mark.parametrize("kind", list(flux_report.SECTIONS))
def test_what_does_not_get_into_the_readme(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    readme, file = Readme(tmp_path), tmp_path / "card.json"
    for change, why in (
        ({"size": "toy"}, "toy size on cuda; expected flux on cuda"),
        ({"size": "toy", "device": "cpu"}, "toy size on cpu"),
        ({"device": "cpu"}, "flux size on cpu"),
        ({"cases": []}, "no case was measured"),
    ):
        file.write_text(json.dumps(on_a_card(kind) | change))
        assert readme.report() == 0 and "Not yet measured" in readme.section(kind)
        assert f"left alone: card.json ({why}" in capsys.readouterr().out
    row_key = {flux_results.UPDATE: '"batches"', flux_results.REFERENCE: '"dtypes"'}.get(
        kind, '"rounds"')  # fmt: skip
    for lost in (row_key, '"seconds"', '"versions"'):
        file.write_text(json.dumps(on_a_card(kind)).replace(lost, '"nothing"'))
        assert readme.report() == 2
        assert f"lacks {lost[1:-1]}; measure again" in capsys.readouterr().err
