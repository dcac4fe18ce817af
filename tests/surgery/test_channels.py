"""Removal of channels and blocks in every family: exactly what the masked network computed, in training too."""

from __future__ import annotations

import copy
import itertools
import json
import operator
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from families import (
    BATCH,
    CLASSES,
    EVERY_ORDER,
    FAMILIES,
    ONE_ACTIVATION,
    Pattern,
    build,
    difference,
    follow,
    gated,
    patterns,
    sharing,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torchvision.ops import SqueezeExcitation

from greenprune.config import GateConfig
from greenprune.gating import attach_gates, find_gates
from greenprune.models import (
    ChannelSlot,
    PlainBlock,
    ResidualBlock,
    convert_blocks,
    find_channels,
    register_block,
    register_channelwise,
    residual_blocks,
)
from greenprune.models.blocks import _SPLITS
from greenprune.surgery import Operation, Structure, StructureMismatch, Surgeon, carry_out, replay, update_optimizer

TOLERANCE = 1e-4  # relative, fp32
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)
BOTH_KINDS = pytest.mark.parametrize("kind", ["static", "conditional"])
PATTERNS = ("all-on", "all-off", "one-left", "whole-sets-off", "mixed-1", "mixed-2")


def train_pass(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in training; leaves the gradients of the task in the parameters."""
    model.train().zero_grad()
    logits = model(images)
    functional.cross_entropy(logits, torch.arange(len(images)) % CLASSES).backward()
    return logits.detach()


def evaluate(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


@dataclass
class Twins:
    """A masked network, and a copy of it from which what is off was removed."""

    masked: nn.Module
    removed: nn.Module
    surgeon: Surgeon
    origin: dict[nn.Parameter, nn.Parameter]

    @classmethod
    def of(cls, masked: nn.Module, pattern: Pattern, removed: nn.Module | None = None) -> Twins:
        removed = copy.deepcopy(masked) if removed is None else removed
        origin = dict(zip(masked.parameters(), removed.parameters(), strict=True))
        return cls(masked, removed, carry_out(pattern.operations(masked), removed), origin)

    def compare(self, value_of: Callable[[nn.Parameter, nn.Parameter], tuple[Tensor, Tensor]]) -> float:
        """The largest relative difference of what belongs to the surviving parameters.

        Args:
            value_of: From a masked parameter and its survivor to what is compared: of the first, in its shape, and of
                the second.
        """
        pairs, alive = [], set(self.removed.parameters())
        for parameter, first in self.origin.items():
            survivor, _ = follow(self.surgeon, first, first.detach())
            if survivor in alive:
                alive.remove(survivor)
                whole, got = value_of(parameter, survivor)
                _, expected = follow(self.surgeon, first, whole)
                assert expected.shape == got.shape == survivor.shape
                pairs.append((expected, got))
        assert not alive
        # Some values are zero but for rounding (the gradient of a bias before a norm): those count by the whole.
        scale = 1e-2 * float(torch.stack([expected.norm() for expected, _ in pairs]).norm())
        return max(difference(expected, got, scale) for expected, got in pairs)


def measure(dense: nn.Module, images: Tensor, pattern: Pattern) -> dict[str, float]:
    """Differences between the masked and the removed network."""
    masked = copy.deepcopy(dense)
    pattern.mask(masked)
    twins = Twins.of(masked, pattern)
    removed = twins.removed
    return {
        "evaluation": difference(evaluate(masked, images), evaluate(removed, images)),
        "training": difference(train_pass(masked, images), train_pass(removed, images)),
        "gradients": twins.compare(lambda one, other: (one.grad, other.grad)),  # type: ignore[return-value]
        "evaluation after": difference(evaluate(masked, images), evaluate(removed, images)),
    }


@EVERY_FAMILY
@BOTH_KINDS
def test_the_removed_network_computes_what_the_masked_one_computes(name: str, kind: str) -> None:
    dense, images = gated(name, kind), FAMILIES[name].images()
    every_pattern = patterns(dense)
    assert tuple(every_pattern) == PATTERNS
    masked = copy.deepcopy(dense)
    every_pattern["all-on"].mask(masked)
    whole = evaluate(masked, images)
    for label, pattern in every_pattern.items():
        measured = measure(dense, images, pattern)
        assert max(measured.values()) <= TOLERANCE, f"{label}: {measured}"
        pattern.mask(masked)
        assert label == "all-on" or difference(whole, evaluate(masked, images)) > 1e-2, label  # the units mattered


def in_double_precision(model: nn.Module) -> nn.Module:
    """A network with static gates, and these too, which would stay in fp32: their gradients are compared as well."""
    for gate in find_gates(model.double()).values():
        gate.bias.data = gate.bias.data.double()
    return model


@EVERY_FAMILY
def test_what_differs_is_rounding_alone(name: str) -> None:
    """In double precision next to nothing is left of the difference."""
    dense, images = in_double_precision(gated(name, "static")), FAMILIES[name].images().double()
    for label, pattern in patterns(dense, seed=5).items():
        measured = measure(dense, images, pattern)
        assert max(measured.values()) <= 1e-10, f"{label}: {measured}"


@EVERY_FAMILY
def test_nothing_is_left_of_what_was_removed(name: str) -> None:
    dense = gated(name, "conditional")
    sets = find_channels(dense).sets
    for label, pattern in patterns(dense).items():
        twins = Twins.of(dense, pattern)
        operations = pattern.operations(dense)
        gone = {operation.unit for operation in operations if operation.channels is None}
        lost = {operation.unit: len(operation.channels) for operation in operations if operation.channels is not None}
        left = find_channels(twins.removed).sets
        assert left.keys() == {key for key, found in sets.items() if found.block not in gone}, label
        assert all(found.units == sets[key].units - lost.get(key, 0) for key, found in left.items()), label
        assert residual_blocks(twins.removed).keys() == residual_blocks(dense).keys() - gone
        for found in left.values():  # every module says how large it is, and is
            for path, attribute in found.sizes:
                module = twins.removed.get_submodule(path)
                if isinstance(module, nn.Conv2d):
                    shape = (module.out_channels, module.in_channels // module.groups)
                    assert tuple(module.weight.shape[:2]) == shape, (path, attribute)
                elif isinstance(module, nn.Linear):
                    assert tuple(module.weight.shape) == (module.out_features, module.in_features), (path, attribute)
                elif isinstance(module, nn.BatchNorm2d):
                    assert len(module.running_var) == module.num_features, (path, attribute)
        assert all(len(gate.bias) == left[key].units for key, gate in find_gates(twins.removed).items() if key in left)


# The optimizer.


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True)


def adamw(model: nn.Module) -> Optimizer:
    # With a smaller eps, gradients that are nothing but rounding would become whole steps.
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.5, eps=1e-4, amsgrad=True, fused=True)


def state_difference(twins: Twins, one: Optimizer, other: Optimizer) -> dict[str, float]:
    """Differences of the parameters and of each kind of state that the optimizers keep for them."""
    kinds = next(iter(other.state.values())).keys()
    found = {"parameters": twins.compare(lambda first, second: (first.detach(), second.detach()))}
    for kind in kinds:
        if kind == "step":
            assert {float(state["step"]) for state in other.state.values()} == {
                float(state["step"]) for state in one.state.values()
            }
        else:
            kept = operator.itemgetter(kind)
            found[kind] = twins.compare(
                lambda first, second, kept=kept: (kept(one.state[first]), kept(other.state[second]))
            )  # type: ignore[misc]
    return found


@EVERY_FAMILY
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("before", ["all-on", "mixed-1"])
def test_training_goes_on_as_that_of_the_masked_network(
    name: str, make: Callable[[nn.Module], Optimizer], before: str
) -> None:
    family = FAMILIES[name]
    masked = gated(name, "static" if before == "all-on" else "conditional")
    every_pattern = patterns(masked)
    every_pattern[before].mask(masked)
    optimizer = make(masked)
    for seed in range(3):
        train_pass(masked, family.images(seed))
        optimizer.step()
    every_pattern["mixed-1"].mask(masked)
    removed, other = copy.deepcopy((masked, optimizer))
    twins = Twins.of(masked, every_pattern["mixed-1"], removed)
    update_optimizer(other, twins.surgeon)
    assert {id(p) for group in other.param_groups for p in group["params"]} == {id(p) for p in removed.parameters()}
    assert {id(p) for p in other.state} == {id(p) for p in removed.parameters()}
    assert max(state_difference(twins, optimizer, other).values()) == 0  # bit for bit
    for seed in (7, 8):
        for model, follower in ((masked, optimizer), (removed, other)):
            train_pass(model, family.images(seed))
            follower.step()
        differences = state_difference(twins, optimizer, other)
        assert max(differences.values()) <= TOLERANCE, f"step {seed}: {differences}"
    images = family.images()
    assert difference(evaluate(masked, images), evaluate(removed, images)) <= TOLERANCE


# The structure.


def operated(name: str, kind: str = "conditional") -> tuple[nn.Module, Structure]:
    """A network after removals of channels and blocks, and freezes of both, and what was done to it."""
    model = gated(name, kind)
    operations = patterns(model)["mixed-2"].operations(model)
    carry_out(operations, model)
    frozen = [unit for unit in find_gates(model) if unit in residual_blocks(model)][:1]
    frozen += list(find_channels(model).sets)[:2]
    freezes = [Operation("freeze", unit, 9, 2.0, "on") for unit in frozen]
    carry_out(freezes, model)
    return model, Structure([*operations, *freezes])


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


@EVERY_FAMILY
def test_a_structure_gives_a_fresh_network_the_same_modules(name: str) -> None:
    model, structure = operated(name)
    assert structure.removed_channels()
    restored = Structure.from_dict(json.loads(json.dumps(structure.to_dict())))
    assert restored == structure
    assert restored.checksum() == structure.checksum()
    torch.manual_seed(99)
    fresh = gated(name, "conditional")
    replay(restored, fresh)
    assert shapes(fresh) == shapes(model)
    assert [(key, type(module)) for key, module in fresh.named_modules()] == [
        (key, type(module)) for key, module in model.named_modules()
    ]
    fresh.load_state_dict(model.state_dict())
    images = FAMILIES[name].images()
    assert torch.equal(evaluate(model, images), evaluate(fresh, images))


@EVERY_FAMILY
def test_a_network_to_use_is_the_trained_one_without_its_gates(name: str) -> None:
    model, structure = operated(name)
    carry_out([Operation("freeze", unit, 10, 3.0, "settled") for unit in find_gates(model)], model)
    assert not find_gates(model)
    assert not any(isinstance(module, ChannelSlot) for module in model.modules())
    usable = build(name)
    replay(structure, usable)
    assert shapes(usable) == shapes(model)
    usable.load_state_dict(model.state_dict())
    images = FAMILIES[name].images()
    assert torch.equal(evaluate(model, images), evaluate(usable, images))


@EVERY_FAMILY
def test_removals_in_two_rounds_are_those_in_one(name: str) -> None:
    """Units keep the numbers that they had in the dense network."""
    once = gated(name, "conditional")
    twice = copy.deepcopy(once)
    everything = patterns(once)["one-left"].operations(once)
    first = [Operation("remove", one.unit, 1, 0.1, "off", (one.channels or ())[::2]) for one in everything]
    second = [
        Operation("remove", one.unit, 2, 0.2, "off", one.channels[1::2])
        for one in everything
        if one.channels is not None and len(one.channels) > 1
    ]
    carry_out(everything, once)
    carry_out(first, twice)
    carry_out(second, twice)
    assert list(once.state_dict()) == list(twice.state_dict())
    assert all(torch.equal(tensor, twice.state_dict()[key]) for key, tensor in once.state_dict().items())
    assert shapes(once) == shapes(twice)
    with pytest.raises(StructureMismatch, match="has no units"):
        replay(Structure([*first, *first]), gated(name, "conditional"))


@EVERY_FAMILY
def test_a_frozen_set_computes_the_same_without_its_gate(name: str) -> None:
    model, images = gated(name, "conditional"), FAMILIES[name].images()
    Pattern().mask(model)
    before = evaluate(model, images)
    surgeon = Surgeon(model)
    for unit in find_channels(model).sets:
        surgeon.freeze_channels(unit)
        surgeon.freeze_channels(unit)  # nothing happens
    assert not any(isinstance(module, ChannelSlot) for module in model.modules())
    assert not any(block.slots for block in residual_blocks(model).values())
    assert find_gates(model).keys() == residual_blocks(model).keys()
    assert difference(before, evaluate(model, images)) <= 1e-6


@EVERY_FAMILY
@pytest.mark.parametrize("label", ["one-left", "mixed-1"])
@pytest.mark.parametrize("freeze_first", [True, False])
def test_a_set_can_be_shrunk_and_frozen_in_any_order(name: str, label: str, freeze_first: bool) -> None:
    model, images = gated(name, "conditional"), FAMILIES[name].images()
    pattern = patterns(model)[label]
    operations = pattern.operations(model)
    pattern.mask(model)
    masked = evaluate(model, images)
    freezes = [Operation("freeze", key, 3, 0.5, "on") for key in find_gates(model)]
    if freeze_first:
        carry_out([*freezes, *operations], model)
    else:
        carry_out(operations, model)
        carry_out([operation for operation in freezes if operation.unit in find_gates(model)], model)
    assert not find_gates(model)
    assert difference(masked, evaluate(model, images)) <= TOLERANCE


# What is refused.


@pytest.fixture
def small() -> nn.Module:
    """A residual block of 6 channels inside, and a block without a shortcut with 4."""
    branch = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    model = nn.Sequential(
        ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=False),
        PlainBlock(plain),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, CLASSES),
    )
    attach_gates(model, GateConfig(units=["block", "channel"]))
    return model


@pytest.mark.parametrize(
    ("unit", "channels", "message"),
    [
        ("0:hidden", (6,), r"'0:hidden' has no units \[6\]"),
        ("0:hidden", (-1, 2), r"'0:hidden' has no units \[-1\]"),
        ("0:hidden", (0, 1, 2, 3, 4, 5), "'0:hidden' would have no unit left; remove its block"),
        ("1:hidden", (0, 1, 2, 3), "'1:hidden' would have no unit left; its block has no shortcut, keep at least one"),
        ("0:heads", (0,), "the network has no channels '0:heads'"),
        ("0", (0,), "the network has no channels '0'"),
        ("7:hidden", (0,), "the network has no channels '7:hidden'"),
    ],
)
def test_channels_that_are_not_there_and_the_last_ones_are_not_removed(
    small: nn.Module, unit: str, channels: tuple[int, ...], message: str
) -> None:
    before = shapes(small)
    with pytest.raises(KeyError, match=message):
        Surgeon(small).remove_channels(unit, channels)
    assert shapes(small) == before
    with pytest.raises(StructureMismatch, match=message):
        replay(Structure([Operation("remove", unit, 1, 0.1, "off", channels)]), small)


def test_channels_are_removed_once(small: nn.Module) -> None:
    surgeon = Surgeon(small)
    surgeon.remove_channels("0:hidden", {1, 4})
    for other in (surgeon, Surgeon(small)):
        with pytest.raises(KeyError, match=r"'0:hidden' has no units \[4\]"):
            other.remove_channels("0:hidden", {4, 5})
    surgeon.remove_channels("0:hidden", {0, 2, 3})
    with pytest.raises(KeyError, match="no unit left"):
        surgeon.remove_channels("0:hidden", {5})
    surgeon.remove_block("0")
    with pytest.raises(KeyError, match="has no channels '0:hidden'"):
        surgeon.remove_channels("0:hidden", {5})
    with pytest.raises(KeyError, match="has no channels '0:hidden'"):
        surgeon.freeze_channels("0:hidden")
    with pytest.raises(KeyError, match="no unit '1'"):
        surgeon.remove_block("1")


class Factored(torch.optim.SGD):
    """Keeps something else than a tensor of the parameter's shape."""

    kept: Any = None

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["factor"] = self.kept(parameter)


@pytest.mark.parametrize(
    ("kept", "what"),
    [
        (lambda parameter: parameter.new_ones(parameter.shape[0] + 1), r"'factor' of shape \(7,\)"),
        (lambda parameter: [parameter.new_ones(2)], "'factor' as a list"),
        (lambda parameter: {"row": parameter.new_ones(2)}, "'factor' as a dict"),
        (lambda parameter: parameter.new_ones(1, 1), r"'factor' of shape \(1, 1\)"),
        (None, r"Adafactor keeps '\w+' of shape"),
    ],
    ids=["vector", "list", "dict", "matrix of one", "adafactor"],
)
def test_an_optimizer_whose_state_cannot_follow_is_refused_as_it_was(kept: Any, what: str) -> None:
    model = nn.Sequential(
        nn.Linear(5, 3),
        ResidualBlock(
            nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)),
            nn.Identity(),
            nn.Identity(),
            input_activated=True,
        ),
        nn.Linear(3, CLASSES),
    )
    if kept is None:
        optimizer: Optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    else:
        optimizer = Factored(model.parameters(), lr=0.1)
        optimizer.kept = kept  # type: ignore[attr-defined]
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    surgeon = Surgeon(model)
    surgeon.remove_channels("1:hidden", {0})
    with pytest.raises(TypeError, match=f"{what}.* for '1.branch.0.weight' of shape .*; expected an optimizer"):
        update_optimizer(optimizer, surgeon)
    assert {parameter: dict(state) for parameter, state in optimizer.state.items()} == before
    surgeon.remove_block("1")
    update_optimizer(optimizer, surgeon)  # what is gone need not follow
    assert len(optimizer.param_groups[0]["params"]) == 4


