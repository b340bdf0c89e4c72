"""ImageReward against its equations in plain torch, on a small checkpoint in its own layout."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from g2rpo.errors import ConfigurationError
from g2rpo.rewards import Reward, score
from g2rpo.rewards.imagereward import ImageReward, load_imagereward

VISION, PATCH, SIDE, DEPTH = 128, 8, 32, 2  # two heads of 64
TEXT, HEADS, LAYERS, POSITIONS, EPS = 48, 3, 2, 40, 1e-5
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a red fox in the snow , ##es".split()
MEAN, STD = 0.16717362830052426, 1.0333394966054072
PROMPTS = ["a red fox", "", "the Foxes, in the snow", "a [ENC] fox [DEC]", "blue"]
IDS = {  # by hand: WORDS' places, then [DEC] and [ENC]
    "a red fox": [2, 5, 6, 7, 3], "": [2, 3], "blue": [2, 1, 3],
    "the Foxes, in the snow": [2, 9, 7, 12, 11, 8, 9, 10, 3],
    "a [ENC] fox [DEC]": [2, 5, 14, 7, 13, 3],
}  # fmt: skip


def small_checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of the published file."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    def linear(key: str, into: int, out: int) -> None:
        state[f"{key}.weight"] = normal(out, into, std=into**-0.5)
        state[f"{key}.bias"] = normal(out, std=0.1)

    def norm(key: str, width: int) -> None:
        state[f"{key}.weight"] = 1 + normal(width, std=0.1)
        state[f"{key}.bias"] = normal(width, std=0.1)

    # small embeddings: the norms' epsilons count
    vision = "blip.visual_encoder"
    state[f"{vision}.cls_token"] = normal(1, 1, VISION, std=0.003)
    state[f"{vision}.pos_embed"] = normal(1, (SIDE // PATCH) ** 2 + 1, VISION, std=0.003)
    state[f"{vision}.patch_embed.proj.weight"] = normal(VISION, 3, PATCH, PATCH, std=3e-4)
    state[f"{vision}.patch_embed.proj.bias"] = normal(VISION, std=0.003)
    for i in range(DEPTH):
        norm(f"{vision}.blocks.{i}.norm1", VISION)
        linear(f"{vision}.blocks.{i}.attn.qkv", VISION, 3 * VISION)
        linear(f"{vision}.blocks.{i}.attn.proj", VISION, VISION)
        norm(f"{vision}.blocks.{i}.norm2", VISION)
        linear(f"{vision}.blocks.{i}.mlp.fc1", VISION, 4 * VISION)
        linear(f"{vision}.blocks.{i}.mlp.fc2", 4 * VISION, VISION)
    norm(f"{vision}.norm", VISION)
    text = "blip.text_encoder"
    state[f"{text}.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = normal(len(WORDS) + 2, TEXT, std=0.01)
    state[f"{text}.embeddings.position_embeddings.weight"] = normal(POSITIONS, TEXT, std=0.005)
    norm(f"{text}.embeddings.LayerNorm", TEXT)
    for i in range(LAYERS):
        layer = f"{text}.encoder.layer.{i}"
        for kind, keys in (("attention", TEXT), ("crossattention", VISION)):
            linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            linear(f"{layer}.{kind}.self.key", keys, TEXT)
            linear(f"{layer}.{kind}.self.value", keys, TEXT)
            linear(f"{layer}.{kind}.output.dense", TEXT, TEXT)
            norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", TEXT, 2 * TEXT)
        linear(f"{layer}.output.dense", 2 * TEXT, TEXT)
        norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", VISION, 16)
    linear("blip.text_proj", TEXT, 16)
    sizes = (TEXT, 64, 16, 8, 4, 1)
    for place, into, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:]):  # dropouts between them
        linear(f"mlp.layers.{place}", into, out)
    return state


def write(folder: Path, state: dict[str, Tensor] | None = None, **med_config: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(small_checkpoint() if state is None else state, folder / "ImageReward.pt")
    said = {
        "hidden_size": TEXT, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 2 * TEXT, "max_position_embeddings": POSITIONS, "hidden_act": "gelu",
        "vocab_size": len(WORDS) + 2, "layer_norm_eps": EPS, "encoder_width": 768,
        "add_cross_attention": True, "hidden_dropout_prob": 0.1, **med_config,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(said))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("imagereward") / "small")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ImageReward:
    return load_imagereward(folder)


def images(count: int, height: int = SIDE, width: int = SIDE, seed: int = 1) -> Tensor:
    """Of 8 bits, so that at SIDE the preprocessing has nothing to do but normalise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


