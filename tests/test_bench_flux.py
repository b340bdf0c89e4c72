"""bench_blocks.py and bench_flux_forward.py: what they count, time, write and print."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench_blocks  # noqa: E402
import flux_ops  # noqa: E402
import flux_results  # noqa: E402
import measure  # noqa: E402
import measure_blocks  # noqa: E402
from flux_forward import COMPILED, EAGER, FP8, FUSED, FUSED_COMPILED, TORCHAO, WAYS  # noqa: E402
from flux_shapes import SIZES, flops, new_transformer, transformer_inputs  # noqa: E402
from measure import Settings  # noqa: E402

TOY = SIZES["toy"]
QUICK = Settings(rounds=5, budget=0.05, at_least=1e-5, compile=False)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a cache of 64 KiB."""
    buffers = torch.arange(2**12, dtype=torch.int32), torch.empty(2**12, dtype=torch.int32)
    monkeypatch.setattr(measure_blocks, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(measure, "copy_buffers", lambda device: buffers)


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{program}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def table_in(text: str, first: str) -> list[dict[str, str]]:
    """The rows of the table that begins with the column `first`, by their columns' places."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(first + "  "))
    head = lines[at]
    starts = [i for i in range(len(head)) if head[i] != " " and (i == 0 or head[i - 2 : i] == "  ")]
    ends = [*starts[1:], None]
    rows = lines[at + 1 : lines.index("", at)]
    return [{head[a:b].strip(): row[a:b].strip() for a, b in zip(starts, ends)} for row in rows]


# As commands


@pytest.mark.parametrize("program", ["bench_blocks", "bench_flux_forward"])
def test_without_a_gpu_it_says_what_it_needs(program: str) -> None:
    done = run(program)
    assert done.returncode == 2 and done.stdout == ""
    assert f"{program}: error: FLUX's size is measured on a GPU" in done.stderr
    assert "--size toy" in done.stderr


def test_blocks_at_toy_size(tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    done = run("bench_blocks", "--size", "toy", "--no-compile", "--only", "gelu_tanh[", "--rounds",
               "5", "--budget", "0.05", "--output", str(path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "TOY SIZE" in done.stdout and "goals, for FLUX's size on a GPU" in done.stdout
    assert "reached" not in done.stdout and "MISSED" not in done.stdout
    content = flux_results.load(path, flux_results.BLOCKS)
    (row,) = content["cases"]
    (shown,) = table_in(done.stdout, "op")
    assert shown["op"] == row["task"] == "gelu_tanh[fp8]" and shown["shape"] == "2 × 16 × 256"
    assert shown["torch.compile"] == "–" and row["errors"] == {}
    assert set(row["variants"]) == {"eager", "ours (reference)"}
    mine = row["variants"]["ours (reference)"]
    assert len(mine["each_round"]) == row["rounds"] == 5
    assert mine["gb_per_second"] == pytest.approx(row["bytes"] / mine["seconds"] / 1e9)
    assert shown["× eager"].endswith("×") and shown["MB"] == f"{row['bytes'] / 1e6:.3g}"
    assert content["versions"]["torch"] == torch.__version__ and content["date"]


def test_forward_at_toy_size(tmp_path: Path) -> None:
    path = tmp_path / "forward.json"
    done = run("bench_flux_forward", "--size", "toy", "--no-compile", "--batches", "1", "--rounds",
               "5", "--budget", "0.1", "--output", str(path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = flux_results.load(path, flux_results.FORWARD)
    (row,) = content["cases"]
    # Once as it is measured, and at the end with torchao.
    last = done.stdout[done.stdout.rindex("tokens  batch") :]
    shown = {line["way"]: line for line in table_in(last, "tokens")}
    assert list(shown) == [*WAYS, TORCHAO] and len(content["sigma_errors"]) == 16
    for name in (COMPILED, FUSED_COMPILED):
        assert shown[name]["time"] == "not timed" and "--no-compile" in row["errors"][name]
    assert row["flops"] == flops(TOY, 1) and row["rounds"] == 5
    for name in (EAGER, FUSED, FP8):
        entry = row["variants"][name]
        assert entry["tflops"] == pytest.approx(row["flops"] / entry["seconds"] / 1e12)
        assert shown[name]["peak memory"] == "–" and entry["interleaved"]
    assert row["variants"][EAGER]["speedup"]["median"] == 1
    errors = {line["velocity at toy size"]: line for line in
              table_in(done.stdout, "velocity at toy size")}  # fmt: skip
    found = {name: entry["float32"] for name, entry in content["errors"].items()}
    assert errors.keys() == found.keys()
    assert 0 < found[FUSED] < 1.2 * found[EAGER] < found[FP8] < 0.1
    assert "TOY SIZE" in done.stdout and "MISSED" not in done.stdout


# What is counted


@pytest.mark.parametrize("name, batch", [("toy", 3), ("flux", 2)])
def test_operations_are_those_that_torch_counts(name: str, batch: int) -> None:
    """Of shapes alone: on the meta device nothing is computed, so FLUX's own size is counted."""
    size = SIZES[name]
    model = new_transformer(size, "meta")
    parameters = sum(p.numel() for p in model.parameters())
    assert name == "toy" or parameters == 11_901_408_320  # FLUX.1-dev
    given = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in transformer_inputs(size, batch, "cpu").items()
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**given)
    assert counter.get_total_flops() == flops(size, batch)


