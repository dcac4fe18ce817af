"""What a cluster wants to be told: a small profile, the same for all jobs of a site."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from greenprune.config import ConfigError
from greenprune.redaction import holds_secret, names_secret

_EXPORTED = "expected it to be exported in the shell you submit from: jobs inherit it"
_WORD = re.compile(r"[^\s\"'\\#]+")  # what stands in an #SBATCH line, where Slurm splits and unquotes


@dataclass(frozen=True)
class Site:
    """A site profile; what it does not say is left to the cluster's defaults."""

    account: str | None = None
    """Account that jobs are charged to."""
    partition: str | None = None
    """Partition that they run in; Slurm takes several with commas."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    gres: str | None = None
    """Generic resources of each node; {processes} stands for the processes on it, as in gpu:{processes}."""
    cpus_per_process: int | None = None
    """Processor cores for each process."""
    mem_per_process: str | None = None
    """Memory for each process, a number with a unit: 16G."""
    exclusive: bool = False
    """Whether each job has nodes to itself; those that share one each count the joules of all of its CPU and memory."""
    time: str = "04:00:00"
    """Longest time of an attempt, as Slurm writes it: minutes, HH:MM:SS or D-HH:MM:SS. A run that needs longer goes on
    in further attempts."""
    warning_s: int = 120
    """Seconds before the end of that time at which the run is told to stop: for the step and the checkpoint, and Slurm
    may tell it up to a minute late."""
    requeues: int = 100
    """How many times a job may queue itself again."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables to set. No secrets: what is exported where you submit from reaches jobs by itself."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash to run before the program, as they are: to activate its Python environment."""

    def __post_init__(self) -> None:
        for key in ("account", "partition", "qos", "constraint", "gres", "time", "mem_per_process"):
            value = getattr(self, key)
            if value is not None and _WORD.fullmatch(value) is None:
                raise ConfigError(f"{key}: {value!r} is not valid; expected one word without quotes")
        self._check_times()
        if self.gres is not None and "{" in self.gres.replace("{processes}", ""):
            raise ConfigError(f"gres: {self.gres!r} is not valid; expected a name like gpu:{{processes}}")
        if self.mem_per_process is not None and re.fullmatch(r"\d+[KMGT]?", self.mem_per_process) is None:
            raise ConfigError(f"mem_per_process: {self.mem_per_process!r} is not valid; expected a number like 16G")
        if self.cpus_per_process is not None and self.cpus_per_process < 1:
            raise ConfigError(f"cpus_per_process: {self.cpus_per_process!r} is not valid; expected at least 1, or null")
        if self.requeues < 0:
            raise ConfigError(f"requeues: {self.requeues!r} is not valid; expected a whole number of at least 0")
        for name in self.environment:
            if re.fullmatch(r"[A-Za-z_]\w*", name) is None:
                raise ConfigError(f"environment: {name!r} is not valid; expected the name of a variable")
        for line in self.setup:
            if "\n" in line:
                raise ConfigError(f"setup: {line!r} has several lines; expected an entry for each")
        _check_no_secret("environment", self.environment)
        _check_no_secret("setup", re.findall(r"(\w+)=", "\n".join(self.setup)))
        _check_holds_no_secret({f"environment: {name}": value for name, value in self.environment.items()})
        _check_holds_no_secret({f"setup: line {number}": line for number, line in enumerate(self.setup, start=1)})

    def _check_times(self) -> None:
        if re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", self.time) is None:
            raise ConfigError(f"time: {self.time!r} is not valid; expected minutes, HH:MM:SS or D-HH:MM:SS")
        if not 1 <= self.warning_s <= 65535:  # as far as Slurm counts
            raise ConfigError(f"warning_s: {self.warning_s!r} is not valid; expected seconds from 1 to 65535")
        if 0 < _seconds(self.time) <= self.warning_s:  # each attempt would be told to stop as it starts
            raise ConfigError(
                f"warning_s: {self.warning_s!r} is not valid; expected fewer seconds than an attempt has "
                f"(time {self.time})"
            )


def _seconds(time: str) -> int:
    """A time as Slurm writes it, in seconds; 0 is without a limit."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _check_no_secret(key: str, names: Iterable[str]) -> None:
    for name in names:
        if names_secret(name):
            raise ConfigError(f"{key}: {name} looks like a secret, which would be written into job files; {_EXPORTED}")


def _check_holds_no_secret(texts: Mapping[str, str]) -> None:
    for where, text in texts.items():
        if holds_secret(text):
            raise ConfigError(
                f"{where} holds what looks like a login, key or token, which would be written into job files; "
                f"{_EXPORTED}"
            )
