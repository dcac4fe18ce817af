"""The report of a sweep: its runs beside their dense twins, and which of them have no result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from greenprune.config import UserError
from greenprune.locking import Holder
from greenprune.redaction import without_secrets
from greenprune.report.writing import report_forms, write_report
from greenprune.sweep.folder import PlannedRun, SweepFolder
from greenprune.sweep.slurm import QueuedTask
from greenprune.sweep.states import RunState, read_states

Queue = Callable[[], Mapping[int, QueuedTask]]


def collect_report(
    folder: SweepFolder, runs: Sequence[PlannedRun], queue: Queue, patience_s: float
) -> tuple[list[RunState], list[Path]]:
    """Write ``report.md``, and ``report.html`` where its libraries are there, into a sweep's folder.

    Args:
        folder: The sweep's folder.
        runs: Its runs.
        queue: Asks for the runs that are in Slurm's queue.
        patience_s: Most seconds to wait for files that were written on other machines and are not to be seen yet.

    Returns:
        The states of the runs, and the files.

    Raises:
        UserError: No run has left anything that could be reported.
    """
    states, problem = settle(folder, runs, queue, patience_s)
    places = [folder.run_folder(state.run).path for state in states]
    there = [path for path in places if path.is_dir() and any(path.iterdir())]
    if not there:
        raise UserError(f"DIR: no run of {str(folder.path)!r} has begun; expected one to report on")
    notes = [_note(state) for state in states if state.state != "finished"]
    if notes and problem:
        notes.append(f"What is in Slurm's queue is not known: {problem}.")
    written = []
    for form in report_forms():
        path = write_report(there, folder.path / f"report.{form}", form, notes)
        assert path is not None
        written.append(path)
    return states, written


def _note(state: RunState) -> str:
    why = f" ({state.why})" if state.why else ""
    return f"{state.run.name} has no result: {state.state}{why}."


def settle(
    folder: SweepFolder, runs: Sequence[PlannedRun], queue: Queue, patience_s: float
) -> tuple[list[RunState], str]:
    """Read the states once all that other machines wrote can be seen here, or the patience is over.

    A run whose files do not tell how it ended may have ended on another machine a moment ago. A Slurm that does not
    answer is asked again; after that the files alone tell.

    Returns:
        The states, and why Slurm did not tell what is in its queue, or nothing.
    """
    deadline = time.monotonic() + patience_s
    while True:
        queued, problem = _ask(queue)
        states = read_states(folder, runs, queued)
        unclear = [
            state
            for state in states
            if _may_be_over(state, is_queued=state.run.number in queued) and not folder.exit_of(state.run).exists()
        ]
        if not (unclear or problem) or time.monotonic() >= deadline:
            return states, problem
        time.sleep(1.0)


def _ask(queue: Queue) -> tuple[Mapping[int, QueuedTask], str]:
    try:
        return queue(), ""
    except UserError as error:
        return {}, without_secrets(str(error), os.environ)


def _may_be_over(state: RunState, *, is_queued: bool) -> bool:
    """Whether a run may have ended since it was seen to go on, if it was."""
    if state.state != "running":
        return state.is_to_do
    # On another machine, where it is known by its lock alone, and a kill shows late.
    return not is_queued and state.why != Holder(True).where
