"""What Slurm tells of a job: its number, its memory here, and a figure for its energy to check the meter's against.

That figure is never added to anything: it is of whole nodes, from the job's first second on, by whatever the cluster
has set up (``AcctGatherEnergyType``), and is brought up to date when a step ends.
Reference: https://slurm.schedmd.com/sacct.html (ConsumedEnergyRaw)
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

_TIMEOUT_S = 10.0

# Slurm's words for "no value": the two largest 64-bit numbers, and the largest 32-bit ones.
_NO_VALUES = {2**64 - 1, 2**64 - 2, 2**32 - 1, 2**32 - 2}

# Of --mem, --mem-per-cpu and --mem-per-gpu a job has one: its MiB, and what on this node there is of what it counts.
_MEMORY = (
    ("SLURM_MEM_PER_NODE", None),
    ("SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"),
    ("SLURM_MEM_PER_GPU", "SLURM_GPUS_ON_NODE"),
)


@dataclass(frozen=True)
class SlurmEnergy:
    """What Slurm says that a job took so far."""

    energy_j: float | None
    """Joules of the job on all its nodes; None if Slurm does not tell."""
    reason: str | None
    """Why it does not tell; None if it does."""


def slurm_job(environment: Mapping[str, str]) -> str | None:
    """What Slurm calls the job that a process is in, or None if it is in none.

    One task of an array has the array's own number in SLURM_JOB_ID, by which Slurm would mean all of its tasks
    (https://slurm.schedmd.com/job_array.html).
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")


def slurm_memory_gib(environment: Mapping[str, str]) -> float | None:
    """GiB that a job has on this node, by what Slurm wrote into its environment, the same for every task of an array.

    Args:
        environment: The process's environment.

    Returns:
        The size; None outside of jobs, and for a job that may use all of the node.
    """
    if not environment.get("SLURM_JOB_ID"):
        return None
    for name, per in _MEMORY:
        size, count = environment.get(name, ""), "1" if per is None else environment.get(per, "")
        if size.isdecimal() and count.isdecimal() and int(size) * int(count):  # 0 stands for the whole node
            return int(size) * int(count) / 1024
    return None


def slurm_energy(job_id: str) -> SlurmEnergy:
    """Ask sacct for the energy of a job; takes at most ten seconds and never fails.

    Args:
        job_id: The job, from :func:`slurm_job`.
    """
    # With the attempts before the job queued itself again, which sacct else leaves out.
    command = ["sacct", "--duplicates", "-j", job_id]
    command += ["--noheader", "--parsable2", "--format=JobID,ConsumedEnergyRaw"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except FileNotFoundError:
        return SlurmEnergy(None, "sacct is not installed here")
    except subprocess.CalledProcessError as error:
        return SlurmEnergy(None, f"sacct: {' '.join(str(error.stderr).split()) or f'exit code {error.returncode}'}")
    except (OSError, subprocess.TimeoutExpired) as error:
        return SlurmEnergy(None, f"sacct: {error}")
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 1]
    # The first row of an attempt is the job's own.
    attempts: list[dict[str, int]] = []
    for job, raw in rows:
        joules = int(raw) if raw.isdecimal() and int(raw) not in _NO_VALUES else 0
        step = job.partition(".")[2]
        if not step or not attempts:
            attempts.append({})
        kind = "srun" if step.isdecimal() else step
        attempts[-1][kind] = attempts[-1].get(kind, 0) + joules
    energy_j = sum(_attempt_j(by_step) for by_step in attempts)
    if not energy_j:
        return SlurmEnergy(None, "sacct tells no joules: no step has ended yet, or the cluster gathers no energy")
    return SlurmEnergy(float(energy_j), None)


def _attempt_j(by_step: Mapping[str, int]) -> int:
    """Joules of a job, or of its steps where its own row, by the name "", is not filled in yet.

    The batch script's step, the one outside of all steps (extern) and those of srun, which are one kind here, go on at
    the same time on the same nodes, each with all that a node takes: together they took what the largest did. Slurm
    itself adds up the extern step alone, where there is one (``_internal_step_complete`` in its step_mgr.c).
    """
    return by_step.get("", 0) or max(by_step.values(), default=0)
