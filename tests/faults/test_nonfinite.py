"""Numbers that are not finite, on one rank only: all ranks stop together or skip the step together, as configured."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from launching import run

from greenprune.checkpoint import list_checkpoints, load_checkpoint
from greenprune.config import BudgetConfig, Config, ConfigError, GateConfig, RemovalConfig, parse_config
from greenprune.engine import Engine
from greenprune.gating import GatePolicy, UnitCosts, find_gates
from greenprune.progress import Display
from greenprune.run import train
from greenprune.skipping import StepSkipper
from greenprune.tracking import read_events
from greenprune.trainer import TrainingDiverged

WORKER = Path(__file__).with_name("nonfinite_worker.py")
FLAGS = ["--model.name", "resnet20", "--optim.epochs", "2", "--optim.lr", "0.05", "--removal.window", "11"]
FLAGS += ["--removal.decide_by", "0.9", "--tracking.log_every", "4", "--device", "cpu", "--run_name", "it"]


def broken(
    folder: Path, *faults: str, flags: tuple[str, ...] = (), launch: str | None = None
) -> tuple[Any, list[dict]]:
    """A run on two processes with faults, each as FAULT:VALUE:RANK:STEP, and its events."""
    done = run(WORKER, [",".join(faults), *FLAGS, "--output_dir", str(folder), *flags], 2, launch=launch)
    return done, read_events(folder / "it" / "events.jsonl")


@pytest.mark.parametrize(
    "fault", ["loss:nan", *(pytest.param(fault, marks=pytest.mark.system) for fault in ("gradient:inf", "gate:nan"))]
)
def test_all_ranks_stop_together(fault: str, tmp_path: Path) -> None:
    done, events = broken(tmp_path, f"{fault}:1:26")
    assert done.returncode != 0
    assert "trainer.py" not in done.stderr, done.stderr  # no traceback but the launcher's
    found = re.findall(
        r"greenprune: error: the loss, a weight or a statistic of it is (\w+) after step (\d+); the last good",
        done.stderr,
    )
    assert [step for _, step in found] == ["28"], done.stderr  # the next read of the loss, said once
    assert "step-000000022" in done.stderr
    assert [event["step"] for event in events if event["kind"] == "train"][-1] == 24


@pytest.mark.system
@pytest.mark.parametrize(("stage", "flags"), [(0, ()), (1, ()), (2, ("--optim.clip_norm", "1"))])
def test_deepspeed_stops_by_a_gradient_that_is_not_finite_as_the_others_do(
    tmp_path: Path, stage: int, flags: tuple[str, ...]
) -> None:
    """ZeRO would leave such steps out by itself, each of them, and nobody would know."""
    done, events = broken(tmp_path, "gradient:inf:1:26", flags=flags, launch=f"deepspeed_zero{stage}_cpu_2")
    assert done.returncode != 0
    assert re.findall(r"greenprune: error: .* is nan after step (\d+); the last good", done.stderr) == ["28"]
    assert [event["step"] for event in events if event["kind"] == "train"][-1] == 24


def test_all_ranks_skip_together(tmp_path: Path) -> None:
    flags = ("--optim.nonfinite", "skip", "--optim.ema", "0.9")
    done, events = broken(tmp_path, "loss:nan:1:26", "gradient:inf:0:30", "gate:nan:1:33", flags=flags)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [event["train/loss"] for event in events if event["kind"] == "train"]
    assert len(losses) == 12
    assert None not in losses
    told = {event["step"]: event["train/skipped_steps"] for event in events if event["kind"] == "train"}
    assert [told[step] for step in (24, 28, 32, 36, 44)] == [0, 1, 2, 3, 3]
    assert json.loads((tmp_path / "it" / "summary.json").read_text())["skipped_steps"] == 3
    last = load_checkpoint(list_checkpoints(tmp_path / "it" / "checkpoints")[-1])
    assert all(tensor.isfinite().all() for tensor in [*last.model.values(), *last.training["average"].values()])


def test_a_step_whose_statistics_are_infinite_is_skipped_though_its_loss_is_not(tmp_path: Path) -> None:
    """The variance of so large an image leaves fp32; divided by it, activations are 0, and the loss is finite."""
    done, events = broken(tmp_path, "image:1e30:1:26", flags=("--optim.nonfinite", "skip"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [event["train/skipped_steps"] for event in events if event["kind"] == "train"][-1] == 1
    last = load_checkpoint(list_checkpoints(tmp_path / "it" / "checkpoints")[-1])
    assert all(tensor.isfinite().all() for tensor in last.model.values())


def test_a_constant_that_is_infinite_keeps_no_step_from_counting() -> None:
    """As a causal mask in a buffer is."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    skipper = StepSkipper(optimizer, None, scaled=False, device=torch.device("cpu"))
    for scale, skipped in ((1.0, 0.0), (1e30, 1.0), (1.0, 0.0)):
        skipper.begin(model)
        optimizer.zero_grad()
        skipper.marked(model(scale * torch.randn(8, 2)).sum()).backward()
        skipper.judge(model)
        optimizer.step()
        assert skipper.end(torch.ones(1)).tolist() == [1 - skipped, skipped]
    assert model[1].running_var.isfinite().all()


