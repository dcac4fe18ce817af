"""The library: a plain training loop with a pruner ends with a smaller network, in budget, and can be resumed."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer, mobilenet_v3_small, resnet18
from torchvision.models.resnet import BasicBlock
from torchvision.ops.misc import Permute

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launching import run

from greenprune import BudgetConfig, GateConfig, Pruner, RemovalConfig, SurgeryConfig, UserError
from greenprune.flops import count_costs
from greenprune.gating import find_gates, gate_parameters
from greenprune.models import CifarResNet, PlainBlock, ResidualBlock, convert_blocks
from greenprune.surgery import Operation, StructureMismatch, carry_out, replay

STEPS, WINDOW = 60, 6


def make_pruner(units: list[str] | None = None, target: float = 0.5, **settings: object) -> tuple[nn.Module, Pruner]:
    torch.manual_seed(0)
    model = CifarResNet(20, 10, channels=1)
    gate = GateConfig(units=units or ["block", "channel"])  # type: ignore[arg-type]
    options = {
        "removal": RemovalConfig(window=WINDOW, decide_by=0.3),
        "budget": BudgetConfig(target=target),
        **settings,
    }
    return model, Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS, gate=gate, **options)  # type: ignore[arg-type]


def make_optimizer(pruner: Pruner) -> Optimizer:
    return torch.optim.SGD(pruner.parameter_groups(weight_decay=1e-3), lr=0.05, momentum=0.9)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Stripes, upright or lying, in ten widths and shades: learnt in a few steps."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 10, (16,), generator=generator)
    images = 0.3 * torch.randn(16, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, :, label % 8] += 1.0 + label / 5
    return images, labels


def train(model: nn.Module, pruner: Pruner, optimizer: Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        images, labels = batch_of(step)
        loss = functional.cross_entropy(model(images), labels) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("units", [["block"], ["channel"], ["block", "channel"]], ids="-".join)
@pytest.mark.parametrize("target", [0.5, 0.3])
def test_a_plain_loop_ends_in_budget_without_gates(units: list[str], target: float) -> None:
    model, pruner = make_pruner(units, target)
    dense = pruner.report()
    assert dense["kept_cost"] == pytest.approx(1.0)
    # The gates of branches multiply by what they see of their input; those of channels look at one number each.
    assert (dense["flops_forward"] > dense["flops_forward_dense"]) == ("block" in units)
    optimizer = make_optimizer(pruner)
    train(model, pruner, optimizer, range(STEPS))
    assert pruner.finalize(optimizer) == []  # the deadline has settled all
    report = pruner.report()
    assert report["gates_left"] == len(find_gates(model)) == len(gate_parameters(model)) == 0
    granularity = 0.11 if units == ["block"] else 0.01
    assert target - granularity < report["kept_cost"] <= target
    assert report["flops_forward"] / report["flops_forward_dense"] == pytest.approx(report["kept_cost"])
    assert report["params"] == sum(parameter.numel() for parameter in model.parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(held) == set(model.parameters())
    assert len(held) == len(set(held))


def test_the_structure_makes_the_same_network_of_a_fresh_dense_one() -> None:
    model, pruner = make_pruner()
    train(model, pruner, make_optimizer(pruner), range(STEPS))
    fresh = CifarResNet(20, 10, channels=1)
    replay(pruner.structure, fresh)
    fresh.load_state_dict(model.state_dict())
    images, _ = batch_of(0)
    assert torch.equal(fresh.eval()(images), model.eval()(images))


def test_a_structure_asks_for_blocks_that_are_taken_apart() -> None:
    def fresh() -> nn.Module:
        return resnet18(num_classes=10)

    torch.manual_seed(0)
    model, images = fresh(), torch.randn(2, 3, 32, 32)
    pruner = Pruner(model, images, total_steps=STEPS, gate=GateConfig(units=["block", "channel"]))
    (model(images).mean() + pruner.penalty()).backward()
    pruner.finalize()
    done, other = pruner.structure.operations, fresh()
    why = r"none is taken apart; expected a copy .* after the Pruner, or greenprune\.models\.convert_blocks\("
    with pytest.raises(KeyError, match=why):  # as of an average that was made before the pruner
        carry_out(done, other)
    with pytest.raises(StructureMismatch, match=why):
        replay(pruner.structure, other)
    convert_blocks(other, images)
    replay(pruner.structure, other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(images), model.eval()(images))


@pytest.mark.parametrize("cut", [20, 27, 41])
def test_a_resumed_loop_is_the_uninterrupted_one(cut: int, tmp_path: Path) -> None:
    model, pruner = make_pruner()
    optimizer = make_optimizer(pruner)
    train(model, pruner, optimizer, range(cut))
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
    torch.save(copy.deepcopy(parts), tmp_path / "saved.pt")
    expected = train(model, pruner, optimizer, range(cut, STEPS))

    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    model, pruner = make_pruner()
    pruner.load_state_dict(saved["pruner"])
    optimizer = make_optimizer(pruner)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(model, pruner, optimizer, range(cut, STEPS)) == expected


def test_a_state_of_another_network_is_refused() -> None:
    model, pruner = make_pruner(["block"])
    train(model, pruner, make_optimizer(pruner), range(STEPS))
    other = Pruner(
        nn.Sequential(ResidualBlock(nn.Conv2d(1, 1, 1), nn.Identity(), nn.ReLU(), input_activated=True)),
        torch.randn(2, 1, 8, 8),
        total_steps=STEPS,
    )
    with pytest.raises(StructureMismatch, match="no unit"):
        other.load_state_dict(pruner.state_dict())


@pytest.mark.parametrize("trained", [0, 10, 12])
def test_an_early_end_is_settled_against_the_budget(trained: int) -> None:
    """Also before the first step, and right at a boundary, where nothing was counted since."""
    model, pruner = make_pruner()
    optimizer = make_optimizer(pruner)
    train(model, pruner, optimizer, range(trained))
    with nullcontext() if trained else pytest.warns(UserWarning, match="the gates have learnt nothing"):
        assert pruner.finalize(optimizer)
    assert pruner.report()["gates_left"] == 0
    assert 0.49 < pruner.report()["kept_cost"] <= 0.5
    images, labels = batch_of(1)
    functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    assert pruner.penalty().item() == 0
    assert pruner.step(optimizer) == []


def test_gradient_accumulation_changes_the_structure_only_after_a_step() -> None:
    model, pruner = make_pruner()
    optimizer = make_optimizer(pruner)
    removed_at = []
    for step in range(STEPS):
        images, labels = batch_of(step)
        loss = functional.cross_entropy(model(images), labels) + pruner.penalty()
        (loss / 4).backward()
        if step % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            if pruner.step(optimizer):
                removed_at.append(step)
    assert removed_at
    assert pruner.report()["gates_left"] == 0


@pytest.mark.parametrize("told_by", ["the loop", "penalize_output"])
def test_gates_learn_as_much_from_a_batch_in_two_halves_of_a_loss_as_from_the_whole(told_by: str) -> None:
    """What a gradient means to a gate is not linear in it: its bound and its curvature are those of a sample's loss."""

    def gradients(passes: int) -> list[Tensor]:
        model, pruner = make_pruner(["block"])
        if told_by == "the loop":
            pruner.losses_are_divided_by(passes)
        else:
            pruner.penalize_output(passes)
        images, labels = batch_of(0)
        for _ in range(passes):
            loss = functional.cross_entropy(model(images), labels)
            ((loss + pruner.penalty() if told_by == "the loop" else loss) / passes).backward()
        return [parameter.grad for parameter in gate_parameters(model)]

    for one, other in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_gates_learning_rate_adds_up_to_the_same_over_fewer_steps() -> None:
    sums = []
    for accumulate in (1, 4):
        _, pruner = make_pruner(["block"])
        pruner.losses_are_divided_by(accumulate)
        (gates,) = (group for group in pruner.parameter_groups(batch_size=16) if group.get("name") == "gates")
        sums.append(gates["lr"] * STEPS / accumulate)
    assert sums == [15.0, 15.0]  # sqrt(60 * 16 / 4), to two digits