@pytest.mark.parametrize("kept", [None, 3, 0.5, "warm", torch.tensor(7.0), torch.tensor([7.0])], ids=repr)
def test_what_an_optimizer_keeps_once_for_a_whole_parameter_stays_as_it_is(small: nn.Module, kept: Any) -> None:
    optimizer = Factored(small.parameters(), lr=0.1)
    optimizer.kept = lambda _: kept
    optimizer.step()
    surgeon = Surgeon(small)
    surgeon.remove_channels("0:hidden", {0, 3})
    update_optimizer(optimizer, surgeon)
    assert {parameter for group in optimizer.param_groups for parameter in group["params"]} == set(small.parameters())
    assert all(optimizer.state[parameter]["factor"] is kept for parameter in small.parameters())


def with_channels(**values: Any) -> dict[str, Any]:
    good = {"action": "remove", "unit": "0:hidden", "step": 1, "epoch": 0.5, "reason": "off", "channels": [0, 3]}
    return {"format": 2, "operations": [{**good, **values}]}


def test_a_structure_with_channels_is_read() -> None:
    (operation,) = Structure.from_dict(with_channels()).operations
    assert operation.channels == (0, 3)


@pytest.mark.parametrize(
    "values",
    [
        {"channels": []},
        {"channels": [0, 0]},
        {"channels": [-1]},
        {"channels": [True]},
        {"channels": [1.0]},
        {"channels": ["1"]},
        {"channels": "12"},
        {"channels": 3},
        {"channels": {"0": 1}},
        {"action": "freeze"},
        {"unit": "0"},
        {"unit": None},
    ],
    ids=str,
)
def test_a_structure_with_malformed_channels_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(StructureMismatch, match="malformed structure"):
        Structure.from_dict(with_channels(**values))


