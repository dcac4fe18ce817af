"""Removing, freezing and replaying: exact changes of an unwrapped network together with its optimizer state."""

from greenprune.surgery.removal import Surgeon, refuse_wrapped, update_optimizer
from greenprune.surgery.structure import Operation, Structure, StructureMismatch, carry_out, replay

__all__ = [
    "Operation",
    "Structure",
    "StructureMismatch",
    "Surgeon",
    "carry_out",
    "refuse_wrapped",
    "replay",
    "update_optimizer",
]
