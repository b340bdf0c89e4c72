"""The table of a comparison on a terminal: methods side by side, in blocks of as many as fit, and a
row a figure, since there are more figures than a terminal is wide."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

from ..metrics import number
from .table import AT_EQUAL, BEST, Table, cell, legend

LABEL, LONGEST = 13, 34  # characters of a line of a label, and where it has a key=value of many


def show(table: Table, console: Console | None = None) -> None:
    """No line is longer than the console is wide, unless it is too narrow for one method."""
    console = console or Console(highlight=False)
    waiting = list(table.methods)
    while waiting:
        count = len(waiting)
        while count > 1 and _width(console, _block(table, waiting[:count])) > console.width:
            count -= 1
        block = _block(table, waiting[:count])
        console.width = max(console.width, _width(console, block))  # else figures would be cut
        console.print(block)
        console.print()
        waiting = waiting[count:]
    console.print(legend(table), highlight=False)


def _width(console: Console, block: RichTable) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), block).maximum


def _block(table: Table, labels: Sequence[str]) -> RichTable:
    block = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    block.add_column("", no_wrap=True)
    block.add_column("before", justify="right", no_wrap=True)
    for label in labels:
        block.add_column(_in_lines(label), justify="right", no_wrap=True)
    for heading, shown in _rows(table):
        start = table.start.get(heading, math.nan)
        before = number(start) if math.isfinite(start) else ""
        cells = [cell(heading, table.methods[label][heading]) for label in labels]
        block.add_row(shown, before, *cells)
    return block


def _rows(table: Table) -> Iterator[tuple[str, str]]:
    """(heading, what is shown of it): what is said of a judge stands below it."""
    for heading in table.headings:
        if heading.endswith((AT_EQUAL, BEST)):
            continue
        yield heading, heading
        if heading in table.judges:
            yield heading + AT_EQUAL, "  at equal reward"
            yield heading + BEST, "  best"


def _in_lines(label: str) -> str:
    """Broken at spaces and hyphens, and within a key=value only where that is very long."""
    longest = max(map(len, re.findall(r"\S+=\S+", label)), default=0)
    return "\n".join(textwrap.wrap(label, max(LABEL, min(LONGEST, longest))))