def case(task: str, backward: bool = False) -> measure_blocks.Case:
    return measure_blocks.Case(task, TOY, backward)


# Of toy's 2 x 16 image tokens and 2 x 24 tokens of 64 (256 in the MLP), bfloat16.
IMAGE, ALL, ROW = 2 * 16 * 64 * 2, 2 * 24 * 64 * 2, 2 * 64 * 2
BYTES = {
    case("adaln_modulate"): 2 * IMAGE + 2 * ROW,
    case("adaln_modulate", True): 5 * IMAGE + 2 * ROW + 3 * ROW,
    case("adaln_modulate[fp8]"): IMAGE + 2 * ROW + IMAGE // 2 + 2 * 16 * 4,
    case("gated_residual", True): 3 * IMAGE + ROW + 3 * IMAGE + 2 * ROW,
    # gradients of two outputs, hidden, update; those of residual and update
    case("gated_residual_modulate", True): 4 * IMAGE + 3 * ROW + 6 * IMAGE + 5 * ROW,
    case("qk_norm_rope[double]"): 6 * ALL + 4 * 16 * 2 + 2 * 24 * 16 * 4,
    case("gelu_tanh"): 2 * 4 * IMAGE,
    case("gelu_tanh_beside", True): 2 * 5 * ALL + 5 * ALL + 4 * ALL + 4 * ALL,
    case("quantize_fp8"): ALL + ALL // 2 + 2 * 24 * 4,
}


def test_bytes_moved(small_machine: None) -> None:
    for each, expected in BYTES.items():
        with measure_blocks.prepared(each, "cpu", QUICK) as ready:
            assert ready.moved == expected, each.id


def test_every_way_agrees_with_diffusers(small_machine: None) -> None:
    """Outputs and gradients, of every case; and the formula is diffusers' where it is one."""
    for each in measure_blocks.cases_of(TOY):
        with measure_blocks.prepared(each, "cpu", QUICK) as ready:
            assert ready.errors == {} and len(ready.variants) == 2, each.id
    from diffusers.models.embeddings import apply_rotary_emb

    x, angles = torch.randn(2, 5, 3, 16), torch.rand(5, 8).repeat_interleave(2, 1)
    given = angles.cos(), angles.sin()
    assert torch.equal(flux_ops.rotated(x, *given), apply_rotary_emb(x, given, sequence_dim=1))


def test_inputs_lie_as_the_blocks_have_them() -> None:
    heads, mlp = (make(TOY, "cpu") for make in (flux_ops.head_inputs, flux_ops.mlp_inputs))
    assert heads["sqkv"].stride(1) == mlp["slice"].stride(1) == 7 * TOY.width
    assert heads["sq"].is_contiguous() and torch.equal(mlp["slice"], mlp["mlp"])


