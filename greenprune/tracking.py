"""What a run leaves behind: its folder, its events and its ledger."""

from __future__ import annotations

import errno
import json
import math
import netrc
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from greenprune.config import Config, UserError, dump_config
from greenprune.event_checks import wrong_with_event
from greenprune.whole_files import write_atomically

Event = dict[str, Any]

_BLOCK_BYTES = 1 << 16
_DAMAGES_TOLD = 3
_LONGEST_IN_ID = 100  # bytes


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

    @property
    def id(self) -> Path:
        """What trackers know the run by, wherever its folder is moved or copied: its first name and a random token."""
        return self.path / "id.txt"

    def create(self, config: Config) -> None:
        """Make the folder, which must not be there or be empty, with the run's resolved config and id: all or nothing.

        Raises:
            FileExistsError: The folder is there; another process may have made it just now.
            UserError: The folder cannot be written.
        """
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_atomically(temporary / self.config.name, dump_config(config))
            # Not from the config's seed: runs that are done again, or elsewhere by the same name, are other runs.
            write_atomically(temporary / self.id.name, f"{name_in_id(self.path.name)}-{secrets.token_hex(8)}\n")
            temporary.rename(self.path)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # On a file system that is read-only or full, where the error is another one, too.
            if self.path.is_dir() and (error.errno in (errno.ENOTEMPTY, errno.EEXIST) or self.config.is_file()):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self.path)) from None
            if self.path.exists() and not self.path.is_dir():
                raise UserError(f"output_dir: {str(self.path)!r} is a file; expected a folder") from None
            reason = os.strerror(errno.ENOTDIR) if isinstance(error, FileExistsError) else error.strerror
            raise UserError(
                f"output_dir: cannot write {str(self.path)!r} ({reason}); expected a folder you can write to"
            ) from None


def name_in_id(name: str) -> str:
    """As much of a folder's name as its id bears: trackers make longer file names of the id."""
    return name.encode()[:_LONGEST_IN_ID].decode(errors="ignore")


def default_run_name(config: Config) -> str:
    """A name that says what the run is: data, model, budget and seed."""
    return f"{name_without_seed(config)}-seed{config.seed}"


