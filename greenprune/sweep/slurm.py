"""Slurm's commands as sweeps use them: submit, look at the queue, take back. Arguments never pass a shell."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from greenprune.config import UserError

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class QueuedTask:
    """A task of an array that is in Slurm's queue.

    Attributes:
        array: Id of the array.
        number: Its number in it.
        state: Slurm's word for its state.
        where: The node that it runs on, or why it waits.
    """

    array: str
    number: int
    state: str
    where: str

    @property
    def is_running(self) -> bool:
        """Whether it has begun and not ended."""
        return self.state in ("RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING")

    def __str__(self) -> str:
        return f"job {self.array}_{self.number} {self.where}"


def missing_commands() -> list[str]:
    """Those of Slurm's commands that are needed and not on the PATH."""
    return [name for name in ("sbatch", "squeue", "scontrol", "scancel") if shutil.which(name) is None]


def array_numbers(numbers: Sequence[int], at_once: int) -> str:
    """Numbers as sbatch's ``--array`` takes them: ``0-3,7%2``.

    Args:
        numbers: Numbers of the tasks, ascending.
        at_once: How many may run at the same time.
    """
    ranges = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        ranges.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"{','.join(ranges)}%{at_once}"


def array_command(folder: Path, job: Path, numbers: Sequence[int], at_once: int) -> list[str]:
    """The command that submits runs of a sweep as one array, held back until it is released.

    Args:
        folder: The sweep's folder.
        job: The job file.
        numbers: Numbers of the runs.
        at_once: How many may run at the same time.
    """
    return [
        *_sbatch(folder, "%4a.log"),
        "--hold",
        f"--array={array_numbers(numbers, at_once)}",
        str(job),
        str(folder.absolute()),
    ]


def collect_command(folder: Path, job: Path, after: Sequence[str]) -> list[str]:
    """The command that submits the job which writes a sweep's report once arrays have ended, however they did.

    Args:
        folder: The sweep's folder.
        job: The job file.
        after: Ids of the arrays.
    """
    return [
        *_sbatch(folder, "collect.log"),
        f"--dependency=afterany:{':'.join(after)}",
        str(job),
        str(folder.absolute()),
    ]


def _sbatch(folder: Path, log: str) -> list[str]:
    # In the name of a log % starts a placeholder; it is doubled where it is part of the folder's name.
    logs = str(folder.absolute() / "logs").replace("%", "%%")
    options = [f"--chdir={Path.cwd()}", f"--job-name={folder.name}", f"--output={logs}/{log}"]
    return ["sbatch", "--parsable", *options]


def submit(command: Sequence[str]) -> str:
    """Submit a job.

    Returns:
        Its id.

    Raises:
        UserError: Slurm refuses it; the message is Slurm's.
    """
    said = _ask(command)
    # On a line of its own, with the cluster's name if there are several; some sites' sbatch greets before.
    ids = re.findall(r"^(\d+)(?:;.*)?$", said.strip(), re.MULTILINE)
    if not ids:
        raise UserError(f"{command[0]} says {' '.join(said.split())!r}; expected the number of a job")
    return str(ids[-1])


def release(job: str) -> None:
    """Let a held job start.

    Raises:
        UserError: Slurm refuses it.
    """
    _ask(["scontrol", "release", job])


def cancel(job: str) -> None:
    """Take a job back.

    Raises:
        UserError: Slurm refuses it.
    """
    _ask(["scancel", job])


def queued_tasks(arrays: Sequence[str], users: Iterable[int] = ()) -> dict[int, QueuedTask]:
    """The tasks of arrays that are in the queue, by number.

    Args:
        arrays: Ids of the arrays.
        users: Ids of others who may have submitted them; those that this machine does not know are not asked for.

    Raises:
        UserError: Slurm does not answer.
    """
    if not arrays:
        return {}
    asked = ",".join(map(str, [os.getuid(), *sorted(filter(_is_known, set(users) - {os.getuid()}))]))
    listed = _ask(["squeue", "--noheader", "--array", f"--user={asked}", "--format=%F|%K|%T|%R"])
    rows = [line.strip().split("|", maxsplit=3) for line in listed.splitlines()]
    mine = [row for row in rows if row[0] in arrays and row[1].isdecimal()]
    return {int(number): QueuedTask(array, int(number), state, where) for array, number, state, where in mine}


def _is_known(user: int) -> bool:
    """Whether a user has a name here: squeue refuses the whole question for one who has none."""
    try:
        pwd.getpwuid(user)
    except (KeyError, OverflowError):
        return False
    return True


# What of Slurm's variables is the user's and not of a job.
_OF_USERS = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_DEBUG_FLAGS")


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment for Slurm's commands: without a user's defaults of squeue, which may hide tasks or list old ones.

    In a job it is also without what Slurm tells of that job. A job that is submitted there would inherit what it has no
    own value of: be taken for a task of the other's array, or have memory by two measures, at which srun fails.
    """
    left = {name: value for name, value in variables.items() if not name.startswith("SQUEUE_")}
    if "SLURM_JOB_ID" in left:
        own = ("SLURM_", "SLURMD_", "SRUN_")
        left = {name: value for name, value in left.items() if name in _OF_USERS or not name.startswith(own)}
    return left


def _ask(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
            env=_environment(os.environ),
            start_new_session=True,  # a terminal's Ctrl-C would end it between what it does and what it says
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]} is not on the PATH; expected Slurm's commands, or --local") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered for {_TIMEOUT_S:.0f} s; expected a running Slurm") from None
    except subprocess.CalledProcessError as error:
        said = " ".join(str(error.stderr).split()) or f"exit code {error.returncode}"
        raise UserError(f"{command[0]} refuses: {said}") from None
    return done.stdout