class Output(NamedTuple):
    logits: Tensor
    extra: str = "kept"


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    extra: str = "kept"


@pytest.mark.parametrize("shape", ["tensor", "tuple", "list", "dict", "named tuple", "dataclass"])
def test_the_penalty_beside_the_output_is_the_penalty_in_the_loss(shape: str) -> None:
    """For loops that do not let anyone at their loss."""

    class Shaped(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> object:
            logits = self.network(images)
            made: dict[str, Callable[[], object]] = {
                "tensor": lambda: logits,
                "tuple": lambda: (None, logits),
                "list": lambda: [images, logits],
                "dict": lambda: {"nothing": None, "logits": logits},
                "named tuple": lambda: Output(logits),
                "dataclass": lambda: Frozen(logits),
            }
            return made[shape]()

    def gradients(hidden: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Shaped(CifarResNet(20, 10, channels=1))
        settings = GateConfig(units=["block", "channel"], warmup=0.0)
        pruner = Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS, gate=settings)
        images, labels = batch_of(0)
        if hidden:
            pruner.penalize_output()
        output = model(images)
        ways = {"tensor": lambda: output, "tuple": lambda: output[1], "list": lambda: output[1]}
        logits = output["logits"] if shape == "dict" else ways.get(shape, lambda: output.logits)()
        loss = functional.cross_entropy(logits, labels)
        (loss if hidden else loss + pruner.penalty()).backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(gradients(True), gradients(False), strict=True))


class Parted(nn.Module):
    """Gives features and what two heads make of them, one deep inside; all of the blocks lie before them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = CifarResNet(8, 10, channels=1)
        self.heads = nn.ModuleList(nn.Linear(10, 10) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, object]]:
        features = self.network(images)
        first, second = (head(features) for head in self.heads)
        return features, {"first": first, "rest": (None, [second])}


def parts_of(output: tuple[Tensor, dict[str, Any]]) -> dict[str, Tensor]:
    features, logits = output
    return {"features": features, "first": logits["first"], "second": logits["rest"][1][0]}


def assert_learns_as_from_the_loss(make_loss: Callable[[dict[str, Tensor], Tensor], Tensor]) -> None:
    """A network learns the same with its penalty beside the output as with the penalty in the loss."""

    def gradients(hidden: bool) -> list[Tensor | None]:
        model = Parted()
        pruner = Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS, gate=GateConfig(warmup=0.0))
        images, labels = batch_of(0)
        if hidden:
            pruner.penalize_output()
        loss = make_loss(parts_of(model(images)), labels)
        (loss if hidden else loss + pruner.penalty()).backward()
        return [parameter.grad for parameter in model.parameters()]

    for mine, expected in zip(gradients(True), gradients(False), strict=True):
        assert (mine is None) == (expected is None)  # what the loss does not use stays without a gradient
        assert mine is None or torch.equal(mine, expected)


@pytest.mark.parametrize("used", [["features"], ["first"], ["second"], ["features", "first", "second"]], ids="-".join)
def test_the_penalty_is_in_the_loss_whatever_part_of_the_output_that_is_made_of(used: list[str]) -> None:
    def make_loss(parts: dict[str, Tensor], labels: Tensor) -> Tensor:
        return torch.stack([functional.cross_entropy(parts[name], labels) for name in used]).sum()

    assert_learns_as_from_the_loss(make_loss)


def test_the_penalty_counts_once_for_a_forward_pass() -> None:
    """However often, and through whatever, a loop goes back from its output."""
    model = Parted()
    pruner = Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS)
    weight = nn.Parameter(torch.ones(()))
    pruner._penalty = lambda **_: 3 * weight  # type: ignore[method-assign, assignment, misc]
    pruner.penalize_output()
    images = batch_of(0)[0].requires_grad_()

    def added_by(go_back: Callable[[dict[str, Tensor]], object]) -> float:
        weight.grad = None
        go_back({name: part.square().sum() for name, part in parts_of(model(images)).items()})
        return 0.0 if weight.grad is None else weight.grad.item()

    def one_after_the_other(losses: dict[str, Tensor]) -> None:
        losses["first"].backward(retain_graph=True)
        losses["second"].backward()

    def by_the_images_before(losses: dict[str, Tensor]) -> None:
        (slope,) = torch.autograd.grad(losses["first"], images, create_graph=True)
        (losses["first"] + slope.square().sum()).backward()

    assert added_by(lambda losses: None) == 0
    assert added_by(lambda losses: losses["second"].backward()) == 3
    assert added_by(lambda losses: sum(losses.values()).backward()) == 3  # type: ignore[union-attr]
    assert added_by(lambda losses: (losses["features"] * losses["features"]).backward()) == 3
    assert added_by(one_after_the_other) == 3
    assert added_by(by_the_images_before) == 3
    assert added_by(lambda losses: torch.autograd.grad(losses["first"], images)) == 0


def test_an_output_beside_which_the_penalty_stands_may_be_changed_in_place() -> None:
    def make_loss(parts: dict[str, Tensor], labels: Tensor) -> Tensor:
        logits = parts["second"]
        logits.div_(2.0)
        logits[:, 0] = 0.0
        return functional.cross_entropy(logits, labels)

    assert_learns_as_from_the_loss(make_loss)


def test_outputs_that_are_views_of_each_other_are_not_changed_in_place_unnoticed() -> None:
    """The gradient of the one would not know of the change of the other."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = CifarResNet(8, 10, channels=1)

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.network(images)
            return logits, logits[:, 0]

    model = Views()
    pruner = Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS)
    pruner.penalize_output()
    logits, first = model(batch_of(0)[0])
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        logits.mul_(2.0)
    first.sum().backward()


def test_asking_again_for_the_penalty_beside_the_output_does_not_add_it_twice() -> None:
    model, pruner = make_pruner(["block"])
    first = pruner.penalize_output()
    second = pruner.penalize_output(accumulate=2)
    images, _ = batch_of(0)
    model(images)
    assert (pruner.batches, pruner.accumulate) == (1, 2)
    first.remove()  # was replaced
    model(images)
    assert pruner.batches == 2
    second.remove()
    model(images)
    assert pruner.batches == 2


@pytest.mark.parametrize(("unit", "target"), [("flops", 0.4), pytest.param("time", 0.6, marks=pytest.mark.system)])
def test_processes_of_a_data_parallel_loop_agree(unit: str, target: float) -> None:
    """Each on its own part of the data, with other last batches; what is measured is measured by one of them."""
    done = run(Path(__file__).parent / "distributed" / "pruner_worker.py", [unit, str(target)], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.strip().splitlines()[-1])
    assert first == second
    assert first["kept_cost"] <= target
    assert first["gates_left"] == 0
    assert first["removed_blocks"]


@pytest.mark.system
def test_a_measurement_that_fails_fails_on_every_process() -> None:
    done = run(Path(__file__).parent / "distributed" / "pruner_worker.py", ["energy", "0.6"], processes=2)
    assert done.returncode != 0
    assert done.stderr.count("ConfigError: budget.unit: 'energy' is not valid here: nothing counts here") == 2


@pytest.mark.system
def test_a_measurement_that_breaks_on_the_first_process_is_told_on_the_others() -> None:
    """Whatever broke: they wait for what it finds."""
    worker = Path(__file__).parent / "distributed" / "pruner_worker.py"
    done = run(worker, ["time", "0.6", "fails"], processes=2)
    assert done.returncode != 0
    assert "MemoryError: no room to measure" in done.stderr
    told = "RuntimeError: budget.unit: 'time' could not be measured by rank 0 (MemoryError: no room to measure)"
    assert done.stderr.count(told) == 1


