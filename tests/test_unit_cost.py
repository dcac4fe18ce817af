"""A budget in time or energy: what blocks take is measured once, alike on all ranks, and counts to the end of a run."""

from __future__ import annotations

import copy
import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
sys.path.insert(0, str(Path(__file__).parent / "energy"))
from fake_powercap import Powercap
from families import FAMILIES, build
from in_process import stopped_at
from launching import TRAIN, run

import greenprune.run
from greenprune import BudgetConfig, GateConfig, Pruner
from greenprune.config import Config, ConfigError, ModelConfig, OptimConfig, RemovalConfig
from greenprune.models import CifarResNet, ResidualBlock, residual_blocks
from greenprune.models.attention import SelfAttention, SeparateSelfAttention
from greenprune.models.cifar_resnet import SubsamplePad
from greenprune.progress import Display
from greenprune.run import train
from greenprune.unit_cost import UnitCost, _least_seconds, measure_unit_cost
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
MADE_UP = UnitCost(2.0, SECONDS)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def trained(folder: Path, **changes: object) -> Path:
    config = replace(SMALL, output_dir=str(folder), run_name="it", **changes)  # type: ignore[arg-type]
    train(config, {}, lambda: Display(io.StringIO()))
    return folder / "it"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenprune.run, "measure_unit_cost", lambda *_, **__: MADE_UP)


# What is measured.


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_blocks_of_one_shape_take_the_same_and_all_together_no_more_than_the_network(shortcut: str) -> None:
    model = CifarResNet(20, 10, 1, shortcut)  # type: ignore[arg-type]
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    found = measure_unit_cost("time", model, torch.zeros(4, 1, 8, 8), channels_last=True)
    assert found.blocks.keys() == residual_blocks(model).keys()
    assert found.blocks["stages.1.1"] == found.blocks["stages.1.2"] > 0
    assert sum(found.blocks.values()) <= found.whole
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_how_often_a_block_is_skipped_makes_no_kind_of_its_own() -> None:
    model = CifarResNet(20, 10, 1)
    for block, rate in ((model.stages[0][1], 0.1), (model.stages[0][2], 0.2)):
        block.branch.append(StochasticDepth(rate, "row"))
    found = measure_unit_cost("time", model, torch.zeros(4, 1, 8, 8))
    assert found.blocks["stages.0.1"] == found.blocks["stages.0.2"]


def test_windows_that_are_shifted_are_measured_by_themselves() -> None:
    """They are rolled and masked, which takes a sixth more; what follows them is alike."""
    found = measure_unit_cost("time", build("swin"), FAMILIES["swin"].images())
    plain, shifted = (found.blocks[f"features.1.{index}.attention"] for index in (0, 1))
    assert plain != shifted
    assert found.blocks["features.1.0.mlp"] == found.blocks["features.1.1.mlp"]


def attending(heads: int = 4, dropout: float = 0.0) -> nn.Module:
    branch = SelfAttention(nn.Linear(8, 24), nn.Linear(8, 8), heads, dropout)
    return ResidualBlock(branch, nn.Identity(), nn.Identity(), input_activated=True)


def attending_apart(heads: int = 4) -> nn.Module:
    branch = SeparateSelfAttention(*(nn.Linear(8, 8) for _ in range(4)), heads=heads)
    return ResidualBlock(branch, nn.Identity(), nn.Identity(), input_activated=True)


def activated(input_activated: bool) -> nn.Module:
    return ResidualBlock(nn.Linear(8, 8), nn.Identity(), nn.ReLU(), input_activated=input_activated)


