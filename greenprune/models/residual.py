"""The residual block and the channel slot: the two places in a network where a gate can sit."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def _known_all_on(decision: Tensor) -> bool:
    """Whether it costs nothing to see that every decision is 1: then there is nothing to multiply by.

    On a GPU looking would make the host wait; under the compiler it would break the graph.
    """
    on_cpu = decision.device.type == "cpu"
    return on_cpu and not torch.compiler.is_compiling() and len(decision) > 0 and decision.amin().item() == 1


@lru_cache
def _triton_kernels(device: torch.device) -> ModuleType | None:
    """The fused kernels, once they have run there: Triton needs a C compiler, a folder to write to and a known GPU."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
        return None
    try:
        kernels = importlib.import_module("greenprune.kernels")
        kernels.try_out(device)
    except Exception as error:  # noqa: BLE001 - compilers, drivers and file systems all raise their own
        reason = " ".join(str(error).split())[:200]
        said = f"Triton cannot make kernels here ({type(error).__name__}: {reason}); gates run as separate operators"
        warnings.warn(f"{said}, which cost a GPU about a tenth of a step", RuntimeWarning, stacklevel=2)
        return None
    return kernels


def kernels_for(x: Tensor) -> ModuleType | None:
    """The fused kernels (:mod:`greenprune.kernels`) if they can be used for a tensor.

    They cannot on a CPU or where Triton does not work, and what is compiled is fused by the compiler.
    """
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return _triton_kernels(x.device)


def sum_over(x: Tensor, dims: list[int], dtype: torch.dtype) -> Tensor:
    """Sum over some dimensions, accumulated and given in a precision of at least fp32.

    On a CPU, PyTorch first copies a bf16 tensor as a whole to fp32 when it is asked for an fp32 sum. A bf16 sum is
    accumulated in fp32 too, and only its result is rounded.
    """
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return x.sum(dim=dims).to(dtype)
    return x.sum(dim=dims, dtype=dtype)


def _into_every(values: Tensor, every: int, samples: int) -> Tensor:
    """What every ``every``-th of B samples has, with zeros for the others: [B, ...]."""
    if every == 1:
        return values
    spread = values.new_zeros(samples, *values.shape[1:])
    spread[::every] = values
    return spread


class _GatedSum(torch.autograd.Function):
    """``shortcut + decision * branch`` in one pass over the activations, and at most two in the backward.

    The derivative of torch.addcmul makes two more passes, to multiply by its factor of 1. Only every ``every``-th
    decision has a gradient: for the others it is not computed, and their part of the branch is not kept for it. What is
    not kept is memory that the next layer writes to while it is still in the cache. The backward can be differentiated
    in its turn, as a penalty on gradients asks for; decisions are constants in it.
    """

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, decision: Tensor, every: int) -> Tensor:
        ctx.all_on = _known_all_on(decision)
        ctx.every = every
        kept = None
        if ctx.needs_input_grad[2]:
            kept = branch if every == 1 else branch[::every].clone()
        ctx.save_for_backward(kept, decision)
        if ctx.all_on:
            return shortcut + branch
        return torch.addcmul(shortcut, branch, _per_sample(decision, branch))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (grad,) = grads
        kept, decision = ctx.saved_tensors
        towards_decision = None
        if ctx.needs_input_grad[2]:
            products = grad.detach()[:: ctx.every] * kept
            summed = sum_over(products, list(range(1, grad.dim())), decision.dtype)
            towards_decision = _into_every(summed, ctx.every, len(grad)).detach()
        return grad, grad if ctx.all_on else grad * _per_sample(decision.detach(), grad), towards_decision, None


