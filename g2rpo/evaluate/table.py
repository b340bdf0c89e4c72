"""An evaluation's table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..metrics import number
from .result import Evaluation
from .statistics import Comparison, Estimate

WIDTH = 100


def show(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print names and facts, then a row a reward: each mean, and under it its 95 % interval."""
    console = console or Console(highlight=False)
    if not console.is_terminal or console.width > WIDTH:
        console.width = WIDTH
    title = evaluation.name
    if evaluation.base_name is not None:
        title += f", against {evaluation.base_name}"
    console.print(Text(title, style="bold"))
    for label, value in evaluation.facts.items():
        console.print(Text(f"{label}: {value}"))
    console.print()
    console.print(make_table(evaluation.comparisons))


def make_table(rows: list[Comparison]) -> Table:
    """Columns that nothing would stand in are left out."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("reward", overflow="fold")
    columns: list[Callable[[Comparison], Text]] = []

    def add(title: str, cell: Callable[[Comparison], Text]) -> None:
        table.add_column(title, justify="right", no_wrap=True)
        columns.append(cell)

    paired = any(row.base is not None for row in rows)
    if paired:
        add("base", lambda row: _cell(row.base))
    add("policy", lambda row: _cell(row.policy))
    if paired:
        add("change", lambda row: _cell(row.change, sign=True, colour=True))
        add("win rate", lambda row: _cell(row.win_rate, percent=True))
    if any(row.failed for row in rows):
        add("failed", lambda row: Text(str(row.failed), style="bold red" if row.failed else ""))
    for row in rows:
        name = Text(row.reward)
        if row.mark:
            name.append(f"\n{row.mark}", style="dim")
        table.add_row(name, *(cell(row) for cell in columns))
    return table


def _cell(
    estimate: Estimate | None, sign: bool = False, percent: bool = False, colour: bool = False
) -> Text:
    """Two lines, '0.798' over '[0.770, 0.826]'; a dash where nothing was scored."""
    if estimate is None or not math.isfinite(estimate.mean):
        return Text("–")  # also of a reward that failed on all

    def text(value: float) -> str:
        return f"{100 * value:.0f}" if percent else number(value, sign)

    style = "bold"
    if colour and estimate.has_interval:
        style += " green" if estimate.low > 0 else " red" if estimate.high < 0 else ""
    found = Text(text(estimate.mean) + (" %" if percent else ""), style=style)
    if estimate.has_interval:
        found.append(f"\n[{text(estimate.low)}, {text(estimate.high)}]", style="not bold dim")
    return found