# The equations of models/vit.py, models/med.py and ImageReward.py, one image and prompt at a time,
# in float64


class Equations:
    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {key: value.double() for key, value in state.items()}

    def linear(self, key: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]

    def norm(self, key: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self.state[f"{key}.weight"] + self.state[f"{key}.bias"]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:  # [tokens, width]
        parts = []
        for head in range(heads):
            q_h, k_h, v_h = (x.chunk(heads, dim=1)[head] for x in (q, k, v))
            weights = (q_h @ k_h.T / math.sqrt(q_h.shape[1])).exp()
            parts.append(weights / weights.sum(1, keepdim=True) @ v_h)
        return torch.cat(parts, dim=1)

    def gelu(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    def see(self, image: Tensor) -> Tensor:  # [3, SIDE, SIDE] -> [patches + 1, VISION]
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)
        image = (image.double() - mean[:, None, None]) / std[:, None, None]
        name, rows = "blip.visual_encoder", []
        kernel = self.state[f"{name}.patch_embed.proj.weight"].flatten(1)
        for top in range(0, SIDE, PATCH):
            for left in range(0, SIDE, PATCH):
                patch = image[:, top : top + PATCH, left : left + PATCH].flatten()
                rows.append(kernel @ patch + self.state[f"{name}.patch_embed.proj.bias"])
        x = torch.stack([self.state[f"{name}.cls_token"][0, 0], *rows])
        x = x + self.state[f"{name}.pos_embed"][0]
        for i in range(DEPTH):
            block = f"{name}.blocks.{i}"
            qkv = self.linear(f"{block}.attn.qkv", self.norm(f"{block}.norm1", x, 1e-6))
            seen = self.attend(*qkv.chunk(3, dim=1), heads=VISION // 64)
            x = x + self.linear(f"{block}.attn.proj", seen)
            h = self.linear(f"{block}.mlp.fc1", self.norm(f"{block}.norm2", x, 1e-6))
            x = x + self.linear(f"{block}.mlp.fc2", self.gelu(h))
        return self.norm(f"{name}.norm", x, 1e-6)

    def read(self, ids: list[int], seen: Tensor) -> Tensor:  # without padding -> [tokens, TEXT]
        name = "blip.text_encoder"
        x = self.state[f"{name}.embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{name}.embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(f"{name}.embeddings.LayerNorm", x, EPS)
        for i in range(LAYERS):
            layer = f"{name}.encoder.layer.{i}"
            for kind in ("attention", "crossattention"):
                source = x if kind == "attention" else seen
                q = self.linear(f"{layer}.{kind}.self.query", x)
                k = self.linear(f"{layer}.{kind}.self.key", source)
                v = self.linear(f"{layer}.{kind}.self.value", source)
                h = self.linear(f"{layer}.{kind}.output.dense", self.attend(q, k, v, HEADS))
                x = self.norm(f"{layer}.{kind}.output.LayerNorm", x + h, EPS)
            h = self.gelu(self.linear(f"{layer}.intermediate.dense", x))
            h = self.linear(f"{layer}.output.dense", h)
            x = self.norm(f"{layer}.output.LayerNorm", x + h, EPS)
        return x

    def score(self, image: Tensor, ids: list[int]) -> float:
        x = self.read(ids, self.see(image))[0]
        for place in (0, 2, 4, 6, 7):
            x = self.linear(f"mlp.layers.{place}", x)
        return (x.item() - MEAN) / STD


# Scores


def test_scores_are_those_of_the_equations(scorer):
    batch, equations = images(len(PROMPTS)), Equations(small_checkpoint())
    scores = scorer(batch, PROMPTS)
    expected = [equations.score(image, IDS[prompt]) for image, prompt in zip(batch, PROMPTS)]
    assert scores.dtype == torch.float32 and scores.std() > 0.1
    torch.testing.assert_close(scores.double(), torch.tensor(expected).double(), atol=1e-5, rtol=0)
    assert scorer.truncated_prompts == 0


def test_both_image_and_prompt_count(scorer):
    one = images(1)
    assert scorer(one.expand(2, -1, -1, -1), PROMPTS[:2]).diff().abs() > 0.01
    assert scorer(images(2), [PROMPTS[0]] * 2).diff().abs() > 0.01


def test_a_batch_is_its_images_one_by_one(folder, scorer):
    batch = images(5)
    alone = torch.cat([scorer(batch[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(scorer(batch, PROMPTS), alone, atol=1e-5, rtol=0)
    in_twos = load_imagereward(folder, batch_size=2)(batch, PROMPTS)
    torch.testing.assert_close(in_twos, alone, atol=1e-5, rtol=0)


def test_broken_images_are_nan_and_no_others(scorer):
    batch = images(3)
    whole = scorer(batch, PROMPTS[:3])
    batch[1, 2, 3, 4] = math.nan
    scores = score(Reward("imagereward", scorer), batch, PROMPTS[:3])
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[[0, 2]].float(), whole[[0, 2]], atol=1e-5, rtol=0)
    assert scorer(batch[1:2], [""]).isnan().all() and scorer(batch[:0], []).shape == (0,)
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\)"):
        scorer(torch.rand(1, 1, 4, 4), [""])


@pytest.mark.parametrize("height, width", [(75, 50), (48, 101), (20, 32)])
def test_other_sizes_are_resized_and_cut_as_by_pil(scorer, height, width):
    batch = images(1, height, width)
    pixels = (batch[0] * 255).round().byte().permute(1, 2, 0).numpy()
    scale = SIDE / min(height, width)
    rows = SIDE if height <= width else int(height * scale)
    columns = SIDE if width <= height else int(width * scale)
    resized = np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = round((rows - SIDE) / 2), round((columns - SIDE) / 2)
    cut = torch.tensor(resized[top : top + SIDE, left : left + SIDE]).permute(2, 0, 1) / 255
    expected = Equations(small_checkpoint()).score(cut, IDS["a red fox"])
    # a pixel of some hundreds may be a step of 255 away
    assert scorer(batch, ["a red fox"]).item() == pytest.approx(expected, abs=2e-3)


def test_long_prompts_are_cut_counted_once_and_told_apart(folder):
    scorer, image = load_imagereward(folder), images(1)
    fits = " ".join(["a red fox"] * 11)  # 33 words and two more tokens
    expected = Equations(small_checkpoint()).score(image[0], [2, *[5, 6, 7] * 11, 3])
    scores = [scorer(image, [prompt]).item() for prompt in (fits, f"{fits} in the snow")]
    assert scores[0] == scores[1] == pytest.approx(expected, abs=1e-5)
    assert scorer.truncated_prompts == 1
    scorer(images(2), [f"{fits} in the snow", f"{fits} the"])
    assert scorer.truncated_prompts == 2


def test_a_prompt_is_read_once(folder, monkeypatch):
    scorer, read = load_imagereward(folder), []
    encode = scorer.tokenizer.encode
    monkeypatch.setattr(scorer.tokenizer, "encode", lambda text: read.append(text) or encode(text))
    first = scorer(images(4), ["a", "fox", "a", "a"])
    again = scorer(images(4), ["a", "fox", "a", "a"])
    assert sorted(read) == ["a", "fox"] and torch.equal(first, again)
    monkeypatch.setattr("g2rpo.rewards.imagereward.KEPT", 2)
    scorer(images(3), ["red", "snow", "in"])
    assert len(scorer._tokens) == 2


def test_bfloat16_is_near_and_its_last_layers_are_not_rounded(folder, scorer):
    half, batch = load_imagereward(folder, dtype=torch.bfloat16), images(5)
    assert {p.dtype for p in half.vision.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.head.parameters()} == {torch.float32}
    scores = half(batch, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, scorer(batch, PROMPTS), atol=0.03, rtol=0)


def test_it_is_frozen_and_scores_the_same_after_it_was_away(folder):
    scorer = load_imagereward(folder)
    parts = (scorer.vision, scorer.text, scorer.head)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not any(part.training for part in parts)  # med_config.json asks for dropout
    before = scorer(images(2), PROMPTS[:2])
    assert scorer.offload() is scorer and scorer.to("cpu") is scorer
    assert torch.equal(scorer(images(2), PROMPTS[:2]), before)


# Files


def test_the_file_itself_another_name_and_the_words_elsewhere(tmp_path, folder, scorer):
    from safetensors.torch import save_file

    save_file(small_checkpoint(), tmp_path / "mine.safetensors")
    (tmp_path / "med_config.json").write_bytes((folder / "med_config.json").read_bytes())
    other = load_imagereward(tmp_path / "mine.safetensors", tokenizer=folder)
    assert torch.equal(other(images(2), PROMPTS[:2]), scorer(images(2), PROMPTS[:2]))


@pytest.mark.parametrize(
    "missing, command",
    [
        ("ImageReward.pt", "hf download THUDM/ImageReward ImageReward.pt --local-dir"),
        ("med_config.json", "hf download THUDM/ImageReward med_config.json --local-dir"),
        ("vocab.txt", "hf download google-bert/bert-base-uncased vocab.txt --local-dir"),
    ],
)
def test_a_missing_file_is_named_with_the_command(tmp_path, missing, command):
    (write(tmp_path / "x") / missing).unlink()
    with pytest.raises(ConfigurationError) as error:
        load_imagereward(tmp_path / "x")
    assert str(tmp_path / "x" / missing) in str(error.value)
    assert f"{command} {tmp_path / 'x'}" in str(error.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none/ImageReward\.pt is missing"):
        load_imagereward(tmp_path / "none")


class Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's, of what it refuses
@pytest.mark.parametrize("save", [torch.save, lambda x, file: file.write_bytes(pickle.dumps(x))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, save):
    target = tmp_path / "was_here"
    save({**small_checkpoint(), "more": Harmful(target)}, write(tmp_path / "x") / "ImageReward.pt")
    with pytest.raises(ConfigurationError, match=r"ImageReward\.pt"):
        load_imagereward(tmp_path / "x")
    assert not target.exists()


def refusal(folder: Path, state: dict[str, Tensor] | None = None, **med_config: object) -> str:
    with pytest.raises(ConfigurationError) as error:
        load_imagereward(write(folder, state, **med_config))
    return str(error.value)


def test_another_models_checkpoint_is_refused(tmp_path):
    state = small_checkpoint()
    text = refusal(tmp_path / "x", {"visual.proj": torch.ones(2, 2), "logit_scale": torch.ones(1)})
    assert "ImageReward.pt" in text and "'visual.proj'" in text and "mlp.layers.*" in text
    no_text = {k: v for k, v in state.items() if "text_encoder" not in k}
    assert "text_encoder.embeddings.word_embeddings.weight is missing" in refusal(
        tmp_path / "x", no_text
    )
    no_head = {k: v for k, v in state.items() if not k.startswith("mlp.")}
    assert "mlp.layers" in refusal(tmp_path / "x", no_head)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path):
    for key in ("visual_encoder.blocks.0.attn.proj", "text_encoder.encoder.layer.0.output.dense"):
        state = small_checkpoint()
        del state[f"blip.{key}.bias"]
        assert "1 are missing" in refusal(tmp_path / "x", state)
    state = small_checkpoint()
    state["blip.visual_encoder.norm.weight"] = torch.ones(7)
    assert "visual_encoder.norm.weight is [7], expected [128]" in refusal(tmp_path / "x", state)
    state = small_checkpoint()
    state["mlp.layers.4.weight"] = torch.ones(8, 15)
    assert "mlp.layers.4.weight is [8, 15], expected [8, 16]" in refusal(tmp_path / "x", state)


def test_a_tensor_without_a_place_is_warned_of(tmp_path, scorer):
    state = small_checkpoint()
    state["blip.visual_encoder.extra"] = torch.ones(1)
    with pytest.warns(UserWarning, match=r"holds 1 tensors.*visual_encoder\.extra"):
        other = load_imagereward(write(tmp_path / "x", state))
    assert torch.equal(other(images(1), ["a"]), scorer(images(1), ["a"]))


def test_files_of_two_models_are_refused(tmp_path):
    assert "hidden_size 768" in refusal(tmp_path / "x", hidden_size=768)
    assert "num_attention_heads 5" in refusal(tmp_path / "x", num_attention_heads=5)
    folder = write(tmp_path / "x")
    (folder / "vocab.txt").write_text("\n".join(WORDS[:-1]))
    with pytest.raises(ConfigurationError, match=r"vocab\.txt has 14 tokens.*the model 15"):
        load_imagereward(folder)
    (folder / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"vocab\.txt cannot be read"):
        load_imagereward(folder)


def test_a_batch_size_of_nothing(folder):
    with pytest.raises(ConfigurationError, match="batch_size is 0"):
        load_imagereward(folder, batch_size=0)
