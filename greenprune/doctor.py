"""What this machine has for a run, what is missing, and what to do about it.

Everything beyond the standard library is imported where it is asked about: a broken installation is what this is for.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "note"]

_OUTPUT_DIR = Path("runs")  # the default of output_dir
_GIB = 2**30
_FOLDER_LAYOUTS = {
    "tiny_imagenet": ("tiny-imagenet-200/wnids.txt", "tiny-imagenet-200/train", "tiny-imagenet-200/val"),
    "image_folder": ("train", "val"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """What it belongs to: software, devices, energy, engines, trackers, data or output."""
    name: str
    """What was looked at."""
    state: State
    """ok, missing (something that may be wanted is not there) or note (worth knowing)."""
    detail: str
    """What was found."""
    advice: str | None = None
    """What to do about it, if anything."""
    needed: bool = False
    """Whether no run can do without it."""


def diagnose(environment: Mapping[str, str]) -> list[Finding]:
    """Look over everything that a run may use; trains nothing, writes nothing and needs no network.

    Args:
        environment: The process's environment: GREENPRUNE_DATA, what memory a Slurm job has, and where W&B keeps its
            key, which is never told.
    """
    findings = [_python(), *_packages()]
    if is_fit(findings):
        findings += _torch()
    if not is_fit(findings):
        rest = Finding("software", "other checks", "note", "not done: they use what is missing")
        return [*findings, rest, _output(_OUTPUT_DIR)]
    return [
        *findings,
        _processor(),
        *_gpus(),
        *_meters(environment),
        _carbon(),
        *_engines(),
        _wandb(environment),
        *_data(environment.get("GREENPRUNE_DATA")),
        _output(_OUTPUT_DIR),
    ]


def is_fit(findings: list[Finding]) -> bool:
    """Whether everything is there that no run can do without."""
    return not any(finding.needed and finding.state == "missing" for finding in findings)


def print_findings(findings: list[Finding]) -> None:
    """Print findings to standard output by area, each with its advice below."""
    from rich.table import Table
    from rich.text import Text

    from greenprune.formatting import open_console

    styles = {"ok": "green", "missing": "red", "note": "yellow"}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    area = None
    for finding in findings:
        if finding.area != area:
            area = finding.area
            table.add_row(Text(area, style="bold"))
        table.add_row(f"  {finding.state}", Text(finding.name), Text(finding.detail), style=styles[finding.state])
        if finding.advice is not None:
            table.add_row("", "", Text(f"-> {finding.advice}"))
    console = open_console()
    console.print(table)
    verdict = "ready to train" if is_fit(findings) else "not ready: see what is missing above"
    console.print(Text(verdict, style="bold"))


# Software.


def _python() -> Finding:
    return Finding("software", "python", "ok", platform.python_version())


def _packages() -> list[Finding]:
    """The packages that greenprune's own metadata requires, and their versions."""
    requirements = importlib.metadata.requires("greenprune") or []
    return [_package(line) for line in requirements if "extra ==" not in line]