def test_a_window_whose_only_step_is_skipped_decides_by_how_open_gates_are(tmp_path: Path) -> None:
    """Of 44 steps the 34th, alone between a boundary and the deadline."""
    flags = ("--optim.nonfinite", "skip", "--removal.decide_by", "0.77", "--removal.window", "11")
    done, _ = broken(tmp_path, "loss:nan:1:33", flags=flags)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "it" / "summary.json").read_text())
    assert summary["skipped_steps"] == 1
    assert summary["gates_left"] == 0
    assert summary["kept_cost"] <= 0.5


@pytest.mark.parametrize("window", ["1", pytest.param("2", marks=pytest.mark.system)])
def test_a_window_that_is_skipped_whole_decides_nothing_and_ends_nothing(tmp_path: Path, window: str) -> None:
    flags = ("--optim.nonfinite", "skip", "--removal.window", window, "--optim.epochs", "1")
    done, _ = broken(tmp_path, "loss:nan:1:9", "loss:nan:0:10", "loss:nan:1:11", flags=flags)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "it" / "summary.json").read_text())
    assert summary["skipped_steps"] == 3
    assert summary["gates_left"] == 0


def test_skipping_what_does_not_pass_ends_in_a_stop(tmp_path: Path) -> None:
    """A weight that is broken on one rank makes every later step a bad one, for all."""
    flags = ("--optim.nonfinite", "skip", "--removal.window", "100")
    done, _ = broken(tmp_path, "weight:nan:1:2", flags=flags)
    assert done.returncode != 0
    said = "the gradients of 20 steps in a row, up to step 22, were not finite, and all of them were skipped"
    assert f"{said} (optim.nonfinite skip); there is no checkpoint yet" in done.stderr


