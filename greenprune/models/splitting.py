"""What taking a block apart is made of, whichever library it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from greenprune.models.residual import ResidualBlock

Split = Callable[[Any], nn.Module]
"""From a block to the same in the form of a :class:`ResidualBlock`, of a chain of them, or of a plain block."""


def chain(*modules: nn.Module | None) -> nn.Sequential:
    """The modules in a row, without those that are not there or do nothing."""
    there = [module for module in modules if module is not None and type(module) is not nn.Identity]
    return nn.Sequential(*there)


def activated(branch: nn.Module, shortcut: nn.Module | None, activation: nn.Module) -> ResidualBlock:
    """A block whose sum is activated, in a network in which every block is, and the first one's input too."""
    idempotent = isinstance(activation, nn.ReLU | nn.ReLU6 | nn.Identity)
    return ResidualBlock(branch, shortcut or nn.Identity(), activation, input_activated=idempotent)


def stream(branch: nn.Module, shortcut: nn.Module | None = None) -> ResidualBlock:
    """A block whose sum is not activated, as in inverted residuals and transformers."""
    return ResidualBlock(branch, shortcut or nn.Identity(), nn.Identity(), input_activated=True)


def transformer(attention: nn.Module, mlp: nn.Module) -> nn.Sequential:
    """A block of a transformer, whose two branches can each go by itself."""
    both = nn.Sequential()
    both.add_module("attention", stream(attention))
    both.add_module("mlp", stream(mlp))
    return both
