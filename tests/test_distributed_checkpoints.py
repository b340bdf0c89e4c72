"""Checkpoints written by two ranks and read by one process, and the other way round."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Started
from safetensors.torch import load_file
from test_distributed import EIGHT_BIT, SHARD, config_of, largest, make_trainer, mean, whole
from torch import Tensor
from torch.distributed.tensor import DTensor

from g2rpo.checkpoint import load_checkpoint, save_checkpoint
from g2rpo.distributed import Ranks
from g2rpo.distributed.shards import whole_values
from g2rpo.trainer import Trainer

UPDATES, SAVED = 4, 2
EMA = {"train.ema": 0.9}
VARIANTS = {
    "replicate": EMA,
    "shard": {**SHARD, **EMA},
    "replicate, adamw8bit": EIGHT_BIT,
    "shard, adamw8bit": {**SHARD, **EIGHT_BIT, **EMA},
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


# What the processes do. -------------------------------------------------------------------------


def states(trainer: Trainer) -> dict[str, Tensor]:
    """The optimizer's, whole."""
    return {
        f"{index}.{key}": (v.full_tensor() if isinstance(v, DTensor) else v.clone()).cpu()
        for index, values in trainer.improver.optimizer.state_dict()["state"].items()
        for key, v in values.items() if isinstance(v, Tensor)
    }  # fmt: skip


def as_before(step: Path, state: dict[str, Any]) -> None:
    """Make of a checkpoint what earlier versions wrote: everything but weights in one file."""
    shutil.rmtree(step / "optimizer")
    torch.save(state, step / "training_state.pt")
    files = [p for p in step.rglob("*") if p.is_file() and p.name != "manifest.json"]
    sizes = {path.relative_to(step).as_posix(): path.stat().st_size for path in files}
    (step / "manifest.json").write_text(json.dumps({"update": SAVED, "bytes": sizes}))