def _package(requirement: str) -> Finding:
    matched = re.match(r"([\w.-]+)(?:\[[^\]]*\])?(?:>=([\d.]+))?", requirement)
    assert matched is not None, requirement
    name, least = matched.group(1), matched.group(2)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("software", name, "missing", "not installed", f"pip install '{requirement}'", needed=True)
    if least is not None and _numbers(version) < _numbers(least):
        detail = f"{version} is older than {least}"
        return Finding("software", name, "missing", detail, f"pip install --upgrade '{requirement}'", needed=True)
    return Finding("software", name, "ok", version, needed=True)


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers of a version: 2.11.0+cu128 gives (2, 11, 0)."""
    leading = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in leading.group().split(".") if part) if leading else ()


def _torch() -> list[Finding]:
    """That torch can be imported: its libraries may not suit the system though the package is there."""
    try:
        importlib.import_module("torch")
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:  # a library is missing, or operators do not match
        detail = f"cannot be imported: {' '.join(str(error).split())}"
        advice = "install torch and torchvision of the same release: https://pytorch.org/get-started"
        return [Finding("software", "torch import", "missing", detail, advice, needed=True)]
    return []


# Devices.


def _processor() -> Finding:
    import psutil

    from greenprune.provenance import cpu_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    detail = f"{cpu_name()}, {cores} cores usable, {_size(memory.total)} of memory ({_size(memory.available)} free)"
    return Finding("devices", "cpu", "ok", detail)


def _gpus() -> list[Finding]:
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch warns about drivers that do not suit it
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    cuda = torch.version.cuda
    if not available:
        build = f"torch is built for CUDA {cuda}" if cuda else "torch is built without CUDA"
        because = "".join(f"; {' '.join(str(warning.message).split())}" for warning in caught)
        advice = None if cuda else "with an NVIDIA GPU, install torch built for CUDA: https://pytorch.org/get-started"
        return [
            Finding("devices", "gpu", "note", f"none that torch can use: runs go to the CPU ({build}{because})", advice)
        ]
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16 (use precision fp16 or no)"
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = (
            f"{properties.name}, GPU-{properties.uuid}, {properties.total_memory / _GIB:.0f} GiB, CUDA {cuda}, {bf16}"
        )
        findings.append(Finding("devices", f"gpu {index}", "ok", detail))
    return findings


# Energy.


def _meters(environment: Mapping[str, str]) -> list[Finding]:
    from greenprune.energy import SourceRow, describe_sources

    def finding(row: SourceRow) -> Finding:
        name = row.device if row.model is None else f"{row.device} {row.model}"
        if row.source is None:
            return Finding("energy", name, "note", f"not measured: {row.why_not}", row.advice)
        because = f", because {row.why_not}" if row.why_not else ""
        state: State = "ok" if row.quality == "counter" else "note"
        return Finding("energy", name, state, f"{row.quality}: {row.source}{because}", row.advice)

    return [finding(row) for row in describe_sources(environment=environment)]


def _carbon() -> Finding:
    from codecarbon.input import DataSource

    countries = len(DataSource().get_global_energy_mix_data())
    version = importlib.metadata.version("codecarbon")
    return Finding(
        "energy",
        "CO2e",
        "note",
        f"given for {countries} countries (CodeCarbon {version}, offline); none is assumed",
        "set energy.country to your country's three letters, such as --energy.country FRA",
    )


# Engines and trackers.


def _engines() -> list[Finding]:
    from torch import distributed

    backends = []
    if distributed.is_available():
        supported = {"gloo": distributed.is_gloo_available(), "nccl": distributed.is_nccl_available()}
        backends = [name for name, there in supported.items() if there]
    findings = []
    if backends:
        findings.append(Finding("engines", "ddp", "ok", f"several processes over {' or '.join(backends)}"))
    else:
        detail = "torch is built without gloo and nccl: one process only"
        findings.append(
            Finding("engines", "ddp", "missing", detail, "install torch from https://pytorch.org/get-started")
        )
    return [*findings, _deepspeed()]


def _deepspeed() -> Finding:
    """Whether runs can be launched with DeepSpeed; none needs it."""
    requirements = importlib.metadata.requires("greenprune") or []
    package = _package(next(line for line in requirements if re.match(r"deepspeed\b", line)))
    if package.state == "ok":
        advice = "to use it, launch with a file launch/deepspeed_*.yaml"
        return Finding("engines", "deepspeed", "ok", package.detail, advice)
    advice = "only to launch with it: pip install 'greenprune[deepspeed]'"
    return Finding("engines", "deepspeed", "note", package.detail, advice)


def _wandb(environment: Mapping[str, str]) -> Finding:
    from greenprune.tracking import has_wandb_login

    version = importlib.metadata.version("wandb")
    mode = environment.get("WANDB_MODE")
    if mode in ("offline", "disabled"):
        return Finding("trackers", "wandb", "ok", f"{version}, {mode} by WANDB_MODE")
    if has_wandb_login(environment):
        return Finding(
            "trackers", "wandb", "ok", f"{version}, logged in: runs with tracking.trackers [wandb] go online"
        )
    return Finding(
        "trackers", "wandb", "ok", f"{version}, not logged in: runs stay offline", "wandb login, to go online"
    )


# Data and output.


def _data(root: str | None) -> list[Finding]:
    from greenprune.data import DATASETS
    from greenprune.data.readers import SOURCES

    findings = []
    for name in DATASETS:
        source = SOURCES.get(name)
        files = _FOLDER_LAYOUTS[name] if source is None else source.files
        if not files:
            findings.append(Finding("data", name, "ok", "embedded"))
        elif root is not None:
            fetch = f", or fetch it with --data.name {name} --data.download true" if source is not None else ""
            findings.append(_data_set(name, Path(root), files, fetch))
    if root is None:
        others = ", ".join(name for name in DATASETS if name != "digits")
        detail = f"GREENPRUNE_DATA is not set; {others} are read from files"
        findings.append(
            Finding("data", "folder", "note", detail, "set it, or data.root, to the folder that holds them")
        )
    return findings


def _data_set(name: str, root: Path, files: tuple[str, ...], fetch: str) -> Finding:
    absent = [file for file in files if not (root / file).exists()]
    if not absent:
        return Finding("data", name, "ok", f"in {root}")
    return Finding("data", name, "missing", f"no {absent[0]} in {root}", f"only to train on it: put it there{fetch}")


def _output(folder: Path) -> Finding:
    """Whether runs can be written where they go by default; nothing is created."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        free = shutil.disk_usage(existing).free
        told = f"writable, {_size(free)} free"
        if free < _GIB:
            return Finding("output", f"{folder}/", "note", told, "make room: a run keeps several checkpoints there")
        return Finding("output", f"{folder}/", "ok", told, needed=True)
    detail = f"{existing} is not a folder that you can write to"
    return Finding("output", f"{folder}/", "missing", detail, "work in another folder, or set output_dir", needed=True)


def _size(size: int) -> str:
    return f"{size / _GIB:.0f} GiB" if size >= _GIB else f"{size / 2**20:.0f} MiB"
