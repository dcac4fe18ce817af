"""What is known of a run: read from its folder, of which only a part may be there."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from greenprune.config import UserError, load_yaml, shaping_values
from greenprune.energy import CarbonIntensity, co2_g, format_intensity
from greenprune.formatting import format_counted, worst_quality
from greenprune.report.attempts import IN_GOOD_ORDER, Allotment, Attempt, allotment_of, read_spans
from greenprune.summary_file import read_summary
from greenprune.timing import StepTimes
from greenprune.tracking import (
    Event,
    RunFolder,
    describe_damage,
    gpus_of_attempt,
    name_in_id,
    read_attempts,
    salvage_events,
)

IMAGE_FOLDER = "image_folder"
"""The data set that is a folder of one's own images, and so another one for each."""

_EXECUTION_KEYS = ("compile", "cuda_graph")
_ROUNDING = 1e-9  # of sums of joules
_RUN_FILES = ("summary.json", "events.jsonl", "config.yaml")
# A device in energy_by_device_j: perhaps its host, its name and model, and unless it is unreadable how it was metered.
_DEVICE = re.compile(r"(?:\S+: )?(?P<kind>cpu|dram)?.*?(?: \((?P<meter>(?:counter|integrated power|estimate)\b.*)\))?")
_MOST_OF_AN_ERROR = 100  # characters beside a run's name; its log has all
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
        damage: What is wrong with each line of its events that is none, where they were needed and so were read.
        attempts: When and where it went on and how each time ended, as its events tell; empty if they are not there.
        allotment: The part of its machine that it had; None if it had all of it, or that is not known.
        neighbours: Names of compared runs that were on its machine while it ran.
        shared: What it shared with those, or other jobs, so that the joules of it count their work too.
        twin: Name of its dense twin among the compared runs, if there is one.
        against_twin: Differences and ratios to the twin by name; None where one is unknown or would compare anything
            but the networks, such as machines.
    """

    path: Path
    name: str
    summary: dict[str, Any]
    state: str
    hardware: tuple[str, ...] | None
    dense_config: dict[str, Any] | None = None
    execution: dict[str, Any] = field(default_factory=dict)
    images: Path | None = None
    damage: tuple[str, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    allotment: Allotment | None = None
    neighbours: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
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
    def has_lost_work(self) -> bool:
        """Whether it did work twice, or may have, so that its joules and seconds tell of more than its network."""
        several = self.summary.get("attempts") or 1
        if several > 1 and len(self.attempts) == several:
            lost_work = any(attempt.lost_work for attempt in self.attempts[:-1])
        else:
            # Without whole events: of one that was killed the joules are a lower bound.
            lost_work = not self.energy_is_complete and several > 1
        return lost_work or self.lost_j > 0

    @property
    def lost_j(self) -> float:
        """Joules of work that was lost or done again, as far as they are known."""
        lost_j: float = self.summary.get("energy_lost_j") or 0.0
        # Books that were added up in another order differ by less, and nothing was lost.
        return lost_j if lost_j > _ROUNDING * (self.summary.get("energy_j") or 0.0) else 0.0

    @property
    def carbon(self) -> tuple[float | None, float] | None:
        """Grams for each kilowatt-hour, and the PUE, that its CO2e is told at; None if its CO2e is not known."""
        if self.summary.get("co2_g") is None:
            return None
        return self.summary.get("carbon_intensity_g_per_kwh"), self.summary.get("pue") or 1.0

    def at_intensity(self, carbon: CarbonIntensity) -> ComparedRun:
        """The same with CO2e told at another carbon intensity and PUE, also where it knew none as it ran."""
        told = {
            "co2_g": co2_g(self.summary.get("energy_j"), carbon),
            "carbon_intensity_g_per_kwh": carbon.g_per_kwh,
            "carbon_intensity_source": carbon.source,
            "pue": carbon.pue,
        }
        return replace(self, summary=self.summary | told) if self.summary else self

    @property
    def meters(self) -> frozenset[tuple[str, str | None]]:
        """Each kind of device that its joules are of (gpu, cpu, dram), with how it was metered; None: not at all."""
        devices = (_DEVICE.fullmatch(name) for name in self.summary.get("energy_by_device_j") or {})
        return frozenset((device["kind"] or "gpu", device["meter"]) for device in devices if device)

    @property
    def counts_host(self) -> bool:
        """Whether the joules of its machine's processor or memory are among its own, as far as is known."""
        devices = self.summary.get("energy_by_device_j")
        if not devices:
            return self.summary.get("energy_j") is not None
        found = ((_DEVICE.fullmatch(name), joules) for name, joules in devices.items())
        return any(device and device["kind"] and joules is not None for device, joules in found)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": str(self.path),
            "name": self.name,
            "state": self.state,
            "finished": self.is_finished,
            "summary": self.summary,
            "shared_machine_with": list(self.neighbours),
            "twin": self.twin,
            "against_twin": self.against_twin,
        }


