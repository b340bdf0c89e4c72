"""evaluation.html: the table of an evaluation, and the pairs in which most was gained or lost.

A mean that rises does not say how. The page shows, for every reward, the images that it likes most
and least beside those of the base; and first of all those that a trained reward likes better and a
held-out one worse, which is what a hacked reward looks like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..metrics import count, number
from ..pages import write_html
from .result import Evaluation
from .statistics import Estimate
from .thumbnails import Thumbnail, thumbnails

PAIRS = 8  # of a reward's largest gains, and of its largest losses
OPPOSED = 16  # pairs whose trained reward rose while a held-out one fell
PROMPT_LETTERS = 160


@dataclass(frozen=True)
class Group:
    """Some images, in order, each with the rewards that it is there for."""

    title: str
    none: str  # what to say where there are none
    images: Sequence[int]
    lead: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Score:
    """A reward's score of one image, as text."""

    reward: str
    policy: str
    base: str = ""
    change: str = ""
    direction: str = ""


@dataclass(frozen=True)
class Card:
    prompt: str
    length: int  # of the whole prompt, where it is cut; else 0
    pictures: Sequence[tuple[str, Thumbnail]]  # whose it is ('' without a base)
    lead: Sequence[Score]
    others: Sequence[Score]


def write_page(evaluation: Evaluation, folder: Path) -> Path:
    """Writes folder/evaluation.html, which needs nothing but itself; returns its path.

    The images' files are in the folder; the page links to them, and holds thumbnails of those it
    shows. Raises FileNotFoundError for an image that is missing, OSError for one that is no image.
    """
    folder = Path(folder)
    _check_files(evaluation, folder)
    change = _finite(evaluation.scores.double())
    if evaluation.base_scores is not None:
        change = _finite(change - evaluation.base_scores.double())
    opposed, opposed_text = _opposed_group(evaluation, change)
    table = {list(evaluation.rewards).index(row.reward): row for row in _table(evaluation)}
    groups = {i: _extremes(i, change[i], evaluation.base_scores is not None) for i in table}
    shown = [opposed] if opposed else []
    shown += [group for both in groups.values() for group in both]
    indices = sorted({i for group in shown for i in group.images})
    files = [evaluation.images[i] for i in indices]
    files += [evaluation.base_images[i] for i in indices] if evaluation.base_images else []
    pictures = thumbnails(folder, files)

    def cards(group: Group) -> dict[str, object]:
        found = [
            _card(evaluation, change, pictures, i, lead)
            for i, lead in zip(group.images, group.lead, strict=True)
        ]
        return {"title": group.title, "none": group.none, "cards": found}

    return write_html(
        folder / "evaluation.html",
        "evaluation.html.j2",
        name=evaluation.name,
        base_name=evaluation.base_name or "the base",
        paired=evaluation.base_scores is not None,
        images=count(len(evaluation.prompts), "image"),
        prompts=count(len(set(evaluation.prompts)), "prompt"),
        rows=list(table.values()),
        failures=any(row.failed for row in table.values()),
        opposed=cards(opposed) if opposed else None,
        opposed_text=opposed_text,
        rewards=[
            {"row": row, "groups": [cards(group) for group in groups[i]]}
            for i, row in table.items()
        ],
        side=max((max(p.width, p.height) for p in pictures.values()), default=0),
        pictures=list(pictures.values()),
        facts=evaluation.facts,
    )


def _check_files(evaluation: Evaluation, folder: Path) -> None:
    files = [*evaluation.images, *(evaluation.base_images or [])]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / missing[0]} is missing, and with it {len(missing):,} of the evaluation's"
            f" {len(files):,} images; expected all of them in {folder}"
        )


def _finite(values: Tensor) -> Tensor:
    return values.where(values.isfinite(), math.nan)


# What is shown


def _extremes(reward: int, values: Tensor, paired: bool) -> list[Group]:  # values: [M]
    """The images with the largest gains and losses, or the highest and the lowest scores."""
    scores = values.tolist()
    scored = [i for i, score in enumerate(scores) if math.isfinite(score)]
    order = sorted(scored, key=scores.__getitem__)
    if paired:
        high = [i for i in reversed(order[-PAIRS:]) if scores[i] > 0]
        low = [i for i in order[:PAIRS] if scores[i] < 0]
        titles = ("Largest gains", "No image gained."), ("Largest losses", "No image lost.")
    else:
        high = order[: -PAIRS - 1 : -1]
        low = order[: max(0, min(PAIRS, len(order) - len(high)))]  # no image on both sides
        none = "No other image was scored." if high else "No image was scored."
        titles = ("Highest", "No image was scored."), ("Lowest", none)
    return [
        Group(title, none, images, [[reward]] * len(images))
        for (title, none), images in zip(titles, (high, low), strict=True)
    ]


