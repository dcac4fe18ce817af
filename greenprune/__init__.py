"""greenprune: training that removes what a network does not need while it trains, and proves the saving in joules.

As a library: :class:`Pruner` for a training loop of your own, :func:`register_block` and :class:`ResidualBlock` for
blocks of your own, :mod:`greenprune.energy` for the meter.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenprune.config import BudgetConfig, GateConfig, RemovalConfig, SurgeryConfig, UserError
    from greenprune.models import ResidualBlock, register_block, register_channelwise
    from greenprune.pruner import Pruner

__all__ = [
    "BudgetConfig",
    "GateConfig",
    "Pruner",
    "RemovalConfig",
    "ResidualBlock",
    "SurgeryConfig",
    "UserError",
    "register_block",
    "register_channelwise",
]

# Looked up when first asked for: the command line has to answer before torch is imported.
_HOMES = {
    **dict.fromkeys(("BudgetConfig", "GateConfig", "RemovalConfig", "SurgeryConfig", "UserError"), "config"),
    **dict.fromkeys(("ResidualBlock", "register_block", "register_channelwise"), "models"),
    "Pruner": "pruner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'greenprune' has no attribute {name!r}")
    return getattr(import_module(f"greenprune.{_HOMES[name]}"), name)
