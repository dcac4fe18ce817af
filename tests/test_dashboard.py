"""The W&B workspace for comparing energy, as far as it can be told without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from greenprune.cli import main
from greenprune.dashboard import build_workspace
from greenprune.tracking import RunFolder
from greenprune.wandb_mirror import WandbMirror

# wandb-workspaces is written for the first version of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1:DeprecationWarning")


class _Run:
    """Takes what a W&B run takes."""

    id = "it"

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str | None] = {}
        self.rows: list[dict[str, Any]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric


EVENTS: list[dict[str, Any]] = [
    {
        "kind": "train",
        "train/samples_per_s": 9.0,
        "flops/forward": 1,
        "structure/blocks": 1,
        "structure/channels": 0,
        "structure/kept_cost": 1.0,
    },
    {"kind": "window", "units": {"a": {"rate": 1.0, "openness": 0.9}}},
    {
        "kind": "epoch",
        "eval/accuracy": 0.9,
        "flops/train": 10,
        "energy/total_j": 5.0,
        "energy/power_w": 1.0,
        "energy/co2_g": 0.1,
        "energy/by_phase_j": dict.fromkeys(("train", "eval", "checkpoint", "surgery", "setup", "data"), 1.0),
    },
    {
        "kind": "end",
        "summary": {"accuracy": 0.9, "energy_j": 5.0, "co2_g": 0.1, "energy_quality": "counter", "flops_train": 1}
        | {"flops_train_dense": 2},
    },
]


def test_its_panels_draw_what_runs_send(tmp_path: Path) -> None:
    run = _Run()
    mirror = WandbMirror(run, run.rows.append, RunFolder(tmp_path), lambda *_: [])
    for event in EVENTS:
        mirror({"time": 1.0, "step": 1, **event})
    sent = {key for row in run.rows for key in row}
    panels = [panel for section in build_workspace("me", "p").sections for panel in section.panels]
    lines = [panel for panel in panels if type(panel).__name__ == "LinePlot"]
    assert len(lines) >= 12
    for panel in lines:
        assert {panel.x, *panel.y} <= sent, panel.title
        for name in panel.y:  # drawn over what the run says that it is drawn over
            axes = [axis for pattern, axis in run.axes.items() if name.startswith(pattern.rstrip("*")) and axis]
            assert axes == [panel.x], name
    scatter = next(panel for panel in panels if type(panel).__name__ == "ScatterPlot")
    assert (scatter.x.name, scatter.y.name) == ("energy_j", "accuracy")
    assert {scatter.x.name, scatter.y.name} <= run.summary.keys()


def test_its_layout_is_printed_without_network_or_login(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "--print", "--project", "p"]) == 0
    layout = json.loads(capsys.readouterr().out)
    assert layout["project"] == "p"
    names = [section["name"] for section in layout["sections"]]
    assert names == ["Accuracy against energy", "Energy", "What is removed", "Runs side by side"]


def test_nothing_is_asked_of_who_is_not_logged_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    assert main(["dashboard", "--entity", "me"]) == 2
    assert "nobody is logged in" in capsys.readouterr().err
    assert main(["dashboard"]) == 2
    assert "--entity: not given" in capsys.readouterr().err
