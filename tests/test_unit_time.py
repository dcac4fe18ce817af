"""A budget in time: what blocks take is measured once, alike on all ranks, and counts to the end of the run."""

from __future__ import annotations

import copy
import io
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launching import TRAIN, run

import greenprune.run
from greenprune import BudgetConfig, GateConfig, Pruner
from greenprune.config import Config, ConfigError, ModelConfig, OptimConfig, RemovalConfig
from greenprune.interrupt import Interrupted
from greenprune.models import CifarResNet, residual_blocks
from greenprune.progress import Display
from greenprune.run import train
from greenprune.trainer import Trainer
from greenprune.unit_time import UnitTime, measure_unit_time
from greenprune.verify import verify_run

SMALL = Config(
    model=ModelConfig(name="resnet20"),
    optim=OptimConfig(epochs=3, lr=0.05),
    gate=GateConfig(warmup=0.0),
    budget=BudgetConfig(target=0.5, unit="time"),
    removal=RemovalConfig(window=11, decide_by=0.4),
)
# Of nine blocks the first is as slow as the other eight together.
SECONDS = {name: 0.8 if name == "stages.0.0" else 0.1 for name in residual_blocks(CifarResNet(20, 10, 1))}
MADE_UP = UnitTime(2.0, SECONDS)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def trained(folder: Path, **changes: object) -> Path:
    config = replace(SMALL, output_dir=str(folder), run_name="it", **changes)  # type: ignore[arg-type]
    train(config, {}, lambda: Display(io.StringIO()))
    return folder / "it"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenprune.run, "measure_unit_time", lambda *_, **__: MADE_UP)


# What is measured.


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_blocks_of_one_shape_take_the_same_and_all_together_no_more_than_the_network(shortcut: str) -> None:
    model = CifarResNet(20, 10, 1, shortcut)  # type: ignore[arg-type]
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    found = measure_unit_time(model, torch.zeros(4, 1, 8, 8), channels_last=True)
    assert found.blocks.keys() == residual_blocks(model).keys()
    assert found.blocks["stages.1.1"] == found.blocks["stages.1.2"] > 0
    assert sum(found.blocks.values()) <= found.whole
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_slower_block_is_dearer() -> None:
    found = measure_unit_time(CifarResNet(20, 10, 3), torch.zeros(16, 3, 32, 32))
    wide = CifarResNet(20, 10, 3)
    wide.stages[0][1].branch.append(torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, 1, 1) for _ in range(8))))
    slower = measure_unit_time(wide, torch.zeros(16, 3, 32, 32))
    assert slower.blocks["stages.0.1"] > 2 * slower.blocks["stages.0.2"]
    assert found.blocks["stages.0.1"] == found.blocks["stages.0.2"]


# What a run does with it.


@pytest.mark.usefixtures("made_up")
def test_the_budget_is_met_in_time(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    summary = read(folder / "summary.json")
    gone = sum(SECONDS[removal["unit"]] for removal in summary["removals"])
    assert summary["kept_cost"] == pytest.approx(1 - gone / 2.0)
    assert 0.5 - summary["cheapest_unit_cost"] < summary["kept_cost"] <= 0.5
    assert summary["budget_unit"] == "time"
    assert not [finding for finding in verify_run(folder) if finding.good is False]


@pytest.mark.usefixtures("made_up")
def test_a_run_that_goes_on_counts_with_what_was_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole")
    step = Trainer._train_step

    def asked_to_stop(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
        step(trainer, images, labels)
        if trainer.step == 24:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", asked_to_stop)
        with pytest.raises(Interrupted):
            trained(tmp_path / "cut")
    other = UnitTime(2.0, {**dict.fromkeys(SECONDS, 0.1), "stages.2.2": 0.8})
    monkeypatch.setattr(greenprune.run, "measure_unit_time", lambda *_, **__: other)
    folder = trained(tmp_path / "cut", resume="auto")
    for figure in ("removals", "kept_cost", "accuracy", "loss"):
        assert read(folder / "summary.json")[figure] == read(whole / "summary.json")[figure], figure
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["unit_time"] for event in events if event["kind"] == "start"] == [MADE_UP.to_dict()] * 2


def test_two_processes_decide_by_one_measurement(tmp_path: Path) -> None:
    args = ["--model.name", "resnet20", "--optim.epochs", "2", "--optim.lr", "0.05", "--budget.unit", "time"]
    args += ["--removal.window", "5", "--budget.target", "0.6", "--output_dir", str(tmp_path), "--run_name", "it"]
    done = run(TRAIN, args, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]  # ranks check that they agree on the structure
    summary = read(tmp_path / "it" / "summary.json")
    assert summary["kept_cost"] <= 0.6
    assert summary["gates_left"] == 0


@pytest.mark.usefixtures("made_up")
def test_a_budget_that_cannot_be_met_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^budget\.target: 0\.1 cannot be met; 0\.2 of this network's cost has no gate"
    ):
        trained(tmp_path, budget=BudgetConfig(target=0.1, unit="time"))
    assert not (tmp_path / "it").exists()


def test_channels_are_not_counted_in_time() -> None:
    with pytest.raises(ConfigError, match=r"^budget\.unit: 'time' is not valid; expected flops or params"):
        replace(SMALL, gate=GateConfig(units=["channel"]))


def test_the_pruner_takes_what_it_measured_along() -> None:
    def pruner() -> Pruner:
        budget = BudgetConfig(target=0.9, unit="time")
        return Pruner(CifarResNet(20, 10, 1), torch.zeros(4, 1, 8, 8), total_steps=20, budget=budget)

    first, second = pruner(), pruner()
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["unit_time"] == first.state_dict()["unit_time"]
    second.finalize()
    assert second.report()["kept_cost"] <= 0.9