class _OpenReLU(torch.autograd.Function):
    """``relu(shortcut + branch)`` while every decision is 1, with the decisions' gradient.

    The branch's output is not kept for the backward, as it is not without a gate. Where the gradient is not 0 it is the
    difference of result and shortcut, and those are kept anyway, by the layers that they go into. Only every
    ``every``-th decision has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, decision: Tensor, every: int) -> Tensor:
        out = (shortcut + branch).relu_()
        ctx.save_for_backward(shortcut, out)
        ctx.every = every
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        shortcut, out = (saved.detach() for saved in ctx.saved_tensors)
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        branch = out[:: ctx.every] - shortcut[:: ctx.every]
        summed = branch.mul_(grad.detach()[:: ctx.every]).sum(dim=tuple(range(1, grad.dim())))
        return grad, grad, _into_every(summed, ctx.every, len(grad)), None


class _FusedSum(torch.autograd.Function):
    """``activation(shortcut + decision * branch)`` in one kernel, and one in the backward.

    The branch is kept of every ``every``-th sample alone.
    """

    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, shortcut: Tensor, branch: Tensor, decision: Tensor, every: int, relu: bool
    ) -> Tensor:
        out: Tensor
        out, kept = kernels.gated_sum(shortcut, branch, decision, every, keeps=ctx.needs_input_grad[3], relu=relu)
        # Without ReLU the result is not needed, and what comes next may change it in place.
        ctx.save_for_backward(out if relu else None, kept, decision)
        ctx.kernels, ctx.every, ctx.stride = kernels, every, out.stride()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, Tensor | None, None, None]:
        out, kept, decision = ctx.saved_tensors
        shortcut, branch, towards = ctx.kernels.gated_sum_backward(grads[0], out, kept, decision, ctx.every, ctx.stride)
        return None, shortcut, branch, towards, None, None


def _per_sample(decision: Tensor, activations: Tensor) -> Tensor:
    """Decisions [B] in the shape and precision in which they multiply activations [B, ...]."""
    return decision.to(activations.dtype).view(-1, *[1] * (activations.dim() - 1))


class _GatedChannels(torch.autograd.Function):
    """``decision * activations``, with one decision for each sample and unit of channels.

    Only every ``every``-th sample's decisions have a gradient.
    """

    @staticmethod
    def forward(ctx: Any, activations: Tensor, decision: Tensor, dim: int, every: int) -> Tensor:
        ctx.all_on = _known_all_on(decision)
        ctx.save_for_backward(activations, decision)
        ctx.dim, ctx.every = dim, every
        if ctx.all_on:
            return activations.view_as(activations)
        return activations * _per_channel(decision, activations, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        activations, decision = (saved.detach() for saved in ctx.saved_tensors)
        channel_dim = ctx.dim % grad.dim()
        positions = [dim for dim in range(1, grad.dim()) if dim != channel_dim]
        products = grad.detach()[:: ctx.every] * activations[:: ctx.every]
        # Without positions there is nothing to sum over; for torch that would mean to sum over everything.
        by_channel = sum_over(products, positions, decision.dtype) if positions else products.to(decision.dtype)
        by_unit = _into_every(by_channel.unflatten(1, (decision.shape[1], -1)).sum(2), ctx.every, len(grad))
        return grad if ctx.all_on else grad * _per_channel(decision, grad, ctx.dim), by_unit, None, None


def _per_channel(decision: Tensor, activations: Tensor, dim: int) -> Tensor:
    """Decisions [B, U] in the shape and precision in which they multiply activations with C channels at ``dim``."""
    per_unit = activations.shape[dim] // decision.shape[1]
    factors = decision.to(activations.dtype)
    if per_unit > 1:
        factors = factors.repeat_interleave(per_unit, dim=1)
    shape = [1] * activations.dim()
    shape[0], shape[dim] = factors.shape
    return factors.view(shape)


class ChannelSlot(nn.Module):
    """A module of a branch whose output channels a gate switches, each for itself.

    It stands around the module only as long as there is a gate.

    Args:
        inner: The module whose output [B, ...] is switched.
        gate: From that output to decisions [B, U] for units of equally many channels.
        dim: Dimension of the channels.
        label: Name of the set of channels within its block.

    Attributes:
        every: One of so many samples has a gradient towards its decisions.
        some_on: Of the last pass: for each sample [B], 1 if any unit was on.
    """

    some_on: Tensor

    def __init__(self, inner: nn.Module, gate: nn.Module, dim: int, label: str) -> None:
        super().__init__()
        self.inner = inner
        self.gate = gate
        self.dim = dim
        self.label = label
        self.every = 1

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a slot has switched nothing yet."""
        return {key: value for key, value in self.__dict__.items() if key != "some_on"}

    def forward(self, x: Tensor) -> Tensor:
        """The inner module's output with the channels of units that are off at zero."""
        activations = self.inner(x)
        decision = self.gate(activations)
        self.some_on = decision.detach().amax(1)
        gated: Tensor = _GatedChannels.apply(activations, decision, self.dim, self.every)
        return gated


