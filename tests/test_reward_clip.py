"""Scorers of the CLIP family, by name, from small files of the published formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip_small import (
    CONTEXT,
    DFN,
    HEAD,
    HPS,
    STATE,
    image_features,
    make_head,
    make_state,
    text_features,
    tokens,
    write_scorers,
    write_tokenizer,
)
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from g2rpo.errors import ConfigurationError
from g2rpo.rewards import Reward, score
from g2rpo.rewards.clip import ClipScorer, read_head
from g2rpo.rewards.clip_tokens import ClipTokens, open_clip_text
from g2rpo.rewards.load import load
from g2rpo.rewards.open_clip_weights import load_open_clip
from g2rpo.rewards.preprocess import OPENAI_MEAN, OPENAI_STD

PROMPTS = ["a cat", "", "two lighthouses in a storm", "猫 и кот", "a cat"]


@pytest.fixture(scope="module")
def state() -> STATE:
    return make_state(128, 128, patch=56, resolution=224)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, state: STATE) -> Path:
    """A folder a scorer, to read only."""
    return write_scorers(tmp_path_factory.mktemp("scorers"), state)


@pytest.fixture
def hps(files: Path) -> ClipScorer:
    return load("hps-v2.1", files / "hps" / HPS)


def photographs(count: int = 5) -> Tensor:  # [count, 3, 256, 256], squares of two photographs
    cuts = []
    for i in range(count):
        image = load_sample_images().images[i % 2][20 * i : 20 * i + 256, 60 * i : 60 * i + 256]
        cuts.append(torch.from_numpy(image.copy()).permute(2, 0, 1) / 255)
    return torch.stack(cuts)


def by_pil(images: Tensor) -> Tensor:
    """The peers' way for squares: 8 bits, PIL's bicubic, OpenAI's mean and deviation."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_MEAN, OPENAI_STD))
    out = []
    for image in images:
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        small = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
        levels = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        out.append((levels / 255 - mean) / std)
    return torch.stack(out)


def expected_scores(state: STATE, images: Tensor, quick: bool = False) -> Tensor:
    ids = torch.tensor([tokens(prompt) for prompt in PROMPTS])
    images_ = image_features(state, by_pil(images), 64, quick)
    return (images_ * text_features(state, ids, 64, quick)).sum(1)


@pytest.mark.parametrize(
    ("name", "path", "quick", "scale"),
    [
        ("hps-v2.1", f"hps/{HPS}", False, 1.0),
        ("hps-v2.1", "hps", False, 1.0),
        ("clip-score-224", "dfn", True, 1.0),
        ("pickscore", "pick", False, float(np.exp(3.0))),
    ],
)
def test_scores_are_the_peers(
    files: Path, state: STATE, name: str, path: str, quick: bool, scale: float
) -> None:
    """The whole way of the peers, in other code: PIL's pixels, open_clip's forward and tokens."""
    images = photographs()
    found = load(name, files / path)(images, PROMPTS)
    expected = expected_scores(state, images, quick)
    assert found.shape == (5,) and found.dtype == torch.float32
    assert (found / scale - expected).abs().max() <= 1e-3
    assert expected.max() - expected.min() > 0.05  # so that 1e-3 says something
    assert found[0] != found[4]


def test_clip_score_in_transformers_format(files: Path, tmp_path: Path, state: STATE) -> None:
    load_open_clip(files / "dfn" / DFN, activation="quick_gelu").save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    images = photographs()
    found = load("clip-score-224", tmp_path)(images, PROMPTS)
    assert (found - expected_scores(state, images, True)).abs().max() <= 1e-3


