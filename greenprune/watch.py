"""Following a run from another terminal or machine, by reading what it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from greenprune.config import UserError
from greenprune.locking import is_left
from greenprune.tracking import Event, EventsCorrupt, RunFolder, parse_event

_POLL_S = 0.5
_LAST = ("end", "interrupt")


def watch_run(path: Path, show: Callable[[Event], None], *, follow: bool = True) -> str:
    """Show a run's events from the first on, and then as they come, until it ends or is seen to have stopped.

    A run that nobody has in hand, and a process of this machine had last, has stopped. A process of another machine is
    not seen: its run is followed until its events say that it ended.

    Args:
        path: The run's folder.
        show: Takes each event.
        follow: Whether to wait for more events.

    Returns:
        One line that says why there is nothing more to show.

    Raises:
        UserError: There is no run with events at the path, or its events cannot be read.
    """
    folder = RunFolder(path)
    if not folder.events.is_file():
        raise UserError(f"RUN: {str(path)!r} is not a run with events; expected the folder of one")
    last = "nothing"
    for event in _events(folder, follow):
        last = event["kind"]
        try:
            show(event)
        except KeyError as error:
            raise _unreadable(folder, f"its {last} event of step {event['step']} lacks {error}") from None
    if last == "end":
        return "The run is finished."
    if last == "interrupt":
        return "The run was stopped; it goes on with --resume auto."
    return "The run has stopped without a word." if follow else "These are its events so far."


def _events(folder: RunFolder, follow: bool) -> Iterator[Event]:
    """Whole lines of the log; at its end more are waited for as long as the run may go on."""
    last, rest, number = "", b"", 0
    with folder.events.open("rb") as file:
        while True:
            left = is_left(folder.path)  # asked before the read: once let go of, nothing more comes after it
            text = file.read()
            *lines, rest = (rest + text).split(b"\n")
            for line in lines:
                number += 1
                if line:
                    event = _parsed(line, number, folder)
                    last = event["kind"]
                    yield event
            stopped = last in _LAST or left
            if not text and (not follow or stopped):
                return
            if not text:
                time.sleep(_POLL_S)


def _parsed(line: bytes, number: int, folder: RunFolder) -> Event:
    try:
        event = parse_event(line)
    except EventsCorrupt as error:
        raise _unreadable(folder, f"line {number} is no event: {error}") from None
    if number == 1 and event["kind"] != "start":
        raise _unreadable(folder, f"line 1 is not a start but tells of {event['kind']}")
    return event


def _unreadable(folder: RunFolder, why: str) -> UserError:
    return UserError(f"RUN: {str(folder.events)!r} cannot be read ({why}); expected a log as the run wrote it")
