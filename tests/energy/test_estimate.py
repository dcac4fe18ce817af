"""CodeCarbon's estimates, with the real CodeCarbon on the real machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from greenprune.energy import open_meter
from greenprune.energy.estimate import open_cpu_estimate, open_ram_estimate, tabulated_power_w
from greenprune.energy.meter import Meter

KNOWN = "Intel(R) Xeon(R) Platinum 8480+"


def full_power_w() -> float:
    from codecarbon.core.util import count_physical_cpus

    return 350.0 * int(count_physical_cpus())


def burn(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_the_cpu_is_known_by_codecarbons_own_table() -> None:
    from codecarbon.core.cpu import TDP

    tdp = TDP()
    for model in (
        KNOWN,
        "AMD EPYC 9654 96-Core Processor",
        "Intel(R) Core(TM) i7-8750H CPU @ 2.20GHz",
        "a CPU that nobody makes",
        "AMD EPYC",
    ):
        assert tabulated_power_w(model) == tdp._get_cpu_power_from_registry(model), model
    assert tabulated_power_w(KNOWN) == 350


def test_an_unknown_cpu_is_taken_for_4_watts_a_thread_and_says_so() -> None:
    source = open_cpu_estimate("a CPU that nobody makes")
    assert source.name == (
        f"CodeCarbon: load of {4 * psutil.cpu_count():g} W (guessed: a CPU that nobody makes is not in its table)"
    )


def test_a_load_that_cannot_be_read_for_a_moment_is_a_gap_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a program has all files open that it may: neither the run nor the sampling of counters stops by it."""

    def fail(*_: object, **__: object) -> float:
        raise OSError(24, "Too many open files", "/proc/stat")

    with Meter([open_cpu_estimate(KNOWN)], interval_s=0.02) as meter:
        with monkeypatch.context() as patched, meter.window("train") as window:
            patched.setattr(psutil, "cpu_times", fail)
            patched.setattr(psutil, "cpu_percent", fail)  # by which older versions of CodeCarbon go
            time.sleep(0.2)
        assert meter._thread is not None
        assert meter._thread.is_alive()
        time.sleep(0.2)
        total = meter.total()
    (reading,) = window.measurement.readings
    assert not reading.complete
    assert "/proc/stat: Too many open files" in str(reading.reason)
    assert total.energy_j
    assert not total.complete


def test_the_estimate_follows_the_load_of_the_whole_machine() -> None:
    others = multiprocessing.get_context("fork")
    workers = [others.Process(target=burn, args=(1.0,)) for _ in os.sched_getaffinity(0)]
    with Meter([open_cpu_estimate(KNOWN)], interval_s=0.1) as meter:
        for worker in workers:
            worker.start()
        time.sleep(0.2)
        before = psutil.cpu_times()
        with meter.window("busy") as busy:
            time.sleep(0.5)  # Other processes are at work, not this one.
        after = psutil.cpu_times()
        for worker in workers:
            worker.join()
    resting_s = after.idle + after.iowait - before.idle - before.iowait
    passed_s = sum(after) - sum(before) - (after.guest - before.guest) - (after.guest_nice - before.guest_nice)
    load = 1 - resting_s / passed_s
    busy_w = (busy.measurement.energy_j or 0) / busy.measurement.seconds
    assert load > 0
    assert busy_w == pytest.approx(full_power_w() * (0.1 + 0.9 * load**3), rel=0.25)
    assert busy.measurement.quality == "estimate"