# Reading.


def find_runs(paths: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """The folders of the runs at some paths, each once, and the name it goes by: as much of its path as is needed.

    Args:
        paths: As for :func:`compare_runs`.

    Returns:
        The folders with their names; and a line for each copy of a run, which is left out: it is no run of its own that
        a spread could be over.

    Raises:
        UserError: There is no run at a path.
    """
    folders = {folder.resolve(): folder for path in paths for folder in _runs_at(path)}
    notes = []
    for made, copies in _by_id(folders.values()).items():
        whole, *others = sorted(copies, key=partial(_originality, made=made), reverse=True)
        for copy in others:
            del folders[copy.resolve()]
            notes.append(f"{copy} is left out: it is a copy of {whole}")
    return {path: _name_among(place, list(folders)) for place, path in folders.items()}, notes


def _by_id(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """The folders that were made as one and copied since, by what id.txt holds: the name of the first, and more.

    Those of older versions have no id.
    """
    found: dict[str, list[Path]] = {}
    for folder in folders:
        with suppress(OSError, UnicodeDecodeError):
            found.setdefault(RunFolder(folder).id.read_text().strip(), []).append(folder)
    return found


def intensity_note(carbon: CarbonIntensity) -> str:
    """What a reader must know where the CO2e of runs is not their own."""
    place = " ".join(filter(None, (carbon.country, carbon.region)))
    source = ", ".join(filter(None, (place, carbon.source)))
    return (
        f"CO2e of every run is its joules at {format_intensity(carbon.g_per_kwh)} ({source}) and a PUE of "
        f"{carbon.pue:g}, as asked for, and not what the run was told"
    )


def _originality(path: Path, made: str) -> tuple[bool, int, bool]:
    """How far the run in a folder came, finished above all, and whether it has the name that it was made with."""
    folder = RunFolder(path)
    told = folder.events.stat().st_size if folder.events.is_file() else 0
    return folder.summary.is_file(), told, made.startswith(f"{name_in_id(path.name)}-")


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
    if not runs and (path / "runs").is_dir():  # of a sweep, or where runs go by default
        return _runs_at(path / "runs")
    if not runs:
        raise UserError(f"RUN: {str(path)!r} holds no run ({', '.join(_RUN_FILES)}); {_EXPECTED}")
    return runs


def _is_run(folder: Path) -> bool:
    try:
        return any((folder / name).is_file() for name in _RUN_FILES)
    except PermissionError:  # somebody else's, beside one's own
        return False


def read_run(path: Path, name: str, config: dict[str, Any] | None = None) -> ComparedRun:
    """Read one run, of which only a part may be there.

    Args:
        path: Its folder.
        name: What to call it.
        config: What :func:`read_config` gave of it, if it was read already.

    Raises:
        UserError: A file of it cannot be read.
    """
    folder = RunFolder(path)
    damage: tuple[str, ...] = ()
    if folder.summary.is_file():
        summary, state = read_summary(folder.summary), "finished"
    else:
        events, damage = read_run_events(path)
        if damage and not events:
            wrong = f"{str(folder.events)!r} cannot be read ({describe_damage(damage)})"
            raise UserError(f"RUN: {wrong}; expected one JSON object a line")
        summary, state = _unfinished(events)
    config = read_config(path) if config is None else config
    provenance = read_provenance(path)
    hardware = hardware_of(provenance)
    shaping, execution, images = _dense_config(config), _execution(config), _images(config)
    attempts = read_spans(folder.events, provenance)
    part = next(filter(None, map(allotment_of, provenance)), None)
    return ComparedRun(path, name, summary, state, hardware, shaping, execution, images, damage, attempts, part)


def read_config(path: Path) -> dict[str, Any]:
    """The config.yaml of the run in a folder, whatever version wrote it; empty if there is none to be read."""
    try:
        values = load_yaml(RunFolder(path).config.read_text(encoding="utf-8"))
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
    if not isinstance(data, dict) or data.get("name") != IMAGE_FOLDER or not isinstance(data.get("root"), str):
        return None
    return Path(data["root"]).resolve()


def read_run_events(path: Path) -> tuple[list[Event], tuple[str, ...]]:
    """The events of the run in a folder, and what is wrong with each line that is none, or with the file.

    A last line that is not whole is left out, and nothing is wrong with it.
    """
    try:
        events, damaged = salvage_events(RunFolder(path).events)
    except OSError as error:
        return [], (str(error),)
    return events, tuple(damaged)


def read_provenance(path: Path) -> list[dict[str, Any]]:
    """Versions and hardware of each attempt of the run in a folder; empty if that is not known."""
    try:
        return read_attempts(RunFolder(path).provenance)
    except OSError:
        return []


def hardware_of(attempts: Sequence[dict[str, Any]]) -> tuple[str, ...] | None:
    """What attempts ran on, each once: GPUs, the processor with what of it was used, and how many processes did.

    None if that is not known.
    """
    return tuple(dict.fromkeys(map(_hardware, attempts))) or None


def _hardware(attempt: dict[str, Any]) -> str:
    gpus = gpus_of_attempt(attempt)
    processes = attempt.get("processes") or 1
    counts = {
        "threads": None if gpus else attempt.get("threads"),
        "usable cores": attempt.get("cpu_cores_usable"),
        "processes": processes if processes > 1 else None,
    }
    # The processor of a GPU's machine as well: its joules are in the run's. Older versions may tell not all of it.
    models = [*gpus, *(attempt.get("cpus") or [str(attempt.get("cpu") or "unknown processor")])]
    told = (f"{name} {count}" for name, count in counts.items() if count is not None)
    return ", ".join([format_counted(models), *told])


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
    "data_digest",
    "seed",
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
    summary["attempts"] = sum(event["kind"] == "start" for event in events)
    if "units" in start:
        summary["blocks_dense"] = len(start["units"])
    summary["channels_dense"] = sum(start.get("channels", {}).values())
    sources = start.get("energy_sources", [])
    summary["energy_quality"] = worst_quality(
        quality for event in events if event["kind"] == "start" for _, _, quality in event.get("energy_sources", [])
    )
    named = (f"{device} ({quality}: {source})" if quality else device for device, source, quality in sources)
    summary["energy_by_device_j"] = last.get("energy/by_device_j") or dict.fromkeys(named)
    if _lacks_joules(events):
        summary["energy_complete"] = False
    summary["step_time_s"] = step_times.medians()
    steps = start["epochs"] * start["steps_per_epoch"] if {"epochs", "steps_per_epoch"} <= start.keys() else None
    state = f"unfinished: step {last['step']:,}" + ("" if steps is None else f" of {steps:,}")
    return summary, state + _ending(events[-1])


def _lacks_joules(events: Sequence[Event]) -> bool:
    """Whether joules are known to be missing: of a device that no source can read, or of an attempt that was killed."""
    starts = [place for place, event in enumerate(events) if event["kind"] == "start"]
    unread = any(quality is None for place in starts for _, _, quality in events[place].get("energy_sources", []))
    return unread or any(events[place - 1]["kind"] not in IN_GOOD_ORDER for place in starts if place)


def _ending(last: Event) -> str:
    """How the last event says that the run ended, to be put behind how far it came; empty if it does not."""
    if last["kind"] == "interrupt":
        return f", stopped by {last.get('signal', 'a signal')}"
    if last["kind"] == "failure":
        return f", crashed: {textwrap.shorten(str(last.get('error', 'it is not told why')), _MOST_OF_AN_ERROR)}"
    return ""
