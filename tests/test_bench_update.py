"""bench_flux_update.py: what it configures, watches, predicts, writes and prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import bench_flux_update  # noqa: E402
import flux_results  # noqa: E402
import flux_update  # noqa: E402
from bench_flux_update import GIB  # noqa: E402
from flux_shapes import SIZES  # noqa: E402

from g2rpo.errors import ConfigurationError, TrainingError  # noqa: E402
from g2rpo.plan.cards import CARDS  # noqa: E402
from g2rpo.trainer import Trainer  # noqa: E402

TOY = SIZES["toy"]
PHASES = ["prompts", "offload", "anchor", "completions", "rewards", "update"]
# An update of a second: one position, one granularity, one pair of branches.
QUICK = ("--rollout.sde_positions", "[1]", "--rollout.granularities", "[1]",
         "--rollout.group_size", "2", "--rollout.precision", "null")  # fmt: skip


def run(path: Path, *arguments: str) -> int:
    given = ["--size", "toy", "--device", "cpu", "--output", str(path), *arguments, *QUICK]
    return bench_flux_update.main(given)


def load(path: Path) -> dict:
    return flux_results.load(path, flux_results.UPDATE)


def test_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "update.json"
    assert run(path, "--updates", "1") == 0
    said = capsys.readouterr().out
    (row,) = load(path)["cases"]
    assert row["preset"] == "flux-dev-1gpu" and row["prompts"] == row["updates"] == 1
    # So that nobody takes it for a measurement of the preset as it is.
    assert row["overrides"] == ["--train.prompts_per_update", "1", *QUICK]
    assert list(row["phases"]) == PHASES and row["peak_bytes"] == {} and row["predicted"] is None
    assert sum(row["phases"].values()) <= row["seconds"]
    # 2 anchors' steps, 14 of each branch and of the anchor, the update's forward.
    assert row["rows"] == 2 + 2 * 14 + 14 + 1 and row["messages"] == []
    assert "with --train.prompts_per_update 1 --rollout.sde_positions [1]" in said
    assert "1 prompt an update, 45 evaluations, up to 8 rows a forward; update 1 of" in said
    lines = said[said.index("phase  ") :].splitlines()
    assert [line.split("  ")[0] for line in lines[1:8]] == [*PHASES, "whole update"]
    assert "predicted" not in lines[0] and "TOY SIZE" in said and "not measured here" in said
    assert "reached" not in said and "MISSED" not in said

    # What is there is kept, but for a run that was to make more updates.
    made: list[int] = []
    update = Trainer.update

    def counted(trainer: Trainer) -> dict:
        made.append(1)
        return update(trainer)

    monkeypatch.setattr(Trainer, "update", counted)
    assert run(path, "--updates", "1", "--resume") == 0 and made == []
    assert load(path)["cases"] == [row]
    assert run(path, "--updates", "2", "--seconds", "0", "--resume") == 0 and len(made) == 1
    assert run(path, "--updates", "2", "--resume") == 0 and len(made) == 3
    (row,) = load(path)["cases"]
    assert row["updates"] == 2 and row["rows"] == 45


@pytest.mark.parametrize("phase, error, message", [
    ("weights", torch.OutOfMemoryError("tried to allocate 2 GiB\nof"),
     "out of memory in the phase 'weights': tried to allocate 2 GiB"),
    ("completions", torch.OutOfMemoryError("tried to allocate 3 GiB. GPU 0"),
     "out of memory in the phase 'completions', which no smaller batch could mend (tried"),
    ("anchor", ConfigurationError("model.x is 3; expected 4"), "model.x is 3; expected 4"),
])  # fmt: skip
def test_what_was_not_measured_is_told_with_its_phase(
    phase: str, error: Exception, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys,
) -> None:  # fmt: skip
    begin = flux_update.Watch.begin

    def begun(watch: flux_update.Watch, name: str) -> None:
        begin(watch, name)
        if name == phase:
            raise error

    monkeypatch.setattr(flux_update.Watch, "begin", begun)
    path = tmp_path / "update.json"
    assert run(path, "--updates", "1", "--rollout.branch_batch", "1") == 3
    content = load(path)
    assert content["cases"] == [] and "running" not in content
    (left,) = content["left_out"]
    assert left["what"].startswith("update-toy-flux-dev-1gpu-train-prompts-per-update-1")
    assert left["why"].startswith(message)
    assert f"not timed: {left['what']}: {message}" in capsys.readouterr().out


def test_a_case_that_killed_its_process_is_not_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "update.json"
    assert run(path, "--updates", "1") == 0
    content = load(path)
    case = content["cases"].pop()["case"]
    path.write_text(json.dumps(content | {"running": case}))
    assert run(path, "--updates", "1", "--resume") == 3
    assert "running" not in load(path)
    assert "the process ended" in load(path)["left_out"][0]["why"]


class Stub:
    """A trainer whose updates are in a list."""

    def __init__(self, found: list[dict], skipped: int = 0) -> None:
        self.found, self.skipped_updates = iter(found), skipped
        self.sampling = SimpleNamespace(update_batch=12, branch_batch=12)

    def update(self) -> dict:
        return next(self.found)


def stub_run(watch: flux_update.Watch, trainer: Stub) -> flux_update.Run:
    made = object.__new__(flux_update.Run)
    made.watch, made.trainer, made.messages = watch, trainer, ["Update 1 is skipped: why"]
    return made


def test_a_skipped_update_is_none() -> None:
    skipping = stub_run(flux_update.Watch("cpu"), Stub([{}], skipped=1))
    with pytest.raises(TrainingError, match="update 1 was skipped; Update 1 is skipped: why"):
        next(skipping.updates(1, float("inf")))


def test_peaks_are_of_a_phase_and_of_an_update_each(monkeypatch: pytest.MonkeyPatch) -> None:
    highest = SimpleNamespace(bytes=0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: highest.bytes)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(highest, "bytes", 0))
    watch = flux_update.Watch("cuda")

    def phase(name: str, held: int) -> None:
        watch.begin(name)
        highest.bytes = held

    class Trainer(Stub):
        def update(self) -> dict:
            found = super().update()
            for name, held in found.pop("held"):
                phase(name, held)
            return found

    phase("weights", 900)
    first = {"held": [("anchor", 50), ("update", 70), ("anchor", 60)], "seconds/anchor": 1.5}
    second = {"held": [("anchor", 30), ("update", 80)], "seconds/anchor": 1.0, "ratio_max": 1.0}
    rows = list(stub_run(watch, Trainer([first, second])).updates(2, float("inf")))
    assert [row["peak_bytes"] for row in rows] == [
        {"anchor": 60, "update": 70}, {"anchor": 30, "update": 80}]  # fmt: skip
    assert [row["phases"] for row in rows] == [{"anchor": 1.5}, {"anchor": 1.0}]
    assert rows[1]["batches"] == {"anchor": 12, "branch": 12} and rows[1]["updates"] == 2


def test_the_prediction_is_the_plans() -> None:
    """Of one prompt, and of the preset as it is."""
    from g2rpo.plan import make_plan

    config, changes = flux_update.configure("flux-dev-1gpu", SIZES["flux"], "cpu", 16, [])
    assert changes == [] and config.train.prompts_per_update == 16
    told = flux_update.predict(config, CARDS["h100-80gb"])
    assert config.data.embeddings is None  # it is left alone
    plan = make_plan(config, CARDS["h100-80gb"])
    totals = plan.memory.totals
    assert told["peak_bytes"]["update"] == max(totals["backward"], totals["step"])
    assert told["peak"] == max(told["peak_bytes"].values())
    assert told["peak_bytes"]["completions"] == totals["completions"]
    assert told["whole"] == pytest.approx(sum(told["seconds"].values()))
    assert told["whole"] == pytest.approx(plan.work.seconds)
    config, changes = flux_update.configure("flux-dev-1gpu", SIZES["flux"], "cpu", 1, [])
    assert changes == ["--train.prompts_per_update", "1"]
    one = flux_update.predict(config, CARDS["h100-80gb"])
    assert one["whole"] < told["whole"] / 10 and one["peak"] < told["peak"]


def test_a_card_that_nobody_knows_has_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="NVIDIA H200", total_memory=3, multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert flux_update.this_card() is CARDS["h200"]
    found.name = "A Card"
    card = flux_update.this_card()
    assert (card.name, card.bytes, card.multiprocessors, card.bf16) == ("A Card", 3, 7, 0)
    config, _ = flux_update.configure("flux-dev-1gpu", SIZES["flux"], "cpu", 1, [])
    told = flux_update.predict(config, card)
    assert told["whole"] is None and told["seconds"]["update"] is None and told["peak"] > GIB


def row(measured: float, predicted: float | None) -> dict:
    """Of peaks, in GiB."""
    told = predicted and {"peak_bytes": {"update": predicted * GIB}, "peak": predicted * GIB,
                          "seconds": {"update": None}, "whole": 86.0}  # fmt: skip
    return {"preset": "flux-dev-1gpu", "prompts": 1, "phases": {"prompts": 0.5, "update": 4.0},
            "peak_bytes": {"prompts": GIB, "update": int(measured * GIB)}, "seconds": 90.0,
            "predicted": told}  # fmt: skip


def test_measured_and_predicted_stand_beside_one_another() -> None:
    prompts, update, whole = bench_flux_update.cells(row(70.0, 72.0))
    assert prompts["predicted peak"] == prompts["predicted time"] == "–"
    assert update["peak memory"] == "70.00 GiB" and update["predicted peak"] == "72.00 GiB"
    assert update["time"] == "4 s" and update["predicted time"] == "–"
    assert whole == {
        "phase": "whole update", "time": "90 s", "predicted time": "86 s",
        "peak memory": "70.00 GiB", "predicted peak": "72.00 GiB",
    }  # fmt: skip


@pytest.mark.parametrize("measured, predicted, words", [
    (70.0, 72.0, ["reached", "reached"]), (70.0, 66.6, ["reached", "reached"]),
    (70.0, 66.4, ["reached", "MISSED"]), (76.5, 72.0, ["MISSED", "MISSED"]),
    (70.0, None, ["reached", "not measured"]),
])  # fmt: skip
def test_goals(measured: float, predicted: float | None, words: list[str]) -> None:
    content = {"size": "flux", "device": "cuda", "cases": [row(measured, predicted)]}
    found = bench_flux_update.goals(content)
    assert all(word in line for word, line in zip(words, found, strict=True)), found
    other = row(measured, predicted) | {"preset": "flux-lora"}  # with no goal of its own
    assert bench_flux_update.goals(content | {"cases": [other]})[0].split()[0] == "flux-lora,"
    assert "not measured here" in bench_flux_update.goals(content | {"size": "toy"})[0]


@pytest.mark.parametrize("arguments, message", [
    (("--preset", "digits"), "--preset is 'digits', which trains the digits"),
    (("--preset", "nothing"), "'nothing' is neither a preset"),
    (("--prompts", "0"), "--prompts is 0; expected at least 1"),
    (("--updates", "0"), "--updates is 0; expected at least 1"),
    (("--train.nothing", "3"), "train.nothing"),
])  # fmt: skip
def test_wrong_options_are_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / "update.json"
    try:
        code = run(path, *arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err and not path.exists()


def test_without_what_the_trainer_needs(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.delitem(sys.modules, "flux_update")
    monkeypatch.setitem(sys.modules, "g2rpo.arguments", None)
    assert run(tmp_path / "update.json") == 2
    assert "g2rpo.arguments" in capsys.readouterr().err
