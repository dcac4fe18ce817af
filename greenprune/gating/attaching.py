"""Putting gates on a network: where they stand, what they look at, and how wide they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from greenprune.config import GateConfig
from greenprune.gating.gates import BlockGate, ChannelGate, find_gates
from greenprune.models import (
    BlockError,
    ChannelSet,
    ChannelSlot,
    PlainBlock,
    ResidualBlock,
    find_channels,
    pass_through,
    residual_blocks,
)


def attach_gates(model: nn.Module, config: GateConfig, example: Tensor | None = None) -> list[str]:
    """Put gates on an unwrapped dense network, in place: on its residual branches, on their channels, or on both.

    Args:
        model: The network, in blocks (:func:`greenprune.models.convert_blocks`).
        config: What is gated, the kind of the gates and their openness at the start.
        example: An input of the network, on its device. With it, gates of blocks are as wide as what their block is
            given; else as what its first layer takes.

    Returns:
        The names of the gates.

    Raises:
        BlockError: There is nothing of the kind that is to be gated, or the network has gates already.
    """
    if find_gates(model):
        raise BlockError("the network has gates already; expected a fresh one, or one whose pruning has been finalized")
    for block in model.modules():
        if isinstance(block, ResidualBlock | PlainBlock):
            block.channels_left.clear()  # what an earlier pruning has left is all there is now
    conditional = config.kind == "conditional"
    if "block" in config.units:
        blocks = residual_blocks(model)
        seen = {} if example is None else _look_at(model, blocks, example)
        for name, block in blocks.items():
            channels, dim = _input_channels(name, block, seen.get(name, _Seen()))
            gate = BlockGate(channels if conditional else None, config.openness, dim)
            block.gate = gate.to(_device_of(block))
            block.every = gate.every = config.every
    if "channel" in config.units:
        found = find_channels(model)
        if not found.sets:
            wanted = "expected one in which two convolutions or linear layers follow each other, or an attention"
            why = "".join(f"; {note}" for note in found.notes or [wanted])
            raise BlockError(f"gate.units: 'channel' is not valid for this network: no branch has channels inside{why}")
        for channel_set in found.sets.values():
            if channel_set.units == 1 and not channel_set.removable:
                continue  # the last unit of a block that has to stay has to stay
            _gate_channels(model, channel_set, config)
    return list(find_gates(model))


def _gate_channels(model: nn.Module, channel_set: ChannelSet, config: GateConfig) -> None:
    inner, dim = model.get_submodule(channel_set.slot), channel_set.channel_dim
    gate = ChannelGate(channel_set.units, config.openness, dim, conditional=config.kind == "conditional")
    block = model.get_submodule(channel_set.block)
    gate.to(_device_of(block))
    slot = ChannelSlot(inner, gate, dim, channel_set.label)
    slot.every = gate.every = config.every
    slot.training = gate.training = block.training  # what is inside, a frozen norm for instance, keeps its mode
    parent, _, child = channel_set.slot.rpartition(".")
    setattr(model.get_submodule(parent), child, slot)
    assert isinstance(block, ResidualBlock | PlainBlock)
    block.slots.append(slot)


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@dataclass
class _Seen:
    """What was seen of a block as an example passed: the shape of its input, and the layer that it called first."""

    shape: torch.Size | None = None
    layer: _ConvNd | nn.Linear | None = None

    def given(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """As a hook of its branch."""
        self.shape = inputs[0].shape

    def called(self, layer: _ConvNd | nn.Linear, _: object) -> None:
        """As a hook of its layers."""
        self.layer = self.layer or layer


def _look_at(model: nn.Module, blocks: dict[str, ResidualBlock], example: Tensor) -> dict[str, _Seen]:
    """What the blocks of a network do with an example."""
    seen = {name: _Seen() for name in blocks}
    handles = []
    for name, block in blocks.items():
        handles.append(block.branch.register_forward_pre_hook(seen[name].given))
        handles += [layer.register_forward_pre_hook(seen[name].called) for layer in _layers(block.branch)]
    try:
        pass_through(model, example)
    except AttributeError as error:
        if not any(kind.__name__ in str(error) for kind in (ResidualBlock, PlainBlock)):
            raise
        raise BlockError(
            f"{type(model).__name__}: its forward reads a part of a block that is taken apart ({error}); expected one "
            "that calls its blocks and nothing in them"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _layers(branch: nn.Module) -> list[_ConvNd | nn.Linear]:
    return [module for module in branch.modules() if isinstance(module, _ConvNd | nn.Linear)]


def _input_channels(name: str, block: ResidualBlock, seen: _Seen) -> tuple[int, int]:
    """Channels of a block's input and their dimension: those of its first layer, as far as they are known.

    Raises:
        BlockError: It has no layer.
    """
    first = seen.layer or next(iter(_layers(block.branch)), None)
    if first is None:
        raise BlockError(f"{name}: a branch without a convolution or linear layer cannot be gated; expected one")
    width, dim = (first.in_channels, 1) if isinstance(first, _ConvNd) else (first.in_features, -1)
    if seen.shape is None:
        return width, dim
    if seen.shape[dim] != width:  # turned round before the layer, or not the input's channels at all
        dim = next((other for other in range(1, len(seen.shape)) if seen.shape[other] == width), dim)
    return seen.shape[dim], dim
