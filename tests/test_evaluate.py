"""`g2rpo evaluate` of a run: its numbers are those of training, its files say the same thing."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from flux_small import warmth, write_run
from PIL import Image
from tiny import PROMPTS, TinyModel

import g2rpo.run
from g2rpo import cli, digits
from g2rpo.evaluate import policies

SMALL = {
    "rollout": {
        "steps": 6, "sde_positions": [0, 1, 2], "group_size": 4, "branch_batch": 4,
    },
    "rewards": [
        {"name": "tiny:brightness"},
        {"name": "tiny:constant", "weight": 0.0},
        {"name": "tiny:contrast", "heldout": True},
    ],
    "optimizer": {"lr": 1e-2},
    "train": {
        "updates": 2, "prompts_per_update": 2, "save_every": 1, "keep_last": 0,
        "evaluate_every": 1, "evaluation_samples": 14, "ema": 0.5,
    },
}  # fmt: skip


def g2rpo_(*arguments: object, code: int = 0) -> None:
    assert cli.main([str(argument) for argument in arguments]) == code


def result(folder: Path) -> dict:
    def strict(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "evaluation.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=strict)


def table(folder: Path) -> dict[str, dict]:
    return {row["reward"]: row for row in result(folder)["table"]}


def row(run_dir: Path, update: int) -> dict:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return next(found for line in lines if (found := json.loads(line))["update"] == update)


def rows_of(file: Path) -> list[dict]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


@pytest.fixture(scope="module", autouse=True)
def tiny_model():
    """`model.path: digits` is the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (g2rpo.run, policies):
            patch.setattr(module, "load_model", lambda config, *_, **__: TinyModel())
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    g2rpo_("train", folder / "small.yaml", "--train.output", folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def evaluated(run: Path) -> Path:
    g2rpo_("evaluate", run, "--ema")
    return run / "evaluation-step-000002-ema"


KEYS = {
    "brightness": "reward/brightness", "constant": "reward/constant",
    "contrast": "heldout/contrast",
}  # fmt: skip


def test_its_means_are_the_rows_that_training_wrote(run, evaluated):
    """Of update 0 and of the checkpoint, whose evaluation in training is of the moving average."""
    found, before, after = table(evaluated), row(run, 0), row(run, 2)
    assert list(found) == list(KEYS)
    for name, key in KEYS.items():
        for column, metrics in (("base", before), ("policy", after)):
            assert found[name][column]["mean"] == pytest.approx(metrics[f"{key}/mean"], abs=1e-12)
            assert found[name][column]["count"] == 14
        change = after[f"{key}/mean"] - before[f"{key}/mean"]
        assert found[name]["change"]["mean"] == pytest.approx(change, abs=1e-12)
    spread = result(evaluated)["diversity"]
    assert spread["base"] == pytest.approx(before["images/diversity/mean"], abs=1e-7)
    assert spread["policy"] == pytest.approx(after["images/diversity/mean"], abs=1e-7)
    assert found["brightness"]["change"]["mean"] > 0 and not found["brightness"]["failed"]


def test_its_files_say_the_same_thing(run, evaluated):
    assert {path.name for path in evaluated.iterdir()} == {
        "evaluation.json", "evaluation.csv", "evaluation.html", "scores.csv", "images",
        "base-images",
    }  # fmt: skip
    document, found = result(evaluated), table(evaluated)
    assert [r["mark"] for r in found.values()] == ["in-domain", "reported", "held-out"]
    assert document["settings"]["checkpoint"] == "step-000002" and document["settings"]["ema"]
    assert "torch" in document["versions"] and document["settings"]["rollout"]["steps"] == 6
    assert [image["prompt"] for image in document["images"]] == [PROMPTS[i % 6] for i in range(14)]
    scores = rows_of(evaluated / "scores.csv")
    assert len(scores) == 14 and scores[7]["file"] == "images/0007-east.png"
    for i, image in enumerate(document["images"]):
        assert image["base_file"] == f"base-images/{Path(image['file']).name}"
        for name in KEYS:
            assert float(scores[i][name]) == image["scores"][name]
            assert float(scores[i][f"base/{name}"]) == image["base_scores"][name]
    wins = [float(s["brightness"]) > float(s["base/brightness"]) for s in scores]
    assert found["brightness"]["win_rate"]["mean"] == sum(wins) / 14
    assert found["constant"]["win_rate"]["mean"] == 0.5
    for line in rows_of(evaluated / "evaluation.csv"):
        for column in ("base", "policy", "change", "win_rate"):
            for key in ("mean", "low", "high", "count"):
                value = found[line["reward"]][column][key]
                assert float(line[f"{column}_{key}"]) == value
    # the files are the images that were scored, rounded to 8 bits
    for i in (0, 13):
        with Image.open(evaluated / document["images"][i]["file"]) as picture:
            assert picture.text["prompt"] == PROMPTS[i % 6] and picture.mode == "L"
            brightness = sum(picture.tobytes()) / 255 / (16 * 4)
        assert brightness == pytest.approx(float(scores[i]["brightness"]), abs=0.5 / 255)


def test_without_ema_it_is_the_weights_themselves(run, evaluated, capsys):
    g2rpo_("evaluate", run, "--output", run / "raw")
    said = capsys.readouterr().out
    assert "evaluations in training are of their moving average (--ema)" in said
    assert "Prompts: 6, all trained on" in said and "held-out" in said
    raw, averaged = table(run / "raw"), table(evaluated)
    assert raw["brightness"]["base"] == averaged["brightness"]["base"]
    assert raw["brightness"]["policy"]["mean"] > averaged["brightness"]["policy"]["mean"]
    shown = said[said.index("run, step-000002, against digits before training") :].splitlines()
    assert max(map(len, shown[:-1])) <= 100  # the last names the page, unwrapped
    assert shown[-1].split(": ")[1].startswith(str(run / "raw" / "evaluation.html"))


def test_its_own_images_can_be_evaluated_later(evaluated, tmp_path):
    g2rpo_(
        "evaluate", evaluated / "images", "--base", evaluated / "base-images", "--output",
        tmp_path / "again", "--rewards", '[{"name": "tiny:brightness"}]',
    )  # fmt: skip
    again, first = table(tmp_path / "again")["brightness"], table(evaluated)["brightness"]
    assert again["mark"] is None
    for column in ("base", "policy", "change"):  # the files are rounded to 8 bits
        assert again[column]["mean"] == pytest.approx(first[column]["mean"], abs=0.5 / 255)
        assert again[column]["mean"] != first[column]["mean"]


def test_an_older_checkpoint_and_other_rewards_and_settings(run, tmp_path):
    g2rpo_(
        "evaluate", run, "--checkpoint", "step-000001", "--samples", 3, "--output", tmp_path / "o",
        "--rollout.steps", 3, "--rollout.branch_batch", 2, "--rewards",
        '[{"name": "tiny:contrast"}, {"name": "tiny:brightness"}, {"name": "tiny:broken"}]',
    )  # fmt: skip
    found = table(tmp_path / "o")
    # what the run trained on is known from the run
    assert {name: r["mark"] for name, r in found.items()} == {
        "brightness": "in-domain", "contrast": "held-out", "broken": "held-out",
    }  # fmt: skip
    assert found["broken"]["failed"] == 6 and found["broken"]["policy"]["count"] == 0
    assert found["broken"]["change"] == {"mean": None, "low": None, "high": None, "count": 0}
    assert rows_of(tmp_path / "o" / "scores.csv")[0]["broken"] == ""
    assert len(list((tmp_path / "o" / "images").iterdir())) == 3


def test_a_batch_that_does_not_fit_is_halved_and_the_images_are_the_same(
    run, evaluated, tmp_path, monkeypatch, capsys
):
    real = policies.sample_policy

    def small(model, prompts, sigmas, batch_size, first):
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(model, prompts, sigmas, batch_size, first)

    monkeypatch.setattr(policies, "sample_policy", small)
    g2rpo_("evaluate", run, "--ema", "--output", tmp_path / "o")
    said = capsys.readouterr().out
    assert "Out of memory while drawing images: from here on 2 at once (CUDA out of memory)" in said
    for column in ("base", "policy"):
        mean = table(tmp_path / "o")["brightness"][column]["mean"]
        assert mean == pytest.approx(table(evaluated)["brightness"][column]["mean"], abs=1e-5)
    monkeypatch.setattr(policies, "sample_policy", lambda *_: small(None, None, None, 9, 0))
    capsys.readouterr()
    g2rpo_("evaluate", run, "--output", tmp_path / "p", code=1)
    assert "out of memory while drawing a single image (CUDA" in capsys.readouterr().err


def test_an_evaluation_is_replaced_only_when_asked(run, evaluated, tmp_path, capsys):
    output = tmp_path / "o"
    command = ("evaluate", run, "--samples", 2, "--output", output)
    g2rpo_(*command)
    mine = output / "images" / "mine.png"
    mine.write_bytes(b"precious")
    (output / "notes.txt").write_text("precious")
    capsys.readouterr()
    g2rpo_(*command, code=2)
    said = capsys.readouterr().err
    assert "which holds an evaluation (evaluation.json); expected another folder, or" in said
    g2rpo_("evaluate", run, "--samples", 1, "--output", output, "--overwrite")
    assert {path.name for path in (output / "images").iterdir()} == {"mine.png", "0000-north.png"}
    assert mine.read_bytes() == b"precious" and (output / "notes.txt").exists()
    assert result(output)["table"][0]["policy"]["low"] is None  # of one image there is no interval


def test_pixels_that_are_no_numbers_are_failed_scores(run, tmp_path, monkeypatch, capsys):
    real = policies.sample_policy

    def broken(*arguments):
        images = real(*arguments)
        images[0, 0, 3, 3] = math.nan
        return images

    monkeypatch.setattr(policies, "sample_policy", broken)
    g2rpo_("evaluate", run, "--samples", 6, "--output", tmp_path / "o")
    assert "2 images with NaN or infinite pixels, which are black" in capsys.readouterr().out
    found = table(tmp_path / "o")["brightness"]
    assert (found["failed"], found["change"]["count"]) == (4, 4)  # batches of 4 and 2


def test_digits(tmp_path, monkeypatch, capsys):
    """A run of the embedded model, with weights that are not pre-trained."""
    from g2rpo import models

    for module in (g2rpo.run, policies):
        monkeypatch.setattr(module, "load_model", models.load_model)
    untrained = digits.new_transformer(0).state_dict()

    def transformer(**_):
        fresh = digits.new_transformer(0)
        fresh.load_state_dict(untrained)
        return fresh

    monkeypatch.setattr(digits, "pretrained_transformer", transformer)
    small = ("--rollout.steps", 4, "--rollout.sde_positions", "[0]", "--rollout.group_size", 4)
    g2rpo_(
        "train", "digits", "--train.output", tmp_path / "run", "--train.updates", 1,
        "--train.evaluation_samples", 20, *small,
    )  # fmt: skip
    g2rpo_("evaluate", tmp_path / "run")
    found = table(tmp_path / "run" / "evaluation-step-000001")
    assert [r["mark"] for r in found.values()] == ["in-domain", "reported", *["held-out"] * 2]
    for update, column in ((0, "base"), (1, "policy")):
        metrics = row(tmp_path / "run", update)
        for name, key in (
            ("classifier_log_prob", "reward/classifier_log_prob"),
            ("judge_probability", "heldout/judge_probability"),
        ):
            assert found[name][column]["mean"] == pytest.approx(metrics[f"{key}/mean"], abs=1e-9)
    (tmp_path / "odd.txt").write_text("one\nten\n")
    capsys.readouterr()
    g2rpo_(
        "evaluate", tmp_path / "run", "--data.prompts", tmp_path / "odd.txt", "--output",
        tmp_path / "odd", code=2,
    )  # fmt: skip
    assert "data.prompts holds 'ten'; the digits model expects" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_flux(kind, tmp_path, miniature, monkeypatch, capsys):
    """A LoRA's base is the model before adapters, of fused blocks; full: weights and an average."""
    from g2rpo import models

    for module in (g2rpo.run, policies):
        monkeypatch.setattr(module, "load_model", models.load_model)
    model = {} if kind == "lora" else {"lora": {"rank": 0}, "dtype": "float32"}
    file = write_run(
        tmp_path, miniature, train={"updates": 1, "evaluation_samples": 4, "ema": 0.5},
        model={"path": str(miniature), "lora": {"rank": 4, "alpha": 8}, "fuse": True, **model},
    )  # fmt: skip
    run_dir, output = tmp_path / "run", tmp_path / "run" / "evaluation-step-000001-ema"
    stored = ("--data.embeddings", tmp_path / "embeddings") if kind == "lora" else ()
    if stored:
        g2rpo_("embed", file, *stored)
    g2rpo_("train", file, "--train.output", run_dir, *stored)
    g2rpo_("evaluate", run_dir, "--ema")
    found = table(output)["warmth"]
    for update, column in ((0, "base"), (1, "policy")):
        mean = row(run_dir, update)["reward/warmth/mean"]
        assert found[column]["mean"] == pytest.approx(mean, abs=1e-6)
    assert found["change"]["mean"] != 0
    with Image.open(output / result(output)["images"][2]["file"]) as picture:
        assert picture.size == (48, 32) and picture.text["prompt"].startswith("a bowl of ripe")
        pixels = torch.tensor(list(picture.tobytes())).view(1, 32, 48, 3).permute(0, 3, 1, 2) / 255
    score = result(output)["images"][2]["scores"]["warmth"]
    assert float(warmth(pixels, ["x"])) == pytest.approx(score, abs=1 / 255)

    (tmp_path / "held-out.txt").write_text("a red fox in the snow\n")
    other = ("evaluate", run_dir, "--data.prompts", tmp_path / "held-out.txt", "--samples", 2)
    if stored:
        g2rpo_(*other, code=2)
        said = capsys.readouterr().err
        assert "lacks 1 prompt" in said and "expected --data.embeddings null, to embed as" in said
        other = (*other, "--data.embeddings", "null", "--overwrite")
    g2rpo_(*other)
    said = capsys.readouterr().out
    assert "Prompts: 1, none trained on" in said and "32 x 48 pixels" in said
    spread = result(run_dir / "evaluation-step-000001")["diversity"]
    assert spread["base"] > 0 and spread["policy"] > 0
