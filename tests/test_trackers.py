"""Trackers get what metrics.jsonl gets, go on where they were, and never end a run.

TensorBoard's files are written and read for real. wandb and trackio are stand-ins with the
signatures of wandb 0.31 and trackio 0.43, as far as they are called.
"""

from __future__ import annotations

import errno
import json
import math
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from g2rpo import trackers
from g2rpo.config import Config
from g2rpo.errors import ConfigurationError
from g2rpo.trackers import Tracker, make_tracker


def row(update: int, **more: object) -> dict[str, object]:
    return {"update": update, "seconds/anchor": 1.5, "loss": update / 8, **more}


def grid(folder: Path, colour: str = "red") -> Path:
    path = folder / f"{colour}.png"
    Image.new("RGB", (40, 30), colour).save(path)
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_no_tracker_does_nothing(run_dir: Path) -> None:
    tracker = make_tracker(None, run_dir, Config(), 0)
    tracker.log(row(0))
    tracker.image(run_dir / "none.png", 0)
    tracker.finish()
    assert not list(run_dir.iterdir())


# TensorBoard, for real


def events(run_dir: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(tag)]


def test_tensorboard_has_every_finite_number_at_its_update(run_dir: Path) -> None:
    tracker = make_tracker("tensorboard", run_dir, Config(), 0)
    tracker.log(row(0, **{"reward/fit/mean": 0.25}))
    tracker.log(row(1, **{"reward/fit/mean": None, "grad_norm": math.nan}))
    tracker.log(row(2, **{"reward/fit/mean": 0.5, "grad_norm": math.inf, "note": "text"}))
    tracker.finish()
    assert points(run_dir, "reward/fit/mean") == [(0, 0.25), (2, 0.5)]  # a gap, not a 0
    assert points(run_dir, "loss") == [(0, 0.0), (1, 0.125), (2, 0.25)]
    assert set(events(run_dir).Tags()["scalars"]) == {"reward/fit/mean", "loss", "seconds/anchor"}


def test_tensorboard_shows_the_grids(run_dir: Path) -> None:
    tracker = make_tracker("tensorboard", run_dir, Config(), 0)
    tracker.image(grid(run_dir, "red"), 0)
    tracker.image(grid(run_dir, "blue"), 10)
    tracker.finish()
    found = events(run_dir).Images("samples")
    assert [(image.step, image.width, image.height) for image in found] == [
        (0, 40, 30), (10, 40, 30),
    ]  # fmt: skip
    (run_dir / "back.png").write_bytes(found[1].encoded_image_string)
    with Image.open(run_dir / "back.png") as back:
        assert back.getpixel((20, 15)) == (0, 0, 255)


def test_tensorboard_has_the_configuration(run_dir: Path) -> None:
    make_tracker("tensorboard", run_dir, Config(), 0).finish()
    found = events(run_dir)
    (text,) = found.Tensors(found.Tags()["tensors"][0])
    assert b'"branch_batch": 16' in text.tensor_proto.string_val[0]


def test_tensorboard_after_a_resume_has_each_update_once(run_dir: Path) -> None:
    killed = make_tracker("tensorboard", run_dir, Config(), 0)
    for update in range(6):
        killed.log({"update": update, "loss": 1.0})
    killed.image(grid(run_dir), 5)  # no finish: the process is gone
    resumed = make_tracker("tensorboard", run_dir, Config(), 4)
    for update in range(4, 8):
        resumed.log({"update": update, "loss": 2.0})
    resumed.finish()
    assert points(run_dir, "loss") == [(u, 1.0) for u in range(4)] + [(u, 2.0) for u in range(4, 8)]
    assert events(run_dir).Images("samples") == []
    again = make_tracker("tensorboard", run_dir, Config(), 0)  # no checkpoint: from the beginning
    again.log({"update": 0, "loss": 3.0})
    again.finish()
    assert points(run_dir, "loss") == [(0, 3.0)]


