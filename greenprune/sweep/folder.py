"""A sweep's folder: the configs of its runs, the runs, what Slurm printed, and how each run ended.

Every run writes files of its own: its folder below ``runs/``, its log and its exit code. Only the commands that the
user gives write ``sweep.json``, ``configs/`` and ``submissions.jsonl``, one at a time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenprune.config import ConfigError, UserError, dump_config, load_config
from greenprune.sweep.plan import Sweep
from greenprune.tracking import RunFolder, write_json
from greenprune.whole_files import write_atomically

_EXPECTED = "expected the folder of a sweep, as greenprune sweep FILE makes it"


@dataclass(frozen=True)
class PlannedRun:
    """What a sweep's folder says of one of its runs.

    Attributes:
        number: Its number.
        name: Name of its folder.
        changes: The fields in which it differs from the sweep's base.
        identity: Digest of all that shapes its result.
    """

    number: int
    name: str
    changes: dict[str, Any]
    identity: str

    @property
    def label(self) -> str:
        """Its number as files are named after it."""
        return f"{self.number:04d}"


@dataclass(frozen=True)
class SweepFolder:
    """The files of one sweep.

    Attributes:
        path: The folder.
    """

    path: Path

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return self.path / "runs"

    @property
    def plan(self) -> Path:
        """What the sweep consists of."""
        return self.path / "sweep.json"

    @property
    def submissions(self) -> Path:
        """The Slurm jobs that were submitted for it, one JSON object a line."""
        return self.path / "submissions.jsonl"

    def config_of(self, run: PlannedRun) -> Path:
        """The complete config of a run."""
        return self.path / "configs" / f"{run.label}.yaml"

    def exit_of(self, run: PlannedRun) -> Path:
        """The file with the exit code of a run's last attempt, once that has ended by itself."""
        return self.path / "exits" / run.label

    def log_of(self, run: PlannedRun) -> Path:
        """What a run's attempts printed."""
        return self.path / "logs" / f"{run.label}.log"

    def run_folder(self, run: PlannedRun) -> RunFolder:
        """The folder of a run."""
        return RunFolder(self.runs / run.name)

    def planned(self) -> list[PlannedRun]:
        """The sweep's runs, by number.

        Raises:
            UserError: This is not the folder of a sweep.
        """
        try:
            values = json.loads(self.plan.read_text())
            return [PlannedRun(**run) for run in values["runs"]]
        except OSError as error:
            raise UserError(f"DIR: {str(self.path)!r} holds no sweep.json ({error.strerror}); {_EXPECTED}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"DIR: {str(self.plan)!r} cannot be read ({error}); {_EXPECTED}") from None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other commands from submitting or changing the same sweep meanwhile.

        Raises:
            UserError: One is doing so now, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a")
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write {str(self.path)!r} ({error.strerror}); expected a folder you can write to"
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{str(self.path)!r} is in use by another greenprune sweep; expected one that has ended"
                ) from None
            except OSError:  # a file system without locks, as Lustre often is: two at once are up to the user there
                pass
            yield


def planned_runs(sweep: Sweep) -> list[PlannedRun]:
    """What the folder of a sweep says of its runs."""
    return [PlannedRun(task.number, task.name, dict(task.changes), task.config.identity()) for task in sweep.tasks]


def check_same_sweep(folder: SweepFolder, runs: list[PlannedRun]) -> None:
    """Check that a folder, if it is there, holds this sweep; nothing is written.

    Raises:
        UserError: It holds another sweep, or something else.
    """
    if not folder.path.exists():
        return
    if not folder.path.is_dir() or (not folder.plan.exists() and _is_used(folder.path)):
        raise UserError(f"name: {str(folder.path)!r} holds something other than a sweep; expected another name")
    if not folder.plan.exists():
        return
    theirs = folder.planned()
    pairs = enumerate(zip(theirs, runs, strict=False))
    first = next((i for i, (a, b) in pairs if not _is_same(folder, a, b)), min(len(theirs), len(runs)))
    if first == len(theirs) == len(runs):
        return
    raise UserError(
        f"name: {str(folder.path)!r} holds another sweep of {len(theirs)} runs (this one has {len(runs)}; "
        f"{_difference(folder, runs, first)}); expected the same runs, or another name"
    )


def _is_same(folder: SweepFolder, theirs: PlannedRun, mine: PlannedRun) -> bool:
    """Whether a run of the folder is a run of the sweep.

    A version of the program whose configs have other fields has digested others: then the run's config tells, as it
    does of the run itself.
    """
    if theirs.name != mine.name or theirs.identity == mine.identity:
        return theirs.name == mine.name
    try:
        return load_config(folder.config_of(theirs)).identity() == mine.identity
    except ConfigError:
        return False


def _is_used(path: Path) -> bool:
    return any(child.name != ".lock" for child in path.iterdir())


def _difference(folder: SweepFolder, runs: list[PlannedRun], first: int) -> str:
    """In which run, and in what of it, two sweeps differ first."""
    theirs = folder.planned()
    if first >= len(theirs):
        return f"run {runs[first].label} is new"
    if first >= len(runs):
        return f"run {theirs[first].label} is gone"
    mine, other = runs[first], theirs[first]
    if mine.name != other.name:
        return f"run {mine.label} is {mine.name} here and {other.name} there"
    keys = sorted(
        key for key in mine.changes.keys() | other.changes.keys() if mine.changes.get(key) != other.changes.get(key)
    )
    return f"run {mine.label} differs in {', '.join(keys) or 'its base'}"


def write_sweep(folder: SweepFolder, sweep: Sweep) -> list[PlannedRun]:
    """Write a sweep's folder, or bring the configs in it up to date where that does not change any result.

    ``sweep.json`` comes last: a folder without it is not a sweep yet.

    Args:
        folder: The folder; :func:`check_same_sweep` has passed.
        sweep: The sweep.
    """
    runs = planned_runs(sweep)
    for name in ("configs", "exits", "logs", "runs"):
        (folder.path / name).mkdir(parents=True, exist_ok=True)
    for run, task in zip(runs, sweep.tasks, strict=True):
        path, text = folder.config_of(run), dump_config(task.config)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
    write_json(folder.plan, {"format": 1, "name": folder.path.name, "runs": [vars(run) for run in runs]})
    return runs


def record_submission(folder: SweepFolder, submission: dict[str, Any]) -> None:
    """Append one submission and bring it to disk."""
    with folder.submissions.open("a") as file:
        file.write(json.dumps(submission) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_submissions(folder: SweepFolder) -> list[dict[str, Any]]:
    """All submissions of a sweep, in order."""
    try:
        return [json.loads(line) for line in folder.submissions.read_text().splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(folder.submissions)!r} cannot be read ({error}); expected one JSON object a line"
        ) from None
