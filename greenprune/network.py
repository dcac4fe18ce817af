"""The network of a run, gated and counted: what it and each of its units costs, in any structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from greenprune.config import Config
from greenprune.data import ImageData
from greenprune.flops import Cost, count_costs, subtract
from greenprune.gating import UnitCosts, attach_gates, gated_units
from greenprune.models import build_model, residual_blocks
from greenprune.surgery import Structure


@dataclass(frozen=True)
class UnitTable:
    """What the network and each of its units cost, counted once; any later structure follows by subtraction.

    Attributes:
        dense: The network without gates.
        whole: The network with the gates it started with.
        branches: What goes with the removal of a unit, by its name.
        gates: What goes with its gate.
    """

    dense: Cost
    whole: Cost
    branches: dict[str, Cost]
    gates: dict[str, Cost]

    @classmethod
    def of(cls, model: nn.Module, image_shape: tuple[int, int, int]) -> UnitTable:
        """Count the costs of a network from which nothing has been removed."""
        blocks = residual_blocks(model)
        gated = gated_units(model)
        counts = count_costs(
            model, image_shape, ["", *(f"{name}.branch" for name in blocks), *(f"{name}.gate" for name in gated)]
        )
        gates = {name: counts[f"{name}.gate"] for name in gated}
        return cls(
            dense=subtract(counts[""], gates.values()),
            whole=counts[""],
            branches={name: counts[f"{name}.branch"] for name in blocks},
            gates=gates,
        )

    def cost_of(self, structure: Structure) -> Cost:
        """What the network costs in a structure."""
        touched = {operation.unit for operation in structure.operations}
        removed = [self.branches[operation.unit] for operation in structure.removed()]
        return subtract(self.whole, [*removed, *(cost for name, cost in self.gates.items() if name in touched)])


def unit_costs(table: UnitTable, config: Config) -> UnitCosts:
    """What each unit of a dense network costs in the budget's unit, as a share of the whole network.

    Raises:
        ConfigError: The budget's target cannot be met.
    """
    if config.budget.unit == "flops":
        flops = {name: cost.flops_forward for name, cost in table.branches.items()}
        costs = UnitCosts.of(flops, table.dense.flops_forward)
    elif config.budget.unit == "params":
        params = {name: cost.params for name, cost in table.branches.items()}
        costs = UnitCosts.of(params, table.dense.params)
    else:
        costs = UnitCosts.of(dict.fromkeys(table.branches, 1), len(table.branches))
    if config.gate.enabled:
        costs.check_target(config.budget.target)
    return costs


@dataclass(frozen=True)
class Network:
    """A network ready to be trained.

    Attributes:
        model: The dense network, with its gates if the run is gated.
        table: What its units cost.
        costs: The same in the budget's unit, as shares of the whole.
    """

    model: nn.Module
    table: UnitTable
    costs: UnitCosts


def prepare_network(config: Config, data: ImageData) -> Network:
    """Build the network for a data set, seeded, gate it, and count what it costs.

    Raises:
        ConfigError: There is no such network, or its budget cannot be met.
    """
    torch.manual_seed(config.seed)
    model = build_model(config.model, classes=data.classes, channels=data.channels, image_size=data.image_size)
    if config.gate.enabled:
        attach_gates(model, config.gate)
    table = UnitTable.of(model, (data.channels, data.image_size, data.image_size))
    return Network(model, table, unit_costs(table, config))
