"""When each attempt of a run went on and how it ended, from the few lines of its log that tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from greenprune.tracking import Event, EventsCorrupt, parse_event

_IN_GOOD_ORDER = ("interrupt", "end")
_START = b'"kind": "start"'
_HEAD = 200  # bytes of a line that its time, step and kind are among: a start may be long


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        begun_s: When its first event was, in seconds since 1970.
        ended_s: The same of its last one.
        lost_work: Whether some of what it did is on no record, because it was killed, or was done again.
    """

    begun_s: float
    ended_s: float
    lost_work: bool


def read_spans(path: Path) -> tuple[Attempt, ...]:
    """The attempts that a log tells of, in order, as far as it can be read; only their first and last lines are.

    Args:
        path: The run's events.jsonl.
    """
    try:
        edges = list(_edges(path))
    except OSError:
        return ()
    goes_on_at = [start["step"] for start, _ in edges[1:]] + [math.inf]
    return tuple(_attempt(start, last, step) for (start, last), step in zip(edges, goes_on_at, strict=False))


def _attempt(start: Event, last: Event | None, goes_on_at: float) -> Attempt:
    """What became of an attempt after which the run went on at a step."""
    if last is None:
        return Attempt(start["time"], start["time"], lost_work=True)
    lost = last["kind"] not in _IN_GOOD_ORDER or goes_on_at < last["step"]
    return Attempt(start["time"], max(start["time"], last["time"]), lost)


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
