"""Grids show the images they were given, curves every kind of reward that the rows carry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from example_run import DIGITS, noise, pixels, run_rows
from PIL import Image

from g2rpo.figures import write_curves
from g2rpo.grids import sample_path, write_before_after, write_grid

BLUE, VERMILION = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)


def corner(path: Path) -> int:
    """Where the tiles of a grid begin, from the left."""
    with Image.open(path) as picture:
        return json.loads(picture.info["g2rpo"])["label_width"]


# Grids


def test_tiny_grey_tiles_are_the_images_enlarged_without_smoothing(tmp_path) -> None:
    images, prompts = noise(6, 1, 8, 8), ["one", "two", "one", "two", "one", "two"]
    write_grid(images, prompts, tmp_path / "grid.png")
    grid, left = pixels(tmp_path / "grid.png"), corner(tmp_path / "grid.png")
    assert grid.shape == (2 * 48 + 2 * 2 + 2 + 2 * 2, left + 3 * (48 + 2), 3)  # gaps of two pixels
    for index in range(6):
        row, column = index % 2, index // 2
        top, start = 2 + row * (48 + 2 + 2), left + column * (48 + 2)
        expected = np.kron((images[index, 0].numpy() * 255).round(), np.ones((6, 6)))
        tile = grid[top : top + 48, start : start + 48]
        assert (tile == expected[..., None]).all(), f"image {index}"
    labels = grid[:, :left]
    assert (labels[:50] < 128).any() and (labels[52:] < 128).any()  # each row has ink beside it


def test_columns_continue_a_prompt_below(tmp_path) -> None:
    images = torch.linspace(0, 1, 5)[:, None, None, None].expand(-1, 3, 64, 100)
    write_grid(images, ["a prompt"] * 5, tmp_path / "grid.png", columns=2)
    grid, left = pixels(tmp_path / "grid.png"), corner(tmp_path / "grid.png")
    assert grid.shape[1] - left == 2 * (100 + 4) and grid.shape[0] == 3 * (64 + 4) + 2 * 4
    centres = [grid[36 + 68 * (i // 2), left + 50 + 104 * (i % 2), 0] for i in range(6)]
    assert centres == [0, 64, 128, 191, 255, 255]  # the sixth place is empty: white


def test_large_images_shrink_and_middling_ones_stay(tmp_path) -> None:
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 1.0]])
    large = colours[:, :, None, None].expand(-1, -1, 768, 1024)
    write_grid(large, ["a long prompt " * 30] * 2, tmp_path / "large.png")
    grid, left = pixels(tmp_path / "large.png"), corner(tmp_path / "large.png")
    assert grid.shape[1] - left == 2 * (256 + 10) and grid.shape[0] == 192 + 3 * 10
    assert grid[100, left + 128].tolist() == [255, 0, 0]
    assert grid[100, left + 128 + 266].tolist() == [0, 128, 255]

    middling = noise(1, 3, 50, 90)
    write_grid(middling, [""], tmp_path / "middling.png")
    grid, left = pixels(tmp_path / "middling.png"), corner(tmp_path / "middling.png")
    expected = (middling[0] * 255).round().permute(1, 2, 0).numpy()
    assert (grid[3:53, left : left + 90] == expected).all()

    many = torch.linspace(0, 1, 256).expand(400, 3, 256, 256)
    write_grid(many, ["many"] * 400, tmp_path / "many.png", columns=20)
    height, width = pixels(tmp_path / "many.png").shape[:2]
    assert height * width < 2 * 2**21 and width > 20 * 60


def test_half_precision_images_are_as_good_as_any(tmp_path) -> None:
    images = (noise(2, 1, 8, 8) * 255).round() / 255
    for dtype in (torch.float32, torch.float64, torch.float16):
        write_grid(images.to(dtype), ["a", "b"], tmp_path / f"{dtype}.png")
    first, *others = (pixels(file) for file in sorted(tmp_path.iterdir()))
    assert all((first == other).all() for other in others)


@pytest.mark.parametrize(
    ("images", "prompts", "columns", "error", "words"),
    [
        (noise(2, 2, 8, 8), ["a", "b"], None, ValueError, r"images has shape \[2, 2, 8, 8\]"),
        (noise(2, 8, 8), ["a", "b"], None, ValueError, r"images has shape \[2, 8, 8\]"),
        (noise(0, 1, 8, 8), [], None, ValueError, r"images has shape \[0, 1, 8, 8\]"),
        (noise(2, 1, 8, 8) * 2, ["a", "b"], None, ValueError, r"images has values .* in \[0, 1\]"),
        (noise(2, 1, 8, 8) - 1, ["a", "b"], None, ValueError, r"images has values .* in \[0, 1\]"),
        (noise(2, 1, 8, 8) * torch.nan, ["a", "b"], None, ValueError, "images has values from nan"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ["a", "b"], None, TypeError, "torch.uint8"),
        (noise(2, 1, 8, 8), ["a"], None, ValueError, "prompts has 1 entries, expected .* 2"),
        (noise(2, 1, 8, 8), ["a", "b"], 0, ValueError, "columns is 0, expected at least 1"),
    ],
)
def test_grid_refuses(tmp_path, images, prompts, columns, error, words) -> None:
    with pytest.raises(error, match=words):
        write_grid(images, prompts, tmp_path / "grid.png", columns)
    assert not list(tmp_path.iterdir())


def test_before_after_shows_both_grids_and_the_labels_once(tmp_path) -> None:
    before, after = sample_path(tmp_path, 0), sample_path(tmp_path, 20)
    assert after.name == "update-000020.png"
    write_grid(noise(12, 1, 8, 8, seed=1), DIGITS * 4, before)
    write_grid(noise(12, 1, 8, 8, seed=2), DIGITS * 4, after)
    write_before_after(tmp_path, tmp_path / "both.png", 0, 20)
    both, first, second = (pixels(file) for file in (tmp_path / "both.png", before, after))
    left, title = corner(before), len(both) - len(first)
    assert (both[title:, : first.shape[1]] == first).all()
    start = both.shape[1] - (second.shape[1] - left)
    assert (both[title:, start:] == second[:, left:]).all()
    between = both[:, first.shape[1] : start]
    assert between.shape[1] > 10 and (between == 255).all()
    titles = both[:title]
    assert (titles[:, left:start] < 128).any() and (titles[:, start:] < 128).any()


def test_titles_do_not_run_into_one_another(tmp_path) -> None:
    for update in (20, 40):
        write_grid(noise(1, 1, 8, 8), ["1"], sample_path(tmp_path, update))
    write_before_after(tmp_path, tmp_path / "both.png", 20, 40)
    both = pixels(tmp_path / "both.png")
    ink = (both[: len(both) - 52] < 250).any(axis=(0, 2)).nonzero()[0]  # columns of the titles
    gaps = np.diff(ink)
    assert gaps.max() >= 18 and ink[-1] < both.shape[1]
    assert np.median(gaps) == 1 and (gaps > 12).sum() == 1  # two runs of letters


def test_before_after_refuses_what_does_not_belong_together(tmp_path) -> None:
    write_grid(noise(3, 1, 8, 8), DIGITS, sample_path(tmp_path, 0))
    write_grid(noise(6, 1, 8, 8), DIGITS * 2, sample_path(tmp_path, 1))
    Image.new("RGB", (60, 60)).save(sample_path(tmp_path, 2))
    for last, error, words in (
        (1, ValueError, "updates 0 and 1 differ in layout"),
        (2, ValueError, "update-000002.png: expected a grid written by write_grid"),
        (3, FileNotFoundError, "update-000003.png"),
    ):
        with pytest.raises(error, match=words):
            write_before_after(tmp_path, tmp_path / "both.png", 0, last)
    assert not (tmp_path / "both.png").exists()


# Curves


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def test_curves_are_sharp_at_900_pixels_and_draw_every_kind(tmp_path) -> None:
    write_curves(run_rows(), tmp_path / "both.png")
    write_curves(run_rows(heldout=False), tmp_path / "reward.png")
    both, reward = pixels(tmp_path / "both.png"), pixels(tmp_path / "reward.png")
    assert both.shape[1] == reward.shape[1] == 1800 and 800 < both.shape[0] < 1800
    assert has(both, BLUE) and has(both, VERMILION)
    assert has(reward, BLUE) and not has(reward, VERMILION)
    assert (both[[0, -1]] == 255).all() and (both[:, [0, -1]] == 255).all()  # nothing is cut off


def test_curves_work_from_the_first_row_on_and_with_gaps(tmp_path) -> None:
    write_curves(run_rows()[:1], tmp_path / "first.png")
    first = pixels(tmp_path / "first.png")
    write_curves(run_rows(), tmp_path / "all.png")
    assert has(first, BLUE) and has(first, VERMILION)
    assert len(first) < len(pixels(tmp_path / "all.png"))  # no empty row of small panels
    gaps = run_rows()
    gaps[2] |= {"heldout/judge_accuracy/mean": None, "grad_norm": None, "seconds/update": None}
    gaps[4] |= {"reward/classifier_log_prob/mean": None}
    write_curves(gaps, tmp_path / "gaps.png")
    assert has(pixels(tmp_path / "gaps.png"), VERMILION)


def test_curves_tint_where_reward_hacking_was_warned_of(tmp_path) -> None:
    tint = (0xF7, 0xEA, 0xF1)  # the alarm's colour on white
    rows = run_rows()
    for row in rows:
        for key in [key for key in row if key.endswith("/mean") and not key.startswith("rollout")]:
            row |= {key[:-4] + "low": row[key] - 0.02, key[:-4] + "high": row[key] + 0.02}
    for name, weight in (("hacked", 1.0), ("reported", 0.0)):
        rows[0]["reward/classifier_log_prob/weight"] = weight
        write_curves(rows, tmp_path / f"{name}.png")
    found = {name: pixels(tmp_path / f"{name}.png") for name in ("hacked", "reported")}
    near = {k: (abs(v.astype(int) - tint) <= 2).all(axis=-1).sum() for k, v in found.items()}
    assert near["hacked"] > 1000 and near["reported"] < near["hacked"] / 20


def test_curves_need_an_evaluation(tmp_path) -> None:
    for nothing in ([], [{"update": 1, "grad_norm": 1.0}]):
        with pytest.raises(ValueError, match="rows: expected at least one with a key 'reward/"):
            write_curves(nothing, tmp_path / "curves.png")
