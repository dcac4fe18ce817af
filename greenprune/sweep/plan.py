"""What a sweep is: a file that says which runs, and the numbered, complete configs that it stands for."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonargparse

from greenprune.config import Config, ConfigError, check_field, declared_type, load_config, plain_message
from greenprune.data import check_data_name
from greenprune.models import check_model_name
from greenprune.surgery import resolve_structure
from greenprune.sweep.reading import read_settings
from greenprune.tracking import default_run_name

_OURS = ("output_dir", "run_name", "resume")  # the sweep gives every run its own
_MOST_TASKS = 10_000  # numbers have four digits


@dataclass(frozen=True)
class SweepConfig:
    """A sweep as its YAML file gives it: every entry of ``runs`` with every combination of the rest."""

    base: str
    """Config of one complete run that all runs start from; a path, relative to the sweep's file."""
    name: str | None = None
    """Name of the sweep's folder. Unset: that of the file."""
    output_dir: str = "runs/sweeps"
    """Folder below which every sweep has a folder of its own."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields that all runs have, by dotted name, in place of the base's."""
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Runs one by one, each as the fields in which it differs."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values of fields, of which every combination is a run."""
    targets: list[float] = field(default_factory=list)
    """Values of budget.target."""
    seeds: list[int] = field(default_factory=list)
    """Values of seed."""
    at_once: int = 4
    """How many runs Slurm lets go on at the same time."""
    nodes: int = 1
    """Nodes that each run takes."""
    processes: int = 1
    """Processes of each run on each of its nodes: one for each GPU."""

    def __post_init__(self) -> None:
        if self.name is not None:
            check_name(self.name)
        for key in ("at_once", "nodes", "processes"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}: {getattr(self, key)!r} is not valid; expected a whole number of at least 1")
        axes: dict[str, list[Any]] = {"targets": self.targets, "seeds": self.seeds}
        axes |= {f"grid.{key}": values for key, values in self.grid.items()}
        for key, values in axes.items():
            if len({repr(value) for value in values}) < len(values):
                raise ConfigError(f"{key}: {values!r} has a value twice; expected each once")
            if key.startswith("grid.") and not values:
                raise ConfigError(f"{key}: [] has no value; expected at least one")
        self._check_once()
        if not (self.runs or self.grid or self.targets or self.seeds):
            raise ConfigError("runs: there are none; expected runs, grid, targets or seeds")

    def _check_once(self) -> None:
        """Refuse a field that is given in two places, one of which would be without effect; a run may leave settings.

        Raises:
            ConfigError: There is one.
        """
        places = [
            (short, key) for short, key in (("targets", "budget.target"), ("seeds", "seed")) if getattr(self, short)
        ]
        places += [(f"grid.{key}", key) for key in self.grid]
        places += [(f"settings {key}", key) for key in self.settings]
        by_run = dict.fromkeys(key for run in self.runs for key in run)
        places += [(f"runs {key}", key) for key in by_run if key not in self.settings]
        first: dict[str, str] = {}
        for place, key in places:
            if first.setdefault(key, place) != place:
                raise ConfigError(f"{first[key]}: is also given as {place}; expected one of the two")


def check_name(name: str) -> None:
    """Check the name of a sweep, which becomes that of its folder and of its jobs.

    Raises:
        ConfigError: It is not one.
    """
    if re.fullmatch(r"[\w+][\w.+-]*", name) is None:
        raise ConfigError(f"name: {name!r} is not valid; expected a folder name of letters, digits and _ . + -")


@dataclass(frozen=True)
class Task:
    """One run of a sweep.

    Attributes:
        number: Its place in the sweep, from 0, and its number in a Slurm array.
        config: The complete run.
        changes: The fields in which it differs from the base, by dotted name.
        is_twin: Whether the sweep added it, as a dense twin.
    """

    number: int
    config: Config
    changes: Mapping[str, Any]
    is_twin: bool

    @property
    def label(self) -> str:
        """Its number as files are named after it."""
        return f"{self.number:04d}"

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return str(self.config.run_name)