def train(name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """An undisturbed run that writes checkpoints on its way; alone also an older version's."""
    trainer = make_trainer(config_of(VARIANTS[name]), ranks)
    saved = None
    for _ in range(UPDATES):
        trainer.update()
        if trainer.updates <= SAVED:
            average = None if trainer.average is None else trainer.average.values
            state = trainer.state_dict()
            save_checkpoint(
                folder / name, trainer.updates, trainer.weights, average, state, 0, ranks
            )
            if trainer.updates == SAVED:
                saved = states(trainer)
    if ranks.watch is None:
        before = make_trainer(config_of(VARIANTS[name]), ranks)
        for _ in range(SAVED):
            before.update()
        shutil.copytree(folder / name, folder / f"{name}, before")
        as_before(folder / f"{name}, before" / f"step-{SAVED:06d}", before.state_dict())
    return {"saved": saved, **ended(trainer)}


def ended(trainer: Trainer) -> dict[str, Any]:
    average = None
    if trainer.average is not None:
        average = dict(whole_values(trainer.weights.parameters, trainer.average.values, keep=True))
    return {"weights": whole(trainer), "average": average, "row": trainer.row}


def go_on(name: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Resume from the newest checkpoint in the folder, and end as `train` does."""
    trainer = make_trainer(config_of(VARIANTS[name]), ranks)
    found = load_checkpoint(
        folder, trainer.weights, trainer.improver.optimizer, trainer.average is not None, ranks
    )
    trainer.load_state_dict(found.state, found.weights, found.average)
    loaded, start = states(trainer), trainer.updates
    while trainer.updates < UPDATES:
        trainer.update()
    return {"start": start, "skipped": found.skipped, "loaded": loaded, **ended(trainer)}


# What the tests see. ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Started, Started]:
    """Where runs on one process, `one`, and on two ranks, `two`, have left their checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    both = []
    for count, kind in ((0, "one"), (2, "two")):
        cases = {name: partial(train, name, folder / kind) for name in VARIANTS}
        both.append(Started(count, cases, folder / f"{kind}.out"))
    return folder, *(each.wait() for each in both)


@pytest.fixture(scope="module")
def resumed(first: tuple[Path, Started, Started]) -> tuple[Started, Started]:
    """One process that has gone on from two ranks' checkpoints, and the other way round."""
    folder, *both = first
    for started in both:
        for name in VARIANTS:
            started.results(name)
    one = {name: partial(go_on, name, folder / "two" / name) for name in VARIANTS}
    two = {name: partial(go_on, name, folder / "one" / name) for name in VARIANTS}
    for name in VARIANTS:
        cases = two if name.startswith("shard") else one
        cases[f"{name}, before"] = partial(go_on, name, folder / "one" / f"{name}, before")
    for damage in (truncate, corrupt):
        damaged = folder / damage.__name__
        shutil.copytree(folder / "two" / "shard", damaged)
        damage(sorted((damaged / f"step-{SAVED:06d}" / "optimizer").iterdir())[-1])
        two[damage.__name__] = partial(go_on, "shard", damaged)
    both = Started(0, one, folder / "one.resumed"), Started(2, two, folder / "two.resumed")
    return both[0].wait(), both[1].wait()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def corrupt(file: Path) -> None:
    """The same size, and a header that is none."""
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"?" * 64 + data[72:])


def assert_same_end(name: str, found: dict[str, Any], undisturbed: dict[str, Any]) -> None:
    ends = [(found["weights"], undisturbed["weights"])]
    if undisturbed["average"] is not None:
        ends.append((found["average"], undisturbed["average"]))
    for ours, theirs in ends:
        if "adamw8bit" in name:  # as far apart as one process and two ranks are in an update
            assert mean(ours, theirs) < 2e-5
        else:
            assert largest(ours, theirs) < 1e-6
    assert found["row"]["update"] == undisturbed["row"]["update"] == UPDATES
    assert found["row"]["evaluations"] == undisturbed["row"]["evaluations"]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("way", ["two ranks to one", "one to two ranks"])
def test_goes_on_with_another_number_of_ranks(name, way, first, resumed) -> None:
    """From the very states that were written, and to the end of the run that wrote them."""
    here, there = (1, 0) if way == "two ranks to one" else (0, 1)
    undisturbed = first[1 + here].results(name)
    for found in resumed[there].results(name):
        assert found["start"] == SAVED and found["skipped"] == ()
        assert found["loaded"].keys() == undisturbed[0]["saved"].keys()
        for key, value in undisturbed[0]["saved"].items():
            assert torch.equal(found["loaded"][key], value), key
        assert_same_end(name, found, undisturbed[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_an_older_checkpoint_loads(name, first, resumed) -> None:
    """Whose optimizer is all in training_state.pt: on one process, and on two that share it."""
    undisturbed = first[1].results(name)[0]
    sharded = name.startswith("shard")
    for found in resumed[sharded].results(f"{name}, before"):
        assert found["start"] == SAVED and found["skipped"] == ()
        for key, value in undisturbed["saved"].items():
            assert torch.equal(found["loaded"][key], value), key
        assert_same_end(name, found, undisturbed)


@pytest.mark.parametrize("damage", ["truncate", "corrupt"])
def test_damage_on_one_rank_is_damage_for_all(damage, first, resumed) -> None:
    """Both pass over to the checkpoint before, and end where the run that wrote it has."""
    undisturbed = first[2].results("shard")[0]
    for found in resumed[1].results(damage):
        assert found["start"] == SAVED - 1
        assert [text.split(":")[0] for text in found["skipped"]] == [f"step-{SAVED:06d}"]
        assert_same_end("shard", found, undisturbed)


@pytest.mark.parametrize("name", ["replicate", "shard", "shard, adamw8bit"])
def test_files_are_those_of_one_process(name, first) -> None:
    """One diffusers folder of the weights, another of their average; the optimizer in parts."""
    from diffusers import FluxTransformer2DModel

    folder, *_ = first
    one, two = (folder / kind / name / f"step-{SAVED:06d}" for kind in ("one", "two"))
    for inside in ("transformer", "ema"):
        assert {p.name for p in (two / inside).iterdir()} == {"config.json", WEIGHTS}
        ours, theirs = (load_file(step / inside / WEIGHTS) for step in (two, one))
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
            n: (t.shape, t.dtype) for n, t in theirs.items()
        }
        assert mean(ours, theirs) < 2e-5 if "8bit" in name else largest(ours, theirs) < 1e-6
        configs = [(step / inside / "config.json").read_text() for step in (two, one)]
        assert configs[0] == configs[1]
        dtype = ours["proj_out.weight"].dtype
        model = FluxTransformer2DModel.from_pretrained(two / inside, torch_dtype=dtype)
        assert all(torch.equal(t, ours[n]) for n, t in model.state_dict().items())
    if "shard" in name:
        parts = [sorted(p.stat().st_size for p in (s / "optimizer").iterdir()) for s in (two, one)]
        assert len(parts[0]) == 2 and len(parts[1]) == 1
        assert parts[0][1] < 0.6 * parts[1][0]  # nobody has written all of it
    names = [{p.relative_to(step).parts[0] for p in step.rglob("*")} for step in (two, one)]
    assert names[0] == names[1] == {
        "transformer", "ema", "optimizer", "training_state.pt", "manifest.json",
    }  # fmt: skip
