"""Random removal at the schedule of a run of blocks or of channels: as much of the cost, at the same steps.

    python benchmarks/accuracy/random_removal.py runs/NAME --config configs/digits.yaml --run_name random

NAME's folder, or its ``structure.json`` alone, says what went when. Everything else is as in the config, which is to be
that of the run: the gates are there and stay open, so that what differs is which units go.

- **Blocks** that cost the same are exchanged for one another (in a CIFAR ResNet those that keep the shape, of all
  stages), so the FLOPs are those of the run at every step, but for the gates' own.
- **Channels** go at random within their layer, and from all layers alike: what is left is the network of a smaller
  width, which is what one would take without looking. Its FLOPs are the run's at every step, to within one channel.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import greenprune.run
from greenprune.command import run_command
from greenprune.config import load_config, parse_config
from greenprune.gating import GatePolicy, UnitWindow, Verdict, channel_unit, split_unit
from greenprune.surgery import Structure
from greenprune.trainer import Trainer

STILL = "1e-12"
"""Learning rate of gates that do not move."""


class RandomPolicy(GatePolicy):
    """Removes random units when another run has removed its own.

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
        verdicts = self._channels(steps_done) if self.costs.channels else self._blocks(sorted(window), steps_done)
        if final:
            gone = {verdict.unit for verdict in verdicts if verdict.channels is None}
            owners = dict.fromkeys(split_unit(unit)[0] for unit in window)
            verdicts += [Verdict(owner, "freeze", "settled") for owner in owners if owner not in gone]
        return verdicts

    def _blocks(self, left: list[str], steps_done: int) -> list[Verdict]:
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
        return verdicts

    def _channels(self, steps_done: int) -> list[Verdict]:
        """The next channels in an order in which all sets come to their end together, down to the other run's cost."""
        gone: set[str] = set()
        for removal in self.schedule.removed():
            if removal.step <= steps_done:
                blocks = [name for name in self.costs.everything() if name.startswith(f"{removal.unit}:")]
                of_set = [channel_unit(removal.unit, index) for index in removal.channels or ()]
                gone.update(of_set or [removal.unit, *blocks])
        goal = self.costs.kept(self.costs.everything() - gone)
        present, going = set(self.present), dict[str, list[int]]()
        for name, index in self._order():
            if self.costs.kept(present) <= goal + 1e-9:
                break
            if channel_unit(name, index) in present:
                present.remove(channel_unit(name, index))
                going.setdefault(name, []).append(index)
        return [Verdict(name, "remove", "settled", tuple(sorted(indices))) for name, indices in going.items()]

    def _order(self) -> list[tuple[str, int]]:
        """All channels: at random within a set, the n-th part of each set before the next of any."""
        chance = random.Random(self.seed)
        places: list[tuple[float, str, int]] = []
        for name, count in sorted(self.costs.channels.items()):
            indices = chance.sample(range(count), count)
            places += [((place + 1) / count, name, index) for place, index in enumerate(indices)]
        return [(name, index) for _, name, index in sorted(places)]


def main() -> int:
    path, flags = Path(sys.argv[1]), sys.argv[2:]
    file = greenprune.run.RunFolder(path).structure if path.is_dir() else path
    structure = Structure.from_dict(json.loads(file.read_text()))
    if path.is_dir() and len(units := load_config(greenprune.run.RunFolder(path).config).gate.units) != 1:
        sys.exit(f"{path}: gate.units {list(units)} cannot be exchanged at random; expected a run of one kind")
    # A block of whose channels none is left goes as a whole, in a run of channels too.
    unit = "block" if all(removal.channels is None for removal in structure.removed()) else "channel"
    seed = parse_config(flags).seed

    class RandomTrainer(Trainer):
        """A trainer whose policy is random."""

        def _new_policy(self) -> GatePolicy:
            policy = super()._new_policy()
            policy.__class__ = RandomPolicy
            assert isinstance(policy, RandomPolicy)
            policy.schedule, policy.seed = structure, seed
            return policy

    greenprune.run.Trainer = RandomTrainer  # type: ignore[misc]
    flags += ["--gate.units", f"[{unit}]", "--gate.kind", "static", "--gate.lr", STILL]
    return run_command(flags, os.environ, prog="random_removal.py")


if __name__ == "__main__":
    sys.exit(main())
