"""Whether a run's files are whole and tell the same: checked against each other, not taken on trust."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from greenprune.checkpoint import Checkpoint, CheckpointCorrupt, list_checkpoints, load_checkpoint
from greenprune.config import Config, ConfigError, UserError, load_config, shaping_values
from greenprune.evaluation import Evaluation
from greenprune.formatting import format_number
from greenprune.locking import Holder, find_holder
from greenprune.network import Network, prepare_network
from greenprune.surgery import Operation, Structure, StructureMismatch, replay, structure_text
from greenprune.timing import StepTimes
from greenprune.tracking import Event, Ledger, RunFolder, course_of, salvage_events

_TOLERANCE = 1e-9  # of sums of joules, taken in another order


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        what: The file, or what of it.
        good: Whether it is as it should be; None if there is nothing to check.
        detail: What was found, in one line.
    """

    what: str
    good: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{ {True: 'ok', False: 'WRONG', None: '-'}[self.good]:5}  {self.what:18}  {self.detail}"


def verify_run(path: Path) -> list[Finding]:
    """Check all files of a run, which may still go on, without its data set and without changing anything.

    The ledger's totals are computed again from the events and the network's costs, the structure is carried out on a
    fresh network, and the weights of every checkpoint are loaded into it.

    Args:
        path: The run's folder.

    Raises:
        UserError: There is no run at the path, or its config cannot be read.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"RUN: {str(path)!r} is not the folder of a run; expected one with config.yaml in it")
    try:
        config = load_config(folder.config)
    except ConfigError as error:
        raise UserError(f"RUN: {str(folder.config)!r} is not a run's config: {error}") from None
    holder = find_holder(folder.path)
    held = holder.is_held is not False  # also if that cannot be told: what may be as it should be is not called wrong
    summary = _read(folder.summary) if folder.summary.is_file() else None
    state = "the run is finished" if summary is not None else _state_of(holder)
    first = Finding("config.yaml", True, f"{config.data.name}, {config.model.name}; {state}")
    start = next((event for event in reversed(salvage_events(folder.events)[0]) if event["kind"] == "start"), None)
    if start is None:
        return [first, *_check_begun(folder)]
    network = prepare_network(config, _Images.of(start))
    # The events last: a run that goes on tells what it has done, and nothing of a file may be newer than what is told.
    checkpoints = [_look_at(path, config, network.model) for path in list_checkpoints(folder.checkpoints)]
    operations = _read_structure(folder)
    events, damaged = salvage_events(folder.events)
    findings = [first, _check_events(events, damaged)]
    try:
        books = _Books(config, network, events)
    except StructureMismatch as error:
        return [*findings, Finding("ledger", False, f"cannot be computed: {error}")]
    findings.append(books.check_steps())
    findings.append(books.check_joules(summary))
    findings.append(_check_structure(operations, books, may_differ_at_end=summary is None, goes_on=held))
    findings += [_check_checkpoint(found, books) for found in checkpoints if not (held and found.is_gone)]
    if not checkpoints:
        findings.append(Finding("checkpoints", None if summary is None else False, "there is none"))
    findings.append(_check_summary(summary, books, goes_on=held))
    return findings


def _state_of(holder: Holder) -> str:
    """What a run without a summary does, in words."""
    if holder.is_held:
        return f"the run still goes on ({holder.owner or 'on this machine'})"
    if holder.is_held is None:
        return f"the run is not finished; whether it goes on cannot be told ({holder.doubt})"
    return "the run is not finished"


def _check_begun(folder: RunFolder) -> list[Finding]:
    """What there is of a run whose events tell of no attempt."""
    others = (folder.summary, folder.structure, *list_checkpoints(folder.checkpoints))
    there = [path.name for path in others if path.exists()]
    if there:
        return [Finding("events.jsonl", False, f"it tells of no attempt, but there is {', '.join(there)}")]
    return [Finding("events.jsonl", None, "no attempt has begun")]


@dataclass(frozen=True)
class _Images:
    """The images that a run was trained on."""

    classes: int
    channels: int
    image_size: int

    @classmethod
    def of(cls, start: Event) -> _Images:
        try:
            channels, image_size, _ = start["image_shape"]
            return cls(int(start["classes"]), int(channels), int(image_size))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "RUN: its start event does not tell the shape of its images; expected a newer run"
            ) from None


def _check_events(events: list[Event], damaged: list[str]) -> Finding:
    """Every line an event, every attempt begun, no step missing and none twice in the course that counts."""
    wrong = list(damaged)
    attempts = sum(event["kind"] == "start" for event in events)
    if events and events[0]["kind"] != "start":
        wrong.append(f"it begins with {events[0]['kind']!r}, not with a start")
    course = course_of(events)
    for kind in ("train", "window", "epoch"):
        steps = [event["step"] for event in course if event["kind"] == kind]
        if steps != sorted(set(steps)):
            wrong.append(f"{kind} events of the course are not in the order of their steps, once each")
    epochs = [event.get("epoch") for event in course if event["kind"] == "epoch"]
    if epochs != list(range(1, len(epochs) + 1)):
        wrong.append(f"epochs of the course are {epochs}, not each once")
    told = f"{format_number(len(events), 'event')} of {format_number(attempts, 'attempt')}, "
    told += f"{format_number(len(epochs), 'epoch')}; no step missing, none twice"
    return Finding("events.jsonl", not wrong, "; ".join(wrong) or told)


def _operation(event: Event) -> Operation:
    """What a removal or freeze event tells of."""
    keys = ("unit", "step", "epoch", "reason", "channels")
    values = {key: event.get(key) for key in keys}
    return Operation.from_dict({"action": "remove" if event["kind"] == "removal" else "freeze", **values})


class _Books:
    """A run's totals as they follow from its events and from what its network costs.

    Args:
        config: The run.
        network: Its dense network, with its costs.
        events: All of its events.

    Raises:
        StructureMismatch: The removals and freezes that the events tell are not those of the network.
    """

    def __init__(self, config: Config, network: Network, events: list[Event]) -> None:
        self.events = events
        self.course = course_of(events)
        self.operations = [_operation(event) for event in self.course if event["kind"] in ("removal", "freeze")]
        replay(Structure(self.operations), copy.deepcopy(network.model))
        self._table, self._batch = network.table, config.data.batch_size
        bounds = sorted({0, *(operation.step for operation in self.operations)})
        self._flops_from = {step: self._table.cost_of(self.structure_at(step)).flops_train for step in bounds}

    def structure_at(self, step: int) -> Structure:
        """What had been removed and frozen after so many steps."""
        return Structure([operation for operation in self.operations if operation.step <= step])

    def flops_at(self, step: int) -> tuple[int, int]:
        """FLOPs of training up to a step, and those of the dense twin: each step at the cost of its own structure."""
        bounds = [*(bound for bound in self._flops_from if bound < step), step]
        steps = itertools.pairwise(bounds)
        flops = sum((end - begin) * self._batch * self._flops_from[begin] for begin, end in steps)
        return flops, step * self._batch * self._table.dense.flops_train

    def samples_at(self, step: int) -> int:
        """Training samples up to a step."""
        return step * self._batch

    def check_steps(self) -> Finding:
        """FLOPs that the events tell against those that follow from the structure of the moment."""
        told = [event for event in self.course if event["kind"] in ("train", "epoch")]
        for event in told:
            found = (event.get("flops/train"), event.get("flops/train_dense"))
            if found != self.flops_at(event["step"]):
                detail = f"flops/train at step {event['step']} is {found[0]}, not {self.flops_at(event['step'])[0]}"
                return Finding("ledger: FLOPs", False, detail)
        if not told:
            return Finding("ledger: FLOPs", None, "no step is told yet")
        last = told[-1]["step"]
        detail = f"{self.flops_at(last)[0]:,} of {self.samples_at(last):,} samples, computed again step by step"
        return Finding("ledger: FLOPs", True, detail)

    def lost_j(self) -> float:
        """Joules that were spent on work that was done again."""
        lost = reached = 0.0
        lost_at: dict[int, float] = {0: 0.0}
        for event in self.events:
            if event["kind"] == "start":
                resumed_at = event.get("energy/resumed_at_j") or 0.0
                lost = lost_at.setdefault(event["step"], lost) + max(0.0, reached - resumed_at)
            elif event["kind"] == "interrupt" and event.get("energy/ledger"):
                lost_at[event["step"]] = lost  # the next attempt goes on with the books as they were then
            elif event["kind"] == "checkpoint" and event.get("write_s") is not None:
                lost_at[event["step"]] = lost
            reached = event.get("energy/total_j") or reached
        return lost

    def check_joules(self, summary: dict[str, Any] | None) -> Finding:
        """Joules that only grow, and a summary that has all of them."""
        told = [event["energy/total_j"] for event in self.events if event.get("energy/total_j") is not None]
        if not told:
            return Finding("ledger: joules", None, "nothing could be read")
        wrong = []
        reached = itertools.accumulate(told, max)
        if any(now < before * (1 - _TOLERANCE) for before, now in zip(reached, told[1:], strict=False)):
            wrong.append("energy/total_j falls from one event to a later one")
        detail = f"{told[-1]:,.1f} J told, {self.lost_j():,.1f} J of them for work done again"
        if summary is not None:
            wrong += self._wrong_with_joules(summary, told[-1])
        return Finding("ledger: joules", not wrong, "; ".join(wrong) or detail)

    def _wrong_with_joules(self, summary: dict[str, Any], told_j: float) -> Iterator[str]:
        try:
            energy_j, lost_j = float(summary["energy_j"]), float(summary["energy_lost_j"])
            by_phase = sum(joules for joules in summary["energy_by_phase_j"].values() if joules is not None)
        except (KeyError, TypeError, ValueError, AttributeError):
            yield "summary.json does not tell the joules that the events tell"
            return
        if energy_j < told_j * (1 - _TOLERANCE):
            yield f"summary.json has {energy_j} J, less than the {told_j} J that were told"
        if not math.isclose(by_phase + lost_j, energy_j, rel_tol=_TOLERANCE):
            yield f"joules by phase ({by_phase}) and lost ({lost_j}) are not those of the run ({energy_j})"
        if not math.isclose(lost_j, self.lost_j(), rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
            yield f"energy_lost_j is {lost_j}, not {self.lost_j()}"


def _read_structure(folder: RunFolder) -> list[Operation] | str | None:
    """The removals and freezes of structure.json, or what is wrong with it; None if there is no file."""
    if not folder.structure.is_file():
        return None
    try:
        return Structure.from_dict(_read(folder.structure)).operations
    except StructureMismatch as error:
        return str(error)


def _check_structure(
    found: list[Operation] | str | None, books: _Books, *, may_differ_at_end: bool, goes_on: bool
) -> Finding:
    """structure.json against the removals and freezes that the events tell.

    Args:
        found: What :func:`_read_structure` gave.
        books: What the events tell.
        may_differ_at_end: Whether the file may tell more: a process that is killed in the middle of surgery has written
            it and not yet told of it.
        goes_on: Whether the events may tell more, because they were read later.
    """
    told = books.operations
    if found is None:
        is_missing = bool(told) and not goes_on
        there = f"{len(told)} removals and freezes are told, but there is no file"
        return Finding("structure.json", False if is_missing else None, there if told else "no removal")
    if isinstance(found, str):
        return Finding("structure.json", False, found)
    length = len(told)
    if (may_differ_at_end and len(found) > length) or (goes_on and len(found) < length):
        length = min(len(found), length)
        found, told = found[:length], told[:length]
    if found != told:
        return Finding("structure.json", False, "not the removals and freezes that the events tell")
    return Finding("structure.json", True, f"{length} removals and freezes, as the events tell them")


@dataclass(frozen=True)
class _Looked:
    """What a checkpoint holds, or why that cannot be said.

    Attributes:
        path: Its folder.
        wrong: What is wrong with it by itself, in one line; None if nothing is.
        structure: Its structure.
        totals: FLOPs of training, those of the dense twin and samples, as its ledger has them.
        step: Steps done.
        detail: What was looked at.
        is_gone: Whether it was taken away meanwhile.
    """

    path: Path
    wrong: str | None = None
    structure: Structure = field(default_factory=Structure)
    totals: tuple[int, int, int] = (0, 0, 0)
    step: int = 0
    detail: str = ""
    is_gone: bool = False


def _look_at(path: Path, config: Config, model: nn.Module) -> _Looked:
    """A checkpoint's checksums, structure and weights."""
    try:
        checkpoint = load_checkpoint(path)
        structure = check_fits(checkpoint, config, model)
        step, ledger = checkpoint.state["step"], checkpoint.state["ledger"]
        if path.name != f"step-{step:09d}":
            raise CheckpointCorrupt(f"it is of step {step}")
        tensors = [*checkpoint.model.items(), *(checkpoint.training.get("average") or {}).items()]
        broken = next((name for name, tensor in tensors if not tensor.isfinite().all()), None)
        if broken is not None:
            raise CheckpointCorrupt(f"{broken} is not finite")
        size = sum(file.stat().st_size for file in path.iterdir())
    except (CheckpointCorrupt, FileNotFoundError) as error:
        return _Looked(path, str(error), is_gone=not path.exists())
    totals = (ledger["flops_train"], ledger["flops_train_dense"], ledger["samples"])
    detail = f"{size / 1e6:.1f} MB, checksums right; structure replayed, {len(checkpoint.model)} tensors loaded"
    return _Looked(path, None, structure, totals, step, detail)