@pytest.mark.parametrize("moved", ["before", "after"])
def test_the_pruner_is_where_the_network_is(moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the meta device in a GPU's place, on which a tensor from elsewhere is refused as well."""
    monkeypatch.setattr("greenprune.pruner.check_has_values", lambda *_: None)  # else refused: a GPU has values
    model = CifarResNet(20, 10, channels=1)
    images = torch.randn(4, 1, 8, 8)
    if moved == "before":
        model.to("meta")
        images = images.to("meta")
    gate = GateConfig(units=["block", "channel"], warmup=0.0)
    pruner = Pruner(model, images, total_steps=STEPS, gate=gate)
    loss = model.to("meta")(images.to("meta")).sum() + pruner.penalty()
    loss.backward()
    assert loss.device.type == "meta"
    assert all(parameter.grad is not None for parameter in gate_parameters(model))


def test_a_network_of_words_is_pruned() -> None:
    """Its input is whole numbers, of which no gradient is asked."""
    torch.manual_seed(0)
    blocks = [ResidualBlock(mlp(8), nn.Identity(), nn.ReLU(), input_activated=False) for _ in range(4)]
    model = nn.Sequential(nn.Embedding(50, 8), *blocks, nn.Flatten(), nn.Linear(24, 10))
    words = torch.randint(0, 50, (16, 3))
    pruner = Pruner(model, words, total_steps=STEPS, budget=BudgetConfig(0.6))
    optimizer = make_optimizer(pruner)
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(words), words[:, 0] % 10) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
    assert pruner.report()["gates_left"] == 0
    assert 0.3 < pruner.report()["kept_cost"] <= 0.6


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("units", [["block"], ["channel"], ["block", "channel"]], ids="-".join)
def test_a_network_of_one_or_three_dimensions_is_pruned(dims: int, units: list[str]) -> None:
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")

    def block() -> nn.Module:
        branch = nn.Sequential(conv(8, 12, 3, padding=1), norm(12), nn.ReLU(), conv(12, 8, 3, padding=1))
        return ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=True)

    model = nn.Sequential(conv(2, 8, 1), nn.ReLU(), *(block() for _ in range(6)), nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(16, 2, *[4] * dims)
    gate = GateConfig(units=units)  # type: ignore[arg-type]
    settings = {"removal": RemovalConfig(window=WINDOW, decide_by=0.3), "budget": BudgetConfig(0.6)}
    pruner = Pruner(model, x[:2], total_steps=STEPS, gate=gate, **settings)  # type: ignore[arg-type]
    assert not pruner.notes
    optimizer = make_optimizer(pruner)
    for _ in range(STEPS):
        loss = functional.cross_entropy(model(x), torch.arange(16) % 4) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
    report, counted = pruner.report(), count_costs(model, tuple(x.shape[1:]))[""]
    assert report["gates_left"] == 0
    assert 0.4 < report["kept_cost"] <= 0.6
    assert (report["flops_forward"], report["params"]) == (counted.flops_forward, counted.params)


class OutputFirst(nn.Module):
    """Registers its layers in another order than it calls them in."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def widened() -> nn.Module:
    """A branch that has more channels at its first layer than in its input."""
    return nn.Sequential(nn.ZeroPad3d((0, 0, 0, 0, 0, 4)), nn.Conv2d(12, 8, 1))


def permuted() -> nn.Module:
    """A branch whose linear layers have the channels that its input has at another dimension."""
    layers = (nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    return nn.Sequential(Permute([0, 2, 3, 1]), *layers, Permute([0, 3, 1, 2]))


def up_and_down() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 8, 2, 2))


@pytest.mark.parametrize("branch", [OutputFirst, widened, permuted, up_and_down])
def test_a_gate_looks_at_the_channels_that_its_block_is_given(branch: Callable[[], nn.Module]) -> None:
    block = ResidualBlock(branch(), nn.Identity(), nn.ReLU(), input_activated=False)
    model = nn.Sequential(nn.Conv2d(1, 8, 1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    gate, budget = GateConfig(warmup=0.0), BudgetConfig(target=0.9)
    pruner = Pruner(model, torch.randn(2, 1, 6, 6), total_steps=STEPS, gate=gate, budget=budget)
    (gate_of_block,) = find_gates(model).values()
    seen = torch.randn(4, 8, 6, 6)
    with torch.no_grad():
        gate_of_block.weight[0, 3], gate_of_block.bias[0] = 1.0, 0.0  # type: ignore[index]
        seen[:2, 3] += 9.0
        seen[2:, 3] -= 9.0
    assert gate_of_block(seen).tolist() == [1.0, 1.0, 0.0, 0.0]
    gate_of_block.forget()
    train(model, pruner, make_optimizer(pruner), range(2))  # images of another size


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


@pytest.mark.parametrize("units", [["block"], ["channel"], ["block", "channel"]], ids="-".join)
def test_a_penalty_asked_for_under_autocast_is_the_same(units: list[str]) -> None:
    def penalty(enabled: bool) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)
        model = CifarResNet(20, 10, channels=1)
        gate = GateConfig(units=units, warmup=0.0)  # type: ignore[arg-type]
        pruner = Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS, gate=gate)
        model(batch_of(0)[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = pruner.penalty()
        found.backward()
        return found, [parameter.grad for parameter in gate_parameters(model) if parameter.grad is not None]

    (with_it, gradients), (without, expected) = penalty(True), penalty(False)
    assert with_it.dtype == torch.float32
    assert torch.equal(with_it, without)
    assert expected
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("cast", ["before", "after"])
def test_a_network_in_half_the_precision_has_gates_in_full(cast: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = VisionTransformer(
        image_size=16, patch_size=8, num_layers=4, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=4
    )
    images = torch.randn(4, 3, 16, 16)
    if cast == "before":
        model.bfloat16()
    gate = GateConfig(units=["block", "channel"], warmup=0.0)
    pruner = Pruner(model, images.to(next(model.parameters()).dtype), total_steps=STEPS, gate=gate)
    model.bfloat16()
    assert {parameter.dtype for parameter in gate_parameters(model)} == {torch.float32}
    loss = model(images.bfloat16()).float().logsumexp(1).sum() + pruner.penalty()
    loss.backward()
    assert all(parameter.grad is not None for parameter in gate_parameters(model))


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("units", [["block"], ["block", "channel"]], ids="-".join)
@pytest.mark.parametrize("default_dtype", [torch.float64, torch.bfloat16], ids=str, indirect=True)
def test_gates_are_in_full_precision_whatever_tensors_are_made_in(default_dtype: torch.dtype, units: list[str]) -> None:
    model, pruner = make_pruner(units, removal=RemovalConfig(window=2, decide_by=0.2))
    assert {parameter.dtype for parameter in gate_parameters(model)} == {torch.float32}
    optimizer = make_optimizer(pruner)
    train(model, pruner, optimizer, range(STEPS // 5 - 1))
    images, _ = batch_of(0)
    assert model(images).dtype == default_dtype
    assert pruner.penalty().dtype == torch.float32
    pruner.finalize(optimizer)
    assert pruner.report()["kept_cost"] <= 0.5


@pytest.mark.parametrize("kind", ["conditional", "static"])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_a_network_in_double_precision_is_pruned(cast: str, kind: str) -> None:
    torch.manual_seed(0)
    model = CifarResNet(20, 10, channels=1)
    if cast == "before":
        model.double()
    gate = GateConfig(units=["block", "channel"], kind=kind)  # type: ignore[arg-type]
    example = torch.randn(2, 1, 8, 8, dtype=next(model.parameters()).dtype)
    pruner = Pruner(model, example, total_steps=STEPS, gate=gate, removal=RemovalConfig(window=WINDOW, decide_by=0.3))
    model.double()
    assert {parameter.dtype for parameter in gate_parameters(model)} == {torch.float32}
    optimizer = make_optimizer(pruner)
    removals = 0
    for step in range(STEPS):
        images, labels = batch_of(step)
        logits = model(images.double())
        penalty = pruner.penalty()
        assert penalty.dtype == torch.float32
        optimizer.zero_grad()
        (functional.cross_entropy(logits, labels) + penalty).backward()
        optimizer.step()
        removals += len(pruner.step(optimizer))
    assert removals
    assert pruner.report()["gates_left"] == 0
    assert 0.49 < pruner.report()["kept_cost"] <= 0.5


def test_what_is_left_can_be_pruned_again() -> None:
    """A second budget is of what the first has left, and counted from there."""
    model, pruner = make_pruner(["channel"], 0.7)
    train(model, pruner, make_optimizer(pruner), range(STEPS))
    first = pruner.report()
    settings = {"removal": RemovalConfig(window=WINDOW, decide_by=0.3), "budget": BudgetConfig(0.7)}
    gate = GateConfig(units=["channel"])
    again = Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS, gate=gate, **settings)  # type: ignore[arg-type]
    optimizer = make_optimizer(again)
    train(model, again, optimizer, range(STEPS))
    report = again.report()
    assert report["flops_forward_dense"] == first["flops_forward"]
    assert 0.68 < report["kept_cost"] <= 0.7
    assert report["flops_forward"] / report["flops_forward_dense"] == pytest.approx(report["kept_cost"])
    assert report["params"] == sum(parameter.numel() for parameter in model.parameters())


def test_frozen_parameters_cost_what_others_do() -> None:
    torch.manual_seed(0)
    model = CifarResNet(20, 10, channels=1)
    for parameter in [*model.stem.parameters(), *model.stages[0].parameters(), *model.stages[1].parameters()]:
        parameter.requires_grad_(False)
    pruner = Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS, budget=BudgetConfig(0.6, "params"))
    with pytest.warns(UserWarning, match="the gates have learnt nothing"):
        pruner.finalize(make_optimizer(pruner))
    report = pruner.report()
    assert report["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert 0.4 < report["kept_cost"] <= 0.6


def test_channels_are_rounded_where_asked() -> None:
    model, pruner = make_pruner(["channel"], surgery=SurgeryConfig(round_to=4))
    train(model, pruner, make_optimizer(pruner), range(STEPS))
    widths = [block.branch[0].out_channels for block in model.modules() if isinstance(block, ResidualBlock)]
    assert any(width < full for width, full in zip(widths, [16] * 3 + [32] * 3 + [64] * 3, strict=False))
    assert all(width % 4 == 0 for width in widths)
    assert 0.45 < pruner.report()["kept_cost"] <= 0.5


@pytest.mark.parametrize(("asked", "expected"), [(None, 4), (2, 2)])
def test_channels_are_rounded_as_they_were_before_it_went_on(asked: int | None, expected: int) -> None:
    """Where nothing is asked for the device says, and that may be another."""
    _, begun = make_pruner(["channel"], surgery=SurgeryConfig(round_to=4))
    model, pruner = make_pruner(["channel"], surgery=SurgeryConfig(round_to=asked))
    pruner.load_state_dict(begun.state_dict())
    with pytest.warns(UserWarning, match="the gates have learnt nothing"):
        pruner.finalize()
    widths = [block.branch[0].out_channels for block in model.modules() if isinstance(block, ResidualBlock)]
    assert math.gcd(*widths) == expected


# What is refused.


def test_what_is_trained_beside_the_network_stays_in_the_optimizer() -> None:
    """A head of its own, or a loss with parameters: neither is the pruner's."""
    model, pruner = make_pruner()
    head = nn.Linear(10, 10)
    groups = pruner.parameter_groups()
    groups[0]["params"].append(head.weight)
    optimizer = torch.optim.SGD([*groups, {"params": [head.bias]}], lr=0.05, momentum=0.9)
    images, labels = batch_of(0)
    for _ in range(STEPS):
        loss = functional.cross_entropy(head(model(images)), labels) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
    assert pruner.report()["gates_left"] == 0
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(held) == {*model.parameters(), *head.parameters()}
    assert "momentum_buffer" in optimizer.state[head.weight]


def test_an_optimizer_without_the_gates_is_refused() -> None:
    model, pruner = make_pruner()
    gates = set(gate_parameters(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p not in gates], lr=0.1)
    with pytest.raises(ValueError, match=r"gates are not in the optimizer; .*parameter_groups"):
        train(model, pruner, optimizer, range(STEPS))


def test_averages_of_weights_follow_the_removals() -> None:
    """An average that forgets all but the last weights is the network itself, whatever has gone."""
    model, pruner = make_pruner(removal=RemovalConfig(window=2, decide_by=0.12))
    average = AveragedModel(model, avg_fn=lambda _, new, __: new, use_buffers=True)
    optimizer = make_optimizer(pruner)
    for step in range(8):
        before = len(pruner.structure.operations)
        train(model, pruner, optimizer, range(step, step + 1))
        carry_out(pruner.structure.operations[before:], average.module)
        average.update_parameters(model)
    assert pruner.structure.removed_channels()
    assert not find_gates(average.module)
    state = average.module.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def in_two(pruner: Pruner) -> list[Optimizer]:
    """Two optimizers, as where matrices have one of their own."""
    matrices, *others = pruner.parameter_groups(weight_decay=1e-3)
    return [torch.optim.SGD(groups, lr=0.05, momentum=0.9) for groups in ([matrices], others)]


def test_several_optimizers_train_as_one() -> None:
    model, pruner = make_pruner(removal=RemovalConfig(window=2, decide_by=0.12))
    expected = train(model, pruner, make_optimizer(pruner), range(12))
    model, pruner = make_pruner(removal=RemovalConfig(window=2, decide_by=0.12))
    optimizers = in_two(pruner)
    losses = []
    for step in range(12):
        images, labels = batch_of(step)
        loss = functional.cross_entropy(model(images), labels) + pruner.penalty()
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        pruner.step(optimizers)
        losses.append(loss.item())
    assert losses == expected
    assert pruner.structure.removed_channels()
    held = {parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(model.parameters())
    assert all(parameter in held for optimizer in optimizers for parameter in optimizer.state)


@pytest.mark.parametrize("when", ["at its first step", "at the end"])
def test_an_optimizer_without_what_is_cut_is_refused(when: str) -> None:
    """Those layers would not be trained from the first removal on."""
    model, pruner = make_pruner()
    _, without_matrices = in_two(pruner)
    with pytest.raises(ValueError, match=r"'stages\.0\.0\.branch\.0\.weight' loses entries .*in no optimizer given"):
        pruner.step(without_matrices) if when == "at its first step" else pruner.finalize(without_matrices)
    model.requires_grad_(False)  # then there is nothing to lose
    assert pruner.step(without_matrices) == []


def test_an_optimizer_with_one_history_of_all_parameters_is_refused() -> None:
    model, pruner = make_pruner(["channel"])
    with pytest.raises(TypeError, match="LBFGS keeps one history of all parameters together"):
        pruner.step(torch.optim.LBFGS(model.parameters()))


class Around(torch.optim.Optimizer):
    """As Lookahead of timm and SAM are: with the groups of another optimizer, and a state beside that one's."""

    def __init__(self, inner: Optimizer, *, shows_state: bool) -> None:
        self.inner = inner
        self.param_groups, self.defaults = inner.param_groups, inner.defaults
        self.state = inner.state if shows_state else defaultdict(dict)


def test_an_optimizer_around_another_is_refused_for_that_one() -> None:
    """The momentum of all that loses channels would be lost, and that of what is gone would stay."""
    model, pruner = make_pruner()
    optimizer = make_optimizer(pruner)
    step_of(model, pruner, optimizer)
    message = r"Around is around another optimizer \(SGD, its 'inner'\), .*; expected that one"
    with pytest.raises(TypeError, match=message):
        pruner.step(Around(optimizer, shows_state=False))
    with pytest.raises(TypeError, match=message):
        pruner.finalize(Around(optimizer, shows_state=False))
    assert pruner.structure.operations == []
    assert pruner.step(Around(optimizer, shows_state=True)) == []
    assert pruner.finalize(Around(optimizer, shows_state=True))
    assert set(optimizer.state) <= set(model.parameters())


def test_named_parameters_keep_their_names() -> None:
    model, pruner = make_pruner()
    optimizer = torch.optim.SGD(list(model.named_parameters()), lr=0.05, momentum=0.9)
    (group,) = optimizer.param_groups
    kinds = {name: parameter.dim() for name, parameter in model.named_parameters()}
    train(model, pruner, optimizer, range(STEPS // 2))
    assert pruner.report()["gates_left"] == 0
    assert len(group["param_names"]) == len(group["params"]) < len(kinds)
    paths = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in zip(group["param_names"], group["params"], strict=True):
        assert paths[parameter] == name.replace(".inner", "")


def test_what_is_put_at_a_parameter_is_at_the_one_that_takes_its_place() -> None:
    """Hooks that bound a gradient, those of an optimizer in the backward pass, and marks of the loop's own."""
    model, pruner = make_pruner(["channel"])
    seen: list[Tensor] = []
    for parameter in model.parameters():
        parameter.no_weight_decay = True
        parameter.register_hook(lambda grad: grad.clamp(-1e-6, 1e-6))
        handle = parameter.register_post_accumulate_grad_hook(seen.append)
    images, _ = batch_of(0)
    (model(images).square().sum() + pruner.penalty()).backward()
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    unit, removed = next((done.unit, done.channels) for done in pruner.finalize() if done.channels)
    name = f"{unit.removesuffix(':hidden')}.branch.0.weight"
    left = [index for index in range(len(before[name])) if index not in removed]
    assert torch.equal(model.get_parameter(name).grad, before[name][left])
    seen.clear()
    model.zero_grad()
    model(images).square().sum().backward()
    assert set(seen) == set(model.parameters())
    assert all(parameter.grad.abs().max() <= 1e-6 for parameter in model.parameters())
    assert all(parameter.no_weight_decay for parameter in model.parameters())
    seen.clear()
    handle.remove()
    model(images).square().sum().backward()
    assert len(set(model.parameters()) - set(seen)) == 1


def step_of(model: nn.Module, pruner: Pruner, optimizer: Optimizer) -> None:
    images, labels = batch_of(0)
    (functional.cross_entropy(model(images), labels) + pruner.penalty()).backward()
    optimizer.step()


@pytest.mark.parametrize("when", ["at its first step", "at the end, having begun late"])
def test_an_optimizer_that_cannot_follow_channels_is_refused_before_any_is_removed(when: str) -> None:
    model, pruner = make_pruner(["channel"])
    optimizer = torch.optim.Adafactor(pruner.parameter_groups(), lr=0.01)
    if when == "at its first step":
        step_of(model, pruner, optimizer)
    else:
        assert pruner.step(optimizer) == []  # as after a step that a GradScaler has left out
        step_of(model, pruner, optimizer)
    before, structure = model.state_dict(), str(model)
    with pytest.raises(TypeError, match=r"Adafactor keeps 'row_var' of shape .*; expected an optimizer whose state"):
        pruner.step(optimizer) if when == "at its first step" else pruner.finalize(optimizer)
    assert str(model) == structure
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert pruner.structure.operations == []
    pruner.finalize(None)  # without it the same pruner goes on
    assert pruner.report()["gates_left"] == 0


def test_an_optimizer_that_cannot_follow_channels_may_follow_blocks() -> None:
    model, pruner = make_pruner(["block"])
    optimizer = torch.optim.Adafactor(pruner.parameter_groups(), lr=0.01)
    step_of(model, pruner, optimizer)
    pruner.step(optimizer)
    assert pruner.finalize(optimizer)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(held) == set(model.parameters())


def test_a_penalty_without_a_forward_pass_is_refused() -> None:
    _, pruner = make_pruner()
    with pytest.raises(RuntimeError, match="run the network in training"):
        pruner.penalty()


def test_a_network_with_gates_is_refused() -> None:
    model, _ = make_pruner()
    with pytest.raises(UserError, match="has gates already; expected a fresh one"):
        Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS)


def test_gates_of_a_part_in_evaluation_mode_are_told() -> None:
    model, pruner = make_pruner()
    model.train()
    model.stages[0].eval()  # type: ignore[index, union-attr]
    model(batch_of(0)[0])
    with pytest.raises(RuntimeError, match=r"6 of 18 gates are in evaluation mode.*batch norms alone"):
        pruner.penalty()


def small_block() -> ResidualBlock:
    branch = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    return ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=False)


class Clips(nn.Module):
    """Sees each frame of a clip by itself first, and then the clip as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.frames, self.clip = small_block(), nn.Sequential(small_block(), small_block())
        self.skipped = False

    def forward(self, clips: Tensor) -> Tensor:
        frames = self.frames(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
        out: Tensor = self.clip[:1](frames.mean(1)) if self.skipped else self.clip(frames.mean(1))
        return out


OTHER_NUMBERS = (
    r"^clip\.0: its gate decides for 2 inputs of a batch for which that of frames decides for 6; expected blocks with "
)


def test_blocks_that_see_other_numbers_of_inputs_are_refused_before_anything_is_trained() -> None:
    model = Clips()
    with pytest.raises(UserError, match=OTHER_NUMBERS):
        Pruner(model, torch.randn(2, 3, 3, 4, 4), total_steps=STEPS)
    assert not find_gates(model)


def test_blocks_that_come_to_see_other_numbers_of_inputs_are_named() -> None:
    model = Clips()
    pruner = Pruner(model, torch.randn(2, 1, 3, 4, 4), total_steps=STEPS)
    model(torch.randn(2, 1, 3, 4, 4))
    pruner.penalty()
    model(torch.randn(2, 3, 3, 4, 4))
    with pytest.raises(UserError, match=OTHER_NUMBERS):
        pruner.penalty()


def test_blocks_that_a_pass_has_left_out_are_named() -> None:
    """As a network does that drops whole layers at random (LayerDrop)."""
    model = Clips()
    pruner = Pruner(model, torch.randn(2, 1, 3, 4, 4), total_steps=STEPS, gate=GateConfig(units=["block", "channel"]))
    model.skipped = True
    model(torch.randn(2, 1, 3, 4, 4))
    complaint = (
        r"^clip\.1, clip\.1:hidden: 2 of 6 gates have decided nothing in a pass in training.*expected every block"
    )
    with pytest.raises(RuntimeError, match=complaint):
        pruner.penalty()
    model = Clips()
    model.skipped = True
    with pytest.raises(UserError, match=complaint):  # at once, if the pass in which costs are counted leaves it out
        Pruner(model, torch.randn(2, 1, 3, 4, 4), total_steps=STEPS, gate=GateConfig(units=["block", "channel"]))


def test_checkpoints_of_activations_that_keep_no_gradient_are_refused() -> None:
    """Those run the blocks without gradients first, and their decisions would teach the gates nothing."""

    def forward(reentrant: bool) -> Pruner:
        model, pruner = make_pruner()
        stages = model.stages
        assert isinstance(stages, nn.Module)
        run_stages = stages.forward
        stages.forward = lambda x: checkpoint(run_stages, x, use_reentrant=reentrant)
        model(batch_of(0)[0])
        return pruner

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        forward(True).penalty()
    forward(False).penalty()


def test_two_passes_that_are_learnt_from_with_one_penalty_are_refused() -> None:
    """Of two views of a batch the gates would count what they decided for the second alone."""
    model, pruner = make_pruner()
    (images, _), (others, _) = batch_of(0), batch_of(1)
    one, other = model(images), model(others)
    with pytest.raises(RuntimeError, match=r"passed twice .*after each forward pass .*views in one batch"):
        pruner.penalty()
    del one, other
    loss = model(images).square().mean() + pruner.penalty()
    (loss + model(others).square().mean() + pruner.penalty()).backward()  # with one for each
    model(torch.cat([images, others]))
    pruner.penalty()


def test_two_passes_that_go_back_one_after_the_other_with_one_penalty_are_refused() -> None:
    """Their gradients are of one step; the gates would count what they decided for the second alone."""
    model, pruner = make_pruner()
    optimizer = make_optimizer(pruner)
    (images, _), (others, _) = batch_of(0), batch_of(1)
    model(images).square().mean().backward()
    model(others)
    with pytest.raises(RuntimeError, match=r"not taken, .*in the same step: .*after each forward pass .*zero_grad"):
        pruner.penalty()
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none=set_to_none)  # the first was a look at the batch
        model(images)
        pruner.penalty()
        model(images).square().mean().backward()
    optimizer.step()  # a step without the pruner
    model(others)
    pruner.penalty()


def test_a_part_that_training_alone_calls_twice_is_refused() -> None:
    class Rehearsing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = CifarResNet(20, 10, channels=1)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(images)
            return logits + self.inner(images.flip(3)) if self.training else logits

    torch.manual_seed(0)
    model = Rehearsing().eval()
    pruner = Pruner(model, torch.randn(2, 1, 8, 8), total_steps=STEPS)
    logits = model.train()(batch_of(0)[0])
    with pytest.raises(RuntimeError, match="passed twice since decisions were last taken"):
        pruner.penalty()
    assert logits.requires_grad


def losses_with(extra: Callable[[nn.Module, Tensor], object], steps: int = 4) -> list[float]:
    """Losses of a loop that does something more with the network before the pass that the penalty is for."""
    model, pruner = make_pruner(removal=RemovalConfig(window=2, decide_by=0.12))
    optimizer = make_optimizer(pruner)
    losses, kept = [], None
    for step in range(steps):
        images, labels = batch_of(step)
        kept = extra(model, images)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model.train()(images), labels) + pruner.penalty()
        loss.backward()
        optimizer.step()
        pruner.step(optimizer)
        losses.append(loss.item())
    del kept
    assert find_gates(model)
    return losses


def without_statistics(model: nn.Module, run: Callable[[], object]) -> object:
    """What comes of a pass in training that leaves the statistics of batch norms as they are."""
    before = copy.deepcopy(model.state_dict())
    found = run()
    model.load_state_dict(before)
    return found


def evaluated(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(images)  # with gradients


def looked_at(model: nn.Module, images: Tensor) -> object:
    with torch.no_grad():
        return without_statistics(model, lambda: model.train()(images))


def thrown_away(model: nn.Module, images: Tensor) -> None:
    without_statistics(model, lambda: model.train()(images))


def gone_back_from(model: nn.Module, images: Tensor) -> object:
    """As methods do that take a first gradient at one place and a second at another."""

    def run() -> Tensor:
        loss = model.train()(images).square().mean()
        loss.backward()
        return loss

    return without_statistics(model, run)


@pytest.mark.parametrize("extra", [evaluated, looked_at, thrown_away, gone_back_from])
def test_a_pass_that_no_loss_is_made_of_may_come_between(extra: Callable[[nn.Module, Tensor], object]) -> None:
    assert losses_with(extra) == losses_with(lambda *_: None)


def test_a_copy_of_a_network_with_the_penalty_beside_its_output_adds_none() -> None:
    """As of a teacher, or of averaged weights: the hook is copied too."""
    model, pruner = make_pruner()
    pruner.penalize_output()
    teacher = copy.deepcopy(model).eval()
    images, _ = batch_of(0)
    expected = teacher(images)
    out = model(images)
    assert torch.equal(teacher(images), expected)
    out.square().mean().backward()
    assert pruner.batches == 1


@pytest.mark.parametrize(
    "off", [(), ("stages.0.1",), ("stages.0.1", "stages.1.1:hidden")], ids=["open", "a block", "both"]
)
def test_a_penalty_on_gradients_is_that_of_the_network_without_what_is_off(off: tuple[str, ...]) -> None:
    """Also from the step on in which a gate closes first."""
    model, _ = make_pruner()
    cut = copy.deepcopy(model.double())
    for name, gate in find_gates(model).items():
        with torch.no_grad():
            gate.bias.fill_(-3.0 if name in off and name.count(":") == 0 else 3.0)
            if name in off and ":" in name:
                gate.bias[:5] = -3.0
    removals = [Operation("remove", name, 0, 0.0, "off", tuple(range(5)) if ":" in name else None) for name in off]
    carry_out(removals, cut)
    for gate in find_gates(cut).values():
        torch.nn.init.constant_(gate.bias, 3.0)
    images, _ = batch_of(0)

    def gradients(network: nn.Module) -> dict[str, Tensor]:
        inputs = images.double().requires_grad_()
        (slope,) = torch.autograd.grad(network(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}

    whole, without = gradients(model), gradients(cut)
    for name, grad in without.items():
        expected = whole[name]
        if expected.shape != grad.shape:
            dim = next(dim for dim in range(grad.dim()) if grad.shape[dim] != expected.shape[dim])
            expected = expected.narrow(dim, 5, grad.shape[dim])
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def words(batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_batch_without_samples_does_not_count() -> None:
    """As of a loader that filters what it has read."""

    def train_with(sizes: list[int]) -> tuple[list[float], list[str]]:
        torch.manual_seed(0)
        model = VisionTransformer(8, 4, 2, 2, 16, 24, num_classes=5)
        gate = GateConfig(units=["block", "channel"], warmup=0.0)
        pruner = Pruner(model, words(2, 0), total_steps=12, gate=gate, removal=RemovalConfig(window=2))
        optimizer = make_optimizer(pruner)
        losses, done = [], []
        for size in sizes:
            loss = model(words(size, len(losses))).square().sum() + pruner.penalty()
            optimizer.zero_grad()
            loss.backward()
            if size:
                losses.append(loss.item())
            optimizer.step()
            done += [operation.unit for operation in pruner.step(optimizer)]
        return losses, done

    expected, done = train_with([4, 4, 4, 4, 4])
    losses, with_empty = train_with([4, 0, 4, 4, 0, 4, 4])
    assert losses[:1] == expected[:1]
    assert all(math.isfinite(loss) for loss in losses)
    assert with_empty == done


def test_activations_computed_anew_in_the_backward_pass_are_no_second_pass() -> None:
    def losses(checkpoints: bool) -> list[float]:
        model, pruner = make_pruner()
        run_stages = model.stages.forward
        if checkpoints:
            model.stages.forward = lambda x: checkpoint(run_stages, x, use_reentrant=False)
        return train(model, pruner, make_optimizer(pruner), range(2 * WINDOW))

    assert losses(True) == pytest.approx(losses(False), rel=1e-3)


def test_a_wrapped_network_is_refused() -> None:
    with pytest.raises(TypeError, match="unwrapped network, not DataParallel"):
        Pruner(DataParallel(CifarResNet(20, 10)), torch.randn(2, 3, 8, 8), total_steps=STEPS)


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_an_example_that_is_no_tensor_is_refused(kind: Callable[[object], object]) -> None:
    example = kind({"pixel_values": torch.randn(2, 3, 8, 8)})
    with pytest.raises(UserError, match=f"^example: a {type(example).__name__} is not valid; expected one tensor"):
        Pruner(CifarResNet(20, 10), example, total_steps=STEPS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("of_model", "of_example"), [("meta", "cpu"), ("meta", "meta"), ("cpu", "meta")])
def test_what_has_no_values_is_refused(of_model: str, of_example: str) -> None:
    with torch.device(of_model):
        model = CifarResNet(20, 10)
    with pytest.raises(UserError, match=r"on the meta device.* expected (one|a network) with"):
        Pruner(model, torch.randn(2, 3, 8, 8, device=of_example), total_steps=STEPS)


def test_a_network_without_blocks_is_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    with pytest.raises(UserError, match=r"no residual block .*register_block"):
        Pruner(plain, torch.randn(2, 3, 8, 8), total_steps=STEPS)


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(UserError, match=r"budget\.target: 0\.001 cannot be met; 0\.\d+ "):
        make_pruner(target=0.001)


def out_of_reach(_: pytest.MonkeyPatch) -> BudgetConfig:
    return BudgetConfig(target=0.001)


def interrupted(monkeypatch: pytest.MonkeyPatch) -> BudgetConfig:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("greenprune.pruner.measure_unit_cost", interrupt)
    return BudgetConfig(unit="time")


@pytest.mark.parametrize(
    ("make", "units"),
    [
        (lambda: CifarResNet(8, 10, channels=3), ["block", "channel"]),
        (lambda: resnet18(num_classes=10), ["block", "channel"]),
        (lambda: mobilenet_v3_small(num_classes=10), ["channel"]),  # of which slots stand in the blocks' own sequences
    ],
    ids=["our own blocks", "blocks to be taken apart", "blocks in sequences"],
)
@pytest.mark.parametrize("fail", [out_of_reach, interrupted])
def test_a_pruner_that_is_refused_leaves_the_network_as_it_was(
    make: Callable[[], nn.Module],
    units: list[str],
    fail: Callable[[pytest.MonkeyPatch], BudgetConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, images = make(), torch.randn(2, 3, 16, 16)
    before, names, logits = str(model), list(model.state_dict()), model.eval()(images)
    budget = fail(monkeypatch)
    gate = GateConfig(units=units if budget.unit == "flops" else ["block"])  # type: ignore[arg-type]
    with pytest.raises((UserError, KeyboardInterrupt)):
        Pruner(model, images, total_steps=STEPS, gate=gate, budget=budget)
    assert str(model) == before
    assert list(model.state_dict()) == names
    assert torch.equal(model(images), logits)
    another = Pruner(model, images, total_steps=STEPS, gate=gate, budget=BudgetConfig(0.9))
    assert another.report()["gates_left"] > 0
    assert torch.allclose(model(images), logits, atol=1e-5)


@pytest.mark.parametrize("unit", ["blocks", "time", "energy"])
def test_a_budget_of_whole_blocks_is_refused_for_channels(unit: str) -> None:
    with pytest.raises(UserError, match=f"budget.unit: '{unit}' is not valid; expected flops or params where channels"):
        make_pruner(budget=BudgetConfig(0.5, unit))  # type: ignore[arg-type]


def test_gates_learn_the_same_from_a_scaled_loss_when_the_scale_changes() -> None:
    """A GradScaler's factor is told after the forward pass and counts in the backward pass."""

    def gradients(scales: list[float]) -> list[list[Tensor]]:
        model, pruner = make_pruner()
        found = []
        for step, scale in enumerate(scales):
            images, labels = batch_of(step)
            model.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss = (loss + pruner.penalty(None if scale == 1 else scale)) * scale
            loss.backward()
            found.append([parameter.grad / scale for parameter in gate_parameters(model)])
        return found[1:]  # the first pass was before any scale was known

    for scaled, plain in zip(gradients([2.0**16, 2.0**16, 2.0**15]), gradients([1.0, 1.0, 1.0]), strict=True):
        for mine, expected in zip(scaled, plain, strict=True):
            assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-7)


def test_a_copy_goes_on_as_its_original_from_a_scaled_loss() -> None:
    parts = (*make_pruner(), torch.tensor(2.0**10))

    def gradients(model: nn.Module, pruner: Pruner, scale: Tensor) -> list[Tensor]:
        images, labels = batch_of(0)
        model.zero_grad()
        loss = functional.cross_entropy(model(images), labels) + pruner.penalty(scale)
        (loss * scale).backward()
        return [parameter.grad for parameter in gate_parameters(model)]

    gradients(*parts)
    copied = copy.deepcopy(parts)
    for mine, expected in zip(gradients(*copied), gradients(*parts), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("branch", "reason"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 1)), r"expected one in which two convolutions or linear layers follow"),
        (nn.Tanh(), r"expected one in which two convolutions or linear layers follow"),
        (nn.ConvTranspose2d(3, 3, 1), r"0\.branch: the channels inside a ConvTranspose2d are not gated"),
    ],
    ids=["one layer", "no layer", "transposed"],
)
def test_a_network_without_channels_inside_its_branches_is_refused(branch: nn.Module, reason: str) -> None:
    model = nn.Sequential(ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=True))
    with pytest.raises(UserError, match=rf"gate\.units: 'channel' is not valid .* has channels inside; {reason}"):
        Pruner(model, torch.randn(2, 3, 8, 8), total_steps=STEPS, gate=GateConfig(units=["channel"]))