class ResidualBlock(nn.Module):
    """A residual unit ``activation(shortcut(x) + g * branch(x))`` (He et al. 2015), ``g = 1`` without a gate.

    The branch is one module, so that removing it is removing everything that the unit computes beyond its shortcut.
    For a sample for which all channels between two layers of the branch are off, g is 0: the branch would compute a
    constant that does not depend on the input, and goes as a whole.

    Args:
        branch: F, from x [B, C, ...] to [B, C', ...].
        shortcut: S, to the same shape as the branch. :class:`torch.nn.Identity` if the shape does not change.
        activation: Applied to the sum.
        input_activated: The block's input has already passed the same, idempotent activation (ReLU after ReLU, or
            none at all), so that a block with an identity shortcut and no branch computes nothing at all.

    Attributes:
        gate: From x to decisions [B], or None.
        every: One of so many samples has a gradient towards its decision.
        slots: The channel slots inside the branch.
        channels_left: By the label of a set of channels: dense indices of the units left, once some were removed.
    """

    gate: nn.Module | None

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module, *, input_activated: bool) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.activation = activation
        self.input_activated = input_activated
        self.gate = None
        self.every = 1
        self.slots: list[ChannelSlot] = []  # not children: they stand in the branch
        self.channels_left: dict[str, list[int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The unit's output [B, C', ...] for the input ``x`` [B, C, ...]."""
        # The gate first: it reads all of x, which is still in the cache.
        decision = None if self.gate is None else self.gate(x)
        shortcut = self.shortcut(x)
        branch = self.branch(x)
        for slot in self.slots:
            decision = slot.some_on if decision is None else decision * slot.some_on
        if decision is None:
            return self._activate(shortcut + branch)
        if _known_all_on(decision):
            if not decision.requires_grad:
                return self._activate(shortcut + branch)
            if type(self.activation) is nn.ReLU and branch.dtype == torch.float32:  # in bf16 a difference is too coarse
                activated: Tensor = _OpenReLU.apply(shortcut, branch, decision, self.every)
                return activated
        kernels = kernels_for(branch)
        if kernels is not None and torch.is_grad_enabled() and kernels.can_sum(shortcut, branch):
            relu = type(self.activation) is nn.ReLU
            fused = _FusedSum.apply(kernels, shortcut, branch, decision.contiguous(), self.every, relu)
            return fused if relu else self._activate(fused)
        return self._activate(_GatedSum.apply(shortcut, branch, decision, self.every))

    def _activate(self, total: Tensor) -> Tensor:
        activated: Tensor = self.activation(total)
        return activated

    def extra_repr(self) -> str:
        """What stays of it when its branch goes depends on this."""
        return f"input_activated={self.input_activated}"

    def without_branch(self) -> nn.Module:
        """What is left of the block when its branch is gone: its shortcut, exactly as the block with g = 0."""
        if isinstance(self.shortcut, nn.Identity):
            return nn.Identity() if self.input_activated else self.activation
        return nn.Sequential(self.shortcut, self.activation)


def mark_left_alone(block: nn.Module, reason: str) -> None:
    """Remember at a block that could have been taken apart why it was not."""
    block._greenprune_left_alone = reason  # type: ignore[assignment]


def why_left_alone(module: nn.Module) -> str | None:
    """Why a module that is much like a residual block is not gated; None of any other."""
    reason = vars(module).get("_greenprune_left_alone")
    return reason if isinstance(reason, str) else None


def follow_mode(made: nn.Module, block: nn.Module) -> None:
    """Put what is made around a block's modules into its mode; they themselves, a frozen norm perhaps, keep theirs."""
    own = set(block.modules())
    for module in made.modules():
        if module not in own:
            module.training = block.training


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """Those that look at what goes through a module, forward or backward."""
    kept = (vars(module).get(name) for name in _HOOKS)
    return [hook for found in kept if isinstance(found, dict) for hook in found.values() if callable(hook)]


def with_hooks_of(made: nn.Module, block: nn.Module) -> nn.Module:
    """What stands in a block's place, seen by the block's hooks; their handles take them off as before."""
    if not hooks_of(block):
        return made
    if made in set(block.modules()):  # an activation, perhaps, that has other places too
        made = nn.Sequential(made)
        made.training = block.training
    vars(made).update({name: vars(block)[name] for name in _HOOKS})
    return made


class PlainBlock(nn.Module):
    """A block without a shortcut: it has to stay, but the channels inside it can be gated.

    Args:
        branch: What it computes, from x [B, C, ...] to [B, C', ...].

    Attributes:
        slots: The channel slots inside it.
        channels_left: By the label of a set of channels: dense indices of the units left, once some were removed.
    """

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.slots: list[ChannelSlot] = []
        self.channels_left: dict[str, list[int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The branch's output."""
        out: Tensor = self.branch(x)
        return out


class Scale(nn.Module):
    """Multiplies by a learned factor for each channel (LayerScale, Touvron et al. 2021, arXiv 2103.17239).

    Args:
        weight: The factors.
        shape: Shape in which they broadcast over the input; None: their own.
    """

    def __init__(self, weight: nn.Parameter, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.shape = shape or tuple(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """``weight * x``."""
        return self.weight.view(self.shape) * x


def residual_blocks(model: nn.Module) -> dict[str, ResidualBlock]:
    """The residual blocks of a network by their module path, in the order of the forward pass."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ResidualBlock)}
