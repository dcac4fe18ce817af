"""What a structure costs follows by arithmetic from one count, in every family, with channels and blocks removed."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from families import FAMILIES, gated, patterns

from greenprune.flops import count_costs
from greenprune.gating import find_gates
from greenprune.models import find_channels
from greenprune.network import UnitTable
from greenprune.surgery import Operation, Structure, replay

# In training the biases of Swin V2 come from coordinates that need no gradient: of the first layer that makes them from
# 49 rows, 2 to 512 numbers wide, one product less is computed than a unit's cost takes it for.
NOT_COMPUTED = 49 * 2 * 512 * 2 // 2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cost_of_a_structure_with_channels_is_that_of_the_network_after_the_surgery(name: str) -> None:
    dense = gated(name, "conditional")
    shape = (3, FAMILIES[name].size, FAMILIES[name].size)
    table = UnitTable.of(dense, shape)
    for label in ("all-off", "one-left", "whole-sets-off", "mixed-2"):
        operations = patterns(dense)[label].operations(dense)
        model = copy.deepcopy(dense)
        replay(Structure(operations), model)
        freezes = [Operation("freeze", unit, 9, 2.0, "on") for unit in list(find_gates(model))[::2]]
        replay(Structure(freezes), model)
        structure = Structure([*operations, *freezes])
        counted, cost = count_costs(model, shape)[""], table.cost_of(structure)
        if name == "swin-v2":
            gone = sum(unit.endswith("attention") for unit in structure.removed_blocks())
            cost = replace(cost, flops_train=cost.flops_train + gone * NOT_COMPUTED)
        assert cost == counted, label


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_of_the_channels_is_known(name: str) -> None:
    dense = gated(name, "static")
    table = UnitTable.of(dense, (3, FAMILIES[name].size, FAMILIES[name].size))
    sets = find_channels(dense).sets
    assert table.channels == {key: found.units for key, found in sets.items()}
    structure = Structure(patterns(dense)["mixed-2"].operations(dense))
    replay(structure, dense)
    left = {key: found.units for key, found in find_channels(dense).sets.items()}
    assert table.channels_left(structure) == {key: left.get(key, 0) for key in sets}
