"""The budget: what units cost, how much of it is kept, and the price that brings the kept cost to its target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from greenprune.config import ConfigError

# Gains of the price's controller (our choice). The price is what the loss pays for keeping the whole network, so the
# proportional gain is a loss for each unit of error; the integral gain is that for an error that lasts a whole run.
PROPORTIONAL = 20.0
INTEGRAL = 200.0

_ROUNDING = 1e-9  # shares of cost are sums of floats


@dataclass(frozen=True)
class UnitCosts:
    """Costs in the budget's unit, as shares of the whole dense network's cost.

    The budget speaks of the whole network, as its user does: what no gate can switch (stem, head, shortcuts) is
    kept cost too.

    Attributes:
        fixed: Share that is always kept.
        units: Share of each unit by name; ``fixed`` and these sum to 1.
    """

    fixed: float
    units: dict[str, float]

    @classmethod
    def of(cls, units: Mapping[str, float], total: float) -> UnitCosts:
        """Shares from absolute costs of the units and of the whole dense network."""
        shares = {name: cost / total for name, cost in units.items()}
        return cls(fixed=1.0 - sum(shares.values()), units=shares)

    @property
    def cheapest(self) -> float:
        """Share of the cheapest unit."""
        return min(self.units.values())

    def kept(self, present: set[str] | frozenset[str]) -> float:
        """Share of the dense cost that is kept with only these units present."""
        return self.fixed + sum(cost for name, cost in self.units.items() if name in present)

    def check_target(self, target: float) -> None:
        """Refuse a target that no choice of units can meet.

        Raises:
            ConfigError: The part of the network that has no gate costs more than the target.
        """
        least = math.ceil((self.fixed - _ROUNDING) * 1000) / 1000
        if self.fixed > target + _ROUNDING:
            raise ConfigError(
                f"budget.target: {target} cannot be met; {least} of this network's cost has no gate, "
                f"expected a share from {least} to 1"
            )


def polarization(rates: Tensor) -> Tensor:
    """Polarization regularizer, the mean of 4 r (1 - r) over units: 0 if every unit is on or off for all inputs.

    Args:
        rates: Activation rates [U] over the global batch.
    """
    return (4.0 * rates * (1.0 - rates)).mean()


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
        total_steps: Steps of the whole run; the integral gain is scaled by it.
        warmup_end: Step at which the ramp starts; before it there is no penalty.
        ramp_end: Step at which the ramp reaches the target.
        device: Where the price lives.
    """

    def __init__(
        self, target: float, *, total_steps: int, warmup_end: int, ramp_end: int, device: torch.device
    ) -> None:
        self.target = target
        self.total_steps = total_steps
        self.warmup_end = warmup_end
        self.ramp_end = ramp_end
        self.integral = torch.zeros((), device=device)
        self.price = torch.zeros((), device=device)

    def target_at(self, step: int) -> float:
        """The ramped target tau(t)."""
        if step < self.warmup_end:
            return 1.0
        share = min(1.0, (step - self.warmup_end) / max(1, self.ramp_end - self.warmup_end))
        return 1.0 - share * (1.0 - self.target)

    def penalty(self, kept: Tensor, kept_by_all: Tensor, step: int) -> Tensor:
        """``price * (rho - tau(t))``, after the price has moved by this step's error.

        Args:
            kept: Kept cost rho, a scalar with gradient.
            kept_by_all: The same value, computed alike on every rank to the last bit, so that prices never drift apart.
            step: Step of the run, from 0; after the warm-up.
        """
        error = kept_by_all - self.target_at(step)
        self.integral.add_(error, alpha=INTEGRAL / self.total_steps).clamp_(min=0.0)
        # A new tensor: the graph of this step's loss holds on to the price it was computed with.
        self.price = (self.integral + PROPORTIONAL * error).clamp(min=0.0)
        return self.price * (kept - self.target_at(step))

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on exactly."""
        return {"integral": self.integral, "price": self.price}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state saved by :meth:`state_dict`."""
        self.integral.copy_(state["integral"])
        self.price = state["price"].to(self.price.device)