def test_idle_takes_a_tenth_of_full_power(tmp_path: Path) -> None:
    """On a machine that does nothing, as its /proc/stat tells: the tests' own cannot be kept idle."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 1000 0 0 0 0 0 0\n")
    source = open_cpu_estimate(KNOWN)
    proc, psutil.PROCFS_PATH = psutil.PROCFS_PATH, str(tmp_path)
    try:
        source.poll()
        with Meter([source], interval_s=60) as meter:
            time.sleep(0.2)
            stat.write_text("cpu  100 0 100 1040 0 0 0 0 0 0\n")
            measured = meter.total()
    finally:
        psutil.PROCFS_PATH = proc
    assert measured.energy_j == pytest.approx(0.1 * full_power_w() * measured.seconds, rel=0.01)


def test_memory_takes_codecarbons_constant_power() -> None:
    from codecarbon.external.ram import RAM

    with Meter([open_ram_estimate({})], interval_s=60) as meter:
        time.sleep(0.1)
        measured = meter.total()
    assert measured.readings[0].device == "dram"
    assert measured.energy_j == pytest.approx(RAM().total_power().W * measured.seconds, rel=0.01)


def test_the_host_is_metered_only_if_asked(tmp_path: Path) -> None:
    with open_meter(gpu_uuids=[], host=False) as meter:
        assert meter.total().readings == ()
        assert meter.notes == ()
    with open_meter(gpu_uuids=[], host=True, powercap=tmp_path) as meter:
        assert [reading.device for reading in meter.total().readings] == ["cpu", "dram"]
        assert len(meter.notes) == 2
        assert all("no RAPL counters" in note for note in meter.notes)


def test_rapl_is_preferred_and_the_estimate_fills_in(powercap: Any) -> None:
    powercap.zone("intel-rapl:0", "package-0", 0)
    with open_meter(gpu_uuids=[], host=True, powercap=powercap.root) as meter:
        qualities = {reading.device: reading.quality for reading in meter.total().readings}
    assert qualities == {"cpu:package-0": "counter", "dram": "estimate"}
    assert len(meter.notes) == 1


@pytest.mark.parametrize(
    ("job", "power_w"),
    [
        ({}, 38),  # the machine's 512 GiB
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "65536"}, 20),  # 64 GiB of it
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "65536", "SLURM_NNODES": "8"}, 20),  # not that of all nodes
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "32"}, 20),
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_GPU": "16384", "SLURM_GPUS_ON_NODE": "4"}, 20),
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "0"}, 38),  # all of the node's
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "4194304"}, 38),  # no more than there is
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "64G"}, 38),  # not a size that Slurm writes
        ({"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "2048"}, 38),
        ({"SLURM_JOB_ID": "7"}, 38),
        ({"SLURM_MEM_PER_NODE": "65536"}, 38),  # a default for jobs, outside of one
    ],
)
def test_a_job_counts_the_memory_that_it_has_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, job: dict[str, str], power_w: float
) -> None:
    sizes_kb = dict.fromkeys(("MemFree", "MemAvailable", "Buffers", "Cached", "Shmem", "Active", "Inactive"), 1024)
    sizes_kb["MemTotal"] = 512 * 2**20
    (tmp_path / "meminfo").write_text("".join(f"{name}: {size} kB\n" for name, size in sizes_kb.items()))
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    assert open_ram_estimate(job).name == f"CodeCarbon: constant {power_w} W"


def test_every_task_of_an_array_is_estimated_alike_and_slurm_is_not_asked(
    run_python: Callable[[str, dict[str, str]], Any], tmp_path: Path
) -> None:
    """The last task has the number of the whole array: Slurm would tell all of its tasks, or hang, or not be there."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho >> {tmp_path}/asked\nexec sleep 5\n")
    scontrol.chmod(0o755)
    code = f"""
from pathlib import Path
from greenprune.energy import open_meter
with open_meter(gpu_uuids=[], host=True, powercap=Path({str(tmp_path)!r})) as meter:
    result = [[reading.device, reading.source] for reading in meter.total().readings]
"""
    memory = {"SLURM_MEM_PER_NODE": "2048", "SLURM_ARRAY_JOB_ID": "42", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    sources = [run_python(code, {**memory, "SLURM_JOB_ID": job}) for job in ("43", "42")]
    assert sources[0] == sources[1]
    assert sources[0][1] == ["dram", "CodeCarbon: constant 10 W"]
    assert not (tmp_path / "asked").exists()


def test_nothing_is_left_behind(run_python: Callable[[str, dict[str, str]], Any], tmp_path: Path) -> None:
    """No file, no thread, no log line, no network, and open within a fraction of a second."""
    code = f"""
import os, socket, sys, threading
os.chdir({str(tmp_path)!r})
def no_network(*args, **options):
    raise AssertionError("network used")
socket.socket.connect = socket.getaddrinfo = no_network
from greenprune.energy import open_meter
start = time.perf_counter()
meter = open_meter(gpu_uuids=[], host=True, interval_s=0.05)
opened_s = time.perf_counter() - start
threads = sorted(thread.name for thread in threading.enumerate())
time.sleep(0.2)
meter.close()
result = [opened_s, threads, "pandas" in sys.modules, threading.active_count()]
"""
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    opened_s, threads, pandas, left = run_python(code, environment)
    assert opened_s < 1.0
    assert threads == ["MainThread", "greenprune-meter"]
    assert not pandas
    assert left == 1
    assert list(tmp_path.iterdir()) == []


def test_codecarbon_is_the_users_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    from codecarbon.core import util

    monkeypatch.setattr(util, "SLURM_JOB_ID", "7")
    open_cpu_estimate(KNOWN)
    open_ram_estimate({})
    assert not logging.getLogger("codecarbon").disabled
    assert util.SLURM_JOB_ID == "7"


def test_a_codecarbon_that_has_changed_inside_leaves_its_device_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from codecarbon.external.ram import RAM

    monkeypatch.delattr(RAM, "_calculate_ram_power")
    with open_meter(gpu_uuids=[], host=True, powercap=tmp_path / "none") as meter:
        burn(0.2)
        rows = {reading.device: reading for reading in meter.total().readings}
    assert rows["dram"].joules is None
    assert "CodeCarbon" in str(rows["dram"].reason)
    assert rows["cpu"].joules
