"""Runs side by side, and each gated run against its dense twin."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from greenprune.config import UserError, load_yaml, shaping_values
from greenprune.formatting import UNKNOWN, format_joules, format_percent, format_seconds, format_si, worst_quality
from greenprune.timing import StepTimes
from greenprune.tracking import Event, RunFolder, read_attempts, read_events

_TWIN_KEYS = ("model", "data", "seed", "epochs", "batch_size", "precision")
_EXECUTION_KEYS = ("compile", "cuda_graph")
_RUN_FILES = ("summary.json", "events.jsonl", "config.yaml")
# A device in energy_by_device_j: perhaps its host, its name and model, and unless it is unreadable how it was metered.
_DEVICE = re.compile(r"(?:\S+: )?(?P<kind>cpu|dram)?.*?(?: \((?P<meter>(?:counter|integrated power|estimate)\b.*)\))?")
_EXPECTED = "expected a run's folder, its summary.json, or a folder that holds runs"


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        path: The run's folder.
        name: The folder's name, after those of as many parents as set it apart from the other compared runs.
        summary: Content of summary.json; of a run that is not finished, what its events tell under the same keys.
        state: ``finished``, or how far it came.
        hardware: What its attempts ran on, each once, as its provenance tells; None if that is missing.
        dense_config: All that shapes the result of its dense twin, as its config.yaml tells; None if that is missing.
        execution: How its steps were executed, which shapes joules and seconds but no result, by key of the config;
            without what its config.yaml does not tell.
        images: Where its own folder of images is; None if it was trained on a known data set, or no config.yaml tells.
        twin: Name of its dense twin among the compared runs, if there is one.
        against_twin: Differences and ratios to the twin by name; None where one is unknown or would compare machines.
    """

    path: Path
    name: str
    summary: dict[str, Any]
    state: str
    hardware: tuple[str, ...] | None
    dense_config: dict[str, Any] | None = None
    execution: dict[str, Any] = field(default_factory=dict)
    images: Path | None = None
    twin: str | None = None
    against_twin: dict[str, float | None] | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it has a summary."""
        return self.state == "finished"

    @property
    def is_dense(self) -> bool:
        """Whether it is known to be neither gated nor given a structure."""
        return self.summary.get("gated") is False and not self.summary.get("structure_given")

    @property
    def standing(self) -> str:
        """What it is among the compared runs, in a few words."""
        if not self.is_finished:
            return self.state
        if self.is_dense:
            return "dense"
        what = "gated" if self.summary.get("gated") else "structure given"
        return f"{what}, no dense twin here" if self.twin is None else f"against {self.twin}"

    @property
    def step_time_s(self) -> float | None:
        """Median seconds of a step of the network as it is now: after the last removal, if there was one."""
        times = self.summary.get("step_time_s") or {}
        after: float | None = times.get("after")
        before: float | None = times.get("before")
        return before if after is None else after

    @property
    def energy_is_complete(self) -> bool:
        """Whether its joules are more than a lower bound, as far as is known."""
        return self.summary.get("energy_complete") is not False

    @property
    def meters(self) -> frozenset[tuple[str, str | None]]:
        """Each kind of device that its joules are of (gpu, cpu, dram), with how it was metered; None: not at all."""
        devices = (_DEVICE.fullmatch(name) for name in self.summary.get("energy_by_device_j") or {})
        return frozenset((device["kind"] or "gpu", device["meter"]) for device in devices if device)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": str(self.path),
            "name": self.name,
            "state": self.state,
            "finished": self.is_finished,
            "summary": self.summary,
            "twin": self.twin,
            "against_twin": self.against_twin,
        }


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; rich prints it as a table.

    Attributes:
        runs: The runs, in the order they were asked for.
        notes: What a reader of the ratios must know.
        to_accuracy: Accuracy whose joules are told under ``energy_to_accuracy_j``, if any was asked for.
    """

    runs: tuple[ComparedRun, ...]
    notes: tuple[str, ...]
    to_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "runs": [run.to_dict() for run in self.runs],
            "notes": list(self.notes),
            "to_accuracy": self.to_accuracy,
        }

    def __rich__(self) -> RenderableType:
        shown = {"CO2e": self._knows_co2, "channels": self._gates_channels}
        columns = [column for column in _COLUMNS if shown.get(column.header, True)]
        if self.to_accuracy is not None:
            columns.append(_accuracy_column(self.to_accuracy))
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column("run", overflow="fold")
        for column in columns:
            table.add_column(column.header, justify="right", no_wrap=True)  # names give way to figures
        for run in self.runs:
            table.add_row(Text(run.name), *(column.value(run) for column in columns))
            ratios = [_ratio_cell(run, column.ratio) for column in columns]
            table.add_row(Text(f"  {run.standing}"), *ratios, style="green" if run.twin else "dim")
        notes = [Text(f"note: {note}", style="dim") for note in self.notes]
        return Group(table, *notes)

    @property
    def _knows_co2(self) -> bool:
        return any(run.summary.get("co2_g") is not None for run in self.runs)

    @property
    def _gates_channels(self) -> bool:
        return any(run.summary.get("channels_dense") for run in self.runs)


