"""Physical removal of units from an unwrapped network, and of what the optimizer kept for them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from greenprune.gating import gate_parameters
from greenprune.models import ChannelSet, ChannelSlot, PlainBlock, ResidualBlock, Slice, find_channels
from greenprune.models.channels import mark_grouped
from greenprune.models.residual import follow_mode, with_hooks_of

_WRAPPERS = (
    "DeepSpeedEngine",
    "FullyShardedDataParallel",
    "OptimizedModule",
)  # by name: optional or private types


def refuse_wrapped(model: nn.Module) -> None:
    """Check that a network is not wrapped: a wrapper holds buckets, hooks or graphs of what would be removed.

    Raises:
        TypeError: The network is wrapped for data parallelism or compiled, or its parameters are sharded.
    """
    for name, parameter in model.named_parameters():
        # FSDP's second version, and its first, in which the network itself may stand below the wrapper.
        how = "a DTensor" if type(parameter.data).__name__ == "DTensor" else "by FullyShardedDataParallel"
        if how == "a DTensor" or getattr(parameter, "_fsdp_flattened", False):
            raise TypeError(f"surgery needs whole parameters, and {name!r} is sharded ({how})")
    if isinstance(model, DistributedDataParallel | DataParallel) or type(model).__name__ in _WRAPPERS:
        raise TypeError(f"surgery needs the unwrapped network, not {type(model).__name__}")


@dataclass(frozen=True)
class Replacement:
    """The parameter that took another one's place: some of its entries along one dimension."""

    parameter: nn.Parameter
    dim: int
    index: Tensor


