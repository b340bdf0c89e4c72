"""What a comparison says of its runs: the table, on a terminal and in files, and the pictures."""

import io
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import curve
from PIL import Image
from rich.console import Console

from g2rpo.compare.command import _write
from g2rpo.compare.pictures import COLOURS, over_seeds, write_comparison, write_grids
from g2rpo.compare.table import Curve, Figure, legend, make_table, markdown
from g2rpo.compare.terminal import show
from g2rpo.grids import sample_path, write_grid
from g2rpo.metrics import MetricsLog


def fit_and_judge(label, fit, judge, seed=0, **more):
    return curve(label, seed, reward__fit=fit, heldout__judge=judge, images__variety=fit, **more)


# Figures


def test_mean_and_standard_error():
    values = [0.25, 0.5, 1.0]
    figure = Figure.of(values)
    assert figure.mean == pytest.approx(sum(values) / 3)
    by_hand = math.sqrt(sum((v - figure.mean) ** 2 for v in values) / 2) / math.sqrt(3)
    assert figure.error == pytest.approx(by_hand)
    assert figure.text == f"{figure.mean:.3f} ± {by_hand:.3f}"


def test_one_seed_has_no_error_and_a_lost_seed_no_mean():
    assert Figure.of([0.5]).text == "0.500" and math.isnan(Figure.of([0.5]).error)
    for values in ([0.5, math.nan], [math.nan], [math.inf, 1.0], []):
        figure = Figure.of(values)
        assert figure.text == "-" and math.isnan(figure.mean) and math.isnan(figure.error)
    assert Figure.of([1e5, 3e5]).text == "2e+05 ± 1e+05"


# Tables


def test_at_level_is_read_off_the_curve():
    found = fit_and_judge("a", [0.5, 0.7, 0.6, 0.9], [0.0, 1.0, 5.0, 2.0])

    def at(level):
        return found.at_level("heldout/judge/mean", "reward/fit/mean", level)

    assert at(0.6) == pytest.approx(0.5)  # where it is first reached, not where it is come back to
    assert at(0.7) == 1.0
    assert at(0.8) == pytest.approx(5 + (2 - 5) * 2 / 3)
    assert at(0.5) == at(0.2) == 0.0  # reached at the start
    assert math.isnan(at(0.91))  # never
    lost = fit_and_judge("a", [0.5, None, 0.9], [0.0, 1.0, 2.0])
    assert math.isnan(lost.at_level("heldout/judge/mean", "reward/fit/mean", 0.7))


def test_a_table_by_hand():
    curves = [
        fit_and_judge("fast", [0.5, 0.7, 0.9], [0.6, 0.8, 0.4], seed=0),
        fit_and_judge("slow", [0.5, 0.6, 0.7], [0.6, 0.7, 0.8], seed=0, updates=[0, 10, 20]),
        fit_and_judge("fast", [0.5, 0.9, 0.8], [0.6, 0.8, 0.2], seed=1),
        fit_and_judge("slow", [0.5, 0.6, 0.8], [0.6, 0.7, 0.6], seed=1, updates=[0, 10, 30]),
    ]
    table = make_table(curves, "fit")
    assert (table.reward, table.judges, table.seeds) == ("fit", ["judge"], 2)
    assert table.level == 0.7  # the highest of the run that comes least far
    assert list(table.headings) == [
        "fit", "judge", "judge, at equal reward", "judge, best", "variety", "updates",
        "evaluations", "seconds",
    ]  # fmt: skip
    expected = {
        "fast": [(0.9, 0.8), (0.4, 0.2), (0.8, 0.7), (0.8, 0.8), (0.9, 0.8), (2, 2)],
        "slow": [(0.7, 0.8), (0.8, 0.6), (0.8, 0.65), (0.8, 0.7), (0.7, 0.8), (20, 30)],
    }
    for label, figures in expected.items():
        for heading, seeds in zip(table.headings, figures):
            figure = table.methods[label][heading]
            assert figure.mean == pytest.approx(statistics.fmean(seeds)), (label, heading)
            assert figure.error == pytest.approx(statistics.stdev(seeds) / 2**0.5), (label, heading)
    assert table.start == {"fit": 0.5, "judge": 0.6, "variety": 0.5}
    lines = markdown(table).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[3].startswith("| slow | 0.750 ± 0.050 | 0.700 ± 0.100 | 0.725 ± 0.075 |")
    assert lines[3].endswith("| 25 | 200 | 3.0 s |")
    assert "2 seeds" in legend(table) and "fit first reaches 0.700" in legend(table)