class Asking(nn.Module):
    """Asks for something of its input before its block sees it."""

    def __init__(self, ask: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.block, self.ask = small_block(), ask

    def forward(self, images: Tensor) -> Tensor:
        self.ask(images)
        out: Tensor = self.block(images)
        return out


@pytest.mark.parametrize(
    ("ask", "reason"),
    [
        (lambda x: x.mean().item(), r"Tensor\.item\(\) cannot be called on meta tensors"),
        (lambda x: x.detach().numpy(), "can't convert meta device type tensor to numpy"),
        (lambda x: x + torch.ones(4), "Tensor on device cpu is not on the expected device meta"),
    ],
    ids=["its value", "its array", "its device"],
)
def test_a_network_whose_cost_cannot_be_counted_without_values_is_told_so(
    ask: Callable[[Tensor], object], reason: str
) -> None:
    model = Asking(ask)
    complaint = rf"^model: the cost of Asking cannot be counted .*meta device.*: {reason}.*; expected a forward pass"
    with pytest.raises(UserError, match=complaint):
        Pruner(model, torch.randn(2, 3, 4, 4), total_steps=STEPS)
    assert not find_gates(model)


def test_a_network_is_counted_where_a_script_looks_for_anomalies() -> None:
    with torch.autograd.set_detect_anomaly(True):
        model, pruner = make_pruner()
        train(model, pruner, make_optimizer(pruner), range(1))


def test_a_network_without_an_output_to_go_back_from_is_told_so() -> None:
    model = Asking(lambda _: None)
    model.register_forward_hook(lambda *_: "logits")
    with pytest.raises(UserError, match=r"^the network gives a str without a tensor that training goes back through"):
        Pruner(model, torch.randn(2, 3, 4, 4), total_steps=STEPS)


def test_a_budget_that_rounding_puts_out_of_reach_is_refused() -> None:
    def make(round_to: int) -> Pruner:
        chains = [nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, 3, 1)) for width in (4, 6, 10)]
        first = ResidualBlock(chains[0], nn.Identity(), nn.ReLU(), input_activated=False)
        model = nn.Sequential(first, *map(PlainBlock, chains[1:]))
        return Pruner(
            model,
            torch.randn(2, 3, 4, 4),
            total_steps=STEPS,
            gate=GateConfig(units=["channel"]),
            budget=BudgetConfig(target=0.4),
            surgery=SurgeryConfig(round_to=round_to),
        )

    make(4)
    with pytest.raises(UserError, match=r"^budget\.target: 0\.4 cannot be met; 0\.7 .* is kept by surgery\.round_to"):
        make(8)


