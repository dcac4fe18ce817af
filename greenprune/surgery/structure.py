"""The structure: what was done to a dense network, as text that can be replayed on a fresh one."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from greenprune.surgery.removal import freeze_unit, remove_unit

FORMAT = 1
Action = Literal["remove", "freeze"]
Reason = Literal["off", "on", "settled"]


class StructureMismatch(ValueError):
    """A structure that does not fit the network, is malformed, or differs between ranks."""


@dataclass(frozen=True)
class Operation:
    """One change of the network.

    Attributes:
        action: remove a unit, or freeze it (its gate goes, it stays).
        unit: Name of the unit: the module path of its block.
        step: Steps done when it happened.
        epoch: The same in epochs, a fraction within one.
        reason: off or on for all inputs of the window(s), or settled against the budget.
    """

    action: Action
    unit: str
    step: int
    epoch: float
    reason: Reason


@dataclass
class Structure:
    """All changes of one network, in their order."""

    operations: list[Operation] = field(default_factory=list)

    def removed(self) -> list[Operation]:
        """The removals, in their order."""
        return [operation for operation in self.operations if operation.action == "remove"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as structure.json holds them."""
        return {"format": FORMAT, "operations": [asdict(operation) for operation in self.operations]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Structure:
        """Read what :meth:`to_dict` wrote.

        Raises:
            StructureMismatch: The values are not a structure of this format.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise StructureMismatch(f"not a structure of format {FORMAT}")
        try:
            operations = [Operation(**item) for item in values["operations"]]
        except (KeyError, TypeError) as error:
            raise StructureMismatch(f"malformed structure: {error}") from None
        for operation in operations:
            _check(operation)
        return cls(operations)

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
    )
    if not well_formed:
        raise StructureMismatch(f"malformed structure: {operation}")


def replay(structure: Structure, model: nn.Module) -> None:
    """Carry a structure out on a fresh dense network, in place.

    Args:
        structure: What to do.
        model: The unwrapped dense network, with gates (to go on training) or without (to use it).

    Raises:
        StructureMismatch: The network has no such unit.
    """
    for operation in structure.operations:
        try:
            if operation.action == "remove":
                remove_unit(model, operation.unit)
            else:
                freeze_unit(model, operation.unit)
        except KeyError as error:
            raise StructureMismatch(error.args[0]) from None
