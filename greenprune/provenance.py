"""Where a result comes from: versions, revision and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from greenprune.redaction import without_command_secrets

_PACKAGES = (
    "greenprune",
    "torch",
    "torchvision",
    "accelerate",
    "deepspeed",
    "codecarbon",
    "wandb",
    "nvidia-ml-py",
)


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that matter to a result; None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_revision(file: Path = Path(__file__)) -> dict[str, Any] | None:
    """Revision of the checkout that the package runs from, and whether it has changes; None outside a checkout.

    Args:
        file: A file of the package.
    """
    file = file.resolve()

    def git(*args: str) -> str:
        command = ["git", "-C", str(file.parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # Installed in an environment that lies in somebody's repository, it is in there and yet no part of it.
        git("ls-files", "--error-unmatch", "--", file.name)
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_uuid(device: torch.device) -> str | None:
    """NVML's identifier of the GPU that a torch device is, or None for another device."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else None


def gpu_name(device: torch.device) -> str | None:
    """Model of the GPU that a torch device is, or None for another device."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def cpu_name() -> str:
    """Model of the processor as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Place(NamedTuple):
    """Where one process of a run computes.

    Attributes:
        machine: What tells its machine from others.
        gpu_uuid: Its GPU, as NVML knows it; None on a CPU.
        gpu: The GPU's model; None on a CPU.
        cpu: The processor's model.
    """

    machine: str
    gpu_uuid: str | None
    gpu: str | None
    cpu: str


def place_of(device: torch.device, machine: str) -> Place:
    """Where this process computes.

    Args:
        device: Its device.
        machine: What tells its machine from others.
    """
    return Place(machine, gpu_uuid(device), gpu_name(device), cpu_name())


def gpus_used(places: Sequence[Place]) -> list[str]:
    """The models of the GPUs that the processes of a run use, each GPU once; not of others that they could see.

    Args:
        places: Where each process computes, by rank.
    """
    models = {place.gpu_uuid: place.gpu for place in places}
    return [model for model in models.values() if model is not None]


def collect_provenance(world_size: int, device: torch.device, places: Sequence[Place] = ()) -> dict[str, Any]:
    """Everything about this attempt that a reader of its figures may ask for.

    Args:
        world_size: Number of processes.
        device: Device of this process.
        places: Where each process computes, by rank; empty: this one alone is told of.
    """
    places = places or [place_of(device, socket.gethostname())]
    cpus = {place.machine: place.cpu for place in places}
    return {
        "command": without_command_secrets(sys.argv, os.environ),
        "git": git_revision(),
        "python": platform.python_version(),
        "versions": package_versions(),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "machines": list(cpus),
        "cpu": places[0].cpu,
        "cpus": list(cpus.values()),
        "cpu_cores": psutil.cpu_count(),
        "cpu_cores_physical": psutil.cpu_count(logical=False),
        "cpu_cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus_used(places),
        "device": str(device),
        "processes": world_size,
        "slurm": slurm_job(os.environ),
    }


_SLURM = {
    "job": "SLURM_JOB_ID",
    "array": "SLURM_ARRAY_JOB_ID",
    "task": "SLURM_ARRAY_TASK_ID",
    "nodes": "SLURM_JOB_NODELIST",
    "partition": "SLURM_JOB_PARTITION",
    "cpus_per_node": "SLURM_JOB_CPUS_PER_NODE",  # of the job: 8(x2),4
    "cpus_on_node": "SLURM_CPUS_ON_NODE",  # of the step, which may have fewer
    "requeued": "SLURM_RESTART_COUNT",  # unset in a job's first attempt
}


def slurm_job(environment: Mapping[str, str]) -> dict[str, str] | None:
    """What Slurm tells a job of itself; None outside of one.

    Args:
        environment: The process's environment.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    return {key: environment[name] for key, name in _SLURM.items() if name in environment}
