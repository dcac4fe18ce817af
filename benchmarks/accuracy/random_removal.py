"""Random block removal at the schedule of a run: the same number of blocks, of the same cost, at the same steps.

    python benchmarks/accuracy/random_removal.py runs/NAME --config configs/digits.yaml --run_name random

Everything else is the run's: the gates are there and stay open, so that what differs is which blocks go. Units that
cost the same are exchanged for one another (in a CIFAR ResNet the blocks that keep the shape, of all stages), so the
FLOPs are those of the run at every step, but for the gates' own.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import greenprune.run
from greenprune.command import run_command
from greenprune.config import load_config
from greenprune.gating import GatePolicy, UnitWindow, Verdict
from greenprune.surgery import Structure
from greenprune.trainer import Trainer

STILL = "1e-12"
"""Learning rate of gates that do not move."""


class RandomPolicy(GatePolicy):
    """Removes random blocks where another run has removed its own.

    Attributes:
        schedule: The other run's structure.
        seed: Where the choice comes from, with the step: a run that goes on chooses alike.
    """

    schedule: Structure
    seed: int

    def penalty_of_pass(self, *args: Any, **kwargs: Any) -> None:
        """No penalty; decisions are counted as ever."""
        super().penalty_of_pass(*args, **kwargs)

    def _decide(self, window: dict[str, UnitWindow], steps_done: int, *, final: bool) -> list[Verdict]:
        left = sorted(window)
        chance = random.Random(f"{self.seed} {steps_done}")
        verdicts: list[Verdict] = []
        for removal in self.schedule.removed():
            if removal.step != steps_done:
                continue
            cost = self.costs.units[removal.unit]
            alike = [unit for unit in left if abs(self.costs.units[unit] - cost) < 1e-9]
            unit = chance.choice(alike)
            left.remove(unit)
            verdicts.append(Verdict(unit, "remove", "settled"))
        if final:
            verdicts += [Verdict(unit, "freeze", "settled") for unit in left]
        return verdicts


def main() -> int:
    like = greenprune.run.RunFolder(Path(sys.argv[1]))
    structure = Structure.from_dict(greenprune.run.json.loads(like.structure.read_text()))
    seed = load_config(like.config).seed

    class RandomTrainer(Trainer):
        """A trainer whose policy is random."""

        def _new_policy(self) -> GatePolicy:
            policy = super()._new_policy()
            policy.__class__ = RandomPolicy
            assert isinstance(policy, RandomPolicy)
            policy.schedule, policy.seed = structure, seed
            return policy

    greenprune.run.Trainer = RandomTrainer  # type: ignore[misc]
    flags = [*sys.argv[2:], "--seed", str(seed), "--gate.units", "[block]", "--gate.kind", "static", "--gate.lr", STILL]
    return run_command(flags, os.environ, prog="random_removal.py")


if __name__ == "__main__":
    sys.exit(main())
