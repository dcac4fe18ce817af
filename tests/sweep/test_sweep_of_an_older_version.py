"""A sweep that an older version began goes on under one whose configs have more fields, and so other digests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from greenprune.sweep.command import main


@pytest.fixture
def folder(sweep_of_two: Path) -> Path:
    """A sweep as it would be if there had been no optim.nonfinite yet, so that digests and configs are without it."""
    assert main(["two.yaml"]) == 0
    folder = sweep_of_two / "runs" / "sweeps" / "two"
    plan = json.loads((folder / "sweep.json").read_text())
    for run in plan["runs"]:
        run["identity"] = "0" * 16
    (folder / "sweep.json").write_text(json.dumps(plan))
    for config in (folder / "configs").iterdir():
        lines = [line for line in config.read_text().splitlines() if "nonfinite:" not in line]
        config.write_text("\n".join(lines) + "\n")
    return folder


def test_it_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["two.yaml"]) == 0, capsys.readouterr().err
    plan = json.loads((folder / "sweep.json").read_text())
    assert all(run["identity"] != "0" * 16 for run in plan["runs"])


@pytest.mark.parametrize("change", ["ema: 0.9", "nonfinite", "gone"])
def test_what_is_another_run_still_is(folder: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its base says otherwise, the new field does, or its configs cannot be read to tell."""
    base = Path("base.yaml")
    if change == "gone":
        (folder / "configs" / "0001.yaml").write_text("optim: {no_such_field: 1}\n")
    else:
        base.write_text(
            base.read_text().replace("ema: 0.9", "ema: 0.8" if change == "ema: 0.9" else "ema: 0.9, nonfinite: skip")
        )
    assert main(["two.yaml"]) == 2
    assert "differs in its base" in capsys.readouterr().err
