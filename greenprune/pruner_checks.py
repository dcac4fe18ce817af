"""What a Pruner is given, looked at before a network is touched: settings, an example, optimizers, a state."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from torch import Tensor, nn
from torch.optim import Optimizer

from greenprune.config import (
    BudgetConfig,
    ConfigError,
    GateConfig,
    RemovalConfig,
    SurgeryConfig,
    check_budget_unit,
    check_deadline,
)
from greenprune.gating import gate_parameters, split_unit
from greenprune.surgery import Operation, Structure, StructureMismatch


def check_settings(total_steps: object, gate: object, budget: object, removal: object, surgery: object) -> None:
    """Refuse what is not a setting, before the network is touched.

    Raises:
        ConfigError: One is of another kind, nothing is to be gated, there are no steps, or none between warm-up and
            deadline, or the budget's unit cannot be counted for what is gated.
    """
    kinds = {"gate": GateConfig, "budget": BudgetConfig, "removal": RemovalConfig, "surgery": SurgeryConfig}
    for (name, kind), given in zip(kinds.items(), (gate, budget, removal, surgery), strict=True):
        if not isinstance(given, kind | None):
            raise ConfigError(f"{name}: {given!r} is not valid; expected a greenprune.{kind.__name__}")
    if isinstance(gate, GateConfig) and not gate.enabled:
        raise ConfigError("gate.enabled: False is not valid for a Pruner; expected True, or a loop without one")
    check_count("total_steps", total_steps)
    gate = gate if isinstance(gate, GateConfig) else GateConfig()
    check_deadline(removal if isinstance(removal, RemovalConfig) else RemovalConfig(), gate)
    check_budget_unit(budget if isinstance(budget, BudgetConfig) else BudgetConfig(), gate)


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of something.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ConfigError(f"{name}: {value!r} is not valid; expected a whole number of at least 1")


def check_gates(structure: Structure, theirs: list[str], mine: list[str]) -> None:
    """Check that what a structure leaves of this network's gates are those that a state is of.

    Args:
        structure: The state's.
        theirs: Names of the units whose gates the state is of.
        mine: Those of a fresh network.

    Raises:
        StructureMismatch: They are others.
    """
    expected = "expected the state of a Pruner of the same network and gate.units"
    owners = {split_unit(unit)[0] for unit in mine}
    known = owners | {owner.rpartition(":")[0] for owner in owners}
    for operation in structure.operations:
        if operation.unit not in known:
            raise StructureMismatch(f"the network has no unit {operation.unit!r} with a gate; {expected}")
    left = [unit for unit in mine if not any(_decides(operation, unit) for operation in structure.operations)]
    if theirs != left:
        odd = next((unit for unit in [*theirs, *left] if (unit in theirs) != (unit in left)), "their order")
        raise StructureMismatch(
            f"the state is of {len(theirs)} units with gates where this network has {len(left)} left after the same "
            f"removals, and differs in {odd}; {expected}"
        )


def _decides(operation: Operation, unit: str) -> bool:
    """Whether a unit has no gate any more after an operation."""
    owner, index = split_unit(unit)
    if operation.channels is not None:
        return owner == operation.unit and index in operation.channels
    return owner == operation.unit or (operation.action == "remove" and owner.startswith(f"{operation.unit}:"))


def check_has_values(model: nn.Module, example: Tensor) -> None:
    """Refuse what has shapes alone: no block can be compared with its taken-apart form, and gates would not start open.

    Raises:
        ConfigError: The example is no tensor, is empty or not finite, or it or a parameter is on PyTorch's meta device.
    """
    if not isinstance(example, Tensor):
        raise ConfigError(
            f"example: a {type(example).__name__} is not valid; expected one tensor, a small batch of the network's "
            "input"
        )
    if example.is_meta:
        raise ConfigError("example: a tensor on the meta device is not valid; expected one with values")
    if not example.numel():
        raise ConfigError(f"example: a tensor of shape {list(example.shape)} is not valid; expected one with values")
    if not example.isfinite().all():
        raise ConfigError("example: a tensor with values that are not finite is not valid; expected a batch of images")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"model: {name!r} is on the meta device; expected a network with its values (to_empty, and what "
                "initialises or loads it, come before the Pruner)"
            )


def all_of(optimizer: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    """The optimizers.

    Raises:
        TypeError: One is none.
    """
    optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    for given in optimizers:
        if not hasattr(given, "param_groups"):
            raise TypeError(f"optimizer: a {type(given).__name__} is not valid; expected a torch optimizer, unwrapped")
    return optimizers


def check_holds_gates(optimizers: Sequence[Optimizer], model: nn.Module) -> None:
    """Refuse optimizers that would leave the gates as they are.

    Raises:
        ValueError: A gate is in none of them.
    """
    held = {parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    if not held.issuperset(gate_parameters(model)):
        raise ValueError(
            "the gates are not in the optimizer; expected it to be made after the Pruner, of pruner.parameter_groups()"
        )