@pytest.mark.parametrize(
    ("one", "alike", "other"),
    [
        (attending(), attending(), attending(heads=2)),
        (attending(), attending(), attending(dropout=0.1)),
        (attending_apart(), attending_apart(), attending_apart(heads=2)),
        (activated(True), activated(True), activated(False)),
    ],
    ids=["heads", "dropout", "heads with projections of their own", "what stays"],
)
def test_blocks_that_compute_otherwise_are_measured_by_themselves(
    one: nn.Module, alike: nn.Module, other: nn.Module
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), one, alike, other)
    found = measure_unit_cost("time", model, torch.randn(4, 5, 8)).blocks
    assert found["1"] == found["2"] != found["3"]


def test_shortcuts_are_told_apart() -> None:
    assert str(SubsamplePad(2, 16)) == "SubsamplePad(stride=2, before=8, after=8)"


def test_on_a_cpu_one_thread_is_measured() -> None:
    """Threads that wait for each other take processor time too, the more the busier the cores are."""
    seen = set()
    model = CifarResNet(20, 10)
    model.register_forward_hook(lambda *_: seen.add(torch.get_num_threads()) if torch.is_grad_enabled() else None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure_unit_cost("time", model, torch.randn(2, 3, 8, 8))
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_slower_block_is_dearer() -> None:
    found = measure_unit_cost("time", CifarResNet(20, 10, 3), torch.zeros(16, 3, 32, 32))
    wide = CifarResNet(20, 10, 3)
    wide.stages[0][1].branch.append(torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, 1, 1) for _ in range(8))))
    slower = measure_unit_cost("time", wide, torch.zeros(16, 3, 32, 32))
    assert slower.blocks["stages.0.1"] > 2 * slower.blocks["stages.0.2"]
    assert found.blocks["stages.0.1"] == found.blocks["stages.0.2"]


class Recordings:
    """Stands in for what PyTorch records of a GPU: of so many passes, and the next one finds no room.

    Attributes:
        made: Memory pool and stream of each recording.
        replays: How often any was replayed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.made: list[tuple[object, object]] = []
        self.replays = 0
        self._room = room
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self._record)

    def wait_stream(self, _: object) -> None:
        """Nothing runs beside anything here."""

    def replay(self) -> None:
        self.replays += 1

    @contextmanager
    def _record(self, _: object, *, pool: object = None, stream: object = None, **__: object) -> Iterator[None]:
        if len(self.made) == self._room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.made.append((pool, stream))
        yield


def test_what_is_recorded_shares_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With memory of its own for each recording, blocks would take as much as the network once more."""
    recordings = Recordings(monkeypatch, room=100)
    measure_unit_cost("time", CifarResNet(20, 10, 1), torch.zeros(4, 1, 8, 8), recorded=True)
    assert len(recordings.made) > 3
    assert len(set(recordings.made)) == 1
    assert recordings.made[0][0] is not None
    assert recordings.replays > 0


def test_what_is_replayed_is_not_compared_with_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block for which there is no room would look dearer than its like by what the host takes to launch it."""
    recordings = Recordings(monkeypatch, room=3)
    found = measure_unit_cost("time", CifarResNet(20, 10, 1), torch.zeros(4, 1, 8, 8), recorded=True)
    assert len(recordings.made) == 3
    assert recordings.replays == 0
    assert min(found.blocks.values()) > 0


def test_waiting_for_a_gpu_is_no_part_of_what_a_block_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks would look dearer, for the run's steps wait for nothing."""
    host_s = gpu_s = 0.0

    def give(seconds: float) -> None:
        nonlocal host_s, gpu_s
        host_s += 5e-6
        gpu_s = max(gpu_s, host_s) + seconds

    def wait(_: object) -> None:
        nonlocal host_s
        host_s = max(host_s, gpu_s) + 10e-6

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: host_s)
    found = _least_seconds({"small": partial(give, 40e-6), "large": partial(give, 4e-3)}, torch.device("cuda"))
    assert found == {"small": pytest.approx(40e-6, rel=0.01), "large": pytest.approx(4e-3, rel=0.01)}


