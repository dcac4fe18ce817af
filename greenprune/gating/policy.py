"""The gates' part of a training run: the penalty of every step and the verdicts at every boundary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from greenprune.config import BudgetConfig, GateConfig, RemovalConfig
from greenprune.gating.budget import (
    BudgetController,
    ExpectedCost,
    UnitCosts,
    channel_unit,
    global_rates,
    polarization,
)
from greenprune.gating.consensus import Consensus, UnitWindow
from greenprune.gating.gates import (
    find_gates,
    full_precision,
    gated_units,
    hold_open,
    hold_within_bounds,
    take_decisions,
)
from greenprune.gating.settling import Verdict, decide

# Share of the time from the warm-up to the deadline in which the target is ramped down (our choice): gates then have
# the rest to come to rest, and the last to go still leave in time to save much.
RAMP_SHARE = 0.6

# Windows that removals may trail the ramped target before undecided units are settled to catch up (our choice). A
# unit that is off is removed a whole window later at the earliest; with less, gates would never decide for themselves.
LAG = 2


# Windows of a run, and the least samples of one, where it is not given (our choice): enough windows before the deadline
# of a run of few epochs that units leave on the way to it, and enough samples that "off for all" says something.
WINDOWS = 25
WINDOW_SAMPLES = 10_000


def default_window(steps_per_epoch: int, total_steps: int, batch_size: int) -> int:
    """Steps of a window: an epoch; in a run of few epochs less, but not fewer than so many samples.

    Args:
        steps_per_epoch: Steps of an epoch.
        total_steps: Steps of the whole run.
        batch_size: Samples of a step, over all ranks.
    """
    return min(steps_per_epoch, max(total_steps // WINDOWS, math.ceil(WINDOW_SAMPLES / batch_size)))


class PolicySettings(Protocol):
    """The sections of a config that say how gates are steered."""

    @property
    def gate(self) -> GateConfig:
        """The gates."""

    @property
    def budget(self) -> BudgetConfig:
        """The budget they are to meet."""

    @property
    def removal(self) -> RemovalConfig:
        """When units leave."""


def _lies_in(unit: str, block: str) -> bool:
    """Whether a unit is a block or one of its channels."""
    return unit == block or unit.startswith(f"{block}:")


class GatePolicy:
    """Steers the gates of one network towards the budget and says when a unit goes.

    Args:
        settings: The run's settings of gates, budget and removal.
        model: The unwrapped network with its gates.
        costs: Shares of the dense cost, of all units of the dense network.
        present: Names of the units that are there, gated or not.
        rounding: For each set of channels, of what number of units its size should be a multiple.
        total_steps: Steps of the whole run.
        window: Steps between two boundaries.
        parts: Passes a step, over which gradients are added up.

    Attributes:
        in_warmup: Whether the step that was begun last lies before the end of the warm-up.
    """

    def __init__(
        self,
        settings: PolicySettings,
        model: nn.Module,
        costs: UnitCosts,
        present: set[str],
        *,
        rounding: Mapping[str, int],
        total_steps: int,
        window: int,
        parts: int = 1,
    ) -> None:
        self.costs = costs
        self.present = set(present)
        self.rounding = rounding
        self.target = settings.budget.target
        self.freeze_after = settings.removal.freeze_after
        self.polarization = settings.gate.polarization
        self.window = window
        self.warmup_end = min(round(settings.gate.warmup * total_steps), total_steps - 1)
        self.deadline = max(self.warmup_end + 1, round(settings.removal.decide_by * total_steps))
        self._device = next(model.parameters()).device
        self.controller = BudgetController(
            self.target,
            passes=total_steps * parts,
            warmup_end=self.warmup_end,
            ramp_end=self.warmup_end + round(RAMP_SHARE * (self.deadline - self.warmup_end)),
            device=self._device,
        )
        self._parts = parts
        self._link(model)
        self.consensus = Consensus(self._units, self._device)
        self.in_warmup = True

    def _link(self, model: nn.Module) -> None:
        """Find the gates that are left, and what their units cost."""
        found = find_gates(model)
        self._names, self._gates = list(found), list(found.values())
        for gate in self._gates:
            gate.parts = self._parts
        self._units = gated_units(model)
        self._expected_cost = ExpectedCost(self.costs, self._units, self.present, self._device)
        # A mean over gates of the mean over a gate's units: alike for a block and for the channels of another.
        self._weights = None
        if any(gate.units > 1 for gate in self._gates):
            by_gate = [torch.full_like(gate.bias.detach(), 1.0 / gate.units) for gate in self._gates]
            self._weights = torch.cat(by_gate) / len(by_gate)

    def losses_are_divided_by(self, parts: int) -> None:
        """Tell the gates over how many passes gradients are added up, each with a loss divided by their number."""
        self._parts = parts
        for gate in self._gates:
            gate.parts = parts

    @property
    def active(self) -> bool:
        """Whether any unit still has a gate."""
        return bool(self._gates)

    @property
    def kept_cost(self) -> float:
        """Share of the dense cost in the units that are physically there."""
        return self.costs.kept(self.present)

    def begin_step(self, step: int, samples: int | Tensor, passes: int = 1) -> None:
        """What the host does for a step, before its passes; :meth:`penalty_of_pass` is then the device's part alone.

        Args:
            step: Step of the run, from 0.
            samples: Samples of the step, over all ranks.
            passes: Passes of the step.
        """
        self.in_warmup = step < self.warmup_end
        self.consensus.count(samples, passes)
        self.controller.aim(step)

    def penalty_of_pass(self, samples: int | Tensor, mean_over_ranks: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Count the decisions of the forward pass just done, and the loss that they add.

        Nothing in it depends on the step but through tensors on the device and :attr:`in_warmup`.

        Args:
            samples: Samples of the pass, over all ranks.
            mean_over_ranks: Averages a tensor over all ranks; the one collective of this method.

        Returns:
            ``lambda_pol * polarization + price * (rho - tau(t))`` (scalar, fp32), or None in the warm-up.
        """
        with full_precision(self._device.type):  # loops may ask for it where autocast is on
            local, openness = take_decisions(self._gates, self._names)
            shared = mean_over_ranks(torch.stack([local.detach(), openness]))
            self.consensus.observe(shared[0], shared[1], samples)
            if self.in_warmup:
                return None
            rates = global_rates(local, shared[0])
            kept, kept_by_all = self._expected_cost(rates), self._expected_cost(shared[0])
            scattered = polarization(rates, self._weights)
            return self.polarization * scattered + self.controller.penalty(kept, kept_by_all)

    def penalty(self, step: int, samples: int | Tensor, mean_over_ranks: Callable[[Tensor], Tensor]) -> Tensor | None:
        """:meth:`begin_step` and :meth:`penalty_of_pass` for a step of one pass.

        Args:
            step: Step of the run, from 0.
            samples: Samples of the pass, over all ranks.
            mean_over_ranks: Averages a tensor over all ranks.
        """
        self.begin_step(step, samples)
        return self.penalty_of_pass(samples, mean_over_ranks)

    def after_step(self) -> None:
        """Keep the gates open until the warm-up has ended, and within their bounds after it."""
        if self.in_warmup:
            hold_open(self._gates)
        else:
            hold_within_bounds(self._gates)

    def remember_step(self) -> None:
        """Keep what the next step's penalty changes, for :meth:`forget_step`."""
        self.consensus.remember()
        self._before = (self.controller.integral.clone(), self.controller.price.clone())

    def forget_step(self, skipped: Tensor) -> None:
        """Put back what the last step changed if it was skipped.

        Args:
            skipped: Whether it was, a boolean scalar on the device.
        """
        self.consensus.take_back(skipped, self._parts)
        integral, price = self._before
        self.controller.integral.copy_(torch.where(skipped, integral, self.controller.integral))
        self.controller.price.copy_(torch.where(skipped, price, self.controller.price))

    def scale_losses_by(self, loss_scale: Tensor | None) -> None:
        """Tell the gates the factor by which mixed precision scales the loss, if it does."""
        for gate in self._gates:
            gate.loss_scale = loss_scale

    def at_boundary(self, steps_done: int) -> bool:
        """Whether a window ends after this many steps: every window and the deadline itself."""
        return self.active and (steps_done % self.window == 0 or steps_done == self.deadline)

    def close_window(self, steps_done: int) -> tuple[dict[str, UnitWindow], list[Verdict]]:
        """End the window: what the gates did in it, and what is removed and frozen now. One read of the device.

        Of a window whose steps were all left out nothing is told, and nothing follows but at the deadline.
        """
        window, final = self.consensus.close_window(), steps_done >= self.deadline
        if not window:
            return {}, self._decide(self._openness_now(), steps_done, final=True) if final else []
        return window, self._decide(window, steps_done, final=final)

    def settle_now(self) -> list[Verdict]:
        """What is removed and frozen if everything has to be decided at once.

        By what the gates did since the last boundary; without a step since then, by how open they are.
        """
        window = self.consensus.close_window() if self.consensus.has_steps else {}
        return self._decide(window or self._openness_now(), self.deadline, final=True)

    def _openness_now(self) -> dict[str, UnitWindow]:
        logits = torch.cat([gate.bias.detach() for gate in self._gates])
        on, openness = (logits > 0).tolist(), logits.sigmoid().tolist()
        return {
            name: UnitWindow(on=int(is_on), samples=1, openness=mean, always_on=0)
            for name, is_on, mean in zip(self._units, on, openness, strict=True)
        }

    def _decide(self, window: dict[str, UnitWindow], steps_done: int, *, final: bool) -> list[Verdict]:
        return decide(
            window,
            self.present,
            self.costs,
            self.target,
            ceiling=self.controller.target_at(steps_done - LAG * self.window),
            freeze_after=self.freeze_after,
            final=final,
            rounding=self.rounding,
        )

    def carried_out(self, model: nn.Module, verdicts: list[Verdict]) -> None:
        """Follow the surgery that the verdicts asked for."""
        for verdict in verdicts:
            if verdict.channels is not None:
                self.present -= {channel_unit(verdict.unit, index) for index in verdict.channels}
            elif verdict.action == "remove":
                self.present -= {unit for unit in self.present if _lies_in(unit, verdict.unit)}
        before = self._units
        self._link(model)
        self.consensus.drop(set(before) - set(self._units))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on exactly."""
        return {"controller": self.controller.state_dict(), "consensus": self.consensus.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state saved by :meth:`state_dict` at the same structure."""
        self.controller.load_state_dict(state["controller"])
        self.consensus.load_state_dict(state["consensus"])
