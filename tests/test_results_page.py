"""docs/results.md says what the comparisons' own files do."""

import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SHOWN = (
    "classifier_probability", "judge_probability", "judge_accuracy", "forest_probability",
    "coverage", "judge_probability, at equal reward", "forest_probability, at equal reward",
)  # fmt: skip


@pytest.mark.parametrize("name, methods", [("methods", 6), ("fair", 4), ("ablation", 13)])
def test_tables_are_the_json(name, methods):
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    found = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert len(found["methods"]) == methods
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for label, figures in found["methods"].items():
        for key in SHOWN:
            figure = figures[key]
            text = f"{figure['mean']:.3f} ± {figure['error']:.3f}"
            assert any(text in row for row in rows), (label, key, text)


def test_its_pictures_are_there():
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    for name in ("methods-curves", "methods-samples", "fair-curves", "ablation-curves"):
        name = f"{name}.png"
        assert f"results/{name}" in page and (DOCS / "results" / name).is_file()