# What else a network may be made of.


@pytest.mark.parametrize("name", ["resnet-bottleneck", "resnext", "mobilenet-v3-small", "cifar-b", "timm-convnext"])
def test_weights_keep_their_memory_format(name: str) -> None:
    model = gated(name, "static").to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    train_pass(model, FAMILIES[name].images().to(memory_format=torch.channels_last))
    optimizer.step()
    surgeon = carry_out(patterns(model)["mixed-1"].operations(model), model)
    update_optimizer(optimizer, surgeon)
    weights = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    assert any(not weight.is_contiguous() for weight in weights)
    assert len(surgeon.replacements) > 5
    for weight in weights:
        # Not is_contiguous alone: of a 1x1 convolution's weights that holds for both layouts.
        laid_out_anew = torch.empty(weight.shape).to(memory_format=torch.channels_last)
        assert weight.stride() == laid_out_anew.stride()
        momentum = optimizer.state[weight]["momentum_buffer"]
        assert momentum.is_contiguous(memory_format=torch.channels_last)


@EVERY_FAMILY
def test_mixed_precision_goes_through_gates_and_removals(name: str) -> None:
    model, images = gated(name, "conditional"), FAMILIES[name].images()
    pattern = patterns(model)["mixed-1"]
    pattern.mask(model)
    twins = Twins.of(model, pattern)
    full = evaluate(twins.removed, images)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_removed = evaluate(model, images), evaluate(twins.removed, images)
        logits = model.train()(images)
        loss = functional.cross_entropy(logits.float(), torch.arange(BATCH) % CLASSES)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    assert all(gate.decision.dtype == torch.float32 for gate in find_gates(model).values())
    assert difference(low.float(), low_removed.float()) <= 0.05
    assert difference(full, low_removed.float()) <= 0.1


