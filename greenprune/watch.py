"""Following a run from another terminal or machine, by reading what it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from greenprune.config import UserError
from greenprune.locking import is_left
from greenprune.tracking import Event, EventsCorrupt, RunFolder, describe_damage, parse_event

_POLL_S = 0.5
_ENDINGS = {
    "end": "The run is finished.",
    "interrupt": "The run was stopped; it goes on with --resume auto.",
    "failure": "The run failed: {error}",  # no dot behind the command that it may end with
}


def watch_run(path: Path, show: Callable[[Event], None], *, follow: bool = True) -> str:
    """Show a run's events from the first on, and then as they come, until it ends or is seen to have stopped.

    A run that nobody has in hand, and a process of this machine had last, has stopped. A process of another machine is
    not seen: its run is followed until its events say that it ended.

    Args:
        path: The run's folder.
        show: Takes each event.
        follow: Whether to wait for more events.

    Returns:
        One line that says why there is nothing more to show, and which lines of the log were left out because they are
        no events.

    Raises:
        UserError: There is no run with events at the path, or its events cannot be read.
    """
    folder = RunFolder(path)
    if not folder.events.is_file():
        raise UserError(f"RUN: {str(path)!r} is not a run with events; expected the folder of one")
    last: Event = {}
    damaged: list[str] = []
    for last in _events(folder, follow, damaged):
        try:
            show(last)
        except KeyError as error:
            raise _unreadable(folder, f"its {last['kind']} event of step {last['step']} lacks {error}") from None
    ending = "The run has stopped without a word." if follow else "These are its events so far."
    why = str(last.get("error", "it is not told why")).rstrip(".")
    ending = _ENDINGS.get(last.get("kind", ""), ending).format(error=why)
    return f"{ending.removesuffix('.')}. Left out: {describe_damage(damaged)}." if damaged else ending


def _events(folder: RunFolder, follow: bool, damaged: list[str]) -> Iterator[Event]:
    """Events of the log, and in a list what is wrong with each line that is none.

    At its end more are waited for as long as the run may go on.
    """
    last, number, whole = "", 0, 0
    with folder.events.open("rb", buffering=0) as file:
        while True:
            left = is_left(folder.path)  # asked before the read: once let go of, nothing more comes after it
            # Always from the end of the last whole line: half of one may be cut off by the next attempt, and another
            # one be there in its place.
            file.seek(whole)
            *lines, _ = file.read().split(b"\n")
            for line in lines:
                whole += len(line) + 1
                number += 1
                event = _parsed(line, number, folder, damaged) if line else None
                if event is not None:
                    last = event["kind"]
                    yield event
            stopped = last in _ENDINGS or left
            if not lines and (not follow or stopped):
                return
            if not lines:
                time.sleep(_POLL_S)


def _parsed(line: bytes, number: int, folder: RunFolder, damaged: list[str]) -> Event | None:
    """The event of a line; None if it is none, and then one more damage. Without a first one nothing can be shown."""
    try:
        event = parse_event(line)
    except EventsCorrupt as error:
        damaged.append(f"line {number} is no event: {error}")
        if number == 1:
            raise _unreadable(folder, damaged[0]) from None
        return None
    if number == 1 and event["kind"] != "start":
        raise _unreadable(folder, f"line 1 is not a start but tells of {event['kind']}")
    return event


def _unreadable(folder: RunFolder, why: str) -> UserError:
    return UserError(f"RUN: {str(folder.events)!r} cannot be read ({why}); expected a log as the run wrote it")
