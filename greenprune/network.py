"""The network of a run, gated and counted: what it and each of its units costs, in any structure."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor, nn

from greenprune.config import BudgetConfig, Config, ConfigError, GateConfig, SurgeryConfig
from greenprune.flops import Cost, count_costs, subtract
from greenprune.gating import (
    CostTerm,
    Gate,
    UnitCosts,
    attach_gates,
    channel_unit,
    check_decided,
    find_gates,
    list_places,
    split_unit,
)
from greenprune.models import (
    BlockError,
    ChannelSet,
    PlainBlock,
    build_model,
    find_channels,
    residual_blocks,
    why_left_alone,
)
from greenprune.surgery import Structure, StructureMismatch, given_structure, replay
from greenprune.unit_cost import MEASURED, UnitCost

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """A part of a branch that shrinks in proportion to what is left of each of some sets of channels."""

    cost: Cost
    sets: tuple[str, ...]


@dataclass(frozen=True)
class UnitTable:
    """What the network and each of its units cost, counted once; any later structure follows by arithmetic.

    Attributes:
        dense: The network without gates.
        whole: The network with the gates it started with.
        branches: What goes with the removal of a block, by its name, without gates.
        gates: What goes with a gate, by the name of its block or of its set of channels.
        parts: By block, the parts of it that shrink when gated channels are removed.
        channels: Number of units of each set of channels that is gated, or that was counted all the same.
        widths: Channels that a unit of each set has where the set ends.
    """

    dense: Cost
    whole: Cost
    branches: dict[str, Cost]
    gates: dict[str, Cost]
    parts: dict[str, list[Part]] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        image_shape: tuple[int, ...],
        also: Collection[str] = (),
        dtype: torch.dtype = torch.float32,
    ) -> UnitTable:
        """Count the costs of a network from which nothing has been removed.

        Args:
            model: The network, with the gates it starts with.
            image_shape: Shape of one image [C, H, W].
            also: Sets of channels without gates of which something may be gone too.
            dtype: Of the images.

        Raises:
            BlockError: A pass leaves gates out, or they decide for other numbers of inputs.
        """
        blocks = residual_blocks(model)
        gated = find_gates(model)
        sets = {name: found for name, found in find_channels(model).sets.items() if name in gated or name in also}
        paths = {module: name for name, module in model.named_modules()}
        gate_paths = {name: paths[gate] for name, gate in gated.items()}
        holders = {path for found in sets.values() for path, _ in found.sizes}
        inside = [f"{path}.{child}" for path in holders for child, _ in model.get_submodule(path).named_children()]
        names = ["", *(f"{name}.branch" for name in blocks), *gate_paths.values(), *holders, *inside]
        with _inputs_of(gated) as inputs:
            counts = count_costs(model, image_shape, names, dtype)
        check_decided(inputs, list(gated))
        gates = {name: counts[path] for name, path in gate_paths.items()}
        branches = {
            name: subtract(
                counts[f"{name}.branch"], (gates[key] for key in gates if key in sets and sets[key].block == name)
            )
            for name in blocks
        }
        return cls(
            dense=subtract(counts[""], gates.values()),
            whole=counts[""],
            branches=branches,
            gates=gates,
            parts=_parts(model, sets, counts),
            channels={name: found.units for name, found in sets.items()},
            widths={name: found.width for name, found in sets.items()},
        )

    def cost_of(self, structure: Structure) -> Cost:
        """What the network costs in a structure."""
        gone_blocks, left = structure.removed_blocks(), self.channels_left(structure)
        ungated = structure.ungated()
        gone = [self.branches[name] for name in gone_blocks]
        for block, parts in self.parts.items():
            if block not in gone_blocks:
                gone += [subtract(part.cost, [self._shrunk(part, left)]) for part in parts]
        for name, cost in self.gates.items():
            if name in ungated or _block_of(name) in gone_blocks:
                gone.append(cost)
            elif name in self.channels:
                gone.append(subtract(cost, [self._shrunk(Part(cost, (name,)), left)]))
        return subtract(self.whole, gone)

    def channels_left(self, structure: Structure) -> dict[str, int]:
        """How many units each set of channels has in a structure; none if its block is gone."""
        gone, lost = structure.removed_blocks(), structure.removed_channels()
        return {
            name: 0 if _block_of(name) in gone else count - lost.get(name, 0) for name, count in self.channels.items()
        }

    def _shrunk(self, part: Part, left: dict[str, int]) -> Cost:
        now = math.prod(left[name] for name in part.sets)
        dense = math.prod(self.channels[name] for name in part.sets)
        cost = part.cost
        return Cost(cost.flops_forward * now // dense, cost.flops_train * now // dense, cost.params * now // dense)

    def rounding(self, round_to: int) -> dict[str, int]:
        """Of how many units the size of each set is a multiple for its channels to be one of ``round_to``."""
        return {name: round_to // math.gcd(round_to, width) for name, width in self.widths.items()}


@contextmanager
def _inputs_of(gates: Mapping[str, Gate]) -> Iterator[dict[str, int]]:
    """For how many inputs each gate has decided, by its name, within; also where it is the gate of a network's copy."""
    inputs: dict[str, int] = {}

    def look_at(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def count(_: nn.Module, __: object, decisions: Tensor) -> None:
            inputs[name] = len(decisions)

        return count

    handles = [gate.register_forward_hook(look_at(name)) for name, gate in gates.items()]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def round_to_on(config: SurgeryConfig, device: torch.device) -> int:
    """``surgery.round_to``, or what a device likes if it is null."""
    return config.round_to or (8 if device.type == "cuda" else 1)


def _block_of(gate: str) -> str:
    return gate.rpartition(":")[0] or gate


def _parts(model: nn.Module, sets: dict[str, ChannelSet], counts: dict[str, Cost]) -> dict[str, list[Part]]:
    """By block, what each layer that holds gated channels costs: its FLOPs by the sets it lies between, its tensors."""
    in_module: dict[str, list[str]] = {}
    in_tensor: dict[tuple[str, str], list[str]] = {}
    block_of: dict[str, str] = {}
    for name, found in sets.items():
        for path in dict.fromkeys(path for path, _ in found.sizes):
            in_module.setdefault(path, []).append(name)
            block_of[path] = found.block
        for piece in found.slices:
            in_tensor.setdefault((piece.module, piece.tensor), []).append(name)
            block_of[piece.module] = found.block
    parts: dict[str, list[Part]] = {}
    for path, names in in_module.items():
        children = [counts[f"{path}.{child}"] for child, _ in model.get_submodule(path).named_children()]
        own = subtract(counts[path], children)
        if own.flops_forward:
            flops = Cost(own.flops_forward, own.flops_train, 0)
            parts.setdefault(block_of[path], []).append(Part(flops, tuple(names)))
    for (path, tensor), names in in_tensor.items():
        value = getattr(model.get_submodule(path), tensor)
        if isinstance(value, nn.Parameter):
            parts.setdefault(block_of[path], []).append(Part(Cost(params=value.numel()), tuple(names)))
    return parts


def unit_costs(
    table: UnitTable,
    budget: BudgetConfig,
    measured: UnitCost | None = None,
    *,
    rounding: Mapping[str, int] | None = None,
) -> UnitCosts:
    """What each unit of a dense network costs in the budget's unit, as a share of the whole network.

    Args:
        table: What was counted.
        budget: The budget.
        measured: What was measured, for a budget in time or energy; until it is there, FLOPs stand in and no target is
            checked.
        rounding: For each set of channels, of what number of units its size is to be a multiple; 1 where not given.

    Raises:
        ConfigError: The network has gates, and the budget's target cannot be met.
    """
    if budget.unit == "blocks":
        costs = UnitCosts.of(dict.fromkeys(table.branches, 1), len(table.branches))
    elif measured is not None:
        costs = UnitCosts.of(measured.blocks, measured.whole)
    else:
        costs = _shares(table, attrgetter("params" if budget.unit == "params" else "flops_forward"))
    if table.gates and (budget.unit not in MEASURED or measured is not None):
        costs.check_target(budget.target, table.gates, rounding)
    return costs


def with_unit_cost(network: Network, measured: UnitCost, budget: BudgetConfig) -> Network:
    """The network with costs as they were measured.

    Raises:
        ConfigError: The budget's target cannot be met, or is met already by a structure that was given, or that lacks
            channels, whose cost is not measured.
    """
    if network.table.channels:
        raise ConfigError(
            f"budget.unit: {budget.unit!r} is not valid with channels gated or given; expected flops or params"
        )
    costs = unit_costs(network.table, budget, measured)
    _check_more_may_go(costs, network.table, network.given, budget)
    return replace(network, costs=costs, measured=measured)


def with_round_to(network: Network, round_to: int, budget: BudgetConfig) -> Network:
    """The network with channels that go in pieces which leave a multiple of so many.

    Raises:
        ConfigError: The budget's target cannot be met so.
    """
    if network.table.gates and budget.unit not in MEASURED:  # in which no channels are counted
        network.costs.check_target(budget.target, network.table.gates, network.table.rounding(round_to))
    return replace(network, round_to=round_to)


def _shares(table: UnitTable, measure: Callable[[Cost], int]) -> UnitCosts:
    whole = measure(table.dense)
    costs = UnitCosts.of({name: measure(cost) for name, cost in table.branches.items()}, whole)
    if not table.channels:
        return costs
    terms: list[CostTerm] = []
    fixed = costs.fixed
    for block, parts in table.parts.items():
        shrinking = [CostTerm(measure(part.cost) / whole, block, part.sets) for part in parts if measure(part.cost)]
        total = sum(term.share for term in shrinking)
        terms += shrinking
        if block in costs.units:
            terms.append(CostTerm(costs.units[block] - total, block))
        else:
            fixed -= total
    return UnitCosts(fixed, costs.units, dict(table.channels), tuple(terms))


def kept_cost(costs: UnitCosts, structure: Structure) -> float:
    """Share of the dense cost that a structure without gates keeps."""
    return costs.kept(units_present(costs, structure)) if structure.operations else 1.0


def units_present(costs: UnitCosts, structure: Structure) -> set[str]:
    """Names of the units that are there in a structure."""
    gone_blocks = structure.removed_blocks()
    gone = {
        channel_unit(operation.unit, index) for operation in structure.removed() for index in operation.channels or ()
    }
    return {unit for unit in costs.everything() - gone if _block_of(split_unit(unit)[0]) not in gone_blocks}


@dataclass(frozen=True)
class Network:
    """A network ready to be trained.

    Attributes:
        model: The dense network, with its gates if the run is gated.
        table: What its units cost.
        costs: The same in the budget's unit, as shares of the whole.
        given: What is removed from it before training.
        measured: What its blocks take of a step, if the budget counts in seconds or joules.
        round_to: Of how many channels what is left of a set is a multiple.
        notes: What the user should know of it, one line each.
    """

    model: nn.Module
    table: UnitTable
    costs: UnitCosts
    given: Structure = field(default_factory=Structure)
    measured: UnitCost | None = None
    round_to: int = 1
    notes: list[str] = field(default_factory=list)


class ImageShape(Protocol):
    """What a network has to know of its images; a data set tells it."""

    @property
    def classes(self) -> int:
        """Number of classes."""

    @property
    def channels(self) -> int:
        """Channels of an image."""

    @property
    def image_size(self) -> int:
        """Side of the square images in pixels."""


def prepare_network(config: Config, data: ImageShape, device: torch.device = CPU) -> Network:
    """Build the network for a data set, seeded, gate it, and count what it costs.

    Args:
        config: The run.
        data: The images.
        device: Where it is first trained: the default of surgery.round_to depends on it.

    Raises:
        ConfigError: There is no such network or structure, it cannot take the images, has nothing to gate, its budget
            cannot be met or is met already, or the structure is one of another network.
    """
    given = given_structure(config)
    torch.manual_seed(config.seed)
    model = build_model(config.model, classes=data.classes, channels=data.channels, image_size=data.image_size)
    notes = _gate(model, config) if config.gate.enabled else []
    try:
        shape = (data.channels, data.image_size, data.image_size)
        table = UnitTable.of(model, shape, also=given.removed_channels().keys())
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"model.name: {config.model.name!r} cannot take images of {data.image_size} x {data.image_size} pixels: "
            f"{reason}"
        ) from None
    _check_fits(given, model, config)
    round_to = round_to_on(config.surgery, device)
    costs = unit_costs(table, config.budget, rounding=table.rounding(round_to))
    if config.budget.unit not in MEASURED:
        _check_more_may_go(costs, table, given, config.budget)
    return Network(model, table, costs, given, round_to=round_to, notes=notes)


