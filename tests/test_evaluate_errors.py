"""What `g2rpo evaluate` says of wrong input: one line that names it, and nothing is written."""

import shutil
from pathlib import Path

import pytest
from test_evaluate import g2rpo_, run, tiny_model  # noqa: F401  (fixtures)
from test_evaluate_images import write_images

BRIGHTNESS = ("--rewards", """[{"name": "tiny:brightness"}]""")


@pytest.fixture
def images(tmp_path) -> Path:
    return write_images(tmp_path / "images", {"a.png": 1, "b.png": 2}, a="x", b="y")


@pytest.fixture
def refused(capsys, tmp_path):
    def said(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        g2rpo_("evaluate", *arguments, "--output", tmp_path / "out", code=code)
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
        return capsys.readouterr().err.removeprefix("g2rpo evaluate: error: ").strip()

    return said


def test_what_is_neither_a_run_nor_images(refused, run, tmp_path):  # noqa: F811
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        assert "is neither the directory of a run (with its config.yaml)" in refused(place)
    checkpoint = run / "checkpoints" / "step-000002"
    assert f"expected its run: {run} --checkpoint step-000002" in refused(checkpoint)
    assert "nothing to evaluate is given" in refused()


def test_a_run_and_its_checkpoints(refused, run, tmp_path):  # noqa: F811
    said = refused(run, "--checkpoint", "step-000007")
    assert said == "--checkpoint is 'step-000007'; expected one of step-000001, step-000002"
    other = tmp_path / "run"
    shutil.copytree(run, other)
    newest = other / "checkpoints" / "step-000002"
    shutil.rmtree(newest / "ema")
    assert f"--ema is given, but {newest} has no moving average" in refused(other, "--ema")
    weights = newest / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    said = refused(other, code=1)
    assert f"{newest} cannot be read: transformer/diffusion" in said
    assert f"has {len(whole) - 1} bytes; expected {len(whole)}" in said
    shutil.rmtree(other / "checkpoints")
    assert f"RUN_DIR is {str(other)!r}, a run without a checkpoint" in refused(other)


def test_a_checkpoint_without_its_training_state_is_enough(run, tmp_path, capsys):  # noqa: F811
    other = tmp_path / "run"
    shutil.copytree(run, other)
    state = other / "checkpoints" / "step-000002" / "training_state.pt"
    state.write_bytes(b"damaged")
    g2rpo_("evaluate", other, "--samples", 1, code=1)
    assert f"{state} cannot be read" in capsys.readouterr().err
    state.unlink()
    g2rpo_("evaluate", other, "--samples", 1, "--overwrite")
    assert "whether they were trained on is not known" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-3", "many", "1.5"])
def test_samples(text, refused, run):  # noqa: F811
    expected = f"--samples is {text!r}; expected a number of images, at least 1"
    assert refused(run, "--samples", text) == expected


def test_keys_that_would_make_another_policy_of_it(refused, run, images, capsys):  # noqa: F811
    said = refused(run, "--train.seed", 3)
    assert said.startswith(f"train.seed is 3, but {run} was started with 0; expected only these")
    assert "rollout.steps" in said and "train." not in said.partition("only these")[2]
    assert "rollout.eta is 0.5" in refused(run, "--rollout.eta", 0.5)
    said = refused(images, *BRIGHTNESS, "--rollout.steps", 3)
    assert said.startswith("rollout.steps is 3, but a folder of images is evaluated with 16;")
    with pytest.raises(SystemExit) as left:
        g2rpo_("evaluate", run, "--rollout.stepz", 3)
    assert left.value.code == 2 and "rollout.stepz" in capsys.readouterr().err
    assert "rollout.steps is 1; expected at least 2" in refused(run, "--rollout.steps", 1)


def test_options_of_the_other_kind(refused, run, images):  # noqa: F811
    assert "--base is given, but" in refused(run, "--base", images)
    assert "--ema is given, but" in refused(images, "--ema", *BRIGHTNESS)
    said = refused(images, "--checkpoint", "step-000001", *BRIGHTNESS)
    assert "is a folder of images; expected a run, or no --checkpoint" in said


def test_rewards(refused, run, images):  # noqa: F811
    for place in (images, run):
        said = refused(place, "--rewards", "[]")
        assert said.startswith("rewards is []; expected at least one, as --rewards '[{")
    assert "rewards is []" in refused(images)
    assert "no 'nowhere' on sys.path" in refused(images, "--rewards", '[{"name": "nowhere:f"}]')
    digits = ("--rewards", '[{"name": "g2rpo.digits:judge_accuracy"}]')
    said = refused(images, *digits, code=1)
    assert said.startswith("reward 'judge_accuracy' refuses the images: images must have shape")


def test_a_scorer_of_colours_is_not_asked_of_grey_images(refused, run, monkeypatch):  # noqa: F811
    from g2rpo.evaluate import command
    from g2rpo.rewards import Reward

    monkeypatch.setattr(command, "make_rewards", lambda _: [Reward("hps", len, channels=3)])
    said = refused(run)
    assert said == "reward 'hps' scores images of 3 channels; these have 1"


def test_an_output_that_cannot_be_written(run, images, tmp_path, capsys):  # noqa: F811
    (tmp_path / "file").write_text("")
    for place, more in ((run, ()), (images, BRIGHTNESS)):
        capsys.readouterr()
        g2rpo_("evaluate", place, *more, "--output", tmp_path / "file" / "out", code=2)
        said = capsys.readouterr().err
        assert "expected a folder that can be made and written: " in said


def test_help_is_of_this_command(capsys):
    with pytest.raises(SystemExit) as left:
        g2rpo_("evaluate", "--help")
    said = capsys.readouterr().out
    assert left.value.code == 0 and "g2rpo evaluate IMAGES_DIR" in said and "--rewards" in said
