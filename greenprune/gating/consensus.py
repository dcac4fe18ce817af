"""Consensus: from decisions counted over a window to what is removed, frozen or settled at its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from greenprune.gating.budget import UnitCosts

Reason = Literal["off", "settled", "on"]

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

    Units that were off for every sample go, the least open first, as long as the kept cost can still end in
    ``(target - cheapest unit, target]``. Where more than ``ceiling`` is kept even then, the units of the lowest rate
    (then openness) are settled: removed though undecided, so that the saving comes when the ramped budget says. At
    the deadline (``final``) everything is settled against the target and what stays is frozen.

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

    floor = target - costs.cheapest + _ROUNDING
    if final:
        chosen = settle(order, costs, kept_for_good, target)
        for name in order:
            if name not in chosen:
                verdicts.append(Verdict(name, "remove", "off" if window[name].on == 0 else "settled"))
        frozen = [name for name in window if name in chosen]
        return verdicts + [Verdict(name, "freeze", "on" if window[name].rate == 1 else "settled") for name in frozen]
    for name in order:
        off = window[name].on == 0
        if (off or kept() > ceiling + _ROUNDING) and kept() - costs.units[name] > floor:
            staying.remove(name)
            verdicts.append(Verdict(name, "remove", "off" if off else "settled"))
    if kept() <= target + _ROUNDING:
        for name, unit in window.items():
            if name in staying and unit.always_on >= freeze_after:
                verdicts.append(Verdict(name, "freeze", "on"))
    return verdicts


def settle(order: list[str], costs: UnitCosts, kept_for_good: float, target: float) -> set[str]:
    """Choose the units to keep: as many of the most wanted as the target allows, and no room left unused.

    Units are taken from the most wanted on, each that still fits. If more than the cheapest unit's cost is left
    over then, wanted units are exchanged for costlier ones until it is not.

    Args:
        order: Undecided units, the least wanted first.
        costs: Shares of the dense cost.
        kept_for_good: Share that is kept whatever is chosen here.
        target: Share to keep at most.

    Returns:
        Units to keep; with them the kept cost lies in (target - cheapest, target] wherever such a choice is found.
    """
    chosen: set[str] = set()
    kept = kept_for_good
    for name in reversed(order):
        if kept + costs.units[name] <= target + _ROUNDING:
            chosen.add(name)
            kept += costs.units[name]
    while kept <= target - costs.cheapest - _ROUNDING:
        room = target - kept + _ROUNDING
        swaps = [
            (out, into)
            for out in order
            if out in chosen
            for into in reversed(order)
            if into not in chosen and 0 < costs.units[into] - costs.units[out] <= room
        ]
        if not swaps:
            break
        out, into = swaps[0]
        chosen.remove(out)
        chosen.add(into)
        kept += costs.units[into] - costs.units[out]
    return chosen
