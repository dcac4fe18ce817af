"""GPUs through the real pynvml, over a stand-in for the driver's library (nvml_stub.c): no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RunNvml = Callable[[str, str], Any]

A, B, C = "GPU-aaaaaaaa-1111", "GPU-aabbbbbb-2222", "GPU-cccccccc-3333"
INSTANCE = "MIG-99999999-4444"
THREE = f"uuid={A};uuid={B};uuid={C} mig=1 instance={INSTANCE}"

METER = """
from greenprune.energy import open_meter
def measure(meter, seconds=1.0):
    with meter.window("train") as window:
        time.sleep(seconds)
    measured = window.measurement
    return {"seconds": measured.seconds, "energy_j": measured.energy_j, "quality": measured.quality,
            "joules": [r.joules for r in measured.readings], "reasons": [r.reason for r in measured.readings],
            "devices": [r.device for r in measured.readings], "notes": meter.notes}
"""


@pytest.mark.parametrize(("fields", "quality"), [("counter=1", "counter"), ("counter=0", "integrated power")])
def test_200_watts_for_a_second_are_200_joules(with_nvml: RunNvml, fields: str, quality: str) -> None:
    code = f"""{METER}
with open_meter(gpu_uuids=["{A}"], host=False, interval_s=0.1) as meter:
    result = measure(meter)
    result["power_w"] = meter.power_w()
"""
    result = with_nvml(f"uuid={A} watts=200 {fields}", code)
    assert result["energy_j"] == pytest.approx(200 * result["seconds"], rel=0.02)
    assert result["seconds"] == pytest.approx(1, rel=0.5)
    assert result["power_w"] == pytest.approx(200, rel=0.02)
    assert result["quality"] == quality
    assert len(result["notes"]) == (quality != "counter")


@pytest.mark.parametrize("counter", [0, 1])
def test_a_change_of_power_is_seen(with_nvml: RunNvml, counter: int) -> None:
    code = f"""{METER}
with open_meter(gpu_uuids=["{A}"], host=False, interval_s=0.02) as meter:
    result = measure(meter, 0.8)
"""
    # 400 W for 0.4 s after the library was initialized, then 50 W.
    result = with_nvml(f"uuid={A} watts=400 to=50 at=0.4 counter={counter}", code)
    expected_j = 400 * 0.4 + 50 * (result["seconds"] - 0.4)
    assert result["energy_j"] == pytest.approx(expected_j, rel=0.15)


def test_two_gpus_are_read_each_once(with_nvml: RunNvml) -> None:
    code = f"""{METER}
import ctypes
bare = "{B}".removeprefix("GPU-")  # As torch.cuda.get_device_properties gives it.
meter = open_meter(gpu_uuids=["{A}", "{B}", "{A}"], host=False)
result = measure(meter, 0.3)
meter.close()
with open_meter(gpu_uuids=[bare], host=False) as meter:
    result["bare"] = meter.total().readings[0].joules
result["phases_j"], result["total_j"] = sum(meter.by_phase_j().values()), meter.total().energy_j
result["users"] = ctypes.CDLL("libnvidia-ml.so.1").stub_users()
"""
    result = with_nvml(f"uuid={A} watts=100;uuid={B} watts=300 counter=0;uuid={C}", code)
    assert result["devices"] == [A, B]
    assert result["joules"][0] == pytest.approx(100 * result["seconds"], rel=0.05)
    assert result["joules"][1] == pytest.approx(300 * result["seconds"], rel=0.05)
    assert result["phases_j"] == pytest.approx(result["total_j"], rel=1e-12)
    assert result["bare"] is not None
    assert result["users"] == 0, "every nvmlInit has its nvmlShutdown"


def test_a_counter_that_the_driver_restarts_gives_no_negative_joules(with_nvml: RunNvml) -> None:
    code = f"""{METER}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    result = measure(meter, 0.6)
"""
    result = with_nvml(f"uuid={A} watts=200 restart=0.3", code)
    # Counted from the restart on; the 0.3 s before it were not read in time.
    assert result["energy_j"] == pytest.approx(200 * (result["seconds"] - 0.3), rel=0.3)
    assert "restarted" in result["reasons"][0]
    assert "restarted" in result["notes"][0]


@pytest.mark.parametrize("counter", [0, 1])
def test_a_gpu_that_is_lost_stops_nothing(with_nvml: RunNvml, counter: int) -> None:
    code = f"""{METER}
with open_meter(gpu_uuids=["{A}", "{B}"], host=False, interval_s=0.05) as meter:
    time.sleep(0.35)
    result = measure(meter, 0.2)
