"""Gates: modules that decide, per input, whether a unit is computed into the result (arXiv 2302.10798).

Everything in here stays in fp32, whatever the precision of the network around it.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from greenprune.config import GateConfig
from greenprune.models import ResidualBlock, residual_blocks

# Logits move between -BOUND and BOUND, openness between 0.047 and 0.953: a gate that the task has driven fully open
# is then a known, short way from its threshold. Unbounded, it drifts so far that no price brings it back.
BOUND = 3.0

# Largest gradient of one decision, for a loss summed over the batch. Early in training single samples pull a hundred
# times harder than the rest; unbounded, they close gates at random before the network has learnt anything.
GRADIENT_BOUND = 1.0


class _StraightThrough(torch.autograd.Function):
    """The decision 1[a > 0] of a logit; its gradient goes straight to the logit, past threshold and sigmoid.

    At the bounds only the part of the gradient that moves the logit inward passes, and no sample pulls harder than
    GRADIENT_BOUND. The sigmoid's own derivative is left out because it all but vanishes near the bounds and would
    lock the gate there (our choice).
    """

    @staticmethod
    def forward(ctx: Any, logit: Tensor) -> Tensor:
        ctx.save_for_backward(logit)
        return (logit > 0).to(logit.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (logit,) = ctx.saved_tensors
        (grad,) = grads
        # A step goes against the gradient: a negative gradient raises the logit.
        outward = ((logit >= BOUND) & (grad < 0)) | ((logit <= -BOUND) & (grad > 0))
        largest = GRADIENT_BOUND / grad.numel()
        return grad.masked_fill(outward, 0.0).clamp(-largest, largest)


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """No autocast inside, on devices that have it (the meta device, on which costs are counted, has none)."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def straight_through(logit: Tensor) -> Tensor:
    """Binary decisions [B] of logits [B], with the bounded straight-through gradient (Bengio et al. 2013)."""
    decision: Tensor = _StraightThrough.apply(logit)
    return decision


class Gate(nn.Module):
    """Decides one unit for each input: ``s = sigmoid(a)``, ``g = 1[s > 1/2]``.

    Conditional gates compute ``a = w . norm(GAP(x)) + b``; the pooled input is layer-normalised and scaled to length
    1, so that the gate sees a direction and not a scale that differs from layer to layer, and ``w`` learns no faster
    than ``b`` (our choice). Static gates have ``a = b``.
    ``w`` starts at zero: at first every input gets the same decision, open.

    Args:
        channels: Channels C of the unit's input, or None for a static gate.
        openness: s at the start, in (1/2, 1).

    Attributes:
        decision: Decisions [B] (fp32, with gradient) of the last training pass, until taken by :func:`take_decisions`.
        openness: Mean of s over the same batch, a scalar without gradient.
    """

    decision: Tensor | None
    openness: Tensor | None

    def __init__(self, channels: int | None, openness: float) -> None:
        super().__init__()
        self.weight = None if channels is None else nn.Parameter(torch.zeros(1, channels))
        self.bias = nn.Parameter(torch.full((1,), math.log(openness / (1 - openness))))
        self.decision = None
        self.openness = None

    def forward(self, x: Tensor) -> Tensor:
        """Decisions [B] for the unit's input ``x`` [B, C, ...]."""
        with _full_precision(x.device.type):
            if self.weight is None:
                logit = self.bias.expand(x.shape[0])
            else:
                pooled = x.mean(dim=tuple(range(2, x.dim())), dtype=torch.float32)
                direction = functional.layer_norm(pooled, pooled.shape[1:]) / math.sqrt(pooled.shape[1])
                logit = functional.linear(direction, self.weight, self.bias).squeeze(1)
            decision = straight_through(logit)
            if self.training:
                self.decision = decision
                self.openness = torch.sigmoid(logit.detach().clamp(-BOUND, BOUND)).mean()
        return decision


def attach_gates(model: nn.Module, config: GateConfig) -> list[str]:
    """Put a gate on every unit of an unwrapped dense network, in place.

    Args:
        model: The network.
        config: Kind of the gates and their openness at the start.

    Returns:
        The names of the units.
    """
    blocks = residual_blocks(model)
    for block in blocks.values():
        channels = _input_channels(block) if config.kind == "conditional" else None
        block.gate = Gate(channels, config.openness)
    return list(blocks)


def _input_channels(block: ResidualBlock) -> int:
    first = next(module for module in block.branch.modules() if isinstance(module, nn.Conv2d))
    return first.in_channels


def gated_units(model: nn.Module) -> dict[str, ResidualBlock]:
    """The units of an unwrapped network that still have a gate, by name, in forward order."""
    return {name: block for name, block in residual_blocks(model).items() if block.gate is not None}


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all gates of a network."""
    return [parameter for module in model.modules() if isinstance(module, Gate) for parameter in module.parameters()]


def take_decisions(gates: list[Gate]) -> tuple[Tensor, Tensor]:
    """Take the last training pass's decisions out of the gates.

    Returns:
        Rates of this process's batch [U], with gradient, and openness [U], without; fp32.
    """
    rates = torch.stack([gate.decision for gate in gates if gate.decision is not None]).mean(1)
    openness = torch.stack([gate.openness for gate in gates if gate.openness is not None])
    for gate in gates:
        gate.decision = gate.openness = None
    return rates, openness
