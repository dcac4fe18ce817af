"""The meter on real GPUs, each test with the GPU to itself: nothing may run beside them.

Run with: python -m pytest -m gpu tests/gpu/test_metering.py (and pip install zeus for the peer).
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest
import torch
from torchvision.models import resnet50

from greenprune.energy import Meter, open_meter, visible_gpu_uuids
from greenprune.models import CifarResNet, convert_blocks
from greenprune.unit_cost import measure_unit_cost

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from launching import TRAIN, run

pytestmark = pytest.mark.gpu

WARM_UP_S = 3.0  # the driver's power is a mean over the last second, and clocks settle
STEADY_S = 8.0


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    assert torch.cuda.is_available(), "the gpu tests were asked for, but there is no GPU"


@pytest.fixture
def uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


@pytest.fixture
def meter(uuid: str) -> Iterator[Meter]:
    with open_meter(gpu_uuids=[uuid], host=False, synchronize=torch.cuda.synchronize) as meter:
        yield meter


def work(seconds: float) -> None:
    """A steady load; the queue is kept short, so that it ends in time."""
    left = torch.randn(4096, 4096, device="cuda")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(20):
            left = torch.nn.functional.normalize(left @ left)
        torch.cuda.synchronize()


class SampledPower:
    """Joules of a GPU by trapezoids over power samples every 20 ms, taken apart from the meter's code."""

    def __init__(self, uuid: str) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        self._stop = threading.Event()
        self._samples: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while True:
            self._samples.append((time.perf_counter(), pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000))
            if self._stop.wait(0.02):
                return

    def __enter__(self) -> SampledPower:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        pynvml.nvmlShutdown()

    @property
    def energy_j(self) -> float:
        pairs = itertools.pairwise(self._samples)
        return sum((end_s - start_s) * (start_w + end_w) / 2 for (start_s, start_w), (end_s, end_w) in pairs)


def test_a_steady_load_takes_by_the_counter_what_its_power_adds_up_to(meter: Meter, uuid: str) -> None:
    work(WARM_UP_S)
    with meter.window("train") as window, SampledPower(uuid) as sampled:
        work(STEADY_S)
    (reading,) = window.measurement.readings
    print(f"{reading.model}: counter {reading.joules:.1f} J ± {reading.bound_j:.1f}, power {sampled.energy_j:.1f} J")
    assert reading.quality == "counter"
    assert reading.complete
    assert reading.joules == pytest.approx(sampled.energy_j, rel=0.05, abs=reading.bound_j)


def test_zeus_agrees_over_the_same_seconds(meter: Meter) -> None:
    monitors = pytest.importorskip("zeus.monitor", reason="pip install zeus")
    monitor = monitors.ZeusMonitor(gpu_indices=[0])
    work(WARM_UP_S)
    with meter.window("train") as window:
        monitor.begin_window("train")
        work(STEADY_S)
        theirs = monitor.end_window("train")
    (reading,) = window.measurement.readings
    print(f"ours {reading.joules:.1f} J, Zeus {theirs.total_energy:.1f} J")
    assert reading.joules == pytest.approx(theirs.total_energy, rel=0.01, abs=2 * reading.bound_j)


