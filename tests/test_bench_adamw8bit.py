"""bench_adamw8bit.py: whose parameters it steps, what it counts, times, writes and prints."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import adamw_steps  # noqa: E402
import bench_adamw8bit  # noqa: E402
import flux_results  # noqa: E402
from adamw_steps import BITSANDBYTES, CASES, OURS, TORCH, TORCHAO, TOY, Contender  # noqa: E402
from flux_shapes import SIZES  # noqa: E402

import g2rpo_kernels as gk  # noqa: E402

OURS24, _, _, FLOAT32 = CASES["others"]
TINY = replace(TOY, heads=8, text_width=64, doubles=2, singles=4)  # 0.6 million parameters


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_adamw8bit, "TOY", TINY)


@pytest.mark.parametrize("size, doubles, singles", [
    (SIZES["flux"], 19, 38), (TOY, 19, 38), (TOY, 1, 2), (SIZES["toy"], 2, 2),
])  # fmt: skip
def test_the_parameters_are_those_of_diffusers(size, doubles: int, singles: int) -> None:
    from diffusers import FluxTransformer2DModel

    architecture = replace(size, doubles=doubles, singles=singles).architecture
    with torch.device("meta"):
        model = FluxTransformer2DModel(**architecture)
    made = adamw_steps.shapes(size, doubles, singles)
    assert sorted(made) == sorted(tuple(p.shape) for p in model.parameters())
    assert size.name == "toy" or adamw_steps.count(made) == 11_901_408_320


def test_the_share_is_the_largest_that_fits() -> None:
    def elements(doubles: int) -> int:
        return adamw_steps.count(adamw_steps.shapes(TOY, doubles, 2 * doubles))

    assert adamw_steps.fitting(TOY, 3.0, 3.0 * elements(19)) == (19, 38)
    assert adamw_steps.fitting(TOY, 3.0, 3.0 * elements(19) - 1) == (18, 36)
    assert adamw_steps.fitting(TOY, 3.0, 3.0 * elements(1)) == (1, 2)
    assert adamw_steps.fitting(TOY, 3.0, 3.0 * elements(1) - 1) is None


@pytest.mark.parametrize("contender, kept, moved", [
    (OURS24, 3.03, 12.06), (CASES["masters"][1], 2.03, 10.06), (CASES["masters"][2], 4.03, 14.06),
    (CASES["masters"][3], 3.03, 12.06), (FLOAT32, 8.0, 28.0),
])  # fmt: skip
def test_bytes_are_those_of_real_buffers(contender: Contender, kept: float, moved: float) -> None:
    given = adamw_steps.parameters([(256, 64), (300,), (128,)], contender.dtype, "cpu")
    before = [p.detach().clone() for p in given]
    steps = adamw_steps.Steps(contender, given)
    elements = 256 * 64 + 300 + 128
    assert steps.states / elements == pytest.approx(kept, abs=0.005)
    assert steps.moved / elements == pytest.approx(moved, abs=0.01)
    assert contender.state == pytest.approx(kept, abs=0.05)  # what the share is chosen by
    if contender is FLOAT32:
        assert not any(torch.equal(p, old) for p, old in zip(given, before))
    assert steps.optimizer.param_groups[0]["lr"] == 2e-6


def test_states_in_tensors_of_tensors_are_counted_once() -> None:
    """As torchao's and bitsandbytes' are."""
    codes, shared = torch.zeros(100, dtype=torch.uint8), torch.zeros(256)
    wrapped = SimpleNamespace(
        codes=codes, qmap=shared, __tensor_flatten__=lambda: (["codes", "qmap"], None)
    )
    state = {"a": {"exp_avg": wrapped, "qmap1": shared, "step": 3},
             "b": {"state1": codes[:50], "absmax1": torch.zeros(7)}}  # fmt: skip
    assert adamw_steps.state_bytes(SimpleNamespace(state=state)) == 100 + 1024 + 28


@pytest.mark.parametrize("contender", [*CASES["masters"], FLOAT32], ids=lambda c: c.name)
def test_what_is_no_adamw_is_found(contender: Contender) -> None:
    adamw_steps.check(contender, "cpu")
    lazy = replace(contender, make=lambda given, lr: torch.optim.SGD(given, lr), options=())
    with pytest.raises(ValueError, match=r"its first step is 0\.[78]\d* times AdamW's"):
        adamw_steps.check(lazy, "cpu")


def test_the_copy_moves_as_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adamw_steps.COPIED, "cpu", 4096)
    copied: list[int] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, source: copied.append(2 * source.nbytes))
    for moved, expected in ((81920, 81920), (8000, 8000), (80000, 81920)):
        copied.clear()
        variant, count = adamw_steps.copying(moved, "cpu")
        variant.run(0)
        assert sum(copied) == count == expected


def run(path: Path, *arguments: str) -> int:
    return bench_adamw8bit.main([
        "--size", "toy", "--device", "cpu", "--rounds", "5", "--budget", "0", "--output", str(path),
        *arguments,
    ])  # fmt: skip


def test_toy(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(adamw_steps, "importlib", SimpleNamespace(
        util=SimpleNamespace(find_spec=lambda name: None)))  # fmt: skip
    path = tmp_path / "adamw.json"
    assert run(path, "--only", "others") == 0
    said = capsys.readouterr().out
    content = flux_results.load(path, flux_results.ADAMW)
    (row,) = content["cases"]
    assert row["errors"] == {BITSANDBYTES: "not installed: pip install bitsandbytes",
                             TORCHAO: "not installed: pip install torchao"}  # fmt: skip
    assert set(row["variants"]) == {OURS, TORCH} and row["rounds"] == 5
    assert row["doubles"] == 2 and row["singles"] == 4
    assert row["elements"] == adamw_steps.count(adamw_steps.shapes(TINY, 2, 4))
    mine, theirs = row["variants"][OURS], row["variants"][TORCH]
    assert mine["ns_per_element"] == pytest.approx(mine["seconds"] / row["elements"] * 1e9)
    assert mine["gb_per_second"] == pytest.approx(mine["moved_bytes"] / mine["seconds"] / 1e9)
    assert mine["over_ours"]["median"] == 1 and len(mine["each_round"]) == 5
    shown = {line["optimizer"]: line for line in bench_adamw8bit.cells(row)}
    assert shown[TORCH]["bytes an element"] == "28.00" and shown[OURS]["state, bytes"] == (
        f"{mine['state_bytes'] / row['elements']:.3f}"
    )
    assert shown[BITSANDBYTES]["a step"] == "not timed"
    assert f"{theirs['over_ours']['median']:.2g}×" == shown[TORCH]["× ours' time"]
    assert f"not timed: adamw8bit-others-toy, {TORCHAO}: not installed" in said
    assert "TOY SIZE" in said and "goals, for FLUX's size on a GPU" in said
    assert "reached" not in said and "MISSED" not in said

    assert run(path, "--resume", "--seconds", "-1") == 0
    content = flux_results.load(path, flux_results.ADAMW)
    assert content["cases"] == [row]
    (left,) = content["left_out"]
    assert left == {"what": "adamw8bit-masters-toy", "why": "--seconds -1 reached"}
    assert run(path, "--resume") == 0
    content = flux_results.load(path, flux_results.ADAMW)
    assert [each["task"] for each in content["cases"]] == ["others", "masters"]
    assert set(content["cases"][1]["variants"]) == {c.name for c in CASES["masters"]}
    assert content["left_out"] == []


def test_what_fails_or_does_not_fit_is_told(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    path, tried = tmp_path / "adamw.json", []
    package = ModuleType("torchao.optim")

    def slow(parameters: list[nn.Parameter], lr: float, bf16_stochastic_round: bool) -> None:
        tried.append(bf16_stochastic_round)
        while True:
            sum(range(1000))

    package.AdamW8bit = slow
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.optim", package)
    sys.modules["torchao"].__spec__ = SimpleNamespace()
    assert run(path, "--only", "others", "--compile-seconds", "0.2") == 0 and tried == [True]
    (row,) = flux_results.load(path, flux_results.ADAMW)["cases"]
    assert row["errors"][TORCHAO] == "Late: not compiled within 0.2 s"
    assert run(path, "--only", "others", "--no-compile") == 0 and tried == [True]
    assert "left out by --no-compile" in capsys.readouterr().out

    def broken(*given: object, **named: object) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(gk, "AdamW8bit", broken)
    assert run(path, "--only", "masters") == 3
    (row,) = flux_results.load(path, flux_results.ADAMW)["cases"]
    assert row["variants"] == {} and row["errors"][OURS] == "RuntimeError: no such kernel"
    assert run(path, "--memory", "0.0001") == 3
    left = flux_results.load(path, flux_results.ADAMW)["left_out"]
    assert [each["what"].split("-")[1] for each in left] == ["others", "masters"]
    assert "takes more than the 0.00 GiB there are" in left[0]["why"]

    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(bench_adamw8bit, "parameters", full)
    assert run(path) == 3
    assert "out of memory: tried to allocate" in capsys.readouterr().out
    for arguments in (("--only", "nothing"), ("--memory", "0")):
        with pytest.raises(SystemExit, match="2"):
            run(path, *arguments)
    assert "expected part of one of others, masters" in capsys.readouterr().err


def test_memory_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    make = adamw_steps.parameters

    def kept(*given):
        made = make(*given)
        held.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(bench_adamw8bit, "parameters", kept)
    options = argparse.Namespace(memory=1.0, rounds=5, budget=0.0, no_compile=True,
                                 compile_seconds=1.0)  # fmt: skip
    bench_adamw8bit.measure("masters", TINY, "cpu", options, print)
    gc.collect()
    assert held and not any(each() is not None for each in held)


class Device:
    """A GPU's events and queue: the host takes .5 s a step, the device 1 s."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def step(self, i: int) -> None:
        self.host += 0.5
        self.device = max(self.host, self.device) + 1.0

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)

        def record() -> None:
            event.at = max(self.host, self.device)

        def synchronize() -> None:
            self.host = max(self.host, self.device)

        event.record, event.synchronize = record, synchronize
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


def test_on_a_gpu_the_hosts_work_does_not_count_where_it_is_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    variant = SimpleNamespace(run=device.step)
    assert adamw_steps.step_block(variant, "cuda", 3.0)() == pytest.approx(1.0)


def test_goals() -> None:
    entry = {"copy_fraction": 0.9, "over_ours": {"median": 1.0}}
    row = {"task": "others", "variants": {
        OURS: entry, BITSANDBYTES: entry | {"over_ours": {"median": 0.97}},
    }}  # fmt: skip
    content = {"size": "flux", "device": "cuda", "cases": [row, row | {"task": "masters"}]}
    copy, theirs, torchao, masters = bench_adamw8bit.goals(content)
    assert "reached: 0.90 of the copy bandwidth, goal 0.85" in copy and "reached" in masters
    assert "MISSED: 0.97 x bitsandbytes" in theirs and "not measured" in torchao
    (line,) = bench_adamw8bit.goals(content | {"device": "cpu"})
    assert "not measured here" in line
    json.dumps(row, allow_nan=False)