def _check_fits(given: Structure, model: nn.Module, config: Config) -> None:
    if not given.operations:
        return
    try:
        replay(given, copy.deepcopy(model))
    except StructureMismatch as error:
        raise ConfigError(
            f"model.structure: does not fit {config.model.name} with shortcut {config.model.shortcut} ({error}); "
            "expected a structure of the same network"
        ) from None


def _check_more_may_go(costs: UnitCosts, table: UnitTable, given: Structure, budget: BudgetConfig) -> None:
    if not (table.gates and given.operations):
        return
    kept = kept_cost(costs, given)
    if kept <= budget.target:
        raise ConfigError(
            f"budget.target: {budget.target} is not valid with this model.structure, which keeps {kept:.3f}; "
            "expected less, or gate.enabled false"
        )


def _gate(model: nn.Module, config: Config) -> list[str]:
    """Put the gates on, and say what was left without."""
    try:
        attach_gates(model, config.gate)
    except BlockError as error:
        raise ConfigError(str(error)) from None
    return gating_notes(model, config.gate)


def gating_notes(model: nn.Module, config: GateConfig) -> list[str]:
    """What of a network is not gated though it might have been expected to be, and why; alike places in one line."""
    notes = find_channels(model).notes if "channel" in config.units else []
    plain = [name for name, module in model.named_modules() if isinstance(module, PlainBlock)]
    places: dict[str, list[str]] = {"a block without a shortcut stays": plain} if "block" in config.units else {}
    for name, module in model.named_modules():
        reason = why_left_alone(module)
        if reason is not None:
            places.setdefault(f"left as it is: {reason}", []).append(name)
    for note in notes:
        place, _, reason = note.partition(": ")
        places.setdefault(reason.replace(f"{place}.", ""), []).append(place)
    return [f"{list_places(found)}: {reason}" for reason, found in places.items() if found]