def name_without_seed(config: Config) -> str:
    """A name that says what the run is, but for its seed: data, model and budget."""
    network = "dense" if config.is_dense else "structure"
    if config.gate.enabled:
        network = f"{'-'.join(config.gate.units)}-{config.budget.target:g}"
    return f"{config.data.name}-{config.model.name.replace('/', '-')}-{network}"


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

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path | None, mirrors: list[Callable[[Event], None]]) -> None:
        self.mirrors = mirrors
        self._descriptor: int | None = None
        if path is not None:
            _end_last_line(path)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._path = path

    def record(self, kind: str, step: int, **values: object) -> None:
        """Append one event with the present time (seconds since the epoch, UTC).

        Raises:
            OSError: It cannot be written; the log ends with the event before it.
        """
        if self._descriptor is None:
            return
        event: Event = {"time": time.time(), "step": step, "kind": kind}
        event.update({key.replace("__", "/"): _plain(value) for key, value in values.items()})
        self._append(self._descriptor, (json.dumps(event) + "\n").encode())
        for mirror in self.mirrors:
            mirror(event)

    def _append(self, descriptor: int, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(descriptor, line[written:])
        except OSError as error:
            if written:  # the disk was full in the middle of the line
                with suppress(OSError):
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        """Close the file; may be called twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _end_last_line(path: Path) -> None:
    """Cut off a line that a killed process left half-written, so that every line stays one JSON object."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = start = file.seek(0, os.SEEK_END)
        while start > 0:
            start = max(0, start - _BLOCK_BYTES)
            file.seek(start)
            found = file.read(min(_BLOCK_BYTES, end - start)).rfind(b"\n")
            if found >= 0:
                start += found + 1
                break
        if start < end:
            file.truncate(start)


class EventsCorrupt(ValueError):
    """A log with a line that is no event; the message says which and why."""


def read_events(path: Path) -> list[Event]:
    """All whole events of a log, in order; a last line without its end is not one yet.

    Raises:
        EventsCorrupt: A line is no event.
    """
    events, damaged = salvage_events(path)
    if damaged:
        raise EventsCorrupt(damaged[0])
    return events


def salvage_events(path: Path) -> tuple[list[Event], list[str]]:
    """The events of a log that may be damaged, and what is wrong with each line that is none."""
    events: list[Event] = []
    damaged: list[str] = []
    for number, value in _json_lines(path):
        wrong = value if isinstance(value, str) else wrong_with_event(value)
        if wrong:
            damaged.append(f"line {number} is no event: {wrong}")
        else:
            events.append(value)
    return events, damaged


def describe_damage(damaged: Sequence[str]) -> str:
    """What :func:`salvage_events` says of a log, in one line: of its first lines that are none, and how many more."""
    more = len(damaged) - _DAMAGES_TOLD
    return "; ".join([*damaged[:_DAMAGES_TOLD], *([f"and {more:,} more"] if more > 0 else [])])


def parse_event(line: bytes) -> Event:
    """The event that one line of a log tells of.

    Raises:
        EventsCorrupt: It is no event; the message says why.
    """
    value = _object_in(line)
    wrong = value if isinstance(value, str) else wrong_with_event(value)
    if wrong:
        raise EventsCorrupt(wrong)
    event: Event = value
    return event


def read_attempts(path: Path) -> list[dict[str, Any]]:
    """The attempts that a provenance.jsonl tells of; lines that are not whole are left out."""
    return [value for _, value in _json_lines(path) if isinstance(value, dict)]


def gpus_of_attempt(attempt: Mapping[str, Any]) -> list[str]:
    """The models of the GPUs that an attempt used, each GPU once; of one of an older version as far as it tells.

    Args:
        attempt: What :func:`read_attempts` gave.
    """
    told: list[str] = list(attempt.get("gpus") or [])
    kind, _, index = str(attempt.get("device")).partition(":")
    if kind == "cpu":
        return []
    if "machines" in attempt:
        return told
    # Older versions told all that rank 0 could see.
    processes = attempt.get("processes") or 1
    if processes == 1:
        first = int(index) if index.isdecimal() else 0
        return told[first : first + 1] or told
    if processes > len(told) and len(set(told)) == 1:  # on several nodes
        return told[:1] * processes
    return told[:processes]


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each whole line that is not empty: an object, or text that says why it is none."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or not line.strip():
                continue
            yield number, _object_in(line)


def _object_in(line: bytes) -> Any:
    """The JSON object that a line holds, or text that says why it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return " ".join(str(error).split())[:200]
    return value if isinstance(value, dict) else "expected a JSON object"


_OF_AN_ATTEMPT = ("start", "interrupt", "failure", "end")


def course_of(events: Iterable[Event]) -> list[Event]:
    """The events of the course that a run took in the end, without its attempts: no step twice.

    An attempt goes on from a checkpoint; what the one before did after that checkpoint was done again, and is left out.

    Args:
        events: All events of a run, in order.
    """
    course: list[Event] = []
    for event in events:
        if event["kind"] == "start":
            # What an attempt at the beginning found given, the next one tells again.
            course = [earlier for earlier in course if earlier["step"] <= event["step"] and event["step"] > 0]
        elif event["kind"] not in _OF_AN_ATTEMPT:
            course.append(event)
    return course


_DEVICE = re.compile(r"^(?P<device>.*?) \((?P<source>[^:()]*(?:: [^:()]*)?)")


def numbers_of(event: Event) -> dict[str, float]:
    """The figures of an event as trackers take them: flat, by names with slashes, those that are known.

    Joules by phase and by device become one figure each; a device's is named after it, its quality and its source.
    Those of devices with one such name, as a run that went on on another machine has them, are added up.

    Args:
        event: One event.
    """
    numbers: dict[str, float] = {}
    for key, value in event.items():
        if "/" in key and isinstance(value, dict):
            numbers |= _added_by_short_name(key, value)
        elif "/" in key and isinstance(value, int | float):
            numbers[key] = value
    return numbers


def _added_by_short_name(key: str, parts: dict[str, float | None]) -> dict[str, float]:
    added: dict[str, float] = {}
    for name, part in parts.items():
        if part is not None:
            short = f"{key}/{_short(name)}"
            added[short] = added.get(short, 0) + part
    return added


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
        energy_missing: Why joules of a device are missing, the last reason that there was, by the device's name.
        attempts: Times the run was started.
        energy_lost_j: Joules of attempts spent after their last checkpoint: the work was done again.
        skipped_steps: Steps up to the last whole epoch that were left out because a gradient was not finite.
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
    energy_missing: dict[str, str] = field(default_factory=dict)
    attempts: int = 0
    energy_lost_j: float = 0.0
    skipped_steps: int = 0

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
