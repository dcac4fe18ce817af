"""One rank under one meter: what meters.py starts, with the Python of the meter's own environment.

    python benchmarks/meter_rank.py TOOL '{"rank": 0, "ranks": 2, "folder": "...", "begin_s": 12.5, "end_s": 18.5}'

All ranks wait for the same moment, measure until the same moment, and print what their meter says as JSON. TOOL is
ours, zeus, zeus-own (told which GPU is this rank's) or codecarbon.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def wait_until(time_s: float) -> None:
    time.sleep(max(0.0, time_s - time.monotonic()))


def exchange(options: dict, mine: object) -> list:
    """What every rank has to say, through files; a training run has its engine for that."""
    folder = Path(options["folder"])
    path = folder / f"claim-{options['rank']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(mine))
    path.with_suffix(".tmp").rename(path)
    paths = [folder / f"claim-{rank}.json" for rank in range(options["ranks"])]
    while not all(path.exists() for path in paths):
        time.sleep(0.01)
    return [json.loads(path.read_text()) for path in paths]


def ours(options: dict) -> dict:
    from greenprune.energy import MeterUnavailable, node_id, open_meter, share_devices, visible_gpu_uuids

    try:
        uuids = visible_gpu_uuids(os.environ.get("CUDA_VISIBLE_DEVICES"))
    except MeterUnavailable as error:
        return {"gpu_j": None, "host_j": None, "says": str(error)}
    if options["ranks"] > 1:
        uuids = uuids[options["rank"] : options["rank"] + 1]  # the GPU that this rank trains on
    share = share_devices(options["rank"], exchange(options, (node_id(), uuids)))
    with open_meter(gpu_uuids=share.gpu_uuids, host=share.host, interval_s=0.1) as meter:
        wait_until(options["begin_s"])
        with meter.window("train") as window:
            wait_until(options["end_s"])
        readings = window.measurement.readings
        notes = [reading.reason for reading in readings if reading.reason]
        gpus = [reading for reading in readings if reading.device.startswith("GPU-")]
        known = [reading.joules for reading in gpus if reading.joules is not None]
        hosts = [reading.joules for reading in readings if not reading.device.startswith("GPU-")]
    return {
        "gpu_j": sum(known) if known or not gpus else None,
        "bound_j": sum(reading.bound_j or 0 for reading in gpus),
        "host_j": sum(hosts) if hosts else 0.0,
        "says": "; ".join(notes),
    }


def zeus(options: dict, own: bool) -> dict:
    from zeus.monitor import ZeusMonitor

    monitor = ZeusMonitor(gpu_indices=[options["rank"]] if own else None)
    exchange(options, None)
    wait_until(options["begin_s"])
    monitor.begin_window("train", sync_execution=False)
    wait_until(options["end_s"])
    measured = monitor.end_window("train", sync_execution=False)
    if not measured.gpu_energy:
        return {"gpu_j": None, "host_j": None, "says": "an empty dictionary"}
    return {"gpu_j": sum(measured.gpu_energy.values()), "host_j": None, "says": ""}


def codecarbon(options: dict) -> dict:
    import logging

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code="FRA", output_methods=[], allow_multiple_runs=True, log_level="critical"
    )
    tracker.start_task("setting up")  # the first start looks for the hardware, for seconds
    tracker.stop_task("setting up")
    exchange(options, None)
    wait_until(options["begin_s"])
    tracker.start_task("train")
    wait_until(options["end_s"])
    data = tracker.stop_task("train")
    return {
        "gpu_j": 3.6e6 * data.gpu_energy,
        "host_j": 3.6e6 * (data.cpu_energy + data.ram_energy),
        "seconds": data.duration,
        "says": "",
    }


def main() -> None:
    tool, options = sys.argv[1], json.loads(sys.argv[2])
    if tool == "ours":
        found = ours(options)
    elif tool == "codecarbon":
        found = codecarbon(options)
    else:
        found = zeus(options, own=tool == "zeus-own")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