def test_what_is_not_gated_is_named() -> None:
    mixed = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1))
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    model = nn.Sequential(ResidualBlock(mixed, nn.Identity(), nn.ReLU(), input_activated=False), PlainBlock(plain))
    gate = GateConfig(units=["block", "channel"])
    pruner = Pruner(model, torch.randn(2, 3, 4, 4), total_steps=STEPS, gate=gate, budget=BudgetConfig(target=0.9))
    assert sorted(find_gates(model)) == ["0", "1:hidden"]
    notes = " ".join(pruner.notes)
    assert "0: channels from branch.0 to branch.2 are not gated: branch.1 (GroupNorm) is not known to treat" in notes
    assert "1: a block without a shortcut stays" in notes


def test_alike_places_that_are_not_gated_are_named_in_one_line() -> None:
    def block() -> nn.Module:
        branch = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1))
        return ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=False)

    model = nn.Sequential(*(block() for _ in range(5)))
    inner = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    model.append(ResidualBlock(inner, nn.Identity(), nn.ReLU(), input_activated=False))
    gate = GateConfig(units=["block", "channel"])
    notes = Pruner(model, torch.randn(2, 3, 4, 4), total_steps=STEPS, gate=gate).notes
    assert len(notes) == 1
    assert notes[0].startswith("0, 1, 2 and 2 more: channels from branch.0 to branch.2 are not gated")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"total_steps": 0}, "total_steps: 0 is not valid; expected a whole number of at least 1"),
        ({"total_steps": 10.5}, "total_steps: 10.5 is not valid"),
        ({"gate": GateConfig(enabled=False)}, "gate.enabled: False is not valid for a Pruner"),
        ({"budget": {"target": 0.5}}, "budget: {'target': 0.5} is not valid; expected a greenprune.BudgetConfig"),
        ({"removal": 0.2}, "removal: 0.2 is not valid; expected a greenprune.RemovalConfig"),
    ],
)
def test_a_setting_that_is_none_is_refused_before_the_network_is_touched(
    changes: dict[str, object], complaint: str
) -> None:
    model = CifarResNet(20, 10, channels=1)
    before = str(model)
    with pytest.raises(UserError, match=f"^{re.escape(complaint)}"):
        Pruner(model, torch.randn(2, 1, 8, 8), **({"total_steps": STEPS} | changes))  # type: ignore[arg-type]
    assert str(model) == before


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: GateConfig(units=["blok"]), "gate.units: ['blok'] is not valid; expected a list of block, channel"),
        (lambda: GateConfig(units=["block", "channels"]), "gate.units: ['block', 'channels'] is not valid"),
        (lambda: GateConfig(kind="Static"), "gate.kind: 'Static' is not valid; expected conditional, static"),
        (lambda: BudgetConfig(unit="flop"), "budget.unit: 'flop' is not valid; expected flops, params, blocks,"),
        (lambda: BudgetConfig(target="0.5"), "budget.target: '0.5' is not valid; expected a number"),
        (lambda: RemovalConfig(window=1.5), "removal.window: 1.5 is not valid; expected a whole number or null"),
        (lambda: SurgeryConfig(round_to="ten"), "surgery.round_to: 'ten' is not valid"),
    ],
)
def test_settings_made_in_python_are_checked_as_those_of_a_file(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(complaint)}"):
        make()


