"""The figures of a report, as plotly draws them; nothing here computes what the report's contents do not hold."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from greenprune.formatting import format_joules, format_percent, format_si
from greenprune.report.history import REMOVED, GateMap
from greenprune.report.parts import Group, Report, ReportedRun, Task, spread_of, spread_over

_DENSE_COLOUR = "#85837c"
# Apart in hue and lightness, also for those who see colours differently, on light and on dark paper.
_COLOURS = ("#2a78d6", "#e0702b", "#1a9e73", "#a35bd0", "#c99700", "#d6457f", "#3aa6c4", "#7a9a2e")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "star", "cross")
_PART_COLOURS = ("#3d6fa8", "#e0a23c", "#6aa68c", "#b0607a", "#8d7fc0", "#9a9a92", "#c07a4a", "#5aa7b8")
_OPEN_COLOURS = ((0.0, "#f1e8c9"), (0.5, "#7fbf9b"), (1.0, "#0d6b57"))
_REMOVED_COLOUR = "#a3a099"
_NO_LINE = "rgba(0,0,0,0)"

_MOST_DEVICES = 8
# A device in energy_by_device_j: perhaps its host, its kind or UUID, and what all of its kind have in common.
_DEVICE = re.compile(r"(?:\S+: )?(?:(?P<kind>cpu|dram)(?::[^\s(]+)?|(?:GPU|MIG)-[\w-]+)(?P<rest>.*)")

GONE, NOT_KNOWN = 125, 160
"""What stands in a gate map's percents for a unit that is gone, and for one that nothing is known of."""


@dataclass(frozen=True)
class Style:
    """How a group is drawn everywhere.

    Attributes:
        number: Its number in the report.
        colour: Of its lines and marks.
        symbol: Of its marks.
        dash: Of its lines.
    """

    number: int
    colour: str
    symbol: str
    dash: str


def group_styles(report: Report) -> dict[int, Style]:
    """A style for each group of a report, by the group's ``id``: dense ones are grey and dashed."""
    styles: dict[int, Style] = {}
    gated = 0
    for number, group in enumerate(report.groups):
        if group.gated is False:
            styles[id(group)] = Style(number, _DENSE_COLOUR, "x", "dash")
        else:
            colour, symbol = _COLOURS[gated % len(_COLOURS)], _SYMBOLS[gated % len(_SYMBOLS)]
            styles[id(group)] = Style(number, colour, symbol, "solid")
            gated += 1
    return styles


def _figure(x_title: str, y_title: str, height: int) -> go.Figure:
    """An empty figure that takes its ink from the page."""
    return go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 64, "r": 16, "t": 12, "b": 48},
            "paper_bgcolor": _NO_LINE,
            "plot_bgcolor": _NO_LINE,
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "xaxis": {"title": {"text": x_title, "standoff": 8}, "automargin": True, "zeroline": False},
            "yaxis": {"title": {"text": y_title, "standoff": 8}, "automargin": True, "zeroline": False},
            "showlegend": False,
            "hovermode": "closest",
            "dragmode": False,
        }
    )


def _as_text(words: str) -> str:
    """Words that plotly shows as they are; it would take tags, entities and ``%{...}`` in them for its own."""
    return html.escape(words, quote=False).replace("%{", "%&#123;")


def _run_meta(run: ReportedRun) -> dict[str, str]:
    return {"run": run.name}


def _group_meta(style: Style) -> dict[str, int]:
    return {"group": style.number}


# Accuracy against joules.


def accuracy_against_joules(task: Task, styles: dict[int, Style]) -> go.Figure | None:
    """Every run as a small mark (open if it is not finished), every group's mean with its spread, and the front.

    Returns:
        None if no run has both an accuracy and joules.
    """
    figure = _figure("joules of the run", f"{task.accuracy_kind} accuracy", 380)
    for group in task.groups:
        style = styles[id(group)]
        for run in group.runs:
            accuracy, energy_j = run.figure("accuracy"), run.figure("energy_j")
            if accuracy is not None and energy_j is not None:
                figure.add_trace(_run_mark(run, style, accuracy, energy_j, alone=len(group.runs) == 1))
        figure.add_traces(_mean_mark(group, style))
    if not figure.data:
        return None
    if task.front:
        figure.add_trace(_front_line(task))
    figure.update_yaxes(tickformat=".1%")
    figure.update_xaxes(tickformat="~s", ticksuffix="J", rangemode="tozero")
    return figure


