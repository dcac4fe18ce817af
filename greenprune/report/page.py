"""A report as one HTML file that needs nothing else: figures, tables and the library that draws them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import resources
from typing import Any, NamedTuple

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from greenprune.formatting import UNKNOWN, format_joules, format_percent, format_si
from greenprune.report.figures import (
    GONE,
    NOT_KNOWN,
    Style,
    accuracy_against_joules,
    flops_over_epochs,
    gate_map_figure,
    group_styles,
    joules_by_part,
    joules_over_epochs,
    mean_over_epochs,
    part_means,
    parts_by_size,
)
from greenprune.report.history import BlockFate, Change
from greenprune.report.parts import Group, Report, ReportedRun, Task
from greenprune.report.words import (
    cells_of_group,
    cells_of_run,
    columns_of,
    findings_of,
    format_values,
    where_from,
)


class _Figure(NamedTuple):
    """A figure on the page: its id, what it is called, what it says in words, and a note on how to read it."""

    name: str
    title: str
    alt: str
    note: str


def render_page(report: Report, version: str) -> str:
    """The whole HTML file.

    Args:
        report: What it says.
        version: Of the program.
    """
    templates = resources.files("greenprune.report")
    loader = jinja2.DictLoader({"page": (templates / "page.html.jinja").read_text("utf-8")})
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["values"] = format_values
    environment.filters["breakable"] = _breakable
    figures: dict[str, go.Figure] = {}
    styles = group_styles(report)
    tasks = [_task(number, task, styles, figures) for number, task in enumerate(report.tasks)]
    networks = [_network(number, run, figures) for number, run in enumerate(report.runs)]
    return environment.get_template("page").render(
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        version=version,
        title=_title(report),
        runs=len(report.runs),
        tasks=tasks,
        legend=[
            _legend(group, styles[id(group)], task.data if len(report.tasks) > 1 else None)
            for task in report.tasks
            for group in task.groups
        ],
        networks=networks,
        first_network=next((network["name"] for network in networks if network["changes"]), None),
        differences=report.differences,
        group_names=list(next(iter(report.differences.values()), {})),
        sources=where_from(report),
        notes=report.notes,
        style=(templates / "page.css").read_text("utf-8"),
        script=(templates / "page.js").read_text("utf-8"),
        plotly=get_plotlyjs(),
        # Not with orjson, where that is installed: it refuses names of files that are no text.
        figures=_embed({name: json.loads(figure.to_json(engine="json")) for name, figure in figures.items()}),
        facts=_embed(
            {
                "gone": GONE,
                "notKnown": NOT_KNOWN,
                "runs": {
                    run.name: {"group": styles[id(group)].number, "twin": run.compared.twin}
                    for group in report.groups
                    for run in group.runs
                },
            }
        ),
    )


def _breakable(text: str) -> str:
    """A figure that may be broken before its deviation, and nowhere else."""
    return text.replace(" ", "\u00a0").replace("\u00a0±", " ±")


def _embed(values: object) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def _title(report: Report) -> str:
    runs = report.runs
    if len(runs) == 1:
        return runs[0].name
    models = {str(run.compared.summary.get("model")) for run in runs if run.compared.summary}
    return f"{' and '.join(sorted(models)) or 'Runs'} on {' and '.join(task.data for task in report.tasks)}"


def _legend(group: Group, style: Style, data: str | None) -> dict[str, Any]:
    seeds = [str(seed) for seed in dict.fromkeys(group.seeds) if seed is not None]
    return {
        "number": style.number,
        "label": group.label if data is None else f"{data}: {group.label}",
        "colour": style.colour,
        "dense": group.dense is True,
        "about": f"{len(group.runs)} {'run' if len(group.runs) == 1 else 'runs'}"
        + (f", {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}" if seeds else ""),
        "runs": [run.name for run in group.runs],
    }


# A task: table and figures.


def _task(number: int, task: Task, styles: dict[int, Style], figures: dict[str, go.Figure]) -> dict[str, Any]:
    columns = columns_of(task)
    groups = [
        {
            "number": styles[id(group)].number,
            "colour": styles[id(group)].colour,
            "label": group.label,
            "cells": cells_of_group(group, columns) if len(group.runs) > 1 else None,
            "runs": [
                {"name": run.name, "state": _standing(run), "cells": cells_of_run(run, columns)} for run in group.runs
            ],
        }
        for group in task.groups
    ]
    shown = []
    for figure, drawn in _figures_of(f"t{number}", task, styles):
        if drawn is not None:
            figures[figure.name] = drawn
        shown.append({"figure": figure, "drawn": drawn is not None})
    return {
        "id": f"t{number}",
        "heading": f"{task.data}, {task.accuracy_kind} accuracy",
        "findings": findings_of(task),
        "columns": columns,
        "groups": groups,
        "figures": shown,
        "epochs": _epoch_table(task),
        "parts": [_part_table(task, part) for part in ("phase", "device")],
    }


def _standing(run: ReportedRun) -> str:
    return run.compared.standing if run.is_finished else run.state


def _figures_of(prefix: str, task: Task, styles: dict[int, Style]) -> Iterable[tuple[_Figure, go.Figure | None]]:
    means = [
        f"{group.label}: {format_percent(accuracy.mean, 2)} at {format_joules(energy.mean)}"
        for group in task.groups
        if (accuracy := group.spreads["accuracy"]) and (energy := group.spreads["energy_j"])
    ]
    yield (
        _Figure(
            f"{prefix}-accuracy",
            "Accuracy against joules",
            f"Scatter of accuracy over joules. Means: {'; '.join(means) or 'none, no run is finished'}.",
            "Small marks are runs, open ones are not finished; large marks are means with their standard deviations. "
            + task.front_reason
            + (f" On it: {', '.join(task.front)}." if task.front else ""),
        ),
        accuracy_against_joules(task, styles),
    )
    yield (
        _Figure(
            f"{prefix}-joules",
            "Joules so far",
            f"Joules so far at the end of each epoch. {_last_means(task, 'energy_j')}",
            "Thin lines are runs, thick ones means of finished runs; dense runs are dashed, unfinished ones dotted.",
        ),
        joules_over_epochs(task, styles),
    )
    yield (
        _Figure(
            f"{prefix}-flops",
            "Training FLOPs so far",
            f"FLOPs of training so far at the end of each epoch. {_last_means(task, 'flops_train')}",
            "The dotted grey line is counted: what the dense network takes for the same samples.",
        ),
        flops_over_epochs(task, styles),
    )
    for part in ("phase", "device"):
        yield (
            _Figure(
                f"{prefix}-{part}",
                f"Joules by {part}",
                f"Stacked bars of joules by {part}, one for each group; the table below has the numbers.",
                "Means of finished runs."
                + (" Each device is named with its source and how good that is." if part == "device" else ""),
            ),
            joules_by_part(task, styles, part),
        )


def _last_means(task: Task, key: str) -> str:
    told = []
    for group in task.groups:
        means = mean_over_epochs(group, key)
        if means:
            epoch, value = list(means.items())[-1]
            amount = format_joules(value) if key == "energy_j" else format_si(value, "FLOPs")
            told.append(f"{group.label}: {amount} after epoch {epoch}")
    return f"{'; '.join(told) or 'There is no mean'}."


def _epoch_table(task: Task) -> dict[str, Any]:
    """Means by epoch as a table, for those who cannot see the figures."""
    joules = [mean_over_epochs(group, "energy_j") for group in task.groups]
    flops = [mean_over_epochs(group, "flops_train") for group in task.groups]
    accuracy = [mean_over_epochs(group, "accuracy") for group in task.groups]
    epochs = sorted({epoch for means in (*joules, *flops, *accuracy) for epoch in means})
    rows = [
        (
            epoch,
            [
                (
                    format_percent(accuracy[index].get(epoch), 2),
                    format_joules(joules[index].get(epoch)),
                    format_si(flops[index].get(epoch)),
                )
                for index in range(len(task.groups))
            ],
        )
        for epoch in epochs
    ]
    return {"groups": [group.label for group in task.groups], "rows": rows}


def _part_table(task: Task, part: str) -> dict[str, Any]:
    means = part_means(task, part)
    return {
        "part": part,
        "groups": [group.label for group in task.groups],
        "rows": [
            (name, [format_joules(by_part[name]) if name in by_part else "-" for by_part in means])
            for name in parts_by_size(means)
        ],
    }


# A network: its gate map and its blocks.


def _network(number: int, run: ReportedRun, figures: dict[str, go.Figure]) -> dict[str, Any]:
    gates = run.history.gate_map
    name = f"n{number}"
    has_map = bool(gates.units and gates.epochs)
    if has_map:
        figures[name] = gate_map_figure(gates)
    blocks = [_block(fate) for fate in run.history.network]
    stages: dict[str, list[dict[str, Any]]] = {}
    for block in blocks:
        stages.setdefault(block["stage"], []).append(block)
    summary = run.compared.summary
    gone = sum(fate.removed is not None for fate in run.history.network)
    removed_at = [change for change in run.history.changes if change.action == "removed"]
    return {
        "id": name,
        "name": run.name,
        "changes": bool(run.history.changes),
        "has_map": has_map,
        "alt": f"Map of {len(gates.units)} gated units over {len(gates.epochs)} epochs, from open to gone; "
        "the list of blocks below says the same in words.",
        "about": _about(run, gone, removed_at, summary),
        "stages": stages,
        "phases": [(phase, format_joules(joules)) for phase, joules in run.history.energy_by_phase_j.items()],
        "devices": [(device, format_joules(joules)) for device, joules in run.history.energy_by_device_j.items()],
        "attempts": run.history.attempts,
    }


def _about(run: ReportedRun, gone: int, removals: list[Change], summary: dict[str, Any]) -> str:
    if run.compared.is_dense:
        return "A dense run: nothing is gated, nothing was removed."
    if not run.history.network:
        return "Its events name no blocks."
    text = f"{gone} of {len(run.history.network)} blocks are gone"
    if summary.get("channels_dense"):
        left, dense = summary.get("channels"), summary["channels_dense"]
        text += f", and {UNKNOWN if left is None else f'{dense - left:,}'} of {dense:,} gated channels"
    if removals:
        first, last = removals[0].epoch, removals[-1].epoch
        text += f"; the first went at epoch {_epoch(first)}, the last at epoch {_epoch(last)}"
    share = summary.get("flops_forward"), summary.get("flops_forward_dense")
    if share[0] is not None and share[1]:
        text += f". What is left costs {format_percent(share[0] / share[1], 1)} of the dense FLOPs an image"
    return f"{text}."


def _epoch(epoch: float | None) -> str:
    return UNKNOWN if epoch is None else f"{epoch:.4g}"


def _block(fate: BlockFate) -> dict[str, Any]:
    stage, dot, _ = fate.name.rpartition(".")
    sets = []
    for channels in fate.sets:
        mine = [change for change in fate.changes if change.unit.endswith(f":{channels.label}")]
        sets.append(
            {
                "label": channels.label,
                "left": channels.left,
                "dense": channels.dense,
                "share": round(100 * channels.left / channels.dense) if channels.dense else 0,
                "when": _span(mine),
            }
        )
    fate_in_words = "kept"
    if fate.removed is not None:
        fate_in_words = f"removed at epoch {_epoch(fate.removed.epoch)} ({fate.removed.reason})"
    elif fate.frozen is not None:
        fate_in_words = f"kept, for good since epoch {_epoch(fate.frozen.epoch)}"
    return {
        "name": fate.name,
        "stage": stage if dot else "",
        "gone": fate.removed is not None,
        "fate": fate_in_words,
        "sets": sets,
    }


def _span(changes: list[Change]) -> str:
    epochs = [change.epoch for change in changes if change.epoch is not None]
    if not epochs:
        return ""
    first, last = _epoch(min(epochs)), _epoch(max(epochs))
    return f"cut at epoch {first}" if first == last else f"cut at epochs {first} to {last}"
