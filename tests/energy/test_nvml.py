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


def test_indices_of_mixed_models_are_told_to_depend_on_cudas_order(with_nvml: RunNvml) -> None:
    """CUDA numbers the fastest GPU first unless it is told otherwise; NVML does not tell which that is."""
    code = f"""
from greenprune.energy import open_local_meter
def notes(visible, **order):
    return notes_with({{"CUDA_VISIBLE_DEVICES": visible, **order}})
def notes_with(environment):
    with open_local_meter(environment) as meter:
        return [note for note in meter.notes if "CUDA_DEVICE_ORDER" in note]
pci, fastest = {{"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}}, {{"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}}
result = [notes("1"), notes("GPU-c,0", **fastest), notes("1", **pci), notes("{B}"), notes("1,0,2"), notes("")]
result.append(notes_with({{}}))
"""
    told, with_uuid, *clear = with_nvml(f"uuid={A} name=T4;uuid={B} name=H100;uuid={C} name=T4", code)
    assert told == [
        "gpu: CUDA_VISIBLE_DEVICES='1' is read in PCI order, and CUDA may count GPUs of several models (H100, T4) in "
        "another; set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID, to have those metered that are used"
    ]
    assert len(with_uuid) == 1
    assert clear == [[]] * 5
    assert with_nvml(f"uuid={A} name=T4;uuid={B} name=T4;uuid={C} name=T4", code) == [[]] * 7


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


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ("refuses=2", "nvmlDeviceGetTotalEnergyConsumption: Invalid Argument"),
        ("refuses=4", "nvmlDeviceGetTotalEnergyConsumption: Insufficient Permissions"),
        ("refuses=999", "nvmlDeviceGetTotalEnergyConsumption: Unknown Error"),
        ("zero=1", "the energy counter stands at 0"),
        ("counter=0", "the GPU has no energy counter"),
    ],
)
def test_a_counter_that_is_of_no_use_gives_way_to_power(with_nvml: RunNvml, trouble: str, reason: str) -> None:
    code = f"""{METER}
import ctypes
from greenprune.energy import MeterUnavailable, open_counters
with open_meter(gpu_uuids=["{A}"], host=False, interval_s=0.02) as meter:
    result = measure(meter, 0.3)
try:
    open_counters("{A}")
except MeterUnavailable as error:
    result["refused"] = str(error)
result["users"] = ctypes.CDLL("libnvidia-ml.so.1").stub_users()
"""
    result = with_nvml(f"uuid={A} watts=200 {trouble}", code)
    assert result["quality"] == "integrated power"
    assert result["energy_j"] == pytest.approx(200 * result["seconds"], rel=0.05)
    assert result["notes"][0].startswith(f"{A}: integrated power by NVML power samples, because {reason}; ")
    assert result["refused"].startswith(f"{reason}; ")
    assert result["users"] == 0


def test_a_counter_that_starts_from_zero_is_a_counter(with_nvml: RunNvml) -> None:
    """The driver may be loaded as the meter is opened."""
    code = f"""{METER}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    result = measure(meter, 0.3)
"""
    result = with_nvml(f"uuid={A} watts=200 restart=0 period=0.1", code)
    assert (result["quality"], result["notes"]) == ("counter", [])


@pytest.mark.parametrize("code", [2, 4, 999])
def test_only_mig_that_is_on_refuses_a_gpu(with_nvml: RunNvml, code: int) -> None:
    program = f"""{METER}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    result = measure(meter, 0.3)
"""
    result = with_nvml(f"uuid={A} watts=200 mute={code}", program)
    assert (result["quality"], result["notes"]) == ("counter", [])
    assert result["energy_j"] == pytest.approx(200 * result["seconds"], rel=0.05)


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


def test_a_control_group_hides_gpus_from_cuda_and_from_the_meter(with_nvml: RunNvml) -> None:
    """Slurm withholds a GPU: NVML still counts it, CUDA numbers only the others."""
    code = """
from greenprune.energy import describe_sources, visible_gpu_uuids
result = [visible_gpu_uuids(None), visible_gpu_uuids("1"), visible_gpu_uuids("2"), visible_gpu_uuids("GPU-aab"),
          [row.device for row in describe_sources() if row.device.startswith("GPU")]]
"""
    result = with_nvml(f"uuid={A};uuid={B} hidden=1;uuid={C}", code)
    assert result == [[A, C], [C], [], [], [A, C]]


