"""Time a training step takes, without making the device wait for the clock."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, field

_MOST_KEPT = 4096  # their median lies a hundredth of the ranks off or so (our choice)


@dataclass
class StepTimes:
    """Seconds a step, averaged between two reads of the device, before the first and after the last removal.

    Of more than some thousand it keeps a sample in which each is as likely to be as any other.

    Attributes:
        before: Those before the first removal.
        after: Those after the last one.
        removed: Whether there was a removal.
        seen: How many there were since the last removal, or the beginning.
    """

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    removed: bool = False
    seen: int = 0

    def __post_init__(self) -> None:
        self.seen = max(self.seen, len(self._kept))  # older checkpoints keep all and do not tell how many

    @property
    def _kept(self) -> list[float]:
        return self.after if self.removed else self.before

    def add(self, seconds: float) -> None:
        """Add one interval's average."""
        self.seen += 1
        if len(self._kept) < _MOST_KEPT:
            self._kept.append(seconds)
            return
        # By chance, for reports come in rhythms: every so many-th may be an epoch's last, of fewer steps. The number is
        # the seed, so that nothing else that draws is disturbed and a run that goes on draws the same.
        place = random.Random(self.seen).randrange(self.seen)
        if place < len(self._kept):
            self._kept[place] = seconds

    def cut(self) -> None:
        """A removal happened: what was timed after an earlier one no longer counts."""
        self.removed = True
        self.after.clear()
        self.seen = 0

    def medians(self) -> dict[str, float | None]:
        """Median seconds a step, ``before`` the first and ``after`` the last removal; None where there is none."""
        return {
            "before": statistics.median(self.before) if self.before else None,
            "after": statistics.median(self.after) if self.after else None,
        }


class IntervalClock:
    """Time a step since the last read of the device."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin the next interval."""
        self.started = time.perf_counter()
        self.steps = 0

    def seconds_per_step(self) -> float:
        """Average over the interval; the device must have been read just now."""
        return (time.perf_counter() - self.started) / max(1, self.steps)
