"""Runs whose machine did other work beside them, which the joules of what they shared with it count as well."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from greenprune.report.attempts import Allotment, Attempt
from greenprune.report.runs import ComparedRun

_LEAST_SHARE = 0.01  # of a run's time: less of other work is not seen in its joules
_GPU = re.compile(r"\b(?:GPU|MIG)-[\w-]+")
_TOLD = 10  # names in a note
_HOST, _GPUS = "CPU and memory", "GPU"


def with_sharing(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """The runs with which others each shared a machine, and of what its joules count other work.

    Args:
        runs: All that are known to have been there, finished or not.
    """
    gpus = [_gpus(run) for run in runs]
    overlaps_s: list[dict[int, float]] = [{} for _ in runs]
    for mine, other, overlap_s in _overlaps(runs, gpus):
        for one, beside in ((mine, other), (other, mine)):
            overlaps_s[one][beside] = overlaps_s[one].get(beside, 0.0) + overlap_s
    return [_with_sharing(number, runs, gpus, overlaps_s[number]) for number in range(len(runs))]


def _with_sharing(
    number: int, runs: Sequence[ComparedRun], gpus: Sequence[frozenset[str]], overlaps_s: dict[int, float]
) -> ComparedRun:
    run = runs[number]
    own_s = sum(attempt.ended_s - attempt.begun_s for attempt in run.attempts)
    beside = sorted(overlaps_s) if sum(overlaps_s.values()) >= _LEAST_SHARE * own_s else []
    shared_gpu = [other for other in beside if gpus[other] & gpus[number]]
    neighbours = beside if run.counts_host else shared_gpu
    in_part = run.allotment is not None and run.allotment.by_slurm
    shared = [_GPUS] if shared_gpu else []
    shared += [_HOST] if run.counts_host and (beside or in_part) else []
    return replace(run, neighbours=tuple(runs[other].name for other in neighbours), shared=tuple(shared))


def _gpus(run: ComparedRun) -> frozenset[str]:
    """The GPUs whose joules a run counts, by UUID."""
    devices = run.summary.get("energy_by_device_j") or {}
    return frozenset(
        found.group() for name, joules in devices.items() if joules is not None for found in _GPU.finditer(name)
    )


def _overlaps(runs: Sequence[ComparedRun], gpus: Sequence[frozenset[str]]) -> Iterator[tuple[int, int, float]]:
    """Each two attempts of two runs that were on one machine at once: the runs' numbers, and for how many seconds."""
    spans = [(attempt, number) for number, run in enumerate(runs) for attempt in run.attempts]
    spans = [(attempt, number) for attempt, number in spans if attempt.machines or attempt.host or gpus[number]]
    going_on: list[tuple[Attempt, int]] = []
    for mine, number in sorted(spans, key=lambda span: span[0].begun_s):
        going_on = [(other, beside) for other, beside in going_on if other.ended_s > mine.begun_s]
        for other, beside in going_on:
            if beside != number and (mine.is_where(other) or gpus[number] & gpus[beside]):
                yield number, beside, min(mine.ended_s, other.ended_s) - mine.begun_s
        going_on.append((mine, number))


# What a reader must know of it.


def sharing_notes(runs: Sequence[ComparedRun]) -> list[str]:
    """A line for all runs that were on one machine, and one for all that had the same part of theirs.

    Args:
        runs: What :func:`with_sharing` gave.
    """
    doubtful = [run for run in runs if run.is_finished and run.neighbours]
    notes = [_note_of_neighbours(those) for those in _by_machine(doubtful)]
    in_part: dict[Allotment, list[str]] = {}
    for run in runs:
        if run.is_finished and run.allotment is not None and run.counts_host:
            in_part.setdefault(run.allotment, []).append(run.name)
    return notes + [_note_of_part(part, names) for part, names in in_part.items()]


def _by_machine(runs: Sequence[ComparedRun]) -> list[list[ComparedRun]]:
    """Runs with neighbours, those together that are linked by them, in their order."""
    beside: dict[str, set[str]] = {}
    for run in runs:
        for name in run.neighbours:
            beside.setdefault(run.name, set()).add(name)
            beside.setdefault(name, set()).add(run.name)
    machines: list[list[ComparedRun]] = []
    number_of: dict[str, int] = {}
    for run in runs:
        if run.name not in number_of:
            waiting = [run.name]
            while waiting:
                name = waiting.pop()
                if name not in number_of:
                    number_of[name] = len(machines)
                    waiting += beside[name]
            machines.append([])
        machines[number_of[run.name]].append(run)
    return machines


def _note_of_neighbours(runs: Sequence[ComparedRun]) -> str:
    names = {run.name: run for run in runs}
    others = dict.fromkeys(name for run in runs for name in run.neighbours if name not in names)
    shared = [part for part in (_GPUS, _HOST) if any(part in run.shared for run in runs)]
    beside = f" with {_listed(list(others))}" if others else ""
    they = "it" if len(names) == 1 else "they"
    what = f"{_listed(list(names))} shared a machine{beside} while {they} ran"
    joules = f"the joules of its {', '.join(shared)} count the work of all of them"
    return f"{what}: {joules}, so no ratios of joules and CO2e"


def _note_of_part(part: Allotment, names: Sequence[str]) -> str:
    whose = "its machine" if len(names) == 1 else "their machines"
    what = f"{part.cores} of the {part.of} cores of {whose}"
    if not part.by_slurm:
        return f"{_listed(names)} could use {what}: what else went on there is in the joules of {_HOST}"
    return (
        f"{_listed(names)} had {what}: the joules of {_HOST} count the work of other jobs there too, so no ratios of "
        "joules and CO2e (exclusive: true in a site profile gives a job whole machines)"
    )


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence, of many the first ones."""
    if len(names) > _TOLD:
        return f"{', '.join(names[:_TOLD])} and {len(names) - _TOLD:,} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