def test_an_instance_that_torch_names_without_saying_so_is_told_as_mig(with_nvml: RunNvml) -> None:
    code = f"""{METER}
with open_meter(gpu_uuids=["{INSTANCE.removeprefix("MIG-")}"], host=False) as meter:
    result = measure(meter, 0.01)
"""
    result = with_nvml(THREE, code)
    assert result["energy_j"] is None
    assert "MIG is on" in result["reasons"][0]


def test_only_a_gpu_with_a_counter_tells_what_a_part_of_a_step_takes(with_nvml: RunNvml) -> None:
    code = f"""
import ctypes
from greenprune.energy import MeterUnavailable, open_counters
(source,) = open_counters("{A}")
before_j = source.read_j()
time.sleep(0.5)
result = [source.device, source.quality, source.read_j() - before_j]
source.close()
try:
    open_counters("{B}")
except MeterUnavailable as error:
    result.append(str(error))
result.append(ctypes.CDLL("libnvidia-ml.so.1").stub_users())
"""
    device, quality, joules, refused, users = with_nvml(f"uuid={A} watts=200;uuid={B} counter=0", code)
    assert (device, quality, users) == (A, "counter", 0)
    assert 50 < joules < 400  # half a second, and up to a period of the counter at each end
    assert refused == "the GPU has no energy counter; GPUs from the Volta generation on have a counter"


def test_nvml_is_initialized_once_and_not_before_it_is_needed(with_nvml: RunNvml, powercap: Any) -> None:
    powercap.zone("intel-rapl:0", "package-0", 0)
    powercap.zone("intel-rapl:0:0", "dram", 0)
    code = f"""
import ctypes
from pathlib import Path
from greenprune.energy import open_local_meter
stub = ctypes.CDLL("libnvidia-ml.so.1")
result = [stub.stub_initializations()]
with open_local_meter({{"CUDA_VISIBLE_DEVICES": "2,0"}}, powercap=Path({str(powercap.root)!r})) as meter:
    with meter.window("train"):
        result.append([reading.device for reading in meter.total().readings])
    result += [stub.stub_initializations(), stub.stub_users()]
result += [stub.stub_initializations(), stub.stub_users()]
"""
    devices = [C, A, "cpu:package-0", "dram:package-0"]
    assert with_nvml(f"uuid={A};uuid={B};uuid={C}", code) == [0, devices, 1, 1, 1, 0]


def test_a_forked_process_may_open_a_meter_of_its_own(with_nvml: RunNvml) -> None:
    code = f"""{METER}
import os
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with open_meter(gpu_uuids=["{A}"], host=False) as own:
            measured = measure(own, 0.5)
            measured["inherited_j"] = meter.total().energy_j
        os.write(write, json.dumps(measured).encode())
        os._exit(0)
    mine = measure(meter, 0.5)
    os.waitpid(child, 0)
    theirs = json.loads(os.read(read, 10000))
    again = measure(meter, 0.2)
result = [mine, theirs, again]
"""
    mine, theirs, again = with_nvml(f"uuid={A} watts=200", code)
    for measured in (mine, theirs, again):
        assert measured["energy_j"] == pytest.approx(200 * measured["seconds"], rel=0.02)
    assert theirs["inherited_j"] is None


DETAILS = """
def details(measured):
    return [[r.joules, r.bound_j, r.too_short, r.complete, r.reason, r.model] for r in measured.readings]
"""


def test_a_window_shorter_than_the_counters_period_says_so(with_nvml: RunNvml) -> None:
    code = f"""{METER}{DETAILS}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    with meter.window("short") as short:
        time.sleep(0.02)
    with meter.window("long") as long:
        time.sleep(0.5)
    result = [details(short.measurement)[0], details(long.measurement)[0],
              details(meter.by_phase()["short"])[0], short.measurement.bound_j]
"""
    short, long, phase, bound_j = with_nvml(f"uuid={A} watts=200 limit=300 period=0.1 name=H100", code)
    assert short[1:4] == [30, True, True]  # 0.1 s at 300 W
    assert "shorter than the 0.1 s" in short[4]
    assert short[5] == "H100"
    assert long[1:] == [30, False, True, None, "H100"]
    assert abs(long[0] - 200 * 0.5) < 30
    assert phase[2]
    assert bound_j == 30


