"""The gates' part of a training run: the penalty of every step and the verdicts at every boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from greenprune.config import Config
from greenprune.gating.budget import BudgetController, UnitCosts, global_rates, polarization
from greenprune.gating.consensus import Consensus, UnitWindow, Verdict, decide
from greenprune.gating.gates import Gate, gated_units, hold_within_bounds, take_decisions

# Share of the time from the warm-up to the deadline in which the target is ramped down (our choice): gates then have
# the rest to come to rest, and the last to go still leave in time to save much.
RAMP_SHARE = 0.6

# Windows that removals may trail the ramped target before undecided units are settled to catch up (our choice). A
# unit that is off is removed a whole window later at the earliest; with less, gates would never decide for themselves.
LAG = 2


class GatePolicy:
    """Steers the gates of one network towards the budget and says when a unit goes.

    Args:
        config: The run.
        model: The unwrapped network with its gates.
        costs: Shares of the dense cost, of all units of the dense network.
        present: Names of the units that are there, gated or not.
        total_steps: Steps of the whole run.
        window: Steps between two boundaries.
        device: Device of the network.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        costs: UnitCosts,
        present: set[str],
        *,
        total_steps: int,
        window: int,
        device: torch.device,
    ) -> None:
        self.costs = costs
        self.present = set(present)
        self.target = config.budget.target
        self.freeze_after = config.removal.freeze_after
        self.polarization = config.gate.polarization
        self.window = window
        self.warmup_end = min(round(config.gate.warmup * total_steps), total_steps - 1)
        self.deadline = max(self.warmup_end + 1, round(config.removal.decide_by * total_steps))
        self.controller = BudgetController(
            self.target,
            total_steps=total_steps,
            warmup_end=self.warmup_end,
            ramp_end=self.warmup_end + round(RAMP_SHARE * (self.deadline - self.warmup_end)),
            device=device,
        )
        self._device = device
        self._link(model)
        self.consensus = Consensus(list(self._units), device)

    def _link(self, model: nn.Module) -> None:
        """Find the gates that are left and the costs that go with them."""
        self._units = gated_units(model)
        self._gates = [block.gate for block in self._units.values() if isinstance(block.gate, Gate)]
        self._cost = torch.tensor([self.costs.units[name] for name in self._units], device=self._device)
        self._kept_for_good = self.costs.kept(self.present - set(self._units))

    @property
    def active(self) -> bool:
        """Whether any unit still has a gate."""
        return bool(self._gates)

    @property
    def kept_cost(self) -> float:
        """Share of the dense cost in the units that are physically there."""
        return self.costs.kept(self.present)

    def penalty(self, step: int, samples: int, mean_over_ranks: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Count the decisions of the forward pass just done, and the loss that they add.

        Args:
            step: Step of the run, from 0.
            samples: Size of the global batch.
            mean_over_ranks: Averages a tensor over all ranks; the one collective of this method.

        Returns:
            ``lambda_pol * polarization + price * (rho - tau(t))`` (scalar, fp32), or None in the warm-up.
        """
        local, openness = take_decisions(self._gates)
        shared = mean_over_ranks(torch.stack([local.detach(), openness]))
        self.consensus.observe(shared[0], shared[1], samples)
        if step < self.warmup_end:
            return None
        rates = global_rates(local, shared[0])
        kept, kept_by_all = (self._cost @ r + self._kept_for_good for r in (rates, shared[0]))
        return self.polarization * polarization(rates) + self.controller.penalty(kept, kept_by_all, step)

    def after_step(self) -> None:
        """Keep the gates within their bounds after an optimizer step."""
        hold_within_bounds(self._gates)

    def scale_losses_by(self, loss_scale: Tensor | None) -> None:
        """Tell the gates the factor by which mixed precision scales the loss, if it does."""
        for gate in self._gates:
            gate.loss_scale = loss_scale

    def at_boundary(self, steps_done: int) -> bool:
        """Whether a window ends after this many steps: every window and the deadline itself."""
        return self.active and (steps_done % self.window == 0 or steps_done == self.deadline)

    def close_window(self, steps_done: int) -> tuple[dict[str, UnitWindow], list[Verdict]]:
        """End the window: what the gates did in it, and what is removed and frozen now. One read of the device."""
        window = self.consensus.close_window()
        verdicts = decide(
            window,
            self.present,
            self.costs,
            self.target,
            ceiling=self.controller.target_at(steps_done - LAG * self.window),
            freeze_after=self.freeze_after,
            final=steps_done >= self.deadline,
        )
        return window, verdicts

    def carried_out(self, model: nn.Module, verdicts: list[Verdict]) -> None:
        """Follow the surgery that the verdicts asked for."""
        self.present -= {verdict.unit for verdict in verdicts if verdict.action == "remove"}
        self.consensus.drop({verdict.unit for verdict in verdicts})
        self._link(model)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on exactly."""
        return {"controller": self.controller.state_dict(), "consensus": self.consensus.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state saved by :meth:`state_dict` at the same structure."""
        self.controller.load_state_dict(state["controller"])
        self.consensus.load_state_dict(state["consensus"])
