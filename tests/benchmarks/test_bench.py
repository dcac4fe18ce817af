"""The runner of the benchmarks: turns, contestants in processes, and a table that says what it could not measure."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench
import measurements
from environments import PeerUnavailable, peer_python
from measurements import MEASUREMENTS, Row, Setting, Target, Unmeasured
from process import Process, ProcessFailed
from turns import Figure, median_of, ratio_of, take_turns

BENCHMARKS = Path(bench.__file__).parent
WORKER = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from process import Pacer
pacer = Pacer()
pacer.others["double"] = lambda value: {{"is": 2 * value}}
print("not an answer")
pacer.ready(name="worker")
for epoch in range(100):
    for number in pacer.pace(range(3)):
        time.sleep(0.01)
    time.sleep(0.2)  # between epochs, which does not count
"""


class Scripted:
    """A contestant whose seconds are known."""

    def __init__(self, name: str, seconds: list[float], order: list[str]) -> None:
        self.name, self.seconds, self.order = name, iter(seconds), order

    def turn(self, steps: int) -> float:
        self.order.append(self.name)
        return next(self.seconds)


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(benchmarks=str(BENCHMARKS)))
    return [sys.executable, str(script)]


def test_turns_alternate_and_ratios_are_of_medians_with_the_spread_of_pairs() -> None:
    order: list[str] = []
    a, b = Scripted("a", [9, 2, 4, 6], order), Scripted("b", [9, 1, 1, 3], order)
    found = take_turns({"a": a, "b": b}, turns=3, steps=1)
    assert "".join(order) == "abab" + "ba" + "ab"
    assert found.ratio("a", "b") == Figure(4.0, 2.0, 3.0, 3)
    assert found.median("b").value == 1


def test_one_measurement_is_its_own_spread() -> None:
    assert median_of([2.0]) == Figure(2.0, 2.0, 2.0, 1)
    assert ratio_of([3.0], [2.0]).value == 1.5


def test_a_process_does_the_steps_it_is_asked_for_and_not_what_lies_between_epochs(worker: list[str]) -> None:
    with Process(worker) as contestant:
        assert contestant.about == {"name": "worker"}
        assert contestant.ask("double", 21) == {"is": 42}
        assert 0.01 <= contestant.turn(8) < 0.05


def test_a_process_that_fails_says_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('no such thing')")
    with pytest.raises(ProcessFailed, match=r"broken.py ended with code 1; .*ValueError: no such thing"):
        Process([sys.executable, str(script)])


def test_a_peer_that_cannot_be_installed_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PeerUnavailable, match=r"^a-peer cannot be installed: nothing$"):
        peer_python("a-peer", ["a-peer==1.0"], tmp_path / "peer")


def fails(setting: Setting) -> list[Row]:
    """A line that cannot be measured."""
    raise Unmeasured("there is no data set")


def works(setting: Setting) -> list[Row]:
    """A line that can."""
    return [Row("a ratio", setting.data, Figure(1.2, 1.1, 1.3, 6), target=Target("<=", 1.1), note="slow")]


def test_the_table_says_what_is_missed_and_what_could_not_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MEASUREMENTS, "gates", fails)
    monkeypatch.setitem(MEASUREMENTS, "memory", works)
    for name in ("GREENPRUNE_DATA", "CUDA_VISIBLE_DEVICES", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    assert bench.main(["--tiny", "--only", "gates", "memory", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "[1/2, 0 s] gates" in said
    text = (tmp_path / "bench_cpu.md").read_text()
    assert "| A line that cannot be measured | - | - | - | - | - | not measured | there is no data set |" in text
    assert "| a ratio | digits | 1.200 | 1.100 to 1.300 | 6 | at most 1.1 | **missed** | slow |" in text
    written = (tmp_path / "bench_cpu.json").read_text()
    assert str(bench.ROOT) not in written  # where the project lies is nobody's business
    content = json.loads(written)
    assert {"git", "versions", "cpu", "threads"} <= content["provenance"].keys()
    assert content["rows"][1]["met"] is False
    assert content["rows"][1]["figure"] == {"value": 1.2, "low": 1.1, "high": 1.3, "n": 6}
    assert set(content["seconds"]) == {"gates", "memory"}


def test_lines_in_this_process_give_rows_for_both_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (
        "cpu",
        "gpu",
    ):  # without a GPU the second measures the same on the CPU, with the GPU's sizes cut down
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("PYTHONPATH", "")
        arguments = ["--device", device, "--tiny", "--only", "growth", "--output", str(tmp_path)]
        assert bench.main(arguments) == 0
        rows = json.loads((tmp_path / f"bench_{device}.json").read_text())["rows"]
        assert [row["unit"] for row in rows] == ["power", "power", "%"]
        assert all(row["figure"]["value"] == row["figure"]["value"] for row in rows)


def test_whole_runs_are_repeated_while_there_is_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def run(setting: Setting, config: Path, name: str, *flags: str) -> dict[str, Any]:
        """What a run that took no time would have told."""
        made.append(name)
        about = {
            "data": "digits",
            "model": "resnet38",
            "batch_size": 64,
            "accuracy": 0.99,
            "energy_quality": "estimate",
        }
        return about | {"flops_forward": 1, "flops_forward_dense": 2, "time_s": 3.0 + len(made), "energy_j": None}

    monkeypatch.setattr(measurements, "_run", run)
    monkeypatch.setattr(measurements, "PEERS", {})
    setting = Setting("cpu", tmp_path, None, seeds=(4, 5, 6), cifar_epochs=0)
    in_time, late = (
        measurements.whole_runs(dataclasses.replace(setting, until_s=until_s))[0].figure for until_s in (math.inf, 0.0)
    )
    assert in_time is not None
    assert late is not None
    assert (in_time.n, late.n) == (3, 1)
    assert made == ["gated-4", "dense-4", "dense-5", "gated-5", "gated-6", "dense-6", "gated-4", "dense-4"]


def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--device", "gpu", "--only", "gates"])
    assert "torch finds no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_every_line_is_measured_in_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENPRUNE_DATA", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert bench.main(["--tiny", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "bench_cpu.json").read_text())["rows"]
    assert [row["what"] for row in rows if row["figure"] is None] == []
