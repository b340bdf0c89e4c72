"""evaluation.html is whole in itself, says the table's numbers and shows the right pairs."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from evaluations import (
    HOSTILE,
    cards,
    digits_page,
    expected_table,
    made_up,
    photos_page,
    read,
    shown,
    table,
)
from markup import Node
from PIL import Image

from g2rpo.evaluate import thumbnails
from g2rpo.evaluate.page import OPPOSED, PAIRS, PROMPT_LETTERS, write_page
from g2rpo.evaluate.statistics import compare
from g2rpo.metrics import number

FOREIGN = {"script", "link", "iframe", "object", "embed", "base", "img"}


digits = pytest.fixture(scope="module")(digits_page)
photos = pytest.fixture(scope="module")(photos_page)


def groups(page: Node, reward: str) -> dict[str, Node]:
    """Title -> the cards below it, of the section of a reward."""
    found = [d for d in page.all("details") if d.all("h2")[0].text == reward]
    assert len(found) == 1
    children = [child for child in found[0].children if isinstance(child, Node)]
    result = {}
    for title, grid in zip(children, children[1:]):
        if title.tag == "h3":
            result[title.text] = Node("", {})
            result[title.text].children.append(grid)
    return result


def pictures(page: Node) -> dict[str, tuple[str, Image.Image]]:
    """Id -> format and picture."""
    found = {}
    for image in page.all("image"):
        header, _, data = image.attributes["href"].partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            assert header == f"data:image/{opened.format.lower()}"
            found[image.attributes["id"]] = opened.format, opened.convert("RGB")
    return found


# What it says


def test_the_table_is_that_of_the_comparisons(digits) -> None:
    evaluation, page = digits
    assert page.name == "evaluation.html"
    found = table(read(page))
    assert found == expected_table(evaluation)
    assert [row[0] for row in found] == ["fit", "style", "judge"]
    text = read(page).text
    assert "run-1, step-000020" in text and "against its base, 40 images, 2 prompts" in text
    assert "Sampling steps 16" in text and f"Versions torch {torch.__version__}" in text
    assert "failed scores" not in text


def test_colour_only_where_the_interval_excludes_zero(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=30)
    scores = evaluation.scores.clone()
    scores[1] = evaluation.base_scores[1] + torch.tensor([-1.0, 1.2]).repeat(15)
    page = read(write_page(dataclasses.replace(evaluation, scores=scores), tmp_path))
    rows = page.all("table", "rewards")[0].all("tbody")[0].all("tr")
    assert [[s.classes for s in row.all("span")] for row in rows] == [[["rose"]], [], [["fell"]]]


def test_largest_gains_and_losses(digits) -> None:
    evaluation, page = digits
    change = (evaluation.scores - evaluation.base_scores).numpy()
    for i, reward in enumerate(evaluation.rewards):
        found = groups(read(page), reward)
        order = np.argsort(change[i])
        gains = [k for k in order[::-1][:PAIRS] if change[i, k] > 0]
        losses = [k for k in order[:PAIRS] if change[i, k] < 0]
        assert 0 < len(losses) and 0 < len(gains)
        assert shown(evaluation, found["Largest gains"]) == gains
        assert shown(evaluation, found["Largest losses"]) == losses
        card, k = cards(found["Largest losses"])[0], losses[0]
        base, policy = evaluation.base_scores[i, k].item(), evaluation.scores[i, k].item()
        lead, others = card.all("ul", "scores")
        assert lead.text == f"{number(base)} → {number(policy)} {number(policy - base, True)} ▼"
        assert evaluation.prompts[k] == card.all("div", "prompt")[0].text
        for line, j in zip(others.all("li"), [j for j in range(3) if j != i], strict=True):
            arrow = "▲" if change[j, k] > 0 else "▼"
            assert line.text == f"{evaluation.rewards[j]} {number(change[j, k], True)} {arrow}"
        # side by side, the base's first
        assert [f.all("figcaption")[0].text for f in card.all("figure")] == ["base", "policy"]
        hrefs = [link.attributes["href"] for link in card.all("a")]
        assert hrefs == [str(evaluation.base_images[k]), str(evaluation.images[k])]


def test_trained_reward_up_and_heldout_down(digits) -> None:
    evaluation, page = digits
    change = (evaluation.scores - evaluation.base_scores).numpy()
    units = change / change.std(axis=1, keepdims=True)
    distance, reverse = {}, 0
    for k in range(change.shape[1]):
        if max(change[:2, k]) > 0 > change[2, k]:
            distance[k] = max(units[i, k] for i in (0, 1) if change[i, k] > 0) - units[2, k]
        reverse += min(change[:2, k]) < 0 < change[2, k]
    order = sorted(distance, key=distance.get, reverse=True)
    section = next(s for s in read(page).all("section") if s.attributes["id"] == "opposed")
    assert OPPOSED < len(order) < 40 and reverse > 0
    assert f"{len(order)} of 40 images" in section.text
    assert f"a held-out one up: {reverse}." in section.text
    assert shown(evaluation, section) == order[:OPPOSED]
    lead = cards(section)[0].all("ul", "scores")[0].all("li")
    trained = max((0, 1), key=lambda i: units[i, order[0]])
    assert [line.all("span")[0].text for line in lead] == [evaluation.rewards[trained], "judge"]
    assert [line.all("b")[0].classes for line in lead] == [["rose"], ["fell"]]


def test_a_change_that_is_the_same_everywhere_has_no_unit_to_sort_by(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=6, rewards=["fit", "judge"], heldout=[False, True])
    falls = torch.tensor([-1.0, -6, -2, 1, -3, -4], dtype=torch.float64)
    scores = evaluation.base_scores + torch.stack([torch.full((6,), 0.1), falls])
    page = read(write_page(dataclasses.replace(evaluation, scores=scores), tmp_path))
    section = next(s for s in page.all("section") if s.attributes["id"] == "opposed")
    assert "5 of 6 images" in section.text
    assert shown(evaluation, section) == [1, 5, 4, 2, 0]


@pytest.mark.parametrize("heldout", [True, False])
def test_no_opposed_section_without_both_kinds(tmp_path, heldout) -> None:
    evaluation = made_up(tmp_path, images=4, heldout=[heldout] * 3)
    assert not read(write_page(evaluation, tmp_path)).all("section")


def test_what_is_only_reported_opposes_nothing(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=20)
    reported = dataclasses.replace(evaluation, trained=[False, True, False])
    page = read(write_page(reported, tmp_path))
    assert [row[:2] for row in table(page)] == [
        ["style", "in-domain"], ["fit", "reported"], ["judge", "held-out"],
    ]  # fmt: skip
    titles = [summary.all("h2")[0].text for summary in page.all("summary")]
    assert titles == ["style", "fit", "judge"]
    change = evaluation.scores - evaluation.base_scores
    opposed = ((change[1] > 0) & (change[2] < 0)).sum()
    assert f"{opposed} of 20 images" in page.text
    assert opposed < ((change[:2].amax(dim=0) > 0) & (change[2] < 0)).sum()
    assert "reported ones had the weight 0" in page.text
    unknown = dataclasses.replace(evaluation, trained=None, heldout=[False] * 3)
    page = read(write_page(unknown, tmp_path))
    assert not page.all("section") and [row[1] for row in table(page)] == [""] * 3
    assert "trained on" not in page.text and "in-domain" not in page.text


def test_without_a_base_the_highest_and_the_lowest(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=11, paired=False)
    page = read(write_page(evaluation, tmp_path))
    row = evaluation.comparisons[0].policy
    mean = f"{number(row.mean)} [{number(row.low)}, {number(row.high)}]"
    assert table(page)[0] == ["fit", "in-domain", mean]
    found = groups(page, "fit")
    order = evaluation.scores[0].argsort().tolist()
    assert shown(evaluation, found["Highest"]) == order[::-1][:PAIRS]
    assert shown(evaluation, found["Lowest"]) == order[:3]  # none on both sides
    assert "→" not in page.text and "base" not in page.text and "change" not in page.text


def test_failed_scores_are_counted_and_never_extreme(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=40)
    scores, base = evaluation.scores.clone(), evaluation.base_scores.clone()
    scores[0, :3], base[0, 3], scores[0, 4] = math.nan, math.nan, math.inf
    evaluation = dataclasses.replace(evaluation, scores=scores, base_scores=base)
    page = read(write_page(evaluation, tmp_path))
    assert [row[-1] for row in table(page)] == ["5", "0", "0"]
    change = (scores - base)[0, 5:]
    order = (change.argsort() + 5).tolist()
    lost, found = int((change < 0).sum()), groups(page, "fit")
    assert 0 < lost < 30
    assert shown(evaluation, found["Largest losses"]) == order[:lost][:PAIRS]
    assert shown(evaluation, found["Largest gains"]) == order[lost:][::-1][:PAIRS]
    failed = [card for card in cards(page) if "fit –" in card.text]
    assert failed and all("fit – ▲" not in card.text for card in failed)
    assert "nan" not in page.text and "inf" not in page.text


def test_all_scores_failed(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=4)
    scores = torch.full_like(evaluation.scores, math.nan)
    page = read(write_page(dataclasses.replace(evaluation, scores=scores), tmp_path))
    assert table(page)[0][3:] == ["–", "–", "–", "4"]
    assert "No image gained." in page.text and "0 of 4 images" in page.text and not cards(page)


# What is in it


@pytest.mark.parametrize("kind", ["digits", "photos"])
def test_the_page_needs_nothing_but_itself(kind, request) -> None:
    evaluation, page = request.getfixturevalue(kind)
    text = page.read_text(encoding="utf-8")
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text
    tree = read(page)
    assert not {n.tag for n in tree} & FOREIGN
    ids = [image.attributes["id"] for image in tree.all("image")]
    assert len(ids) == len(set(ids))
    for node in tree:
        assert not any(name.startswith("on") for name in node.attributes), node.tag
        if node.tag == "a":
            assert (page.parent / unquote(node.attributes["href"])).is_file()
            picture = node.all("svg")[0]
            assert picture.attributes["aria-label"].endswith(tuple(evaluation.prompts))
        elif node.tag == "use":
            assert node.attributes["href"].removeprefix("#") in ids
        elif node.tag == "image":
            assert node.attributes["href"].startswith("data:image/")
        else:
            assert not node.attributes.keys() & {"href", "src", "srcset", "data", "poster"}


def test_a_tiny_image_is_in_it_pixel_for_pixel_and_once(digits) -> None:
    evaluation, page = digits
    tree = read(page)
    found = pictures(tree)
    uses = [(a.attributes["href"], a.all("use")[0].attributes["href"][1:]) for a in tree.all("a")]
    assert len(uses) > len(set(uses)) == len(found)
    for link, name in set(uses):
        kind, picture = found[name]
        with Image.open(page.parent / link) as opened:
            whole = np.asarray(opened.convert("RGB"))
        assert kind == "PNG" and picture.size == (96, 96)
        assert (np.asarray(picture) == whole.repeat(12, axis=0).repeat(12, axis=1)).all()


def test_a_photograph_is_in_it_smaller(photos) -> None:
    evaluation, page = photos
    tree = read(page)
    found = pictures(tree)
    for link in tree.all("a"):
        kind, picture = found[link.all("use")[0].attributes["href"][1:]]
        assert kind == "JPEG" and picture.size == (320, 320)
        with Image.open(page.parent / link.attributes["href"]) as opened:
            small = opened.convert("RGB").resize((320, 320), Image.Resampling.LANCZOS)
        error = np.asarray(small, dtype=float) - np.asarray(picture, dtype=float)
        assert np.abs(error).mean() < 5
    assert page.stat().st_size < 2**20


def test_many_photographs_share_the_room(tmp_path, monkeypatch) -> None:
    evaluation = made_up(tmp_path, images=20, kind="photos")
    monkeypatch.setattr(thumbnails, "PAGE_PIXELS", 40 * 100 * 100)
    found = pictures(read(write_page(evaluation, tmp_path)))
    assert {picture.size for _, picture in found.values()} == {(100, 100)} and len(found) == 40


def test_ten_thousand_pairs(tmp_path) -> None:
    images = 10_000
    evaluation = made_up(tmp_path, images=32)
    generator = torch.Generator().manual_seed(0)
    base, scores = torch.rand(2, 3, images, generator=generator, dtype=torch.float64)
    many = dataclasses.replace(
        evaluation,
        prompts=[f"prompt {i}" for i in range(images)],
        images=[evaluation.images[i % 32] for i in range(images)],
        base_images=[evaluation.base_images[i % 32] for i in range(images)],
        scores=scores,
        base_scores=base,
    )
    rows = zip(many.rewards, many.heldout, scores, base, strict=True)
    # the page's time alone
    vars(many)["comparisons"] = [compare(*row, resamples=9) for row in rows]
    page = write_page(many, tmp_path)
    assert page.stat().st_size < 2**18
    assert len(cards(read(page))) == OPPOSED + 3 * 2 * PAIRS
    assert "of 10,000 images" in read(page).text


def test_any_prompt_is_shown_as_text(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=8, prompts=HOSTILE)
    evaluation = dataclasses.replace(evaluation, name="<i>run</i> & co", facts={"<u>": "</table>"})
    page = read(write_page(evaluation, tmp_path))
    assert not {node.tag for node in page} & {"script", "i", "u"}
    prompts = [n for n in page.all("div", "prompt")]
    assert {n.attributes["dir"] for n in prompts} == {"auto"}
    texts = {n.text for n in prompts}
    assert texts == {
        *HOSTILE[:3],
        "{{ 7 * 7 }} {% raw %} two lines",
        ("word " * (PROMPT_LETTERS // 5)).strip() + " … (1,999 characters)",
        "x" * PROMPT_LETTERS + " … (2,000 characters)",
        "",
        r"half \ud83d of a pair",
    }
    assert "<i>run</i> & co" in page.all("h1")[0].text and "<u> </table>" in page.text


def test_a_link_finds_a_file_of_any_name(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=1)
    odd = Path("policy") / '50% & #1? "é" <b>.png'
    shutil.move(tmp_path / evaluation.images[0], tmp_path / odd)
    page = read(write_page(dataclasses.replace(evaluation, images=[odd]), tmp_path))
    links = {link.attributes["href"] for link in page.all("a")}
    assert "policy/50%25%20%26%20%231%3F%20%22%C3%A9%22%20%3Cb%3E.png" in links


def test_a_missing_image_is_named(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=5)
    for file in (evaluation.images[3], evaluation.base_images[1]):
        (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=r"policy/00003\.png is missing.* 2 of .* 10 im"):
        write_page(evaluation, tmp_path)
    assert not (tmp_path / "evaluation.html").exists()


def test_an_image_that_is_none_is_named(tmp_path) -> None:
    evaluation = made_up(tmp_path, images=2)
    (tmp_path / evaluation.images[1]).write_bytes(b"not a picture")
    with pytest.raises(OSError, match=r"policy/00001\.png cannot be read as an image: cannot "):
        write_page(evaluation, tmp_path)
