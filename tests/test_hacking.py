"""The watch for reward hacking: its rule on made rows, and runs that are hacked."""

from __future__ import annotations

import math
import re

import pytest
from hacked_runs import Train, scores_of, timeless

from g2rpo import hacking
from g2rpo.metrics import closing_line

# The rule


def row(update: int, fit: float | None, judge: float | None) -> dict:
    """A trained reward that starts at 0.5, a judge that starts at 0.9 [0.8, 0.95]."""
    found = {"update": update, "seconds": 1.0 * update}
    ends = {"reward/fit": (fit, 0.4, 0.6), "heldout/judge": (judge, 0.8, 0.95)}
    for key, (value, low, high) in ends.items():
        found |= {f"{key}/mean": value, f"{key}/std": 0.2}
        found |= {f"{key}/low": low, f"{key}/high": high} if update == 0 else {}
    return found | ({"reward/fit/weight": 1.0} if update == 0 else {})


START = row(0, 0.5, 0.9)


@pytest.mark.parametrize(
    "fit, judge, warns",
    [
        (0.6, 0.79, True),
        (0.5 + 1e-6, 0.79, True),  # above is above: what matters is the judge's interval
        (0.6, 0.8, False),  # its lower end is inside
        (0.6, 0.8 - 1e-12, False),  # as is what rounding may add to it
        (0.6, 0.85, False),
        (0.6, 0.99, False),
        (0.5, 0.7, False),  # nothing rose
        (0.4, 0.7, False),  # all fell: a policy that broke, not one that hacks
        (None, 0.7, False),
        (math.nan, 0.7, False),
        (0.6, None, False),
        (0.6, math.nan, False),
    ],
)
def test_the_rule(fit, judge, warns):
    rows = [START, {"update": 1, "rollout/fit/mean": 0.9, "loss": 0.1}, row(2, fit, judge)]
    alarm = hacking.watch(rows)
    assert (alarm is not None) == warns
    assert hacking.in_a_row(rows) == len(hacking.alarms(rows)) == warns
    if warns:
        assert (alarm.update, alarm.rose[0].name, alarm.fell[0].name) == (2, "fit", "judge")
        assert alarm.short == "REWARD HACKING? judge 0.790, below its start 0.900 [0.800, 0.950]"
        assert "while trained fit" in alarm.text and "above its start 0.500" in alarm.text


def test_no_watch_without_what_it_needs():
    fallen = row(4, 0.9, 0.1)
    assert hacking.watch([]) is None and hacking.watch([START]) is None
    reported = START | {"reward/fit/weight": 0.0}  # the one that rose is not trained on
    assert hacking.watch([reported, fallen]) is None and hacking.is_watched(reported)
    old = {k: v for k, v in START.items() if k.rpartition("/")[2] not in ("low", "high", "weight")}
    assert hacking.watch([old, fallen]) is None and not hacking.is_watched(old)
    one_image = START | {"heldout/judge/low": None, "heldout/judge/high": math.nan}
    assert hacking.watch([one_image, fallen]) is None and not hacking.is_watched(one_image)
    alone = {k: v for k, v in START.items() if not k.startswith("heldout")}
    assert hacking.watch([alone, fallen]) is None and not hacking.is_watched(alone)
    assert hacking.is_watched(START) and hacking.watch([START, fallen]) is not None


def test_all_that_rose_and_fell_are_named():
    start = START | {"reward/more/mean": 1.0, "reward/more/low": 0.9, "reward/more/high": 1.1,
                     "reward/more/weight": 0.5, "heldout/other/mean": 7.0, "heldout/other/low": 6.0,
                     "heldout/other/high": 8.0}  # fmt: skip
    now = row(2, 0.6, 0.7) | {"reward/more/mean": 1.5, "heldout/other/mean": 5.0}
    alarm = hacking.watch([start, now])
    assert [moved.name for moved in alarm.rose] == ["fit", "more"]
    assert [moved.name for moved in alarm.fell] == ["judge", "other"]
    assert alarm.short.endswith("0.950], and 1 more") and "other 5.000, below" in alarm.text


def test_history():
    good, bad = (0.6, 0.9), (0.6, 0.1)
    rows = [START, row(2, *good), row(4, *bad), {"update": 5}, row(6, *bad), row(8, *good),
            row(10, *bad)]  # fmt: skip
    assert [alarm.update for alarm in hacking.alarms(rows)] == [4, 6, 10]
    assert hacking.spans(rows) == [(4, 6), (10, 10)]
    assert [hacking.in_a_row(rows[:n]) for n in range(8)] == [0, 0, 0, 1, 1, 2, 0, 1]
    assert hacking.sentence(rows).startswith("Reward hacking? At update 10: held-out judge 0.100")
    assert hacking.sentence(rows[:5]).startswith("Reward hacking? Since update 4: held-out judge")
    over = hacking.sentence([*rows, row(12, *good)])
    assert over == (
        "Reward hacking was warned of at updates 4 to 6, 10, and not at the last evaluation"
    )
    assert hacking.sentence(rows[:2]) == ""
    line = closing_line(rows, "runs/x", hacking.sentence(rows))
    assert ". Reward hacking? At update 10: " in line and line.isascii()


