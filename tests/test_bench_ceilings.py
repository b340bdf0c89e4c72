"""bench_ceilings.py: what it counts, times and leaves out, and who takes a share of it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench_ceilings  # noqa: E402
import ceilings  # noqa: E402
import flux_results  # noqa: E402
from adamw_steps import shapes  # noqa: E402
from ceilings import ATTENTION, BFLOAT16, COPY, FP8, GEMM, LAUNCH  # noqa: E402
from flux_shapes import SIZES  # noqa: E402

FLUX = {case.name: case for case in ceilings.cases_of(SIZES["flux"])}


def run(path: Path, *arguments: str) -> int:
    given = ["--size", "toy", "--device", "cpu", "--output", str(path), "--rounds", "5",
             "--budget", "0.01"]  # fmt: skip
    return bench_ceilings.main([*given, *arguments])


def test_toy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "ceilings.json"
    assert run(path) == 0
    said = capsys.readouterr().out
    content = flux_results.load(path, flux_results.CEILINGS)
    rows = {row["case"]: row for row in content["cases"]}
    assert list(rows) == [case.name for case in ceilings.cases_of(SIZES["toy"])]
    copy = rows["copy"]["variants"][COPY]
    assert copy["rate"] == pytest.approx(2 * 2**22 / copy["seconds"] / 1e9)
    square = rows["gemm-256x256x256"]
    entry = square["variants"][BFLOAT16]
    assert entry["rate"] == pytest.approx(2 * 256**3 / entry["seconds"] / 1e12)
    assert len(entry["each_round"]) == square["rounds"] == 5
    # What a CPU lacks is told, way by way; its own attention is there.
    assert "FP8 products run on GPUs" in square["errors"][FP8]
    assert "nothing to launch" in rows["launch"]["errors"]["in a graph"]
    attention = rows["attention-1x24"]
    assert "flash" in attention["variants"] and "cudnn" in attention["errors"]
    assert set(attention["variants"]) | set(attention["errors"]) == {
        *ceilings.SDPA, *ceilings.PACKAGES}  # fmt: skip
    assert "TOY SIZE" in said and "The most that was seen: copy " in said
    assert "GB/s" in said and f"written to {path}" in said


def test_the_cases_are_flux_s() -> None:
    assert list(FLUX)[:3] == ["copy", "gemm-8192x8192x8192", "launch"]
    products = [case.sizes for case in FLUX.values() if case.task == GEMM]
    assert {rows for rows, *_ in products} == {8192, 2537, 4608, 4 * 2537, 4 * 4608}
    assert len(products) == 1 + 4 * 6
    # Each (K, N) is that of linears of the model, of which q, k and v, and a single block's MLP
    # with them, are one.
    linears = {s for s in shapes(SIZES["flux"], 1, 1) if len(s) == 2}
    assert {(3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360)} <= linears
    assert set(ceilings.linears(SIZES["flux"])) == {
        (3072, 9216), (3072, 3072), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072),
    }  # fmt: skip
    attention = FLUX["attention-4x2537"]
    assert attention.sizes == (4, 2537, 24, 128) and attention.task == ATTENTION
    assert attention.work == 4 * 4 * 24 * 2537**2 * 128
    assert FLUX["copy"].work == 2 * 2**30


def row(task: str, **rates: float) -> dict:
    variants = {name: {"seconds": 1 / rate, "rate": rate} for name, rate in rates.items()}
    return {"case": f"{task}-{len(rates)}", "task": task, "shape": "1", "work": 1.0, "unit": "x",
            "rounds": 5, "variants": variants, "errors": {}}  # fmt: skip


CASES = [
    row(COPY, copy=2900.0), row(GEMM, **{BFLOAT16: 600.0, FP8: 1100.0}), row(GEMM, bfloat16=650.0),
    row(ATTENTION, flash=400.0, cudnn=500.0),
    row(LAUNCH, **{"an empty kernel": 4e5, "in a graph": 1e6}),
]  # fmt: skip


def test_peaks_are_the_best_of_every_case() -> None:
    assert ceilings.peaks({"cases": CASES}) == {
        COPY: 2900.0, BFLOAT16: 650.0, FP8: 1100.0, ATTENTION: 500.0, LAUNCH: 2.5e-6,
    }  # fmt: skip
    assert ceilings.peaks({"cases": []}) == {}
    assert bench_ceilings.peak_text({"cases": []}) == "The most that was seen: nothing."


def test_shares_are_of_this_machine_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    content = {
        "kind": "ceilings", "size": "flux", "device": "cuda", "machine": {"name": "A Card"},
        "versions": {}, "date": "", "commit": None, "cases": CASES, "left_out": [],
    }  # fmt: skip
    assert bench_ceilings.of_this_machine(tmp_path, content) == {}
    (tmp_path / "ceilings-a-card.json").write_text(json.dumps(content))
    assert bench_ceilings.of_this_machine(tmp_path, content)[BFLOAT16] == 650.0
    for other in ({"size": "toy"}, {"device": "cpu"}, {"machine": {"name": "Another"}}):
        assert bench_ceilings.of_this_machine(tmp_path, content | other) == {}
    (tmp_path / "ceilings-a-card.json").write_text('{"kind": "ceilings"}')
    assert bench_ceilings.of_this_machine(tmp_path, content) == {}
    assert "no ceilings: " in capsys.readouterr().err


def test_what_fails_costs_one_way_and_late_cases_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def ways(case: ceilings.Case, device: str):
        def broken() -> None:
            raise RuntimeError("no such product\nmore")

        return {"broken": broken, "works": lambda: time.sleep(1e-4)}, {"absent": "not installed"}

    monkeypatch.setattr(ceilings, "_products", ways)
    path = tmp_path / "ceilings.json"
    assert run(path, "--only", "gemm-256") == 0
    (found,) = flux_results.load(path, flux_results.CEILINGS)["cases"]
    assert list(found["variants"]) == ["works"]
    assert found["errors"] == {"absent": "not installed", "broken": "RuntimeError: no such product"}

    def no_memory(case: ceilings.Case, device: str):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(ceilings, "_copies", no_memory)
    assert run(path, "--only", "copy") == 3
    (left,) = flux_results.load(path, flux_results.CEILINGS)["left_out"]
    assert left == {"what": "copy", "why": "out of memory: tried to allocate 2 GiB"}
    assert run(path, "--only", "launch", "--seconds", "-1") == 3
    assert "--seconds" in flux_results.load(path, flux_results.CEILINGS)["left_out"][0]["why"]
    # and are taken up again, beside what is there
    assert run(path, "--only", "launch", "--resume") == 0
    content = flux_results.load(path, flux_results.CEILINGS)
    assert [row["case"] for row in content["cases"]] == ["launch"] and content["left_out"] == []
    assert run(path, "--only", "nothing") == 2
    assert "--only 'nothing' leaves no case" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flash-attn", "flash-attn-3"])
def test_a_package_that_is_broken_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in ceilings.cases_of(SIZES["toy"]) if case.task == ATTENTION)
    module = ceilings.PACKAGES[name][0]
    real = ceilings.importlib.util.find_spec
    monkeypatch.setattr(ceilings.importlib.util, "find_spec",
                        lambda asked, *rest: object() if asked == module else real(asked, *rest))

    def fails(asked: str):
        raise ImportError(f"{asked}: undefined symbol")

    monkeypatch.setattr(ceilings.importlib, "import_module", fails)
    ways, why = ceilings.ways_of(case, "cpu")
    assert name not in ways and why[name] == f"ImportError: {module}: undefined symbol"