class Machine:
    """A stand-in for a CPU whose joules are counted: it draws a power at all times, and what layers ask for."""

    def __init__(self, root: Path, watts: float) -> None:
        self.root = root
        self._file = os.open(Powercap(root).zone("intel-rapl:0", "package-0", f"{0:020d}"), os.O_WRONLY)
        self._watts, self._uj, self._lock, self._over = watts, 0, threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._draw_on)
        self._thread.start()

    def draw(self, joules: float) -> None:
        with self._lock:
            self._uj += round(1e6 * joules)
            os.pwrite(self._file, f"{self._uj:020d}".encode(), 0)

    def _draw_on(self) -> None:
        last_s = time.perf_counter()
        while not self._over.wait(0.001):
            now_s = time.perf_counter()
            self.draw(self._watts * (now_s - last_s))
            last_s = now_s

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        os.close(self._file)


class Drawing(torch.nn.Module):
    """A layer that takes joules and next to no time."""

    def __init__(self, machine: Machine, joules: float) -> None:
        super().__init__()
        self.machine, self.joules = machine, joules

    def __deepcopy__(self, _: object) -> Drawing:
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.machine.draw(self.joules)
        return x


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr("greenprune.unit_cost._SPAN_S", 0.05)
    made = Machine(tmp_path / "powercap", watts=1.0)
    yield made
    made.close()


def test_a_block_that_draws_more_is_dearer_in_joules_however_long_it_takes(machine: Machine) -> None:
    model = CifarResNet(20, 10, 1)
    model.stages[0][1].branch.append(Drawing(machine, 0.05))
    found = measure_unit_cost("energy", model, torch.zeros(4, 1, 8, 8), powercap=machine.root)
    hungry, other = found.blocks["stages.0.1"], found.blocks["stages.0.2"]
    assert hungry - other == pytest.approx(0.05, rel=0.1)
    assert found.blocks["stages.1.1"] == found.blocks["stages.1.2"] > 0
    assert sum(found.blocks.values()) <= found.whole
    # The rest takes a watt for as long as it runs: far less than a twentieth of a second.
    assert 0 < other < 0.05


def test_joules_are_those_of_the_power_and_the_time(machine: Machine) -> None:
    class Sleeping(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return x

    model = CifarResNet(20, 10, 1)
    model.stages[0][1].branch.append(Sleeping())
    found = measure_unit_cost("energy", model, torch.zeros(4, 1, 8, 8), powercap=machine.root)
    # A watt for the time of the nap; the least of three turns, on cores that may be busy.
    assert found.blocks["stages.0.1"] - found.blocks["stages.0.2"] == pytest.approx(0.02, rel=0.3)


def test_a_device_without_a_counter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^budget\.unit: 'energy' is not valid here: .* shows no RAPL counters; expected flops, params, blocks "
        r"or time, or a device whose joules are counted \(",
    ):
        measure_unit_cost("energy", CifarResNet(20, 10, 1), torch.zeros(4, 1, 8, 8), powercap=tmp_path)


def test_a_counter_that_stands_still_is_told_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greenprune.unit_cost._STILL_S", 0.1)
    Powercap(tmp_path).zone("intel-rapl:0", "package-0", 5_000_000)
    with pytest.raises(ConfigError, match=r"^budget\.unit: 'energy' .* its counter has not moved for 0\.1 s of work"):
        measure_unit_cost("energy", CifarResNet(20, 10, 1), torch.zeros(4, 1, 8, 8), powercap=tmp_path)


# What a run does with it.


def test_a_run_is_steered_by_joules(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenprune.run, "measure_unit_cost", partial(measure_unit_cost, powercap=machine.root))
    folder = trained(tmp_path, budget=BudgetConfig(target=0.6, unit="energy"))
    summary = read(folder / "summary.json")
    start = json.loads((folder / "events.jsonl").read_text().splitlines()[0])
    joules = start["unit_cost"]
    gone = sum(joules["blocks"][removal["unit"]] for removal in summary["removals"])
    assert summary["budget_unit"] == "energy"
    assert summary["kept_cost"] == pytest.approx(1 - gone / joules["whole"])
    assert 0.6 - summary["cheapest_unit_cost"] < summary["kept_cost"] <= 0.6
    assert not [finding for finding in verify_run(folder) if finding.good is False]