def test_the_counter_moves_as_often_as_the_bound_takes_for_granted(meter: Meter, uuid: str) -> None:
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    moved, last = [], pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    end = time.perf_counter() + 5
    while time.perf_counter() < end:
        value = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        if value != last:
            moved.append(time.perf_counter())
            last = value
    pynvml.nvmlShutdown()
    periods = sorted(later - earlier for earlier, later in itertools.pairwise(moved))
    print(f"period: median {1e3 * periods[len(periods) // 2]:.1f} ms, longest {1e3 * periods[-1]:.1f} ms")
    source = meter._sources[0]
    assert source.period_s is not None
    assert periods[len(periods) // 2] <= 1.2 * source.period_s


def test_phases_add_up_to_the_total(meter: Meter) -> None:
    for _ in range(3):
        with meter.window("train"):
            work(0.5)
        with meter.window("eval"):
            work(0.3)
    total = meter.total()
    phases = meter.by_phase()
    assert total.energy_j is not None
    assert total.bound_j is not None
    assert abs(sum(phase.energy_j or 0.0 for phase in phases.values()) - total.energy_j) <= total.bound_j


def test_a_busy_gpu_takes_more_than_a_resting_one(meter: Meter) -> None:
    with meter.window("idle GPU") as resting:
        time.sleep(3)
    with meter.window("busy GPU") as busy:
        work(3)
    resting_w = (resting.measurement.energy_j or 0.0) / resting.measurement.seconds
    busy_w = (busy.measurement.energy_j or 0.0) / busy.measurement.seconds
    print(f"resting {resting_w:.0f} W, busy {busy_w:.0f} W")
    assert 0 < resting_w < busy_w
    assert busy_w <= 1.1 * (meter._sources[0].limit_w or float("inf"))


@pytest.mark.parametrize("order", ["as it is", "reversed", "one UUID"])
def test_visible_gpus_are_those_that_torch_sees(order: str) -> None:
    everything = visible_gpu_uuids(None)
    masks = {
        "as it is": ",".join(str(index) for index in range(len(everything))),
        "reversed": ",".join(str(index) for index in reversed(range(len(everything)))),
        "one UUID": everything[-1],
    }
    program = (
        "import json, torch\n"
        "count = torch.cuda.device_count()\n"
        "print(json.dumps([f'GPU-{torch.cuda.get_device_properties(i).uuid}' for i in range(count)]))"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": masks[order], "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert visible_gpu_uuids(masks[order]) == json.loads(done.stdout)


def test_a_command_is_measured_on_the_gpu(uuid: str) -> None:
    program = (
        "import torch\n"
        "x = torch.randn(4096, 4096, device='cuda')\n"
        "for _ in range(300): x = (x @ x) / 4096\n"
        "print(x.sum().item(), file=__import__('sys').stderr)"
    )
    command = [sys.executable, "-m", "greenprune.energy", "--json", "--", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    devices = {device["device"]: device for device in json.loads(done.stdout)["devices"]}
    assert devices[uuid]["quality"] == "counter"
    assert devices[uuid]["energy_j"] > 0
    assert devices[uuid]["model"] == torch.cuda.get_device_name(0)


def test_blocks_are_measured_as_steps_are_done() -> None:
    """Recorded, not launch by launch: the host takes as long to start a block of the last stage as one of the first."""
    batch = torch.randn(512, 3, 32, 32, device="cuda")
    launched = measure_unit_cost("time", CifarResNet(20, 10), batch)
    recorded = measure_unit_cost("time", CifarResNet(20, 10), batch, recorded=True)
    print({name: round(1e6 * seconds) for name, seconds in recorded.blocks.items()})
    assert recorded.whole < launched.whole
    assert recorded.blocks["stages.0.1"] == recorded.blocks["stages.0.2"] > recorded.blocks["stages.2.1"] > 0


def test_the_time_of_large_blocks_is_measured_recorded_and_leaves_the_memory() -> None:
    """A ResNet-50 in batches of 64 at 224 x 224: all passes of a turn share the memory of one recording."""
    model = resnet50()
    convert_blocks(model)
    batch = torch.randn(64, 3, 224, 224, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    cost = measure_unit_cost("time", model, batch, recorded=True)
    assert len(cost.blocks) == 16
    assert all(0 < seconds < cost.whole for seconds in cost.blocks.values())
    assert sum(cost.blocks.values()) == pytest.approx(cost.whole, rel=0.3)
    print(f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, whole {1e3 * cost.whole:.1f} ms")
    del cost
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before < 2**20


def test_a_run_is_steered_by_the_joules_that_the_gpu_counts(tmp_path: Path) -> None:
    args = ["--model.name", "resnet20", "--model.channels_last", "true", "--data.name", "digits", "--optim.epochs", "6"]
    args += ["--budget.unit", "energy", "--budget.target", "0.7", "--output_dir", str(tmp_path), "--run_name", "run"]
    done = run(TRAIN, args, CUDA_VISIBLE_DEVICES=os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    start = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    joules = start["unit_cost"]
    # Hundreds of watts for milliseconds, and no block without any.
    assert 0.01 < joules["whole"] < 100
    assert all(0 < block < joules["whole"] for block in joules["blocks"].values())
    assert summary["kept_cost"] <= 0.7
