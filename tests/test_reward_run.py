"""Rewards of the configuration in a run: where their weights are, what is counted, resuming; and
the examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from flux_small import write_run as write_flux_run
from judge_server import JudgeServer, Reply
from open_clip_small import HPS
from PIL import Image
from reward_fakes import Fake, made, write_small_scorers
from tiny import TinyModel, tiny_config

from g2rpo import cli
from g2rpo.config import RewardConfig
from g2rpo.rewards import score
from g2rpo.rewards.build import make_rewards
from g2rpo.trainer import Trainer

HERE = "reward_fakes"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_scorers(tmp_path_factory.mktemp("scorers"))


class Coloured(TinyModel):
    def decode(self, latents):  # [N, 16, 4] -> [N, 3, 4, 4]
        return super().decode(latents)[:, 0].movedim(2, 1)[:, :3].unflatten(2, (4, 4))


def trainer_of(*rewards: dict, model: TinyModel | None = None, **callbacks) -> Trainer:
    config = tiny_config()
    config.model.device = "cpu"
    config.rewards = [RewardConfig(**reward) for reward in rewards]
    made_now = make_rewards(config, lambda text: None)
    return Trainer(config, model or Coloured(), made_now, **callbacks)


def fake(name: str, **keys) -> dict:
    return {"name": f"{HERE}:Fake", "label": name, "options": {"name": name}, **keys}


def test_weights_rest_but_while_they_score(monkeypatch):
    events = []
    monkeypatch.setattr(Fake, "events", events)
    trainer = trainer_of(
        fake("a", offload=True), fake("judge", offload=True, heldout=True), fake("stays"),
        on_phase=events.append,
    )  # fmt: skip
    assert events == ["a away", "judge away"]
    events.clear()
    trainer.update()
    assert events == ["prompts", "anchor", "completions", "rewards", "a back", "a away", "update"]
    events.clear()
    trainer.evaluate()
    assert events == ["evaluation", "a back", "judge back", "a away", "judge away"]


def test_weights_rest_after_a_failure(monkeypatch):
    monkeypatch.setattr(Fake, "events", events := [])
    trainer = trainer_of(fake("a", offload=True), fake("b"))
    monkeypatch.setattr(Fake, "__call__", failing := Failing())
    with pytest.raises(ConnectionError):
        trainer.update()
    assert failing.calls == 2 and events[-2:] == ["a back", "a away"]


class Failing:
    """In place of Fake's own: the second call fails."""

    def __init__(self):
        self.calls, self.original = 0, Fake.__call__

    def __get__(self, scorer, kind=None):
        def call(images, prompts):
            self.calls += 1
            if self.calls == 2:
                raise ConnectionError("gone")
            return self.original(scorer, images, prompts)

        return call


def test_a_real_scorer_leaves_the_device(files, monkeypatch):
    """Which is said to be another one than the host's, as there is no other here."""
    phases, moves = [], []
    trainer = trainer_of({"name": "hps-v2.1", "path": str(files / "hps"), "offload": True},
                         on_phase=phases.append)  # fmt: skip
    scorer = trainer.rewards[0].function
    move, offload = scorer.model.to, scorer.offload

    def move_and_tell(to):
        moves.append((phases[-1], str(to)))
        return move(to)

    monkeypatch.setattr(scorer.model, "to", move_and_tell)

    def offload_for_real():
        offload()
        scorer._away = True

    monkeypatch.setattr(scorer, "offload", offload_for_real)
    row = trainer.update()
    assert set(moves) == {("rewards", "cpu")} and len(moves) == 1  # sent away as the phase ends
    trainer.update()
    assert [phase for phase, _ in moves[1:]] == ["rewards", "rewards"]  # fetched, and sent away
    assert row["rollout/hps-v2.1/std"] > 0 and row["reward_groups"] > row["zero_spread_groups"]