def test_a_reward_that_was_lost():
    curves = [
        fit_and_judge("sound", [0.5, 0.7], [0.6, 0.8]),
        fit_and_judge("lost", [0.5, None], [0.6, None]),
        fit_and_judge("never", [None, None], [0.6, 0.5]),
    ]
    table = make_table(curves[:2], "fit")
    assert table.level == 0.5  # the numbers it had count
    texts = {heading: figure.text for heading, figure in table.methods["lost"].items()}
    assert texts["fit"] == texts["judge"] == texts["variety"] == "-"
    assert texts["judge, best"] == texts["judge, at equal reward"] == "0.600"
    table = make_table(curves, "fit")
    assert math.isnan(table.level) and "nowhere" in legend(table)
    assert {f["judge, at equal reward"].text for f in table.methods.values()} == {"-"}
    assert table.methods["sound"]["fit"].text == "0.700"
    assert math.isnan(table.start["fit"]) and table.start["judge"] == 0.6
    assert "nan" not in markdown(table)


def test_methods_that_begin_or_are_judged_differently():
    """Fewer steps draw other images of the same policy; a judge may be of one method alone."""
    one = fit_and_judge("one", [0.5, 0.7], [0.6, 0.8])
    other = curve("other", reward__fit=[0.4, 0.7], heldout__other=[0.6, 0.9])
    table = make_table([one, other], "fit")
    assert math.isnan(table.start["fit"]) and math.isnan(table.start["judge"])
    assert table.judges == ["judge", "other"]
    assert table.methods["one"]["other"].text == table.methods["other"]["judge"].text == "-"
    assert table.methods["other"]["other, best"].text == "0.900"


def test_curves_are_the_evaluated_rows(tmp_path):
    found = curve(directory=tmp_path, reward__fit=[0.5])
    log = MetricsLog(tmp_path / "metrics.jsonl")
    evaluated = {"evaluations": 0, "seconds/evaluation": 0.1, "reward/fit/mean": 0.5}
    log.append({"update": 0, **evaluated})
    log.append({"update": 1, "evaluations": 5, "rollout/fit/mean": 0.5})
    log.append({"update": 2, **evaluated, "evaluations": 9, "reward/fit/mean": math.nan})
    read = Curve.read(found.run)
    assert read.evaluations == [0, 9]
    first, last = read.values("reward/fit/mean")
    assert first == 0.5 and math.isnan(last)
    assert all(math.isnan(v) for v in read.values("reward/other/mean"))


LABELS = (
    "g2rpo-digits", "g2rpo-no-mgai-digits", "flow-grpo-fast-digits", "mix-grpo-digits lr=3e-4",
    "g2rpo-digits granularities=[1,2,3] sde_positions=[0,1,2,3,4,5,6,7] dynamics=cps eta=0.5",
    "dance-grpo-digits",
)  # fmt: skip


def many(labels=LABELS, seeds=2):
    judges = {
        "heldout__judge_probability": [0.836, 0.931], "heldout__judge_accuracy": [0.916, 0.974],
        "heldout__forest_probability": [0.5, 0.6], "images__diversity": [0.14, 0.09],
        "images__pairwise_distance": [0.2, 0.1], "images__coverage": [0.1, 0.05],
    }  # fmt: skip
    return [
        curve(label, seed, reward__classifier_probability=[0.798, 0.9 + 0.01 * seed],
              evaluations=[0, 134_000], **judges)
        for seed in range(seeds)
        for label in labels
    ]  # fmt: skip