@dataclass(frozen=True)
class Sweep:
    """A sweep, expanded.

    Attributes:
        config: What its file says.
        folder: Its folder.
        tasks: Its runs, by number.
    """

    config: SweepConfig
    folder: Path
    tasks: tuple[Task, ...]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep's file and expand it; nothing is written.

    Raises:
        ConfigError: Anything in the file, in its base, or in one of the runs is wrong.
    """
    config = read_settings(path, SweepConfig, "sweep")
    name = config.name
    if name is None:
        name = path.stem
        check_name(name)
    if not (path.parent / config.base).is_file():
        raise ConfigError(
            f"sweep {str(path)!r}: base: {config.base!r} is not there; expected a config's path, relative to this file"
        )
    base = load_config(path.parent / config.base)
    folder = Path(config.output_dir) / name
    try:
        tasks = tuple(_expand(config, base, folder))
        _check_names(tasks)
        return Sweep(config, folder, tasks)
    except ConfigError as error:
        raise ConfigError(f"sweep {str(path)!r}: {error}") from None


def _expand(sweep: SweepConfig, base: Config, folder: Path) -> Iterator[Task]:
    """Every run of a sweep, each dense twin right before the first gated run that needs it."""
    changes = _typed(list(_changes(sweep)))
    seen: dict[str, int] = {}
    dense: set[tuple[object, ...]] = set()
    number = 0
    for index, changed in enumerate(changes):
        config = resolve_structure(replace_fields(base, changed))
        twin = replace_fields(config, {"gate.enabled": False, "model.structure": None})
        if _costs(twin) not in dense:
            dense.add(_costs(twin))
            added = not config.is_dense
            twin_changes = {key: value for key, value in changed.items() if not key.startswith(_NOT_OF_A_TWIN)}
            yield _task(number, twin, {**twin_changes, "gate.enabled": False}, folder, is_twin=added)
            number += 1
        if not config.is_dense:
            same = seen.setdefault(repr(config), index)
            if same != index:
                raise ConfigError(
                    f"runs: number {index + 1} ({_words(changed)}) is the same as number {same + 1}; expected each once"
                )
            yield _task(number, config, changed, folder, is_twin=False)
            number += 1
        if number > _MOST_TASKS:
            raise ConfigError(f"runs: there are more than {_MOST_TASKS:,}; expected several smaller sweeps")


def _check_names(tasks: Sequence[Task]) -> None:
    """Check what otherwise every run of its own would find as it starts, and each name once.

    Raises:
        ConfigError: There is no network or data set of a name.
    """
    for network in dict.fromkeys(task.config.model.name for task in tasks):
        check_model_name(network)
    for data in dict.fromkeys(task.config.data.name for task in tasks):
        check_data_name(data)


def _costs(config: Config) -> tuple[object, ...]:
    """All that shapes a run's result, or the seconds and joules that it takes."""
    data, model = config.data, config.model
    where = (config.device, data.root, data.workers, data.eval_batch_size)
    return (config.identity(), *where, model.compile, model.cuda_graph)


_NOT_OF_A_TWIN = ("gate.", "budget.", "removal.", "surgery.", "model.structure")


def _task(number: int, config: Config, changes: Mapping[str, Any], folder: Path, *, is_twin: bool) -> Task:
    name = f"{number:04d}-{default_run_name(config)}"
    own = {"output_dir": str(folder / "runs"), "run_name": name, "resume": "auto"}
    return Task(number, replace_fields(config, own), changes, is_twin)


def _changes(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    """The fields in which each run differs from the base."""
    axes = [[{key: value} for value in values] for key, values in sweep.grid.items()]
    axes += [[{key: value} for value in values] for key, values in _short(sweep) if values]
    for parts in itertools.product([sweep.settings], sweep.runs or [{}], *reversed(axes)):
        yield {key: value for part in parts for key, value in part.items()}


def _short(sweep: SweepConfig) -> list[tuple[str, list[Any]]]:
    return [("budget.target", sweep.targets), ("seed", sweep.seeds)]


def _typed(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with each value as its field's type; one parser for all, because building one takes long.

    Raises:
        ConfigError: There is no such field, the sweep sets it by itself, or a value is not of its type.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run))
    for key in keys:
        check_field(key)
        if key in _OURS:
            raise ConfigError(f"{key}: is not valid in a sweep, which gives every run its own; expected other fields")
    values = {key: [run[key] for run in runs if key in run] for key in keys}
    parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode="greenprune")
    for key in keys:
        parser.add_argument(f"--{key}", type=list[declared_type(key)])  # type: ignore[misc]
    try:
        parsed = parser.parse_object(_nested(values))
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ConfigError(plain_message(error, declared_type)) from None
    supply = {key: iter(parsed[key]) for key in keys}
    return [{key: next(supply[key]) for key in run} for run in runs]


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            nested.setdefault(section, {})[name] = value
        else:
            nested[section] = value
    return nested


def replace_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with some fields replaced.

    Args:
        config: A config.
        values: Values of the fields' types, by dotted name.

    Raises:
        ConfigError: The result is not a valid run.
    """
    nested = _nested(values)
    parts = {
        name: dataclasses.replace(getattr(config, name), **value)
        if dataclasses.is_dataclass(getattr(config, name))
        else value
        for name, value in nested.items()
    }
    return dataclasses.replace(config, **parts)


def _words(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in changes.items()) or "the base itself"
