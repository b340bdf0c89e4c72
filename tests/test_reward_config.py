"""The configuration's `rewards`: what they may say, what is made of it, what is told when it is
wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from judge_server import JudgeServer, Reply
from open_clip_small import HPS
from reward_fakes import already_made, brightness, config_of, made, write_small_scorers

import g2rpo.rewards.build as build
from g2rpo import arguments as args
from g2rpo import cli
from g2rpo.config import Config, RewardConfig
from g2rpo.errors import ConfigurationError
from g2rpo.rewards import score, short_names
from g2rpo.rewards.build import make_rewards
from g2rpo.rewards.clip import AestheticScorer, ClipScorer
from g2rpo.rewards.judge import Judge
from g2rpo.run import write_config

HERE = "reward_fakes"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_scorers(tmp_path_factory.mktemp("scorers"))


# What can be given -------------------------------------------------------------------------------


def test_functions_classes_and_objects():
    function, plain, given, instance, any_ = made(
        {"name": f"{HERE}:brightness", "weight": 0.5},
        {"name": f"{HERE}:Fake", "heldout": True},
        {"name": f"{HERE}:Fake", "label": "squared", "path": "a file", "dtype": "bfloat16",
         "options": {"power": 2}, "offload": True},
        {"name": f"{HERE}:already_made", "offload": True},
        {"name": f"{HERE}:Anything", "options": {"needed": [1, {"a": None}]}},
    )  # fmt: skip
    assert function.function is brightness and (function.weight, function.heldout) == (0.5, False)
    assert plain.function.given == (torch.device("cpu"), 1.0, None, torch.float32)
    assert (plain.name, plain.heldout, plain.offload) == ("Fake", True, False)
    assert given.function.given == (torch.device("cpu"), 2, "a file", torch.bfloat16)
    assert given.name == "squared" and given.function.away and not plain.function.away
    assert instance.function is already_made and already_made.away
    assert any_.function.others == {"needed": [1, {"a": None}], "device": torch.device("cpu")}


def test_published_scorers(files, tmp_path):
    said = []
    hps, dfn, pick, laion = made(
        {"name": "hps-v2.1", "path": str(files / "hps" / HPS), "offload": True},
        {"name": "clip-score-224", "path": str(files / "dfn"), "options": {"batch_size": 3}},
        {"name": "pickscore", "path": str(files / "pick"), "dtype": "bfloat16", "heldout": True},
        {"name": "aesthetic", "path": str(files / "laion"), "label": "look"},
        on_message=said.append,
    )  # fmt: skip
    assert [r.name for r in (hps, dfn, pick, laion)] == [
        "hps-v2.1", "clip-score-224", "pickscore", "look",
    ]  # fmt: skip
    assert isinstance(hps.function, ClipScorer) and isinstance(laion.function, AestheticScorer)
    assert dfn.function.batch_size == 3
    assert pick.function.model.dtype is torch.bfloat16 and hps.function.model.dtype is torch.float32
    assert said[0] == f"Loading hps-v2.1 of {files / 'hps' / HPS}" and len(said) == 4


def test_a_judge_is_told_who_listens(monkeypatch):
    monkeypatch.setenv("A_KEY", "not-to-be-seen")
    said = []
    answers = {"model": "m", "score_range": [1, 5], "api_key_env": "A_KEY", "attempts": 1,
               "parse": f"{HERE}:first_number"}  # fmt: skip
    with JudgeServer(lambda request, number: Reply("four" if number else "4 of 5")) as server:
        reward = {"name": "judge", "path": server.endpoint, "options": answers}
        (judge,) = made(reward, on_message=said.append)
        images = torch.rand(1, 3, 8, 8)
        assert isinstance(judge.function, Judge) and judge.channels == 3
        assert (judge.function.low, judge.function.high) == (1, 5)
        assert score(judge, images, ["a"]).tolist() == [4.0]
        assert score(judge, images, ["a"]).isnan().all() and "bad answer" in said[0]
    assert server.requests[0].headers["Authorization"] == "Bearer not-to-be-seen"


def test_two_judges_are_told_apart():
    two = [{"name": "judge", "path": f"http://host:{port}/v1", "options": {"model": "m"}}
           for port in (1, 2)]  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"\['judge', 'judge'\]; expected no reward twice"):
        config_of(*two)
    named = made({**two[0], "label": "first"}, two[1])
    assert [reward.name for reward in named] == ["first", "judge"]
    with pytest.raises(ConfigurationError, match="no reward twice"):
        config_of({**two[0], "label": "judge"}, two[1])
    assert short_names(["a:f", "b:f", "c:f"], [None, "f", None]) == ["a.f", "f", "c.f"]


# Files and command line --------------------------------------------------------------------------

OPTIONS = {
    "model": "1e3", "template": "Rate this: {prompt}", "score_range": [1, 5], "timeout": 2.5,
    "body": {"extra": {"list": [1, None, "true", "2e5"], "text": "null"}, "class_path": "a.B"},
}  # fmt: skip


def parsed(*arguments: object) -> Config:
    return args.named_config(args.make_parser(), ["digits", *map(str, arguments)])[0]


def test_yaml_command_line_and_config_read_alike(tmp_path):
    reward = {"name": "judge", "path": "http://h:1/v1", "label": "a judge", "options": OPTIONS}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"rewards": [reward]}).replace(
        "1e3", "'1e3'").replace("2e5", "'2e5'"))  # fmt: skip
    by_line = parsed("--rewards", json.dumps([reward]))
    assert by_line.rewards == [RewardConfig(**reward)]
    assert parsed("--config", tmp_path / "a.yaml") == by_line
    write_config(by_line, tmp_path)
    assert parsed("--config", tmp_path / "config.yaml") == by_line
    args.resumed_config(args.make_parser(), tmp_path, [])  # which refuses differences


def test_rewards_of_a_preset_are_replaced():
    config = args.named_config(
        args.make_parser(), ["flux-dev-1gpu", "--rewards", '[{"name": "mine:reward"}]']
    )[0]
    assert config.rewards == [RewardConfig("mine:reward")]


@pytest.mark.parametrize("preset", [name for name in args.preset_names() if "flux" in name])
def test_presets_have_the_papers_rewards(preset):
    config = args.named_config(args.make_parser(), [preset])[0]
    config.validate()
    assert {r.name: r.heldout for r in config.rewards} == {
        "hps-v2.1": False, "clip-score-224": False, "pickscore": True, "imagereward": True,
    }  # fmt: skip
    dtype = "float32" if preset == "flux-dev-paper" else "bfloat16"
    assert all(r.offload and r.dtype == dtype and r.weight == 1 for r in config.rewards)


def test_no_key_in_the_configuration(tmp_path, capsys, monkeypatch):
    """A key that is given as an option is refused before anything is written, and not repeated."""
    reward = {"name": "judge", "path": "http://h:1/v1"}
    reward["options"] = {"model": "m", "api_key": "S3CRET"}
    code = cli.main(["train", "flux-lora", "--rewards", json.dumps([reward]), "--model.device",
                     "cpu", "--train.output", str(tmp_path / "run")])  # fmt: skip
    err = capsys.readouterr().err
    assert code == 2 and "'api_key'" in err and "api_key_env" in err and "S3CRET" not in err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigurationError) as raised:
        made({"name": f"{HERE}:brightness", "options": {"key": "S3CRET"}})
    assert "S3CRET" not in str(raised.value)
    monkeypatch.setenv("SOME_KEY", "S3CRET")
    reward["options"] = {"model": "m", "api_key_env": "SOME_KEY"}
    config = config_of(reward)
    make_rewards(config)
    write_config(config, tmp_path)
    assert "SOME_KEY" in (text := (tmp_path / "config.yaml").read_text()) and "S3CRET" not in text


# What is wrong -----------------------------------------------------------------------------------

CLIP = {"name": "hps-v2.1"}
JUDGE = {"name": "judge", "path": "http://h:1/v1", "options": {"model": "m"}}
MISTAKES = {
    "unknown scorer": (
        {"name": "hps"},
        "is 'hps'; expected 'package.module:function', .* or one of hps-v2.1, clip-score-224, "
        "clip-score-378, pickscore, aesthetic, imagereward, judge$",
    ),
    "no module": ({"name": "nowhere:f"}, "there is no 'nowhere'"),
    "label with a slash": ({**CLIP, "label": "a/b"}, "label of reward 'hps-v2.1' is 'a/b'; expec"),
    "empty label": ({**CLIP, "label": ""}, "is ''; expected text without '/'"),
    "label with white space": ({**CLIP, "label": "a "}, "is 'a '; expected text without"),
    "label of two lines": ({**CLIP, "label": "a\nb"}, "expected text without"),
    "weight": ({**CLIP, "weight": -1.0}, "weight of reward 'hps-v2.1' is -1.0; expected >= 0"),
    "a key that is no name": ({**JUDGE, "options": {1: 2}}, r"is \[1\]; expected names as keys"),
    "offload of a function": (
        {"name": f"{HERE}:brightness", "offload": True},
        "reward 'brightness': offload is True; expected False, .* no method offload",
    ),
    "offload of a class without": ({"name": f"{HERE}:Mute", "offload": True}, "no method offload"),
    "offload of a judge": ({**JUDGE, "offload": True}, "offload is True; .* a judge has no weigh"),
    "options of a function": (
        {"name": f"{HERE}:brightness", "options": {"power": 2}},
        r"'brightness': options is \['power'\]; expected none, .* is a function",
    ),
    "path of a function": (
        {"name": f"{HERE}:brightness", "path": "x"}, "path is 'x'; expected none",
    ),
    "dtype of a function": (
        {"name": f"{HERE}:brightness", "dtype": "bfloat16"}, "is 'bfloat16'; expected float32",
    ),
    "unknown option of a class": (
        {"name": f"{HERE}:Fake", "options": {"powr": 2}},
        "reward 'Fake': options has 'powr'; expected only what .*:Fake takes: power, name$",
    ),
    "device as an option": ({"name": f"{HERE}:Fake", "options": {"device": 1}}, "has 'device'"),
    "the same of any class": (
        {"name": f"{HERE}:Anything", "options": {"needed": 1, "device": 1}}, "has 'device'",
    ),
    "missing option": (
        {"name": f"{HERE}:Anything"},
        "has no default for 'needed'; expected a value among the options",
    ),
    "a class without device": ({"name": f"{HERE}:Bare"}, "Bare has no parameter 'device'"),
    "a class without path": ({"name": f"{HERE}:Plain", "path": "x"}, "has no parameter 'path'"),
    "a class without dtype": (
        {"name": f"{HERE}:Plain", "dtype": "bfloat16"}, "has no parameter 'dtype'",
    ),
    "a class that cannot be called": ({"name": f"{HERE}:Mute"}, "instances cannot be called"),
    "unknown option of a scorer": (
        {**CLIP, "options": {"batch": 2}},
        "options has 'batch'; expected only what hps-v2.1 takes: tokenizer, batch_size$",
    ),
    "size is the scorer's": (
        {"name": "clip-score-224", "options": {"size": 378}}, "options has 'size'",
    ),
    "type of an option": (
        {**CLIP, "options": {"batch_size": "8"}}, "options.batch_size is '8'; expected int$",
    ),
    "no batch": ({**CLIP, "options": {"batch_size": 0}}, "batch_size is 0; expected at least 1"),
    "judge without endpoint": ({"name": "judge"}, "path is None; expected the judge's endpoint"),
    "judge without model": ({**JUDGE, "options": {}}, "judge has no default for 'model'"),
    "judge's endpoint": ({**JUDGE, "path": "h:1"}, "endpoint is 'h:1'; expected a URL"),
    "judge's timeout": (
        {**JUDGE, "options": {"model": "m", "timeout": "1 s"}},
        "options.timeout is '1 s'; expected float$",
    ),
    "judge's range": (
        {**JUDGE, "options": {"model": "m", "score_range": [1, 5, 9]}},
        r"options.score_range is \[1, 5, 9\]; expected tuple\[float, float\]",
    ),
    "judge's key": (
        {**JUDGE, "options": {"model": "m", "api_key_env": "NOT_SET_ANYWHERE"}},
        "api_key_env is 'NOT_SET_ANYWHERE', a variable that is not set",
    ),
    "dtype of a judge": ({**JUDGE, "dtype": "bfloat16"}, "dtype is 'bfloat16'; expected 'float32'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, monkeypatch):
    monkeypatch.setattr(build, "missing", lambda *a: [])
    reward, message = MISTAKES[case]
    with pytest.raises(ConfigurationError, match=message):
        made(reward)


def test_all_are_checked_before_any_is_made(files):
    class_made = {"name": f"{HERE}:Anything", "options": {"needed": 1}}
    said = []
    with pytest.raises(ConfigurationError, match="has 'powr'"):
        made({"name": "hps-v2.1", "path": str(files / "hps")}, class_made,
             {"name": f"{HERE}:Fake", "options": {"powr": 2}}, on_message=said.append)  # fmt: skip
    assert said == []


def test_errors_of_a_class_are_its_own():
    with pytest.raises(ZeroDivisionError):
        made({"name": f"{HERE}:Fake", "options": {"power": 0}})


def test_grey_images(files, tmp_path, capsys):
    aesthetic = {"name": "aesthetic", "path": str(files / "laion")}
    (reward,) = made(aesthetic)
    grey = torch.rand(2, 1, 8, 8)
    with pytest.raises(ConfigurationError, match="'aesthetic' scores images of 3 channels; .* 1,"):
        score(reward, grey, ["", ""])
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\); expected \[N, 3, H, W\]"):
        reward.function(grey, ["", ""])
    code = cli.main(["train", "digits", "--rewards", json.dumps([aesthetic]),
                     "--train.output", str(tmp_path / "run")])  # fmt: skip
    err = capsys.readouterr().err
    assert code == 2 and "aesthetic, which scores images of 3 channels: those of model.path " in err
    assert not (tmp_path / "run").exists()
