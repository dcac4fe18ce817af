"""The network of a run: counted once, its cost in any structure is that of the network after the real surgery."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from greenprune.config import BudgetConfig, Config, ConfigError, GateConfig, ModelConfig, SurgeryConfig
from greenprune.flops import Cost, count_costs
from greenprune.gating import find_gates
from greenprune.models import residual_blocks
from greenprune.network import CPU, UnitTable, prepare_network, unit_costs
from greenprune.surgery import Operation, Structure, replay

MakeNetwork = Callable[..., nn.Module]


@dataclass(frozen=True)
class Shape:
    """All that a network needs to know of a data set."""

    classes: int = 10
    channels: int = 1
    image_size: int = 8


def prepared(config: Config, shape: Shape | None = None, device: torch.device = CPU) -> Any:
    return prepare_network(config, shape or Shape(), device)  # type: ignore[arg-type]


def random_structure(rng: random.Random, units: list[str]) -> Structure:
    chosen = rng.sample(units, rng.randint(1, len(units)))
    actions = [rng.choice(("remove", "remove", "freeze")) for _ in chosen]
    operations = [
        Operation(action, unit, 1, 0.1, "settled")  # type: ignore[arg-type]
        for unit, action in zip(chosen, actions, strict=True)
    ]
    frozen = [operation.unit for operation in operations if operation.action == "freeze"]
    if frozen:  # a frozen unit may be removed later
        operations.append(Operation("remove", frozen[0], 2, 0.2, "settled"))
    return Structure(operations)


@pytest.mark.parametrize(
    ("name", "shortcut", "kind", "side", "structures"),
    [
        ("resnet20", "A", "conditional", 32, 2),
        ("resnet20", "B", "conditional", 8, 2),
        ("resnet20", "B", "static", 8, 0),
        ("resnet18", "A", "conditional", 32, 1),
        ("resnet50", "A", "conditional", 64, 1),
        ("resnet20", "A", None, 8, 0),
    ],
)
def test_the_cost_of_a_structure_is_that_of_the_network_after_the_surgery(
    make_network: MakeNetwork, name: str, shortcut: str, kind: str | None, side: int, structures: int
) -> None:
    with torch.device("meta"):
        dense = make_network(name, shortcut=shortcut, kind=kind, image_size=side)
    table = UnitTable.of(dense, (3, side, side))
    units = list(residual_blocks(dense))
    rng = random.Random(7)
    # Blocks that change the shape have a shortcut with parts of its own.
    reshaping = [unit for unit, block in residual_blocks(dense).items() if not isinstance(block.shortcut, nn.Identity)]
    assert reshaping
    others = [unit for unit in units if unit not in reshaping]

    def removing(removed: list[str], frozen: list[str]) -> Structure:
        removals = [Operation("remove", unit, 1, 0.1, "off") for unit in removed]
        return Structure([*removals, *(Operation("freeze", unit, 2, 0.2, "on") for unit in frozen)])

    fixed = [removing(units, []), removing(reshaping, others), removing(others, [])]
    assert table.cost_of(Structure()) == table.whole
    for structure in [*fixed, *(random_structure(rng, units) for _ in range(structures))]:
        model = copy.deepcopy(dense)
        replay(structure, model)
        assert table.cost_of(structure) == count_costs(model, (3, side, side))[""]


def test_the_dense_network_is_the_one_without_gates(make_network: MakeNetwork) -> None:
    gated = UnitTable.of(make_network(), (3, 8, 8))
    plain = UnitTable.of(make_network(kind=None), (3, 8, 8))
    assert gated.dense == plain.dense == plain.whole == plain.cost_of(Structure())
    assert gated.whole.flops_forward > gated.dense.flops_forward
    assert gated.branches == plain.branches
    assert plain.gates == {}


# Costs in the budget's unit.

TABLE = UnitTable(
    dense=Cost(100, 280, 1000),
    whole=Cost(110, 300, 1010),
    branches={"a": Cost(30, 90, 100), "b": Cost(20, 60, 600)},
    gates={"a": Cost(5, 10, 5), "b": Cost(5, 10, 5)},
)


@pytest.mark.parametrize(
    ("unit", "fixed", "shares"),
    [
        ("flops", 0.5, {"a": 0.3, "b": 0.2}),
        ("params", 0.3, {"a": 0.1, "b": 0.6}),
        ("blocks", 0.0, {"a": 0.5, "b": 0.5}),
    ],
)
def test_shares_are_of_the_whole_dense_network(unit: str, fixed: float, shares: dict[str, float]) -> None:
    costs = unit_costs(TABLE, BudgetConfig(unit=unit, target=0.9))  # type: ignore[arg-type]
    assert costs.fixed == pytest.approx(fixed, abs=1e-12)
    assert costs.units == pytest.approx(shares)


def test_a_budget_below_what_has_no_gate_is_refused_if_it_matters() -> None:
    config = Config(budget=BudgetConfig(unit="flops", target=0.4))
    with pytest.raises(ConfigError, match=r"^budget\.target: 0\.4 "):
        unit_costs(TABLE, config.budget)
    unit_costs(TABLE, BudgetConfig(unit="params", target=0.4))
    unit_costs(replace(TABLE, gates={}), config.budget)  # a dense twin has no budget to meet


def test_a_real_network_names_its_smallest_budget() -> None:
    with pytest.raises(ConfigError, match=r"budget\.target: 0\.001 cannot be met; 0\.0\d+ "):
        prepared(Config(model=ModelConfig(name="resnet20"), budget=BudgetConfig(target=0.001)), Shape(image_size=32))


def test_what_rounding_keeps_counts_against_the_budget() -> None:
    """The first block of MobileNet's stages has no shortcut, so the last channels of each stay."""
    gate, budget = GateConfig(units=["channel"]), BudgetConfig(target=0.15)
    config = Config(model=ModelConfig(name="mobilenet_v2"), gate=gate, budget=budget)
    shape = Shape(channels=3, image_size=32)
    prepared(config, shape)
    with pytest.raises(ConfigError, match=r"0\.153 .* is kept by surgery\.round_to"):
        prepared(replace(config, surgery=SurgeryConfig(round_to=8)), shape)
    with pytest.raises(ConfigError, match=r"0\.153 .* is kept by surgery\.round_to"):
        prepared(config, shape, torch.device("cuda"))  # where 8 is the default