def compare_runs(paths: Sequence[Path], to_accuracy: float | None = None) -> Comparison:
    """Read runs and set each that is gated, or was given a structure, against its dense twin.

    The twin is the run that differs in that alone: nothing gated and nothing removed, and all else that shapes the
    result is the same; where a config.yaml is missing, model, data, seed, epochs, batch size and precision.

    Args:
        paths: Runs' folders, their summary.json, or folders that hold runs.
        to_accuracy: Also tell the joules that each run took until an evaluation reached this accuracy (0 to 1).

    Raises:
        UserError: There is no run at a path, a file of one cannot be read, or the accuracy is not a share.
    """
    if to_accuracy is not None and not 0 < to_accuracy <= 1:
        raise UserError(f"--to-accuracy: {to_accuracy!r} is not valid; expected a share in (0, 1]")
    runs = [read_run(path, name) for path, name in find_runs(paths).items()]
    if to_accuracy is not None:
        for run in runs:
            run.summary["energy_to_accuracy_j"] = energy_to_accuracy_j(read_run_events(run.path), to_accuracy)
    return set_against_twins(runs, to_accuracy)


def set_against_twins(runs: list[ComparedRun], to_accuracy: float | None = None) -> Comparison:
    """Set each run that is not dense against its dense twin, if that is among the runs.

    Args:
        runs: What :func:`read_run` gave.
        to_accuracy: As for :func:`compare_runs`.
    """
    notes: list[str] = []
    compared = tuple(_set_against_twin(run, runs, notes) for run in runs)
    return Comparison(compared, tuple(notes), to_accuracy)


def energy_to_accuracy_j(events: Sequence[Event], accuracy: float) -> float | None:
    """Joules that a run had taken when an evaluation first reached an accuracy; all attempts and lost work count.

    Args:
        events: The run's events.
        accuracy: Share of the samples, 0 to 1.

    Returns:
        The joules; None if no evaluation reached it, or the energy is not known.
    """
    reached = (event for event in events if event["kind"] == "epoch" and (event.get("eval/accuracy") or 0) >= accuracy)
    first: Event = next(reached, {})
    return first.get("energy/total_j")


# Reading.


def find_runs(paths: Sequence[Path]) -> dict[Path, str]:
    """The folders of the runs at some paths, each once, and the name it goes by: as much of its path as is needed.

    Args:
        paths: As for :func:`compare_runs`.

    Raises:
        UserError: There is no run at a path.
    """
    folders = dict.fromkeys(folder for path in paths for folder in _runs_at(path))
    return {path: _name_among(path, list(folders)) for path in folders}


def _name_among(path: Path, paths: Sequence[Path]) -> str:
    """The shortest end of a path that no other one has."""
    for length in range(1, len(path.parts)):
        end = path.parts[-length:]
        if sum(other.parts[-length:] == end for other in paths) == 1:
            return str(Path(*end))
    return str(path)


def _runs_at(path: Path) -> list[Path]:
    if path.name == "summary.json" and path.is_file():
        return [path.parent]
    if not path.is_dir():
        what = "is not a summary.json" if path.exists() else "does not exist"
        raise UserError(f"RUN: {str(path)!r} {what}; {_EXPECTED}")
    if _is_run(path):
        return [path]
    runs = sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
    if not runs:
        raise UserError(f"RUN: {str(path)!r} holds no run ({', '.join(_RUN_FILES)}); {_EXPECTED}")
    return runs


