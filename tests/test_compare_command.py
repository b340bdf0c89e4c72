"""The command `g2rpo compare`: whole comparisons on the tiny model, and what mistakes are told."""

import json
from pathlib import Path

import pytest
from comparisons import SMALL, UPDATE, call, in_this_process, rows_of, scores_of, write_small

from g2rpo.compare.methods import slug
from g2rpo.compare.sweep import SWEEP_SEEDS


def test_a_comparison_with_a_sweep(tmp_path):
    file, out = write_small(tmp_path), tmp_path / "out"
    arguments = [
        file, f"{file} rollout.sampling=trajectories", "--sweep", "optimizer.lr=1e-5,1e-2",
        "--budget", 2 * UPDATE, "--seeds", 2, "--points", 1, "--output", out,
    ]  # fmt: skip
    with in_this_process(pictures=True) as made:
        code, said, err = call(*arguments)
        assert code == 0, err
        swept, compared = made[:8], made[8:]
        assert len(compared) == 4 and {name[-6:] for name in compared} == {"seed 0", "seed 1"}
        assert {name.rpartition("seed ")[2] for name in swept} == {"1000", "1001"}
        assert len(set(swept)) == 8
    with in_this_process() as made:
        assert call(*arguments)[0] == 0 and made == []  # all of it is there
    facts = json.loads((out / "comparison.json").read_text(), parse_constant=pytest.fail)
    best = {}
    for label in ("small", "small sampling=trajectories"):
        ends = {
            value: sum(
                rows_of(out / "sweep" / slug(f"{label} lr={value}") / f"seed-{seed}")[-1][
                    "reward/brightness/mean"
                ]
                for seed in SWEEP_SEEDS
            ) / 2
            for value in ("1e-5", "1e-2")
        }  # fmt: skip
        assert facts["sweep"]["reached"][label] == pytest.approx(ends)
        best[label] = max(ends, key=ends.get)
    assert facts["sweep"]["chosen"] == best
    page = (out / "comparison.md").read_text()
    assert all(f"{label}: optimizer.lr={value} (" in page for label, value in best.items())
    assert facts["methods"].keys() == best.keys() and facts["seeds"] == 2
    assert "small: optimizer.lr=" in said and "8 runs; 2 at" in said
    assert "\n4 runs" in said
    for name in ("curves.png", "samples.png"):
        assert (out / name).stat().st_size > 10_000


def test_more_seeds_methods_and_budget_go_on(tmp_path):
    """A run with a larger budget is the undisturbed longer one, evaluated more often."""
    file, out = write_small(tmp_path), tmp_path / "out"

    def compare(folder, updates, *arguments):
        command = ["--budget", updates * UPDATE, "--points", 2, "--output", folder]
        with in_this_process() as made:
            code, said, err = call(file, *arguments, *command)
        assert code == 0, err
        return made, said

    other = f"{file} rollout.eta=0.5"
    made, _ = compare(out, 2, "--seeds", 1)
    assert made == ["small, seed 0"]
    made, _ = compare(out, 2, other, "--seeds", 2)
    assert made == ["small eta=0.5, seed 0", "small, seed 1", "small eta=0.5, seed 1"]
    made, said = compare(out, 4, other, "--seeds", 1)
    assert made == ["small, seed 0", "small eta=0.5, seed 0"] and "2 runs" in said
    compare(tmp_path / "undisturbed", 4, "--seeds", 1)
    grown, longer = (folder / "small" / "seed-0" for folder in (out, tmp_path / "undisturbed"))
    assert [row["update"] for row in rows_of(grown)] == [0, 1, 2, 3, 4]
    for row, expected in zip(rows_of(grown), rows_of(longer)):
        assert {k: row[k] for k in expected} == expected
    assert list(scores_of(grown)) == [0, 1, 2, 4] and list(scores_of(longer)) == [0, 2, 4]
    assert scores_of(grown)[4] == scores_of(longer)[4]
    # of fewer updates than there are, nothing is known at their end
    code, _, err = call(file, other, "--budget", 3 * UPDATE, "--output", out, "--seeds", 1)
    assert code == 2 and "--budget leaves 3 updates of the run small, seed 0" in err
    assert "which has made 4 in" in err