def test_advice_names_a_checkpoint_or_says_that_there_is_none():
    alarm = hacking.watch([START, row(4, 0.6, 0.1)])
    assert "checkpoint step-000002 is of the last evaluation without" in hacking.advice(alarm, 2)
    assert "there is no checkpoint of an evaluation without" in hacking.advice(alarm, None)


# Runs


@pytest.fixture
def train(tmp_path, monkeypatch, capsys) -> Train:
    return Train(tmp_path, monkeypatch, capsys)


def test_a_hacked_run_says_so_everywhere(train, tmp_path):
    """And, cut in two, is the same run: rows and scores bit for bit."""
    straight = train(tmp_path / "straight", report=True)
    alarms = hacking.alarms(straight.rows)
    assert alarms and alarms[-1].update == 4
    warned = [alarm.update for alarm in alarms]
    assert [row["heldout_fallen"] for row in straight.rows] == [u in warned for u in range(5)]
    first, lines = warned[0], straight.out.splitlines()
    progress = {int(re.search(r"update +(\d+)/", x)[1]): x for x in lines if x.startswith("update")}
    for alarm in alarms:
        assert "? darkness -0." in alarm.short and alarm.short in progress[alarm.update]
    assert "REWARD HACKING?" not in progress[0]
    (advice,) = (line for line in lines if line.startswith("Update "))
    assert advice.startswith(f"Update {first}: reward hacking? Held-out darkness")
    where = "there is no checkpoint of" if first == 1 else f"step-{first - 1:06d} is of the last"
    assert where in advice
    (closing,) = (line for line in lines if "report.html, curves.png" in line)
    assert f"Reward hacking? Since update {first}: held-out darkness" in closing
    page = (tmp_path / "straight" / "report.html").read_text()
    assert '<section class="alarm">' in page and f"Since update {first} " in page
    assert 'contrast</td><td class="soft">reported' in page

    train(tmp_path / "cut", "--train.updates", 3)
    again = train(tmp_path / "cut", "--train.updates", 4, resume=True)
    assert "reward hacking? Held-out" not in again.out  # it was said
    assert timeless(again.rows) == timeless(straight.rows)
    assert scores_of(tmp_path / "cut") == scores_of(tmp_path / "straight")
    assert len(scores_of(tmp_path / "cut")) == 5


def test_a_run_that_is_not_hacked_says_nothing(train, tmp_path):
    rewards = '[{"name": "tiny:brightness"}, {"name": "tiny_cli:slow_brightness", "heldout": true}]'
    done = train(tmp_path / "run", "--rewards", rewards, "--train.updates", 2, report=True)
    assert done.rows[-1]["heldout/slow_brightness/mean"] > done.rows[0]["reward/brightness/mean"]
    assert [row["heldout_fallen"] for row in done.rows] == [0, 0, 0]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "hacking" not in done.out.lower() and "Reward hacking" not in page


def test_hacking_stop(train, tmp_path):
    """Evaluations in a row that warn end the run with a checkpoint; it can go on."""
    run = tmp_path / "run"
    whole = train(tmp_path / "whole", "--train.updates", 5, "--train.save_every", 9)
    first = hacking.alarms(whole.rows)[0].update
    assert hacking.spans(whole.rows) == [(first, 5)] and first < 4
    longer = ("--train.updates", 5, "--train.save_every", 9)
    done = train(run, *longer, "--train.hacking_stop", 2, report=True)
    end = first + 1
    assert [row["update"] for row in done.rows] == list(range(end + 1))
    assert (run / "checkpoints" / f"step-{end:06d}" / "manifest.json").exists()
    assert (
        f"Ended after update {end}, since the last 2 evaluations warn of reward hacking "
        f"(train.hacking_stop 2). To go on all the same: g2rpo train --resume {run} "
        "--train.hacking_stop 0"
    ) in done.out
    assert (run / "report.html").exists()
    again = train(run, resume=True)  # by the same rule: to the next evaluation
    assert again.rows[-1]["update"] == end + 1
    said = f"Ended after update {end + 1}, since the last 3 evaluations warn"
    assert (said in again.out) == (end + 1 < 5)
    last = train(run, "--train.hacking_stop", 0, resume=True)
    assert last.rows[-1]["update"] == 5 and "Ended after" not in last.out
    assert timeless(last.rows) == timeless(whole.rows)