"""
    result = with_nvml(f"uuid={A} lost=0.3 counter={counter};uuid={B}", code)
    assert result["joules"][0] is None
    assert "GPU is lost" in result["reasons"][0]
    assert result["energy_j"] == pytest.approx(100 * result["seconds"], rel=0.1)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [A, B, C]),
        ("", []),
        (" ", []),
        ("0", [A]),
        ("2,0", [C, A]),
        (" 1 , 2 ", [B, C]),
        ("-1", []),
        ("1,-1,0", [B]),
        ("0,7,1", [A]),
        ("0,nonsense,1", [A]),
        ("1,1", []),
        (B, [B]),
        (f"{C},{A}", [C, A]),
        ("GPU-aab,GPU-c", [B, C]),
        ("GPU-aa", []),
        ("GPU-c,GPU-aa,GPU-aab", [C]),
        ("GPU-dead", []),
        ("0,GPU-c", [A, C]),
        (INSTANCE, [C]),
        (f"{INSTANCE},{INSTANCE}", [C]),
        (f"MIG-{C}/1/0,MIG-{C}/2/0", [C]),
        ("MIG-unknown", []),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    visible: str | None, expected: list[str], resolved: dict[str | None, list[str]]
) -> None:
    assert resolved[visible] == expected


@pytest.fixture(scope="module")
def resolved(nvml_stub: Path, run_python: Callable[[str, dict[str, str]], Any]) -> dict[str | None, list[str]]:
    """All forms in one process, which takes a fraction of a second."""
    marks = test_visible_devices_are_read_as_cuda_reads_them.pytestmark  # type: ignore[attr-defined]
    forms = [form for form, _ in marks[0].args[1]]
    code = f"""
from greenprune.energy import visible_gpu_uuids
result = [visible_gpu_uuids(form) for form in {forms!r}]
"""
    environment = {"LD_LIBRARY_PATH": str(nvml_stub), "NVML_STUB": THREE}
    return dict(zip(forms, run_python(code, environment), strict=True))


def test_a_divided_gpu_is_unknown_rather_than_wrong(with_nvml: RunNvml) -> None:
    code = f"""{METER}
from greenprune.energy import visible_gpu_uuids
with open_meter(gpu_uuids=visible_gpu_uuids("{INSTANCE}"), host=False) as meter:
    result = measure(meter, 0.01)
"""
    result = with_nvml(THREE, code)
    assert (result["devices"], result["joules"], result["energy_j"]) == ([C], [None], None)
    assert "MIG" in result["reasons"][0]
    assert "MIG" in result["notes"][0]


@pytest.mark.parametrize(
    ("scenario", "reason"),
    [
        ("", "Driver Not Loaded"),
        (f"uuid={B}", "Not Found"),
        (f"uuid={A} counter=0 power=0", "Not Supported"),
    ],
)
def test_a_gpu_that_cannot_be_read_is_a_note(with_nvml: RunNvml, scenario: str, reason: str) -> None:
    code = f"""{METER}
import ctypes
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    result = measure(meter, 0.01)
result["users"] = ctypes.CDLL("libnvidia-ml.so.1").stub_users()
"""
    result = with_nvml(scenario, code)
    assert result["energy_j"] is None
    assert reason in result["notes"][0]
    assert result["users"] == 0


def test_without_the_library_there_is_advice_and_no_crash(
    run_python: Callable[[str, dict[str, str]], Any], tmp_path: Path
) -> None:
    # An empty file is found first and cannot be loaded, also on a machine that has the library.
    (tmp_path / "libnvidia-ml.so.1").touch()
    code = f"""{METER}
from greenprune.energy import MeterUnavailable, describe_sources, visible_gpu_uuids
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    result = measure(meter, 0.01)
try:
    visible_gpu_uuids("0")
except MeterUnavailable as error:
    result["advice"] = error.advice
result["none"] = visible_gpu_uuids("")
result["row"] = [row.why_not for row in describe_sources() if row.device == "gpu"]
"""
    result = run_python(code, {"LD_LIBRARY_PATH": str(tmp_path)})
    assert result["energy_j"] is None
    assert "Library Not Found" in result["notes"][0]
    assert "install the NVIDIA driver" in result["advice"]
    assert result["none"] == []
    assert "Library Not Found" in result["row"][0]


def test_sources_are_described_for_people(with_nvml: RunNvml) -> None:
    code = """
from greenprune.energy import describe_sources
result = [[row.device, row.quality, row.why_not, row.advice] for row in describe_sources()]
"""
    rows = with_nvml(THREE.replace(f"uuid={B}", f"uuid={B} counter=0"), code)
    assert rows[0] == [A, "counter", None, None]
    assert rows[1][:2] == [B, "integrated power"]
    assert rows[2][:2] == [C, None]
    assert "MIG" in rows[2][2]
    assert any(row[0].startswith("cpu") for row in rows)
    assert any(row[0].startswith("dram") for row in rows)


def test_a_window_edge_costs_a_fraction_of_a_millisecond(with_nvml: RunNvml) -> None:
    code = f"""
import statistics
from greenprune.energy import open_meter
def edges_us(meter, count, pause_s):
    costs = []
    for _ in range(count):
        time.sleep(pause_s)
        before = time.perf_counter()
        with meter.window("train"):
            costs.append(time.perf_counter() - before)
    return 1e6 * statistics.median(costs)
result = []
for gpus, host in ((["{A}"], False), (["{A}", "{B}"], False), (["{A}"], True)):
    with open_meter(gpu_uuids=gpus, host=host) as meter:
        result.append([edges_us(meter, 2000, 0), edges_us(meter, 5, 0.12)])
"""
    result = with_nvml(f"uuid={A};uuid={B} counter=0", code)
    for what, (steady_us, paused_us) in zip(
        ("counter", "counter and power samples", "counter and CodeCarbon's estimate"), result, strict=True
    ):
        print(f"{what}: {steady_us:.0f} us an edge, {paused_us:.0f} us after a pause")
        assert steady_us < 1000
        assert paused_us < 2000
