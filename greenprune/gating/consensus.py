"""Consensus: what the gates of a network decided, counted over a window of steps and all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from greenprune.gating.budget import split_unit


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


class Consensus:
    """Counts decisions over a window of steps, on the device, and hands the counts out at its end.

    Args:
        units: Names of the gated units, in forward order.
        device: Where the counts live.
    """

    def __init__(self, units: list[str], device: torch.device) -> None:
        self.units = list(units)
        self._on = torch.zeros(len(units), dtype=torch.int64, device=device)
        self._openness = torch.zeros(len(units), dtype=torch.float32, device=device)
        self._steps = 0
        self._samples: int | Tensor = 0
        self._taken_back = torch.zeros(1, dtype=torch.int64, device=device)  # steps that do not count
        self._before: list[Tensor] = []
        self._always_on = dict.fromkeys(units, 0)

    def observe(self, rates: Tensor, openness: Tensor, samples: int | Tensor) -> None:
        """Add one pass on the device; the host's part is :meth:`count`.

        Args:
            rates: Rates [U] over the global batch, of whole numbers of samples.
            openness: Mean openness [U].
            samples: Samples of the pass, over all ranks.
        """
        # Whole numbers below 2^24 are exact in fp32; rounding undoes the division by the batch size.
        self._on += (rates.detach() * samples).round().to(torch.int64)
        self._openness += openness

    def count(self, samples: int | Tensor, passes: int) -> None:
        """Count passes and their samples, over all ranks: what a replayed CUDA graph does not do.

        Args:
            samples: A tensor on the device where no rank knows how many the others had.
            passes: Passes, which are the same for all.
        """
        self._steps += passes
        self._samples = self._samples + samples

    def remember(self) -> None:
        """Keep the counts as they are, for :meth:`take_back` after the next step."""
        self._before = [self._on.clone(), self._openness.clone()]

    def take_back(self, skipped: Tensor, passes: int = 1) -> None:
        """Leave the last step out of the counts if it was skipped.

        Args:
            skipped: Whether it was, a boolean scalar on the device.
            passes: Passes of the step, each of which was observed.
        """
        for counts, before in zip((self._on, self._openness), self._before, strict=True):
            counts.copy_(torch.where(skipped, before, counts))
        self._taken_back += skipped * passes

    @property
    def has_steps(self) -> bool:
        """Whether anything was counted since the last window was closed."""
        return self._steps > 0

    def close_window(self) -> dict[str, UnitWindow]:
        """Read the counts (one transfer from the device) and start the next window.

        Returns:
            What each unit did; nothing if all of the window's steps were taken back.
        """
        samples = int(self._samples)
        assert samples > 0, "a window without a step"
        *on, taken_back = torch.cat([self._on, self._taken_back]).tolist()
        samples -= taken_back * (samples // self._steps)
        self._steps -= taken_back
        window: dict[str, UnitWindow] = {}
        openness = (self._openness / self._steps).tolist() if self._steps else []
        for name, count, mean in zip(self.units, on, openness, strict=bool(self._steps)):
            self._always_on[name] = self._always_on[name] + 1 if count == samples else 0
            window[name] = UnitWindow(count, samples, mean, self._always_on[name])
        self._on.zero_()
        self._openness.zero_()
        self._taken_back.zero_()
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
            "taken_back": self._taken_back,
            "steps": self._steps,
            "samples": int(self._samples),
            "always_on": dict(self._always_on),
        }

    def load_state_dict(self, state: dict[str, Tensor | int | dict[str, int]]) -> None:
        """Take up a state saved by :meth:`state_dict` with the same units."""
        on, openness, always_on = state["on"], state["openness"], state["always_on"]
        taken_back = state.get("taken_back", torch.zeros(1))
        assert isinstance(taken_back, Tensor)
        self._taken_back.copy_(taken_back)
        assert isinstance(on, Tensor)
        assert isinstance(openness, Tensor)
        assert isinstance(always_on, dict)
        assert list(always_on) == self.units
        self._on.copy_(on)
        self._openness.copy_(openness)
        self._steps = int(state["steps"])  # type: ignore[arg-type]
        self._samples = int(state["samples"])  # type: ignore[arg-type]
        self._always_on = dict(always_on)


def by_gate(window: Mapping[str, UnitWindow]) -> dict[str, dict[str, Any]]:
    """A window in plain values: numbers for a block, lists in the order of the units for a set of channels."""
    gates: dict[str, dict[str, Any]] = {}
    for name, unit in window.items():
        owner, index = split_unit(name)
        if index is None:
            gates[owner] = {"rate": unit.rate, "openness": unit.openness}
            continue
        channels = gates.setdefault(owner, {"unit": [], "rate": [], "openness": []})
        channels["unit"].append(index)
        channels["rate"].append(round(unit.rate, 4))
        channels["openness"].append(round(unit.openness, 4))
    return gates