def _opposed_group(evaluation: Evaluation, change: Tensor) -> tuple[Group | None, str]:
    """Pairs whose trained reward rose and held-out one fell, the clearest first; and how many."""
    if evaluation.base_scores is None or evaluation.trained is None:
        return None, ""
    trained = torch.tensor(list(evaluation.trained), dtype=torch.bool)
    heldout = torch.tensor(list(evaluation.heldout), dtype=torch.bool)
    if not trained.any() or not heldout.any():
        return None, ""
    units = torch.stack([_in_deviations(row) for row in change])
    total, lead = opposed(units, change, trained, heldout)
    found = total.isfinite().nonzero().flatten().tolist()
    reverse = int(opposed(-units, -change, trained, heldout)[0].isfinite().sum())
    found.sort(key=lambda i: -total[i].item())
    text = (
        f"{len(found):,} of {count(change.shape[1], 'image')}. The reverse, a trained reward down"
        f" and a held-out one up: {reverse:,}. By chance alone the two would be alike."
    )
    if len(found) > OPPOSED:
        text += f" Below are the {OPPOSED} that moved furthest"
    elif found:
        text += " Sorted by how far they moved"
    if found:
        text += ": the sum of both changes, each in standard deviations of that reward's change."
    found = found[:OPPOSED]
    title = "Trained reward up, held-out down"
    return Group(title, "", found, [lead[:, i].tolist() for i in found]), text


def opposed(
    units: Tensor,  # [R, M] changes in comparable units
    change: Tensor,  # [R, M]; NaN: a failed score
    trained: Tensor,  # bool [R]
    heldout: Tensor,  # bool [R]; one that is neither is left out
) -> tuple[Tensor, Tensor]:
    """Per image the largest rise of a trained reward and the largest fall of a held-out one.

    Returns their sum in units [M], -inf where no trained reward rose or no held-out one fell; and
    which two they were, int64 [2, M].
    """
    rises = units.where((change > 0) & trained[:, None], -math.inf).max(dim=0)
    falls = (-units).where((change < 0) & heldout[:, None], -math.inf).max(dim=0)
    return rises.values + falls.values, torch.stack([rises.indices, falls.indices])


def _in_deviations(values: Tensor) -> Tensor:  # [M] -> [M]
    finite = values[values.isfinite()]
    if not len(finite):
        return values
    spread = finite.std(correction=0)
    # Where all moved alike there is no unit, and nothing to sort by.
    return values / spread if spread > 1e-9 * finite.abs().max() else values * 0


# How it reads


def _card(
    evaluation: Evaluation,
    change: Tensor,
    pictures: dict[Path, Thumbnail],
    image: int,
    lead: Sequence[int],
) -> Card:
    def score(reward: int) -> Score:
        name, policy = evaluation.rewards[reward], _text(evaluation.scores[reward, image].item())
        if evaluation.base_scores is None:
            return Score(name, policy)
        base, moved = evaluation.base_scores[reward, image].item(), change[reward, image].item()
        direction = "rose" if moved > 0 else "fell" if moved < 0 else ""
        return Score(name, policy, _text(base), _text(moved, sign=True), direction)

    prompt = " ".join(evaluation.prompts[image].split())
    short = prompt if len(prompt) <= PROMPT_LETTERS else prompt[:PROMPT_LETTERS].rstrip() + " …"
    shown = [("", pictures[evaluation.images[image]])]
    if evaluation.base_images is not None:
        base = pictures[evaluation.base_images[image]]
        shown = [("base", base), ("policy", shown[0][1])]
    others = [i for i in range(len(evaluation.rewards)) if i not in lead]
    length = 0 if short == prompt else len(prompt)
    return Card(short, length, shown, [score(i) for i in lead], [score(i) for i in others])


@dataclass(frozen=True)
class TableRow:
    """A comparison as text: means, and their intervals ('' where there is none)."""

    reward: str
    mark: str  # in-domain, held-out, reported or ''
    cells: dict[str, tuple[str, str]]  # column -> mean, interval
    emphasis: str  # of the change: rose or fell where its interval excludes 0
    failed: int


def _table(evaluation: Evaluation) -> list[TableRow]:
    rows = []
    for row in evaluation.comparisons:
        cells, emphasis = {"policy": _cell(row.policy)}, ""
        if row.base is not None and row.change is not None and row.win_rate is not None:
            cells = {"base": _cell(row.base), "policy": cells["policy"]}
            cells |= {
                "change": _cell(row.change, sign=True),
                "win rate": _cell(row.win_rate, percent=True),
            }
            emphasis = "rose" if row.change.low > 0 else "fell" if row.change.high < 0 else ""
        rows.append(TableRow(row.reward, row.mark, cells, emphasis, row.failed))
    return rows


def _cell(estimate: Estimate, sign: bool = False, percent: bool = False) -> tuple[str, str]:
    def text(value: float) -> str:
        return f"{100 * value:.0f}" if percent and math.isfinite(value) else _text(value, sign)

    low, high = text(estimate.low), text(estimate.high)
    unit = " %" if percent and math.isfinite(estimate.mean) else ""
    return text(estimate.mean) + unit, f"[{low}, {high}]" if estimate.has_interval else ""


def _text(value: float, sign: bool = False) -> str:
    return number(value, sign) if math.isfinite(value) else "–"