def test_other_settings_in_the_same_output(tmp_path):
    file, out = write_small(tmp_path), tmp_path / "out"
    command = ["--budget", UPDATE, "--seeds", 1, "--output", out]
    with in_this_process() as made:
        assert call(file, *command)[0] == 0
        for arguments, told in (
            (["--optimizer.lr", 0.5], "optimizer.lr of the run small, seed 0 is 0.001; expected"),
            (["--rollout.eta=.3"], "rollout.eta of the run small, seed 0 is 0.7; expected 0.3"),
        ):
            code, _, err = call(file, *command, *arguments)
            assert code == 2 and f"--output is {str(out)!r}, where {told}" in err
        assert made == ["small, seed 0"]
        assert call(file, *command, "--train.save_every", 3)[0] == 0, "it decides nothing"
        assert made == ["small, seed 0"]


def test_a_run_that_hacking_stop_has_ended_is_done(tmp_path):
    """Early stopping, as a method of its own: it is not gone on with, and its end is compared."""
    rewards = [{"name": "tiny:brightness"}, {"name": "hacked_runs:darkness", "heldout": True}]
    file = write_small(tmp_path)
    hacked = {**SMALL, "rewards": rewards, "optimizer": {"lr": 3e-3}}
    file.write_text(json.dumps(hacked))
    out = tmp_path / "out"
    stopped = f"{file} train.hacking_stop=1"
    arguments = [file, stopped, "--budget", 12 * UPDATE, "--points", 12, "--seeds", 1]
    with in_this_process() as made:
        assert call(*arguments, "--output", out, "--train.evaluation_samples", 12)[0] == 0
        assert len(made) == 2
        assert call(*arguments, "--output", out, "--train.evaluation_samples", 12)[0] == 0
        assert len(made) == 2
    figures = json.loads((out / "comparison.json").read_text())["methods"]
    assert figures["small"]["updates"]["mean"] == 12
    assert figures["small hacking_stop=1"]["updates"]["mean"] < 12
    ends = [figures[label]["darkness"]["mean"] for label in figures]
    assert ends[0] < ends[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "no method is given; expected presets before the options"),
        (["--rollout.eta", "0.5", "g2rpo-digits"], "no method is given"),
        (["g2rpo-digits", "--seeds", "0"], "--seeds is '0'; expected a whole number, 1 to 1000"),
        (["g2rpo-digits", "--seeds", "1001"], "--seeds is '1001'; expected a whole number, 1 to"),
        (["g2rpo-digits", "--budget", "1e5"], "--budget is '1e5'; expected a whole number, 1 or"),
        (["g2rpo-digits", "--jobs", "-1"], "--jobs is '-1'; expected a whole number"),
        (["g2rpo-digits", "--points"], "--points has no value; expected evaluations of the policy"),
        (["g2rpo-digits", "g2rpo-digits"], "have one name"),
        (["g2rpo-digits", "--reward", "judge_probability"],
         "--reward is 'judge_probability'; expected a reward that is not held out and that all "
         "methods evaluate, one of ['classifier_probability', 'classifier_log_prob']"),
        (["g2rpo-digits", "--sweep", "train.seed=1,2"], "train.seed is given; expected --seeds"),
    ],
)  # fmt: skip
def test_wrong_commands(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert code == 2 and message in err and out == ""
    assert not any(path.is_file() for path in Path("runs").glob("**/*.jsonl"))


def test_methods_without_a_common_reward(tmp_path):
    file = write_small(tmp_path)
    code, _, err = call(file, "g2rpo-digits", "--output", tmp_path / "out")
    assert code == 2 and "the methods have no reward in common that is not held out" in err
    taken = tmp_path / "taken"
    taken.write_text("")
    code, _, err = call(file, "--output", taken)
    assert code == 2 and f"--output is {str(taken)!r}; expected a directory" in err


def test_help():
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert out.startswith("usage: g2rpo compare METHOD ...")
    for option in ("--seeds", "--budget", "--sweep", "--jobs", "--points", "--reward", "--output"):
        assert option in text, option
    assert "--rollout.eta" in text and call("g2rpo-digits", "-h")[0] == 0
