"""What one process of a run uses of its machine."""

from __future__ import annotations

import psutil

NAMES = ("memory_mib", "cpu_percent", "device_memory_mib")
"""Names of the figures of one process, in the order of :meth:`ProcessLoad.read`."""

MOST_RANKS = 64
"""Ranks whose figures are recorded; of larger runs the first ones, so that an event stays short."""


class ProcessLoad:
    """Reads this process's use of memory and processor, each time since the last reading."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first reading is the reference of the next

    def read(self, device_memory: int) -> list[float]:
        """Resident memory in MiB, processor use in percent of one core, and memory on the device in MiB.

        Args:
            device_memory: Bytes that the process holds on its device.
        """
        with self._process.oneshot():
            return [self._process.memory_info().rss / 2**20, self._process.cpu_percent(), device_memory / 2**20]

    def among(self, rank: int, world_size: int, device_memory: int) -> list[float]:
        """This process's figures in its place among those of all ranks, which are zero: their sum has all of them."""
        figures = [0.0] * (len(NAMES) * min(world_size, MOST_RANKS))
        if rank < MOST_RANKS:
            figures[len(NAMES) * rank : len(NAMES) * (rank + 1)] = self.read(device_memory)
        return figures


def by_rank(figures: list[float]) -> dict[str, float]:
    """The figures of all ranks, one after the other, by the names that events have for them."""
    count = len(NAMES)
    return {
        f"process/rank{place // count}/{NAMES[place % count]}": round(figure, 1)
        for place, figure in enumerate(figures)
        if NAMES[place % count] != "device_memory_mib" or figure > 0  # unknown, or a CPU, which has none of its own
    }