def train_with_loss_scaler(
    folder: Path, epochs: int, is_bad: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Any]:
    """A run as fp16 has it: the scaler halves its scale and leaves out a step of which the loss tells nothing.

    In the run's precision on a CPU, with the scaler that it has on a GPU.

    Args:
        folder: Where it goes.
        epochs: Its epochs, of 22 steps.
        is_bad: Says of a step, from 1, whether its gradient is not finite.
        monkeypatch: Of the test.
    """

    def with_scaler(config: Config) -> Engine:
        engine = Engine(config)
        engine._accelerator.scaler = torch.amp.GradScaler("cpu")
        return engine

    def backward(engine: Engine, loss: torch.Tensor) -> None:
        plain(engine, loss)
        passes.append(1)
        if is_bad(len(passes)):
            gradient = next(engine.module.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[0] = torch.nan

    plain, passes = Engine.backward, list[int]()
    monkeypatch.setattr(Engine, "backward", backward)
    monkeypatch.setattr("greenprune.run._open_engine", with_scaler)
    config = parse_config([*FLAGS, "--optim.epochs", str(epochs), "--output_dir", str(folder)])
    return lambda: train(config, {}, lambda: Display(io.StringIO()))


def test_gradients_that_no_loss_scale_makes_finite_end_in_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a fault that passes, one that stays."""
    fit = train_with_loss_scaler(tmp_path, 3, lambda step: 4 <= step < 10 or step > 24, monkeypatch)
    said = r"finite whatever the loss is scaled by .* after step 52; the last good checkpoint is .*step-000000044"
    with pytest.raises(TrainingDiverged, match=said):
        fit()
    losses = [event["train/loss"] for event in read_events(tmp_path / "it" / "events.jsonl") if "train/loss" in event]
    assert None not in losses


def test_a_step_that_the_loss_scaler_leaves_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its scale: how many there were it does not count, so nothing says that there were none."""
    train_with_loss_scaler(tmp_path, 1, lambda step: step == 6, monkeypatch)()
    events = read_events(tmp_path / "it" / "events.jsonl")
    scales = {event["step"]: event["train/loss_scale"] for event in events if event["kind"] == "train"}
    assert {step: scales[step] for step in (4, 8, 20)} == {4: 2.0**16, 8: 2.0**15, 20: 2.0**15}
    assert json.loads((tmp_path / "it" / "summary.json").read_text())["skipped_steps"] is None


class Step:
    """One small gated network, its optimizer and its policy, which take steps with a skipper or without."""

    def __init__(self, make_network: Callable[..., nn.Module], kind: str, *, skipping: bool) -> None:
        torch.manual_seed(1)
        self.model = make_network()
        if kind == "sgd":
            self.optimizer: Any = torch.optim.SGD(
                self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True, fused=True
            )
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)
        blocks = list(find_gates(self.model))
        self.policy = GatePolicy(
            Config(gate=GateConfig(warmup=0.01), budget=BudgetConfig(0.5), removal=RemovalConfig(decide_by=0.9)),
            self.model,
            UnitCosts.of(dict.fromkeys(blocks, 1), len(blocks)),
            set(blocks),
            rounding={},
            total_steps=100,
            window=10,
        )
        device = torch.device("cpu")
        self.skipper = StepSkipper(self.optimizer, self.policy, scaled=False, device=device) if skipping else None
        self.step = 1

    def take(self, images: torch.Tensor) -> None:
        if self.skipper is not None:
            self.skipper.begin(self.model)
        loss = self.model(images).square().mean()
        penalty = self.policy.penalty(self.step, len(images), lambda values: values)
        loss = loss if penalty is None else loss + penalty
        (loss if self.skipper is None else self.skipper.marked(loss)).backward()
        if self.skipper is not None:
            self.skipper.judge(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.skipper is not None:
            self.skipper.end(torch.zeros(2))
        self.step += 1

    def state(self) -> dict[str, Any]:
        buffers = {name: tensor for name, tensor in self.model.state_dict().items() if "num_batches" not in name}
        moments = self.optimizer.state_dict()["state"]
        return {"model": buffers, "optimizer": moments, "price": self.policy.controller.state_dict()}


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("bad_steps", [[0], [1], [2, 3]], ids=str)
def test_a_skipped_step_leaves_nothing_behind(
    make_network: Callable[..., nn.Module], kind: str, bad_steps: list[int]
) -> None:
    """Weights, moments, running statistics, price and counts are those of the same run without the bad batches."""
    skipping, without = Step(make_network, kind, skipping=True), Step(make_network, kind, skipping=False)
    for number in range(5):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        if number in bad_steps:
            skipping.take(images * torch.nan)
            without.step += 1  # the target's ramp follows the step
        else:
            skipping.take(images)
            without.take(images)
    torch.testing.assert_close(skipping.state(), without.state(), rtol=0, atol=0)
    windows = [each.policy.consensus.close_window() for each in (skipping, without)]
    assert windows[0] == windows[1]
    assert skipping.skipper is not None
    assert skipping.skipper.in_a_row == 0


def test_a_loss_that_is_infinite_with_a_finite_gradient_is_a_bad_step(make_network: Callable[..., nn.Module]) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1, fused=True)
    skipper = StepSkipper(optimizer, None, scaled=False, device=torch.device("cpu"))
    before = model.weight.detach().clone()
    skipper.begin(model)
    loss = model(torch.ones(1, 2)).sum() + torch.inf
    skipper.marked(loss).backward()
    skipper.judge(model)
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_an_optimizer_that_cannot_skip_is_named() -> None:
    optimizer = torch.optim.Adagrad(nn.Linear(2, 2).parameters())
    with pytest.raises(ConfigError, match=r"optim\.nonfinite: 'skip' is not valid with Adagrad"):
        StepSkipper(optimizer, None, scaled=False, device=torch.device("cpu"))
