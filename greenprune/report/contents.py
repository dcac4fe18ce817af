"""Puts together what a report says of some runs: groups, spreads, fronts, differences, caveats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from greenprune.config import UserError, shaping_values
from greenprune.energy import CarbonIntensity
from greenprune.formatting import format_joules, format_number, format_percent
from greenprune.locking import is_held
from greenprune.report.comparison import set_against_twins
from greenprune.report.history import read_history
from greenprune.report.parts import FIGURES, Group, Report, ReportedRun, Spread, Task, spread_over
from greenprune.report.runs import (
    IMAGE_FOLDER,
    ComparedRun,
    find_runs,
    hardware_of,
    read_config,
    read_provenance,
    read_run,
    read_run_events,
)

_ALWAYS_DIFFERENT = ("output_dir", "run_name", "seed", "resume")
_ENVIRONMENT = {
    "greenprune revision": lambda made: str((made.get("git") or {}).get("revision"))[:10],
    "torch": lambda made: (made.get("versions") or {}).get("torch"),
    "processes": lambda made: made.get("processes"),
}  # fmt: skip
_FEW_KEYS = 3  # that a label tells one and all, so that the labels of a small grid read alike
_SUMMARY_KEYS = ("model", "gated", "budget_target", "budget_unit", "epochs", "batch_size", "precision")


def build_report(paths: Sequence[Path], notes: Sequence[str] = (), carbon: CarbonIntensity | None = None) -> Report:
    """Read runs, finished or not, and put together all that a report says of them.

    A run with a file that cannot be read is shown as such, and is in no comparison.

    Args:
        paths: Runs' folders, their summary.json, or folders that hold runs.
        notes: What else a reader must know of the runs; it comes first.
        carbon: Tell all CO2e at this intensity and PUE; None: at those of each run, where it knows them.

    Raises:
        UserError: There is no run at a path.
    """
    found, copies = find_runs(paths)
    read = [_read(path, name) for path, name in found.items()]
    comparison = set_against_twins([run.compared for run in read], carbon=carbon)
    runs = [replace(run, compared=compared) for run, compared in zip(read, comparison.runs, strict=True)]
    if carbon is not None:
        runs = [replace(run, history=run.history.at_intensity(carbon)) for run in runs]
    tasks = tuple(_task(*key, members) for key, members in sorted(_by_task(runs).items()))
    several = len(tasks) > 1
    groups = {
        f"{task.data}: {group.label}" if several else group.label: group for task in tasks for group in task.groups
    }
    told = (*notes, *copies, *comparison.notes, *_carbon_notes(groups), *_repeat_notes(groups), *_notes(runs))
    return Report(tasks, _differences(groups), told)


def _read(path: Path, name: str) -> ReportedRun:
    values = read_config(path)
    config = _flat(values)
    attempts = read_provenance(path)
    provenance = attempts[-1] if attempts else {}
    try:
        compared = read_run(path, name, values)
    except UserError as error:
        state = f"cannot be read: {str(error).removeprefix('RUN: ')}"
        unread = ComparedRun(path, name, {}, state, hardware_of(attempts))
        return ReportedRun(unread, read_history([]), config, provenance, None)
    events, damage = read_run_events(path)
    return ReportedRun(replace(compared, damage=damage), read_history(events), config, provenance, is_held(path))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in flat.items():
        owner, dot, name = key.partition(".")
        if dot:
            values.setdefault(owner, {})[name] = value
        else:
            values[key] = value
    return values


# Tasks.


def _by_task(runs: Sequence[ReportedRun]) -> dict[tuple[str, str], list[ReportedRun]]:
    """Runs that may be drawn together, by their data set, as people know it, and their kind of accuracy."""
    by_data: dict[tuple[str, str | None, Path | None], list[ReportedRun]] = {}
    seen = _digests_of_folders(runs)
    for run in runs:
        by_data.setdefault(_data_of(run, seen), []).append(run)
    named = [(_data_name(members), digest, members) for (_, digest, _), members in by_data.items()]
    names = [name for name, _, _ in named]
    by_task: dict[tuple[str, str], list[ReportedRun]] = {}
    for name, digest, members in named:
        # A folder that held other images at another time goes by one name.
        told = f"{name}, files {digest}" if digest is not None and names.count(name) > 1 else name
        for run in members:
            by_task.setdefault((told, str(run.compared.summary.get("accuracy_kind") or "unknown")), []).append(run)
    return by_task


def _digests_of_folders(runs: Iterable[ReportedRun]) -> dict[Path | None, set[str]]:
    """What is known to have been in each folder of images."""
    seen: dict[Path | None, set[str]] = {}
    for run in runs:
        if (digest := run.compared.summary.get("data_digest")) is not None:
            seen.setdefault(run.compared.images, set()).add(digest)
    return seen


def _data_of(run: ReportedRun, seen: dict[Path | None, set[str]]) -> tuple[str, str | None, Path | None]:
    """What tells a run's data set from others: its name, and of images of one's own what they are, else where."""
    summary, images = run.compared.summary, run.compared.images
    data = str(summary.get("data") or "unknown data")
    if data != IMAGE_FOLDER:
        return data, None, None
    digest = summary.get("data_digest")
    if digest is None and images is not None and len(seen.get(images, ())) == 1:  # of an older version
        (digest,) = seen[images]
    return data, digest, images if digest is None else None


def _data_name(runs: Sequence[ReportedRun]) -> str:
    """A data set as people know it: of images of one's own with the first folder that they were in."""
    data = str(runs[0].compared.summary.get("data") or "unknown data")
    return next((f"{data} {images}" for run in runs if (images := run.compared.images) is not None), data)


