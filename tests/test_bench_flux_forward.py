"""The states in which bench_flux_forward.py times one transformer, and what becomes of each."""

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
import flux_errors  # noqa: E402
import flux_forward  # noqa: E402
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
    peaks = {"bfloat16": 0.5, "FP8, rowwise": 2.0}
    made = flux_forward.Forward(new_transformer(TOY, "cpu"), TOY, "cpu", options, peaks)
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
    row = {"batch": 1, "tokens": TOY.tokens, **forward.measure(1, lambda text: None)}
    assert row["errors"] == {} and row["rounds"] == 5 and row["peaks"] == forward.peaks
    for name, peak in ((EAGER, 0.5), (ROLLOUT, 0.5), (FP8, 2.0)):
        entry = row["variants"][name]
        assert entry["of_peak"] == pytest.approx(entry["tflops"] / peak), name
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
    assert entry["of_peak"] == pytest.approx(entry["tflops"] / 2.0)
    eager = row["variants"][EAGER]["seconds"]
    assert entry["speedup"]["median"] == pytest.approx(eager / entry["seconds"])
    shown = {line["way"]: line for line in bench_flux_forward.cells(row)}
    assert shown[TORCHAO]["× eager"].endswith("× (other rounds)")
    json.dumps(row, allow_nan=False)


def test_fewer_ways_and_no_peaks(forward: flux_forward.Forward) -> None:
    """A case need not have every way; without ceilings no share of them is made up."""
    forward.peaks = {}
    row = forward.measure(1, lambda text: None, (EAGER, FUSED))
    assert list(row["variants"]) == [EAGER, FUSED] and row["errors"] == {}
    assert {entry["of_peak"] for entry in row["variants"].values()} == {None}
    shown = bench_flux_forward.cells({"batch": 1, "tokens": 24, **row})
    assert [line["way"] for line in shown] == [EAGER, FUSED]
    assert {line["of peak"] for line in shown} == {"–"}


def test_errors_at_every_sigma(forward: flux_forward.Forward) -> None:
    found = flux_errors.sigma_errors(forward, TOY, "cpu")
    sigmas = [entry["sigma"] for entry in found]
    assert len(found) == 16 and sigmas[0] == 1 and sigmas == sorted(sigmas, reverse=True)
    for entry in found:
        assert 0 < entry["ours"] < entry["fp8"] < 0.1 and 0 < entry["fp8_against_ours"] < 0.1
    forward.fp8 = None
    (first, *_) = flux_errors.sigma_errors(forward, TOY, "cpu")
    assert first["fp8"] is first["fp8_against_ours"] is None and first["ours"] == found[0]["ours"]
    assert bench_flux_forward.sigma_lines([first])[0]["FP8 against diffusers"] == "–"


def test_which_images_and_batches() -> None:
    flux = bench_flux_forward.cases_of(SIZES["flux"], None, None)
    sizes = {(size.tokens, batch) for size, batch in flux.values()}
    assert sizes == {(tokens, batch) for tokens in (2537, 4608) for batch in (1, 4, 12, 24)}
    assert list(flux)[0] == "forward-flux-b12" and len(flux) == 8
    assert flux["forward-flux-1024-b4"][0].tokens == 4608
    asked = bench_flux_forward.cases_of(SIZES["flux"], (2, 1), 1024)
    assert list(asked) == ["forward-flux-1024-b2", "forward-flux-1024-b1"]
    assert list(bench_flux_forward.cases_of(TOY, (3,), None)) == ["forward-toy-b3"]


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
