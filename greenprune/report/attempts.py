"""When and where each attempt of a run went on and how it ended, from the few lines of its log that tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenprune.tracking import Event, EventsCorrupt, parse_event

IN_GOOD_ORDER = ("interrupt", "end")
"""Last events of an attempt after which nothing of it is missing."""

_START = b'"kind": "start"'
_HEAD = 200  # bytes of a line that its time, step and kind are among: a start may be long


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        begun_s: When its first event was, in seconds since 1970.
        ended_s: The same of its last one.
        lost_work: Whether some of what it did is on no record, because it was killed, or was done again.
        machines: What tells its machines from all others; empty if a version made it that did not record that.
        host: The name of the first of them, which others may have as well; None if not known.
    """

    begun_s: float
    ended_s: float
    lost_work: bool
    machines: frozenset[str] = frozenset()
    host: str | None = None

    def is_where(self, other: Attempt) -> bool:
        """Whether it was on a machine of another attempt, as far as is known."""
        if self.machines and other.machines:
            return bool(self.machines & other.machines)
        return self.host is not None and self.host == other.host


@dataclass(frozen=True)
class Allotment:
    """The part of its machine that a run had.

    Attributes:
        cores: Cores that its job was given, or that it could use, as Slurm or the system counts them.
        of: Those of the machine, as the system counts them.
        by_slurm: Whether the others were Slurm's to give to other jobs.
    """

    cores: int
    of: int
    by_slurm: bool


def allotment_of(attempt: Mapping[str, Any]) -> Allotment | None:
    """The part of its machine that an attempt had; None if it had all of it, or that is not known.

    Args:
        attempt: A line of its run's provenance.jsonl.
    """
    cores, usable, slurm = attempt.get("cpu_cores"), attempt.get("cpu_cores_usable"), attempt.get("slurm")
    if cores is None or usable is None:
        return None
    if not slurm:
        return Allotment(usable, cores, by_slurm=False) if usable < cores else None
    # What the job has on its first node: this may be a step of it, held to less.
    given = re.match(r"\d+", slurm.get("cpus_per_node") or slurm.get("cpus_on_node") or "")
    part = int(given.group()) if given else usable
    # Slurm may count cores where the system counts their threads: a whole node of its looks like half of one, but all
    # of that can be used.
    physical = attempt.get("cpu_cores_physical") or cores
    is_part = part < physical or (part < cores and usable < cores)
    return Allotment(part, cores, by_slurm=True) if is_part else None


def read_spans(path: Path, provenance: Sequence[Mapping[str, Any]] = ()) -> tuple[Attempt, ...]:
    """The attempts that a log tells of, in order, as far as it can be read; only their first and last lines are.

    Args:
        path: The run's events.jsonl.
        provenance: The lines of its provenance.jsonl.
    """
    try:
        edges = list(_edges(path))
    except OSError:
        return ()
    places = [_place([line]) for line in provenance]
    if len(places) != len(edges):  # one that was killed as it started has no event
        places = [_place(provenance)] * len(edges)
    goes_on_at = [*(start["step"] for start, _ in edges[1:]), math.inf]
    spans = zip(edges, goes_on_at, places, strict=False)
    return tuple(_attempt(start, last, step, *place) for (start, last), step, place in spans)


def _place(provenance: Sequence[Mapping[str, Any]]) -> tuple[frozenset[str], str | None]:
    """The machines that lines of a provenance.jsonl tell of, and the name of one."""
    machines = frozenset(machine for line in provenance for machine in line.get("machines") or ())
    return machines, next((line["host"] for line in provenance if line.get("host")), None)


def _attempt(
    start: Event, last: Event | None, goes_on_at: float, machines: frozenset[str], host: str | None
) -> Attempt:
    """What became of an attempt after which the run went on at a step."""
    ended_s, lost = start["time"], True
    if last is not None:
        ended_s = max(ended_s, last["time"])
        lost = last["kind"] not in IN_GOOD_ORDER or goes_on_at < last["step"]
    return Attempt(start["time"], ended_s, lost, machines, host)


def _edges(path: Path) -> Iterator[tuple[Event, Event | None]]:
    """Of each attempt its start event and its last one; None if that line is no event."""
    start: Event | None = None
    before = b""
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            found = _event_in(line) if _START in line[:_HEAD] else None
            if found is not None and found["kind"] == "start":
                if start is not None:
                    yield start, _event_in(before)
                start = found
            before = line if line.strip() else before
    if start is not None:
        yield start, _event_in(before)


def _event_in(line: bytes) -> Event | None:
    with suppress(EventsCorrupt):
        return parse_event(line)
    return None
