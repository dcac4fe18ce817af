"""Gates: modules that decide, per input, whether a unit is computed into the result (arXiv 2302.10798).

Everything in here stays in fp32, whatever the precision of the network around it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from greenprune.gating.budget import channel_unit
from greenprune.models import (
    BlockError,
    PlainBlock,
    ResidualBlock,
    kernels_for,
    sum_over,
)

# Logits move between -BOUND and BOUND, openness between 0.047 and 0.953: a gate that the task has driven fully open
# is then a known, short way from its threshold. Unbounded, it drifts so far that no price brings it back.
BOUND = 3.0

_EPS = 1e-5  # of the layer normalisation, as in torch.nn.functional.layer_norm

# Largest gradient of one decision, for a loss summed over the batch (our choice). With unbounded ones gates closed at
# random before the network had learnt anything, and training diverged (docs/log.md).
GRADIENT_BOUND = 1.0

# The gradient of a decision goes straight through to its logit, past threshold and sigmoid (whose derivative all but
# vanishes near the bounds and would lock a gate there). It has two parts:
#
# - of the task: what the loss would have more with the unit than without it. To first order that is the gradient d of
#   a sample's own loss by its decision, but the unit's batch norm trains its scale and shift until the mean of d is 0,
#   and all units look alike. To second order it is d - h / 2 for a unit that is on, with the curvature h. For that
#   stands a share of the sample's d^2, the empirical Fisher information (as for pruning in Theis et al. 2018, arXiv
#   1801.05787). It is larger than the curvature while the network errs more than it expects to: a share of 0.3 to 0.5
#   ranks blocks most like the loss without each of them does (docs/decisions/0032). Our choice.
# - of the penalties, through the counted rates, which are linear in the decision: as it is.
CURVATURE = 0.4


class _StraightThrough(torch.autograd.Function):
    """The decision 1[a > 0] of a logit, twice: for the network and for the counts, each with its own gradient."""

    @staticmethod
    def forward(
        ctx: Any, logit: Tensor, pull: Tensor, curvature: float, factor: float, loss_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        decision = (logit > 0).to(logit.dtype)
        ctx.save_for_backward(logit, pull, decision)
        ctx.curvature, ctx.factor, ctx.loss_scale = curvature, factor, loss_scale
        ctx.learnt_from = False
        return decision, decision.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        _mark_learnt_from(ctx)
        task, counted = grads
        logit, pull, decision = ctx.saved_tensors
        bent = task * decision
        if ctx.loss_scale is not None:  # fp16: what arrives here is the gradient of the scaled loss.
            pull, bent = pull * ctx.loss_scale, bent / ctx.loss_scale
        grad = torch.addcmul(task, bent, task, value=-ctx.curvature).add_(counted)
        if ctx.factor != 1:
            grad.mul_(ctx.factor)
        # A step goes against the gradient: a negative one moves the logit up, which stops at the upper bound.
        return torch.clamp(grad, (logit < BOUND) * -pull, (logit > -BOUND) * pull), None, None, None, None


class _FusedDecision(torch.autograd.Function):
    """A conditional block gate's decision with its straight-through gradient, in one kernel each.

    The same as :class:`_StraightThrough` of the logit that :class:`BlockGate` computes.
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, x: Tensor, weight: Tensor, bias: Tensor, gate: BlockGate
    ) -> tuple[Tensor, Tensor, Tensor]:
        decision, counted, logit, direction = kernels.decide(x, gate.dim, weight, bias, _EPS)
        ctx.save_for_backward(logit, direction)
        ctx.mark_non_differentiable(logit)
        ctx.kernels, ctx.loss_scale, ctx.every = kernels, gate.loss_scale, gate.every
        ctx.pull, stands_for = _pull_of_one(len(x), gate.every, gate.parts)
        ctx.curvature = _curvature(len(x), gate.parts)
        ctx.factor = gate.gain * stands_for
        ctx.learnt_from = False
        return decision, counted, logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor, Tensor, None]:
        _mark_learnt_from(ctx)
        logit, direction = ctx.saved_tensors
        weight, bias = ctx.kernels.decide_backward(
            grads[0],
            grads[1],
            logit,
            direction,
            every=ctx.every,
            curvature=ctx.curvature,
            factor=ctx.factor,
            pull=ctx.pull,
            bound=BOUND,
            loss_scale=ctx.loss_scale,
        )
        return None, None, weight, bias, None


