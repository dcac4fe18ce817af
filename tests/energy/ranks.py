"""Several ranks of one node, each with a meter of its share: a program that test_truth.py runs over the stand-in.

    python ranks.py '{"masks": ["0,1", "1,0"], "interval_s": 0.02, "windows": [["train", 0.5]]}'

Ranks are forked before anything is initialized, as a launcher would start them, and tell each other what they see.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from greenprune.energy import Measurement, node_id, open_meter, share_devices, visible_gpu_uuids


def plain(measured: Measurement) -> dict[str, Any]:
    return {
        "seconds": measured.seconds,
        "joules": {reading.device: reading.joules for reading in measured.readings},
        "bound_j": {reading.device: reading.bound_j for reading in measured.readings},
    }


class Edge:
    """Between which two moments a meter was read: on a busy machine that may be a while."""

    def __init__(self) -> None:
        self.before_s = self.after_s = time.monotonic()

    def passed(self) -> None:
        self.after_s = time.monotonic()

    @property
    def vague_s(self) -> float:
        return self.after_s - self.before_s


def rank(index: int, parent: Connection, mask: str | None, interval_s: float, windows: list[list[Any]]) -> None:
    uuids = visible_gpu_uuids(mask)
    parent.send((node_id(), uuids))
    share = share_devices(index, parent.recv())
    measured = []
    opened = Edge()
    with open_meter(gpu_uuids=share.gpu_uuids, host=False, interval_s=interval_s) as meter:
        opened.passed()
        for name, seconds in windows:
            first = Edge()
            with meter.window(name) as window:
                first.passed()
                time.sleep(seconds)
                last = Edge()
            last.passed()
            times = {"began_s": first.after_s, "vague_s": first.vague_s + last.vague_s}
            measured.append({"name": name, **times, **plain(window.measurement)})
        last = Edge()
        total = plain(meter.total())
        last.passed()
        total |= {"began_s": opened.after_s, "vague_s": opened.vague_s + last.vague_s}
    phases = {name: plain(phase) for name, phase in meter.by_phase().items()}
    total["joules_of_closed"] = plain(meter.total())["joules"]  # nothing moves any more from one reading to another
    parent.send({"host": share.host, "sees": uuids, "windows": measured, "total": total, "phases": phases})


def main() -> None:
    options = json.loads(sys.argv[1])
    context = multiprocessing.get_context("fork")
    ends, processes = [], []
    for index, mask in enumerate(options["masks"]):
        mine, theirs = context.Pipe()
        process = context.Process(target=rank, args=(index, theirs, mask, options["interval_s"], options["windows"]))
        process.start()
        ends.append(mine)
        processes.append(process)
    claims = [end.recv() for end in ends]
    for end in ends:
        end.send(claims)
    print(json.dumps([end.recv() for end in ends]))
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
