"""What a report is made of: runs, groups of them that differ in their seed alone, tasks, and the report itself."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from greenprune.formatting import UNKNOWN
from greenprune.report.history import History
from greenprune.report.runs import ComparedRun

_METERED = re.compile(r"(?P<device>.+?) \((?P<quality>counter|integrated power|estimate): (?P<source>.*)\)")

FIGURES = ("accuracy", "flops_forward", "flops_train", "energy_j", "co2_g", "time_s", "step_time_s")
"""Figures of a run that a group has a spread of."""

_MEASURED = ("energy_j", "energy_to_accuracy_j", "co2_g", "time_s", "step_time_s")  # each run of a seed tells anew


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of one figure over those finished runs of a group, or seeds, that tell it.

    Attributes:
        mean: Their mean.
        sd: Their sample standard deviation; None for a single one.
        n: How many they are.
    """

    mean: float
    sd: float | None
    n: int


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """The spread of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


@dataclass(frozen=True)
class ReportedRun:
    """One run of a report.

    Attributes:
        compared: The run among the others.
        history: What its events tell epoch by epoch.
        config: Its config.yaml by dotted keys; empty if it has none.
        provenance: Versions and hardware of its last attempt; empty if not known.
        is_held: Whether a process has it in hand now, on any machine; None if that cannot be told.
    """

    compared: ComparedRun
    history: History
    config: dict[str, Any]
    provenance: dict[str, Any]
    is_held: bool | None

    @property
    def name(self) -> str:
        """What it is called in the report."""
        return self.compared.name

    @property
    def seed(self) -> int | None:
        """Its seed; None if that is not known."""
        seed = self.compared.summary.get("seed", self.config.get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def is_finished(self) -> bool:
        """Whether it ended by itself."""
        return self.compared.is_finished

    @property
    def state(self) -> str:
        """Whether it is finished, or how far it came and whether it still runs, as far as that is known."""
        if self.is_finished or self.history.last_time is None:
            return self.compared.state
        state = self.compared.state.replace("unfinished", "running", 1) if self.is_held else self.compared.state
        try:
            heard = datetime.fromtimestamp(self.history.last_time, timezone.utc)
        except (ValueError, OverflowError, OSError):  # of a clock that was wrong beyond all years
            return state
        return f"{state}; last event {heard:%Y-%m-%d %H:%M} UTC"

    @property
    def energy_sources(self) -> tuple[tuple[str, str | None, str | None], ...]:
        """Device, source and quality of what it metered: as its events tell, or without them as its summary does."""
        if self.history.energy_sources:
            return self.history.energy_sources
        named = (_METERED.fullmatch(name) for name in self.compared.summary.get("energy_by_device_j") or {})
        return tuple((found["device"], found["source"], found["quality"]) for found in named if found)

    def figure(self, key: str) -> float | None:
        """One of :data:`FIGURES`; None if it is not known."""
        value = self.compared.step_time_s if key == "step_time_s" else self.compared.summary.get(key)
        return float(value) if isinstance(value, int | float) else None

    def counts(self, key: str) -> bool:
        """Whether a figure tells of the network alone: no lower bound, no work that was done twice."""
        complete, once = self.compared.energy_is_complete, not self.compared.has_lost_work
        return once and complete if key in ("energy_j", "co2_g") else once or key != "time_s"

    @property
    def metering(self) -> dict[str, str]:
        """What must be the same for joules to be compared, by its name for people."""
        summary = self.compared.summary
        meters = sorted(f"{kind} ({meter or 'not metered'})" for kind, meter in self.compared.meters)
        return {
            "hardware": "; ".join(self.compared.hardware or (UNKNOWN,)),
            **{key: str(value) for key, value in self.compared.execution.items()},
            "quality of joules": str(summary.get("energy_quality") or UNKNOWN),
            "joules of": ", ".join(meters) or UNKNOWN,
            "device": str(summary.get("device") or UNKNOWN),
            "processes": str(summary.get("world_size") or UNKNOWN),
        }


def spread_over(runs: Sequence[ReportedRun], key: str, values: Sequence[float | None]) -> Spread | None:
    """The spread of a figure of runs, or of its ratio to their twins'.

    What is measured counts for every run. Accuracy and what is counted come again with the seed, so runs that repeat
    one would make the spread smaller than it is over seeds: they count once, with their mean.

    Args:
        runs: The runs.
        key: Name of the figure or the ratio.
        values: Its value for each run.
    """
    if key in _MEASURED:
        return spread_of(values)
    by_seed: dict[object, list[float | None]] = {}
    for run, value in zip(runs, values, strict=True):
        by_seed.setdefault(run.name if run.seed is None else run.seed, []).append(value)
    means = (spread_of(repeats) for repeats in by_seed.values())
    return spread_of(mean.mean for mean in means if mean is not None)


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        label: What sets it apart from the other groups of its task.
        gated: Whether its runs are gated; None if not known.
        dense: Whether they are neither gated nor given a structure; None if not known.
        runs: Its runs.
        spreads: By figure, over its finished runs, of joules, CO2e and seconds where they tell of the network alone;
            None where nothing is known, or where CO2e is not told alike.
        against_twins: By ratio, over its finished runs that have a dense twin.
    """

    label: str
    gated: bool | None
    dense: bool | None
    runs: tuple[ReportedRun, ...]
    spreads: dict[str, Spread | None]
    against_twins: dict[str, Spread | None]

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """The seed of each run, as far as known."""
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True)
class Task:
    """The groups that may be drawn together: one data set, one kind of accuracy.

    Attributes:
        data: The data set.
        accuracy_kind: ``test`` or ``validation``.
        groups: Its groups: dense ones first.
        front: Labels of the groups on the Pareto front of accuracy against joules, by joules; None if there is none
            to draw, because energy is unknown or was metered in different ways.
        front_reason: Why there is none, or what it was drawn over.
    """

    data: str
    accuracy_kind: str
    groups: tuple[Group, ...]
    front: tuple[str, ...] | None
    front_reason: str


