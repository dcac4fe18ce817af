"""Which block classes can be gated, and how each is taken apart into shortcut, branch and activation.

A network is converted in place: each block of a known class is exchanged for the same modules in the form of a
:class:`ResidualBlock` (or a chain of them), which computes the same. The parameters stay the same objects.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor, nn

from greenprune.models import torchvision_splits
from greenprune.models.residual import PlainBlock, ResidualBlock, follow_mode, mark_left_alone, with_hooks_of
from greenprune.models.sameness import (
    BlockError,
    Call,
    check_alike,
    check_same,
    correct_activated,
    record_inputs,
    refuse_lost_hooks,
)
from greenprune.models.splitting import Split
from greenprune.models.tracing import find_residuals

Block = TypeVar("Block", bound=nn.Module)
_SPLITS: dict[type[nn.Module], Split] = dict(torchvision_splits.SPLITS)

# Libraries that need not be there, by the names of their packages; the module that takes their blocks apart is imported
# once a network comes from there.
_OPTIONAL = {"timm": "greenprune.models.timm_splits", "transformers": "greenprune.models.transformers_splits"}

# What gating changes of a block, besides its modules; a gate that is not there is no module.
_GATING = ("gate", "every", "slots", "channels_left")


def register_block(kind: type[Block]) -> Callable[[Callable[[Block], nn.Module]], Callable[[Block], nn.Module]]:
    """Teach greenprune a block class: decorate the function that takes a block of it apart.

    The function gets a block and returns a :class:`ResidualBlock` built of the block's own modules, or an
    :class:`torch.nn.Sequential` of several, one for each shortcut. Channels inside a branch can be gated if the branch
    is an :class:`torch.nn.Sequential`. What it returns is compared with the block on a real input before it is used.

    Example::

        @register_block(MyBlock)
        def split(block: MyBlock) -> nn.Module:
            branch = nn.Sequential(block.conv1, block.norm1, nn.ReLU(), block.conv2, block.norm2)
            return ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=True)
    """

    def register(split: Callable[[Block], nn.Module]) -> Callable[[Block], nn.Module]:
        _SPLITS[kind] = split
        return split

    return register


def convert_blocks(model: nn.Module, example: Tensor | None = None) -> list[str]:
    """Exchange every block of a known class for its taken-apart form, in place.

    Args:
        model: An unwrapped network on any device.
        example: An input of the network, on its device. With it, every converted block is run beside the original, and
            the calls of every block are counted.

    Returns:
        Paths of the blocks, those that were there in this form already included, in the order of the network.

    Raises:
        BlockError: There is no block to gate, or one cannot be taken apart, or is used in two places or called twice.
    """
    known = knows_blocks(model)
    if type(model) in _SPLITS or isinstance(model, ResidualBlock | PlainBlock):
        raise BlockError(
            f"the network is itself a block ({type(model).__name__}); put it into a torch.nn.Sequential first"
        )
    if known:
        found = _outermost({name: module for name, module in model.named_modules() if type(module) in _SPLITS})
        calls, odd = ({}, {}) if example is None else record_inputs(model, found, example)
        for error in odd.values():
            raise error
        for name, block in found.items():
            by = f"the function registered for {type(block).__name__}"
            _exchange(model, name, block, _take_apart(name, block), calls.get(name), by)
    else:
        _exchange_what_is_found(model, example)
    blocks = [name for name, module in model.named_modules() if isinstance(module, ResidualBlock | PlainBlock)]
    if not any(isinstance(model.get_submodule(name), ResidualBlock) for name in blocks):
        raise BlockError(_nothing_to_gate(model))
    for name in blocks:
        inner = next((other for other in blocks if other.startswith(f"{name}.")), None)
        if inner is not None:
            raise BlockError(f"{inner} lies inside the block {name}; expected a chain of blocks, not one in another")
    _refuse_shared(model)
    return blocks


@contextlib.contextmanager
def put_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Within, a network is taken apart and gated; if that fails, however, its modules are again what they were.

    Args:
        model: The unwrapped network.
    """
    children = [(module, dict(module._modules.items())) for module in model.modules()]
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock | PlainBlock)]
    gating = [{name: copy.copy(vars(block)[name]) for name in _GATING if name in vars(block)} for block in blocks]
    try:
        yield
    except BaseException:
        for module, before in children:
            if dict(module._modules.items()) != before:
                module._modules.clear()
                module._modules.update(before)
        for block, kept in zip(blocks, gating, strict=True):
            vars(block).update(kept)
        raise


