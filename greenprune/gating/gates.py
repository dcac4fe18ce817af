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

# Largest gradient of one decision, for a loss summed over the batch (our choice). With unbounded ones gates closed at
# random before the network had learnt anything, and training diverged (docs/log.md).
GRADIENT_BOUND = 1.0


class _StraightThrough(torch.autograd.Function):
    """The decision 1[a > 0] of a logit; its gradient goes straight to the logit, past threshold and sigmoid.

    At the bounds only the part of the gradient that moves the logit inward passes, and no sample pulls harder than
    GRADIENT_BOUND. The sigmoid's own derivative is left out because it all but vanishes near the bounds and would
    lock the gate there (our choice).
    """

    @staticmethod
    def forward(ctx: Any, logit: Tensor, loss_scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(logit)
        ctx.loss_scale = loss_scale
        return (logit > 0).to(logit.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (logit,) = ctx.saved_tensors
        (grad,) = grads
        # A step goes against the gradient: one of the other sign moves the logit away from zero.
        outward = (logit * grad < 0) & (logit.abs() >= BOUND)
        grad = grad.masked_fill(outward, 0.0)
        largest = GRADIENT_BOUND / grad.numel()
        if ctx.loss_scale is None:
            return grad.clamp_(-largest, largest), None
        # fp16: what arrives here is the gradient of the scaled loss.
        bound = largest * ctx.loss_scale
        return torch.minimum(torch.maximum(grad, -bound), bound), None


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """No autocast inside, on devices that have it (the meta device, on which costs are counted, has none)."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def straight_through(logit: Tensor, loss_scale: Tensor | None = None) -> Tensor:
    """Binary decisions [B] of logits [B], with the bounded straight-through gradient (Bengio et al. 2013).

    Args:
        logit: Logits, fp32.
        loss_scale: Factor (scalar) by which mixed precision scales the loss; None if it does not.
    """
    decision: Tensor = _StraightThrough.apply(logit, loss_scale)
    return decision


class Gate(nn.Module):
    """Decides one unit for each input: ``s = sigmoid(a)``, ``g = 1[s > 1/2]``.

    Conditional gates compute ``a = w . norm(GAP(x)) + b``; the pooled input is layer-normalised and scaled to length
    1, so that the gate sees a direction and not a scale that differs from layer to layer, and ``w`` learns no faster
    than ``b`` (our choice). Static gates have ``a = b``.
    ``w`` starts at zero: at first every input gets the same decision, open.

    The gate watches the unit's input and leaves it alone: no gradient goes from ``a`` into the features (our choice;
    it would cost a pass over all activations).

    Args:
        channels: Channels C of the unit's input, or None for a static gate.
        openness: s at the start, in (1/2, 1).

    Attributes:
        decision: Decisions [B] (fp32, with gradient) of the last training pass, until taken by :func:`take_decisions`.
        logit: The logits [B] they were made from, without gradient.
        loss_scale: Factor by which mixed precision scales the loss, if it does; set by the training loop.
    """

    decision: Tensor | None
    logit: Tensor | None
    loss_scale: Tensor | None

    def __init__(self, channels: int | None, openness: float) -> None:
        super().__init__()
        self.weight = None if channels is None else nn.Parameter(torch.zeros(1, channels))
        self.bias = nn.Parameter(torch.full((1,), math.log(openness / (1 - openness))))
        self.decision = self.logit = self.loss_scale = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a gate has made no decisions yet (and tensors of a graph cannot be copied)."""
        return {**self.__dict__, "decision": None, "logit": None, "loss_scale": None}

    def forward(self, x: Tensor) -> Tensor:
        """Decisions [B] for the unit's input ``x`` [B, C, ...]."""
        with _full_precision(x.device.type):
            if self.weight is None:
                logit = self.bias.expand(x.shape[0])
            else:
                pooled = x.detach().mean(dim=tuple(range(2, x.dim())), dtype=torch.float32)
                direction = functional.layer_norm(pooled, pooled.shape[1:]) / math.sqrt(pooled.shape[1])
                logit = functional.linear(direction, self.weight, self.bias).squeeze(1)
            decision = straight_through(logit, self.loss_scale)
            if self.training:
                self.decision, self.logit = decision, logit.detach()
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
        Rates of this process's batch [U], with gradient, and mean openness [U], without; fp32.
    """
    rates = torch.stack([gate.decision for gate in gates if gate.decision is not None]).mean(1)
    openness = torch.stack([gate.logit for gate in gates if gate.logit is not None]).sigmoid_().mean(1)
    for gate in gates:
        gate.decision = gate.logit = None
    return rates, openness


def hold_within_bounds(gates: list[Gate]) -> None:
    """Put the logits that momentum carried past their bounds back, in place, after an optimizer step."""
    biases = [gate.bias.detach() for gate in gates]
    torch._foreach_clamp_min_(biases, -BOUND)
    torch._foreach_clamp_max_(biases, BOUND)