def test_without_a_power_limit_the_bound_is_that_of_the_highest_power_seen(with_nvml: RunNvml) -> None:
    code = f"""{METER}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    unknown = meter.total().bound_j
    with meter.window("train") as window:
        time.sleep(0.3)
    result = [unknown, window.measurement.bound_j]
"""
    assert with_nvml(f"uuid={A} watts=200", code) == [None, pytest.approx(20, rel=0.02)]


def test_a_phase_that_is_entered_often_may_be_off_more_often(with_nvml: RunNvml) -> None:
    code = f"""{METER}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    for _ in range(3):
        with meter.window("train"):
            with meter.window("surgery"):
                time.sleep(0.15)
    phases = meter.by_phase()
    result = [[phases[name].bound_j for name in ("train", "surgery", "idle")], meter.total().bound_j,
              sum(phase.energy_j for phase in phases.values()) - meter.total().energy_j, phases["surgery"].too_short]
"""
    bounds, total_bound_j, difference_j, too_short = with_nvml(f"uuid={A} limit=300 period=0.1", code)
    assert bounds == [6 * 30, 3 * 30, 4 * 30]  # train goes on after each surgery; idle is before, between and after
    assert total_bound_j == 30
    assert abs(difference_j) <= total_bound_j
    assert not too_short


def test_watts_do_not_show_the_counters_steps(with_nvml: RunNvml) -> None:
    code = f"""{METER}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    time.sleep(1.0)
    result = []
    for _ in range(40):
        time.sleep(0.03)
        result.append(meter.power_w())
"""
    watts = with_nvml(f"uuid={A} watts=200 limit=300 period=0.1", code)
    assert min(watts) > 170
    assert max(watts) < 230


def test_a_counter_that_stands_still_is_unknown_and_not_zero(with_nvml: RunNvml) -> None:
    code = f"""{METER}{DETAILS}
with open_meter(gpu_uuids=["{A}", "{B}"], host=False) as meter:
    with meter.window("train") as window:
        time.sleep(2.1)
    result = [details(window.measurement), meter.by_phase_j()["train"], meter.total().complete]
"""
    ((still, moving), phase_j, complete) = with_nvml(f"uuid={A} still=1;uuid={B}", code)
    assert still[0] is None
    assert "did not move" in still[4]
    assert moving[0] == pytest.approx(210, rel=0.05)
    assert phase_j == pytest.approx(moving[0], rel=0.01)
    assert not complete


def test_a_counter_that_jumps_invents_no_joules(with_nvml: RunNvml) -> None:
    code = f"""{METER}{DETAILS}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    with meter.window("train") as window:
        time.sleep(0.4)
    with meter.window("eval") as after:
        time.sleep(0.3)
    result = [details(window.measurement)[0], details(after.measurement)[0], meter.total().energy_j, meter.notes]
"""
    jumped, after, total_j, notes = with_nvml(f"uuid={A} watts=200 limit=300 jump=0.2", code)
    assert jumped[0] == 0
    assert not jumped[3]
    assert "more than the device can take" in jumped[4]
    assert after[0] == pytest.approx(60, rel=0.1)
    assert after[3]
    assert total_j < 100
    assert any("more than the device can take" in note for note in notes)


def test_joules_above_the_limit_at_opening_count_for_it_may_be_raised(with_nvml: RunNvml) -> None:
    code = f"""{METER}{DETAILS}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    with meter.window("train") as window:
        time.sleep(0.6)
    result = [window.measurement.seconds, *details(window.measurement)[0]]
"""
    # The limit was 100 W as the meter was opened, and is 900 W since.
    seconds, joules, _, _, complete, reason, _ = with_nvml(f"uuid={A} watts=900 limit=100 most=1000", code)
    assert joules == pytest.approx(900 * seconds, rel=0.02)
    assert (complete, reason) == (True, None)


