"""What evaluations keep: scores in files, win rates and intervals, prompts of their own."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hacked_runs import Train
from tiny import PROMPTS, tiny_config

from g2rpo.evaluate.statistics import estimate
from g2rpo.evaluations import read_scores, scores_path, write_scores
from g2rpo.metrics import changes

# Scores in files


def test_scores_come_back_bit_for_bit(tmp_path):
    scores = torch.randn(2, 3, dtype=torch.float64) / 3
    scores[1, 0], scores[1, 2] = math.nan, math.inf
    path = scores_path(tmp_path, 20)
    assert path == tmp_path / "scores" / "update-000020.json"
    write_scores(path, 20, ["a", "b"], ["x", "ü", "x"], scores)
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["update"] == 20 and content["scores"]["b"][::2] == [None, None]
    expected = scores.where(scores.isfinite(), math.nan)
    again = read_scores(path, ["b", "a"], ["x", "ü", "x"])
    assert torch.equal(again.nan_to_num(9), expected.flip(0).nan_to_num(9))
    with pytest.raises(ValueError, match="other prompts"):
        read_scores(path, ["a", "b"], ["x", "y", "x"])
    with pytest.raises(ValueError, match=r"scores of \['a', 'b'\]; expected \['a', 'c'\]"):
        read_scores(path, ["a", "c"], ["x", "ü", "x"])
    path.write_text('{"prompts": ["x", "ü", "x"], "scores": {"a": [1, 2], "b": [1, 2]}}')
    with pytest.raises(ValueError, match="2 scores of 'a'; expected 3"):
        read_scores(path, ["a", "b"], ["x", "ü", "x"])


# Runs


@pytest.fixture
def train(tmp_path, monkeypatch, capsys) -> Train:
    return Train(tmp_path, monkeypatch, capsys)


def test_win_rates_intervals_and_failures_by_hand(train, tmp_path):
    half_blind = '{"name": "hacked_runs:half_blind", "heldout": true}'
    rewards = f'[{{"name": "tiny:brightness"}}, {half_blind}]'
    run = tmp_path / "run"
    done = train(run, "--rewards", rewards, "--train.updates", 2, report=True)
    files = [json.loads(scores_path(run, update).read_text()) for update in (0, 2)]
    assert not any("win_rate" in key for key in done.rows[0])
    assert done.rows[0]["reward/brightness/weight"] == 1.0
    assert all(file["prompts"] == [*PROMPTS, *PROMPTS] for file in files)
    failures = 0
    for kind, name in (("reward", "brightness"), ("heldout", "half_blind")):
        start, now = (file["scores"][name] for file in files)
        pairs = [(a, b) for a, b in zip(start, now, strict=True) if None not in (a, b)]
        points = [1.0 if b > a else 0.5 if b == a else 0.0 for a, b in pairs]
        last = done.rows[-1]
        assert last[f"{kind}/{name}/win_rate"] == pytest.approx(sum(points) / len(points))
        assert last[f"{kind}/{name}/failed"] == now.count(None)
        failures += now.count(None)
        values = torch.tensor([math.nan if v is None else v for v in now], dtype=torch.float64)
        interval = estimate(values, 2000)
        assert (last[f"{kind}/{name}/low"], last[f"{kind}/{name}/high"]) == (
            interval.low, interval.high,
        )  # fmt: skip
        assert interval.low < last[f"{kind}/{name}/mean"] < interval.high
    assert failures == 2
    change = changes(done.rows)[0]
    assert change.win_rate == done.rows[-1]["reward/brightness/win_rate"]
    page = (run / "report.html").read_text()
    assert f"{change.win_rate:.1%}" in page and "of heldout/half_blind" in page


def test_prompts_of_evaluations_alone(train, tmp_path, monkeypatch):
    """A reward that is trained on sees them at evaluations and never in a rollout."""
    (tmp_path / "held.txt").write_text("left\nright\nup\n")
    monkeypatch.setenv("RECORDED", str(tmp_path / "seen"))
    run = tmp_path / "run"
    held = ("--data.evaluation_prompts", tmp_path / "held.txt")
    rewards = ("--rewards", '[{"name": "hacked_runs:recorded_contrast"}]')
    done = train(run, *held, *rewards, "--train.updates", 2, "--train.evaluation_samples", 9,
                 "--train.evaluate_every", 2)  # fmt: skip
    assert (
        "1 of the 3 prompts of the evaluations (data.evaluation_prompts) are trained on as well: "
        "these are not held out"
    ) in done.out
    calls = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    evaluations = [call for call in calls if "left" in call]
    rollouts = [call for call in calls if "left" not in call]
    assert evaluations == [["left", "right", "up"] * 3] * 2
    assert rollouts and set().union(*rollouts) <= set(PROMPTS)
    assert json.loads(scores_path(run, 2).read_text())["prompts"] == ["left", "right", "up"] * 3

    few = train(tmp_path / "few", *held, *rewards, "--train.updates", 1,
                "--train.evaluation_samples", 2)  # fmt: skip
    assert "Of the 3 prompts in data.evaluation_prompts the first 2 are drawn" in few.out
    assert "trained on as well" not in few.out


def test_other_prompts_are_refused_when_a_run_goes_on(train, tmp_path):
    file, run = tmp_path / "held.txt", tmp_path / "run"
    file.write_text("left\nright\n")
    train(run, "--data.evaluation_prompts", file, "--train.updates", 1)
    file.write_text("left\ndown\n")
    said = train.refused(run, "--train.updates", 4, resume=True)
    assert f"data.evaluation_prompts is {str(file)!r}, whose prompts are others" in said


@pytest.mark.parametrize("text", [None, "{", '{"prompts": [], "scores": {}}'])
def test_a_run_without_the_scores_it_began_with(train, tmp_path, text):
    """Of an older version, or damaged: said once, and no win rates from there on."""
    run = tmp_path / "run"
    train(run, "--train.updates", 1)
    path = scores_path(run, 0)
    path.unlink() if text is None else path.write_text(text)
    done = train(run, "--train.updates", 3, resume=True)
    said = f"{path} cannot be used, so evaluations have no win rates from here on: "
    assert done.out.count(said) == 1
    assert "reward/brightness/win_rate" in done.rows[1]
    for row in done.rows[2:]:
        assert "reward/brightness/low" in row and not any("win_rate" in key for key in row)


def test_a_run_of_a_version_without_intervals_goes_on(train, tmp_path):
    """Its rows are not watched, which is said where that was asked for."""
    run = tmp_path / "run"
    train(run, "--train.updates", 1)
    new = ("low", "high", "failed", "weight", "win_rate", "heldout_fallen")
    with (run / "metrics.jsonl").open("r+") as file:
        rows = [json.loads(line) for line in file]
        file.truncate(file.seek(0))
        for row in rows:
            old = {key: v for key, v in row.items() if key.rpartition("/")[2] not in new}
            file.write(json.dumps(old) + "\n")
    (run / "scores" / "update-000000.json").unlink()
    done = train(run, "--train.updates", 2, "--train.hacking_stop", 1, resume=True,
                 report=True)  # fmt: skip
    assert "train.hacking_stop is 1 and will not act" in done.out and "hacking?" not in done.out
    assert "heldout_fallen" not in done.rows[2] and "heldout/darkness/low" in done.rows[2]
    page = (run / "report.html").read_text()
    assert "±" in page and "win rate" not in page and "Reward hacking" not in page


def test_bad_keys(train, tmp_path):
    run = tmp_path / "run"
    said = train.refused(run, "--train.hacking_stop", -1)
    assert "train.hacking_stop is -1; expected at least 0" in said
    for useless in (
        ("--train.evaluation_samples", 1),  # no interval
        ("--rewards", '[{"name": "tiny:contrast"}]'),  # no judge
    ):
        said = train.refused(run, "--train.hacking_stop", 2, *useless)
        expected = "0, or a held-out reward and train.evaluation_samples of at least 2 with it"
        assert f"train.hacking_stop is 2; expected {expected}" in said
    config = tiny_config()
    config.train.hacking_stop, config.rewards = 2, []
    config.validate(training=False)  # as of a run's configuration that is read for something else
    (tmp_path / "held.jsonl").write_text('{"text": "left"}\n')
    for file, fault in (
        ("nowhere.txt", "expected a file of prompts"),
        ("held.jsonl", "line 1: no key 'prompt', only 'text'"),
    ):
        said = train.refused(run, "--data.evaluation_prompts", tmp_path / file)
        assert f"data.evaluation_prompts is {str(tmp_path / file)!r}; {fault}" in said
    assert not run.exists()
