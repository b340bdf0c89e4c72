"""What goes wrong in a run: said, counted, survived; nothing that was there is lost."""

import copy
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from test_run import final_weights
from tiny import PROMPTS, TinyModel, brightness, tiny_config

from g2rpo import checkpoint, run
from g2rpo.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from g2rpo.errors import ConfigurationError, TrainingError
from g2rpo.policy import Conditions
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer
from g2rpo.weights import FullWeights

REWARDS = [Reward("brightness", brightness)]


class Poisoned(TinyModel):
    """Some prompts' embeddings are NaN, and so is all the policy says of them."""

    poison = ("north",)

    def embed(self, prompts) -> Conditions:
        conditions = super().embed(prompts)
        for row, prompt in enumerate(prompts):
            if prompt in self.poison:
                conditions.prompt_embeds[row] = torch.nan
        return conditions


def trainer_of(model, messages, prompts_per_update=2, reward=brightness, **rollout) -> Trainer:
    config = tiny_config(**rollout)
    config.train.prompts_per_update = prompts_per_update
    return Trainer(config, model, [Reward("brightness", reward)], on_message=messages.append)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.policy.transformer.state_dict())


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_prompt_that_breaks_the_loss_is_named_and_left_out():
    messages: list[str] = []
    trainer = trainer_of(Poisoned(), messages)
    moved = {}
    for update in range(1, 4):  # an epoch of 6 prompts: each is in exactly one of these
        prompts = [PROMPTS[i] for i in trainer.sampler.ids(update)]
        before, row = weights(trainer), trainer.update()
        moved["north" in prompts] = not same(before, weights(trainer))
        assert (row["grad_norm"] > 0) == ("north" not in prompts)
    assert moved == {True: False, False: True}
    assert trainer.skipped_updates == 1 and trainer.skipped_in_a_row in (0, 1)
    assert len(messages) == 1 and "the loss is not finite (prompt 'north')" in messages[0]


def test_rewards_never_see_images_that_are_not_finite():
    def picky(images, prompts):
        assert images.isfinite().all() and "north" not in prompts
        return brightness(images, prompts)

    messages: list[str] = []
    trainer = trainer_of(Poisoned(), messages, prompts_per_update=6, reward=picky, branch_batch=7)
    row = trainer.update()
    assert 0 < row["failed_groups"] < row["reward_groups"] and len(messages) == 1
    row, images, scores = trainer.evaluate()
    assert images[trainer.evaluation_prompts.index("north")].isnan().all()
    failed = int(scores.isnan().sum())
    assert row["reward/brightness/failed"] == failed == 1
    assert row["reward/brightness/mean"] > 0


def test_a_rollout_that_is_broken_altogether_is_not_scored():
    def never(images, prompts):
        raise AssertionError("nothing here can be scored")

    messages: list[str] = []
    model = Poisoned()
    model.poison = PROMPTS
    trainer = trainer_of(model, messages, prompts_per_update=1, reward=never)
    before = weights(trainer)
    row = trainer.update()
    assert same(before, weights(trainer)) and row["skipped_updates"] == 1
    assert row["update"] == 1 and row["evaluations"] == trainer.evaluations_per_update
    (prompt,) = (PROMPTS[i] for i in trainer.sampler.ids(1))
    assert messages == [f"Update 1 is skipped: the rollout is not finite (prompt {prompt!r})"]


def test_a_gradient_that_is_not_finite_moves_nothing():
    """The rollouts are sound, so it cannot be known which prompt it was: all are named."""
    messages: list[str] = []
    trainer = trainer_of(TinyModel(), messages)
    trainer.update()
    parameter = trainer.improver.parameters[3]
    handle = parameter.register_hook(lambda grad: grad * torch.inf)
    before, moments = weights(trainer), copy.deepcopy(trainer.improver.optimizer.state_dict())
    trainer.update()
    assert same(before, weights(trainer)) and trainer.skipped_in_a_row == 1
    for name, state in trainer.improver.optimizer.state_dict()["state"].items():
        assert same(state, moments["state"][name])
    first = PROMPTS[trainer.sampler.ids(2)[0]]
    expected = f"the gradient is not finite (prompt {first!r}, and 1 more)"
    assert messages == [f"Update 2 is skipped: {expected}"]
    handle.remove()
    trainer.update()
    assert trainer.skipped_in_a_row == 0 and not same(before, weights(trainer))


def test_several_in_a_row_end_the_run_with_a_checkpoint(tmp_path, monkeypatch, capsys):
    model = Poisoned()
    monkeypatch.setattr(run, "load_model", lambda config, **_: model)
    config = tiny_config()
    config.rewards[0].name = "tiny:brightness"
    config.train.updates, config.train.max_skipped, config.train.save_every = 9, 2, 100
    config.train.prompts_per_update, config.train.evaluate_every = 1, 100
    model.poison = PROMPTS
    with pytest.raises(TrainingError, match="the last 2 updates were skipped"):
        run.start(config, tmp_path / "run")
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]
    out = capsys.readouterr().out
    assert out.count("is skipped: the rollout is not finite") == 2
    model.poison = ()  # mended: the run goes on from there
    assert run.resume(config, tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(10))
    assert rows[-1]["skipped_updates"] == 2


# Memory -----------------------------------------------------------------------------------------


def limited(trainer: Trainer, rows: int, with_gradients: bool = False) -> Trainer:
    """A GPU that holds so many rows of a forward and no more."""
    forward = trainer.policy.transformer.forward

    def forward_if_it_fits(*arguments, **keywords):
        held = len(keywords["hidden_states"])
        if torch.is_grad_enabled() == with_gradients and held > rows:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {held} rows. Of")
        return forward(*arguments, **keywords)

    trainer.policy.transformer.forward = forward_if_it_fits
    return trainer