def _run_mark(run: ReportedRun, style: Style, accuracy: float, energy_j: float, *, alone: bool) -> go.Scatter:
    symbol = style.symbol if run.is_finished or style.symbol == "x" else f"{style.symbol}-open"
    told = _as_text(run.name) + ("" if run.is_finished else f"<br>{_as_text(run.state)}")
    return go.Scatter(
        x=[energy_j],
        y=[accuracy],
        mode="markers",
        marker={
            "color": style.colour,
            "symbol": symbol,
            "size": 11 if alone else 7,
            "opacity": 1 if alone else 0.55,
            "line": {"width": 1},
        },
        hovertemplate=f"{told}<br>{format_joules(energy_j)}, {format_percent(accuracy, 2)}<extra></extra>",
        meta=_run_meta(run),
        showlegend=False,
    )


def _mean_mark(group: Group, style: Style) -> list[go.Scatter]:
    accuracy, energy = group.spreads["accuracy"], group.spreads["energy_j"]
    if accuracy is None or energy is None or (number := max(accuracy.n, energy.n)) < 2:
        return []
    means = f"mean of {number}: {format_joules(energy.mean)}, {format_percent(accuracy.mean, 2)}"
    bars = {"thickness": 1.2, "width": 4, "color": style.colour}
    return [
        go.Scatter(
            x=[energy.mean],
            y=[accuracy.mean],
            error_x={"array": [energy.sd or 0.0], **bars},
            error_y={"array": [accuracy.sd or 0.0], **bars},
            mode="markers",
            name=_as_text(group.label),
            marker={"color": style.colour, "symbol": style.symbol, "size": 13},
            hovertemplate=f"{_as_text(group.label)}<br>{means}<extra></extra>",
            meta=_group_meta(style),
        )
    ]


def _front_line(task: Task) -> go.Scatter:
    by_label = {group.label: group.spreads for group in task.groups}
    points = [(by_label[label]["energy_j"], by_label[label]["accuracy"]) for label in task.front or ()]
    return go.Scatter(
        x=[energy.mean for energy, _ in points if energy],
        y=[accuracy.mean for _, accuracy in points if accuracy],
        mode="lines+markers" if len(points) == 1 else "lines",
        marker={"symbol": "circle-open", "size": 22, "color": _DENSE_COLOUR},
        line={"color": _DENSE_COLOUR, "dash": "dot", "width": 1.5, "shape": "hv"},
        hovertemplate="Pareto front<extra></extra>",
        name="Pareto front",
        meta={"whole": True},
    )


# Curves over epochs.


def joules_over_epochs(task: Task, styles: dict[int, Style]) -> go.Figure | None:
    """Joules so far at the end of each epoch, of every run and on average; None if nothing is known."""
    figure = _figure("epoch", "joules so far", 380)
    _add_curves(figure, task, styles, "energy_j", format_joules)
    figure.update_yaxes(tickformat="~s", ticksuffix="J", rangemode="tozero")
    return figure if figure.data else None


def flops_over_epochs(task: Task, styles: dict[int, Style]) -> go.Figure | None:
    """FLOPs of training so far, and what the dense network takes for the same samples; None if nothing is known."""
    figure = _figure("epoch", "training FLOPs so far", 380)
    for group in task.groups:
        if group.gated is not False:
            figure.add_traces(_dense_projection(group))
    _add_curves(figure, task, styles, "flops_train", lambda value: format_si(value, "FLOPs"))
    figure.update_yaxes(tickformat="~s", rangemode="tozero")
    return figure if figure.data else None