@pytest.mark.parametrize("limits", ["limit=300", "limit=100 most=300"])
def test_joules_beyond_twice_the_highest_limit_are_not_believed(with_nvml: RunNvml, limits: str) -> None:
    code = f"""{METER}{DETAILS}
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    with meter.window("train") as window:
        time.sleep(0.3)
    result = details(window.measurement)[0]
"""
    joules, _, _, complete, reason, _ = with_nvml(f"uuid={A} watts=4000 {limits}", code)
    assert (joules, complete) == (0, False)
    assert "more than the device can take" in reason


@pytest.mark.parametrize("trouble", ["reload=0.45", "lost=0.45", "lost=0.45 code=4", "lost=0.45 code=999"])
@pytest.mark.parametrize("counter", [0, 1])
def test_a_driver_that_goes_away_marks_what_follows_and_the_total(
    with_nvml: RunNvml, trouble: str, counter: int
) -> None:
    code = f"""{METER}{DETAILS}
with open_meter(gpu_uuids=["{A}"], host=False, interval_s=0.02) as meter:
    with meter.window("before") as before:
        time.sleep(0.2)
    time.sleep(0.35)
    with meter.window("after") as after:
        time.sleep(0.05)
    result = [details(before.measurement)[0], details(after.measurement)[0], details(meter.total())[0],
              meter.by_phase_j()]
"""
    before, after, total, phases_j = with_nvml(f"uuid={A} watts=200 counter={counter} {trouble}", code)
    assert before[0] == pytest.approx(40, rel=0.15)
    assert before[3]
    assert after[0] is None
    assert not after[3]
    assert after[4]
    assert before[0] <= total[0] < 200 * 0.47
    assert not total[3]
    assert phases_j["after"] is None


def test_ten_thousand_windows_leak_neither_memory_nor_handles(with_nvml: RunNvml, powercap: Any) -> None:
    powercap.zone("intel-rapl:0", "package-0", 0)
    powercap.zone("intel-rapl:0:0", "dram", 0)
    code = f"""
import gc, os, threading, tracemalloc
from pathlib import Path
from greenprune.energy import open_meter
def windows(meter, count):
    for _ in range(count):
        with meter.window("train"):
            with meter.window("surgery"):
                pass
def held():
    gc.collect()
    return tracemalloc.get_traced_memory()[0], len(os.listdir("/proc/self/fd")), threading.active_count()
def open_one():
    return open_meter(gpu_uuids=["{A}", "{B}"], host=True, interval_s=0.01, powercap=Path({str(powercap.root)!r}))
tracemalloc.start()
with open_one() as meter:
    windows(meter, 500)
    before = held()
    windows(meter, 5000)
    after = held()
opened = held()
for _ in range(200):
    open_one().close()
result = [before, after, opened, held()]
"""
    before, after, opened, reopened = with_nvml(f"uuid={A};uuid={B} counter=0", code)
    assert after[0] - before[0] < 20_000, "bytes after 10,000 windows"
    assert after[1:] == before[1:]
    assert reopened[0] - opened[0] < 50_000, "bytes after 200 meters"
    assert reopened[1:] == opened[1:]


def test_the_real_codecarbon_agrees_over_the_same_library(with_nvml: RunNvml, tmp_path: Path) -> None:
    code = f"""{METER}
import logging, os, warnings
os.chdir({str(tmp_path)!r})
warnings.simplefilter("default")  # CodeCarbon's own
logging.getLogger("codecarbon").disabled = True
from codecarbon import OfflineEmissionsTracker
tracker = OfflineEmissionsTracker(country_iso_code="FRA", output_methods=[], allow_multiple_runs=True, gpu_ids=[0])
tracker.start_task("setting up")  # takes seconds, which are no part of what is compared
tracker.stop_task("setting up")
tracker.start_task("train")
with open_meter(gpu_uuids=["{A}"], host=False) as meter:
    mine = measure(meter, 1.5)
data = tracker.stop_task("train")
result = [mine["energy_j"] / mine["seconds"], 3.6e6 * data.gpu_energy / data.duration]
"""
    ours_w, theirs_w = with_nvml(f"uuid={A} watts=200 limit=300 name=H100;uuid={B} watts=900", code)
    assert ours_w == pytest.approx(200, rel=0.01)
    assert theirs_w == pytest.approx(ours_w, rel=0.05)