def test_aesthetic(files: Path, state: STATE) -> None:
    images, mlp = photographs(), make_head()
    mlp.load_state_dict(torch.load(files / "laion" / HEAD))
    expected = mlp.layers(image_features(state, by_pil(images), 64, True)).squeeze(1)
    scorer = load("aesthetic", files / "laion", batch_size=2)
    found = scorer(images, PROMPTS)
    assert (found - expected).abs().max() <= 1e-3
    assert torch.equal(found, scorer(images, ["another"] * 5))
    images[3, 0, 0, 0] = torch.nan
    assert scorer(images, PROMPTS).isnan().tolist() == [False, False, False, True, False]
    assert scorer.truncated_prompts == 0 and not hasattr(scorer.clip.model, "text_model")


def test_a_single_layer_as_head(tmp_path: Path) -> None:
    layer = nn.Linear(48, 1)
    torch.save(layer.state_dict(), tmp_path / "linear.pth")
    features = torch.randn(3, 48)
    torch.testing.assert_close(read_head(tmp_path / "linear.pth", 48)(features), layer(features))


def test_batched_is_one_at_a_time(files: Path, hps: ClipScorer) -> None:
    images = photographs()
    alone = torch.cat([hps(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    for batch_size in (1, 2, 5, 32):
        batched = load("hps-v2.1", files / "hps", batch_size=batch_size)(images, PROMPTS)
        torch.testing.assert_close(batched, alone, rtol=0, atol=1e-5)


def test_features_have_length_one(hps: ClipScorer) -> None:
    images, texts = hps.encode_image(photographs(3)), hps.encode_text(PROMPTS)
    assert images.shape == (3, 48) and texts.shape == (5, 48)
    for features in (images, texts):
        torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))
    assert torch.equal(texts[0], texts[4])


def test_no_images(hps: ClipScorer) -> None:
    assert hps(torch.rand(0, 3, 64, 64), []).shape == (0,)
    assert hps.encode_text([]).shape == (0, 48)


def test_bfloat16(files: Path, state: STATE) -> None:
    images = photographs()
    scorer = load("hps-v2.1", files / "hps", dtype=torch.bfloat16)
    found = scorer(images, PROMPTS)
    assert found.dtype == torch.float32 and scorer.model.dtype == torch.bfloat16
    assert (found - expected_scores(state, images)).abs().max() < 0.03
    assert scorer(images.bfloat16(), PROMPTS).dtype == torch.float32


def test_truncated_prompts_are_counted(hps: ClipScorer, state: STATE) -> None:
    long, fits = "a" * CONTEXT, "a" * (CONTEXT - 2)  # without merges a letter is a token
    found = hps.encode_text([long, fits, long, "a"])
    assert hps.truncated_prompts == 1
    ids = torch.tensor([tokens(long), tokens(fits), tokens(long), tokens("a")])
    assert ids[0, -1] == ids[1, -1] == 513
    torch.testing.assert_close(found, text_features(state, ids, 64, False), rtol=0, atol=1e-5)
    hps.encode_text([long])
    assert hps.truncated_prompts == 1  # it was not encoded again
    hps.encode_text(["b" * 100])
    assert hps.truncated_prompts == 2


def test_texts_are_encoded_once(hps: ClipScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    tokenize = hps.tokens
    monkeypatch.setattr(hps, "tokens", lambda prompts: seen.extend(prompts) or tokenize(prompts))
    hps(photographs(), PROMPTS)
    hps(photographs(2), ["a cat", "a dog"])
    assert seen == ["a cat", "", "two lighthouses in a storm", "猫 и кот", "a dog"]


def test_the_cache_is_bounded(hps: ClipScorer) -> None:
    hps.cached, hps.batch_size = 2, 2
    prompts = ["a", "b", "c", "d", "a"]
    found = hps.encode_text(prompts)  # more at once than are kept
    assert list(hps._texts) == ["c", "d"]
    hps.encode_text(["c", "e"])
    assert list(hps._texts) == ["c", "e"]
    alone = torch.cat([hps.encode_text([prompt]) for prompt in prompts])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)


OTHER = ("猫が窓辺に座っている", "кот на окне", "قطة", "\N{CAT}\u200d\u2b1b", "e\u0301te")


@pytest.mark.parametrize("prompt", OTHER, ids=ascii)
def test_other_alphabets(files: Path, state: STATE, prompt: str) -> None:
    import unicodedata

    found = ClipTokens(files / "pick", 514, CONTEXT)([prompt])
    expected = tokens(unicodedata.normalize("NFC", prompt))
    assert found.ids[0].tolist() == expected and found.ends[0] == expected.index(513)


def test_capitals_do_not_matter(hps: ClipScorer) -> None:
    found = hps.encode_text(["A Cat", "a cat"])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("a &quot;cat&quot; &amp;amp; dog", 'a "cat" & dog'),
        ("it’s “fine”", "it's \"fine\""),
        ("ﬁne Ｆ１", "fine F1"),
        ("  a \n\t cat ", "a cat"),
        ("x² Ⅷ", "x² Ⅷ"),  # ftfy leaves these, as NFKC would not
    ],
)
def test_prompts_as_open_clip_cleans_them(prompt: str, cleaned: str) -> None:
    assert open_clip_text(prompt) == cleaned


