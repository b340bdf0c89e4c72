"""An evaluation's folder.

    evaluation.json      all of it: settings, table, scores of every image; strict JSON
    evaluation.csv       the table, a row a reward
    evaluation.html      the page
    scores.csv           a row an image
    images/              those of the policy, and
    base-images/         those of the base in pairs with them, where `g2rpo evaluate` drew them
"""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import ConfigurationError, TrainingError
from ..metrics import number, write_beside
from .result import Evaluation
from .statistics import Comparison, Estimate

IMAGES, BASE_IMAGES = "images", "base-images"
FILES = ("evaluation.json", "evaluation.csv", "evaluation.html", "scores.csv")
PICTURE = re.compile(r"\d{4,}(-.*)?\.png")  # as `pictures.picture_name` names them
PACKAGES = ("torch", "diffusers", "transformers", "peft", "scipy", "pillow")


def check_folder(output: Path, overwrite: bool) -> None:
    """Raise ConfigurationError where there is an evaluation already that may not be replaced."""
    there = _there(output)
    if there and not overwrite:
        raise ConfigurationError(
            f"--output is {str(output)!r}, which holds an evaluation "
            f"({there[0].relative_to(output)}); expected another folder, or --overwrite"
        )


def make_folder(output: Path) -> None:
    """The folder, without an evaluation in it: one that is there is removed, and nothing beside it.

    Raises ConfigurationError where it cannot be made or written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        for file in _there(output):
            file.unlink()
        for name in (IMAGES, BASE_IMAGES):
            if (folder := output / name).is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        write_beside(output / FILES[0], b"")  # can it be written?
        (output / FILES[0]).unlink()
    except OSError as error:
        raise ConfigurationError(
            f"--output is {str(output)!r}; expected a folder that can be made and written: {error}"
        ) from error


def _there(output: Path) -> list[Path]:
    """The files of an evaluation that are in a folder."""
    found = [output / name for name in FILES if (output / name).exists()]
    for folder in (output / IMAGES, output / BASE_IMAGES):
        if folder.is_dir():
            found += [file for file in folder.iterdir() if PICTURE.fullmatch(file.name)]
    return found


def write_files(evaluation: Evaluation, output: Path, settings: Mapping[str, Any]) -> None:
    """evaluation.json and both .csv. Raises TrainingError where they cannot be written."""
    document = as_json(evaluation, settings)
    for name, data in (
        ("scores.csv", _csv(_score_rows(evaluation))),
        ("evaluation.csv", _csv(_table_rows(evaluation.comparisons))),
        ("evaluation.json", json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)),
    ):
        try:
            write_beside(output / name, data.encode())
        except OSError as error:
            raise TrainingError(f"{output / name} cannot be written: {error}") from error


def as_json(evaluation: Evaluation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A number that is not finite is null. settings: of the evaluation, as they are."""
    return {
        "name": evaluation.name,
        "base_name": evaluation.base_name,
        "facts": dict(evaluation.facts),
        "settings": dict(settings),
        "versions": versions(),
        "table": [_table_row(row) for row in evaluation.comparisons],
        "diversity": {
            "base": _number(evaluation.base_diversity), "policy": _number(evaluation.diversity),
        },
        "images": _images(evaluation),
    }  # fmt: skip


def _images(evaluation: Evaluation) -> list[dict[str, Any]]:
    base_scores, base_images = evaluation.base_scores, evaluation.base_images
    rows = []
    for i, (prompt, file) in enumerate(zip(evaluation.prompts, evaluation.images, strict=True)):
        row: dict[str, Any] = {"index": i, "prompt": prompt, "file": file.as_posix()}
        row["scores"] = _named(evaluation.rewards, evaluation.scores[:, i].tolist())
        if base_scores is not None and base_images is not None:
            row["base_file"] = base_images[i].as_posix()
            row["base_scores"] = _named(evaluation.rewards, base_scores[:, i].tolist())
        rows.append(row)
    return rows


def versions() -> dict[str, str]:
    """Of Python, this package, and the packages that images and numbers depend on."""
    found = {"python": platform.python_version(), "g2rpo": __version__}
    for name in PACKAGES:
        distribution = next(iter(metadata.distributions(name=name)), None)
        if distribution is not None:
            found[name] = distribution.version
    return found


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _named(rewards: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(rewards, values, strict=True)}


def _estimate(estimate: Estimate | None) -> dict[str, float | int | None] | None:
    if estimate is None:
        return None
    return {
        "mean": _number(estimate.mean), "low": _number(estimate.low),
        "high": _number(estimate.high), "count": estimate.count,
    }  # fmt: skip


ESTIMATES = ("base", "policy", "change", "win_rate")


def _table_row(row: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = {"reward": row.reward, "mark": row.mark or None}
    found |= {name: _estimate(getattr(row, name)) for name in ESTIMATES}
    return {**found, "failed": row.failed}


def _table_rows(rows: Iterable[Comparison]) -> list[dict[str, object]]:
    table = []
    for row in rows:
        flat: dict[str, object] = {"reward": row.reward, "mark": row.mark}
        for name in ESTIMATES:
            numbers = _estimate(getattr(row, name)) or {}
            flat |= {f"{name}_{key}": numbers.get(key) for key in ("mean", "low", "high", "count")}
        table.append({**flat, "failed": row.failed})
    return table


def _score_rows(evaluation: Evaluation) -> list[dict[str, object]]:
    rows = []
    for image in _images(evaluation):
        row: dict[str, object] = {key: image[key] for key in ("index", "prompt", "file")}
        row["base_file"] = image.get("base_file")
        row |= image["scores"]
        row |= {f"base/{name}": value for name, value in image.get("base_scores", {}).items()}
        rows.append(row)
    return rows


def _csv(rows: Sequence[Mapping[str, object]]) -> str:
    """None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def common_facts(base: float | None, policy: float | None) -> dict[str, object]:
    """Facts of every evaluation, from its diversities."""
    facts: dict[str, object] = {}
    if policy is not None:
        before = "" if base is None else f"{_spread(base)} -> "
        facts["Diversity within a prompt"] = before + _spread(policy)
    found = versions()
    facts["Versions"] = ", ".join(f"{name} {found[name]}" for name in ("g2rpo", "torch"))
    return facts


def _spread(value: float) -> str:
    return number(value) if math.isfinite(value) else "–"
