"""Consensus: from decisions counted over a window to what is removed, frozen or settled at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from greenprune.gating.budget import UnitCosts

Reason = Literal["off", "settled", "on"]

FloatArray = npt.NDArray[np.float64]

_ROUNDING = 1e-9  # shares of cost are sums of floats


@dataclass(frozen=True)
class UnitWindow:
    """What one unit's gate did over a window.

    Attributes:
        on: Samples, on all ranks, for which the unit was on.
        samples: Samples on all ranks.
        openness: Mean openness.
        always_on: Windows in a row, this one included, in which the unit was on for every sample.
    """

    on: int
    samples: int
    openness: float
    always_on: int

    @property
    def rate(self) -> float:
        """Activation rate over the window."""
        return self.on / self.samples


@dataclass(frozen=True)
class Verdict:
    """What happens to one unit now.

    Attributes:
        unit: Its name.
        action: remove it, or freeze it (its gate goes, it stays).
        reason: off or on for every sample of the window(s), or settled against the budget.
    """

    unit: str
    action: Literal["remove", "freeze"]
    reason: Reason


class Consensus:
    """Counts decisions over a window of steps, on the device, and hands the counts out at its end.

    Args:
        units: Names of the gated units, in forward order.
        device: Where the counts live.
    """

    def __init__(self, units: list[str], device: torch.device) -> None:
        self.units = list(units)
        self._on = torch.zeros(len(units), dtype=torch.int64, device=device)
        self._openness = torch.zeros(len(units), device=device)
        self._steps = 0
        self._samples = 0
        self._always_on = dict.fromkeys(units, 0)

    def observe(self, rates: Tensor, openness: Tensor, samples: int) -> None:
        """Add one step.

        Args:
            rates: Rates [U] over the global batch, of whole numbers of samples.
            openness: Mean openness [U].
            samples: Size of the global batch.
        """
        # Whole numbers below 2^24 are exact in fp32; rounding undoes the division by the batch size.
        self._on += (rates.detach() * samples).round().to(torch.int64)
        self._openness += openness
        self._steps += 1
        self._samples += samples

    def close_window(self) -> dict[str, UnitWindow]:
        """Read the counts (one transfer from the device) and start the next window."""
        assert self._samples > 0, "a window without a step"
        on = self._on.tolist()
        openness = (self._openness / max(1, self._steps)).tolist()
        window = {}
        for name, count, mean in zip(self.units, on, openness, strict=True):
            self._always_on[name] = self._always_on[name] + 1 if count == self._samples else 0
            window[name] = UnitWindow(count, self._samples, mean, self._always_on[name])
        self._on.zero_()
        self._openness.zero_()
        self._steps = self._samples = 0
        return window

    def drop(self, gone: set[str]) -> None:
        """Forget units whose gate is gone; only between two windows."""
        keep = [index for index, name in enumerate(self.units) if name not in gone]
        self.units = [self.units[index] for index in keep]
        self._on = self._on[keep].clone()
        self._openness = self._openness[keep].clone()
        self._always_on = {name: self._always_on[name] for name in self.units}

    def state_dict(self) -> dict[str, Tensor | int | dict[str, int]]:
        """What a checkpoint needs to go on exactly, also in the middle of a window."""
        return {
            "on": self._on,
            "openness": self._openness,
            "steps": self._steps,
            "samples": self._samples,
            "always_on": dict(self._always_on),
        }

    def load_state_dict(self, state: dict[str, Tensor | int | dict[str, int]]) -> None:
        """Take up a state saved by :meth:`state_dict` with the same units."""
        on, openness, always_on = state["on"], state["openness"], state["always_on"]
        assert isinstance(on, Tensor)
        assert isinstance(openness, Tensor)
        assert isinstance(always_on, dict)
        assert list(always_on) == self.units
        self._on.copy_(on)
        self._openness.copy_(openness)
        self._steps = int(state["steps"])  # type: ignore[arg-type]
        self._samples = int(state["samples"])  # type: ignore[arg-type]
        self._always_on = dict(always_on)


def decide(
    window: dict[str, UnitWindow],
    present: set[str],
    costs: UnitCosts,
    target: float,
    *,
    ceiling: float,
    freeze_after: int,
    final: bool,
) -> list[Verdict]:
    """What is removed and frozen at the end of a window.

    Units that were off for every sample go, the least open first, as long as the units left can still be settled to
    end in ``(target - cheapest unit, target]``. Where more than ``ceiling`` is kept even then, the units of the lowest
    rate (then openness) are settled: removed though undecided, so that the saving comes when the ramped budget says.
    At the deadline (``final``) everything is settled against the target and what stays is frozen.

    Args:
        window: The gated units' counts.
        present: Names of all units that are still there, gated or frozen.
        costs: Shares of the dense cost.
        target: The budget.
        ceiling: Largest share that may be kept after this boundary; at least ``target``.
        freeze_after: Windows of rate 1 after which a unit is frozen once the budget is met.
        final: Whether this is the deadline.

    Returns:
        Verdicts in the order in which they are to be carried out, removals first; the same on every rank.
    """
    order = sorted(window, key=lambda name: (window[name].rate, window[name].openness, name))
    kept_for_good = costs.kept(present - set(window))
    verdicts: list[Verdict] = []
    staying = set(window)

    def kept() -> float:
        return kept_for_good + sum(costs.units[name] for name in staying)

    reachable = can_settle([costs.units[name] for name in staying], costs, kept_for_good, target)

    def may_go(name: str) -> bool:
        if reachable:
            rest = [costs.units[other] for other in staying - {name}]
            return can_settle(rest, costs, kept_for_good, target)
        return kept() - costs.units[name] > target - costs.cheapest + _ROUNDING  # units too unequal for the window

    if final:
        chosen = settle(order, costs, kept_for_good, target)
        for name in order:
            if name not in chosen:
                verdicts.append(Verdict(name, "remove", "off" if window[name].on == 0 else "settled"))
        frozen = [name for name in window if name in chosen]
        return verdicts + [Verdict(name, "freeze", "on" if window[name].rate == 1 else "settled") for name in frozen]
    for name in order:
        off = window[name].on == 0
        if not off and kept() <= ceiling + _ROUNDING:
            continue
        if may_go(name):
            staying.remove(name)
            verdicts.append(Verdict(name, "remove", "off" if off else "settled"))
    if kept() <= target + _ROUNDING:
        for name, unit in window.items():
            if name in staying and unit.always_on >= freeze_after:
                verdicts.append(Verdict(name, "freeze", "on"))
    return verdicts


_MANY_SUMS = 100_000


def _add_units(sums: FloatArray, cost: float, count: int = 1) -> FloatArray:
    """All sums of some units' costs, with more units of one cost to choose from; equal sums once.

    Networks have few distinct costs, so there are few sums. Where there are many, sums closer than 1e-6 stand for each
    other: a choice may then be missed, but none is imagined, since each number is the sum of a real choice.
    """
    more = np.add.outer(cost * np.arange(count + 1), sums).ravel()
    digits = 12 if len(more) < _MANY_SUMS else 6
    _, first = np.unique(more.round(digits), return_index=True)
    distinct: FloatArray = more[first]
    return distinct


@lru_cache(maxsize=64)
def _all_sums(counts: tuple[tuple[float, int], ...]) -> FloatArray:
    """All sums of choices among units, given as their distinct costs and how many units have each."""
    sums = np.zeros(1)
    for cost, count in counts:
        sums = _add_units(sums, cost, count)
    return sums


class _Window:
    """Where the sum of the chosen units' costs has to end: (target - cheapest, target] without what is kept anyway."""

    def __init__(self, costs: UnitCosts, kept_for_good: float, target: float) -> None:
        self.high = target - kept_for_good + _ROUNDING
        self.low = self.high - costs.cheapest

    def reached_by(self, sums: FloatArray) -> bool:
        """Whether one of the sums ends in the window."""
        return bool(((sums > self.low) & (sums <= self.high)).any())


