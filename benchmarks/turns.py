"""Contestants that take turns, and what their seconds say: the one way in which benchmarks time things.

A machine's speed drifts, by percents within minutes on shared cores. Whatever is compared therefore runs in turns of a
few steps each, in the order A B, B A, A B, ..., and only ratios of what was measured in one run are quoted: the ratio
of the two medians, with the quartiles of the ratios taken pair by pair as its spread. Knows neither torch nor
greenprune.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol


class Contestant(Protocol):
    """Something that does steps when it is its turn."""

    def turn(self, steps: int) -> float:
        """Do some steps.

        Returns:
            Seconds a step, the device's work included.
        """


@dataclass(frozen=True)
class Figure:
    """What was measured.

    Attributes:
        value: The median, or the ratio of two.
        low: First quartile of the single measurements; the value itself where there is one only.
        high: Their third quartile.
        n: Number of measurements, or of pairs.
    """

    value: float
    low: float
    high: float
    n: int


def median_of(values: list[float]) -> Figure:
    """The median of single measurements with their quartiles."""
    if len(values) == 1:
        return Figure(values[0], values[0], values[0], 1)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Figure(statistics.median(values), low, high, len(values))


def ratio_of(ours: list[float], theirs: list[float]) -> Figure:
    """The ratio of two medians, measured in pairs, with the quartiles of the pairs' own ratios."""
    spread = median_of([mine / other for mine, other in zip(ours, theirs, strict=True)])
    return Figure(statistics.median(ours) / statistics.median(theirs), spread.low, spread.high, spread.n)


def in_turn(names: list[str], turns: int) -> Iterator[str]:
    """Names in the order of their turns: forwards, then backwards, and so on."""
    for number in range(turns):
        yield from names if number % 2 == 0 else reversed(names)


@dataclass(frozen=True)
class Turns:
    """Seconds a step of every turn of each contestant, by its name.

    Attributes:
        seconds: By name, one entry a turn.
        steps: Steps of a turn.
    """

    seconds: dict[str, list[float]]
    steps: int

    def median(self, name: str) -> Figure:
        """Seconds a step of a contestant."""
        return median_of(self.seconds[name])

    def ratio(self, name: str, over: str) -> Figure:
        """Seconds of one contestant over those of another."""
        return ratio_of(self.seconds[name], self.seconds[over])


def take_turns(contestants: Mapping[str, Contestant], *, turns: int, steps: int, warmup: int = 1) -> Turns:
    """Let contestants run in turns.

    Args:
        contestants: By name, in the order of the first turn.
        turns: Turns of each that count.
        steps: Steps of a turn.
        warmup: Turns of each before those.
    """
    for name in in_turn(list(contestants), warmup):
        contestants[name].turn(steps)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for name in in_turn(list(contestants), turns):
        seconds[name].append(contestants[name].turn(steps))
    return Turns(seconds, steps)
