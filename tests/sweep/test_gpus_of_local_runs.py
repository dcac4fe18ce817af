"""Which GPUs runs side by side get; the driver's library is a stand-in (nvml_stub.c), the runs are stopped at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from nvml_stub import build_stub

from greenprune.sweep.local import shares_of_gpus

ROOT = Path(__file__).resolve().parents[2]
GPUS = [f"GPU-{letter * 8}-1111" for letter in "abcd"]

TELLING = """
import os, sys
if "greenprune.train" in sys.orig_argv and "accelerate.commands.launch" not in sys.orig_argv:
    print("GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("CUDA_DEVICE_ORDER"), flush=True)
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("driver")
    build_stub(folder)
    return folder


def _sweep(place: Path, driver: Path, count: int, at_once: int, **variables: str) -> tuple[str, list[str]]:
    """What a sweep said, and what each of its runs saw, on a machine with so many GPUs."""
    (place / "sitecustomize.py").write_text(TELLING)
    done = subprocess.run(
        [sys.executable, "-m", "greenprune.cli", "sweep", "two.yaml", "--local", str(at_once)],
        cwd=place,
        env={name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        | {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}", "LD_LIBRARY_PATH": str(driver)}
        | {"NVML_STUB": ";".join(f"uuid={uuid}" for uuid in GPUS[:count])}
        | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    logs = sorted((place / "runs" / "sweeps" / "two" / "logs").iterdir())
    seen = [line.removeprefix("GPUs ") for log in logs for line in log.read_text().splitlines() if "GPUs" in line]
    return " ".join(done.stderr.split()), seen


def test_runs_side_by_side_have_a_gpu_each(sweep_of_two: Path, driver: Path) -> None:
    said, seen = _sweep(sweep_of_two, driver, 2, 2)
    assert seen == ["0 PCI_BUS_ID", "1 PCI_BUS_ID"]
    assert "each has its own GPUs" in said


def test_they_have_those_that_the_sweep_may_use(sweep_of_two: Path, driver: Path) -> None:
    said, seen = _sweep(sweep_of_two, driver, 4, 2, CUDA_VISIBLE_DEVICES=f"3,{GPUS[1]},9,0")
    assert sorted(seen) == ["3 None", f"{GPUS[1]} None"]
    assert "each has its own GPUs" in said


def test_they_share_gpus_where_these_are_too_few(sweep_of_two: Path, driver: Path) -> None:
    said, seen = _sweep(sweep_of_two, driver, 1, 2)
    assert seen == ["0 PCI_BUS_ID"] * 2
    assert "2 runs side by side share GPUs for 1" in said


def test_runs_on_a_cpu_are_told_of_no_gpus(sweep_of_two: Path, driver: Path) -> None:
    with (sweep_of_two / "two.yaml").open("a") as file:
        file.write("settings: {device: cpu}\n")
    said, seen = _sweep(sweep_of_two, driver, 2, 2)
    assert seen == ["None None"] * 2
    assert "each counts the joules of the whole machine" in said


def test_one_run_at_a_time_sees_all(sweep_of_two: Path, driver: Path) -> None:
    said, seen = _sweep(sweep_of_two, driver, 2, 1)
    assert seen == ["None None"] * 2
    assert "side by side" not in said


SHARES = """
import os, sys
from greenprune.sweep.local import shares_of_gpus
for count, processes in ((3, 1), (4, 2), (3, 2), (1, 2), (0, 1)):
    os.environ["NVML_STUB"] = ";".join(f"uuid={uuid}" for uuid in sys.argv[1 : 1 + count])
    print(shares_of_gpus({}, processes))
"""


def test_each_run_has_as_many_gpus_as_processes(driver: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LD_LIBRARY_PATH": str(driver)}
    told = subprocess.run([sys.executable, "-c", SHARES, *GPUS], env=env, capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == ["['0', '1', '2']", "['0,1', '2,3']", "['0,1']", "[]", "[]"]


def test_without_a_driver_nothing_is_hidden() -> None:
    assert shares_of_gpus({"CUDA_VISIBLE_DEVICES": "0"}, 1) == []