# Groups.


def _in_common(run: ReportedRun) -> dict[str, Any]:
    """What is the same for the runs of a group, which differ in their seed alone and whose joules can be averaged."""
    shaping = shaping_values(_nested(run.config)) if "gate.enabled" in run.config else {}
    shaping.pop("seed", None)
    if not shaping:
        shaping = {key: run.compared.summary.get(key) for key in _SUMMARY_KEYS}
    unreadable = {} if run.compared.summary or run.is_finished else {"run": run.name}
    return shaping | run.metering | unreadable


def _group_key(run: ReportedRun) -> str:
    return repr(sorted(_in_common(run).items(), key=lambda item: item[0]))


def _task(data: str, accuracy_kind: str, runs: Sequence[ReportedRun]) -> Task:
    by_key: dict[str, list[ReportedRun]] = {}
    for run in runs:
        by_key.setdefault(_group_key(run), []).append(run)
    several_models = len({run.compared.summary.get("model") for run in runs}) > 1
    members = list(by_key.values())
    labels = _labels(members, several_models)
    groups = [_group(label, runs_of) for label, runs_of in zip(labels, members, strict=True)]
    groups.sort(key=lambda group: (group.dense is not True, group.label))
    front, reason = _front(groups)
    return Task(data, accuracy_kind, tuple(groups), front, reason)


def _by_seed(run: ReportedRun) -> tuple[float, str]:
    """In the order of their seeds, then of their names; runs whose seed is unknown last."""
    return (math.inf if run.seed is None else run.seed, run.name)


def _group(label: str, runs: Sequence[ReportedRun]) -> Group:
    paired = [run for run in runs if run.is_finished and run.compared.against_twin is not None]
    ratios = [run.compared.against_twin or {} for run in paired]
    keys = dict.fromkeys(key for ratio in ratios for key in ratio)
    return Group(
        label=label,
        gated=_is_gated(runs[0]),
        dense=_is_dense(runs[0]),
        runs=tuple(sorted(runs, key=_by_seed)),
        spreads={key: _spread(runs, key) for key in FIGURES},
        against_twins={key: spread_over(paired, key, [ratio.get(key) for ratio in ratios]) for key in keys},
    )


def _spread(runs: Sequence[ReportedRun], key: str) -> Spread | None:
    counted = _in_mean(runs, key)
    if key == "co2_g" and len(_carbons(counted)) > 1:
        return None  # of joules that are not told alike there is no mean
    return spread_over(counted, key, [run.figure(key) for run in counted])


def _in_mean(runs: Iterable[ReportedRun], key: str) -> list[ReportedRun]:
    return [run for run in runs if run.is_finished and run.counts(key)]


def _carbons(runs: Iterable[ReportedRun]) -> dict[tuple[float | None, float], None]:
    """The carbon intensities with their PUEs that the CO2e of runs is told at, each once."""
    return dict.fromkeys(carbon for run in runs if (carbon := run.compared.carbon) is not None)


