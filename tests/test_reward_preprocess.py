"""Tensors on their device against PIL: the same pixels, for every way of fitting a rectangle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from g2rpo.errors import ConfigurationError
from g2rpo.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess, check

PHOTOGRAPHS = load_sample_images().images  # two, [427, 640, 3] uint8
# Whole, upright, smaller than the model's images, wide, square, and of an odd margin.
SHAPES = ((427, 640), (640, 427), (100, 150), (120, 640), (400, 400), (227, 256))


def tensor(photograph: np.ndarray) -> Tensor:  # [H, W, 3] uint8 -> [1, 3, H, W] in [0, 1]
    return torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None] / 255


def cut(photograph: np.ndarray, height: int, width: int) -> np.ndarray:
    if height > photograph.shape[0]:
        photograph = photograph.transpose(1, 0, 2)
    return np.ascontiguousarray(photograph[:height, :width])


def by_pil(photograph: np.ndarray, how: Preprocess) -> Tensor:  # -> [3, size, size], 0 to 255
    """As torchvision's Resize, CenterCrop and open_clip's ResizeMaxSize have it done by PIL."""
    image, size = Image.fromarray(photograph), how.size
    width, height = image.size
    short, long = sorted((width, height))
    if how.resize == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    elif how.resize == "shortest":
        other = int(size * long / short)
        wanted = (size, other) if width <= height else (other, size)
        image = image.resize(wanted, Image.Resampling.BICUBIC)
        across, down = image.width - size, image.height - size
        left, top = (across // 2, down // 2) if how.crop_down else (
            int(round(across / 2.0)), int(round(down / 2.0)))  # fmt: skip
        image = image.crop((left, top, left + size, top + size))
    else:
        scale = size / float(max(height, width))
        image = image.resize(
            (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
        )
        square = Image.new("RGB", (size, size))
        square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        image = square
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(
    "how",
    [Preprocess(224, "shortest"), Preprocess(224, "shortest", crop_down=True),
     Preprocess(224, "squash"), Preprocess(224, "longest"), Preprocess(378, "squash")],
    ids=lambda how: f"{how.resize}-{how.size}{'-down' * how.crop_down}",
)  # fmt: skip
def test_pixels_are_pils(how: Preprocess, shape: tuple[int, int]) -> None:
    for whole in PHOTOGRAPHS:
        photograph = cut(whole, *shape)
        away = (how.pixels(tensor(photograph))[0] - by_pil(photograph, how)).abs()
        if how.resize == "squash" and shape == (640, 427):  # Pillow 13 begins with the height
            assert away.mean() <= 0.25
            continue
        assert away.max() <= 2
        assert away.mean() <= 0.01  # of 255: a hundred times closer than 1/255 asks
        assert (away > 0).float().mean() <= 0.01


def test_one_rounding_is_not_enough() -> None:
    """What both roundings are for: without them the difference is twenty times as large."""
    how = Preprocess(224, "squash")
    images, expected = tensor(PHOTOGRAPHS[0]), by_pil(PHOTOGRAPHS[0], how)
    once = torch.nn.functional.interpolate(
        images * 255, (224, 224), mode="bicubic", antialias=True
    ).round().clamp(0, 255)  # fmt: skip
    ours = (how.pixels(images)[0] - expected).abs().mean()
    assert (once[0] - expected).abs().mean() > 20 * ours


def test_normalised_as_openai() -> None:
    how = Preprocess(224)
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_MEAN, OPENAI_STD))
    expected = (by_pil(PHOTOGRAPHS[1], how) / 255 - mean) / std
    away = (how(tensor(PHOTOGRAPHS[1]))[0] - expected).abs()
    assert away.mean() < 0.01 / 255 / min(OPENAI_STD)


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_a_batch_is_its_images(resize: str) -> None:
    how, images = Preprocess(48, resize), torch.rand(5, 3, 80, 64)
    alone = torch.cat([how(images[i : i + 1]) for i in range(5)])
    assert torch.equal(how(images), alone)


def test_input_is_left_alone() -> None:
    images = torch.rand(2, 3, 224, 224, requires_grad=False)
    before = images.clone()
    Preprocess(224)(images)
    assert torch.equal(images, before)


def test_bfloat16_images() -> None:
    images = torch.rand(2, 3, 64, 64).bfloat16()
    assert torch.equal(Preprocess(32)(images), Preprocess(32)(images.float()))


def test_a_little_beyond_is_clamped() -> None:
    how, images = Preprocess(16), torch.ones(1, 3, 32, 32)
    assert torch.equal(how(images + 9e-4), how(images))
    check(images + 9e-4)


def test_unknown_resize() -> None:
    with pytest.raises(ConfigurationError, match="resize is 'stretch'; expected one of shortest"):
        Preprocess(224, "stretch")


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        ([0.5], TypeError, "images is a list; expected a tensor"),
        (torch.rand(3, 8, 8), ValueError, r"shape \(3, 8, 8\); expected \[N, 3, H, W\]"),
        (torch.rand(2, 1, 8, 8), ValueError, r"shape \(2, 1, 8, 8\)"),
        (torch.rand(2, 4, 8, 8), ValueError, r"shape \(2, 4, 8, 8\)"),
        (torch.rand(2, 3, 0, 8), ValueError, r"shape \(2, 3, 0, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, "dtype torch.uint8"),
        (torch.rand(2, 3, 8, 8) * 255, ValueError, r"values from .* to 25.*; expected \[0, 1\]"),
        (torch.rand(2, 3, 8, 8) - 0.5, ValueError, "values from -0"),
    ],
)
def test_bad_images(images: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check(images, ["a", "b"])


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        (["a"], ValueError, "prompts has 1 entries; expected 2"),
        ("ab", TypeError, "is or holds a string; expected a list of 2 strings"),
        (["a", None], TypeError, "something else than strings"),
    ],
)
def test_bad_prompts(prompts: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        check(torch.rand(2, 3, 8, 8), prompts)


def test_pixels_that_are_not_finite() -> None:
    images = torch.rand(3, 3, 8, 8)
    images[1, 0, 0, 0], images[2, 2, 7, 7] = torch.nan, torch.inf
    replaced, finite = check(images)
    assert finite.tolist() == [True, False, False]
    assert torch.equal(replaced[0], images[0]) and replaced[1:].eq(0).all()
