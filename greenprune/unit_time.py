"""What each block takes of a training step on this device, measured: the cost that ``budget.unit: time`` counts in."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from greenprune.models import ResidualBlock, residual_blocks

_WARM_UP, _TURNS = 2, 15
_WHOLE, _REST = "whole", "rest of "


@dataclass(frozen=True)
class UnitTime:
    """Seconds of the forward and backward pass of one batch, the least of several turns: what disturbs only adds.

    Attributes:
        whole: The whole network.
        blocks: What goes with each block, by its name: blocks of the same shape take the same.
    """

    whole: float
    blocks: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as events and checkpoints hold them."""
        return asdict(self)


Autocast = Callable[[], AbstractContextManager[Any]]


def measure_unit_time(
    model: nn.Module, example: Tensor, *, autocast: Autocast = nullcontext, channels_last: bool = False
) -> UnitTime:
    """Time a network and each of its blocks, forward and backward, on the device of an example.

    A block is timed by itself, on activations of the shape that it sees; what stays when it is removed (a shortcut that
    changes the shape) is taken off. Turns go round over all that is timed, so that each has a chance of a quiet moment,
    and the least counts. On a CPU it is processor time, which other work on the same cores changes little where seconds
    on the clock change by threefold (docs/log.md). The network and the random state stay as they are.

    Args:
        model: The dense network; its gates, if it has any, are left out.
        example: A batch of its input as it is trained on, in size and on the device.
        autocast: Context of the run's precision.
        channels_last: Whether weights and images are laid out so.
    """
    network = copy.deepcopy(model).to(example.device).train()
    if channels_last:
        network.to(memory_format=torch.channels_last)
        example = example.contiguous(memory_format=torch.channels_last)
    blocks = residual_blocks(network)
    for block in blocks.values():
        block.gate = None
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        inputs = _inputs_of(blocks, network, example, autocast)
        kinds = {name: _kind(block, inputs[name]) for name, block in blocks.items()}
        first = {kind: name for name, kind in reversed(kinds.items())}
        passes = {_WHOLE: _pass_of(network, example, autocast)}
        for kind, name in first.items():
            x = inputs[name].requires_grad_()
            passes[kind] = _pass_of(blocks[name], x, autocast)
            rest = blocks[name].without_branch()
            if not isinstance(rest, nn.Identity):
                passes[_REST + kind] = _pass_of(rest, x, autocast)
        seconds = _least(passes, example.device)
    each = {kind: max(0.0, seconds[kind] - seconds.get(_REST + kind, 0.0)) for kind in first}
    of_blocks = {name: each[kind] for name, kind in kinds.items()}
    # Alone in the cache, blocks may be faster than in the network, or slower than all of it together.
    return UnitTime(max(seconds[_WHOLE], sum(of_blocks.values())), of_blocks)


def _kind(block: ResidualBlock, x: Tensor) -> str:
    """Text that is equal for blocks that compute alike."""
    return f"{block} of {tuple(x.shape)}"


def _inputs_of(
    blocks: dict[str, ResidualBlock],
    network: nn.Module,
    example: Tensor,
    autocast: Autocast,
) -> dict[str, Tensor]:
    """Activations of the shape, precision and memory format that each block sees."""
    seen: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.update({name: torch.randn_like(inputs[0])})

    hooks = [block.register_forward_pre_hook(remember(name)) for name, block in blocks.items()]
    with torch.no_grad(), autocast():
        network(example)
    for hook in hooks:
        hook.remove()
    return seen


def _pass_of(module: nn.Module, x: Tensor, autocast: Autocast) -> Callable[[], None]:
    """Forward and backward of a module, back into its input if that has a gradient."""

    def once() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        with autocast():
            out = module(x.clone() if x.requires_grad else x)  # layers in place would change a leaf
        out.backward(torch.ones_like(out))

    return once


def _least(passes: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    least = dict.fromkeys(passes, math.inf)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for turn in range(_WARM_UP + _TURNS):
        for name, once in passes.items():
            _wait_for(device)
            started = clock()
            once()
            _wait_for(device)
            if turn >= _WARM_UP:
                least[name] = min(least[name], clock() - started)
    return least


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