@dataclass
class Surgeon:
    """Operates on one unwrapped network, in place; several operations together find its channels only once.

    Every operation is exact: the network computes what it computed with the removed units' decisions at 0 for every
    sample.

    Args:
        model: The unwrapped network.

    Attributes:
        replacements: For each parameter that lost channels, the one in its place.
        before: The network's parameters before any operation.

    Raises:
        TypeError: The network is wrapped.
    """

    model: nn.Module
    replacements: dict[nn.Parameter, Replacement] = field(default_factory=dict)
    before: frozenset[nn.Parameter] = frozenset()
    _sets: dict[str, ChannelSet] | None = None

    def __post_init__(self) -> None:
        refuse_wrapped(self.model)
        self.before = frozenset(self.model.parameters())

    def remove_block(self, name: str) -> None:
        """Take a block's branch and gates out of the network; its shortcut stays in its place.

        Args:
            name: Module path of the block.

        Raises:
            KeyError: No block has this name (any more).
        """
        block = self._block(name)
        rest = block.without_branch()
        follow_mode(rest, block)
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, with_hooks_of(rest, block))
        self._sets = {key: found for key, found in self._channel_sets().items() if found.block != name}

    def remove_channels(self, name: str, units: Collection[int]) -> None:
        """Take some units out of a set of channels, out of every tensor that holds them and out of their gate.

        Args:
            name: Name of the set.
            units: Indices of the units in the dense network.

        Raises:
            KeyError: There is no such set, or not these units (any more), or none of them would be left.
        """
        channels = self._channels(name)
        block = self._owner(channels)
        left = block.channels_left.get(channels.label, list(range(channels.units)))
        gone = set(units)
        missing = sorted(gone - set(left))
        if missing:
            raise KeyError(f"{name!r} has no units {missing}")
        if len(gone) == len(left):
            advice = "remove its block" if channels.removable else "its block has no shortcut, keep at least one"
            raise KeyError(f"{name!r} would have no unit left; {advice}")
        keep = [position for position, index in enumerate(left) if index not in gone]
        for piece in self._slices(channels):
            self._keep_entries(piece, keep, channels.units)
        for path, attribute in channels.sizes:
            module = self.model.get_submodule(path)
            setattr(module, attribute, getattr(module, attribute) * len(keep) // channels.units)
            if attribute == "groups":
                mark_grouped(module)
        channels.units = len(keep)
        block.channels_left[channels.label] = [left[position] for position in keep]

    def freeze_block(self, name: str) -> None:
        """Take a block's gate off and keep the block: it is on for good. Nothing happens if it has no gate.

        Args:
            name: Module path of the block.

        Raises:
            KeyError: No block has this name.
        """
        self._block(name).gate = None

    def freeze_channels(self, name: str) -> None:
        """Take the gate off a set of channels and keep the channels. Nothing happens if they have no gate.

        Args:
            name: Name of the set.

        Raises:
            KeyError: There is no such set.
        """
        channels = self._channels(name)
        gate_path = self._gate_path(channels)
        if gate_path is None:
            return
        slot_path = gate_path.removesuffix(".gate")
        slot = self.model.get_submodule(slot_path)
        assert isinstance(slot, ChannelSlot)
        parent, _, child = slot_path.rpartition(".")
        setattr(self.model.get_submodule(parent), child, slot.inner)
        self._owner(channels).slots.remove(slot)
        self._sets = None  # paths below the slot are shorter now

    def _block(self, name: str) -> ResidualBlock:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, ResidualBlock):
            raise KeyError(f"the network has no unit {name!r}{self._why_none()}")
        return module

    def _owner(self, channels: ChannelSet) -> ResidualBlock | PlainBlock:
        block = self.model.get_submodule(channels.block)
        assert isinstance(block, ResidualBlock | PlainBlock)
        return block

    def _channel_sets(self) -> dict[str, ChannelSet]:
        if self._sets is None:
            self._sets = find_channels(self.model).sets
        return self._sets

    def _channels(self, name: str) -> ChannelSet:
        channels = self._channel_sets().get(name)
        if channels is None:
            raise KeyError(f"the network has no channels {name!r}{self._why_none()}")
        return channels

    def _why_none(self) -> str:
        """Of a network as its library builds it, as a copy made before the pruner is: what it lacks."""
        if any(isinstance(module, ResidualBlock | PlainBlock) for module in self.model.modules()):
            return ""
        return (
            ", of whose blocks none is taken apart; expected a copy that was made after the Pruner, or "
            "greenprune.models.convert_blocks(network, example) before"
        )

    def _gate_path(self, channels: ChannelSet) -> str | None:
        slot_path, _, child = channels.slot.rpartition(".")
        is_gated = child == "inner" and isinstance(self.model.get_submodule(slot_path), ChannelSlot)
        return f"{slot_path}.gate" if is_gated else None

    def _slices(self, channels: ChannelSet) -> list[Slice]:
        """Where a set's units lie, in the network and in their gate."""
        gate_path = self._gate_path(channels)
        if gate_path is None:
            return channels.slices
        gate = self.model.get_submodule(gate_path)
        return channels.slices + [Slice(gate_path, tensor, 0) for tensor, _ in gate.named_parameters()]

    def gated_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that lose entries when a unit goes from a set of channels that has a gate, by their path."""
        for channels in self._channel_sets().values():
            if self._gate_path(channels) is not None:
                for piece in self._slices(channels):
                    tensor = getattr(self.model.get_submodule(piece.module), piece.tensor)
                    if isinstance(tensor, nn.Parameter):
                        yield f"{piece.module}.{piece.tensor}", tensor

    def _keep_entries(self, piece: Slice, keep: Sequence[int], units: int) -> None:
        """Exchange a tensor for one with the entries of the units that are kept."""
        module = self.model.get_submodule(piece.module)
        old = getattr(module, piece.tensor)
        stretch = torch.arange(piece.repeats).view(-1, 1, 1) * (units * piece.per_unit)
        unit = torch.tensor(keep).view(1, -1, 1) * piece.per_unit
        index = (stretch + unit + torch.arange(piece.per_unit)).flatten().to(old.device)
        new = _select(old.detach(), piece.dim, index)
        if isinstance(old, nn.Parameter):
            parameter = nn.Parameter(new, requires_grad=old.requires_grad)
            _take_over(parameter, old, piece.dim, index)
            self.replacements[old] = Replacement(parameter, piece.dim, index)
            new = parameter
        setattr(module, piece.tensor, new)


def _take_over(parameter: nn.Parameter, old: nn.Parameter, dim: int, index: Tensor) -> None:
    """What a loop has put at a parameter, for the one in its place.

    That is the gradient that is being added up, hooks (with their handles), and marks such as ``no_weight_decay``.
    """
    if old.grad is not None:
        parameter.grad = _select(old.grad.detach(), dim, index)
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(old, hooks, None) is not None:
            setattr(parameter, hooks, getattr(old, hooks))
    marks = {name: value for name, value in vars(old).items() if not isinstance(value, Tensor)}
    vars(parameter).update(marks)


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Some entries of a tensor along a dimension, in the tensor's own memory format.

    Of the weights of a 1x1 or depthwise convolution ``is_contiguous`` holds for both formats, and only the strides tell
    them apart. Kernels go by those: they have to be the ones that a network of the smaller size would have.
    """
    chosen = tensor.index_select(dim, index)
    rows_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if rows_last is not None:
        laid_out = torch.empty(tensor.shape, device="meta").to(memory_format=rows_last)
        if tensor.stride() == laid_out.stride():
            return torch.empty_like(chosen, memory_format=rows_last).copy_(chosen)
    return chosen