def _is_run(folder: Path) -> bool:
    try:
        return any((folder / name).is_file() for name in _RUN_FILES)
    except PermissionError:  # somebody else's, beside one's own
        return False


def read_run(path: Path, name: str) -> ComparedRun:
    """Read one run, of which only a part may be there.

    Args:
        path: Its folder.
        name: What to call it.

    Raises:
        UserError: A file of it cannot be read.
    """
    folder = RunFolder(path)
    if folder.summary.is_file():
        summary, state = _read_object(folder.summary), "finished"
    else:
        summary, state = _unfinished(read_run_events(path))
    config = _read_config(folder.config)
    hardware = hardware_of(read_provenance(path))
    shaping, execution, images = _dense_config(config), _execution(config), _images(config)
    return ComparedRun(path, name, summary, state, hardware, shaping, execution, images)


def _read_config(path: Path) -> dict[str, Any]:
    """A config.yaml, whatever version wrote it; empty if there is none to be read."""
    try:
        values = load_yaml(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _dense_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """What shapes the result of the dense twin of a run with this config; None if it does not tell."""
    try:
        dense = {"gate": {"enabled": False}, "model": {**config["model"], "structure": None}}
        return shaping_values({**config, **dense})
    except (TypeError, KeyError):
        return None


def _execution(config: dict[str, Any]) -> dict[str, Any]:
    model = config.get("model")
    return {f"model.{key}": model[key] for key in _EXECUTION_KEYS if key in model} if isinstance(model, dict) else {}


def _images(config: dict[str, Any]) -> Path | None:
    """The folder of an image_folder: two of them are two data sets, while any other is the same wherever it lies."""
    data = config.get("data")
    if not isinstance(data, dict) or data.get("name") != "image_folder" or not isinstance(data.get("root"), str):
        return None
    return Path(data["root"]).resolve()


def read_run_events(path: Path) -> list[Event]:
    """The events of the run in a folder; a last line that is not whole is left out.

    Raises:
        UserError: The file cannot be read.
    """
    events = RunFolder(path).events
    try:
        return read_events(events)
    except (OSError, ValueError) as error:
        raise UserError(f"RUN: {str(events)!r} cannot be read ({error}); expected one JSON object a line") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"RUN: {str(path)!r} cannot be read ({error}); expected a run's summary") from None
    if not isinstance(values, dict):
        raise UserError(f"RUN: {str(path)!r} holds no summary; expected one JSON object with a run's figures")
    return values


def read_provenance(path: Path) -> list[dict[str, Any]]:
    """Versions and hardware of each attempt of the run in a folder; empty if that is not known."""
    try:
        return read_attempts(RunFolder(path).provenance)
    except OSError:
        return []