def test_failed_and_truncated_are_counted(files):
    trainer = trainer_of(
        {"name": f"{HERE}:sometimes"}, fake("counts"),
        {"name": "hps-v2.1", "path": str(files / "hps"), "weight": 0.0},
        model=Coloured(prompts=["long " * 80, "short"]),
    )  # fmt: skip
    row = trainer.update()
    images = 2 * 4 * 3 * 2  # prompts, branches, positions, granularities
    assert row["rollout/sometimes/failed"] == images // 2 and row["rollout/counts/failed"] == 0
    assert row["truncated_prompts/counts"] == 3 and row["truncated_prompts/hps-v2.1"] == 1
    assert "truncated_prompts/sometimes" not in row


def test_training_and_resuming(tmp_path, files, miniature, capsys):
    """On published scorers, with CLIP's vocabulary of the pipeline that is trained."""
    (tmp_path / "hps").mkdir()
    (tmp_path / "hps" / HPS).symlink_to(files / "hps" / HPS)
    config = write_flux_run(
        tmp_path, miniature, train={"updates": 1, "evaluation_samples": 2},
        rollout={"steps": 3, "sde_positions": [0], "group_size": 2},
    )  # fmt: skip
    text = yaml.safe_load(config.read_text())
    text["rewards"] = [
        {"name": "hps-v2.1", "path": str(tmp_path / "hps"), "offload": True, "label": "hps",
         "options": {"batch_size": 4}},
        {"name": "pickscore", "path": str(files / "pick"), "dtype": "bfloat16", "heldout": True},
    ]  # fmt: skip
    config.write_text(yaml.safe_dump(text))
    run = tmp_path / "run"
    given = ["--model.device", "cpu", "--train.output", str(run)]
    assert cli.main(["train", str(config), *given]) == 0
    assert cli.main(["train", "--resume", str(run), "--train.updates", "2"]) == 0
    assert capsys.readouterr().out.count(f"Loading hps-v2.1 of {tmp_path / 'hps'}") == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert -1 < row["reward/hps/mean"] < 1
        assert -1 < row["heldout/pickscore/mean"] / torch.tensor(3.0).exp() < 1  # logit_scale
    for row in rows[1:]:
        assert row["rollout/hps/failed"] == 0 and row["truncated_prompts/hps"] == 0
        assert row["rollout/hps/std"] > 0 and row["grad_norm"] > 0
    assert rows[2]["reward/hps/mean"] != rows[0]["reward/hps/mean"]


# The examples ------------------------------------------------------------------------------------


def test_the_examples(tmp_path, files, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 224, 224, generator=generator)
    pixels = images[1].mul(255).round().to(torch.uint8).movedim(0, 2)
    Image.fromarray(pixels.numpy()).save(tmp_path / "style.png")
    images[0] = 0.5  # grey
    answers = iter(["Yes.", "no", "perhaps"])
    with JudgeServer(lambda request, number: Reply(next(answers))) as server:
        colourful, resembles, faithful = made(
            {"name": "rewards:colourful"},
            {"name": "rewards:Resembles", "path": str(files / "dfn"), "offload": True,
             "options": {"example": str(tmp_path / "style.png")}},
            {"name": "rewards:Faithful", "path": server.endpoint,
             "options": {"model": "m", "concurrency": 1}},
        )  # fmt: skip
        colours = score(colourful, images, ["a", "b", "c"])
        assert colours[0] == 0 and (colours[1:] > 0.3).all()
        likeness = score(resembles, images, ["a", "b", "c"])
        assert likeness.argmax() == 1 and likeness[1] == pytest.approx(1, abs=1e-2)
        assert likeness[0] < 0.999
        judged = score(faithful, images[1:].repeat(2, 1, 1, 1)[:3], ["a", "b", "{c}"])
    assert judged[0] == colours[1] and judged[1] == 0 and judged[2].isnan()
    assert "as many of each? {c}" in server.requests[2].text