def test_what_is_wrong_or_fails_is_not_timed(
    small_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, each = flux_ops.OPS["gelu_tanh"], case("gelu_tanh", True)
    wrong_gradient = lambda x: flux_ops.gelu(x.detach()) + 0 * x  # noqa: E731
    for broken, why in (
        (lambda x: flux_ops.gelu(x) * 1.02, "disagrees with eager by 0.02"),
        (wrong_gradient, "disagrees with eager by 1"),
        (lambda x: 1 // 0, "ZeroDivisionError"),
    ):
        ours = replace(op.ours, function=broken)
        monkeypatch.setitem(flux_ops.OPS, "gelu_tanh", replace(op, ours=ours))
        with measure_blocks.prepared(each, "cpu", QUICK) as ready:
            row = ready.measure()
        assert row["ours"] is None and why in row["errors"]["ours (reference)"]
        assert bench_blocks.cells(row)["ours"] == "failed"
        json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("times, kept", [(1.02, True), (1.1, False)])
def test_fp8_may_differ_by_a_rounding(
    times: float, kept: bool, small_machine: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = flux_ops.OPS["quantize_fp8"]

    def scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, scales = op.ours.function(x)
        return values, scales * times

    broken = replace(op, ours=replace(op.ours, function=scaled))
    monkeypatch.setitem(flux_ops.OPS, "quantize_fp8", broken)
    with measure_blocks.prepared(case("quantize_fp8"), "cpu", QUICK) as ready:
        assert (ready.ours is not None) is kept
        assert kept or "disagrees with eager by 0.1" in ready.errors["ours (reference)"]


def test_memory_is_given_up(small_machine: None) -> None:
    with measure_blocks.prepared(case("gelu_tanh", True), "cpu", QUICK) as ready:
        held = [weakref.ref(inputs["x"]) for inputs in ready.sets]
        assert all(each() is not None for each in held)
    assert not any(each() is not None for each in held)


def test_device_time_and_goals(small_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors in GPU clothes: the bookkeeping around the timers, and the verdicts."""
    buffers = measure.copy_buffers("cpu")
    monkeypatch.setattr(measure, "synchronizer", lambda device: lambda: None)
    monkeypatch.setattr(measure, "wall_blocks", lambda variants, *_: {
        v.name: lambda: 4e-3 for v in variants})  # fmt: skip
    monkeypatch.setattr(measure, "count_launches", lambda variant: 2)
    monkeypatch.setattr(measure, "device_block", lambda variant, *_: lambda: {
        measure.COPY: 1e-3, measure.EAGER: 6e-3}.get(variant.name, 2e-3))  # fmt: skip
    with measure_blocks.prepared(case("gelu_tanh"), "cpu", QUICK) as ready:
        ready.device = "cuda"
        row = ready.measure()
    mine = row["variants"]["ours (reference)"]
    assert mine["timer"] == "graph" and mine["seconds"] == 2e-3 and mine["wall_seconds"] == 4e-3
    fraction = row["bytes"] / 2 / (2 * buffers[0].nbytes)
    assert mine["copy_fraction"] == pytest.approx(fraction)
    shown = bench_blocks.cells(row)
    assert shown["× eager"] == "3×" and shown["launches"] == "2 → 2"
    content = {"size": "flux", "device": "cuda", "cases": [row]}
    copy, compiled = bench_blocks.goals(content)
    assert f"{'reached' if fraction >= 0.85 else 'MISSED'}: {fraction:.2f} of the copy" in copy
    assert "not measured (goal 1 x torch.compile)" in compiled


# Results files


def test_a_run_is_taken_up_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "blocks.json"
    arguments = ["--size", "toy", "--device", "cpu", "--no-compile", "--only", "gelu_tanh-",
                 "--rounds", "5", "--budget", "0.01", "--output", str(path)]  # fmt: skip
    assert bench_blocks.main([*arguments, "--seconds", "-1"]) == 0
    assert "no case was measured" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["left_out"]) == 2
    content = json.loads(path.read_text())
    content["running"] = "gelu_tanh-forward-toy"
    path.write_text(json.dumps(content))
    assert bench_blocks.main([*arguments, "--resume"]) == 0
    content = flux_results.load(path, flux_results.BLOCKS)
    assert [row["case"] for row in content["cases"]] == ["gelu_tanh-forward+backward-toy"]
    (left,) = content["left_out"]
    assert left["what"] == "gelu_tanh-forward-toy" and "process ended" in left["why"]
    path.write_text(json.dumps(content | {"size": "flux"}))
    assert bench_blocks.main([*arguments, "--resume"]) == 2
    assert "is of size 'flux', not of 'toy'" in capsys.readouterr().err
    path.write_text(json.dumps(content | {"kind": "flow-ops"}))
    assert bench_blocks.main([*arguments, "--resume"]) == 2
    assert "has no kind 'flux-blocks'" in capsys.readouterr().err
    assert bench_blocks.main(["--size", "toy", "--only", "nothing"]) == 2
    other = tmp_path / "other.json"
    other.write_text('{"kind": "flux-forward"}')
    assert bench_blocks.main([*arguments[:-1], str(other)]) == 2
    assert "has no kind 'flux-blocks', so it is not written over" in capsys.readouterr().err
    assert other.read_text() == '{"kind": "flux-forward"}'
