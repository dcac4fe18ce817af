"""A W&B workspace laid out for comparing energy: accuracy over joules first, then where the joules went."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from greenprune.config import UserError

NAME = "greenprune energy"
_PHASES = ("train", "eval", "checkpoint", "surgery", "setup", "data")


def build_workspace(entity: str, project: str) -> Any:
    """The workspace, not yet saved; needs no network.

    Args:
        entity: The W&B user or team.
        project: The W&B project.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise UserError(
            f"dashboard: needs {error.name}, which is not installed; expected: pip install wandb-workspaces"
        ) from None

    def line(title: str, x: str, *y: str, **more: Any) -> Any:
        return wr.LinePlot(title=title, x=x, y=list(y), **more)

    def bar(title: str, key: str) -> Any:
        return wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)], groupby="group", groupby_aggfunc="mean")

    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config("optim.lr"), display_name="lr"),
        wr.ParallelCoordinatesPlotColumn(wr.Config("budget.target"), display_name="budget"),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("flops_saved"), display_name="FLOPs saved"),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("energy_j"), display_name="joules"),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("co2_g"), display_name="gCO2e"),
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric("accuracy"), display_name="accuracy"),
    ]
    sections = [
        ws.Section(
            name="Accuracy against energy",
            is_open=True,
            panels=[
                wr.ScatterPlot(
                    title="Accuracy against joules, each run",
                    x=wr.SummaryMetric("energy_j"),
                    y=wr.SummaryMetric("accuracy"),
                ),
                line("Accuracy over joules", "energy/total_j", "eval/accuracy"),
                line("Accuracy over training FLOPs", "flops/train", "eval_over_flops/accuracy"),
                line("Accuracy over steps", "step", "eval_over_steps/accuracy"),
            ],
        ),
        ws.Section(
            name="Energy",
            is_open=True,
            panels=[
                line("Joules so far", "step", "energy/total_j"),
                line("Watts", "step", "energy/power_w"),
                line("gCO2e so far", "step", "energy/co2_g"),
                line("Joules so far by phase", "step", *(f"energy/by_phase_j/{phase}" for phase in _PHASES)),
                line("Joules so far by device", "step", metric_regex="energy/by_device_j/.*"),
                bar("Joules of a run, mean of a group", "energy_j"),
            ],
        ),
        ws.Section(
            name="What is removed",
            is_open=True,
            panels=[
                line("Blocks", "step", "structure/blocks"),
                line("Channels", "step", "structure/channels"),
                line("Kept cost", "step", "structure/kept_cost"),
                line("FLOPs of one image", "step", "flops/forward"),
                line("Gates: how far open", "step", "gate/openness"),
                line("Images a second", "step", "train/samples_per_s"),
            ],
        ),
        ws.Section(
            name="Runs side by side",
            is_open=True,
            panels=[wr.ParallelCoordinatesPlot(title="Settings and results", columns=columns), wr.RunComparer()],
        ),
    ]
    pinned = ["summary:accuracy", "summary:energy_j", "summary:co2_g", "summary:flops_saved", "summary:energy_quality"]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis="step"),
        runset_settings=ws.RunsetSettings(pinned_columns=pinned),
    )


def describe_workspace(workspace: Any) -> str:
    """A workspace as JSON, its sections and panels: to keep, or to lay it out by hand."""
    return json.dumps(_set_values(dataclasses.asdict(workspace)), indent=2, default=str)


def _set_values(value: Any) -> Any:
    """Without what has been left at nothing."""
    if isinstance(value, dict):
        plain = {key: _set_values(item) for key, item in value.items() if not key.startswith("_")}
        return {key: item for key, item in plain.items() if item not in (None, [], {}, [None, None])}
    return [_set_values(item) for item in value] if isinstance(value, list | tuple) else value


def save_workspace(workspace: Any) -> str:
    """Create the workspace on the W&B server.

    Returns:
        Its address.

    Raises:
        UserError: The server does not answer, does not know the key, or has no such project.
    """
    import requests
    import wandb

    try:
        return str(workspace.save().url)
    except (wandb.errors.Error, requests.RequestException, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"dashboard: W&B does not take it ({reason}); expected a network and a login, or --print"
        ) from None