def _add_curves(
    figure: go.Figure,
    task: Task,
    styles: dict[int, Style],
    key: str,
    told: Callable[[float | None], str],
) -> None:
    for group in task.groups:
        style = styles[id(group)]
        for run in group.runs:
            known = [epoch for epoch in run.history.epochs if getattr(epoch, key) is not None]
            if known:
                figure.add_trace(
                    go.Scatter(
                        x=np.array([epoch.epoch for epoch in known]),
                        y=np.array([getattr(epoch, key) for epoch in known], dtype=float),
                        mode="lines" if len(known) > 1 else "markers",
                        line={"color": style.colour, "width": 1, "dash": style.dash if run.is_finished else "dot"},
                        opacity=0.45,
                        hovertemplate=f"{_as_text(run.name)}<br>epoch %{{x}}: %{{y:.4s}}<extra></extra>",
                        meta=_run_meta(run),
                        showlegend=False,
                    )
                )
        means = mean_over_epochs(group, key)
        if means:
            figure.add_trace(
                go.Scatter(
                    x=np.array(list(means)),
                    y=np.array(list(means.values())),
                    mode="lines",
                    name=_as_text(group.label),
                    line={"color": style.colour, "width": 2.6, "dash": style.dash},
                    text=[told(mean) for mean in means.values()],
                    hovertemplate=f"{_as_text(group.label)}, mean<br>epoch %{{x}}: %{{text}}<extra></extra>",
                    meta=_group_meta(style),
                )
            )


def mean_over_epochs(group: Group, key: str) -> dict[int, float]:
    """A figure's mean over a group's finished runs in which it counts, at the epochs that all of them have.

    It is the mean that the group's spread of the figure is about.

    Args:
        group: The group.
        key: Name of the figure, of :class:`EpochFigures`.
    """
    counted = [run for run in group.runs if run.is_finished and run.counts(key)]
    curves: list[dict[int, float | None]] = [
        {epoch.epoch: getattr(epoch, key) for epoch in run.history.epochs} for run in counted
    ]
    if not curves:
        return {}
    means = {}
    for number in curves[0]:
        values = [curve.get(number) for curve in curves]
        spread = spread_over(counted, key, values)
        if spread is not None and None not in values:
            means[number] = spread.mean
    return means


def _dense_projection(group: Group) -> list[go.Scatter]:
    longest = max(group.runs, key=lambda run: len(run.history.epochs)).history.epochs
    known = [epoch for epoch in longest if epoch.flops_train_dense is not None]
    if not known:
        return []
    return [
        go.Scatter(
            x=np.array([epoch.epoch for epoch in known]),
            y=np.array([epoch.flops_train_dense for epoch in known], dtype=float),
            mode="lines",
            line={"color": _DENSE_COLOUR, "width": 1.5, "dash": "dot"},
            hovertemplate="dense network, same samples<br>epoch %{x}: %{y:.4s}<extra></extra>",
            name="dense, counted",
            showlegend=False,
            meta={"always": True},
        )
    ]


# Where the joules went.


