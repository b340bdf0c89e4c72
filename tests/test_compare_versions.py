"""benchmarks/compare_versions.py: two trees that differ on purpose, and what it says of them."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import compare_versions as compare  # noqa: E402

SMALL = ["--device", "cpu", "--shape", "2x3x64", "--pairs", "1", "--rounds", "2"]
# A version of ours in which two ops wait, one fails, and one is not there.
CHANGED = """
import time as _time
_ode_step, _step_mean = ode_step, step_mean

def ode_step(*given):
    _time.sleep(2e-3)
    return _ode_step(*given)

def step_mean(*given):
    raise ValueError("no mean today")

del normal
"""


def interval_by_hand(n: int) -> int:
    """How many of the least and of the greatest may be left out: P(fewer beyond) <= 2.5 %."""
    found = 0
    for outside in range(n // 2):
        if sum(math.comb(n, i) for i in range(outside + 1)) / 2**n <= 0.025:
            found = outside
    return found


@pytest.mark.parametrize("n", [6, 7, 9, 12, 21, 31])
def test_the_interval_is_between_order_statistics(n: int) -> None:
    out = interval_by_hand(n)
    assert compare.interval([float(i) for i in range(n)][::-1]) == (out, n - 1 - out)


def test_nine_pairs_leave_out_the_least_and_the_greatest() -> None:
    """Of nine ratios the second least and the second greatest: 96.1 %."""
    assert compare.interval([9, 1, 2, 3, 4, 5, 6, 7, 100]) == (2, 9)


def test_slower_is_the_whole_interval() -> None:
    rows = [{"case": "a", "old": 1e-6, "new": 2e-6, "ratio": 1.3, "low": low, "high": 2.0}
            for low in (1.11, 1.09)]  # fmt: skip
    assert [compare.is_slower(row, 1.10) for row in rows] == [True, False]
    lines = compare.table([*rows, {"case": "b", "is_new": True}], 1.10).splitlines()
    assert lines[1].endswith("1.300  1.110 to 2.000  SLOWER") and lines[2].endswith("to 2.000")
    assert lines[3].split() == ["b", "new"]


def test_rows_take_the_ratio_within_a_round() -> None:
    """A machine twice as slow for one pair, and within it for a round, changes nothing."""
    pairs = [{"old": [s, 2 * s], "new": [3 * s, 6 * s]} for s in (1.0, 2.0, 1.0, 1.0, 1.0, 1.0)]
    row = compare.row_of("x", pairs)
    assert (row["ratio"], row["low"], row["high"]) == (3.0, 3.0, 3.0)


# A repository of its own, whose HEAD~1 is this package changed


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    tree = tmp_path_factory.mktemp("versions") / "tree"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "g2rpo_kernels", tree / "g2rpo_kernels", ignore=skip)
    init = tree / "g2rpo_kernels" / "__init__.py"
    same = init.read_text()

    def git(*arguments: str) -> None:
        who = {f"GIT_{role}_{what}": "nobody" for role in ("AUTHOR", "COMMITTER")
               for what in ("NAME", "EMAIL")}  # fmt: skip
        where = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        subprocess.run(["git", *arguments], cwd=tree, check=True, capture_output=True,
                       env=os.environ | who | where)  # fmt: skip

    git("init", "--quiet")
    init.write_text(same + CHANGED)
    (tree / "setup.py").write_text("# nothing to compile: the extension is among the files\n")
    git("add", "--all", "--force")
    git("commit", "--quiet", "-m", "changed")
    git("tag", "changed")
    (tree / "setup.py").write_text("import sys; print('one\\ntwo'); sys.exit('no compiler here')\n")
    init.write_text(same)
    git("add", "--all", "--force")
    git("commit", "--quiet", "-m", "does not build")
    git("tag", "broken")
    return tree


@pytest.fixture
def elsewhere(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Path:
    """compare_versions of that repository; the folder in which it makes temporary ones."""
    monkeypatch.setattr(compare, "ROOT", repository)
    monkeypatch.setattr(compare, "LEAST_PAIRS", 1)  # two processes, not twelve
    monkeypatch.setattr(compare.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_got_slower_is_an_error_and_what_is_new_is_listed(
    elsewhere: Path, repository: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    only = ["ode_step", "step_mean", "normal"]
    monkeypatch.setattr(compare.Worker, "ask", asking_of(compare.Worker.ask, only))
    assert compare.main(["--base", "changed", *SMALL]) == 3
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.split()[:1] and line.split()[0] in only}
    assert rows["normal"].split()[2:] == ["new"]
    assert "not timed: in BASE: ValueError: no mean today" in rows["step_mean"]
    assert float(rows["ode_step"].split()[4]) < 0.5
    assert list(elsewhere.iterdir()) == []

    # The other way round: the working tree is the slow one.
    init = repository / "g2rpo_kernels" / "__init__.py"
    same = init.read_text()
    monkeypatch.setattr(compare, "built_as_here", lambda tree, built: None)
    init.write_text(same + CHANGED.replace("del normal", ""))
    try:
        assert compare.main(["--base", "broken", "--only", "ode_step", *SMALL]) == 1
    finally:
        init.write_text(same)
    out, err = capsys.readouterr()
    assert "SLOWER" in out and "more than 1.1 times the time of broken: ode_step forward" in err
    assert list(elsewhere.iterdir()) == []


def asking_of(ask, only: list[str]):
    """Worker.ask of a worker that knows the cases of these ops alone."""

    def asked(self, **request: object) -> dict:
        said = ask(self, **request)
        if "cases" in said:
            said["cases"] = [name for name in said["cases"] if name.split()[0] in only]
        return said

    return asked


@pytest.mark.parametrize("ref, said", [
    ("no-such-branch", "--base 'no-such-branch' is no commit of"),
    ("--all", "--base '--all' is no commit of"),
    ("broken", "its build failed (1); the end of the log:\none\ntwo\nno compiler here"),
])  # fmt: skip
def test_what_cannot_be_compared_is_said(
    ref: str, said: str, elsewhere: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ref == "broken" and compare.build_facts() is None:
        pytest.skip("this installation has no native code: nothing would be built")
    assert compare.main([f"--base={ref}", *SMALL]) == 2
    assert said in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("arguments, said", [
    (["--pairs", "5"], "--pairs is 5; expected 6 or more"),
    (["--rounds", "0"], "--rounds is 0; expected 1 or more"),
    (["--threshold", "0.9"], "--threshold is 0.9; expected 1 or more"),
    (["--shape", "1x2"], "--shape is '1x2'; expected P x G x N"),
])  # fmt: skip
def test_wrong_options_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.main(["--base", "HEAD", *arguments])
    assert said in capsys.readouterr().err


def test_every_op_can_be_timed(tmp_path: Path) -> None:
    """All cases of the worker, of this tree, at toy size."""
    worker = compare.Worker(ROOT, "cpu", "2x3x64")
    try:
        cases = worker.ask(describe=True)["cases"]
        assert len(cases) == 11
        for case in cases:
            said = worker.ask(prepare=case)
            assert "error" not in said and said["calls"] >= 1, (case, said)
            assert worker.ask(calls=2, case=case) == {}
            assert worker.ask(time=case)["seconds"] > 0
    finally:
        worker.close()
    worker = compare.Worker(tmp_path, "cpu", "2x3x64")  # a folder without the package
    try:
        with pytest.raises(compare.CompareError, match="ended with 1"):
            worker.ask(describe=True)
    finally:
        worker.close()


@pytest.mark.slow
def test_a_real_commit_is_built_and_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HEAD of this checkout with the working tree, natively compiled."""
    if not (ROOT / ".git").exists() or compare.build_facts() is None:
        pytest.skip("needs a checkout with its native extension")
    monkeypatch.setattr(compare, "LEAST_PAIRS", 1)
    code = compare.main(["--base", "HEAD", "--only", "ode_step", "--threshold", "5", *SMALL])
    assert code == 0
    out = capsys.readouterr().out
    assert out.count("on cpu, reference, torch") == 2 or out.count("on cpu, torch") == 2, out
    assert "SLOWER" not in out
