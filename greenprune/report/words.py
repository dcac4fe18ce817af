"""A report's figures in words and cells: what every form of it, on paper or as data, has in common."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from greenprune.energy import format_intensity
from greenprune.formatting import UNKNOWN, format_joules, format_percent, format_seconds, format_si
from greenprune.report.parts import Group, Report, ReportedRun, Spread, Task


class Cell(NamedTuple):
    """A figure as people read it, and below it how it stands to the dense twin's or how good it is."""

    text: str
    below: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the summary table.

    Attributes:
        title: Its heading.
        about: Unit or meaning, in a few words.
        run: Its cell of a run.
        group: Its cell of a group of several runs.
    """

    title: str
    about: str
    run: Callable[[ReportedRun], Cell]
    group: Callable[[Group], Cell]


def columns_of(task: Task) -> list[Column]:
    """The columns that have something to say of a task's runs."""
    runs = [run for group in task.groups for run in group.runs]
    shown = dict(_COLUMNS)
    if not any(run.compared.summary.get("channels_dense") for run in runs):
        del shown["channels"]
    if not any(run.compared.summary.get("co2_g") is not None for run in runs):
        del shown["co2_g"]
    return list(shown.values())


def cells_of_run(run: ReportedRun, columns: Sequence[Column]) -> list[Cell]:
    """A run's row."""
    return [column.run(run) for column in columns]


def cells_of_group(group: Group, columns: Sequence[Column]) -> list[Cell]:
    """A group's row: means and standard deviations of its finished runs."""
    return [column.group(group) for column in columns]


def format_spread(spread: Spread | None, form: Callable[[float], str]) -> str:
    """A mean with its standard deviation: ``418 J ± 20.1 J``; ``unknown`` for None."""
    if spread is None:
        return UNKNOWN
    return form(spread.mean) if spread.sd is None else f"{form(spread.mean)} ± {form(spread.sd)}"


def format_ratio(spread: Spread | None) -> str:
    """A mean of ratios to the twins: ``0.65 ± 0.01 x``; empty for None."""
    if spread is None:
        return ""
    return f"{spread.mean:.2f}" + ("x" if spread.sd is None else f" ± {spread.sd:.2f}x")


def findings_of(task: Task) -> list[str]:
    """A sentence for each group: what it reached and spent, and how that stands to its dense twins."""
    return [_finding(group) for group in task.groups]


def _finding(group: Group) -> str:
    finished = sum(run.is_finished for run in group.runs)
    of_runs = f"{len(group.runs)} {'run' if len(group.runs) == 1 else 'runs'}"
    if not finished:
        return f"{group.label}: none of {of_runs} is finished; {group.runs[0].state}."
    accuracy = format_spread(group.spreads["accuracy"], lambda value: format_percent(value, 2))
    text = f"{group.label}: {accuracy} with {format_spread(group.spreads['energy_j'], format_joules)}"
    text += f" ({_qualities(group)})" if group.spreads["energy_j"] else ""
    text += "" if finished == len(group.runs) else f", from {finished} of {of_runs}"
    points, flops = group.against_twins.get("accuracy_points"), group.against_twins.get("flops_train")
    if points is None and flops is None:
        return text + (". No dense twin among these runs." if group.dense is False else ".")
    told = []
    if points is not None:
        told.append(f"{points.mean:+.2f}" + (f" ± {points.sd:.2f}" if points.sd is not None else "") + " points")
    if flops is not None:
        told.append(f"{format_ratio(flops)} the training FLOPs")
    energy = group.against_twins.get("energy_j")
    told.append(f"{format_ratio(energy)} the joules" if energy else "joules not comparable")
    pairs = max(spread.n for spread in (points, flops) if spread is not None)
    return f"{text}. Against its dense {'twin' if pairs == 1 else f'twins, {pairs} pairs'}: {', '.join(told)}."


def _qualities(group: Group) -> str:
    qualities = dict.fromkeys(
        str(run.compared.summary.get("energy_quality") or "quality unknown") for run in group.runs
    )
    return ", ".join(qualities)


# Columns.


def _ratio_below(run: ReportedRun, key: str) -> str:
    against = run.compared.against_twin
    ratio = None if against is None else against.get(key)
    if ratio is None:
        return ""
    return f"{ratio:+.2f} points" if key == "accuracy_points" else f"{ratio:.2f}x"


def _figure_column(key: str, title: str, about: str, form: Callable[[float | None], str], ratio: str) -> Column:
    def of_group(group: Group) -> Cell:
        against = group.against_twins.get(ratio)
        if ratio == "accuracy_points" and against is not None:
            spread = "" if against.sd is None else f" ± {against.sd:.2f}"
            return Cell(format_spread(group.spreads[key], form), f"{against.mean:+.2f}{spread} points")
        return Cell(format_spread(group.spreads[key], form), format_ratio(against))

    return Column(title, about, lambda run: Cell(form(run.figure(key)), _ratio_below(run, ratio)), of_group)