class OwnBlock(nn.Module):
    """A user's block for flat features: hidden neurons behind an own activation, normalised."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(width, 10), nn.BatchNorm1d(10), nn.Linear(10, width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.norm(self.first(x))))


@BOTH_KINDS
def test_a_users_own_block_and_activation_work_to_the_end(kind: str) -> None:
    before = dict(_SPLITS)

    class Gelu(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.gelu(x)

    @register_block(OwnBlock)
    def split(block: OwnBlock) -> nn.Module:
        branch = nn.Sequential(block.first, block.norm, block.act, block.second)
        return ResidualBlock(branch, nn.Identity(), nn.Identity(), input_activated=True)

    try:
        dense = nn.Sequential(nn.Linear(5, 8), OwnBlock(8, Gelu()), OwnBlock(8, Gelu()), nn.Linear(8, CLASSES))
        features = torch.randn(BATCH, 5)
        assert convert_blocks(dense, features) == ["1", "2"]
    finally:
        _SPLITS.clear()
        _SPLITS.update(before)
    assert all("(Gelu) is not known to treat each channel by itself" in note for note in find_channels(dense).notes)
    register_channelwise(Gelu)
    attach_gates(dense, GateConfig(units=["block", "channel"], kind=kind))  # type: ignore[arg-type]
    assert list(find_gates(dense)) == ["1", "1:hidden", "2", "2:hidden"]
    for pattern in patterns(dense).values():
        assert max(measure(dense, features, pattern).values()) <= TOLERANCE


@pytest.mark.parametrize(
    "chain",
    [
        lambda: [nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Conv2d(8, 4, 1)],
        lambda: [nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 1, groups=8), nn.ReLU(), nn.Conv2d(16, 4, 1)],
        lambda: [
            nn.Conv2d(4, 4, 1),
            nn.Conv2d(4, 16, 1, groups=4),
            nn.Conv2d(16, 16, 1, groups=8),
            nn.Conv2d(16, 4, 1),
        ],
        lambda: [nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1)],
        lambda: [
            nn.Conv2d(4, 8, 1),
            nn.BatchNorm2d(8),
            SqueezeExcitation(8, 2),
            nn.Tanh(),
            SqueezeExcitation(8, 2),
            nn.Conv2d(8, 4, 1),
        ],
        lambda: [
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 16, 1, groups=4, bias=False),
            nn.BatchNorm2d(16, affine=False),
            nn.Hardsigmoid(),
            SqueezeExcitation(16, 2),
            nn.MaxPool2d(3, 1, 1),
            nn.Conv2d(16, 4, 1),
        ],
        lambda: [nn.Conv2d(4, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 1), nn.Softplus(), nn.Conv2d(6, 4, 1)],
    ],
    ids=["groups", "multiplied", "more groups", "fewer groups", "twice squeezed", "all of it", "two sets"],
)
def test_chains_of_all_kinds_are_cut_exactly(chain: Callable[[], list[nn.Module]]) -> None:
    def block() -> nn.Module:
        return ResidualBlock(nn.Sequential(*chain()), nn.Identity(), nn.ReLU(), input_activated=True)

    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    dense = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), block(), PlainBlock(nn.Sequential(*chain())), *head)
    attach_gates(dense, GateConfig(units=["block", "channel"]))
    assert not find_channels(dense).notes
    images = torch.randn(BATCH, 3, 6, 6)
    for pattern in itertools.chain(patterns(dense).values(), patterns(dense, 1).values()):
        assert max(measure(dense, images, pattern).values()) <= TOLERANCE
        # What is left is still found for what it was.
        twins = Twins.of(dense, pattern)
        assert find_channels(twins.removed).sets.keys() <= find_channels(dense).sets.keys()


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_one_and_three_dimensions_are_cut_exactly(dims: int) -> None:
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    dropout, pool = getattr(nn, f"Dropout{dims}d"), getattr(nn, f"AvgPool{dims}d")

    def chain() -> nn.Module:
        hidden = [conv(4, 8, 3, padding=1), norm(8), nn.ReLU(inplace=True), pool(3, 1, 1), conv(8, 16, 1, groups=4)]
        return nn.Sequential(*hidden, norm(16), dropout(0.0), conv(16, 6, 1), nn.Softplus(), conv(6, 4, 1))

    block = ResidualBlock(chain(), nn.Identity(), nn.ReLU(), input_activated=True)
    head = (getattr(nn, f"AdaptiveAvgPool{dims}d")(1), nn.Flatten(), nn.Linear(4, CLASSES))
    dense = nn.Sequential(conv(3, 4, 1), nn.ReLU(), block, PlainBlock(chain()), *head)
    assert attach_gates(dense, GateConfig(units=["block", "channel"], kind="static")) == [
        "2",
        *(f"{block}:hidden{number}" for block in (2, 3) for number in (1, 2)),
    ]
    assert not find_channels(dense).notes
    images = torch.randn(BATCH, 3, *[5] * dims).double()
    in_double_precision(dense)
    for pattern in patterns(dense).values():
        assert max(measure(dense, images, pattern).values()) <= 1e-9


def test_weights_of_three_dimensions_keep_their_memory_format() -> None:
    branch = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 4, 3, padding=1))
    model = nn.Sequential(ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=True))
    model.to(memory_format=torch.channels_last_3d)
    Surgeon(model).remove_channels("0:hidden", {1, 4})
    for layer in (branch[0], branch[2]):
        assert layer.weight.stride() == torch.empty_like(layer.weight, memory_format=torch.channels_last_3d).stride()
        assert not layer.weight.is_contiguous()


@ONE_ACTIVATION
@EVERY_ORDER
def test_an_activation_that_a_branch_uses_twice_is_gated_at_both_places(
    act: Callable[[], nn.Module], order: str
) -> None:
    dense, images = sharing(act(), order), torch.randn(BATCH, 3, 8, 8).double()
    attach_gates(dense, GateConfig(units=["block", "channel"], kind="static"))
    sets = find_channels(dense).sets
    assert [found.units for found in sets.values()] == ([6, 10] if order == "bottleneck" else [6]) * 2
    assert list(find_gates(dense)) == [name for block in "12" for name in (block, *(s for s in sets if s[0] == block))]
    in_double_precision(dense)
    for pattern in patterns(dense).values():
        assert max(measure(dense, images, pattern).values()) <= 1e-9


def test_a_module_of_a_user_may_be_called_as_that_inside_a_gates_slot() -> None:
    layers = OrderedDict(first=nn.Conv2d(3, 6, 1), inner=nn.ReLU(), last=nn.Conv2d(6, 3, 1))
    model = nn.Sequential(ResidualBlock(nn.Sequential(layers), nn.Identity(), nn.Identity(), input_activated=True))
    surgeon = Surgeon(model)
    surgeon.freeze_channels("0:hidden")
    surgeon.remove_channels("0:hidden", {0, 3})
    assert [layers["first"].weight.shape[0], layers["last"].weight.shape[1]] == [4, 4]
    assert isinstance(layers["inner"], nn.ReLU)


@ONE_ACTIVATION
@EVERY_ORDER
@pytest.mark.parametrize("freeze_first", [True, False])
def test_an_activation_that_a_branch_uses_twice_keeps_its_gates_apart(
    act: Callable[[], nn.Module], order: str, freeze_first: bool
) -> None:
    """A block goes, then channels and gates of the other, one by one: what is left is found anew each time."""
    model, images = sharing(act(), order), torch.randn(BATCH, 3, 8, 8)
    attach_gates(model, GateConfig(units=["block", "channel"]))
    sets = find_channels(model).sets.values()
    pattern = Pattern(frozenset("2"), {found.name: (0, 2) for found in sets if found.block == "1"})
    *channels, block = pattern.operations(model)
    freezes = [Operation("freeze", key, 3, 0.5, "on") for key in find_gates(model) if key.startswith("1")]
    pattern.mask(model)
    train_pass(model, images)
    assert all(parameter.grad is not None for parameter in model.parameters())
    masked = evaluate(model, images)
    for operation in (block, *freezes, *channels) if freeze_first else (block, *channels, *freezes):
        carry_out([operation], model)
    assert not find_gates(model)
    assert not any(isinstance(module, ChannelSlot) for module in model.modules())
    assert difference(masked, evaluate(model, images)) <= TOLERANCE


def test_half_of_a_resnet50_goes_within_a_second_with_its_optimizer_on_one_core() -> None:
    from time import process_time

    from torchvision.models import resnet50

    model = resnet50(weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    convert_blocks(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    operations = [
        Operation("remove", name, 1, 0.1, "settled", tuple(range(0, found.units, 2)))
        for name, found in find_channels(model).sets.items()
    ]
    started = process_time()
    update_optimizer(optimizer, carry_out(operations, model))
    assert process_time() - started < 1.0
    after = sum(parameter.numel() for parameter in model.parameters())
    assert 0.4 < after / before < 0.6
    assert sum(state["momentum_buffer"].numel() for state in optimizer.state.values()) == after
