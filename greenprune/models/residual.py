"""The residual block that every network here is built of, with a place for a gate on its branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _GatedSum(torch.autograd.Function):
    """``shortcut + decision * branch`` in one pass over the activations, and two in the backward.

    The derivative of torch.addcmul makes two more passes, to multiply by its factor of 1.
    """

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, decision: Tensor) -> Tensor:
        ctx.save_for_backward(branch, decision)
        return torch.addcmul(shortcut, branch, _per_sample(decision, branch))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        branch, decision = ctx.saved_tensors
        towards_decision = (grad * branch).sum(dim=tuple(range(1, grad.dim())), dtype=decision.dtype)
        return grad, grad * _per_sample(decision, grad), towards_decision


def _per_sample(decision: Tensor, activations: Tensor) -> Tensor:
    """Decisions [B] in the shape and precision in which they multiply activations [B, ...]."""
    return decision.to(activations.dtype).view(-1, *[1] * (activations.dim() - 1))


class ResidualBlock(nn.Module):
    """A residual unit ``activation(shortcut(x) + g * branch(x))`` (He et al. 2015), ``g = 1`` without a gate.

    The branch is one module, so that removing it is removing everything that the unit computes beyond its shortcut.

    Args:
        branch: F, from x [B, C, H, W] to [B, C', H', W'].
        shortcut: S, to the same shape as the branch. :class:`torch.nn.Identity` if the shape does not change.
        activation: Applied to the sum.
        input_activated: The block's input has already passed the same, idempotent activation (ReLU after ReLU), so
            that a block with an identity shortcut and no branch computes nothing at all.
    """

    gate: nn.Module | None

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module, *, input_activated: bool) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        self.input_activated = input_activated
        self.gate = None

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output [B, C', H', W'] for the input ``x`` [B, C, H, W]."""
        shortcut = self.shortcut(x)
        branch = self.branch(x)
        out = shortcut + branch if self.gate is None else _GatedSum.apply(shortcut, branch, self.gate(x))
        activated: Tensor = self.activation(out)
        return activated

    def without_branch(self) -> nn.Module:
        """What is left of the block when its branch is gone: its shortcut, exactly as the block with g = 0."""
        if isinstance(self.shortcut, nn.Identity):
            return nn.Identity() if self.input_activated else self.activation
        return nn.Sequential(self.shortcut, self.activation)


def residual_blocks(model: nn.Module) -> dict[str, ResidualBlock]:
    """The residual blocks of a network by their module path, in the order of the forward pass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ResidualBlock)}