def _count_cell(run: ReportedRun, key: str) -> Cell:
    summary = run.compared.summary
    left, dense = summary.get(key), summary.get(f"{key}_dense")
    if left is None or dense is None:
        return Cell(UNKNOWN)
    return Cell(f"{left:,}/{dense:,}") if dense else Cell("-")


def _count_of_group(group: Group, key: str) -> Cell:
    counts = [run.compared.summary.get(key) for run in group.runs if run.is_finished]
    known = [count for count in counts if count is not None]
    if not known:
        return Cell(UNKNOWN)
    if key == "channels" and not any(run.compared.summary.get("channels_dense") for run in group.runs):
        return Cell("-")
    return Cell(f"{min(known):,}" if min(known) == max(known) else f"{min(known):,} to {max(known):,}")


def _count_column(key: str, about: str) -> Column:
    return Column(key, about, lambda run: _count_cell(run, key), lambda group: _count_of_group(group, key))


def _kept(run: ReportedRun) -> Cell:
    summary = run.compared.summary
    if run.compared.is_dense:
        return Cell("-")
    if not summary.get("gated"):
        given = summary.get("structure_given")
        return Cell(format_percent(summary.get("kept_cost"), 1), "given before training") if given else Cell(UNKNOWN)
    return Cell(format_percent(summary.get("kept_cost"), 1), f"budget {format_percent(summary.get('budget_target'))}")


def _kept_of_group(group: Group) -> Cell:
    cells = [_kept(run) for run in group.runs if run.is_finished]
    costs = [run.compared.summary.get("kept_cost") for run in group.runs if run.is_finished]
    known = [cost for cost in costs if cost is not None]
    if not known or len(known) < len(costs) or cells[0].text == "-":
        return Cell(cells[0].text if cells else UNKNOWN)
    low, high = format_percent(min(known), 1), format_percent(max(known), 1)
    return Cell(low if low == high else f"{low} to {high}", cells[0].below)


def _energy_cell(run: ReportedRun) -> Cell:
    summary = run.compared.summary
    energy_j = run.figure("energy_j")
    least = "at least " if energy_j is not None and summary.get("energy_complete") is False else ""
    bound = summary.get("energy_bound_j")
    text = f"{least}{format_joules(energy_j)}" + (f" ± {format_joules(bound)}" if bound is not None else "")
    return Cell(text, _ratio_below(run, "energy_j"))


def _metered_by(run: ReportedRun) -> Cell:
    summary = run.compared.summary
    quality = summary.get("energy_quality")
    named = (str(source).partition(":")[0] for _, source, of in run.energy_sources if of)
    sources = dict.fromkeys(named)
    return Cell(quality or "nothing could be read", ", ".join(sources))


def _metered_of_group(group: Group) -> Cell:
    cells = dict.fromkeys(_metered_by(run) for run in group.runs)
    texts, belows = dict.fromkeys(cell.text for cell in cells), dict.fromkeys(cell.below for cell in cells)
    return Cell(", ".join(texts), ", ".join(filter(None, belows)))


def _energy_column() -> Column:
    plain = _figure_column("energy_j", "energy", "whole run", format_joules, "energy_j")
    return Column(plain.title, plain.about, _energy_cell, plain.group)


def _grams(value: float | None) -> str:
    return format_si(value, "g")


def _accuracy(value: float | None) -> str:
    return format_percent(value, 2)


_COLUMNS: dict[str, Column] = {
    "accuracy": _figure_column("accuracy", "accuracy", "share right", _accuracy, "accuracy_points"),
    "energy": _energy_column(),
    "metered": Column("metered by", "quality, source", _metered_by, _metered_of_group),
    "co2_g": _figure_column("co2_g", "CO2e", "whole run", _grams, "co2_g"),
    "flops_train": _figure_column("flops_train", "training", "FLOPs", format_si, "flops_train"),
    "flops_forward": _figure_column("flops_forward", "inference", "FLOPs an image", format_si, "flops_forward"),
    "kept": Column("kept cost", "against the budget", _kept, _kept_of_group),
    "blocks": _count_column("blocks", "left of all"),
    "channels": _count_column("channels", "left of gated"),
    "time_s": _figure_column("time_s", "time", "whole run", format_seconds, "time_s"),
    "step_time_s": _figure_column("step_time_s", "a step", "median, as it is now", format_seconds, "step_time_s"),
}


# Where figures come from.


class Source(NamedTuple):
    """Where a figure comes from and how good it is."""

    figure: str
    source: str
    quality: str


