"""What a person sees of a run while it trains.

A small live panel on a terminal, plain lines anywhere else.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .metrics import KINDS, Change, Row, changes, clock, number


class Display:
    """Shows a run while it trains; a context manager that the trainer drives.

    On a terminal: four lines, redrawn four times a second by a thread of their own, while whatever
    else is printed, logged or warned scrolls by above them. Elsewhere (a file, CI, TERM=dumb):
    plain lines without control codes, one for every row that carries an evaluation, one for another
    row if none was printed in the last 5 s, and a sign of life every 30 s inside a long update.

    total_updates: where the bar ends, >= 1.
    evaluations_per_update: training evaluations of one update, >= 1; they move the bar inside it.
    console: where to; standard output by default.
    """

    WIDTH = 100  # columns; more only spreads the eye
    ROW_SECONDS = 5.0
    LIFE_SECONDS = 30.0

    def __init__(
        self, total_updates: int, evaluations_per_update: int, console: Console | None = None
    ) -> None:
        if total_updates < 1:
            raise ValueError(f"total_updates is {total_updates}, expected at least 1")
        if evaluations_per_update < 1:
            raise ValueError(
                f"evaluations_per_update is {evaluations_per_update}, expected at least 1"
            )
        self.console = console or Console()
        self._live: Live | None = None
        self._total, self._per_update = total_updates, evaluations_per_update
        self._done = 0  # updates
        self._evaluations = 0  # of training, since this display began
        self._in_update = 0  # of them, since the last row
        self._phase = ""
        self._began = self._phase_since = self._last_line = time.monotonic()
        self._evaluating = 0.0  # seconds spent in finished phases "evaluation"
        self._grad_norm: float | None = None
        self._warning = ""
        self._evaluated: list[Row] = []  # the first and the latest row with an evaluation
        self._rewards: list[Change] = []  # the first reward and the first held-out one between them
        self._marks: deque[tuple[float, float, int, int]] = deque(maxlen=10)  # one an update
        self._entered = False
        self._messages: deque[str] = deque()  # not printed yet
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []  # handlers, former streams
        self._mark(afresh=True)

    # What the trainer calls.

    def __enter__(self) -> Display:
        self._began = self._phase_since = self._last_line = time.monotonic()
        self._mark(afresh=True)
        self._entered = True
        if self.console.is_interactive:
            former = sys.stdout, sys.stderr
            self._live = Live(
                self,
                console=self.console,
                refresh_per_second=4,
                # a stream that goes to a file stays there
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            self._move_log_handlers(dict(zip(former, (sys.stdout, sys.stderr), strict=True)))
        return self

    def __exit__(self, *exception: object) -> None:
        self.phase("finished" if self._share() == 1 else "stopped")
        if self._live is not None:
            self._live.stop()
            self._live = None
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._moved.clear()
        self._entered = False
        self._print_messages()

    def resume(self, rows: Sequence[Row]) -> None:
        """Takes over the rows of a run that is being continued, without printing them."""
        for row in rows:
            self._take(row)
        self._mark(afresh=True)

    def phase(self, name: str) -> None:
        """Names what is going on now. What happens in "evaluation" does not count as training."""
        self._print_messages()
        now = time.monotonic()
        if self._phase == "evaluation":
            self._evaluating += now - self._phase_since
        self._phase, self._phase_since = name, now

    def advance(self, evaluations: int) -> None:
        """Counts transformer evaluations as they are done; costs less than a microsecond."""
        if self._messages:
            self._print_messages()
        if self._phase != "evaluation":
            self._evaluations += evaluations
            self._in_update += evaluations
        if self._live is None and time.monotonic() - self._last_line >= self.LIFE_SECONDS:
            self._print(f"{self._share():.0%}", self._phase)

    def row(self, row: Row) -> None:
        """Takes the metrics row of a finished update, or of the state before training."""
        self._print_messages()
        evaluated = self._take(row)
        self._mark(afresh=not self._evaluations)  # the first evaluation is no guide to the pace
        late = time.monotonic() - self._last_line >= self.ROW_SECONDS
        if self._live is None and (evaluated or late):
            shown = [f"{change.name} {_latest(change)}" for change in self._rewards]
            if self._grad_norm is not None:
                shown.append(f"grad norm {number(self._grad_norm)}")
            self._print(*shown, self._warning)

    def warn(self, text: str) -> None:
        """Shows text with every row, or in the panel, until another or "" replaces it."""
        self._warning = text

    def message(self, text: str) -> None:
        """Prints text, above the panel if there is one, unwrapped: a path in it can be copied.

        Signal handlers may call it. A handler may have interrupted a print, of this display or of
        anything else, and neither rich nor a buffered stream can be entered twice by one thread. So
        inside the `with` block text is only put down here: a panel shows it when next redrawn, and
        the next call of phase, advance or row prints it, or else the end of the block.
        """
        self._messages.append(text)
        if not self._entered:
            self._print_messages()

    # What it makes of that.

    def _take(self, row: Row) -> bool:
        """Returns whether the row carries an evaluation."""
        self._done, self._in_update = row["update"], 0
        self._grad_norm = row.get("grad_norm", self._grad_norm)
        if not changes([row]):
            return False
        self._evaluated = [*self._evaluated[:1], row]
        found = changes(self._evaluated)
        firsts = (next((change for change in found if change.kind == kind), None) for kind in KINDS)
        self._rewards = [change for change in firsts if change is not None]
        return True

    def _move_log_handlers(self, redirected: dict[Any, Any]) -> None:
        """Points handlers at the redirected streams: those made earlier hold the former ones."""
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in {h for logger in loggers for h in getattr(logger, "handlers", ())}:
            if isinstance(handler, logging.StreamHandler) and handler.stream in redirected:
                former = handler.setStream(redirected[handler.stream])
                if former is not None:  # None: the stream was not redirected
                    self._moved.append((handler, former))

    def _mark(self, afresh: bool) -> None:
        former = () if afresh else self._marks
        mark = (*self._clocks(), self._evaluations, self._done)
        self._marks = deque([*former, mark], maxlen=10)  # replaced at once: a thread is reading

    def _clocks(self) -> tuple[float, float]:
        """The time, and the time without the phases "evaluation"."""
        now = time.monotonic()
        evaluating = now - self._phase_since if self._phase == "evaluation" else 0.0
        return now, now - self._evaluating - evaluating

    def _share(self) -> float:
        """How much of the run is done, from 0 to 1."""
        inside = min(1.0, self._in_update / self._per_update)
        return min(1.0, (self._done + inside) / self._total)

    def _pace(self) -> tuple[str, str]:
        """Evaluations a second and the time left, both from the last ten updates; "" if unknown."""
        wall, training, evaluations, done = self._marks[0]
        now, now_training = self._clocks()
        evaluations = self._evaluations - evaluations
        updates = self._share() * self._total - done
        left = self._total * (1 - self._share())
        rate = eta = ""
        if evaluations and now_training > training:
            rate = f"{evaluations / (now_training - training):,.0f} evaluations/s"
        if left and updates >= 0.05:  # a guess is worth reading from a twentieth of an update on
            eta = f"eta {clock((now - wall) / updates * left)}"
        return rate, eta

    def _update(self) -> str:
        return f"update {self._done:>{len(str(self._total))}}/{self._total}"

    def _print_messages(self) -> None:
        while self._messages:
            self.console.out(self._messages.popleft(), highlight=False)

    def _print(self, *parts: str) -> None:
        parts = (self._update(), *parts, *self._pace())
        self.console.out("  ".join(part for part in parts if part), highlight=False)
        self._last_line = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        options = options.update(width=min(self.WIDTH, options.max_width))
        pace, eta = self._pace()
        bar = Table.grid(expand=True, padding=(0, 2, 0, 0))
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        bar.add_row(
            self._update(),
            ProgressBar(completed=self._share(), total=1.0),
            f"{self._share():4.0%}",
            eta or ("eta -:--" if self._share() < 1 else ""),
        )
        facts = [
            pace or "- evaluations/s",
            f"grad norm {number(self._grad_norm)}",
            f"elapsed {clock(time.monotonic() - self._began)}",
        ]
        status = Text("  ".join([f"{self._phase:<11}", *facts]), no_wrap=True, overflow="ellipsis")
        rewards = Table.grid(padding=(0, 2, 0, 0))
        arrow = " -> " if options.ascii_only else " → "
        values = [_latest(change, arrow) for change in self._rewards]
        label_width, value_width = max(map(len, KINDS.values())), max(map(len, values), default=0)
        name_width = max(8, options.max_width - label_width - value_width - 6)  # may be cut short
        for max_width in (label_width, name_width, value_width):
            rewards.add_column(no_wrap=True, max_width=max_width)
        for change, value in zip(self._rewards, values):
            rewards.add_row(KINDS[change.kind], change.name, value)
        waiting = [Text(text, overflow="fold") for text in self._messages.copy()]
        if self._warning:
            waiting.append(Text(self._warning, style="bold red", overflow="fold"))
        for renderable in (*waiting, bar, status, rewards):
            yield from console.render(renderable, options)


class Quiet:
    """What other ranks have for a Display: what they have to say goes to standard error, and the
    lead's display shows the rest. name: of the rank."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def message(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def phase(self, name: str) -> None:
        pass

    def advance(self, evaluations: int) -> None:
        pass


def _latest(change: Change, arrow: str | None = None) -> str:
    """The newest value, after the first one if there is an arrow, with the change since then."""
    if change.difference is None:
        return "not a finite number"
    if change.first_update == change.last_update:
        return number(change.after)
    former = "" if arrow is None else f"{number(change.before)}{arrow}"
    return f"{former}{number(change.after)} ({number(change.difference, sign=True)})"
