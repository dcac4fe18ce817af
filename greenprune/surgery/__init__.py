"""Removing, freezing and replaying: exact changes of an unwrapped network together with its optimizer state."""

from greenprune.surgery.given import given_structure, resolve_structure, structure_text
from greenprune.surgery.removal import Surgeon, refuse_uncuttable, refuse_wrapped, update_optimizer
from greenprune.surgery.structure import Operation, Structure, StructureMismatch, carry_out, replay

__all__ = [
    "Operation",
    "Structure",
    "StructureMismatch",
    "Surgeon",
    "carry_out",
    "given_structure",
    "refuse_uncuttable",
    "refuse_wrapped",
    "replay",
    "resolve_structure",
    "structure_text",
    "update_optimizer",
]
