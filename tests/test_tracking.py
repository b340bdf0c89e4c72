"""The display keeps its place, on a terminal and off it, and tells the truth about the pace."""

from __future__ import annotations

import io
import logging
import re
import signal
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from example_run import evaluated
from rich.console import Console

from g2rpo import tracking
from g2rpo.tracking import Display

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # every control character but the newline


# The display, not on a terminal


@pytest.fixture
def now(monkeypatch) -> SimpleNamespace:
    """A clock that stands still until a test moves it."""
    fake = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: fake.seconds))
    return fake


def plain(total: int = 20, per_update: int = 1000) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(total, per_update, Console(file=out, force_terminal=False, width=80)), out


def test_plain_lines_have_no_control_codes_and_are_not_wrapped(now) -> None:
    display, out = plain()
    path = "run directory " + "/a/long/folder" * 12
    with display:
        display.message(path)
        display.phase("evaluation")
        display.row(evaluated(0, -0.643, 0.833))
        for update in range(1, 5):
            display.phase("completions")
            display.advance(1000)
            now.seconds += 1
            display.row({"update": update, "grad_norm": 0.25})
        display.row(evaluated(5, -0.412, 0.803, grad_norm=0.5))
    assert not CONTROL.search(out.getvalue())
    message, first, last = out.getvalue().splitlines()
    assert message == path
    assert first == "update  0/20  fit -0.643  judge 0.833"
    assert last.startswith("update  5/20  fit -0.412 (+0.231)  judge 0.803 (-0.030)  grad")
    assert "grad norm 0.500" in last
    assert "1,000 evaluations/s" in last


def test_plain_rows_without_an_evaluation_come_at_most_every_five_seconds(now) -> None:
    display, out = plain(total=1000)
    with display:
        for update in range(1, 101):
            now.seconds += 1.3
            display.row({"update": update})
    shown = [int(line.split("/")[0].split()[1]) for line in out.getvalue().splitlines()]
    assert shown == list(range(4, 101, 4))


def test_a_long_update_gives_a_sign_of_life(now) -> None:
    display, out = plain(total=10, per_update=1000)
    with display:
        display.phase("completions")
        for _ in range(500):
            now.seconds += 0.5
            display.advance(1)
    lines = out.getvalue().splitlines()
    assert len(lines) == 8  # 250 s
    assert lines[0].startswith("update  0/10  1%  completions  2 evaluations/s  eta ")


def test_pace_leaves_evaluations_out_and_time_left_does_not(now) -> None:
    display, out = plain(total=4, per_update=1000)
    with display:
        display.phase("evaluation")
        display.advance(10**6)
        now.seconds += 500  # before training: says nothing of the pace
        display.row(evaluated(0, 0.1, 0.1))
        display.phase("completions")
        display.advance(1000)
        now.seconds += 10
        display.phase("evaluation")
        display.advance(10**6)
        now.seconds += 90
        display.row(evaluated(1, 0.2, 0.2))
    assert out.getvalue().splitlines()[-1].endswith("100 evaluations/s  eta 5:00")


def test_a_warning_stands_in_every_line_until_it_is_taken_back(now) -> None:
    display, out = plain()
    with display:
        display.row(evaluated(0, 0.5, 0.5))
        display.warn("BEWARE of [x]")
        display.row(evaluated(1, 0.6, 0.4))
        display.warn("")
        display.row(evaluated(2, 0.6, 0.5))
    first, second, third = out.getvalue().splitlines()
    assert "  BEWARE of [x]" in second and "BEWARE" not in first + third


def test_resume_goes_on_from_earlier_rows_in_silence(now) -> None:
    display, out = plain()
    with display:
        display.resume([evaluated(0, 0.5, 0.5), evaluated(10, 0.6, 0.6), {"update": 11}])
        assert out.getvalue() == ""
        display.row(evaluated(12, 0.75, 0.25))
    assert out.getvalue().startswith("update 12/20  fit 0.750 (+0.250)  judge 0.250 (-0.250)")


def test_a_message_waits_no_longer_than_the_with_block(now) -> None:
    display, out = plain()
    display.message("before")
    assert out.getvalue() == "before\n"
    with display:
        display.message("inside")
    assert out.getvalue() == "before\ninside\n"
    display.message("after")
    assert out.getvalue() == "before\ninside\nafter\n"


class InterruptedStream(io.StringIO):
    """Gets SIGTERM in the middle of every write, as one may that waits for a slow terminal."""

    writing = False

    def write(self, text: str) -> int:
        if self.writing:  # what a buffered writer does
            raise RuntimeError("reentrant call")
        self.writing = True
        written = super().write(text[:3])
        signal.raise_signal(signal.SIGTERM)
        written += super().write(text[3:])
        self.writing = False
        return written


@pytest.fixture
def on_sigterm() -> Iterator[SimpleNamespace]:
    """Its `call` is what SIGTERM does."""
    chosen = SimpleNamespace(call=lambda: None)
    before = signal.signal(signal.SIGTERM, lambda *_: chosen.call())
    yield chosen
    signal.signal(signal.SIGTERM, before)


def test_a_signal_handler_may_send_a_message_in_the_middle_of_a_print(now, on_sigterm) -> None:
    out = InterruptedStream()
    display = Display(20, 1000, Console(file=out, force_terminal=False, width=80))
    left = ["stopping", "stopping at once"]
    on_sigterm.call = lambda: left and display.message(left.pop(0))
    with display:
        display.row(evaluated(0, 0.5, 0.5))
        print("a stranger's line", file=out)
        assert out.getvalue().count("\n") == 2
        display.phase("completions")
    assert not left
    first, *others = out.getvalue().splitlines()
    assert first.startswith("update  0/20  fit 0.500")
    assert others == ["a stranger's line", "stopping", "stopping at once"]