def test_out_of_memory_halves_the_batch_and_says_so():
    messages: list[str] = []
    trainer = limited(trainer_of(TinyModel(), messages, branch_batch=16), rows=5)
    row = trainer.update()
    assert trainer.sampling.branch_batch == 4 and trainer.sampling.update_batch == 2
    assert messages[0].startswith(
        "Out of memory in the phase 'completions': from here on 8 rows a forward in it, not 16 "
        "(CUDA out of memory"
    )
    assert len(messages) == 2
    plain = trainer_of(TinyModel(), [], branch_batch=4)
    assert plain.update()["loss"] == row["loss"] and same(weights(plain), weights(trainer))
    trainer.evaluate()
    trainer.update()
    assert len(messages) == 2  # once and for all

    again = trainer_of(TinyModel(), messages, branch_batch=16)
    again.load_state_dict(trainer.state_dict(), trainer.weights.parameters)
    assert again.sampling.branch_batch == 4


def test_out_of_memory_in_the_update_halves_the_anchors_batch():
    messages: list[str] = []
    trainer = trainer_of(TinyModel(), messages, prompts_per_update=4)
    limited(trainer, rows=2, with_gradients=True)
    row = trainer.update()
    assert trainer.sampling.update_batch == 2 and trainer.sampling.branch_batch == 8
    assert row["ratio_max"] == 1.0  # the anchor was run anew in the same batches as the update
    assert len(messages) == 1 and "'update': from here on 2 rows a forward" in messages[0]


@pytest.mark.parametrize("with_gradients", [False, True])
def test_out_of_memory_with_one_row_is_an_error(with_gradients):
    trainer = trainer_of(TinyModel(), [])
    limited(trainer, rows=0, with_gradients=with_gradients)
    before = weights(trainer)
    with pytest.raises(TrainingError, match="no smaller batch .* model.gradient_checkpointing"):
        trainer.update()
    assert same(before, weights(trainer)) and not trainer.midway and trainer.updates == 0


def test_out_of_memory_in_a_step_is_an_error():
    """The weights may have moved: there is nothing to make again."""
    trainer = trainer_of(TinyModel(), [])

    def step():
        raise torch.OutOfMemoryError("CUDA out of memory. Of moments")

    trainer.improver.optimizer.step = step
    with pytest.raises(TrainingError, match="in the phase 'update'"):
        trainer.update()
    assert trainer.midway


# Disks and processes ----------------------------------------------------------------------------


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as writing to a full disk does."""
    before, writes = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # or what is imported now would be cut short in its cache
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = writes


@pytest.mark.parametrize("size", [400_000, 1_500_000])  # the weights do not fit; the state does not
def test_a_full_disk(tmp_path, monkeypatch, size):
    """A checkpoint that does not fit: the one before is intact, and the run can go on from it."""
    monkeypatch.setattr(run, "load_model", lambda config, **_: TinyModel())
    config = tiny_config()
    config.rewards[0].name = "tiny:brightness"
    config.train.updates, config.train.save_every = 2, 1
    run_dir, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert run.start(config, run_dir) == 0
    before = {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()}
    config.train.updates = 3
    with small_files(size), pytest.raises(TrainingError) as caught:
        run.resume(config, run_dir)
    assert "step-000003 cannot be written" in str(caught.value)
    assert "step-000002 is intact. Make room, then go on with --resume" in str(caught.value)
    assert {p: p.read_bytes() for p in checkpoints.rglob("*") if p.is_file()} == before
    assert not list(checkpoints.glob(".*")), "what was written of it takes no room"
    assert run.resume(config, run_dir) == 0
    assert run.start(config, tmp_path / "straight") == 0
    assert same(final_weights(run_dir, 3), final_weights(tmp_path / "straight", 3))


def test_killed_at_every_moment_of_a_checkpoint(tmp_path, monkeypatch):
    """Between any two steps that reach the disk, one whole checkpoint can be loaded."""
    weights = FullWeights(TinyModel().policy.transformer)
    average = {name: p.detach() * 2 for name, p in weights.parameters.items()}
    calls, die_at = [], 0

    class Killed(BaseException):
        pass

    def dying(function):
        def call(*arguments, **keywords):
            calls.append(function)
            if len(calls) == die_at:
                raise Killed
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(checkpoint, "_sync", dying(checkpoint._sync))
    monkeypatch.setattr(checkpoint.torch, "save", dying(torch.save))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", dying(checkpoint.shutil.rmtree))
    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(weights, "save", dying(weights.save))
    save_checkpoint(tmp_path, 1, weights, average, {"updates": 1}, keep_last=1)
    update, deaths, found = 1, 0, set()
    while True:
        update, die_at = update + 1, deaths + 1
        calls.clear()
        try:
            save_checkpoint(tmp_path, update, weights, average, {"updates": update}, keep_last=1)
        except Killed:
            deaths += 1
        else:
            break
        loaded = load_checkpoint(tmp_path, weights, with_average=True)
        assert loaded.update == loaded.state["updates"] <= update and not loaded.skipped
        assert all(torch.equal(loaded.average[n], average[n]) for n in average)
        found.add(update - loaded.update)
    assert deaths >= 12 and 0 in found
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{update:06d}"]
    assert len(list(tmp_path.iterdir())) == 1


def test_two_processes_in_one_run_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_model", lambda config, **_: TinyModel())
    config = tiny_config()
    config.train.updates = 1
    with FileLock(tmp_path / ".lock"):
        with pytest.raises(ConfigurationError, match="another process is training in"):
            run.start(config, tmp_path)
        with pytest.raises(ConfigurationError, match="another process is training in"):
            run.resume(config, tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    assert run.start(config, tmp_path) == 0
