"""The structure: what was done to a dense network, as text that can be replayed on a fresh one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from greenprune.gating import Verdict
from greenprune.surgery.removal import Surgeon

FORMAT = 2
_READABLE = (1, 2)  # 1 knew blocks only
Action = Literal["remove", "freeze"]
Reason = Literal["off", "on", "settled", "given"]


class StructureMismatch(ValueError):
    """A structure that does not fit the network, is malformed, or differs between ranks."""


@dataclass(frozen=True)
class Operation:
    """One change of the network.

    Attributes:
        action: remove units, or freeze them (their gate goes, they stay).
        unit: Name of a block, which is its module path, or of a set of channels, which is ``<block>:<label>``.
        step: Steps done when it happened.
        epoch: The same in epochs, a fraction within one.
        reason: off or on for all inputs of the window(s), settled against the budget, or given before training.
        channels: Which units of a set of channels are removed, by their indices in the dense network; else None.
    """

    action: Action
    unit: str
    step: int
    epoch: float
    reason: Reason
    channels: tuple[int, ...] | None = None

    @classmethod
    def of(cls, verdict: Verdict, step: int, epoch: float) -> Operation:
        """What carries out a verdict."""
        return cls(verdict.action, verdict.unit, step, epoch, verdict.reason, verdict.channels)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what does not apply."""
        values = asdict(self)
        if self.channels is None:
            del values["channels"]
        else:
            values["channels"] = list(self.channels)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Operation:
        """Read what :meth:`to_dict` wrote.

        Raises:
            StructureMismatch: The values are not of their kinds.
        """
        try:
            channels = values.get("channels")
            operation = cls(**{**values, "channels": None if channels is None else tuple(channels)})
        except (AttributeError, TypeError) as error:
            raise StructureMismatch(f"malformed structure: {error}") from None
        _check(operation)
        return operation


@dataclass
class Structure:
    """All changes of one network, in their order."""

    operations: list[Operation] = field(default_factory=list)

    def given(self) -> Structure:
        """What was removed before training began, which the run did not find itself."""
        return Structure([operation for operation in self.operations if operation.reason == "given"])

    def removed(self) -> list[Operation]:
        """The removals, in their order."""
        return [operation for operation in self.operations if operation.action == "remove"]

    def removed_blocks(self) -> set[str]:
        """The blocks that are gone."""
        return {operation.unit for operation in self.removed() if operation.channels is None}

    def removed_channels(self) -> dict[str, int]:
        """How many units each set of channels has lost, by its name; also of blocks that are gone since."""
        lost: dict[str, int] = {}
        for operation in self.removed():
            if operation.channels is not None:
                lost[operation.unit] = lost.get(operation.unit, 0) + len(operation.channels)
        return lost

    def ungated(self) -> set[str]:
        """Blocks and sets of channels whose gates are gone."""
        return {operation.unit for operation in self.operations if operation.channels is None}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as structure.json holds them."""
        return {"format": FORMAT, "operations": [operation.to_dict() for operation in self.operations]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Structure:
        """Read what :meth:`to_dict` wrote.

        Raises:
            StructureMismatch: The values are not a structure of this format.
        """
        if not isinstance(values, dict) or values.get("format") not in _READABLE:
            raise StructureMismatch(f"not a structure of format {' or '.join(map(str, _READABLE))}")
        if not isinstance(values.get("operations"), list):
            raise StructureMismatch("malformed structure: no list of operations")
        return cls([Operation.from_dict(item) for item in values["operations"]])

    def checksum(self) -> str:
        """A digest that is equal on two ranks exactly if their structures are."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _check(operation: Operation) -> None:
    """Refuse an operation whose values are not of their kinds.

    Raises:
        StructureMismatch: One is not; the message shows it.
    """
    well_formed = (
        operation.action in get_args(Action)
        and operation.reason in get_args(Reason)
        and isinstance(operation.unit, str)
        and isinstance(operation.step, int)
        and isinstance(operation.epoch, int | float)
        and (operation.channels is None or _are_channels(operation))
    )
    if not well_formed:
        raise StructureMismatch(f"malformed structure: {operation}")


def _are_channels(operation: Operation) -> bool:
    """Whether an operation names distinct channels of a set, to be removed."""
    channels = operation.channels or ()
    whole_numbers = all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in channels)
    named = operation.action == "remove" and ":" in operation.unit
    return named and bool(channels) and whole_numbers and len(set(channels)) == len(channels)


def carry_out(operations: Iterable[Operation], model: nn.Module) -> Surgeon:
    """Carry operations out on an unwrapped network, in place.

    Args:
        operations: What to do, in this order.
        model: The unwrapped network as the operations before these left it.

    Returns:
        Who operated: :func:`update_optimizer` needs it to make an optimizer follow.

    Raises:
        KeyError: The network has no such unit, or its blocks are not taken apart.
        TypeError: The network is wrapped.
    """
    surgeon = Surgeon(model)
    for operation in operations:
        if operation.channels is not None:
            surgeon.remove_channels(operation.unit, operation.channels)
        elif operation.action == "remove":
            surgeon.remove_block(operation.unit)
        elif ":" in operation.unit:
            surgeon.freeze_channels(operation.unit)
        else:
            surgeon.freeze_block(operation.unit)
    return surgeon


def replay(structure: Structure, model: nn.Module) -> None:
    """Carry a structure out on a fresh dense network, in place.

    Args:
        structure: What to do.
        model: The unwrapped dense network, its blocks taken apart, with gates (to go on training) or without (to use
            it).

    Raises:
        StructureMismatch: The network has no such unit, or its blocks are not taken apart.
    """
    try:
        carry_out(structure.operations, model)
    except KeyError as error:
        raise StructureMismatch(error.args[0]) from None
