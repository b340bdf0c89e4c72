"""metrics.jsonl survives kills, and what is said of its rows is true."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from example_run import evaluated

from g2rpo.metrics import MetricsLog, changes, clock, closing_line, duration, number


def strict(text: str) -> object:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# metrics.jsonl


def test_rows_come_back_and_every_line_is_strict_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"update": 0, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})
    log.append({"update": np.int64(1), "loss": np.float32(0.5), "note": "größer", "done": True})
    log.append({"update": 2, "loss": np.float64("nan"), "lr": None})
    lines = log.path.read_text().splitlines()
    assert [strict(line) for line in lines] == log.rows()
    assert log.rows() == [
        {"update": 0, "loss": None, "grad_norm": None, "lr": None},
        {"update": 1, "loss": 0.5, "note": "größer", "done": True},
        {"update": 2, "loss": None, "lr": None},
    ]
    assert type(log.rows()[1]["update"]) is int


def test_a_row_is_on_the_disk_when_append_returns(tmp_path, monkeypatch) -> None:
    path, synced = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(path.read_bytes()))
    MetricsLog(path).append({"update": 0})
    assert synced == [b'{"update": 0}\n']


@pytest.mark.parametrize("value", [torch.tensor(1.0), [1.0], {"a": 1}, 1j])
def test_append_refuses_what_is_not_a_plain_value(tmp_path, value) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(TypeError, match=r"row\['loss'\] is a"):
        log.append({"update": 0, "loss": value})
    assert not log.path.exists()


@pytest.mark.parametrize("update", [None, True, 1.0, -1, "1"])
def test_append_wants_an_update_number(tmp_path, update) -> None:
    with pytest.raises(ValueError, match=re.escape(f"row['update'] is {update!r}")):
        MetricsLog(tmp_path / "metrics.jsonl").append({"update": update})


def test_a_last_line_torn_anywhere_is_dropped_and_appended_over(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = {"update": 0, "loss": 1.0}
    torn = b'{"update": 1, "loss": -2.5e-07, "name": "\\u00e9"}'
    for cut in range(len(torn) + 1):
        path.write_bytes(json.dumps(whole).encode() + b"\n" + torn[:cut])
        complete = cut == len(torn)  # only its newline is missing: nothing is lost
        kept = [whole, json.loads(torn)] if complete else [whole]
        log = MetricsLog(path)
        assert log.rows() == kept
        log.append({"update": 2})
        assert [strict(line) for line in path.read_text().splitlines()] == [*kept, {"update": 2}]


@pytest.mark.parametrize(
    "bad", ['{"update": 1, "lo', "", "[1]", '{"loss": 1}', '{"update": 1, "loss": NaN}', "\x00"]
)
def test_any_other_malformed_line_is_an_error_with_file_and_line(tmp_path, bad) -> None:
    path = tmp_path / "metrics.jsonl"
    for end in ('{"update": 2}\n', ""):  # in the middle, and last but finished by a newline
        path.write_text('{"update": 0}\n' + bad + "\n" + end)
        with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: ")):
            MetricsLog(path).rows()
        with pytest.raises(ValueError, match="line 2: "):
            MetricsLog(path).append({"update": 3})


def test_truncate_keeps_what_a_checkpoint_knows(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for update in range(6):
        log.append({"update": update, "loss": update / 3})
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + b'{"update": 6, "lo')
    resumed = MetricsLog(path)
    with pytest.raises(ValueError, match="already ends with update 5"):
        resumed.append({"update": 4})
    resumed.truncate(after_update=3)
    assert path.read_bytes() == b"".join(before[:4])
    resumed.append({"update": 4})
    assert [row["update"] for row in resumed.rows()] == [0, 1, 2, 3, 4]


def test_a_kill_during_truncate_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 0}\n{"update": 1}\n')

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(path).truncate(after_update=0)
    assert [row["update"] for row in MetricsLog(path).rows()] == [0, 1]
    MetricsLog(path).truncate(after_update=0)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


# What is said


def test_closing_line_says_rose_and_fell() -> None:
    rows = [
        evaluated(0, 0.770, 0.986, **{"reward/log_prob/mean": -0.5}),
        {"update": 1, "grad_norm": 1.0},
        evaluated(20, 0.910, 0.960, seconds=84.25, evaluations=30240)
        | {"reward/log_prob/mean": -0.5002},
    ]
    line = closing_line(rows, Path("runs/digits-1"))
    assert "fit rose from 0.770 to 0.910" in line
    assert "held-out: judge fell from 0.986 to 0.960" in line
    assert "log_prob stayed at -0.500" in line
    assert "20 updates, 30,240 evaluations" in line and "84.2 s" in line
    assert line.endswith("are in runs/digits-1") and line.isascii() and "\n" not in line


def test_closing_line_claims_nothing_it_cannot() -> None:
    assert "no change to report" in closing_line([evaluated(0, 0.7, 0.8)], "run")
    assert "No reward has been evaluated" in closing_line([{"update": 3}], "run")
    lost = closing_line([evaluated(0, 0.7, 0.8), evaluated(5, math.nan, 0.9)], "run")
    assert "fit cannot be compared" in lost and "judge rose" in lost
    early = closing_line([evaluated(0, 0.7, 0.8), evaluated(5, 0.8, 0.9), {"update": 7}], "run")
    assert "last evaluated at update 5" in early and "7 updates" in early


def test_changes_compare_the_first_evaluation_with_the_last() -> None:
    rows = [evaluated(0, 1.0, 2.0), evaluated(5, 9.0, 9.0), evaluated(10, 1.5, 1.0), {"update": 11}]
    reward, judge = changes(rows)
    assert (reward.kind, reward.name, reward.first_update, reward.last_update) == (
        "reward", "fit", 0, 10,
    )  # fmt: skip
    assert (reward.before, reward.after, reward.difference, reward.direction) == (
        1.0, 1.5, 0.5, "rose",
    )  # fmt: skip
    assert (judge.kind, judge.before_std, judge.direction) == ("heldout", 0.25, "fell")


def test_numbers_and_times_as_a_person_writes_them() -> None:
    assert [number(v) for v in (0.98612, -0.643, 0.0, 12.3456, None)] == [
        "0.986", "-0.643", "0.000", "12.346", "-",
    ]  # fmt: skip
    assert [number(v, sign=True) for v in (0.0412, -0.5, 3.14159e-5, 1234567.0)] == [
        "+0.041", "-0.500", "+3.14e-05", "+1.23e+06",
    ]  # fmt: skip
    assert [duration(s) for s in (84.25, 725.0, 11220.0)] == ["84.2 s", "12 min 05 s", "3 h 07 min"]
    assert [clock(s) for s in (0.2, 84, 7509)] == ["0:00", "1:24", "2:05:09"]
