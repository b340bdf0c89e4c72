"""benchmarks/optimizer_fidelity.py: what it measures, and that a goal it misses is an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import optimizer_fidelity as fidelity  # noqa: E402


def test_a_short_run_has_every_row_and_says_what_is_not_installed(tmp_path, capsys) -> None:
    file = tmp_path / "fidelity.json"
    # So few weights and steps decide no goal: only what is written is looked at.
    code = fidelity.main(["--elements", "4096", "--steps", "5", "--json", str(file)])
    report = json.loads(file.read_text())
    text = capsys.readouterr().out
    names = [row["optimizer"] for row in report["rows"]]
    assert [names.count(name) for name in dict.fromkeys(names)] == [3] * len(set(names))
    assert set(report["left_out"]) | set(names) == {
        *(f"AdamW8bit, {bits} bits, {codec}" for bits in (16, 24, 32)
          for codec in ("dynamic", "fp8")),
        "bfloat16 to nearest, float32 moments", "bitsandbytes AdamW8bit",
        "torchao AdamW8bit, bf16_stochastic_round",
    }  # fmt: skip
    for name in report["left_out"]:
        assert f"{name}: not installed" in text
    assert code == any("MISSED" in goal for goal in report["goals"])
    of = {row["optimizer"]: row for row in report["rows"] if row["gradient_rms"] == 1e-6}
    assert of["AdamW8bit, 32 bits, dynamic"]["error"] < 0.05
    assert of["AdamW8bit, 32 bits, dynamic"]["never_moved"] == 0
    assert of["bfloat16 to nearest, float32 moments"]["never_moved"] > 0.9


@pytest.mark.parametrize("key, value", [("error", 0.101), ("bias", -0.011)])
def test_a_missed_goal_is_the_exit_code(key, value, monkeypatch, tmp_path, capsys) -> None:
    good = {"gradient_rms": 1e-6, "error": 0.1, "bias": -0.009, "bias_standard_error": 0.001,
            "never_moved": 0.0}  # fmt: skip
    rows = [good | {"optimizer": f"AdamW8bit, {bits} bits, dynamic"} for bits in (24, 16)]
    left_out = dict.fromkeys(fidelity.PACKAGES, "why not")
    given = ["--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(fidelity, "compete", lambda *_: (rows, left_out))
    assert fidelity.main(given) == 0
    for row in rows:
        row[key] = value
    assert fidelity.main(given) == 1
    assert "MISSED" in capsys.readouterr().out
