"""The page that `g2rpo evaluate` leaves, of the digits and of FLUX's miniature, in a browser."""

import json
from pathlib import Path

import numpy as np
import pytest
from browser import dump_dom, needs_chromium, screenshot
from evaluations import table
from flux_small import write_run
from markup import parse

from g2rpo import cli, digits
from g2rpo.metrics import number

pytestmark = needs_chromium
SMALL = ("--rollout.steps", "4", "--rollout.sde_positions", "[0]", "--rollout.group_size", "4")


def g2rpo_(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.fixture
def digits_run(tmp_path, monkeypatch) -> Path:
    """Of the model before its pre-training, which takes seconds."""
    monkeypatch.setattr(digits, "pretrained_transformer", lambda **_: digits.new_transformer(0))
    g2rpo_(
        "train", "digits", "--train.output", tmp_path / "run", "--train.updates", 1,
        "--train.evaluation_samples", 20, *SMALL,
    )  # fmt: skip
    return tmp_path / "run"


@pytest.fixture
def flux_run(tmp_path, miniature) -> Path:
    model = {"path": str(miniature), "lora": {"rank": 4, "alpha": 8}}
    train = {"updates": 1, "evaluation_samples": 4}
    file = write_run(tmp_path, miniature, train=train, model=model)
    g2rpo_("train", file, "--train.output", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("which", ["digits_run", "flux_run"])
def test_the_page_of_the_command(which, request, tmp_path):
    g2rpo_("evaluate", request.getfixturevalue(which))
    folder = tmp_path / "run" / "evaluation-step-000001"
    page, found = folder / "evaluation.html", json.loads((folder / "evaluation.json").read_text())
    dom = parse(dump_dom(page))
    cells = {row[0]: row[1:] for row in table(dom)}
    assert list(cells) == [row["reward"] for row in found["table"]]
    for row in found["table"]:
        mark, base, policy, change, *_ = cells[row["reward"]]
        assert mark == row["mark"]
        for text, key in ((base, "base"), (policy, "policy"), (change, "change")):
            assert text.split()[0] == number(row[key]["mean"], sign=key == "change")
            assert number(row[key]["low"], sign=key == "change") in text
    links = [node.attributes["href"] for node in dom.all("a")]
    assert links and all((folder / link).is_file() for link in links)
    window = screenshot(page, tmp_path / "page.png", 1000, 1400)
    assert window.shape == (1400, 1000, 3)
    assert len(np.unique(window.reshape(-1, 3), axis=0)) > 50
