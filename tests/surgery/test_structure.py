"""The structure: text that replays what was done on a fresh dense network, and refuses what it does not know."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from greenprune.gating import find_gates
from greenprune.models import residual_blocks
from greenprune.surgery import Operation, Structure, StructureMismatch, replay

MakeNetwork = Callable[..., nn.Module]


def remove(unit: str, step: int = 10) -> Operation:
    return Operation("remove", unit, step, step / 5, "off")


def freeze(unit: str, step: int = 20) -> Operation:
    return Operation("freeze", unit, step, step / 5, "on")


CIFAR = Structure([remove("stages.0.1"), freeze("stages.0.2"), remove("stages.1.0", 30), freeze("stages.2.2", 30)])
TORCHVISION = Structure([remove("layer1.0"), freeze("layer1.1"), remove("layer3.0", 30), remove("layer3.1", 40)])


def modules_of(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@pytest.mark.parametrize(
    ("name", "shortcut", "structure"),
    [("resnet20", "A", CIFAR), ("resnet20", "B", CIFAR), ("resnet18", "A", TORCHVISION)],
)
@pytest.mark.parametrize("kind", ["conditional", "static", None])
def test_a_fresh_network_becomes_the_same(
    make_network: MakeNetwork, name: str, shortcut: str, structure: Structure, kind: str | None
) -> None:
    first = make_network(name, shortcut=shortcut, kind=kind)
    replay(structure, first)
    restored = Structure.from_dict(json.loads(json.dumps(structure.to_dict())))
    torch.manual_seed(99)
    second = make_network(name, shortcut=shortcut, kind=kind)
    replay(restored, second)
    assert modules_of(first) == modules_of(second)
    second.load_state_dict(first.state_dict())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(first.eval()(images), second.eval()(images))
    touched = {operation.unit for operation in structure.operations}
    removed = {operation.unit for operation in structure.removed()}
    everything = set(residual_blocks(make_network(name, kind=None)))
    assert set(residual_blocks(second)) == everything - removed
    assert set(find_gates(second)) == (everything - touched if kind else set())


def test_a_network_to_use_is_the_trained_one_without_its_gates(make_network: MakeNetwork) -> None:
    trained = make_network()
    replay(CIFAR, trained)
    replay(Structure([freeze(unit) for unit in find_gates(trained)]), trained)
    usable = make_network(kind=None)
    replay(CIFAR, usable)
    usable.load_state_dict(trained.state_dict())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(trained.eval()(images), usable.eval()(images))


def test_json_keeps_every_operation() -> None:
    values = json.loads(json.dumps(CIFAR.to_dict()))
    assert Structure.from_dict(values) == CIFAR
    assert [operation.unit for operation in CIFAR.removed()] == ["stages.0.1", "stages.1.0"]
    assert Structure.from_dict(Structure().to_dict()) == Structure()


def changed(**values: Any) -> dict[str, Any]:
    """A structure with one operation, one of whose values is wrong."""
    return {"format": 1, "operations": [{**vars(remove("stages.0.1")), **values}]}


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        {},
        "structure",
        {"operations": []},
        {"format": 3, "operations": []},
        {"format": "1", "operations": []},
        {"format": 1},
        {"format": 1, "operations": None},
        {"format": 1, "operations": 3},
        {"format": 1, "operations": ["remove"]},
        {"format": 1, "operations": [{"action": "remove", "unit": "stages.0.1"}]},
        changed(extra=1),
        changed(action="slice"),
        changed(action=None),
        changed(reason="a whim"),
        changed(unit=7),
        changed(step="late"),
        changed(epoch=None),
    ],
    ids=str,
)
def test_what_is_not_a_structure_is_refused(values: Any) -> None:
    with pytest.raises(StructureMismatch):
        Structure.from_dict(values)


@pytest.mark.parametrize(
    "operations",
    [
        [remove("layer1.0")],
        [freeze("layer1.0")],
        [remove("stages.0.9")],
        [remove("")],
        [remove("stages.0.1"), remove("stages.0.1")],
        [remove("stages.0.1"), freeze("stages.0.1")],
    ],
    ids=[
        "another network's removal",
        "another network's freeze",
        "too deep",
        "no name",
        "removed twice",
        "frozen late",
    ],
)
def test_a_structure_that_does_not_fit_the_network_is_refused(
    make_network: MakeNetwork, operations: list[Operation]
) -> None:
    with pytest.raises(StructureMismatch, match=f"no unit '{operations[-1].unit}'"):
        replay(Structure(operations), make_network())


@pytest.mark.parametrize(
    "change",
    [
        {"action": "freeze"},
        {"unit": "stages.0.0"},
        {"step": 11},
        {"epoch": 2.5},
        {"reason": "settled"},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("index", [0, 2])
def test_the_checksum_sees_any_change_of_an_operation(change: dict[str, Any], index: int) -> None:
    other = copy.deepcopy(CIFAR)
    assert other.checksum() == CIFAR.checksum()
    other.operations[index] = replace(other.operations[index], **change)
    assert other.checksum() != CIFAR.checksum()


def test_the_checksum_sees_order_and_number_of_operations() -> None:
    sums = {
        Structure(operations).checksum()
        for operations in ([], CIFAR.operations, CIFAR.operations[::-1], CIFAR.operations[:-1])
    }
    assert len(sums) == 4


def test_the_checksum_survives_json() -> None:
    assert Structure.from_dict(json.loads(json.dumps(CIFAR.to_dict()))).checksum() == CIFAR.checksum()
