"""Runs side by side, and each gated run against its dense twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from greenprune.config import UserError
from greenprune.energy import CarbonIntensity
from greenprune.formatting import UNKNOWN, NamedFigures, format_joules, format_percent, format_seconds, format_si
from greenprune.report.runs import ComparedRun, find_runs, intensity_note, read_run, read_run_events
from greenprune.report.sharing import sharing_notes, with_sharing
from greenprune.tracking import Event, describe_damage

_TWIN_KEYS = ("model", "data", "seed", "epochs", "batch_size", "precision")
_OF_ENERGY = ("energy_j", "energy_to_accuracy_j", "co2_g")


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
        return Group(NamedFigures(table), *notes)

    @property
    def _knows_co2(self) -> bool:
        return any(run.summary.get("co2_g") is not None for run in self.runs)

    @property
    def _gates_channels(self) -> bool:
        return any(run.summary.get("channels_dense") for run in self.runs)


def compare_runs(
    paths: Sequence[Path], to_accuracy: float | None = None, carbon: CarbonIntensity | None = None
) -> Comparison:
    """Read runs and set each that is gated, or was given a structure, against its dense twin.

    The twin is the run that differs in that alone: nothing gated and nothing removed, and all else that shapes the
    result is the same; where a config.yaml is missing, model, data, seed, epochs, batch size and precision.

    Args:
        paths: Runs' folders, their summary.json, or folders that hold runs.
        to_accuracy: Also tell the joules that each run took until an evaluation reached this accuracy (0 to 1).
        carbon: Tell all CO2e at this intensity and PUE; None: at those of each run, where it knows them.

    Raises:
        UserError: There is no run at a path, a file of one cannot be read, or the accuracy is not a share.
    """
    if to_accuracy is not None and not 0 < to_accuracy <= 1:
        raise UserError(f"--to-accuracy: {to_accuracy!r} is not valid; expected a share in (0, 1]")
    found, copies = find_runs(paths)
    runs = [read_run(path, name) for path, name in found.items()]
    if to_accuracy is not None:
        runs = [_with_joules_to(run, to_accuracy) for run in runs]
    comparison = set_against_twins(runs, to_accuracy, carbon)
    return replace(comparison, notes=(*copies, *comparison.notes))


def set_against_twins(
    runs: list[ComparedRun], to_accuracy: float | None = None, carbon: CarbonIntensity | None = None
) -> Comparison:
    """Set each run that is not dense against its dense twin, if that is among the runs.

    Args:
        runs: What :func:`read_run` gave.
        to_accuracy: As for :func:`compare_runs`.
        carbon: As for :func:`compare_runs`.
    """
    notes = [] if carbon is None else [intensity_note(carbon)]
    notes += [
        f"events.jsonl of {run.name} cannot be read in whole ({describe_damage(run.damage)}): that is left out"
        for run in runs
        if run.damage
    ]
    if carbon is not None:
        runs = [run.at_intensity(carbon) for run in runs]
    runs = with_sharing(runs)
    notes += sharing_notes(runs)
    twins: dict[str, list[ComparedRun]] = {}
    for run in runs:
        if run.is_finished and run.is_dense:
            twins.setdefault(_twin_key(run), []).append(run)
    compared = tuple(_set_against_twin(run, twins.get(_twin_key(run), []), notes) for run in runs)
    return Comparison(compared, tuple(notes), to_accuracy)


def _with_joules_to(run: ComparedRun, accuracy: float) -> ComparedRun:
    events, damage = read_run_events(run.path)
    joules = energy_to_accuracy_j(events, accuracy)
    return replace(run, summary=run.summary | {"energy_to_accuracy_j": joules}, damage=damage)


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


# Comparing.


def _twin_key(run: ComparedRun) -> str:
    """What a run and its twin have in common, whatever they tell besides."""
    return repr([run.summary.get(key) for key in _TWIN_KEYS])


def _set_against_twin(run: ComparedRun, candidates: list[ComparedRun], notes: list[str]) -> ComparedRun:
    """The run against its twin among the finished dense runs that have its key."""
    if not run.is_finished or run.is_dense:
        return run
    twins = [other for other in candidates if _is_twin(other, run)]
    twin = max(twins, key=lambda other: _likeness(run, other), default=None)
    if twin is None:
        dense = "--gate.enabled false" if run.summary.get("gated") else "--model.structure null"
        notes.append(f"{run.name} has no dense twin here: the same config with {dense}")
        return run
    return replace(run, twin=twin.name, against_twin=_ratios(run, twin, notes))


def _is_twin(other: ComparedRun, run: ComparedRun) -> bool:
    if run.dense_config is not None and other.dense_config is not None:
        mine, theirs = run.dense_config, other.dense_config  # of an older version one may lack fields
        if any(mine[key] != theirs[key] for key in mine.keys() & theirs.keys()):
            return False
    return _same_data(run, other)


def _likeness(run: ComparedRun, other: ComparedRun) -> tuple[bool, ...]:
    """How much a dense run tells as a twin: what its ratios need, first what most of them need."""
    return (
        _same_machine(run, other),
        not _executed_otherwise(run, other),
        not other.has_lost_work,
        other.energy_is_complete,
        not other.shared,
        _metered_alike(run, other),
        _same_carbon(run, other),
    )


def _same_data(run: ComparedRun, other: ComparedRun) -> bool:
    """Whether two runs on sets of one name had the same samples, as far as it is known."""
    digests = run.summary.get("data_digest"), other.summary.get("data_digest")
    if None not in digests:
        return digests[0] == digests[1]
    return run.images is None or other.images is None or run.images == other.images


def _same_machine(run: ComparedRun, other: ComparedRun) -> bool:
    same = all(run.summary.get(key) == other.summary.get(key) for key in ("device", "world_size"))
    known = run.hardware is not None and other.hardware is not None
    return same and (not known or len({*(run.hardware or ()), *(other.hardware or ())}) == 1)


def _executed_otherwise(run: ComparedRun, other: ComparedRun) -> list[str]:
    """Keys of the config in which the steps of two runs were not executed alike; of an older version one may lack."""
    mine, theirs = run.execution, other.execution
    return [key for key in mine if key in theirs and mine[key] != theirs[key]]


def _metered_alike(run: ComparedRun, other: ComparedRun) -> bool:
    return (run.summary.get("energy_quality"), run.meters) == (other.summary.get("energy_quality"), other.meters)


def _same_carbon(run: ComparedRun, other: ComparedRun) -> bool:
    """Whether a joule is told as the same CO2e in two runs, as far as it is told at all."""
    return None in (run.carbon, other.carbon) or run.carbon == other.carbon


def _ratios(run: ComparedRun, twin: ComparedRun, notes: list[str]) -> dict[str, float | None]:
    """Accuracy in points above the twin's, everything else as a multiple of it."""
    mine, theirs = run.summary, twin.summary
    energies = [key for key in _OF_ENERGY if key in mine]
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
    told, withheld = _unlike(run, twin)
    notes += [told] if told else []
    return ratios | {key: None for key in withheld if key in ratios}