# Preparing.


def test_gates_come_with_the_run_and_the_dense_twin_has_none() -> None:
    config = Config(model=ModelConfig(name="resnet20"))
    assert len(find_gates(prepared(config).model)) == 9
    dense = prepared(replace(config, gate=GateConfig(enabled=False)))
    assert find_gates(dense.model) == {}
    assert dense.table.gates == {}
    assert sum(dense.costs.units.values()) + dense.costs.fixed == pytest.approx(1)


def test_the_dense_twin_starts_from_the_same_weights() -> None:
    config = Config(model=ModelConfig(name="resnet20"), seed=5)
    gated = prepared(config).model.state_dict()
    torch.rand(3)  # what was drawn before has no influence
    dense = prepared(replace(config, gate=GateConfig(enabled=False))).model.state_dict()
    assert set(dense) < set(gated)
    assert all(torch.equal(gated[key], value) for key, value in dense.items())


def test_the_seed_decides_the_weights() -> None:
    config = Config(model=ModelConfig(name="resnet20"))
    one, other = (prepared(replace(config, seed=seed)).model.state_dict() for seed in (1, 2))
    assert not torch.equal(one["stem.0.weight"], other["stem.0.weight"])


def test_the_network_fits_the_data() -> None:
    network = prepared(Config(model=ModelConfig(name="resnet18")), Shape(classes=4, channels=3, image_size=16))
    assert network.model.eval()(torch.randn(1, 3, 16, 16)).shape == (1, 4)
    assert set(network.costs.units) == set(residual_blocks(network.model))