def shown(table, width):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    show(table, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_a_terminal_shows_all_of_it_without_broken_lines(width):
    table = make_table(many(), "classifier_probability")
    text = shown(table, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    blocks = [i for i, line in enumerate(lines) if line.startswith("classifier_probability  ")]
    assert len(blocks) == {80: 3, 100: 2, 200: 1}[width]
    assert sum(lines[i].count("0.905 ± 0.005") for i in blocks) == 6
    assert sum(line.startswith("  at equal reward") for line in lines) == 3 * len(blocks)
    assert all(lines[i].split()[1] == "0.798" for i in blocks)  # before training
    # every word of every label stands in the lines above a block
    heads = " ".join(line for line in lines if not re.match(r"\S|  (at|best)", line))
    for label in LABELS:
        for word in re.split(r"[ -]", label):
            assert word in heads, word
    assert "134,000" in text and "1.5 s" in text


def test_a_terminal_that_is_too_narrow_still_shows_it():
    table = make_table(many(LABELS[:2], seeds=1), "classifier_probability")
    text = shown(table, 40)
    assert text.count("classifier_probability  ") == 2 and text.count("  at equal reward") == 6
    assert "…" not in text and "±" not in text and "One seed" in text


def test_the_files_are_strict_json_and_a_document(tmp_path, capsys):
    curves = [
        fit_and_judge("sound | quick", [0.5, 0.7], [0.6, 0.8]),
        fit_and_judge("lost", [0.5, None], [0.6, None]),
    ]
    _write(tmp_path, make_table(curves, "fit"), curves, None, ["a preset", "--seeds", "1"])
    facts = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert facts["command"] == "g2rpo compare 'a preset' --seeds 1"
    assert facts["methods"]["lost"]["fit"] == {"mean": None, "error": None}
    assert facts["methods"]["sound | quick"]["fit"] == {"mean": 0.7, "error": None}
    assert (facts["reward"], facts["level"], facts["seeds"]) == ("fit", 0.5, 1)
    assert facts["start"] == {"fit": 0.5, "judge": 0.6, "variety": 0.5} and facts["sweep"] is None
    page = (tmp_path / "comparison.md").read_text()
    assert page.startswith("    g2rpo compare 'a preset' --seeds 1\n\n| method | fit |")
    assert "| sound \\| quick | 0.700 |" in page and "One seed. At equal reward" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.json", "comparison.md", "curves.png", "samples.png",
    ]  # fmt: skip
    assert "comparison.json, comparison.md" in capsys.readouterr().out


# Pictures


def colours_of(path: Path) -> set[tuple[int, int, int]]:
    with Image.open(path) as picture:
        found = picture.convert("RGB").getcolors(picture.width * picture.height)
    return {colour for count, colour in found if count > 100}


def rgb(text: str) -> tuple[int, int, int]:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


@pytest.mark.parametrize("seeds", [1, 3])
def test_curves_are_drawn(tmp_path, seeds):
    curves = many(LABELS[:3], seeds)
    for index, found in enumerate(curves):  # or the last method would hide the others
        found.rows[-1]["reward/classifier_probability/mean"] -= 0.05 * (index % 3)
    write_comparison(curves, make_table(curves, "classifier_probability"), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        width, height = picture.size
    assert width == 1800 and 5 * 500 < height < 5 * 650  # 7 measures and 3 against the reward
    drawn = colours_of(tmp_path / "c.png")
    assert [rgb(colour) in drawn for colour in COLOURS[:4]] == [True, True, True, False]


def test_runs_of_other_lengths_are_averaged_where_they_overlap():
    """Of random windows, whose seeds have updates of other cost, and of runs that were gone on
    with."""
    one = curve("a", 0, evaluations=[0, 100, 200, 300], reward__fit=[0.0, 1.0, 2.0, 3.0])
    other = curve("a", 1, evaluations=[0, 50, 250], reward__fit=[1.0, 2.0, 4.0])
    x, y = over_seeds([one, other], "reward/fit/mean")
    assert x.tolist() == [0, 50, 100, 200, 250]
    np.testing.assert_allclose(y[0], [0, 0.5, 1, 2, 2.5])
    np.testing.assert_allclose(y[1], [1, 2, 2.5, 3.5, 4])
    lost = curve("a", 2, evaluations=[0, 100, 200], reward__fit=[0.0, None, 2.0])
    assert np.isnan(over_seeds([lost], "reward/fit/mean")[1][0, 1])


def test_curves_of_unequal_and_lost_runs_are_drawn(tmp_path):
    curves = [
        fit_and_judge("a", [0.5, 0.6, 0.7], [0.5, 0.6, 0.7], seed=0),
        fit_and_judge("a", [0.5, 0.7], [0.5, 0.6], seed=1, evaluations=[0, 150]),
        fit_and_judge("lost", [0.5, None], [0.5, None], evaluations=[0, 170]),
        curve("other judge", reward__fit=[0.5, 0.6], heldout__other=[0.4, 0.3]),
        *(fit_and_judge(f"method {i} of a very long name, " + "key=value " * 6, [0.5, 0.6],
                        [0.5, 0.6]) for i in range(9)),
    ]  # fmt: skip
    write_comparison(curves, make_table(curves, "fit"), tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width == 1800 and picture.convert("L").getextrema()[0] < 60


def test_samples_stand_side_by_side(tmp_path):
    prompts = ["one", "two"] * 4
    curves = []
    for index, label in enumerate(("a", "b", "c " + "long " * 20, "lost")):
        directory = tmp_path / str(index)
        found = curve(label, directory=directory, reward__fit=[0.5, 0.6])
        (directory / "samples").mkdir(parents=True)
        for update, level in ((0, 0.1), (1, 0.3 + 0.2 * index)):
            if label != "lost":
                images = torch.full((8, 1, 8, 8), level)
                write_grid(images, prompts, sample_path(directory / "samples", update))
        curves.append(found)
    second = curve("a", 1, tmp_path / "nowhere", reward__fit=[0.5, 0.6])
    write_grids([*curves, second], tmp_path / "samples.png")
    with Image.open(sample_path(tmp_path / "0" / "samples", 0)) as grid:
        tiles, size = grid.convert("L").histogram()[round(0.1 * 255)], grid.size
    with Image.open(tmp_path / "samples.png") as picture:
        shades = picture.convert("L").histogram()
        assert picture.width <= 1912 and picture.height < 4 * size[1] + 400
        # before training, then each method's last, in order
        for level in (0.1, 0.3, 0.5, 0.7):
            assert abs(shades[round(level * 255)] - tiles) < tiles / 50, level
        pixels = np.asarray(picture.convert("L"))
    levels = (0.1, 0.3, 0.5, 0.7)
    places = [np.median(np.argwhere(pixels == round(v * 255)), axis=0) for v in levels]
    assert [x for _, x in places] == sorted(x for _, x in places)
    assert max(y for y, _ in places) - min(y for y, _ in places) < 10, "all in one line"
    assert places[1][1] - places[0][1] >= size[0]