def _is_gated(run: ReportedRun) -> bool | None:
    gated: bool | None = run.compared.summary.get("gated", run.config.get("gate.enabled"))
    return gated


def _is_dense(run: ReportedRun) -> bool | None:
    if _is_gated(run) is not False:
        return None if _is_gated(run) is None else False
    given = run.compared.summary.get("structure_given", run.config.get("model.structure") is not None)
    return not given


def _labels(groups: Sequence[Sequence[ReportedRun]], several_models: bool) -> list[str]:
    """What each group is called: its gating, and as much else as tells it from the others."""
    alike: dict[str, list[ReportedRun]] = {}
    for runs in groups:
        alike.setdefault(_label(runs[0], several_models), []).append(runs[0])
    told = {
        run.name: f"{label} ({what})"
        for label, runs in alike.items()
        if len(runs) > 1
        for run, what in zip(runs, _what_differs(runs), strict=True)
    }
    labels = [told.get(runs[0].name) or _label(runs[0], several_models) for runs in groups]
    seen: dict[str, int] = {}
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[index] = label if seen[label] == 1 else f"{label} #{seen[label]}"
    return labels


def _label(run: ReportedRun, with_model: bool) -> str:
    summary, config = run.compared.summary, run.config
    if not summary:
        return run.name
    gated, dense = _is_gated(run), _is_dense(run)
    units = config.get("gate.units") or ["unknown"]
    target = summary.get("budget_target")
    budget = "" if target is None else f", keep {format_percent(target)}"
    name = f"{' + '.join(units)} gates{budget}" if gated else "dense" if dense else "structure given"
    name = "unknown gating" if gated is None else name
    return f"{summary.get('model')}, {name}" if with_model else name


def _what_differs(runs: Sequence[ReportedRun]) -> list[str]:
    """For a run of each of several groups what tells its group from the others, in as few keys as do so."""
    told = [{key: str(value) for key, value in _in_common(run).items()} for run in runs]
    keys = list(dict.fromkeys(key for one in told for key in one))
    names = _short_names(keys)
    differing = [key for key in keys if len({one.get(key) for one in told}) > 1]
    labels = []
    for run, one in zip(runs, told, strict=True):
        others = [other for other in told if other is not one]
        telling = _telling_keys(one, others, differing)
        parts = [f"{names[key]} {one[key]}" for key in telling]
        # A run of an older version may lack the keys that set others apart from it.
        if any(_alike(one, other, telling) for other in others):
            parts.append(f"as {run.name}")
        labels.append(", ".join(parts))
    return labels


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Keys of a config without their section, but for those that several sections have."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: key if ends.count(end) > 1 else end for key, end in zip(keys, ends, strict=True)}


def _telling_keys(one: dict[str, str], others: Sequence[dict[str, str]], differing: Sequence[str]) -> list[str]:
    """The keys to tell one of several by: those that differ, or of many as few as no other has alike."""
    mine = [key for key in differing if key in one]
    if len(differing) <= _FEW_KEYS:
        return mine
    chosen: set[str] = set()
    while rest := [other for other in others if _alike(one, other, chosen)]:
        shared = {key: sum(_alike(one, other, [key]) for other in rest) for key in mine}
        best = min(mine, key=shared.__getitem__, default=None)
        if best is None or shared[best] == len(rest):
            break
        chosen.add(best)
    return [key for key in mine if key in chosen]


def _alike(one: dict[str, str], other: dict[str, str], keys: Iterable[str]) -> bool:
    return all(one[key] == other.get(key) for key in keys)


def _values(run: ReportedRun) -> dict[str, Any]:
    """Its config and environment, less what differs from run to run anyway."""
    config = {key: value for key, value in run.config.items() if key not in _ALWAYS_DIFFERENT}
    if run.compared.hardware is not None:
        config["hardware"] = "; ".join(run.compared.hardware)
    made = run.provenance
    readers: dict[str, Callable[[dict[str, Any]], Any]] = _ENVIRONMENT
    return config | {key: read(made) for key, read in readers.items() if made}


def _differences(groups: dict[str, Group]) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Keys in which any two runs differ, with the values that the runs of each group have, by the groups' names."""
    values = {name: [_values(run) for run in group.runs] for name, group in groups.items()}
    keys = dict.fromkeys(key for those in values.values() for one in those for key in one)
    differences = {}
    for key in keys:
        by_group = {
            name: _distinct(one.get(key, "not in its config") for one in those) for name, those in values.items()
        }
        if len({repr(value) for those in by_group.values() for value in those}) > 1:
            differences[key] = by_group
    return differences