@pytest.mark.parametrize(
    ("name", "sizes"), [("total_updates", (0, 1)), ("evaluations_per_update", (1, 0))]
)
def test_display_refuses_sizes_below_one(name, sizes) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
        Display(*sizes)


# The display on a terminal


def terminal(width: int, **more: object) -> Console:
    environ = {"TERM": "xterm-256color"}
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, _environ=environ, **more)


def panel(display: Display) -> list[str]:
    lines = display.console.render_lines(display, pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_panel_keeps_within_the_terminal_and_100_columns(width) -> None:
    with Display(300, 1504, terminal(width)) as display:
        display.phase("completions")
        display.row(evaluated(0, -0.643, 0.833) | {"reward/" + "long" * 30 + "/mean": 1.0})
        display.row(evaluated(7, -0.412, 0.803, grad_norm=1.23e-5))
        lines = panel(display)
    assert len(lines) == 4 and max(map(len, lines)) <= min(width, 100)
    assert lines[0].startswith("update   7/300") and "eta" in lines[0]
    assert "fit" in lines[2] and "judge" in lines[3]
    if width >= 80:
        assert lines[2] == "reward    fit    -0.643 → -0.412 (+0.231)"
        assert lines[3] == "held-out  judge  0.833 → 0.803 (-0.030)"
        assert "completions" in lines[1] and "grad norm 1.23e-05" in lines[1]


def test_panel_ends_reward_names_that_are_too_long_with_an_ellipsis() -> None:
    with Display(3, 10, terminal(80)) as display:
        display.row({"update": 0, "reward/" + "x" * 100 + "/mean": 0.5})
        (line,) = (line for line in panel(display) if "xxx" in line)
    assert len(line) <= 80 and "…" in line and line.endswith("0.500")


def test_bar_moves_inside_an_update_but_not_beyond_it() -> None:
    with Display(10, 1000, terminal(80)) as display:
        display.row(evaluated(0, 0.1, 0.1))
        display.phase("completions")
        shares = []
        for evaluations in (0, 500, 500, 500):
            display.advance(evaluations)
            shares.append(re.search(r"(\d+)%", panel(display)[0])[1])
        display.row({"update": 1})
        shares.append(re.search(r"(\d+)%", panel(display)[0])[1])
    assert shares == ["0", "5", "10", "10", "10"]


def test_panel_shows_a_message_until_it_is_printed() -> None:
    with Display(10, 1000, terminal(80)) as display:
        display.row(evaluated(0, 0.1, 0.2))
        display.message("[stopping]" + "x" * 100)
        waiting = panel(display)
        display.phase("update")
        printed = panel(display)
    assert "".join(waiting[:2]) == "[stopping]" + "x" * 100 and len(waiting) == 2 + 4
    assert len(printed) == 4 and printed[0].startswith("update")
    assert "[stopping]" + "x" * 100 + "\n" in display.console.file.getvalue()


def test_panel_shows_a_warning_in_red_while_it_lasts() -> None:
    with Display(10, 1000, terminal(80)) as display:
        display.row(evaluated(0, 0.1, 0.2))
        display.warn("BEWARE of [x] " + "and so on " * 9)
        warned = panel(display)
        display._live.refresh()
        drawn = display.console.file.getvalue()
        display.warn("")
        assert len(panel(display)) == 4
    assert warned[0].startswith("BEWARE of [x] and so on") and len(warned) == 2 + 4
    assert max(map(len, warned)) <= 80
    assert "\x1b[1;31mBEWARE of [x]" in drawn


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_logs_and_warnings_go_above_the_panel_and_handlers_are_given_back(monkeypatch) -> None:
    screen = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    logger = logging.getLogger("test_tracking.made_before")
    handler = logging.StreamHandler()  # as libraries do when they are imported
    logger.addHandler(handler)
    console = Console(force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    try:
        with Display(10, 1000, console) as display:
            display.row(evaluated(0, 0.1, 0.2))
            display._live.refresh()
            drawn = len(screen.getvalue())
            logger.warning("a warning")
            display._live.refresh()
            assert handler.stream is not screen
        after = screen.getvalue()[drawn:]
    finally:
        logger.removeHandler(handler)
    assert handler.stream is screen
    # the panel is erased before the warning is written, and drawn again after it
    erased, warned = after.index("\x1b[2K"), after.index("a warning\n")
    assert erased < warned < after.index("update  0/10")
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back


def test_a_dumb_terminal_gets_plain_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, _environ={"TERM": "dumb"}, width=80)
    with Display(10, 1000, console) as display:
        display.row(evaluated(0, 0.1, 0.2))
    assert out.getvalue() == "update  0/10  fit 0.100  judge 0.200\n"


@pytest.mark.parametrize("console", [terminal(80), Console(file=io.StringIO(), width=80)])
def test_advance_costs_microseconds(console) -> None:
    with Display(10, 10**9, console) as display:
        display.phase("completions")
        started = time.perf_counter()
        for _ in range(20_000):
            display.advance(32)
        each = (time.perf_counter() - started) / 20_000
    assert each < 2e-5  # measured: 1e-7; the rest is for a busy machine
