"""How a run's numbers are written for people, wherever they are shown."""

from __future__ import annotations

import math
import os
import signal
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

UNKNOWN = "unknown"
"""How a figure is shown that nobody knows."""

PLAIN_WIDTH = 120
"""Columns of a report that goes to a file or pipe."""

_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6))
_WORST_FIRST = ("estimate", "integrated power", "counter")


def format_si(value: float | None, unit: str = "") -> str:
    """A number to three digits with its SI prefix: ``10.3 MFLOPs``; ``unknown`` for None."""
    if value is None:
        return UNKNOWN
    for prefix, scale in _PREFIXES:
        if abs(value) >= 0.9995 * scale:
            return f"{_three_digits(value / scale)} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def _three_digits(value: float) -> str:
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{digits}f}"


def format_joules(energy_j: float | None) -> str:
    """Joules, from 10 kJ on with a prefix: ``1,234 J``, ``12.3 kJ``; ``unknown`` for None."""
    if energy_j is not None and 0.01 <= energy_j < 10_000:
        return f"{_three_digits(energy_j)} J"
    return format_si(energy_j, "J")


def format_seconds(time_s: float | None) -> str:
    """A duration in the unit that suits it: ``14.8 ms``, ``4.50 s``, ``12.4 min``, ``3.10 h``; ``unknown`` for None."""
    if time_s is None or time_s < 120:
        return format_si(time_s, "s")
    return f"{_three_digits(time_s / 60)} min" if time_s < 7200 else f"{_three_digits(time_s / 3600)} h"


def format_counted(names: Iterable[str]) -> str:
    """Names with how many there are of each, in their order: ``8 x NVIDIA H100, AMD EPYC``."""
    counts = Counter(names)
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def format_number(count: int, what: str) -> str:
    """How many there are of something: ``1 epoch``, ``1,200 epochs``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def format_percent(share: float | None, digits: int = 0) -> str:
    """A share as a percentage: ``46 %``; ``unknown`` for None."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f} %"


def format_share(part: float | None, whole: float | None) -> str:
    """A part of a whole as a percentage; ``unknown`` if either is not known."""
    return UNKNOWN if part is None or not whole else format_percent(part / whole)


def cost_name(unit: str) -> str:
    """What ``budget.unit`` counts, in words."""
    return {"flops": "FLOPs", "params": "parameters", "time": "step time", "energy": "step energy"}.get(unit, unit)


def worst_quality(qualities: Iterable[str | None]) -> str | None:
    """The quality of a sum of energies: that of its least certain part; None if nothing in it is known."""
    known = set(qualities)
    return next((quality for quality in _WORST_FIRST if quality in known), None)


def open_console() -> Console:
    """A console on standard output: as wide as the terminal, or 120 columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


_LEAST_OF_A_NAME = 20
"""Columns that a table has to leave for the names of its rows."""


@dataclass(frozen=True)
class NamedFigures:
    """A table whose first column is of names, which fold, and whose figures are whole at any width.

    Where the figures leave no room for names, each row is a line with its name and lines with what it has of figures,
    each behind the heading of its column.
    """

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(width=10_000)

        def width_of(*cells: RenderableType) -> int:
            return max((Measurement.get(console, wide, cell).maximum for cell in cells), default=0)

        names, *others = self.table.columns
        figures = sum(width_of(one.header, *one.cells) + self.table.padding[1] for one in others if one.no_wrap)
        name_width = width_of(names.header, *names.cells)
        if options.max_width - figures >= min(name_width, _LEAST_OF_A_NAME) + self.table.padding[1]:
            yield self.table
            return
        for row, (name, *cells) in zip(
            self.table.rows, zip(*(column.cells for column in self.table.columns), strict=True), strict=True
        ):
            yield Text.assemble(name if isinstance(name, Text) else str(name), style=row.style or "")
            told = "; ".join(_in_words(column, cell) for column, cell in zip(others, cells, strict=True) if str(cell))
            for line in textwrap.wrap(told, max(options.max_width - 4, 1), break_on_hyphens=False):
                yield Text("    " + line.replace(_UNBROKEN, " "), style=row.style or "")


_UNBROKEN = "\N{NO-BREAK SPACE}"


def _in_words(column: Column, cell: RenderableType) -> str:
    """A cell behind its column's heading; a figure stays on one line."""
    told = f"{' '.join(str(column.header).split())} {' '.join(str(cell).split())}".strip()
    return told.replace(" ", _UNBROKEN) if column.no_wrap else told


def leave_closed_pipe() -> int:
    """Have what is left for standard output go nowhere once its reader has left; the exit code of a command then."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def format_removed(removals: Iterable[Mapping[str, Any]]) -> str:
    """Blocks by their names, channels by their number: "stages.2.1, 45 channels of 9 blocks".

    Args:
        removals: Each with its ``unit`` and its ``channels``: how many, which, or None for a block.
    """
    blocks: list[str] = []
    channels: dict[str, int] = {}
    for removal in removals:
        gone = removal.get("channels")
        if gone is None:
            blocks.append(removal["unit"])
        else:
            owner = removal["unit"].rpartition(":")[0]
            channels[owner] = channels.get(owner, 0) + (gone if isinstance(gone, int) else len(gone))
    if channels:
        count = sum(channels.values())
        units = "1 channel" if count == 1 else f"{count:,} channels"
        blocks.append(f"{units} of {next(iter(channels)) if len(channels) == 1 else f'{len(channels)} blocks'}")
    return ", ".join(blocks)


_SPARK_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Iterable[float]) -> str:
    """Numbers as a row of bars, the least one lowest, the largest one highest; ``·`` for what is not finite."""
    numbers = list(values)
    finite = [value for value in numbers if math.isfinite(value)]
    if not finite:
        return "·" * len(numbers)
    least, span = min(finite), max(finite) - min(finite)
    top = len(_SPARK_LEVELS) - 1

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "·"
        return _SPARK_LEVELS[round(top * (value - least) / span) if span else 0]

    return "".join(map(bar, numbers))