def joules_by_part(task: Task, styles: dict[int, Style], part: str) -> go.Figure | None:
    """A stacked bar for each group: the mean joules of its runs by phase or by device; None if nothing is known.

    Args:
        task: The groups.
        styles: Their styles.
        part: ``phase`` or ``device``.
    """
    means = [(group, by_part) for group, by_part in zip(task.groups, part_means(task, part), strict=True) if by_part]
    parts = parts_by_size([by_part for _, by_part in means])
    if not parts:
        return None
    entries = [textwrap.wrap(name, 56) for name in parts]
    legend_lines = sum(map(len, entries)) if part == "device" else -(-len(parts) // 3)
    figure = _figure("joules of a run, mean", "", 96 + 44 * len(means) + 20 * legend_lines)
    bars = []
    for index, name in enumerate(parts):
        having = [(group, by_part[name]) for group, by_part in reversed(means) if name in by_part]
        for position, (group, joules) in enumerate(having):
            told = f"{_as_text(group.label)}<br>{_as_text(name)}: {format_joules(joules)}"
            label = group.label.replace(" %", "\u00a0%").replace("keep ", "keep\u00a0")
            bars.append(
                go.Bar(
                    y=["<br>".join(map(_as_text, textwrap.wrap(label, 22)))],
                    x=[joules],
                    orientation="h",
                    name="<br>".join(map(_as_text, entries[index])),
                    legendgroup=name,
                    showlegend=position == 0,
                    marker={"color": _PART_COLOURS[index % len(_PART_COLOURS)], "line": {"width": 0}},
                    hovertemplate=f"{told}<extra></extra>",
                    meta={"any": styles[id(group)].number, "part": name},
                )
            )
    figure.add_traces(bars)  # all at once: each call copies what is there
    figure.update_layout(
        barmode="stack",
        bargap=0.35,
        showlegend=True,
        legend={
            "orientation": "h",
            "x": 0,
            "xref": "container",
            "y": 0,
            "yref": "container",
            "yanchor": "bottom",
            "traceorder": "normal",
            "itemclick": False,
            "itemdoubleclick": False,
        },
        margin={"l": 64, "r": 16, "t": 12, "b": 60 + 20 * legend_lines},
    )
    figure.update_xaxes(tickformat="~s", ticksuffix="J", rangemode="tozero", nticks=5)
    figure.update_yaxes(ticks="", showgrid=False)
    return figure


def part_means(task: Task, part: str) -> list[dict[str, float]]:
    """Mean joules by phase or device over the runs of each group that tell any; parts that nobody could read left out.

    The runs are those in which joules count, so that the parts add up to the mean that is told of the group.

    Of more than a few devices those of one kind and model are one part, with the joules of all that a run has of it.

    Args:
        task: The groups.
        part: ``phase`` or ``device``.
    """
    told = [_told_by_part(group, part) for group in task.groups]
    names = {name for runs in told for by_part in runs for name in by_part}
    if part == "device" and len(names) > _MOST_DEVICES:
        kinds = {name: _kind_of_device(name) for name in names}
        told = [[_added_up(by_device, kinds) for by_device in runs] for runs in told]
    return [_means(runs) for runs in told]


def _told_by_part(group: Group, part: str) -> list[dict[str, float | None]]:
    told = [
        run.history.energy_by_phase_j if part == "phase" else run.history.energy_by_device_j
        for run in group.runs
        if run.is_finished and run.counts("energy_j")
    ]
    return [by_part for by_part in told if by_part]


def _kind_of_device(name: str) -> str:
    """A device's name without what tells it from others of its kind and model: its host and its number."""
    found = _DEVICE.fullmatch(name)
    return name if found is None else f"{found['kind'] or 'GPU'}{found['rest']}"


def _added_up(by_device: dict[str, float | None], kinds: dict[str, str]) -> dict[str, float | None]:
    added: dict[str, float | None] = {}
    for name, joules in by_device.items():
        known = [value for value in (added.get(kinds[name]), joules) if value is not None]
        added[kinds[name]] = sum(known) if known else None
    return added


def _means(told: list[dict[str, float | None]]) -> dict[str, float]:
    names = dict.fromkeys(name for by_part in told for name in by_part)
    spreads = {name: spread_of(by_part.get(name) for by_part in told) for name in names}
    return {name: spread.mean * spread.n / len(told) for name, spread in spreads.items() if spread is not None}


def parts_by_size(means: list[dict[str, float]]) -> list[str]:
    """The parts that :func:`part_means` tells of any group, those first that are the most in one."""
    largest: dict[str, float] = {}
    for by_part in means:
        for name, joules in by_part.items():
            largest[name] = max(joules, largest.get(name, joules))
    return sorted(largest, key=lambda name: -largest[name])


# All at one glance.


def overview(report: Report) -> go.Figure:
    """Accuracy against joules, joules and FLOPs so far, one row for each task, on white: a picture for a slide.

    Args:
        report: What it shows.
    """
    styles = group_styles(report)
    titles = [
        f"{_as_text(task.data)}: {what}"
        for task in report.tasks
        for what in ("accuracy", "joules so far", "FLOPs so far")
    ]
    figure = make_subplots(rows=len(report.tasks), cols=3, subplot_titles=titles, horizontal_spacing=0.07)
    for row, task in enumerate(report.tasks, start=1):
        drawings = (accuracy_against_joules, joules_over_epochs, flops_over_epochs)
        for column, draw in enumerate(drawings, start=1):
            drawn = draw(task, styles)
            if drawn is not None:
                figure.add_traces(drawn.data, rows=row, cols=column)
                figure.update_xaxes(drawn.layout.xaxis, row=row, col=column)
                figure.update_yaxes(drawn.layout.yaxis, row=row, col=column)
    figure.update_traces(showlegend=False)
    for task in report.tasks:
        figure.add_traces([_legend_entry(task, group, styles[id(group)], report) for group in task.groups])
    figure.update_layout(
        template="none",
        width=1500,
        height=120 + 400 * len(report.tasks),
        font={"family": "system-ui, sans-serif", "size": 14},
        margin={"t": 60, "b": 90},
        legend={"orientation": "h", "y": 0, "yref": "container", "yanchor": "bottom"},
    )
    return figure


def _legend_entry(task: Task, group: Group, style: Style, report: Report) -> go.Scatter:
    return go.Scatter(
        x=[None],
        y=[None],
        mode="lines+markers",
        line={"color": style.colour, "dash": style.dash, "width": 2.6},
        marker={"color": style.colour, "symbol": style.symbol, "size": 10},
        name=_as_text(group.label if len(report.tasks) == 1 else f"{task.data}: {group.label}"),
    )


# The gate map.


def gate_map_figure(gates: GateMap) -> go.Figure:
    """Unit by epoch: how far each is open, and from when on it is gone."""
    figure = _figure("epoch", "", 100 + max(8, 15 if len(gates.units) < 60 else 11) * len(gates.units))
    figure.add_trace(_gate_heatmap(gates))
    figure.update_layout(meta={"units": gates.units, "epochs": gates.epochs})
    step = -(-len(gates.units) // 60)
    ticks = list(range(0, len(gates.units), step))
    figure.update_yaxes(
        autorange="reversed",
        tickmode="array",
        tickvals=ticks,
        ticktext=[gates.units[tick] for tick in ticks],
        tickfont={"size": 10},
        showgrid=False,
        ticks="",
    )
    figure.update_xaxes(showgrid=False)
    return figure


def _gate_heatmap(gates: GateMap) -> go.Heatmap:
    """Whole percents in bytes, so that a map of many units and epochs stays small; marks for gone and not known."""
    shares = np.array(gates.open_share, dtype=float)
    percents = np.round(100 * np.nan_to_num(shares))
    percents[shares == REMOVED] = GONE
    percents[np.isnan(shares)] = NOT_KNOWN
    top = NOT_KNOWN if np.isnan(shares).any() else GONE + 12
    opening = [(share * 100 / top, colour) for share, colour in _OPEN_COLOURS]
    gone = [((GONE - 12) / top, _REMOVED_COLOUR), ((GONE + 12) / top, _REMOVED_COLOUR)]
    not_known = [((GONE + 12) / top, _NO_LINE), (1.0, _NO_LINE)] if top == NOT_KNOWN else []
    return go.Heatmap(
        z=percents.astype(np.uint8),
        x=np.array(gates.epochs),
        y=np.arange(len(gates.units)),
        zmin=0,
        zmax=top,
        xgap=1 if len(gates.epochs) <= 60 else 0,
        ygap=1,
        colorscale=[*opening, (opening[-1][0], opening[-1][1]), ((GONE - 12) / top, opening[-1][1]), *gone, *not_known],
        colorbar={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "len": 1,
            "thickness": 8,
            "outlinewidth": 0,
            "tickvals": [0, 100, GONE],
            "tickangle": 0,
            "tickfont": {"size": 11},
            "ypad": 8,
            "ticktext": ["closed", "open", "gone"],
        },
        hoverinfo="text",
    )
