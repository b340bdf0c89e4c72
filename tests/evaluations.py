"""Evaluations that never were, with their image files; and what a page of one says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import torch
from markup import Node, parse
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from g2rpo.evaluate.page import write_page
from g2rpo.evaluate.result import Evaluation
from g2rpo.evaluate.statistics import Estimate
from g2rpo.metrics import number

REWARDS = ["fit", "style", "judge"]
HELDOUT = [False, False, True]
PROMPTS = {"digits": ["two", "six"], "photos": ["a photograph of a temple", "a red flower"]}
HOSTILE = [
    "<script src=https://example.org/x.js>alert(1)</script>",
    "\"quoted\" 'twice' & <b>bold</b> </li></ul>",
    "🐈‍⬛ חתול שחור 黑猫",
    "{{ 7 * 7 }} {% raw %}\n two\tlines\n",
    "word " * 400,
    "x" * 2000,
    "",
    "half \ud83d of a pair",
]


def made_up(
    folder: Path,
    images: int = 40,
    kind: str = "digits",  # or "photos"
    prompts: Sequence[str] | None = None,
    rewards: Sequence[str] = REWARDS,
    heldout: Sequence[bool] = HELDOUT,
    paired: bool = True,
) -> Evaluation:
    """An evaluation whose trained rewards rose and whose held-out ones fell, the files included."""
    generator = torch.Generator().manual_seed(images)
    base = torch.rand(len(rewards), images, generator=generator, dtype=torch.float64)
    drift = torch.tensor([-0.1 if judged else 0.15 for judged in heldout], dtype=torch.float64)
    noise = torch.randn(len(rewards), images, generator=generator, dtype=torch.float64)
    names = [Path(f"policy/{i:05d}.png") for i in range(images)]
    base_names = [Path(f"base/{i:05d}.png") for i in range(images)]
    picture = _digits if kind == "digits" else _photo
    for i, file in enumerate([*names, *base_names] if paired else names):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / file)
    prompts = PROMPTS[kind] if prompts is None else prompts
    return Evaluation(
        name="run-1, step-000020",
        prompts=[prompts[i % len(prompts)] for i in range(images)],
        rewards=list(rewards),
        heldout=list(heldout),
        scores=base + drift[:, None] + 0.2 * noise if paired else base,
        images=names,
        base_name="its base" if paired else None,
        base_scores=base if paired else None,
        base_images=base_names if paired else None,
        trained=[not judged for judged in heldout],
        facts={"Sampling steps": 16, "Versions": f"torch {torch.__version__}"},
    )


# As fixtures: an evaluation, and its page.


def digits_page(tmp_path_factory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("digits")
    evaluation = made_up(folder)
    return evaluation, write_page(evaluation, folder)


def photos_page(tmp_path_factory) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("photos")
    evaluation = made_up(folder, images=12, kind="photos")
    return evaluation, write_page(evaluation, folder)


@cache
def _scans() -> np.ndarray:  # uint8 [1797, 8, 8]
    return (load_digits().images * 15.9).astype(np.uint8)


def _digits(i: int) -> Image.Image:
    return Image.fromarray(_scans()[i % len(_scans())])


@cache
def _photographs() -> list[np.ndarray]:  # a temple and a flower, uint8 [427, 640, 3]
    return load_sample_images().images


def _photo(i: int) -> Image.Image:
    corner = 3 * i % 30
    photograph = _photographs()[i % 2]
    return Image.fromarray(photograph[corner : corner + 384, 4 * corner : 4 * corner + 384])


# What a page says


def read(page: Path) -> Node:
    return parse(page.read_text(encoding="utf-8"))


def table(page: Node) -> list[list[str]]:
    body = page.all("table", "rewards")[0].all("tbody")[0]
    return [[cell.text for cell in row.all("td")] for row in body.all("tr")]


def expected_table(evaluation: Evaluation) -> list[list[str]]:
    """The comparisons, as the page should say them."""

    def rate(estimate: Estimate) -> str:
        mean, low, high = (f"{100 * x:.0f}" for x in (estimate.mean, estimate.low, estimate.high))
        return f"{mean} % [{low}, {high}]"

    def cell(estimate: Estimate, sign: bool = False) -> str:
        low, high = number(estimate.low, sign), number(estimate.high, sign)
        mark = "" if not sign else " ▲" if estimate.low > 0 else " ▼" if estimate.high < 0 else ""
        return f"{number(estimate.mean, sign)}{mark} [{low}, {high}]"

    return [
        [row.reward, "held-out" if row.heldout else "in-domain", cell(row.base), cell(row.policy),
         cell(row.change, sign=True), rate(row.win_rate)]
        for row in evaluation.comparisons
    ]  # fmt: skip


def cards(node: Node) -> list[Node]:
    grids = node.all("ul", "cards")
    return [card for grid in grids for card in grid.children if isinstance(card, Node)]


def shown(evaluation: Evaluation, node: Node) -> list[int]:
    """Which images are shown, by what their links point to."""
    links = [card.all("a")[-1].attributes["href"] for card in cards(node)]  # policy's comes last
    return [evaluation.images.index(Path(unquote(link))) for link in links]