def can_settle(undecided: Iterable[float], costs: UnitCosts, kept_for_good: float, target: float) -> bool:
    """Whether some choice among undecided units ends with the kept cost in (target - cheapest unit, target].

    Args:
        undecided: Costs of the units among which is chosen.
        costs: Shares of the dense cost.
        kept_for_good: Share that is kept whatever is chosen.
        target: Share to keep at most.
    """
    counts = tuple(sorted(Counter(undecided).items()))
    return _Window(costs, kept_for_good, target).reached_by(_all_sums(counts))


def settle(order: list[str], costs: UnitCosts, kept_for_good: float, target: float) -> set[str]:
    """Choose the units to keep: the most wanted, as far as the kept cost can then still end where it should.

    Going from the most wanted unit to the least, each is kept if the rest can still be chosen such that the kept cost
    ends in ``(target - cheapest, target]``, else dropped. Where no choice does, the most wanted that fit are kept.

    Args:
        order: Undecided units, the least wanted first.
        costs: Shares of the dense cost.
        kept_for_good: Share that is kept whatever is chosen here.
        target: Share to keep at most.

    Returns:
        Units to keep.
    """
    window = _Window(costs, kept_for_good, target)
    sums_below = {}  # for each unit, the sums of those less wanted
    sums = np.zeros(1)
    for name in order:
        sums_below[name] = sums
        sums = _add_units(sums, costs.units[name])
    possible = window.reached_by(sums)
    chosen: set[str] = set()
    kept = 0.0
    for name in reversed(order):
        with_it = kept + costs.units[name]
        if window.reached_by(sums_below[name] + with_it) if possible else with_it <= window.high:
            chosen.add(name)
            kept = with_it
    return chosen