def update_optimizer(optimizer: Optimizer, surgeon: Surgeon) -> None:
    """Make the optimizer follow surgery, in place: shrink the survivors' state, forget what is gone.

    The optimizer stays the same object and parameters keep their groups and their order, so learning-rate schedules
    and wrappers that hold it go on. Parameters that were never of this network, such as those of a head beside it, stay
    as they are. What it keeps for a parameter in the parameter's shape (momentum, moments) is cut
    like the parameter, bit for bit; single numbers (step counts) stay.

    Args:
        optimizer: A torch optimizer, unwrapped.
        surgeon: Who operated on the network since the optimizer last fitted it.

    Raises:
        TypeError: The optimizer keeps something for a parameter in another shape, which cannot be cut.
    """
    alive = {parameter: name for name, parameter in surgeon.model.named_parameters()}
    for parameter in surgeon.replacements:  # before anything of it is changed
        survivor = parameter
        while survivor in surgeon.replacements:
            survivor = surgeon.replacements[survivor].parameter
        if survivor in alive:
            _refuse_uncuttable(optimizer, parameter, alive[survivor])
    for group in optimizer.param_groups:
        kept, places = [], []
        for place, parameter in enumerate(group["params"]):
            survivor = _follow(optimizer, parameter, surgeon.replacements)
            if survivor in alive or parameter not in surgeon.before:
                kept.append(survivor)
                places.append(place)
            else:
                optimizer.state.pop(survivor, None)
        group["params"] = kept
        if "param_names" in group:  # of an optimizer made of named parameters
            group["param_names"] = [group["param_names"][place] for place in places]


def refuse_uncuttable(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Check that optimizers could follow the removal of any channels that have a gate, before any is removed.

    It knows no more than what an optimizer keeps by now: a fresh one keeps nothing.

    Args:
        optimizers: Torch optimizers, unwrapped: all that train the network.
        model: The unwrapped network.

    Raises:
        TypeError: One keeps something for a parameter in another shape, which cannot be cut; the message names the
            first such parameter. Or it keeps one history of all parameters, or leaves the state to another optimizer
            inside, or the network is wrapped.
        ValueError: A parameter that trains and would be cut is in none of them.
    """
    for optimizer in optimizers:
        _refuse_wrapper(optimizer)
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                f"{type(optimizer).__name__} keeps one history of all parameters together, which cannot follow a "
                "removal; expected an optimizer with a state for each parameter, such as SGD or AdamW"
            )
    known = set(gate_parameters(model))  # which end with the pruning, if they are in none
    for optimizer in optimizers:
        known.update(parameter for group in optimizer.param_groups for parameter in group["params"])
    for name, parameter in Surgeon(model).gated_parameters():
        if parameter.requires_grad and parameter not in known:
            raise ValueError(
                f"{name!r} loses entries when channels go, and what is left of it would no longer be trained: it is in "
                f"no optimizer given ({', '.join(type(optimizer).__name__ for optimizer in optimizers)}); expected all "
                "optimizers of the network, as a list, and requires_grad_(False) for what does not train"
            )
        for optimizer in optimizers:
            _refuse_uncuttable(optimizer, parameter, name)


def _refuse_wrapper(optimizer: Optimizer) -> None:
    """Refuse an optimizer that steps by another one, whose own state or groups would keep what is removed.

    One that shows the other's state and groups as its own, as Accelerate's, may be given.

    Raises:
        TypeError: It does.
    """
    for name, inner in vars(optimizer).items():
        if not isinstance(inner, Optimizer):
            continue
        if inner.state is not optimizer.state or inner.param_groups is not optimizer.param_groups:
            kind = type(optimizer).__name__
            raise TypeError(
                f"{kind} is around another optimizer ({type(inner).__name__}, its {name!r}), which would not follow "
                f"the removal of units; expected that one, or one that trains the network without a {kind}"
            )


def _refuse_uncuttable(optimizer: Optimizer, parameter: nn.Parameter, path: str) -> None:
    """Refuse an optimizer that keeps what cannot be cut for a parameter.

    Raises:
        TypeError: It does.
    """
    for name, value in optimizer.state.get(parameter, {}).items():
        if not _has_shape(value, parameter) and not _is_single(value):
            kept = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"as a {type(value).__name__}"
            raise TypeError(
                f"{type(optimizer).__name__} keeps {name!r} {kept} for {path!r} of shape {tuple(parameter.shape)}, "
                "which cannot follow the removal of channels; expected an optimizer whose state has the parameters' "
                "shapes, such as SGD or AdamW"
            )


def _has_shape(value: object, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _is_single(value: object) -> bool:
    """Whether a value of an optimizer's state is one for the whole parameter, such as a number of steps."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.dim() <= 1
    return value is None or isinstance(value, int | float | str)


def _follow(
    optimizer: Optimizer, parameter: nn.Parameter, replacements: dict[nn.Parameter, Replacement]
) -> nn.Parameter:
    """The parameter that stands in a parameter's place after all replacements, with the state cut to fit it."""
    while parameter in replacements:
        replacement = replacements[parameter]
        state = optimizer.state.pop(parameter, None)
        if state is not None:
            for name, value in state.items():
                if _has_shape(value, parameter):
                    state[name] = _select(value, replacement.dim, replacement.index)
            optimizer.state[replacement.parameter] = state
        parameter = replacement.parameter
    return parameter