@dataclass(frozen=True)
class Report:
    """All that a report says.

    Attributes:
        tasks: By data set and kind of accuracy.
        differences: By key of the config or of the environment: by group the values that its runs have; a group is
            called by its label, after the data set if there are several.
        notes: What a reader of the figures must know.
    """

    tasks: tuple[Task, ...]
    differences: dict[str, dict[str, tuple[Any, ...]]]
    notes: tuple[str, ...]

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of all tasks."""
        return tuple(group for task in self.tasks for group in task.groups)

    @property
    def runs(self) -> tuple[ReportedRun, ...]:
        """The runs of all groups."""
        return tuple(run for group in self.groups for run in group.runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "tasks": [
                {
                    "data": task.data,
                    "accuracy_kind": task.accuracy_kind,
                    "pareto_front": task.front,
                    "pareto_front_reason": task.front_reason,
                    "groups": [
                        {
                            "label": group.label,
                            "gated": group.gated,
                            "seeds": group.seeds,
                            "runs": [run.name for run in group.runs],
                            "spreads": _plain_spreads(group.spreads),
                            "against_twins": _plain_spreads(group.against_twins),
                        }
                        for group in task.groups
                    ],
                }
                for task in self.tasks
            ],
            "runs": [
                {
                    **run.compared.to_dict(),
                    "state": run.state,
                    "config": run.config,
                    "hardware": run.compared.hardware,
                    "history": run.history.to_dict(),
                }
                for run in self.runs
            ],
            "differences": self.differences,
            "notes": list(self.notes),
        }


def _plain_spreads(spreads: dict[str, Spread | None]) -> dict[str, dict[str, Any] | None]:
    return {key: asdict(spread) if spread else None for key, spread in spreads.items()}