def test_images_that_are_not_finite(hps: ClipScorer) -> None:
    images = photographs()
    expected = hps(images, PROMPTS)
    images[1, 0, 0, 0], images[2, 1, 9, 9] = torch.nan, torch.inf
    found = hps(images, PROMPTS)
    assert found.isnan().tolist() == [False, True, True, False, False]
    torch.testing.assert_close(found[[0, 3, 4]], expected[[0, 3, 4]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["hps", "laion"])
def test_bad_arguments(files: Path, name: str) -> None:
    scorer = load("hps-v2.1" if name == "hps" else "aesthetic", files / name)
    with pytest.raises(ValueError, match=r"images has shape \(2, 1, 8, 8\)"):
        scorer(torch.rand(2, 1, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="expected \\[0, 1\\]"):
        scorer(torch.rand(2, 3, 8, 8) * 255, ["a", "b"])
    with pytest.raises(ValueError, match="prompts has 1 entries; expected 2"):
        scorer(torch.rand(2, 3, 8, 8), ["a"])


def test_it_is_a_reward(hps: ClipScorer) -> None:
    images = photographs()
    before = images.clone()
    values = score(Reward("hps", hps), images, PROMPTS)
    assert values.dtype == torch.float64 and torch.equal(images, before)


def test_offload_and_back(hps: ClipScorer) -> None:
    """On the meta device, which computes nothing but knows where its tensors are."""
    expected = hps(photographs(2), PROMPTS[:2])
    assert hps.offload() is hps
    assert torch.equal(hps(photographs(2), PROMPTS[:2]), expected)
    assert hps.to("cpu") is hps and hps.device.type == "cpu"
    assert torch.equal(hps(photographs(2), PROMPTS[:2]), expected)
    hps.device = torch.device("meta")
    hps.offload()
    assert hps.model.device.type == "cpu"
    hps.encode_text(PROMPTS[:2])  # known: nothing comes back for it
    assert hps.model.device.type == "cpu"
    hps.come_back()
    assert hps.model.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {k.replace("layers.2", "layers.3"): v for k, v in s.items()}, "layers.0.bias"),
        (lambda s: {**s, "layers.7.weight": torch.ones(2, 4)}, "expected a chain from the 48"),
        (lambda s: {**s, "layers.0.weight": torch.ones(32, 40)}, "expected a chain from the 48"),
    ],
)
def test_other_heads_are_refused(tmp_path: Path, change, words: str) -> None:
    torch.save(change(make_head().state_dict()), tmp_path / "head.pth")
    with pytest.raises(ConfigurationError, match=f"head.pth .*{words}"):
        read_head(tmp_path / "head.pth", 48)


def test_normalised_like_torch(hps: ClipScorer, state: STATE) -> None:
    """The features of the tensors' own pixels, without PIL: to float32's last digits."""
    images = photographs()
    expected = image_features(state, hps.preprocess(images), 64, False)
    torch.testing.assert_close(hps.encode_image(images), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(F.normalize(expected, dim=1), expected)
