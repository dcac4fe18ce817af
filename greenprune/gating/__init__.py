"""Gates on the units of a network, the penalty that polarizes them, the budget they meet, and their consensus."""

from greenprune.gating.attaching import attach_gates
from greenprune.gating.budget import (
    BudgetController,
    CostTerm,
    UnitCosts,
    channel_unit,
    global_rates,
    polarization,
    split_unit,
)
from greenprune.gating.consensus import Consensus, UnitWindow, by_gate
from greenprune.gating.gates import (
    BlockGate,
    ChannelGate,
    Gate,
    check_decided,
    find_gates,
    gate_parameters,
    gated_units,
    list_places,
    straight_through,
    take_decisions,
)
from greenprune.gating.policy import WINDOWS, GatePolicy, PolicySettings, default_window
from greenprune.gating.settling import Verdict, decide, settle

__all__ = [
    "WINDOWS",
    "BlockGate",
    "BudgetController",
    "ChannelGate",
    "Consensus",
    "CostTerm",
    "Gate",
    "GatePolicy",
    "PolicySettings",
    "UnitCosts",
    "UnitWindow",
    "Verdict",
    "attach_gates",
    "by_gate",
    "channel_unit",
    "check_decided",
    "decide",
    "default_window",
    "find_gates",
    "gate_parameters",
    "gated_units",
    "global_rates",
    "list_places",
    "polarization",
    "settle",
    "split_unit",
    "straight_through",
    "take_decisions",
]