def knows_blocks(model: nn.Module) -> bool:
    """Whether a network has blocks of a known class, or such as are taken apart; then no others are looked for."""
    _load_splits(model)
    return any(type(module) in _SPLITS or isinstance(module, ResidualBlock | PlainBlock) for module in model.modules())


def _exchange_what_is_found(model: nn.Module, example: Tensor | None) -> None:
    """Take blocks apart that are found by what their forward does.

    Nobody has promised that they can be: what does not stand a check stays as it is, and is told of among the notes.
    """
    found = {name: (model.get_submodule(name), split) for name, split in find_residuals(model).items()}
    calls: dict[str, Call] = {}
    odd: dict[str, BlockError] = {}
    if found and example is not None:
        calls, odd = record_inputs(model, {name: block for name, (block, _) in found.items()}, example)
    for name, (block, split) in found.items():
        try:
            if name in odd:
                raise odd[name]
            if example is not None and name not in calls:
                raise BlockError(f"{name}: the network does not call it on the example")
            if name in calls:
                check_alike(name, block, split, calls[name])
            _exchange(model, name, block, split, calls.get(name), "what its forward does")
        except Exception as error:  # noqa: BLE001 - a check runs the block's own code, and copies of it
            mark_left_alone(block, " ".join(str(error).split()).removeprefix(f"{name}: ") or type(error).__name__)


def _exchange(model: nn.Module, name: str, block: nn.Module, split: nn.Module, call: Call | None, by: str) -> None:
    """Put a block's taken-apart form in its place, if it is the same where it is called.

    Raises:
        BlockError: It is not, or somebody looks at modules that would be gone.
    """
    follow_mode(split, block)
    if call is not None:
        check_same(name, block, split, call, by)
        correct_activated(split, call.x)
    refuse_lost_hooks(name, block, split)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, with_hooks_of(split, block))


def _outermost(blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks that do not lie inside another one of them."""
    found: dict[str, nn.Module] = {}
    for name, block in blocks.items():  # an outer one comes first
        if not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = block
    return found


def _nothing_to_gate(model: nn.Module) -> str:
    own = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.nn.")}
    made_of = ", ".join(sorted(kind.__name__ for kind in own - {type(model)})) or "torch.nn's layers alone"
    return (
        f"{type(model).__name__} has no residual block that greenprune knows or can follow; it is made of {made_of}. "
        "Expected a class registered with greenprune.register_block (docs/networks.md)"
    )


def _take_apart(name: str, block: nn.Module) -> nn.Module:
    try:
        split = _SPLITS[type(block)](block)
    except AttributeError as error:
        raise BlockError(f"{name}: a {type(block).__name__} cannot be taken apart: {error}") from None
    inside = split.modules() if isinstance(split, nn.Module) else ()
    if not any(isinstance(module, ResidualBlock | PlainBlock) for module in inside):
        raise BlockError(
            f"{name}: the function registered for {type(block).__name__} gave a {type(split).__name__} without a "
            "ResidualBlock; expected a ResidualBlock or a torch.nn.Sequential of them"
        )
    return split


def _refuse_shared(model: nn.Module) -> None:
    """Refuse a block, or a tensor of a branch, that the network uses in a second place.

    Raises:
        BlockError: There is one; the message names both places.
    """
    owners: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ResidualBlock | PlainBlock):
            for path, tensor in _tensors(module.branch, f"{name}.branch"):
                owners.setdefault(id(tensor), path)
    for path, tensor in _tensors(model):
        first = owners.get(id(tensor), path)
        if first != path:
            raise BlockError(
                f"{first} is also {path}: a unit that is used in two places cannot be removed; expected blocks that "
                "share nothing with the rest of the network"
            )


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every path that leads to them."""
    yield from module.named_parameters(prefix, remove_duplicate=False)
    yield from module.named_buffers(prefix, remove_duplicate=False)


def _load_splits(model: nn.Module) -> None:
    """Learn the blocks of the optional libraries that a network's modules come from; what is registered stays."""
    libraries = {type(module).__module__.partition(".")[0] for module in model.modules()}
    for library, splits in _OPTIONAL.items():
        if library in libraries:
            for kind, split in importlib.import_module(splits).SPLITS.items():
                _SPLITS.setdefault(kind, split)
