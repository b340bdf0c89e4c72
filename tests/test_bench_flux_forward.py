"""The states in which bench_flux_forward.py times one transformer, what becomes of each, and of
FLUX's figures in the README."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench_flux_forward  # noqa: E402
import flux_forward  # noqa: E402
import flux_report  # noqa: E402
import flux_results  # noqa: E402
import report  # noqa: E402
from flux_forward import COMPILED, EAGER, FP8, FUSED, FUSED_COMPILED, ROLLOUT, TORCHAO  # noqa: E402
from flux_shapes import SIZES, new_transformer, transformer_inputs  # noqa: E402

TOY = SIZES["toy"]


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> flux_forward.Forward:
    """A toy whose blocks 'compile' into a call that is counted."""

    def compiled(block: nn.Module, **keywords: object) -> None:
        def call(*given: object, **named: object) -> object:
            calls.append(type(block).forward)
            return block._call_impl(*given, **named)

        block._compiled_call_impl = call

    calls: list[object] = []
    monkeypatch.setattr(nn.Module, "compile", compiled)
    options = argparse.Namespace(no_compile=False, compile_seconds=None, rounds=5, budget=0.0)
    made = flux_forward.Forward(new_transformer(TOY, "cpu"), TOY, "cpu", options)
    made.calls = calls
    return made


def test_each_way_runs_in_its_own_state(forward: flux_forward.Forward) -> None:
    given = transformer_inputs(TOY, 1, "cpu")
    seen = {}
    for name in (*flux_forward.WAYS, COMPILED):
        forward.calls.clear()
        variant = forward.variant(name, given)
        with variant.context():
            fused = flux_forward.is_fused(flux_forward.blocks_of(forward.model)[0])
            seen[name] = fused, len(forward.calls), variant.run(0)
            assert len(forward.calls) == (4 if "compile" in name else 0), name
            quantised = "fp8" in forward.model.transformer_blocks[0].__dict__
            assert quantised is (name == FP8) and fused is name.startswith("ours")
    assert torch.equal(seen[EAGER][2], seen[COMPILED][2])
    assert torch.equal(seen[FUSED][2], seen[FUSED_COMPILED][2])
    assert flux_forward.apart(seen[ROLLOUT][2], seen[FUSED][2]) < 0.02
    assert not torch.equal(seen[ROLLOUT][2], seen[FP8][2])


def test_a_batch_is_timed_and_torchao_after_it(
    forward: flux_forward.Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"batch": 1, **forward.measure(1, lambda text: None)}
    assert row["errors"] == {} and row["rounds"] == 5
    wanted: list[str] = []

    def quantize_(model: nn.Module, config: object, filter_fn: object) -> None:
        wanted.extend(name for name, module in model.named_modules() if filter_fn(module, name))

    def scheme(granularity: object) -> None:
        assert granularity is row

    package = ModuleType("torchao.quantization")
    package.quantize_, package.PerRow = quantize_, lambda: row
    package.Float8DynamicActivationFloat8WeightConfig = scheme
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", package)
    assert forward.become_torchao() is None and forward.fp8 is None
    # 12 linears a double block, 5 a single one: those that our FP8 has, and no modulation
    assert len(wanted) == 2 * 12 + 2 * 5 and not any("norm" in name for name in wanted)
    forward.measure_torchao(row, lambda text: None)
    entry = row["variants"][TORCHAO]
    assert entry["interleaved"] is False and entry["away_from_eager"] == 0
    eager = row["variants"][EAGER]["seconds"]
    assert entry["speedup"]["median"] == pytest.approx(eager / entry["seconds"])
    shown = {line["way"]: line for line in bench_flux_forward.cells(row)}
    assert shown[TORCHAO]["× eager"].endswith("× (other rounds)")
    json.dumps(row, allow_nan=False)


def test_what_fails_is_slow_or_wrong_is_not_timed(
    forward: flux_forward.Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward.options.compile_seconds = 1.0
    broken = {COMPILED: lambda i: time.sleep(30), FUSED: lambda i: 1 // 0,
              FP8: lambda i: torch.full((1, 16, 16), torch.nan)}  # fmt: skip
    variant = forward.variant
    monkeypatch.setattr(forward, "variant", lambda name, given: replace(
        variant(name, given), **({"run": broken[name]} if name in broken else {})))  # fmt: skip
    row = forward.measure(1, lambda text: None)
    assert list(row["variants"]) == [EAGER, FUSED_COMPILED, ROLLOUT]
    assert row["errors"] == {
        COMPILED: "Late: not compiled within 1 s",
        FUSED: "ZeroDivisionError: integer division or modulo by zero",
        FP8: "disagrees with eager by inf",
    }


def test_peak_memory_is_the_weights_and_what_a_forward_adds(
    forward: flux_forward.Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else lies in memory (FP8 copies, inputs) does not count for a way without them."""
    memory = {"memory_allocated": 1000, "max_memory_allocated": 1700}
    for name in (*memory, "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: memory.get(name))
    forward.device = "cuda"
    plain = SimpleNamespace(name=EAGER, run=lambda i: None)
    assert forward.peak(plain, None) == forward.weights + 700
    plain.name = FP8
    assert forward.peak(plain, None) == forward.weights + forward.fp8.nbytes + 700
    assert forward.peak(plain, 200) == forward.weights + forward.fp8.nbytes + 1500  # a graph's
    plain.name = TORCHAO
    assert forward.peak(plain, None) == 1700


# The README

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
WAY = {"seconds": 2.0, "tflops": 311.0, "speedup": {"median": 1.0}, "peak_bytes": 30e9,
       "away_from_eager": 0.0, "interleaved": True}  # fmt: skip
FORWARD_ROW = {
    "case": "forward-flux-b12", "batch": 12, "tokens": 2537, "flops": 10**15, "rounds": 7,
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
ROWS = {flux_results.BLOCKS: BLOCK, flux_results.FORWARD: FORWARD_ROW,
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
    blocks, forward, update, adamw = map(readme.section, files)
    assert (
        "| `gelu_tanh` | fwd | 12 × 2025 × 12288 | 1.2 ms | 720 µs | **800 µs** | 1.5× | 0.9× | "
        "1194 | 1500 | 75 % | 1 → 1 |"
    ) in blocks
    assert "<summary>Goals: 0 of 2 reached" in blocks and "MISSED: 0.75 of the copy" in blocks
    assert f"| 12 | {FUSED} | 800 ms | 311 | 2.5× | 30.0 GB | 0.012 |" in forward
    assert f"| 12 | {TORCHAO} | 2 s | 311 | 1.7× (other rounds) |" in forward
    assert f"- forward-flux-b12, {COMPILED}: Late: not compiled" in forward
    assert f"| {FUSED} | 0.00456 | 0.00789 |" in forward and "2537 tokens" in forward
    assert f"- batch 12, {FUSED} reached: 2.50 x eager, goal 1.6" in forward
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
    row_key = '"batches"' if kind == flux_results.UPDATE else '"rounds"'
    for lost in (row_key, '"seconds"', '"versions"'):
        file.write_text(json.dumps(on_a_card(kind)).replace(lost, '"nothing"'))
        assert readme.report() == 2
        assert f"lacks {lost[1:-1]}; measure again" in capsys.readouterr().err
