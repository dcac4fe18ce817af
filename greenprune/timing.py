"""Time a training step takes, without making the device wait for the clock."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field


@dataclass
class StepTimes:
    """Seconds a step, averaged between two reads of the device, before the first and after the last removal."""

    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    removed: bool = False

    def add(self, seconds: float) -> None:
        """Add one interval's average."""
        (self.after if self.removed else self.before).append(seconds)

    def cut(self) -> None:
        """A removal happened: what was timed after an earlier one no longer counts."""
        self.removed = True
        self.after.clear()

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
