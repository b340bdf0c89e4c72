"""Published scorers by name: what is there, what is missing and how to get it, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from open_clip_small import DFN, HPS, make_state, write_scorers

from g2rpo.errors import ConfigurationError
from g2rpo.rewards.clip import ClipScorer
from g2rpo.rewards.load import default_folder, load, names
from g2rpo.rewards.preprocess import Preprocess


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a scorer, to read only."""
    state = make_state(128, 128, patch=56, resolution=224)
    return write_scorers(tmp_path_factory.mktemp("scorers"), state)


def test_unknown_name() -> None:
    with pytest.raises(ConfigurationError, match="'hps'; expected one of hps-v2.1, clip-score-224"):
        load("hps")
    assert names() == [
        "hps-v2.1", "clip-score-224", "clip-score-378", "pickscore", "aesthetic", "imagereward",
        "judge",
    ]  # fmt: skip


def test_others_are_imported_when_asked_for(tmp_path: Path) -> None:
    judge = load("judge", "http://localhost:1/v1", model="a judge")
    assert (judge.endpoint, judge.model) == ("http://localhost:1/v1", "a judge")
    with pytest.raises(ConfigurationError, match="path is None and model is None; expected a judg"):
        load("judge")
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        load("imagereward", tmp_path)


def test_preprocessing_is_the_authors(files: Path) -> None:
    """Which differs for images that are no squares."""
    found = {
        name: load(name, files / folder)
        for name, folder in (("hps-v2.1", "hps"), ("clip-score-224", "dfn"), ("pickscore", "pick"))
    }
    assert found["hps-v2.1"].preprocess == Preprocess(224, "longest")
    assert found["clip-score-224"].preprocess == Preprocess(224, "squash")
    assert found["pickscore"].preprocess == Preprocess(224, "shortest", crop_down=True)
    assert load("aesthetic", files / "laion").clip.preprocess == Preprocess(224, "shortest")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("hps-v2.1", f"hf download xswu/HPSv2 {HPS} --local-dir"),
        ("clip-score-224", f"hf download apple/DFN5B-CLIP-ViT-H-14 {DFN} --local-dir"),
        ("clip-score-378", f"hf download apple/DFN5B-CLIP-ViT-H-14-378 {DFN} --local-dir"),
        ("pickscore", "hf download yuvalkirstain/PickScore_v1 config.json model.safetensors"),
        ("aesthetic", "hf download openai/clip-vit-large-patch14 config.json model.safetensors"),
    ],
)
def test_missing_files_say_how_to_get_them(tmp_path: Path, name: str, command: str) -> None:
    place = tmp_path / "my files v2.1"  # a name with spaces, and what is no suffix
    with pytest.raises(ConfigurationError) as raised:
        load(name, place)
    assert command in str(raised.value) and f"--local-dir '{place}" in str(raised.value)
    place.mkdir()
    with pytest.raises(ConfigurationError) as raised:
        load(name, place)  # a folder without them
    assert command in str(raised.value)
    if name == "aesthetic":
        assert "linearMSE.pth' https://github.com/christophschuhmann" in str(raised.value)


def test_a_missing_file_names_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"not at .*{HPS}; run .*--local-dir {tmp_path} "):
        load("hps-v2.1", tmp_path / HPS)


def test_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    place = default_folder("hps-v2.1")
    assert place == tmp_path / "g2rpo" / "rewards" / "hps-v2.1"
    with pytest.raises(ConfigurationError, match=f"the files of hps-v2.1 are not at {place}; run"):
        load("hps-v2.1")
    place.parent.mkdir(parents=True)
    place.symlink_to(files / "hps")
    assert isinstance(load("hps-v2.1"), ClipScorer)


def test_a_model_of_another_size(files: Path) -> None:
    with pytest.raises(ConfigurationError, match="of images of 224 x 224; expected one of 378"):
        load("clip-score-378", files / "dfn")


def test_without_a_tokenizer(tmp_path: Path, files: Path) -> None:
    (tmp_path / HPS).symlink_to(files / "hps" / HPS)
    with pytest.raises(ConfigurationError, match="no vocabulary of CLIP in .*hf download openai/"):
        load("hps-v2.1", tmp_path)
    given = load("hps-v2.1", tmp_path, tokenizer=files / "hps" / "tokenizer")
    assert given.encode_text(["a"]).shape == (1, 48)
    with pytest.raises(ConfigurationError, match="no vocabulary of CLIP in .*nowhere"):
        load("hps-v2.1", tmp_path, tokenizer=tmp_path / "nowhere")


def test_the_tokenizer_of_another_model(tmp_path: Path, files: Path) -> None:
    torch.save(make_state(128, 128, patch=56, resolution=224, vocabulary=600), tmp_path / HPS)
    with pytest.raises(ConfigurationError, match="knows 514 tokens, the model 600"):
        load("hps-v2.1", tmp_path, tokenizer=files / "hps" / "tokenizer")


def test_folders_that_are_not_clip(tmp_path: Path, files: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigurationError, match="config.json is of a 't5'; expected 'clip'"):
        load("pickscore", tmp_path)
    (tmp_path / "config.json").write_bytes((files / "pick" / "config.json").read_bytes())
    with pytest.raises(ConfigurationError, match="cannot be loaded as a CLIP .*PickScore_v1"):
        load("pickscore", tmp_path)  # no weights
    from safetensors.torch import load_file, save_file

    weights = load_file(files / "pick" / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match="lacks 1 weights .*'text_projection.weight'"):
        load("pickscore", tmp_path)


def test_batch_size_of_nothing(files: Path) -> None:
    with pytest.raises(ConfigurationError, match="batch_size is 0; expected at least 1"):
        load("hps-v2.1", files / "hps", batch_size=0)