def where_from(report: Report) -> list[Source]:
    """The source and the quality of every figure of the summary table."""
    samples = {
        f"{run.compared.summary.get('accuracy_kind')} set"
        + (f" of {run.history.start['eval_samples']:,} images" if run.history.start.get("eval_samples") else "")
        + f" ({run.compared.summary.get('data')})"
        for run in report.runs
        if run.compared.summary.get("accuracy_kind")
    }
    meters: dict[str, dict[str, None]] = {}
    for run in report.runs:
        for device, source, quality in run.energy_sources:
            told = f"{device}: {source}" if source else f"{device}: not measured"
            meters.setdefault(quality or "unknown", {})[told] = None
    intensities = dict.fromkeys(
        f"{format_intensity(g_per_kwh)}, {run.compared.summary.get('carbon_intensity_source') or UNKNOWN}"
        for run in report.runs
        if (g_per_kwh := run.compared.summary.get("carbon_intensity_g_per_kwh")) is not None
    )
    rows = [
        Source("accuracy", f"last evaluation, {'; '.join(sorted(samples)) or UNKNOWN}", "measured"),
        *(Source("energy", "; ".join(told), quality) for quality, told in meters.items()),
        Source(
            "CO2e", "; ".join(intensities) or "no country or intensity was set", "computed" if intensities else UNKNOWN
        ),
        Source("training, inference", "counted from the layers that are there; a multiply-add is 2", "counted"),
        Source("kept cost, blocks, channels", "the structure of the network", "counted"),
        Source("time, a step", "wall clock; a step is the median after the last removal", "measured"),
    ]
    if meters:
        return rows
    known = any(run.figure("energy_j") is not None for run in report.runs)
    return [*rows, Source("energy", UNKNOWN if known else "nothing was metered", UNKNOWN)]


# Forms that need no library.


def render_json(report: Report) -> str:
    """Everything, as one JSON object."""
    return json.dumps(report.to_dict(), indent=1) + "\n"


_CSV_KEYS = (
    "model",
    "data",
    "seed",
    "gated",
    "epochs",
    "batch_size",
    "precision",
    "accuracy",
    "accuracy_kind",
    "loss",
    "energy_j",
    "energy_bound_j",
    "energy_complete",
    "energy_quality",
    "co2_g",
    "carbon_intensity_g_per_kwh",
    "flops_train",
    "flops_train_dense",
    "flops_forward",
    "flops_forward_dense",
    "params",
    "params_dense",
    "kept_cost",
    "budget_target",
    "budget_unit",
    "gates_left",
    "blocks",
    "blocks_dense",
    "channels",
    "channels_dense",
    "time_s",
    "samples",
    "attempts",
    "device",
    "world_size",
)


def render_csv(report: Report) -> str:
    """One row for each run, with raw numbers; what is unknown is empty."""
    ratios = dict.fromkeys(key for run in report.runs for key in run.compared.against_twin or {})
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    head = ["run", "path", "group", "state", *_CSV_KEYS, "step_time_s", "energy_sources", "hardware", "twin"]
    writer.writerow([*head, *(f"twin_ratio_{key}" for key in ratios)])
    for group in report.groups:
        for run in group.runs:
            summary = run.compared.summary
            sources = "; ".join(f"{d}: {s} ({q})" for d, s, q in run.energy_sources if q)
            against = run.compared.against_twin or {}
            row = [run.name, run.compared.path, group.label, run.state, *(summary.get(key) for key in _CSV_KEYS)]
            row += [run.compared.step_time_s, sources, "; ".join(run.compared.hardware or ()), run.compared.twin]
            writer.writerow([*row, *(against.get(key) for key in ratios)])
    return stream.getvalue()


def render_markdown(report: Report) -> str:
    """The tables and the words, for a page or a chat that shows Markdown."""
    lines = ["# Runs compared", ""]
    for task in report.tasks:
        columns = columns_of(task)
        lines += [f"## {_escape(f'{task.data}, {task.accuracy_kind} accuracy')}", ""]
        lines += [f"- {_escape(finding)}" for finding in findings_of(task)]
        front = task.front_reason + (f" On it: {', '.join(task.front)}." if task.front else "")
        lines += ["", _escape(front), ""]
        lines += _table(["run", *(f"{column.title} ({column.about})" for column in columns)], _rows(task, columns))
    if report.differences:
        names = list(next(iter(report.differences.values())))
        rows = [
            [key, *(format_values(by_group[name]) for name in names)] for key, by_group in report.differences.items()
        ]
        lines += ["## What differs between the configs", "", *_table(["key", *names], rows)]
    lines += ["## Where the figures come from", ""]
    lines += _table(["figure", "source", "quality"], [list(source) for source in where_from(report)])
    lines += ["## Caveats", "", *(f"- {_escape(note)}" for note in report.notes), ""]
    return "\n".join(lines)


def format_values(values: Sequence[Any]) -> str:
    """What the runs of a group have for a key, as a config file would show it."""
    return " or ".join("null" if value is None else _plain(value) for value in values)


def _plain(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )


def _rows(task: Task, columns: Sequence[Column]) -> list[list[str]]:
    rows = []
    for group in task.groups:
        if len(group.runs) > 1:
            cells = cells_of_group(group, columns)
            rows.append([f"**{_escape(group.label)}**, {len(group.runs)} runs", *(_one_line(cell) for cell in cells)])
        for run in group.runs:
            standing = run.compared.standing if run.is_finished else run.state
            rows.append([f"{run.name} ({standing})", *(_one_line(cell) for cell in cells_of_run(run, columns))])
    return rows


def _one_line(cell: Cell) -> str:
    return f"{cell.text} ({cell.below})" if cell.below else cell.text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines), ""]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
