"""Removing, freezing and replaying: exact changes of an unwrapped network together with its optimizer state."""

from greenprune.surgery.removal import drop_optimizer_state, freeze_unit, refuse_wrapped, remove_unit
from greenprune.surgery.structure import Operation, Structure, StructureMismatch, replay

__all__ = [
    "Operation",
    "Structure",
    "StructureMismatch",
    "drop_optimizer_state",
    "freeze_unit",
    "refuse_wrapped",
    "remove_unit",
    "replay",
]