def _distinct(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple({repr(value): value for value in values}.values())


# The front.


def _front(groups: Sequence[Group]) -> tuple[tuple[str, ...] | None, str]:
    """Groups that no other beats in both mean accuracy and mean joules, by joules."""
    finished = [group for group in groups if group.spreads["accuracy"] and group.spreads["energy_j"]]
    if not finished:
        return None, "No front is drawn: no finished run has both an accuracy and joules that are complete."
    metering = {repr(run.metering) for group in finished for run in group.runs if run.is_finished}
    if len(metering) > 1 or any(len(run.compared.hardware or ()) > 1 for group in finished for run in group.runs):
        return None, "No front is drawn: these runs were not all metered alike, on the same hardware, executed alike."
    if any(run.compared.shared for group in finished for run in group.runs if run.is_finished):
        return None, "No front is drawn: joules of these runs count other work on a machine that they shared."
    points = sorted((_mean(group, "energy_j"), -_mean(group, "accuracy"), group.label) for group in finished)
    front: list[str] = []
    best = float("-inf")
    for _, negative, label in points:
        if -negative > best:
            front.append(label)
            best = -negative
    return tuple(front), "The Pareto front joins the means of finished runs that no other mean beats in both."


def _mean(group: Group, key: str) -> float:
    spread = group.spreads[key]
    assert spread is not None
    return spread.mean


# Caveats.


def _lost(run: ReportedRun) -> str:
    lost_j = run.compared.lost_j
    return f" ({format_joules(lost_j)} for work that was lost or done again)" if lost_j else ""


def _carbon_notes(groups: dict[str, Group]) -> list[str]:
    return [
        f"CO2e is told at different carbon intensities or PUEs, so there is no mean of it: {name}."
        for name, group in groups.items()
        if len(_carbons(_in_mean(group.runs, "co2_g"))) > 1
    ]


def _repeat_notes(groups: dict[str, Group]) -> list[str]:
    told = []
    for name, group in groups.items():
        seeds = [run.seed for run in group.runs if run.is_finished and run.seed is not None]
        if len(set(seeds)) < len(seeds):
            told.append(f"{name} ({len(seeds)} runs of {format_number(len(set(seeds)), 'seed')})")
    if not told:
        return []
    return [
        f"Runs repeat a seed: {'; '.join(told)}. Accuracy and FLOPs count each seed once, with its mean; joules, CO2e "
        "and seconds count each run, so their spread is not one over seeds."
    ]


def _notes(runs: Sequence[ReportedRun]) -> list[str]:
    """What the runs themselves say about their figures, each once, and what follows from their states."""
    notes: list[str] = []
    if any(run.compared.summary.get("energy_quality") == "estimate" for run in runs):
        notes.append(
            "Joules of quality 'estimate' come from a model of the machine, not from a meter: they follow the seconds "
            "and the load, and must not be taken for a measurement."
        )
    unfinished = [run.name for run in runs if not run.is_finished]
    if unfinished:
        notes.append(f"Not finished, so in no mean and no ratio: {', '.join(unfinished)}.")
    incomplete = [run.name for run in runs if not run.compared.energy_is_complete]
    if incomplete:
        notes.append(
            "Joules are a lower bound, because some could not be read, so in no mean and no ratio: "
            f"{', '.join(incomplete)}."
        )
    several = [run for run in runs if run.history.attempts > 1]
    if several:
        told_each = (f"{run.name} in {run.history.attempts}{_lost(run)}" for run in several)
        notes.append(f"Done in several attempts, whose joules all count: {', '.join(told_each)}.")
    twice = [run.name for run in runs if run.compared.has_lost_work]
    if twice:
        notes.append(
            "Joules and seconds include work that was lost and done again, or may, while FLOPs do not, so in no mean "
            f"and no ratio of joules, CO2e and time: {', '.join(twice)}."
        )
    revisions = {(run.provenance.get("git") or {}).get("revision") for run in runs if run.provenance}
    if len(revisions) > 1:
        notes.append("The runs were made by different revisions of greenprune; see the differences.")
    told = dict.fromkeys(" ".join(note.split()) for run in runs for note in run.history.start.get("notes", []))
    return notes + list(told)
