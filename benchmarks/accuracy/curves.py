"""The curves of an accuracy study: accuracy against what inference and what training takes, over the dense twin's."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

_AXES = {
    "flops": "FLOPs of inference / dense",
    "training": "FLOPs of training / dense twin",
    "joules": "joules of training / dense twin",
}
# Apart in hue and lightness, also for those who see colours differently.
_COLOURS = (
    "#85837c",
    "#2a78d6",
    "#e0702b",
    "#1a9e73",
    "#a35bd0",
    "#c99700",
    "#d6457f",
    "#3aa6c4",
    "#7a9a2e",
    "#444444",
)
_SYMBOLS = ("x", "circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "star", "cross", "hourglass")


def write_curves(points: Sequence[dict[str, Any]], title: str, stem: Path, axes: Sequence[str]) -> Path:
    """Draw a study's points, one line for each way to train.

    Args:
        points: Each with ``series``, ``seeds``, ``accuracy`` in percent and its ``deviation``, and for each axis its
            share of the dense twin's; None where unknown.
        title: Of the figure.
        stem: Path of the file without its ending.
        axes: What accuracy is drawn against: flops (of inference), training (its FLOPs) or joules; left out where no
            point knows it.

    Returns:
        The file: a PNG, or an HTML page where there is no browser to draw one with.
    """
    axes = [key for key in axes if any(point[key] is not None for point in points)] or axes[:1]
    figure = make_subplots(cols=len(axes), shared_yaxes=True, horizontal_spacing=0.04)
    all_series = list(dict.fromkeys(point["series"] for point in points))
    for number, series in enumerate(all_series):
        for column, key in enumerate(axes, start=1):
            shown = [point for point in points if point["series"] == series and point[key] is not None]
            shown.sort(key=lambda point: point[key])
            figure.add_trace(
                go.Scatter(
                    x=[point[key] for point in shown],
                    y=[point["accuracy"] for point in shown],
                    error_y={"array": [point["deviation"] or 0.0 for point in shown], "thickness": 1},
                    name=series,
                    legendgroup=series,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": _COLOURS[number % len(_COLOURS)], "width": 1.5},
                    marker={"symbol": _SYMBOLS[(number + number // len(_COLOURS)) % len(_SYMBOLS)], "size": 9},
                ),
                row=1,
                col=column,
            )
            figure.update_xaxes(title=_AXES[key], rangemode="tozero", row=1, col=column)
    figure.update_yaxes(title="accuracy %", row=1, col=1)
    seeds = sorted({point["seeds"] for point in points})
    about = f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else f"{seeds[0]} seeds" if seeds else "no results"
    height = max(560, 190 + 29 * len(all_series))  # a picture's legend is cut where it is longer than the plot
    title = f"{title}: mean and deviation, {about}"
    figure.update_layout(title=title, width=1300, height=height, template="plotly_white")
    if importlib.util.find_spec("kaleido") is not None:
        import kaleido
        from choreographer.errors import ChromeNotFoundError

        try:
            picture = kaleido.calc_fig_sync(figure, opts={"format": "png"}, kopts={"mathjax": False})
        except (ChromeNotFoundError, RuntimeError):  # kaleido is there, the browser that it drives is not
            pass
        else:
            stem.with_suffix(".png").write_bytes(picture)
            return stem.with_suffix(".png")
    page = stem.with_suffix(".html")
    figure.write_html(page, include_plotlyjs="cdn")
    return page
