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

import random
import sys

from other_choice import OtherChoice, train_with

from greenprune.gating import Verdict


class AtRandom(OtherChoice):
    """Chance decides, and the step with it: a run that goes on chooses alike."""

    def blocks(self, left: list[str], steps_done: int) -> list[Verdict]:
        """For each block of the other run one of those that cost as much."""
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

    def order(self) -> list[tuple[str, int]]:
        """All channels: at random within a set, the n-th part of each set before the next of any."""
        chance = random.Random(self.seed)
        places: list[tuple[float, str, int]] = []
        for name, count in sorted(self.costs.channels.items()):
            indices = chance.sample(range(count), count)
            places += [((place + 1) / count, name, index) for place, index in enumerate(indices)]
        return [(name, index) for _, name, index in sorted(places)]


if __name__ == "__main__":
    sys.exit(train_with(AtRandom, "random_removal.py"))