def test_a_run_that_cannot_count_joules_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenprune.run, "measure_unit_cost", partial(measure_unit_cost, powercap=tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"^budget\.unit: 'energy' is not valid here"):
        trained(tmp_path, budget=BudgetConfig(target=0.5, unit="energy"))
    assert not (tmp_path / "it").exists()


def test_a_checkpoint_from_when_only_seconds_were_measured_is_read() -> None:
    assert UnitCost.of_state({"unit_time": MADE_UP.to_dict()}) == MADE_UP


@pytest.mark.usefixtures("made_up")
def test_the_budget_is_met_in_time(tmp_path: Path) -> None:
    folder = trained(tmp_path)
    summary = read(folder / "summary.json")
    gone = sum(SECONDS[removal["unit"]] for removal in summary["removals"])
    assert summary["kept_cost"] == pytest.approx(1 - gone / 2.0)
    assert 0.5 - summary["cheapest_unit_cost"] < summary["kept_cost"] <= 0.5
    assert summary["budget_unit"] == "time"
    assert not [finding for finding in verify_run(folder) if finding.good is False]


def _not_again(*_: object, **__: object) -> UnitCost:
    raise AssertionError("measured, though it is known or nobody asked")


@pytest.mark.usefixtures("made_up")
def test_a_run_that_goes_on_counts_with_what_was_measured_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(tmp_path / "whole")
    with stopped_at(24):
        trained(tmp_path / "cut")
    monkeypatch.setattr(greenprune.run, "measure_unit_cost", _not_again)
    folder = trained(tmp_path / "cut", resume="auto")
    for figure in ("removals", "kept_cost", "accuracy", "loss"):
        assert read(folder / "summary.json")[figure] == read(whole / "summary.json")[figure], figure
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["unit_cost"] for event in events if event["kind"] == "start"] == [MADE_UP.to_dict()] * 2
    assert read(folder / "summary.json")["energy_lost_j"] == 0  # writing the checkpoint is no lost work
    assert not [finding for finding in verify_run(folder) if finding.good is False]


@pytest.mark.usefixtures("made_up")
def test_nothing_is_measured_for_a_structure_that_is_trained_from_scratch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(tmp_path / "gated")
    monkeypatch.setattr(greenprune.run, "measure_unit_cost", _not_again)
    model = replace(SMALL.model, structure=str(found))
    folder = trained(tmp_path / "scratch", model=model, gate=GateConfig(enabled=False))
    mine, theirs = read(folder / "summary.json"), read(found / "summary.json")
    assert mine["params"] == theirs["params"]
    assert mine["budget_unit"] == "flops"  # what the share that is kept is told in


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


@pytest.mark.parametrize("unit", ["time", "energy"])
def test_channels_are_not_measured(unit: str) -> None:
    with pytest.raises(ConfigError, match=rf"^budget\.unit: '{unit}' is not valid; expected flops or params"):
        replace(SMALL, gate=GateConfig(units=["channel"]), budget=BudgetConfig(0.5, unit))  # type: ignore[arg-type]


def test_the_pruner_takes_what_it_measured_along() -> None:
    def pruner() -> Pruner:
        budget = BudgetConfig(target=0.9, unit="time")
        return Pruner(CifarResNet(20, 10, 1), torch.zeros(4, 1, 8, 8), total_steps=20, budget=budget)

    first, second = pruner(), pruner()
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["unit_cost"] == first.state_dict()["unit_cost"]
    with pytest.warns(UserWarning, match="the gates have learnt nothing"):
        second.finalize()
    assert second.report()["kept_cost"] <= 0.9
