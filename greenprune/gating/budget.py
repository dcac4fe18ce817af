"""The budget: what units cost, how much of it is kept, and the price that brings the kept cost to its target."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from greenprune.config import ConfigError

# Gains of the price's controller (our choice). The price is what the loss pays for keeping the whole network, so the
# proportional gain is a loss for each unit of error; the integral gain is that for an error that lasts a whole run.
# Half of a network is worth a price of 1 to 2: a price that rises far past that before the gates have followed closes
# them all alike, whatever each is worth to the task (docs/log.md).
PROPORTIONAL = 6.0
INTEGRAL = 60.0

_ROUNDING = 1e-9  # shares of cost are sums of floats


def channel_unit(channels: str, index: int) -> str:
    """Name of one unit of a set of channels; ``index`` counts in the dense network."""
    return f"{channels}[{index}]"


def split_unit(unit: str) -> tuple[str, int | None]:
    """What a unit belongs to and its index in it: of a block its own name and None, else the set of channels."""
    if not unit.endswith("]"):
        return unit, None
    channels, _, index = unit[:-1].rpartition("[")
    return channels, int(index)


@dataclass(frozen=True)
class CostTerm:
    """A part of a branch's cost that shrinks in proportion to what is left of each of some sets of channels.

    Attributes:
        share: Its share of the whole dense network's cost.
        block: The block that it belongs to.
        sets: The sets of channels; a layer between two of them costs as much as the product of both.
    """

    share: float
    block: str
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnitCosts:
    """Costs in the budget's unit, as shares of the whole dense network's cost.

    The budget speaks of the whole network, as its user does: what no gate can switch (stem, head, shortcuts) is
    kept cost too.

    Attributes:
        fixed: Share that is always kept.
        units: Share of each block that can be removed, by name; with all its channels.
        channels: Number of units of each gated set of channels in the dense network.
        terms: What the blocks with gated channels are made of. Empty if no channels are gated.
    """

    fixed: float
    units: dict[str, float]
    channels: dict[str, int] = field(default_factory=dict)
    terms: tuple[CostTerm, ...] = ()

    @classmethod
    def of(cls, units: Mapping[str, float], total: float) -> UnitCosts:
        """Shares from absolute costs of the units and of the whole dense network."""
        shares = {name: cost / total for name, cost in units.items()}
        return cls(fixed=1.0 - sum(shares.values()), units=shares)

    @property
    def cheapest(self) -> float:
        """Share of the cheapest unit that can be removed from the dense network: a block, or one unit of a set."""
        of_channels = (
            sum(term.share for term in self.terms if name in term.sets) / count for name, count in self.channels.items()
        )
        return min(of_channels) if self.channels else min(self.units.values())

    def everything(self) -> set[str]:
        """Names of all units of the dense network: its blocks and the units of its gated channels."""
        of_channels = (channel_unit(name, index) for name, count in self.channels.items() for index in range(count))
        return {*self.units, *of_channels}

    def kept(self, present: set[str] | frozenset[str]) -> float:
        """Share of the dense cost that is kept with only these units present."""
        if not self.channels:
            return self.fixed + sum(cost for name, cost in self.units.items() if name in present)
        return KeptCost(self, present).total

    def check_target(
        self, target: float, gated: Collection[str] | None = None, rounding: Mapping[str, int] | None = None
    ) -> None:
        """Refuse a target that no choice of units can meet.

        Args:
            target: The budget.
            gated: Names of the gates; None: every block has one.
            rounding: For each set of channels, of what number of units its size is to be a multiple; 1 where not given.

        Raises:
            ConfigError: What has no gate, or has to stay of channels in blocks without a shortcut, costs more than the
                target.
        """
        reason = "has no gate"
        kept = KeptCost(self, self.everything())
        for name in self.units if gated is None else gated:
            block = name.rpartition(":")[0] or name
            if block in kept.blocks:
                kept.remove_block(block)
            elif name in self.channels and block not in self.units:
                last = min(self.channels[name], (rounding or {}).get(name, 1))
                kept.remove_channels(name, self.channels[name] - last)
                if last > 1:
                    reason = "has no gate or is kept by surgery.round_to"
        least = math.ceil((kept.total - _ROUNDING) * 1000) / 1000
        if kept.total > target + _ROUNDING:
            raise ConfigError(
                f"budget.target: {target} cannot be met; {least} of this network's cost {reason}, "
                f"expected a share from {least} to 1"
            )


class KeptCost:
    """The share of the dense cost that is kept, followed from removal to removal.

    Args:
        costs: Shares of the dense cost.
        present: Names of the units that are there.

    Attributes:
        total: Share kept now.
        blocks: The blocks that are there and can be removed.
        left: Units left of each gated set of channels.
    """

    def __init__(self, costs: UnitCosts, present: Collection[str]) -> None:
        self._costs = costs
        self.blocks = {name for name in costs.units if name in present}
        self.left = dict.fromkeys(costs.channels, 0)
        for unit in present:
            name, index = split_unit(unit)
            if index is not None:
                self.left[name] += 1
        self._terms: dict[str, list[CostTerm]] = {}
        for term in costs.terms:
            self._terms.setdefault(term.block, []).append(term)
        # In the order of the network: a set's own differs from process to process, and with it the last digit.
        whole = sum(self._cost_of(name) for name in costs.units if name in self.blocks)
        plain = sum(self._cost_of(name) for name in self._terms if name not in costs.units)
        self.total = costs.fixed + whole + plain

    def _cost_of(self, block: str) -> float:
        terms = self._terms.get(block)
        if terms is None:
            return self._costs.units[block]
        return sum(term.share * math.prod(self._share(name) for name in term.sets) for term in terms)

    def _share(self, channels: str) -> float:
        return self.left[channels] / self._costs.channels[channels]

    def cost_of_block(self, block: str) -> float:
        """Share that goes with a block, with the channels that it has left."""
        return self._cost_of(block)

    def cost_of_channels(self, channels: str, count: int) -> float:
        """Share that goes with some of the units that are left of a set."""
        involved = [term for term in self._terms[channels.rpartition(":")[0]] if channels in term.sets]
        before = sum(term.share * math.prod(self._share(name) for name in term.sets) for term in involved)
        return before * count / self.left[channels]

    def remove_block(self, block: str) -> None:
        """Take a block away, with all its channels."""
        self.total -= self._cost_of(block)
        self.blocks.remove(block)
        for name in self.left:
            if name.rpartition(":")[0] == block:
                self.left[name] = 0

    def remove_channels(self, channels: str, count: int) -> None:
        """Take some units of a set away."""
        self.total -= self.cost_of_channels(channels, count)
        self.left[channels] -= count

    def put_back_channels(self, channels: str, count: int) -> None:
        """Put some units of a set back that were taken away."""
        self.left[channels] += count
        self.total += self.cost_of_channels(channels, count)


class ExpectedCost:
    """The kept cost as a function of activation rates, with the gradient by every rate; on the device.

    A layer between two sets of channels costs the product of what is left of both, so the price of a channel follows
    what its neighbours have lost.

    Args:
        costs: Shares of the dense cost.
        units: Names of the units that have a gate, in the order of the rates.
        present: Names of all units that are there.
        device: Where the rates live.
    """

    def __init__(self, costs: UnitCosts, units: list[str], present: set[str], device: torch.device) -> None:
        self._products: tuple[Tensor, ...] | None = None
        if not costs.channels:
            self._linear = torch.tensor([costs.units[name] for name in units], dtype=torch.float32, device=device)
            self._constant = costs.kept(present - set(units))
            return
        # Factors: for each block whether it is on, for each set which share of it is on, and last the number 1.
        factors = [*costs.units, *costs.channels]
        row = {name: index for index, name in enumerate(factors)}
        one = len(factors)
        base = torch.zeros(one + 1, dtype=torch.float32)
        by_rate = torch.zeros(one + 1, len(units), dtype=torch.float32)
        base[one] = 1.0
        gated = set(units)
        for name in present - gated:
            owner, index = split_unit(name)
            base[row[owner]] += 1.0 if index is None else 1.0 / costs.channels[owner]
        for column, name in enumerate(units):
            owner, index = split_unit(name)
            by_rate[row[owner], column] = 1.0 if index is None else 1.0 / costs.channels[owner]
        made_of_terms = {term.block for term in costs.terms}
        rest = [CostTerm(share, name) for name, share in costs.units.items() if name not in made_of_terms]
        terms = [*costs.terms, *rest]
        chosen = torch.zeros(3, len(terms), one + 1, dtype=torch.float32)
        for index, term in enumerate(terms):
            names = (*([term.block] if term.block in costs.units else []), *term.sets)
            for place in range(3):
                chosen[place, index, row[names[place]] if place < len(names) else one] = 1.0
        self._constant = costs.fixed
        self._linear = torch.tensor([term.share for term in terms], dtype=torch.float32, device=device)
        self._products = (base.to(device), by_rate.to(device), chosen.to(device))

    def __call__(self, rates: Tensor) -> Tensor:
        """Kept cost rho (scalar) at activation rates [U]."""
        if self._products is not None:
            base, by_rate, chosen = self._products
            first, second, third = chosen @ (base + by_rate @ rates)
            rates = first * second * third
        cost: Tensor = self._linear @ rates + self._constant
        return cost


def polarization(rates: Tensor, weights: Tensor | None = None) -> Tensor:
    """Polarization regularizer, the mean of 4 r (1 - r) over units: 0 if every unit is on or off for all inputs.

    Args:
        rates: Activation rates [U] over the global batch.
        weights: Weights [U] of the mean, summing to 1; None: all alike.
    """
    scattered = 4.0 * rates * (1.0 - rates)
    return scattered.mean() if weights is None else weights @ scattered


def global_rates(local: Tensor, mean_over_ranks: Tensor) -> Tensor:
    """Rates over the global batch, whose gradient is exactly that of one process on the whole batch.

    Data-parallel training averages the ranks' gradients: each rank then contributes its own samples' share.

    Args:
        local: Rates [U] of this rank's batch, with gradient.
        mean_over_ranks: The same averaged over all ranks, without gradient.
    """
    return local + (mean_over_ranks - local).detach()


class BudgetController:
    """Dual ascent on the kept cost: a price per kept cost that rises while too much is kept.

    The target is ramped from 1 to ``target`` between the warm-up and ``ramp_end``. The price has a proportional and
    an integral term and is never negative; it lives on the device and is never read by the host on the step's path.

    Args:
        target: Share of the dense cost to keep at the end of the ramp.
        passes: Forward passes of the whole run; the integral gain is scaled by it.
        warmup_end: Step at which the ramp starts; before it there is no penalty.
        ramp_end: Step at which the ramp reaches the target.
        device: Where the price lives.
    """

    def __init__(self, target: float, *, passes: int, warmup_end: int, ramp_end: int, device: torch.device) -> None:
        self.target = target
        self.passes = passes
        self.warmup_end = warmup_end
        self.ramp_end = ramp_end
        self.integral = torch.zeros((), dtype=torch.float32, device=device)
        self.price = torch.zeros((), dtype=torch.float32, device=device)
        self._aim = torch.ones((), dtype=torch.float32, device=device)

    def target_at(self, step: int) -> float:
        """The ramped target tau(t)."""
        if step < self.warmup_end:
            return 1.0
        share = min(1.0, (step - self.warmup_end) / max(1, self.ramp_end - self.warmup_end))
        return 1.0 - share * (1.0 - self.target)

    def aim(self, step: int) -> None:
        """Tell the device the ramped target of a step, from 0."""
        self._aim.fill_(self.target_at(step))

    def penalty(self, kept: Tensor, kept_by_all: Tensor) -> Tensor:
        """``price * (rho - tau(t))`` at the target last aimed at, after the price has moved by this pass's error.

        Args:
            kept: Kept cost rho, a scalar with gradient.
            kept_by_all: The same value, computed alike on every rank to the last bit, so that prices never drift apart.
        """
        error = kept_by_all - self._aim
        self.integral.add_(error, alpha=INTEGRAL / self.passes).clamp_(min=0.0)
        # A new tensor: the graph of this step's loss holds on to the price it was computed with.
        self.price = (self.integral + PROPORTIONAL * error).clamp(min=0.0)
        return self.price * (kept - self._aim)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on exactly."""
        return {"integral": self.integral, "price": self.price}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state saved by :meth:`state_dict`."""
        self.integral.copy_(state["integral"])
        self.price = state["price"].to(self.price.device)
