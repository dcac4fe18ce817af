"""What a run leaves behind: its folder, its events and its ledger."""

from __future__ import annotations

import fcntl
import json
import math
import netrc
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from greenprune.config import Config, UserError, dump_config

Event = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        path: The folder ``output_dir/run_name``.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def provenance(self) -> Path:
        """Versions, revision and hardware of every attempt, one JSON object a line."""
        return self.path / "provenance.jsonl"

    @property
    def events(self) -> Path:
        """Everything that happened, in order."""
        return self.path / "events.jsonl"

    @property
    def structure(self) -> Path:
        """Removals and freezes so far."""
        return self.path / "structure.json"

    @property
    def summary(self) -> Path:
        """The result, written at the end."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def create(self, config: Config) -> None:
        """Make the folder, which must not be there, and write the resolved config into it.

        Raises:
            FileExistsError: The folder is there; another process may have made it just now.
            UserError: The folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True)
            write_atomically(self.config, dump_config(config))
        except FileExistsError:
            if not self.path.is_dir():
                raise UserError(f"output_dir: {str(self.path)!r} is a file; expected a folder") from None
            raise
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write {str(self.path)!r} ({error.strerror}); expected a folder you can write to"
            ) from None


class FolderLock:
    """Holds a run's folder for this process and its host; the system lets go of it when the process ends, however.

    Args:
        folder: The run's folder.

    Raises:
        UserError: Another process holds it, or it cannot be written.
    """

    def __init__(self, folder: RunFolder) -> None:
        path = folder.path / ".lock"
        try:
            self._file = path.open("a+")
        except OSError as error:
            raise UserError(f"output_dir: cannot write {str(path)!r} ({error.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read().strip()
            self._file.close()
            raise UserError(
                f"run_name: {str(folder.path)!r} is in use by another process ({owner}); expected one that has stopped"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let go of the folder."""
        self._file.close()


def is_held(folder: RunFolder) -> bool | None:
    """Whether a process of this machine has a run's folder in hand, found without touching its lock.

    Args:
        folder: The run's folder.

    Returns:
        None if that cannot be told: the system shows no locks. A process on another machine is not seen.
    """
    try:
        locks, status = Path("/proc/locks").read_text(), (folder.path / ".lock").stat()
    except FileNotFoundError:
        return False if Path("/proc/locks").exists() else None
    except OSError:
        return None
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(words[1] == "FLOCK" and place in words for words in map(str.split, locks.splitlines()) if len(words) > 1)


def default_run_name(config: Config) -> str:
    """A name that says what the run is: data, model, budget and seed."""
    return f"{name_without_seed(config)}-seed{config.seed}"


def name_without_seed(config: Config) -> str:
    """A name that says what the run is, but for its seed: data, model and budget."""
    budget = f"{'-'.join(config.gate.units)}-{config.budget.target:g}" if config.gate.enabled else "dense"
    return f"{config.data.name}-{config.model.name.replace('/', '-')}-{budget}"


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is whole or the old one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, values: object) -> None:
    """Write plain values as JSON, atomically; not-a-number and infinity become null."""
    write_atomically(path, json.dumps(_plain(values), indent=2, allow_nan=False) + "\n")


def _plain(value: object) -> object:
    """JSON has no NaN: what is not a finite number is unknown, null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class EventLog:
    """Append-only log of a run, one JSON object a line, and its mirrors.

    Args:
        path: The file events.jsonl, or None on processes that only take part.
        mirrors: Called with each event after it is on disk.
    """

    def __init__(self, path: Path | None, mirrors: list[Callable[[Event], None]]) -> None:
        self.mirrors = mirrors
        self._file: TextIOWrapper | None = None
        if path is not None:
            _end_last_line(path)
            self._file = path.open("a", buffering=1)

    def record(self, kind: str, step: int, **values: object) -> None:
        """Append one event with the present time (seconds since the epoch, UTC)."""
        if self._file is None:
            return
        event: Event = {"time": time.time(), "step": step, "kind": kind}
        event.update({key.replace("__", "/"): _plain(value) for key, value in values.items()})
        self._file.write(json.dumps(event) + "\n")
        for mirror in self.mirrors:
            mirror(event)

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _end_last_line(path: Path) -> None:
    """Cut off a line that a killed process left half-written, so that every line stays one JSON object."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def read_events(path: Path) -> list[Event]:
    """All whole events of a log, in order."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


_DEVICE = re.compile(r"^(?P<device>.*?) \((?P<source>[^:()]*(?:: [^:()]*)?)")


def numbers_of(event: Event) -> dict[str, float]:
    """The figures of an event as trackers take them: flat, by names with slashes, those that are known.

    Joules by phase and by device become one figure each; a device's is named after it, its quality and its source.

    Args:
        event: One event.
    """
    numbers: dict[str, float] = {}
    for key, value in event.items():
        if "/" in key and isinstance(value, dict):
            numbers |= {f"{key}/{_short(name)}": part for name, part in value.items() if part is not None}
        elif "/" in key and isinstance(value, int | float):
            numbers[key] = value
    return numbers


def _short(name: str) -> str:
    found = _DEVICE.match(name)
    told = name if found is None else f"{found['device']} {found['source']}"
    return re.sub(r"[^A-Za-z0-9]+", "_", told).strip("_")


def plain_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """A config by dotted names, with text for what is neither number nor text, as trackers without nesting take it.

    Args:
        config: Nested plain values.
        prefix: What the names start with.
    """
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= plain_settings(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else json.dumps(value)
    return flat


@dataclass
class Ledger:
    """Running totals of a run, kept across restarts.

    Attributes:
        flops_train: FLOPs of the training steps executed, on all ranks (multiply-add = 2).
        flops_train_dense: What the dense twin would have executed for the same samples.
        samples: Training samples seen, on all ranks.
        time_s: Wall-clock seconds of all attempts.
        energy_by_phase_j: Joules by phase on all ranks; None for a phase with nothing that could be read.
        energy_by_phase_bound_j: Most joules that a phase is off because its sources move in steps; None if not known.
        energy_by_device_j: Joules by device, with the source and its quality in the name.
        energy_by_epoch_j: Joules from the end of the epoch before (of the first: from the start event) to the end of
            each, work that was done twice included; None for an epoch in which nothing could be read.
        energy_at_epoch_j: Joules of the run when the last of them ended.
        energy_quality: Quality of the worst source that any attempt used; None if nothing could be read.
        energy_complete: Whether nothing is missing; else the joules are a lower bound.
        attempts: Times the run was started.
        energy_lost_j: Joules of attempts spent after their last checkpoint: the work was done again.
    """

    flops_train: int = 0
    flops_train_dense: int = 0
    samples: int = 0
    time_s: float = 0.0
    energy_by_phase_j: dict[str, float | None] = field(default_factory=dict)
    energy_by_phase_bound_j: dict[str, float | None] = field(default_factory=dict)
    energy_by_device_j: dict[str, float | None] = field(default_factory=dict)
    energy_by_epoch_j: list[float | None] = field(default_factory=list)
    energy_at_epoch_j: float | None = None
    energy_quality: str | None = None
    energy_complete: bool = True
    attempts: int = 0
    energy_lost_j: float = 0.0

    @property
    def energy_j(self) -> float | None:
        """Joules of all attempts and ranks, those of lost work included; None if nothing could be read."""
        known = [joules for joules in self.energy_by_phase_j.values() if joules is not None]
        return sum(known) + self.energy_lost_j if known or self.energy_lost_j else None

    def add_step(self, samples: int, flops: int, flops_dense: int) -> None:
        """Add one training step.

        Args:
            samples: Size of the global batch.
            flops: FLOPs of one sample now, forward and backward.
            flops_dense: The same for the dense network.
        """
        self.samples += samples
        self.flops_train += samples * flops
        self.flops_train_dense += samples * flops_dense

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)


def has_wandb_login(environment: Mapping[str, str]) -> bool:
    """Whether a key for the W&B server is at hand, found without asking anyone and without looking at it.

    Args:
        environment: The process's environment.
    """
    if environment.get("WANDB_API_KEY"):
        return True
    server = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    candidates = [environment.get("NETRC", "")]
    if "HOME" in environment:
        candidates += [str(Path(environment["HOME"]) / name) for name in (".netrc", "_netrc")]
    path = next((Path(candidate) for candidate in candidates if candidate and Path(candidate).is_file()), None)
    if path is None:
        return False
    try:
        return server in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
