"""report.html is whole in itself and says the right numbers."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from example_run import DIGITS, noise, pixels, run_rows
from PIL import Image

from g2rpo.grids import sample_path, write_grid
from g2rpo.metrics import MetricsLog
from g2rpo.report import write_report

CONFIG = """\
data:
  prompts: '<script src="https://example.org/x.js">alert(1)</script>'
train:
  updates: 10
  evaluation_samples: 400
"""


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "digits-1 <b>"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    log = MetricsLog(folder / "metrics.jsonl")
    for row in run_rows():
        log.append(row)
        if row["update"] % 2 == 0:
            images = noise(12, 1, 8, 8, seed=row["update"])
            write_grid(images, DIGITS * 4, sample_path(folder / "samples", row["update"]))
    return folder


class Page(HTMLParser):
    """What a test wants to know of a page: its tags with attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def pictures(self) -> list[str]:
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


def test_report_needs_nothing_but_itself(run_dir) -> None:
    assert write_report(run_dir) == run_dir / "report.html"
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "b"}
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), tag
        for name in ("src", "href", "srcset", "data", "poster", "background"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, name)
    style = re.search(r"<style>(.*)</style>", text, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style
    # the configuration is there, as text
    assert "details" in tags and 'src="https://example.org/x.js">alert(1)' in page.text
    assert "digits-1 <b>" in page.text


def test_report_holds_the_very_pictures(run_dir) -> None:
    write_report(run_dir)
    pictures = Page((run_dir / "report.html").read_text()).pictures
    files = [run_dir / "curves.png", run_dir / "samples" / "before_after.png"]
    assert [base64.b64decode(uri.partition("base64,")[2]) for uri in pictures] == [
        file.read_bytes() for file in files
    ]
    both = pixels(files[1])
    last = pixels(sample_path(run_dir / "samples", 4))
    assert (both[-len(last) :, -100:] == last[:, -100:]).all()


def test_report_says_the_numbers(run_dir) -> None:
    write_report(run_dir)
    text = Page((run_dir / "report.html").read_text()).text
    # before, after, change with their standard errors: 0.2 / sqrt(400), and sqrt 2 times that
    assert "classifier_probability reward 0.770 ± 0.010 0.910 ± 0.010 +0.140 ± 0.014 ▲" in text
    assert "judge_accuracy held-out 0.986 ± 0.015 0.960 ± 0.015 -0.026 ± 0.021 ▼" in text
    assert "400 evaluation images" in text
    for fact in (
        "Updates 4 of 10",
        "Transformer evaluations, of training 24,192",
        "Training time 10.0 s",
        "Evaluations a second 2,419",
        "Updates skipped 1",
        "Groups without spread 8",
        "Groups with a failed reward 12",
        "Peak memory 1.00 GiB",
        "completions 6.0 s 75.0 %",
        "update 2.0 s 25.0 %",
        f"torch {torch.__version__}",
    ):
        assert fact in text, fact


def test_report_colours_only_what_stands_out_of_the_noise(run_dir) -> None:
    write_report(run_dir)
    page = (run_dir / "report.html").read_text()
    assert re.search(r'"number rose">\+0\.140', page)
    assert re.search(r'"number ">-0\.026', page)  # 1.2 standard errors
    (run_dir / "config.yaml").write_text(CONFIG.replace("400", "40000"))
    write_report(run_dir)
    assert re.search(r'"number fell">-0\.026', (run_dir / "report.html").read_text())


def with_intervals(rows: list[dict]) -> list[dict]:
    """The rows of a run that kept intervals: the judge falls from 0.986 to 0.960."""
    found = [dict(row) for row in rows]
    for row in found:
        for key in [key for key in row if key.endswith("/mean") and not key.startswith("rollout")]:
            half = 0.02 if "judge" in key else 0.03
            row |= {key[:-4] + "low": row[key] - half, key[:-4] + "high": row[key] + half}
            row |= {key[:-4] + "failed": 3 if "judge" in key else 0}
            if row["update"]:
                row[key[:-4] + "win_rate"] = 0.25 if "judge" in key else 0.875
    found[0] |= {"reward/classifier_log_prob/weight": 1.0}
    found[0] |= {"reward/classifier_probability/weight": 0.0}
    for row, cut in zip(found[1:], (5, 7, 2, 2), strict=True):  # a resume in between
        row |= {"rollout/classifier_probability/failed": 1, "truncated_prompts/clip": cut}
    return found


def rewrite(run_dir: Path, rows: list[dict]) -> None:
    (run_dir / "metrics.jsonl").unlink()
    for row in rows:
        MetricsLog(run_dir / "metrics.jsonl").append(row)


def test_report_shows_the_intervals_that_the_rows_have(run_dir) -> None:
    rewrite(run_dir, with_intervals(run_rows()))
    write_report(run_dir)
    page = (run_dir / "report.html").read_text()
    text = Page(page).text
    assert "before after change win rate" in text and "±" not in text
    assert "classifier_log_prob reward -0.600 [-0.630, -0.570] -0.350 [-0.380, -0.320]" in text
    assert "[-0.380, -0.320] +0.250 ▲ 87.5%" in text and "bootstrap over the 400 eval" in text
    assert "classifier_probability reported 0.770 [0.740, 0.800]" in text
    assert "judge_accuracy held-out 0.986 [0.966, 1.006] 0.960 [0.940, 0.980]" in text
    assert "-0.026 ▼ 25.0%" in text and '"number fell">-0.026' in page  # outside of where it began
    assert "Scores that failed 9 of heldout/judge_accuracy, 4 of rollout/classifier_prob" in text
    assert "Prompts that a scorer had to cut 9 of clip" in text
    MetricsLog(run_dir / "metrics.jsonl").truncate(after_update=0)
    write_report(run_dir)
    text = Page((run_dir / "report.html").read_text()).text
    assert "judge_accuracy held-out 0.986 [0.966, 1.006] - - -" in text


def test_report_warns_of_reward_hacking(run_dir) -> None:
    def box() -> str:
        write_report(run_dir)
        page = (run_dir / "report.html").read_text()
        found = re.search(r'<section class="alarm">(.*?)</section>', page, re.DOTALL)
        return Page(found[1]).text if found else ""

    assert box() == ""  # rows without intervals
    rows = with_intervals(run_rows())
    rewrite(run_dir, rows)
    assert (found := box()).startswith(
        "Reward hacking? Since the evaluation at update 4 what is trained on has risen while"
    )
    assert "held-out judge_accuracy 0.960, below its start 0.986 [0.966, 1.006]" in found
    assert "trained classifier_log_prob -0.350, above" in found and "probability" not in found
    rewrite(run_dir, [*rows, {"update": 5}, rows[4] | {"update": 6}])
    assert "Since update 4 what" in box()
    rewrite(run_dir, [*rows, rows[2] | {"update": 6}])
    assert "At update 4 what is trained on had risen" in box() and "no longer so" in box()
    rewrite(run_dir, rows[:4])
    assert box() == ""


def test_report_can_be_made_again_after_a_crash(run_dir) -> None:
    write_report(run_dir)
    whole = (run_dir / "report.html").read_bytes()
    for name in ("report.html", "curves.png", "samples/before_after.png"):
        (run_dir / name).unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"update": 5, "los')
    sample_path(run_dir / "samples", 6).write_bytes(b"left from before a resume")
    write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == whole
    assert not [file for file in run_dir.rglob("*") if file.name.endswith(".tmp")]


def test_report_of_a_run_that_has_only_begun(run_dir) -> None:
    MetricsLog(run_dir / "metrics.jsonl").truncate(after_update=0)
    write_report(run_dir)
    page = Page((run_dir / "report.html").read_text())
    assert "classifier_probability reward 0.770 ± 0.010 - -" in page.text
    first = sample_path(run_dir / "samples", 0)
    assert base64.b64decode(page.pictures[1].partition("base64,")[2]) == first.read_bytes()
    assert not (run_dir / "samples" / "before_after.png").exists()


def test_report_without_a_number_of_images_claims_no_error(run_dir) -> None:
    (run_dir / "config.yaml").write_text("train: {}\n")
    write_report(run_dir)
    text = Page((run_dir / "report.html").read_text()).text
    assert "classifier_probability reward 0.770 0.910 +0.140 ▲" in text and "±" not in text


def test_photographs_go_into_the_page_as_jpeg(run_dir) -> None:
    for update in (0, 4):
        images = noise(8, 3, 256, 256, seed=update)
        write_grid(images, ["p"] * 4 + ["q"] * 4, sample_path(run_dir / "samples", update))
    write_report(run_dir)
    _, uri = Page((run_dir / "report.html").read_text()).pictures
    assert uri.startswith("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        with Image.open(run_dir / "samples" / "before_after.png") as original:
            assert picture.size == original.size
            assert len(uri) < (run_dir / "samples" / "before_after.png").stat().st_size


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_report_names_what_is_missing(run_dir, missing) -> None:
    (run_dir / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()