def test_units_may_be_given_as_a_tuple() -> None:
    assert GateConfig(units=("block",)) == GateConfig(units=["block"])  # type: ignore[arg-type]


class Reading(nn.Module):
    """A network that uses a block's layer beside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, 8, 3), nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)) * self.blocks[0].conv1.weight.mean()


def test_a_network_that_reads_a_part_of_a_block_is_refused() -> None:
    with pytest.raises(UserError, match=r"^Reading: its forward reads a part of a block that is taken apart .*conv1"):
        Pruner(Reading(), torch.randn(2, 1, 8, 8), total_steps=STEPS)


@pytest.mark.parametrize(
    ("example", "complaint"),
    [
        (torch.zeros(0, 1, 8, 8), r"^example: a tensor of shape \[0, 1, 8, 8\] is not valid; expected one with values"),
        (torch.full((2, 1, 8, 8), torch.nan), "^example: a tensor with values that are not finite is not valid"),
    ],
    ids=["empty", "not finite"],
)
def test_an_example_that_shows_nothing_is_refused(example: Tensor, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Pruner(CifarResNet(20, 10, channels=1), example, total_steps=STEPS)


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", None, True])
def test_what_is_no_number_of_batches_or_samples_is_refused(value: Any) -> None:
    _, pruner = make_pruner()
    complaint = rf"{value!r} is not valid; expected a whole number of at least 1$"
    with pytest.raises(UserError, match=f"^accumulate: {complaint}"):
        pruner.losses_are_divided_by(value)
    with pytest.raises(UserError, match=f"^batch_size: {complaint}"):
        pruner.parameter_groups(batch_size=value)
    assert pruner.accumulate == 1


def test_what_is_no_optimizer_is_refused() -> None:
    _, pruner = make_pruner()
    with pytest.raises(TypeError, match=r"^optimizer: a NoneType is not valid; expected a torch optimizer"):
        pruner.step(None)  # type: ignore[arg-type]


def test_a_deadline_within_the_warmup_is_refused() -> None:
    with pytest.raises(UserError, match=r"^removal\.decide_by: 0\.2 is not valid; expected more than gate\.warmup"):
        Pruner(CifarResNet(20, 10), torch.randn(2, 3, 8, 8), total_steps=100, gate=GateConfig(warmup=0.9))


def test_a_pruner_is_made_where_no_gradients_are_kept() -> None:
    with torch.no_grad():
        _, pruner = make_pruner()
    assert pruner.report()["gates_left"] > 0


def test_a_penalty_beside_that_in_the_output_is_refused() -> None:
    model, pruner = make_pruner()
    handle = pruner.penalize_output()
    images, _ = batch_of(0)
    model.train()(images)
    with pytest.raises(RuntimeError, match=r"is in the network's output already \(Pruner\.penalize_output\)"):
        pruner.penalty()
    handle.remove()
    model(images)
    pruner.penalty()


def pruned_state(units: list[str]) -> dict[str, Any]:
    """The state of a pruner that has removed something and goes on."""
    model, pruner = make_pruner(units)
    train(model, pruner, make_optimizer(pruner), range(4 * WINDOW))
    return pruner.state_dict()


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("units", [["block"], ["channel"], ["block", "channel"]], ids="+".join)
def test_a_state_of_other_gates_is_refused_and_leaves_the_network_as_it_was(units: list[str], pruned: bool) -> None:
    others = ["channel"] if units == ["block"] else ["block"]
    state = pruned_state(others) if pruned else make_pruner(others)[1].state_dict()
    model, pruner = make_pruner(units)
    before = str(model)
    with pytest.raises(StructureMismatch, match=r"expected the state of a Pruner of the same network and gate\.units"):
        pruner.load_state_dict(state)
    assert str(model) == before
    assert not pruner.structure.operations
    again = pruned_state(units)
    pruner.load_state_dict(again)
    assert pruner.state_dict()["structure"] == again["structure"]


def test_a_state_of_a_deeper_network_is_refused() -> None:
    state = Pruner(CifarResNet(32, 10, channels=1), torch.randn(2, 1, 8, 8), total_steps=STEPS).state_dict()
    pruner = Pruner(CifarResNet(20, 10, channels=1), torch.randn(2, 1, 8, 8), total_steps=STEPS)
    with pytest.raises(StructureMismatch, match=r"of 15 units with gates where this network has 9 .* in stages\.0\.3;"):
        pruner.load_state_dict(state)
