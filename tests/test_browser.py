"""Pages as a browser shows them: evaluation.html and report.html."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from browser import dump_dom, needs_chromium, screenshot
from evaluations import (
    HOSTILE,
    digits_page,
    expected_table,
    made_up,
    photos_page,
    read,
    shown,
    table,
)
from example_run import DIGITS, noise, run_rows
from markup import parse
from PIL import Image

from g2rpo.evaluate.page import write_page
from g2rpo.grids import sample_path, write_grid
from g2rpo.metrics import MetricsLog
from g2rpo.report import write_report

pytestmark = needs_chromium
LIGHT, DARK = (255, 255, 255), (0x17, 0x19, 0x1C)  # templates/style.css.j2, --page


digits = pytest.fixture(scope="module")(digits_page)
photos = pytest.fixture(scope="module")(photos_page)


def test_a_browser_reads_the_same_table(digits) -> None:
    evaluation, page = digits
    seen = parse(dump_dom(page))
    assert table(seen) == expected_table(evaluation)
    assert shown(evaluation, seen) == shown(evaluation, read(page))


def test_a_browser_reads_any_prompt(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=8, prompts=HOSTILE)
    page = write_page(evaluation, tmp_path)
    seen, written = parse(dump_dom(page)), read(page)
    texts = [[node.text for node in tree.all("div", "prompt")] for tree in (seen, written)]
    assert texts[0] == texts[1] and len(texts[0]) > len(HOSTILE)
    assert not seen.all("script")


def test_a_browser_shows_the_very_pixels(digits, tmp_path) -> None:
    evaluation, page = digits
    window = screenshot(page, tmp_path / "page.png", 1200, 1000)
    assert window.shape == (1000, 1200, 3) and (window[0, 0] == LIGHT).all()
    first = shown(evaluation, read(page))[0]
    for file in (evaluation.base_images[first], evaluation.images[first]):
        with Image.open(page.parent / file) as opened:
            block = np.asarray(opened.convert("RGB")).repeat(12, axis=0).repeat(12, axis=1)
        assert holds(window, block), file


def holds(window: np.ndarray, block: np.ndarray) -> bool:
    """Whether the block is somewhere in the window, to the last bit."""
    height, width, _ = block.shape
    rows = np.lib.stride_tricks.sliding_window_view(window[..., 0], width, axis=1)
    return any(
        np.array_equal(window[y : y + height, x : x + width], block)
        for y, x in np.argwhere((rows == block[0, :, 0]).all(axis=-1))
    )


@pytest.mark.parametrize("kind", ["digits", "photos"])
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_runs_over_the_edge(kind, width, request, tmp_path) -> None:
    _, page = request.getfixturevalue(kind)
    dark = width == 390
    window = screenshot(page, tmp_path / "page.png", width, 1600, dark=dark)
    ground = DARK if dark else LIGHT
    edges = np.concatenate([window[:, :16], window[:, -16:]], axis=1)
    assert (edges == ground).all()
    assert (window != ground).any(axis=-1).mean() > 0.02
    assert colours(window) > (5000 if kind == "photos" else 50)


@pytest.mark.parametrize("width", [390, 1200])
def test_long_words_stay_within_the_edge(tmp_path, width) -> None:
    rewards = ["reward_" * 8, "judge_" * 8]
    evaluation = made_up(tmp_path, 8, prompts=HOSTILE, rewards=rewards, heldout=[False, True])
    evaluation = dataclasses.replace(evaluation, name="run-" * 40, facts={"Base": "/folder" * 30})
    page = write_page(evaluation, tmp_path)
    window = screenshot(page, tmp_path / "page.png", width, 6000)
    assert (window[:, -16:] == LIGHT).all()
    assert (window[-50:] == LIGHT).all()  # the page's end was in it
    assert "x" * 100 in read(page).all("section")[0].text


def colours(window: np.ndarray) -> int:
    return len(np.unique(window.astype(np.uint32) @ np.array([1, 2**8, 2**16], dtype=np.uint32)))


def test_a_browser_shows_the_report_of_a_run(tmp_path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.yaml").write_text("train:\n  updates: 4\n  evaluation_samples: 400\n")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for row in run_rows():
        log.append(row)
    for update in (0, 4):
        images = noise(12, 3, 8, 8, seed=update)
        write_grid(images, DIGITS * 4, sample_path(tmp_path / "samples", update))
    page = write_report(tmp_path)
    seen = parse(dump_dom(page))
    attributes = [node.attributes for node in seen]
    sources = [found[name] for found in attributes for name in ("src", "href") if name in found]
    assert sources and all(source.startswith("data:") for source in sources)
    cells = [[cell.text for cell in row.all("td")] for row in seen.all("table")[0].all("tr")]
    numbers = ["0.986 ± 0.015", "0.960 ± 0.015", "-0.026 ± 0.021 ▼"]
    assert ["judge_accuracy", "held-out", *numbers] in cells
    window = screenshot(page, tmp_path / "page.png", 1200, 2000)
    with Image.open(tmp_path / "samples" / "before_after.png") as opened:
        corner = np.asarray(opened.convert("RGB"))[-40:, -40:]  # of a sample, not of its labels
    assert colours(corner) > 9
    assert holds(window, corner)