def hardware_of(attempts: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """What attempts ran on, each once: the GPUs, or the processor with what of it was used; None if not known."""
    return tuple(dict.fromkeys(map(_hardware, attempts))) or None


def _hardware(attempt: dict[str, Any]) -> str:
    if attempt.get("gpus") and attempt.get("device") != "cpu":
        return ", ".join(attempt["gpus"])
    used = {"threads": attempt.get("threads"), "usable cores": attempt.get("cpu_cores_usable")}
    told = [f"{name} {count}" for name, count in used.items() if count is not None]  # older versions may tell neither
    return ", ".join([str(attempt.get("cpu")), *told])


_FROM_EVENTS = {
    "accuracy": "eval/accuracy",
    "loss": "eval/loss",
    "params": "structure/params",
    "params_dense": "structure/params_dense",
    "flops_forward": "flops/forward",
    "flops_forward_dense": "flops/forward_dense",
    "flops_train": "flops/train",
    "flops_train_dense": "flops/train_dense",
    "kept_cost": "structure/kept_cost",
    "gates_left": "structure/gates",
    "blocks": "structure/blocks",
    "channels": "structure/channels",
    "energy_j": "energy/total_j",
    "co2_g": "energy/co2_g",
    "time_s": "time_s",
    "steps": "step",
}
_FROM_START = (
    "run",
    "model",
    "data",
    "gated",
    "structure_given",
    "accuracy_kind",
    "budget_target",
    "budget_unit",
    "epochs",
    "batch_size",
    "precision",
    "device",
    "world_size",
)


def _unfinished(events: list[Event]) -> tuple[dict[str, Any], str]:
    """What the events of a run tell under the keys of a summary, and how far the run came.

    Events of older versions may lack keys; what they do not tell is unknown.
    """
    start = next((event for event in reversed(events) if event["kind"] == "start"), None)
    if start is None:
        return {}, "unfinished: nothing is recorded yet"
    last: Event = {}
    step_times = StepTimes()
    for event in events:
        last.update(event)
        if event["kind"] == "end" and "summary" in event:
            return event["summary"], "finished"
        if event["kind"] == "train" and event.get("train/step_time_s") is not None:
            step_times.add(event["train/step_time_s"])
        elif event["kind"] == "removal" and event["step"]:
            step_times.cut()
    summary: dict[str, Any] = {key: start.get(key) for key in _FROM_START}
    summary |= {key: last.get(name) for key, name in _FROM_EVENTS.items()}
    if "units" in start:
        summary["blocks_dense"] = len(start["units"])
    summary["channels_dense"] = sum(start.get("channels", {}).values())
    sources = start.get("energy_sources", [])
    summary["energy_quality"] = worst_quality(quality for _, _, quality in sources)
    named = (f"{device} ({quality}: {source})" if quality else device for device, source, quality in sources)
    summary["energy_by_device_j"] = last.get("energy/by_device_j") or dict.fromkeys(named)
    summary["step_time_s"] = step_times.medians()
    steps = start["epochs"] * start["steps_per_epoch"] if {"epochs", "steps_per_epoch"} <= start.keys() else None
    state = f"unfinished: step {last['step']:,}" + ("" if steps is None else f" of {steps:,}")
    stopped = f", stopped by {last.get('signal', 'a signal')}" if events[-1]["kind"] == "interrupt" else ""
    return summary, state + stopped


# Comparing.


def _set_against_twin(run: ComparedRun, runs: list[ComparedRun], notes: list[str]) -> ComparedRun:
    if not run.is_finished or run.is_dense:
        return run
    twins = [other for other in runs if _is_twin(other, run)]
    # Of several, one that was measured on the same hardware and executed alike tells more.
    twin = max(twins, key=lambda other: (_same_machine(run, other), not _executed_otherwise(run, other)), default=None)
    if twin is None:
        dense = "--gate.enabled false" if run.summary.get("gated") else "--model.structure null"
        notes.append(f"{run.name} has no dense twin here: the same config with {dense}")
        return run
    return replace(run, twin=twin.name, against_twin=_ratios(run, twin, notes))


def _is_twin(other: ComparedRun, run: ComparedRun) -> bool:
    same = all(other.summary.get(key) == run.summary.get(key) for key in _TWIN_KEYS)
    if run.dense_config is not None and other.dense_config is not None:
        mine, theirs = run.dense_config, other.dense_config  # of an older version one may lack fields
        same = same and all(mine[key] == theirs[key] for key in mine.keys() & theirs.keys())
    if run.images is not None and other.images is not None:
        same = same and run.images == other.images
    return other.is_finished and other.is_dense and same


def _same_machine(run: ComparedRun, other: ComparedRun) -> bool:
    same = all(run.summary.get(key) == other.summary.get(key) for key in ("device", "world_size"))
    known = run.hardware is not None and other.hardware is not None
    return same and (not known or len({*(run.hardware or ()), *(other.hardware or ())}) == 1)


def _executed_otherwise(run: ComparedRun, other: ComparedRun) -> list[str]:
    """Keys of the config in which the steps of two runs were not executed alike; of an older version one may lack."""
    mine, theirs = run.execution, other.execution
    return [key for key in mine if key in theirs and mine[key] != theirs[key]]


def _ratios(run: ComparedRun, twin: ComparedRun, notes: list[str]) -> dict[str, float | None]:
    """Accuracy in points above the twin's, everything else as a multiple of it."""
    mine, theirs = run.summary, twin.summary
    energies = [key for key in ("energy_j", "energy_to_accuracy_j", "co2_g") if key in mine]
    ratios: dict[str, float | None] = {
        key: _ratio(mine.get(key), theirs.get(key))
        for key in ("params", "flops_forward", "flops_train", *energies, "time_s")
    }
    ratios["step_time_s"] = _ratio(run.step_time_s, twin.step_time_s)
    ratios["accuracy_points"] = None
    if mine.get("accuracy_kind") == theirs.get("accuracy_kind"):
        ratios["accuracy_points"] = _points(mine.get("accuracy"), theirs.get("accuracy"))
    else:
        notes.append(
            f"{run.name} and {twin.name} were not evaluated on the same set: no difference in accuracy is given"
        )
    if not _same_machine(run, twin):
        notes.append(f"{run.name} and {twin.name} ran on different hardware: no ratios of joules, CO2e and seconds")
        ratios |= dict.fromkeys((*energies, "time_s", "step_time_s"))
    elif keys := _executed_otherwise(run, twin):
        what = f"{run.name} and {twin.name} differ in {' and '.join(keys)}"
        notes.append(f"{what}: no ratios of joules, CO2e and seconds")
        ratios |= dict.fromkeys((*energies, "time_s", "step_time_s"))
    elif incomplete := [one.name for one in (run, twin) if not one.energy_is_complete]:
        notes.append(f"some joules of {' and '.join(incomplete)} could not be read: no ratios of joules and CO2e")
        ratios |= dict.fromkeys(energies)
    elif (mine.get("energy_quality"), run.meters) != (theirs.get("energy_quality"), twin.meters):
        notes.append(f"{run.name} and {twin.name} were not metered alike: no ratios of joules and CO2e")
        ratios |= dict.fromkeys(energies)
    return ratios


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or not theirs else mine / theirs


def _points(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else 100 * (mine - theirs)


# Showing.


class _Column(NamedTuple):
    """A column of the table: a figure of a run and, below it, how it stands to its twin."""

    header: str
    value: Callable[[ComparedRun], str]
    ratio: str | None = None


_COLUMNS = (
    _Column("accuracy", lambda run: format_percent(run.summary.get("accuracy"), 2), "accuracy_points"),
    _Column("blocks", lambda run: _blocks(run.summary)),
    _Column("channels", lambda run: _channels(run.summary)),
    _Column("FLOPs,\n1 image", lambda run: format_si(run.summary.get("flops_forward")), "flops_forward"),
    _Column("FLOPs,\ntraining", lambda run: format_si(run.summary.get("flops_train")), "flops_train"),
    _Column("energy", lambda run: _joules(run, "energy_j"), "energy_j"),
    _Column("energy\nby", lambda run: (run.summary.get("energy_quality") or UNKNOWN).replace(" ", "\n")),
    _Column("CO2e", lambda run: format_si(run.summary.get("co2_g"), "g"), "co2_g"),
    _Column("time", lambda run: format_seconds(run.summary.get("time_s")), "time_s"),
    _Column("a step", lambda run: format_seconds(run.step_time_s), "step_time_s"),
)


def _accuracy_column(accuracy: float) -> _Column:
    header = f"energy to\n{format_percent(accuracy, 1)}"
    key = "energy_to_accuracy_j"
    return _Column(header, lambda run: _joules(run, key), key)


def _joules(run: ComparedRun, key: str) -> str:
    energy_j = run.summary.get(key)
    least = "" if energy_j is None or run.energy_is_complete else "at least\n"
    return f"{least}{format_joules(energy_j)}"


def _blocks(summary: dict[str, Any]) -> str:
    blocks = summary.get("blocks")
    return UNKNOWN if blocks is None or "blocks_dense" not in summary else f"{blocks}/{summary['blocks_dense']}"


def _channels(summary: dict[str, Any]) -> str:
    return f"{summary.get('channels')}/{summary['channels_dense']}" if summary.get("channels_dense") else "-"


def _ratio_cell(run: ComparedRun, key: str | None) -> str:
    if run.against_twin is None or key is None:
        return ""
    ratio = run.against_twin[key]
    if ratio is None:
        return "-"
    return f"{ratio:+.2f} pts" if key == "accuracy_points" else f"{ratio:.2f}x"