def test_a_full_disk_is_told_though_a_thread_meets_it(run_dir: Path, monkeypatch) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    said: list[str] = []
    tracker = make_tracker("tensorboard", run_dir, Config(), 0, on_message=said.append)

    def full(self, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ended = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda arguments: ended.set())
    monkeypatch.setattr(RecordWriter, "write", full)
    tracker.log(row(1))
    assert ended.wait(30)
    tracker.log(row(2))
    tracker.finish()
    assert len(said) == 1 and "tensorboard" in said[0] and "No space left on device" in said[0]


# wandb and trackio


class FakeWandb(ModuleType):
    """Remembers runs by id as its server does."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, SimpleNamespace] = {}
        self.error: Exception | None = None

    def init(self, *, project, id, resume, name, dir, config, settings):
        if self.error is not None:
            raise self.error
        assert (project, resume, settings) == ("g2rpo", "allow", ("console off, quiet", True))
        run = self.runs.setdefault(id, SimpleNamespace(history=[], metrics=[], configs=[]))
        run.name, run.dir, run.finished = name, dir, 0
        run.configs.append(config)

        def log(data, step=None, commit=None):
            assert step is None  # wandb would drop what lies behind its counter
            json.dumps({key: value for key, value in data.items() if key != "samples"})
            run.history.append(data)

        def finish(exit_code=None):
            run.finished += 1

        run.log, run.finish = log, finish
        run.define_metric = lambda name, step_metric=None: run.metrics.append((name, step_metric))
        return run

    def Settings(self, *, console, quiet):
        return f"console {console}, quiet", quiet

    def Image(self, data_or_path):
        return "image", Path(data_or_path).read_bytes()


class FakeTrackio(ModuleType):
    """Remembers runs by project and name."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.runs: dict[str, SimpleNamespace] = {}
        self.current: SimpleNamespace | None = None

    def init(self, project, name=None, *, resume="never", config=None, embed=True):
        assert (project, resume, embed) == ("g2rpo", "allow", False)
        run = self.runs.setdefault(name, SimpleNamespace(history=[], configs=[]))
        run.configs.append(json.dumps(config))
        run.log = lambda metrics, step=None: run.history.append((step, metrics))
        self.current = run
        return run

    def finish(self):
        if self.current is None:
            raise RuntimeError("Call trackio.init() before trackio.finish().")
        self.current = None

    def Image(self, value, caption=None):
        return "image", Path(value).read_bytes()


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def trackio(monkeypatch) -> FakeTrackio:
    fake = FakeTrackio()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return fake


def test_wandb_gets_rows_and_grids_over_their_update(run_dir: Path, wandb: FakeWandb) -> None:
    tracker = make_tracker("wandb", run_dir, Config(), 0)
    picture = grid(run_dir)
    tracker.image(picture, 0)
    tracker.log(row(0, **{"reward/fit/mean": None, "grad_norm": math.nan}))
    tracker.finish()
    (run,) = wandb.runs.values()
    assert run.history == [
        {"samples": ("image", picture.read_bytes()), "update": 0},
        {"update": 0, "seconds/anchor": 1.5, "loss": 0.0},
    ]
    assert run.metrics == [("update", None), ("*", "update")]
    assert (run.name, run.dir, run.finished) == ("run", str(run_dir), 1)
    assert run.configs[0]["rollout"]["branch_batch"] == 16


def test_wandb_after_a_resume_is_the_same_run_with_the_redone_updates(
    run_dir: Path, wandb: FakeWandb
) -> None:
    killed = make_tracker("wandb", run_dir, Config(), 0)
    for update in range(4):
        killed.log({"update": update, "loss": 1.0})
    resumed = make_tracker("wandb", run_dir, Config(), 2)
    for update in range(2, 5):
        resumed.log({"update": update, "loss": 1.0})
    (run,) = wandb.runs.values()
    assert [data["update"] for data in run.history] == [0, 1, 2, 3, 2, 3, 4]


