"""CPU packages and their memory, from a powercap tree in a temporary folder: a stand-in for Linux's."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from fake_powercap import Powercap

from greenprune.energy import MeterUnavailable
from greenprune.energy.meter import Meter
from greenprune.energy.rapl import open_rapl


def set_j(counter: Path, joules: float) -> None:
    # In place, as the kernel shows it: the meter keeps the file open.
    with counter.open("r+") as file:
        file.truncate()
        file.write(f"{int(joules * 1e6)}\n")


def test_packages_and_their_memory_are_devices_and_nothing_counts_twice(powercap: Any) -> None:
    package0 = powercap.zone("intel-rapl:0", "package-0", 1_000_000)
    core = powercap.zone("intel-rapl:0:0", "core", 0)
    uncore = powercap.zone("intel-rapl:0:1", "uncore", 0)
    dram0 = powercap.zone("intel-rapl:0:2", "dram", 500_000)
    package1 = powercap.zone("intel-rapl:1", "package-1", 0)
    psys = powercap.zone("intel-rapl:2", "psys", 0)
    mirror = powercap.zone("intel-rapl-mmio:0", "package-0", 0)
    with Meter(open_rapl(powercap.root)) as meter:
        set_j(package0, 11)
        set_j(package1, 20)
        set_j(dram0, 3.5)
        for counted_elsewhere in (core, uncore, psys, mirror):
            set_j(counted_elsewhere, 1000)
        measured = meter.total()
    assert {reading.device: reading.joules for reading in measured.readings} == {
        "cpu:package-0": 10,
        "dram:package-0": 3,
        "cpu:package-1": 20,
    }
    assert measured.energy_j == 33
    assert measured.quality == "counter"


def test_a_counter_that_wraps_goes_on_from_its_range(powercap: Any) -> None:
    package = powercap.zone("intel-rapl:0", "package-0", 262_143_000_000, max_uj=262_143_328_850)
    with Meter(open_rapl(powercap.root)) as meter:
        set_j(package, 5)
        assert meter.total().energy_j == pytest.approx(0.328850 + 5)


def test_a_restart_is_not_taken_for_a_wrap(powercap: Any) -> None:
    """After a suspend the counter starts from zero: as a wrap that would be 162 kJ that nobody took."""
    package = powercap.zone("intel-rapl:0", "package-0", 100_000_000_000, max_uj=262_143_328_850)
    with Meter(open_rapl(powercap.root)) as meter:
        set_j(package, 100_050)
        with meter.window("train") as window:
            set_j(package, 30)
        (reading,) = window.measurement.readings
        total = meter.total()
    assert reading.joules == 30
    assert not reading.complete
    assert "restarted" in str(reading.reason)
    assert total.energy_j == 50 + 30
    assert not total.complete


def test_wraps_between_two_reads_are_seen_by_the_sampling_thread(powercap: Any) -> None:
    package = powercap.zone("intel-rapl:0", "package-0", 0, max_uj=100_000_000)
    sources = open_rapl(powercap.root)
    with Meter(sources, interval_s=60) as meter:
        assert meter._thread is not None
        for joules in (60, 10, 80, 30):
            set_j(package, joules)
            sources[0].poll()
        assert meter.total().energy_j == 60 + 50 + 70 + 50


def test_wraps_are_seen_however_seldom_samples_are_taken(powercap: Any) -> None:
    package = powercap.zone("intel-rapl:0", "package-0", 0, max_uj=1_000_000_000)  # 5 kW wrap it in 0.2 s
    with Meter(open_rapl(powercap.root), interval_s=3600) as meter:
        for joules in (600, 200, 800, 400):
            set_j(package, joules)
            time.sleep(0.2)
        measured = meter.total()
    assert measured.energy_j == 600 + 600 + 600 + 600
    assert measured.complete


def test_counters_that_only_root_may_read_are_unavailable_with_advice() -> None:
    # Not below tmp_path, which only its owner may enter: root becomes another user here.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        Powercap(root).zone("intel-rapl:0", "package-0", 0).chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(MeterUnavailable, match="Permission denied") as caught:
                open_rapl(root)
        finally:
            os.seteuid(user)
    assert "chmod" in caught.value.advice


@pytest.mark.parametrize("content", ["", "masked\n"])
def test_a_counter_without_a_number_is_unavailable(powercap: Any, content: str) -> None:
    powercap.zone("intel-rapl:0", "package-0", 0).write_text(content)
    with pytest.raises(MeterUnavailable, match="no number"):
        open_rapl(powercap.root)


def test_a_machine_without_rapl_is_unavailable_with_advice(powercap: Any) -> None:
    with pytest.raises(MeterUnavailable, match="no RAPL counters"):
        open_rapl(powercap.root)
    powercap.zone("intel-rapl:0", "psys", 0)
    with pytest.raises(MeterUnavailable, match="no CPU package"):
        open_rapl(powercap.root)


def test_a_tree_of_which_one_counter_is_of_no_use_leaves_no_file_open(powercap: Any) -> None:
    powercap.zone("intel-rapl:0", "package-0", 0)
    powercap.zone("intel-rapl:1", "package-1", 0).write_text("masked\n")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MeterUnavailable, match="no number"):
        open_rapl(powercap.root)
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_releases_the_files(powercap: Any) -> None:
    powercap.zone("intel-rapl:0", "package-0", 0)
    powercap.zone("intel-rapl:0:0", "dram", 0)
    before = len(os.listdir("/proc/self/fd"))
    meter = Meter(open_rapl(powercap.root))
    assert len(os.listdir("/proc/self/fd")) == before + 2
    meter.close()
    assert len(os.listdir("/proc/self/fd")) == before
