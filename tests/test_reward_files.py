"""Files of the configuration's rewards: what is missing, in one error, and who needs none."""

from __future__ import annotations

from pathlib import Path

import pytest
from flux_small import PROMPTS
from open_clip_small import HPS, write_tokenizer
from reward_fakes import made, write_small_scorers

import g2rpo.rewards.build as build
from g2rpo import cli
from g2rpo.config import Config, RewardConfig
from g2rpo.errors import ConfigurationError
from g2rpo.rewards.build import make_rewards


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_scorers(tmp_path_factory.mktemp("scorers"))


def test_every_command_in_one_error(tmp_path, capsys, monkeypatch, miniature, files):
    """`g2rpo train flux-dev-1gpu` without any file, and then with some."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr(build, "load", lambda *a, **k: pytest.fail("weights are read too early"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = [
        "train", "flux-dev-1gpu", "--model.path", miniature, "--model.device", "cpu",
        "--data.prompts", tmp_path / "prompts.txt", "--train.output", tmp_path / "run",
    ]  # fmt: skip

    def told() -> list[str]:
        assert cli.main([str(a) for a in arguments]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err.splitlines()

    cache = tmp_path / "g2rpo" / "rewards"
    commands = [
        f"  hf download xswu/HPSv2 {HPS} --local-dir {cache}/hps-v2.1",
        "  hf download apple/DFN5B-CLIP-ViT-H-14 open_clip_pytorch_model.bin --local-dir "
        f"{cache}/clip-score-224",
        "  hf download yuvalkirstain/PickScore_v1 config.json model.safetensors --local-dir "
        f"{cache}/pickscore",
        "  hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir "
        f"{cache}/imagereward",
        f"  hf download google-bert/bert-base-uncased vocab.txt --local-dir {cache}/imagereward",
    ]
    first, *rest = told()
    assert rest == commands  # none for CLIP's vocabulary: the pipeline has it
    assert "of the rewards hps-v2.1, clip-score-224, pickscore, imagereward are missing" in first
    cache.mkdir(parents=True)
    (cache / "hps-v2.1").symlink_to(files / "hps")
    (cache / "clip-score-224").symlink_to(files / "pick")  # transformers' format serves as well
    (cache / "imagereward").mkdir()
    (cache / "imagereward" / "ImageReward.pt").write_bytes(b"")
    _, *rest = told()
    assert rest == [commands[2], commands[3].replace("ImageReward.pt ", ""), commands[4]]


def test_fp8_gate_asks_for_the_trained_ones_alone(tmp_path, capsys, monkeypatch, miniature):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    assert cli.main(["doctor", "--fp8", "flux-lora", "--model.path", str(miniature)]) == 2
    err = capsys.readouterr().err
    assert "xswu/HPSv2" in err and "DFN5B" in err and "PickScore" not in err and "THUDM" not in err


def test_embedding_needs_no_reward(tmp_path, monkeypatch, miniature, capsys):
    monkeypatch.setattr(build, "make_rewards", lambda *a: pytest.fail("not to be made"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    given = ["--model.path", miniature, "--data.prompts", tmp_path / "prompts.txt",
             "--data.embeddings", tmp_path / "embeddings", "--model.device", "cpu"]  # fmt: skip
    assert cli.main(["embed", "flux-lora", *map(str, given)]) == 0
    assert "Embedded 5 prompts" in capsys.readouterr().out


def test_vocabulary(files, tmp_path, miniature):
    """Beside the weights, of the option, of the pipeline, or nowhere."""
    for name in ("alone", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / HPS).symlink_to(files / "hps" / HPS)
    reward = {"name": "hps-v2.1", "path": str(tmp_path / "alone")}
    with pytest.raises(ConfigurationError) as raised:
        make_rewards(Config(rewards=[RewardConfig(**reward)]))  # no pipeline to take it from
    place = tmp_path / "alone" / "tokenizer"
    assert str(raised.value).endswith(
        "hf download openai/clip-vit-large-patch14 tokenizer_config.json vocab.json merges.txt "
        f"--local-dir {place}"
    )
    (of_pipeline,) = made(reward, path=str(miniature))
    (of_option,) = made({**reward, "options": {"tokenizer": str(files / "hps" / "tokenizer")}})
    for found in (of_pipeline, of_option):
        assert found.function.encode_text(["a"]).shape == (1, 48)
    with pytest.raises(ConfigurationError, match=f"hf download openai/.* {tmp_path / 'nowhere'}"):
        made({**reward, "options": {"tokenizer": str(tmp_path / "nowhere")}}, path=str(miniature))
    write_tokenizer(tmp_path / "alone" / "tokenizer")
    made(reward, path="no/such-pipeline")  # which is not looked for