def test_trackio_gets_rows_and_grids_and_goes_on_in_the_same_run(
    run_dir: Path, trackio: FakeTrackio
) -> None:
    picture = grid(run_dir)
    killed = make_tracker("trackio", run_dir, Config(), 0)
    killed.image(picture, 0)
    killed.log(row(0, **{"reward/fit/mean": None}))
    resumed = make_tracker("trackio", run_dir, Config(), 0)
    resumed.log(row(0))
    resumed.finish()
    ((name, run),) = trackio.runs.items()
    assert name.startswith("run-")
    numbers = {"seconds/anchor": 1.5, "loss": 0.0}
    assert run.history == [
        (0, {"samples": ("image", picture.read_bytes())}), (0, numbers), (0, numbers),
    ]  # fmt: skip
    assert resumed.failed is None and trackio.current is None


def test_runs_of_one_name_in_two_places_are_two(tmp_path: Path, wandb, trackio) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        for name in ("wandb", "trackio"):
            make_tracker(name, tmp_path / parent / "run", Config(), 0)
    assert len(wandb.runs) == len(trackio.runs) == 2
    kept = json.loads((tmp_path / "a" / "run" / "tracker.json").read_text())
    assert kept["wandb"]["id"] in wandb.runs and kept["trackio"]["name"] in trackio.runs


# What can go wrong


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_what_is_not_installed_is_named_with_the_way_to_get_it(
    run_dir: Path, monkeypatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigurationError, match=f"train.tracker is '{name}'.*pip install {name}$"):
        make_tracker(name, run_dir, Config(), 0)
    assert not list(run_dir.iterdir())


def test_a_folder_called_wandb_is_not_taken_for_wandb(run_dir: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # what importing a folder gives
    with pytest.raises(ConfigurationError, match="pip install wandb"):
        make_tracker("wandb", run_dir, Config(), 0)


def test_an_unknown_tracker_is_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigurationError, match="'mlflow'; expected one of .*tensorboard"):
        make_tracker("mlflow", run_dir, Config(), 0)


def test_what_does_not_start_ends_the_run_before_it_began(run_dir: Path, wandb: FakeWandb) -> None:
    wandb.error = RuntimeError("No API key configured. Use `wandb login` to log in.")
    with pytest.raises(ConfigurationError, match="train.tracker is 'wandb'.*wandb login"):
        make_tracker("wandb", run_dir, Config(), 0)


@pytest.mark.parametrize("text", ["{", "[]", '{"wandb": {}}', '{"wandb": {"id": 3}}'])
def test_a_damaged_identity_is_not_replaced_by_another(run_dir: Path, wandb, text: str) -> None:
    (run_dir / "tracker.json").write_text(text)
    with pytest.raises(ConfigurationError, match="tracker.json is damaged"):
        make_tracker("wandb", run_dir, Config(), 0)
    assert (run_dir / "tracker.json").read_text() == text and not wandb.runs


@pytest.mark.parametrize("method", ["log", "image", "finish"])
def test_a_tracker_that_fails_says_so_once_and_is_left_alone(method: str, tmp_path: Path) -> None:
    calls: list[str] = []

    def backend_method(name: str):
        def call(*arguments: object) -> None:
            calls.append(name)
            if name == method:
                raise ConnectionError("the network is down")

        return call

    backend = SimpleNamespace(**{name: backend_method(name) for name in ("log", "image", "finish")})
    said: list[str] = []
    tracker = Tracker("wandb", backend, said.append)
    for update in range(3):
        tracker.log(row(update))
        tracker.image(tmp_path / "grid.png", update)
    tracker.finish()
    assert calls.count(method) == 1 and calls[-1] == method
    assert len(said) == 1 and "wandb" in said[0] and "the network is down" in said[0]
    assert isinstance(tracker.failed, ConnectionError)


def test_ctrl_c_is_not_an_error_of_the_tracker() -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tracker("wandb", SimpleNamespace(log=interrupted)).log(row(0))


def test_every_choice_of_the_configuration_has_its_tracker() -> None:
    from typing import get_args, get_type_hints

    from g2rpo.config import TrainConfig

    choices = get_args(get_args(get_type_hints(TrainConfig)["tracker"])[0])
    assert set(choices) == set(trackers.BACKENDS)