def _unlike(run: ComparedRun, twin: ComparedRun) -> tuple[str, tuple[str, ...]]:
    """What would make ratios tell of more than the networks, as a note, and these ratios; empty if nothing does."""
    both = f"{run.name} and {twin.name}"
    if not _same_machine(run, twin):
        what = f"{both} ran on different hardware: no ratios of joules, CO2e and seconds"
        return what, (*_OF_ENERGY, "time_s", "step_time_s")
    if keys := _executed_otherwise(run, twin):
        what = f"{both} differ in {' and '.join(keys)}: no ratios of joules, CO2e and seconds"
        return what, (*_OF_ENERGY, "time_s", "step_time_s")
    if twice := [one.name for one in (run, twin) if one.has_lost_work]:
        what = f"{' and '.join(twice)} did work twice, or may have: no ratios of joules, CO2e and time"
        return what, (*_OF_ENERGY, "time_s")
    if incomplete := [one.name for one in (run, twin) if not one.energy_is_complete]:
        what = f"some joules of {' and '.join(incomplete)} could not be read: no ratios of joules and CO2e"
        return what, _OF_ENERGY
    if run.shared or twin.shared:  # which a note of its own tells
        return "", _OF_ENERGY
    if not _metered_alike(run, twin):
        return f"{both} were not metered alike: no ratios of joules and CO2e", _OF_ENERGY
    if not _same_carbon(run, twin):
        return f"CO2e of {both} is told at different carbon intensities or PUEs: no ratio of CO2e", ("co2_g",)
    return "", ()


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
    ratio = run.against_twin.get(key)  # not there if the summary lacks the figure
    if ratio is None:
        return "-"
    return f"{ratio:+.2f} pts" if key == "accuracy_points" else f"{ratio:.2f}x"
