"""Physical removal of units from an unwrapped network, and of what the optimizer kept for them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from greenprune.models import ResidualBlock

_WRAPPERS = (
    "DeepSpeedEngine",
    "FullyShardedDataParallel",
    "OptimizedModule",
)  # by name: optional or private types


def refuse_wrapped(model: nn.Module) -> None:
    """Check that a network is not wrapped: a wrapper holds buckets, hooks or graphs of what would be removed.

    Raises:
        TypeError: The network is wrapped for data parallelism or compiled.
    """
    if isinstance(model, DistributedDataParallel | DataParallel) or type(model).__name__ in _WRAPPERS:
        raise TypeError(f"surgery needs the unwrapped network, not {type(model).__name__}")


def _unit(model: nn.Module, name: str) -> ResidualBlock:
    refuse_wrapped(model)
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, ResidualBlock):
        raise KeyError(f"the network has no unit {name!r}")
    return module


def remove_unit(model: nn.Module, name: str) -> None:
    """Take a block's branch and gate out of the network; its shortcut stays in its place.

    Exact: the network computes what it computed with the unit's decision at 0 for every sample.

    Args:
        model: The unwrapped network; changed in place.
        name: Module path of the block.

    Raises:
        KeyError: No unit has this name (any more).
        TypeError: The network is wrapped.
    """
    block = _unit(model, name)
    rest = block.without_branch()
    rest.train(block.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, rest)


def freeze_unit(model: nn.Module, name: str) -> None:
    """Take a unit's gate off and keep the unit: it is on for good. Nothing happens if it has no gate.

    Args:
        model: The unwrapped network; changed in place.
        name: Module path of the block.

    Raises:
        KeyError: No unit has this name.
        TypeError: The network is wrapped.
    """
    _unit(model, name).gate = None


def drop_optimizer_state(optimizer: Optimizer, model: nn.Module) -> None:
    """Make the optimizer forget every parameter that is no longer in the network, in place.

    The optimizer stays the same object and the survivors' state is not touched, so learning-rate schedules and
    wrappers that hold it go on.

    Args:
        optimizer: A torch optimizer, unwrapped.
        model: The unwrapped network after surgery.
    """
    alive = set(model.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in alive:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if parameter in alive]