def _check_checkpoint(looked: _Looked, books: _Books) -> Finding:
    """A checkpoint's structure and ledger against the events."""
    wrong = looked.wrong
    if wrong is None and looked.structure != books.structure_at(looked.step):
        wrong = "its structure is not the one that the events tell"
    if wrong is None and looked.totals != (*books.flops_at(looked.step), books.samples_at(looked.step)):
        wrong = "its ledger is not the one that follows from the events"
    return Finding(looked.path.name, wrong is None, wrong or looked.detail)


def _check_summary(summary: dict[str, Any] | None, books: _Books, *, goes_on: bool) -> Finding:
    """summary.json against the events."""
    end = books.events[-1]
    if summary is None:
        is_missing = end["kind"] == "end" and not goes_on
        detail = "the events tell the end of the run, but there is no file" if is_missing else "the run is not finished"
        return Finding("summary.json", False if is_missing else None, detail)
    steps = summary.get("steps")
    if not isinstance(steps, int):
        return Finding("summary.json", False, "it does not tell how many steps the run took")
    flops, dense = books.flops_at(steps)
    expected = {
        "flops_train": flops,
        "flops_train_dense": dense,
        "samples": books.samples_at(steps),
        "attempts": sum(event["kind"] == "start" for event in books.events),
    }
    wrong = [
        f"{key} is {summary.get(key)}, not {value}" for key, value in expected.items() if summary.get(key) != value
    ]
    is_told = end["kind"] == "end" and end.get("summary") == summary
    if not is_told and not (goes_on and end["kind"] != "end"):
        wrong.append("it is not what the last event tells")
    detail = f"accuracy {summary.get('accuracy')}, as the events tell"
    return Finding("summary.json", not wrong, "; ".join(wrong) or detail)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is none, in which everything is then missing."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def check_fits(checkpoint: Checkpoint, config: Config, model: nn.Module) -> Structure:
    """Check that a checkpoint is one of a run: its settings, its structure, and its tensors, which are loaded.

    Args:
        checkpoint: What was read.
        config: The run.
        model: The run's dense network with its gates, on the CPU; is left as it is.

    Returns:
        The checkpoint's structure.

    Raises:
        CheckpointCorrupt: It is of another run; the message says what differs.
    """
    state = checkpoint.state
    try:
        theirs, mine = state["config"], shaping_values(config.to_dict())
        different = sorted(key for key in theirs.keys() & mine.keys() if theirs[key] != mine[key])
        if different:
            raise CheckpointCorrupt(f"of another run (it differs in {', '.join(different)})")
        structure = Structure.from_dict(state["structure"])
        if structure_text(structure.given()) != config.model.structure:
            raise CheckpointCorrupt("its structure does not begin with the one that the run was given")
        Ledger(**state["ledger"])
        StepTimes(**state["step_times"])
        if state["evaluation"] is not None:
            Evaluation(**state["evaluation"])
        if isinstance(state["step"], bool) or not isinstance(state["step"], int) or state["step"] < 0:
            raise CheckpointCorrupt(f"step {state['step']!r} is no number of steps")
        round_to = state.get("round_to", 1)
        if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
            raise CheckpointCorrupt(f"round_to {round_to!r} is no number of channels")
        network = copy.deepcopy(model)
        replay(structure, network)
    except (LookupError, TypeError, AttributeError, StructureMismatch) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointCorrupt(f"its state is not that of a run ({reason})") from None
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.model.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointCorrupt(f"its tensors are not those of its structure, first at {wrong[0]}")
    network.load_state_dict(checkpoint.model)
    return structure
