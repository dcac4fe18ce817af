"""How far each run of a sweep is, from its files and from what Slurm has in its queue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from greenprune.config import UserError
from greenprune.formatting import UNKNOWN, NamedFigures, format_joules, format_number, format_percent, format_seconds
from greenprune.interrupt import STOP_SIGNALS
from greenprune.locking import find_holder
from greenprune.report.runs import ComparedRun, read_run, read_run_events
from greenprune.report.sharing import with_sharing
from greenprune.sweep.folder import PlannedRun, SweepFolder
from greenprune.sweep.slurm import QueuedTask
from greenprune.tracking import Event, describe_damage

State = Literal["finished", "running", "waiting", "stopped", "failed", "missing", "unknown"]
_STYLES: dict[State, str] = {"finished": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}
_STOP_CODES = {str(128 + number) for number in STOP_SIGNALS}


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        run: The run.
        state: ``finished``; ``running``; ``waiting`` in Slurm's queue; ``stopped`` by a signal that asks for it,
            with a checkpoint or before there was anything to keep; ``failed``: ended by itself or was killed;
            ``missing``: never started; ``unknown``: another machine had it last, and it may go on there.
        why: More about it, in a few words; may be empty.
        figures: Its summary, or what its events tell under the same keys.
        attempts: Times it was started.
        steps: Steps of the whole run; None if not known.
        compared: It as one of those that a report compares; None if its files cannot be read.
    """

    run: PlannedRun
    state: State
    why: str
    figures: dict[str, Any]
    attempts: int
    steps: int | None
    compared: ComparedRun | None = None

    @property
    def progress(self) -> float | None:
        """Share of its steps that are done; None if not known."""
        done = self.figures.get("steps")
        if self.state == "finished":
            return 1.0
        return done / self.steps if done is not None and self.steps else None

    @property
    def is_to_do(self) -> bool:
        """Whether it has to be started, again or for the first time."""
        return self.state in ("stopped", "failed", "missing")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "number": self.run.number,
            "name": self.run.name,
            "changes": self.run.changes,
            "state": self.state,
            "why": self.why,
            "progress": self.progress,
            "attempts": self.attempts,
            **{key: self.figures.get(key) for key in ("accuracy", "energy_j", "energy_lost_j", "time_s")},
        }


def read_states(
    folder: SweepFolder, runs: Sequence[PlannedRun], queue: Mapping[int, QueuedTask] = {}
) -> list[RunState]:
    """Read the state of each run.

    Args:
        folder: The sweep's folder.
        runs: Its runs.
        queue: Those of them that are in Slurm's queue, by number.
    """
    return [_read_state(folder, run, queue.get(run.number)) for run in runs]


def _read_state(folder: SweepFolder, run: PlannedRun, queued: QueuedTask | None) -> RunState:
    place = folder.run_folder(run)
    compared = _read_compared(place.path, run)
    figures = {} if compared is None else compared.summary
    events, damage = read_run_events(place.path)
    state, why = _judge(folder, run, queued, events[-1] if events else {})
    if place.summary.is_file() and figures.get("accuracy") is not None:
        # Its result is whole in any case; the events tell the rest as far as they can be read.
        state, why = "finished", f"events.jsonl: {describe_damage(damage)}" if damage else ""
    starts = [event for event in events if event["kind"] == "start"]
    return RunState(run, state, why, figures, len(starts), _steps(starts), compared)


def _read_compared(path: Path, run: PlannedRun) -> ComparedRun | None:
    try:
        return read_run(path, run.name)
    except UserError:  # half a file, which another machine is writing
        return None


def _steps(starts: Sequence[Event]) -> int | None:
    """Steps of the whole run, as the last attempt told; None if none did."""
    return starts[-1]["epochs"] * starts[-1]["steps_per_epoch"] if starts else None


def _judge(folder: SweepFolder, run: PlannedRun, queued: QueuedTask | None, last: Event) -> tuple[State, str]:
    """The state of a run without a summary, by its last event among others; an empty one if it has none."""
    if queued is not None:
        return ("running" if queued.is_running else "waiting"), str(queued)
    holder = find_holder(folder.run_folder(run).path)
    code, ended_s = _exit_of(folder, run)
    if not (holder.host and code and ended_s >= holder.renewed_s):  # else it was seen to be there, and ended since then
        if holder.is_held:
            return "running", holder.where
        if holder.is_held is None:
            return "unknown", f"cannot be told ({holder.doubt})"
    return _judge_ended(folder, run, code, last)


def _judge_ended(folder: SweepFolder, run: PlannedRun, code: str, last: Event) -> tuple[State, str]:
    """The state of a run that nobody has in hand, by the exit code of its last attempt, if it is known."""
    kind = last.get("kind")
    if kind == "failure" and code in ("", "1"):  # another code is of an attempt since then
        return "failed", f"{last.get('error', 'it is not told why')}; see {folder.log_of(run)}"
    if code and code not in _STOP_CODES:  # of the last attempt, which may have recorded nothing
        return "failed", f"exit code {code}; see {folder.log_of(run)}"
    if kind == "interrupt":
        return "stopped", "it has a checkpoint"
    if code:  # of a stop, which would have left an event if this attempt had begun to train
        return "stopped", "as it was starting"
    if kind is not None or folder.log_of(run).exists():
        return "failed", f"it was killed; see {folder.log_of(run)}"
    return "missing", ""


def _exit_of(folder: SweepFolder, run: PlannedRun) -> tuple[str, float]:
    """Exit code of a run's last attempt and when it was written, by the file system's clock; empty if there is none."""
    path = folder.exit_of(run)
    try:
        return path.read_text().strip(), path.stat().st_mtime
    except OSError:
        return "", 0.0


def states_table(states: Sequence[RunState]) -> RenderableType:
    """The states as a table, with a line of totals."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    for header in ("state", "progress", "accuracy", "joules", "time", "attempts"):
        table.add_column(header, justify="left" if header == "state" else "right", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    for state in states:
        figures = state.figures
        accuracy = figures.get("accuracy")
        table.add_row(
            Text(state.run.name),
            Text(state.state, style=_STYLES.get(state.state, "")),
            "-" if state.progress is None else format_percent(state.progress),
            "-" if accuracy is None else format_percent(accuracy, 2),
            "-" if figures.get("energy_j") is None else format_joules(figures["energy_j"]),
            "-" if figures.get("time_s") is None else format_seconds(figures["time_s"]),
            str(state.attempts or "-"),
            Text(state.why),
        )
    return Group(NamedFigures(table), Text(totals(states)))


def totals(states: Sequence[RunState]) -> str:
    """How many runs are in which state, and what all took together."""
    counts = {state.state: 0 for state in states}
    for state in states:
        counts[state.state] += 1
    known = [state.figures["energy_j"] for state in states if state.figures.get("energy_j") is not None]
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    told = f"{format_number(len(states), 'run')}: {words}; {format_joules(sum(known)) if known else UNKNOWN} so far"
    runs = with_sharing([state.compared for state in states if state.compared is not None])
    shared = known and any(run.shared for run in runs)
    return f"{told}, other work on machines that were shared counted as well" if shared else told
