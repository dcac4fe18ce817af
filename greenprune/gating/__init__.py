"""Gates on the units of a network, the penalty that polarizes them, the budget they meet, and their consensus."""

from greenprune.gating.budget import BudgetController, UnitCosts, global_rates, polarization
from greenprune.gating.consensus import Consensus, UnitWindow, Verdict, decide, settle
from greenprune.gating.gates import (
    Gate,
    attach_gates,
    gate_parameters,
    gated_units,
    straight_through,
    take_decisions,
)
from greenprune.gating.policy import GatePolicy

__all__ = [
    "BudgetController",
    "Consensus",
    "Gate",
    "GatePolicy",
    "UnitCosts",
    "UnitWindow",
    "Verdict",
    "attach_gates",
    "decide",
    "gate_parameters",
    "gated_units",
    "global_rates",
    "polarization",
    "settle",
    "straight_through",
    "take_decisions",
]