def _mark_learnt_from(node: Any) -> None:
    """Remember at a decision's node in the graph that a backward pass has come by."""
    if not torch.compiler.is_compiling():
        node.learnt_from = True


def _pull_of_one(samples: int, every: int, parts: int) -> tuple[float, float]:
    """How hard a sample that has a voice may pull, and for how many it speaks."""
    stands_for = samples / -(-samples // every) if samples else 1.0
    return stands_for * GRADIENT_BOUND / (max(samples, 1) * parts), stands_for


def _pull(samples: int, every: int, parts: int, device: torch.device) -> tuple[Tensor, float]:
    """How hard each sample may pull [B, 1], fp32, and for how many each of those that have a voice speaks."""
    voices = torch.zeros(samples, 1, dtype=torch.float32, device=device)
    voices[::every] = 1.0
    pull, stands_for = _pull_of_one(samples, every, parts)
    return voices * pull, stands_for


def _curvature(samples: int, parts: int) -> float:
    """What the square of a gradient is multiplied by, which is that of a mean over samples."""
    return CURVATURE * samples * parts / 2


def full_precision(device_type: str) -> AbstractContextManager[object]:
    """No autocast inside, on devices that have it (the meta device, on which costs are counted, has none)."""
    if torch.compiler.is_compiling():
        return torch.autocast(device_type, enabled=False)  # the rest cannot be traced
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def straight_through(
    logit: Tensor, loss_scale: Tensor | None = None, gain: float = 1.0, parts: int = 1, every: int = 1
) -> tuple[Tensor, Tensor]:
    """Binary decisions of logits [B, ...], with the bounded straight-through gradient (Bengio et al. 2013).

    Args:
        logit: Logits, fp32.
        loss_scale: Factor (scalar) by which mixed precision scales the loss; None if it does not.
        gain: Factor of the gradient, before it is bounded.
        parts: Passes over which gradients are added up, each with a loss divided by their number.
        every: The first of so many samples speaks for all of them: it has their share of the gradient, they have none.

    Returns:
        The decisions twice: for the network, whose gradient by them is taken to second order, and for counts and
        penalties, to first.
    """
    pull, stands_for = _pull(len(logit), every, parts, logit.device)
    pull = pull.view(-1, *[1] * (logit.dim() - 1))
    curvature = _curvature(len(logit), parts)
    decision, counted = _StraightThrough.apply(logit, pull, curvature, gain * stands_for, loss_scale)
    return decision, counted


class Gate(nn.Module):
    """Decides one or several units for each input: ``s = sigmoid(a)``, ``g = 1[s > 1/2]``; subclasses say what a is.

    Args:
        units: Number of units U.
        openness: s at the start, in (1/2, 1).
        weight: How the input moves the logits; None for a static gate.

    Attributes:
        bias: The logits [U] without the input.
        decision: Decisions [B, U] (fp32, with gradient) of the last training pass, for counts and penalties, until
            taken by :func:`take_decisions`.
        logit: The logits [B, U] they were made from, without gradient.
        loss_scale: Factor by which mixed precision scales the loss, if it does; set by the training loop.
        units: Number of units U of the dense network.
        start: The logits at the start.
        gain: Factor of the gradient of a decision.
        parts: Passes over which gradients are added up before a step; set by the training loop.
        every: Of how many samples one teaches the gate.
    """

    decision: Tensor | None
    logit: Tensor | None
    loss_scale: Tensor | None

    def __init__(self, units: int, openness: float, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.start = math.log(openness / (1 - openness))
        self.bias = nn.Parameter(torch.full((units,), self.start, dtype=torch.float32))
        self.decision = self.logit = self.loss_scale = None
        self.units = units
        self.gain = 1.0
        self.parts = self.every = 1
        self._pulls: tuple[tuple[object, ...], tuple[Tensor, float]] | None = None
        self._replaced: weakref.ref[Any] | None = None  # node of decisions that others took the place of
        self._passed_at: int | None = None  # of the logits at the last pass: an optimizer's step makes another
        self._taught: int | None = None  # version at which others took the place of decisions that were learnt from

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a gate has made no decisions yet (and tensors of a graph cannot be copied)."""
        gone = ("decision", "logit", "loss_scale", "_pulls", "_replaced", "_passed_at", "_taught")
        return {**self.__dict__, **dict.fromkeys(gone)}

    def _pull_of(self, logit: Tensor) -> tuple[Tensor, float]:
        """The pull of a batch's samples, which is the same from batch to batch."""
        case = (len(logit), self.every, self.parts, logit.device)
        if torch.compiler.is_compiling():
            return _pull(*case)
        if self._pulls is None or self._pulls[0] != case:
            self._pulls = (case, _pull(*case))
        return self._pulls[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Go where the network goes, but stay in fp32.

        A gate's small steps would be lost in half the precision, and what counts decisions and adds their cost up is in
        fp32 too.
        """

        def in_full(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved.float() if moved.is_floating_point() else moved

        super()._apply(in_full, recurse)  # type: ignore[no-untyped-call]
        return self

    def decide(self, logit: Tensor) -> Tensor:
        """Decisions [B, U] of logits [B, U] for the network, remembered in training."""
        if torch.is_grad_enabled():
            pull, stands_for = self._pull_of(logit)
            curvature, factor = _curvature(len(logit), self.parts), self.gain * stands_for
            decision, counted = _StraightThrough.apply(logit, pull, curvature, factor, self.loss_scale)
        else:  # nothing is kept that was made in inference mode: training could not save it
            decision = counted = (logit > 0).to(logit.dtype)
        self._remember(counted, logit)
        return decision  # type: ignore[no-any-return]

    def _remember(self, counted: Tensor, logit: Tensor) -> None:
        if not self.training:
            return
        if not torch.compiler.is_compiling():
            if self.decision is not None:
                self._look_back(self.decision.grad_fn)
            self._passed_at = self.bias._version
        self.decision, self.logit = counted, logit.detach()

    def _look_back(self, node: Any) -> None:
        """Notice what was to be learnt from decisions that nobody has taken, before others take their place."""
        learnt_from = getattr(node, "learnt_from", None)  # compiled graphs have nodes of their own, without marks
        if learnt_from is False:
            self._replaced = weakref.ref(node)
        elif learnt_from:
            self._taught = self._passed_at

    @property
    def passed_twice(self) -> bool:
        """Whether decisions that nobody has taken were replaced by those of another pass, and are to be learnt from.

        The graph tells: that of a pass that was thrown away is no more, and a backward pass marks where it has been.
        """
        node = None if self._replaced is None else self._replaced()
        return node is not None and not node.learnt_from

    @property
    def gone_back_from(self) -> bool:
        """Whether decisions that nobody has taken have been learnt from, for a step that is still to come.

        Of a pass whose gradients were cleared before the next, as those of a first look at a batch, nothing is left.
        """
        if self._taught is None or self._taught != self.bias._version:
            return False
        grad = self.bias.grad
        return grad is not None and bool(grad.any())

    def forget(self) -> None:
        """Let go of the decisions."""
        self.decision = self.logit = self._replaced = self._taught = None


def _pool(x: Tensor, dim: int) -> Tensor:
    """Mean over everything but samples and channels: x [B, ...] with channels at ``dim`` to [B, C], fp32."""
    positions = [other for other in range(1, x.dim()) if other != dim % x.dim()]
    if not positions:
        return x.float()
    return sum_over(x, positions, torch.float32).div_(math.prod(x.shape[position] for position in positions))


class BlockGate(Gate):
    """Decides a whole branch from the block's input.

    Conditional gates compute ``a = w . norm(GAP(x)) + b``; the pooled input is layer-normalised and scaled to length
    1, so that the gate sees a direction and not a scale that differs from layer to layer, and ``w`` learns no faster
    than ``b`` (our choice). Static gates have ``a = b``.
    ``w`` starts at zero: at first every input gets the same decision, open.

    The gate watches the unit's input and leaves it alone: no gradient goes from ``a`` into the features (our choice;
    it would cost a pass over all activations).

    Args:
        channels: Channels C of the unit's input, or None for a static gate.
        openness: s at the start, in (1/2, 1).
        dim: Dimension of the channels in the input.
    """

    def __init__(self, channels: int | None, openness: float, dim: int = 1) -> None:
        weight = None if channels is None else nn.Parameter(torch.zeros(1, channels, dtype=torch.float32))
        super().__init__(1, openness, weight)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Decisions [B] for the unit's input ``x`` [B, C, ...]."""
        kernels = kernels_for(x)
        fits = kernels is not None and torch.is_grad_enabled() and kernels.can_decide(x, self.dim)
        if fits and self.weight is not None:
            decision, counted, logit = _FusedDecision.apply(kernels, x.detach(), self.weight, self.bias, self)
            self._remember(counted, logit)
            return decision.squeeze(1)  # type: ignore[no-any-return]
        with full_precision(x.device.type):
            if self.weight is None:
                logit = self.bias.expand(x.shape[0], 1)
            else:
                pooled = _pool(x.detach(), self.dim)
                direction = functional.layer_norm(pooled, pooled.shape[1:], eps=_EPS)
                logit = torch.addmm(self.bias, direction, self.weight.t(), alpha=1 / math.sqrt(pooled.shape[1]))
            return self.decide(logit).squeeze(1)


class ChannelGate(Gate):
    """Decides each unit of a set of channels from what the unit itself computes.

    Conditional gates compute ``a_c = w_c softsign(GAP(h)_c) + b_c`` from the activations h of the unit alone. A unit's
    decision then does not depend on others of its set, which may be removed, and a gate has two numbers a unit, where
    one that sees the whole input has as many as a layer (our choice). Static gates have ``a = b``.

    One of U units moves the loss and the budget about U times less than their branch as a whole, and its gradient is
    about sqrt(U) times less noisy. The gradient of a decision is multiplied by sqrt(U): channels then move as fast as
    noise allows (our choice; by U, gates of wide layers close at random in the warm-up).

    Args:
        units: Number of units U.
        openness: s at the start, in (1/2, 1).
        dim: Dimension of the channels in the activations.
        conditional: Whether the decision depends on the input.
    """

    def __init__(self, units: int, openness: float, dim: int, *, conditional: bool) -> None:
        weight = nn.Parameter(torch.zeros(units, dtype=torch.float32)) if conditional else None
        super().__init__(units, openness, weight)
        self.dim = dim
        self.gain = math.sqrt(units)

    def forward(self, activations: Tensor) -> Tensor:
        """Decisions [B, U] for the activations [B, ...] of U units of equally many channels."""
        with full_precision(activations.device.type):
            if self.weight is None:
                logit = self.bias.expand(activations.shape[0], -1)
            else:
                pooled = torch.unflatten(_pool(activations.detach(), self.dim), 1, (len(self.bias), -1)).mean(2)
                logit = torch.addcmul(self.bias, functional.softsign(pooled), self.weight)
            return self.decide(logit)


def find_gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of an unwrapped network, in forward order, by the name of their block or of their set of channels."""
    gates: dict[str, Gate] = {}
    for name, block in model.named_modules():
        if isinstance(block, ResidualBlock) and isinstance(block.gate, Gate):
            gates[name] = block.gate
        if isinstance(block, ResidualBlock | PlainBlock):
            for slot in block.slots:
                assert isinstance(slot.gate, Gate)
                gates[f"{name}:{slot.label}"] = slot.gate
    return gates


def gated_units(model: nn.Module) -> list[str]:
    """Names of the units that have a gate, in the order in which :func:`take_decisions` gives their rates."""
    units: list[str] = []
    for name, gate in find_gates(model).items():
        block_name, _, label = name.rpartition(":")
        block = model.get_submodule(block_name) if block_name else None
        if isinstance(block, ResidualBlock | PlainBlock):
            left = block.channels_left.get(label, range(len(gate.bias)))
            units += [channel_unit(name, index) for index in left]
        else:
            units.append(name)
    return units


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all gates of a network."""
    return [parameter for module in model.modules() if isinstance(module, Gate) for parameter in module.parameters()]


def take_decisions(gates: list[Gate], names: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    """Take the last training pass's decisions out of the gates.

    Args:
        gates: The gates.
        names: Their names, for messages.

    Returns:
        Rates of this process's batch [U], with gradient, and mean openness [U], without; fp32, for the units of all
        gates one after the other.

    Raises:
        RuntimeError: A gate has decided nothing since its decisions were last taken, or nothing that could teach it, or
            in two passes that are both to teach it.
        BlockError: Gates have decided for other numbers of inputs.
    """
    names = names or [str(number) for number in range(len(gates))]
    decisions = [gate.decision for gate in gates if gate.decision is not None]
    logits = [gate.logit for gate in gates if gate.logit is not None]
    if len(decisions) < len(gates):
        raise RuntimeError(_why_undecided(gates, names))
    if any(len(decision) != len(decisions[0]) for decision in decisions):
        check_decided({name: len(decision) for name, decision in zip(names, decisions, strict=True)}, names)
    if torch.is_grad_enabled() and not all(decision.requires_grad for decision in decisions):
        raise RuntimeError(
            "gates decided where no gradient is kept, and would learn nothing; expected activation checkpoints with "
            "use_reentrant=False, and gates that require gradients"
        )
    if any(gate.passed_twice for gate in gates):
        raise RuntimeError(
            "the network has passed twice since decisions were last taken, and the gates would count those of the "
            "second pass alone; expected a penalty after each forward pass in training (Pruner.penalty()), or all "
            "views in one batch; of a pass that goes into no loss, delete what is left of its output, or make it under "
            "torch.no_grad()"
        )
    if any(gate.gone_back_from for gate in gates):
        raise RuntimeError(
            "a backward pass has come by decisions that were not taken, and is to be learnt from in the same step: the "
            "gates would count those of the last pass alone; expected a penalty after each forward pass in training "
            "(Pruner.penalty()), or all views in one batch; of a pass whose gradients are thrown away, clear them "
            "before the next pass (zero_grad)"
        )
    rates = _mean(torch.cat(decisions, dim=1))
    openness = _mean(torch.cat(logits, dim=1).sigmoid_())
    for gate in gates:
        gate.forget()
    return rates, openness


def _mean(values: Tensor) -> Tensor:
    """Mean over samples: 0 of a batch without any, which one process may have among others."""
    return values.mean(0) if len(values) else values.sum(0)


def check_decided(inputs: Mapping[str, int], names: Sequence[str]) -> None:
    """Check that all gates decide in a pass, and for as many inputs: shares of one batch are counted.

    Args:
        inputs: For how many inputs gates have decided in a pass, by their names.
        names: The names of all gates.

    Raises:
        BlockError: One has decided nothing, or for another number than the first.
    """
    left_out = [name for name in names if name not in inputs]
    if left_out:
        raise BlockError(_left_out(left_out, len(names)))
    first = next(iter(inputs), "")
    for name, number in inputs.items():
        if number != inputs[first]:
            raise BlockError(
                f"{name}: its gate decides for {number} inputs of a batch for which that of {first} decides for "
                f"{inputs[first]}; expected blocks with gates to see as many inputs each (no frames or tiles folded "
                "into the batch for some of them): a Pruner of the part of the network in which they do"
            )


def list_places(names: Sequence[str]) -> str:
    """Names of places in a network as text, three of them at most."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _why_undecided(gates: list[Gate], names: Sequence[str]) -> str:
    still = sum(not gate.training for gate in gates)
    if 0 < still < len(gates):
        return (
            f"{still} of {len(gates)} gates are in evaluation mode, as the part of the network that they are in, and "
            "decide nothing; expected all blocks with gates in training mode (statistics are frozen by putting the "
            "batch norms alone into evaluation mode)"
        )
    undecided = [name for gate, name in zip(gates, names, strict=True) if gate.decision is None]
    if len(undecided) < len(gates):
        return _left_out(undecided, len(gates))
    return "the gates have not decided anything since they were last asked; run the network in training"


def _left_out(undecided: Sequence[str], gates: int) -> str:
    return (
        f"{list_places(undecided)}: {len(undecided)} of {gates} gates have decided nothing in a pass in training, "
        "which left out their blocks; expected every block with a gate in every pass, and no whole layers that are "
        "dropped at random (LayerDrop)"
    )


def hold_open(gates: list[Gate]) -> None:
    """Put gates back to how open they were at the start, in place, whatever the input, after an optimizer step.

    A unit that is switched off before the network has learnt anything is not trained and stays worthless.
    """
    biases = [gate.bias.detach() for gate in gates]
    weights = [gate.weight.detach() for gate in gates if gate.weight is not None]
    torch._foreach_zero_([*biases, *weights])
    torch._foreach_add_(biases, [gate.start for gate in gates])


def hold_within_bounds(gates: list[Gate]) -> None:
    """Put the logits that momentum carried past their bounds back, in place, after an optimizer step."""
    biases = [gate.bias.detach() for gate in gates]
    torch._foreach_clamp_min_(biases, -BOUND)
    torch._foreach_clamp_max_(biases, BOUND)
