"""Runs whose machine did other work beside them: the joules of its CPU and memory are not theirs alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from recording import record_run, write_events
from test_comparison import CPU, DENSE, GATED, GPU

from greenprune.report import Comparison, compare_runs
from greenprune.report.attempts import Allotment, allotment_of
from greenprune.report.contents import build_report
from greenprune.report.words import findings_of

ON_CPU = {"energy_by_device_j": {CPU: 100.0}}
HERE = {"cpu": "a CPU", "gpus": [], "device": "cpu", "host": "node1", "machines": ["m1"]}
OLD = {key: value for key, value in HERE.items() if key != "machines"}


def write_run(
    folder: Path, summary: dict[str, Any], spans: list[tuple[float, float]], made: dict[str, Any], *, ended: bool = True
) -> None:
    """A run that went on in these spans of seconds, each an attempt that was stopped but for the last one."""
    folder.mkdir(parents=True)
    if ended:
        (folder / "summary.json").write_text(json.dumps(summary | {"attempts": len(spans)}))
    kinds = ["interrupt"] * (len(spans) - 1) + ["end" if ended else "train"]
    events = []
    for (begun_s, ended_s), kind in zip(spans, kinds, strict=True):
        events += [{"time": begun_s, "step": 1, "kind": "start"}, {"time": ended_s, "step": 1, "kind": kind}]
    write_events(folder, events)
    (folder / "provenance.jsonl").write_text((json.dumps(made) + "\n") * len(spans))


def compare(folder: Path, dense: dict[str, Any], gated: dict[str, Any], spans: list[tuple[float, float]]) -> Comparison:
    """A gated run in the spans against a twin that went on from second 100 to 200."""
    write_run(folder / "dense", DENSE | ON_CPU, [(100.0, 200.0)], dense)
    write_run(folder / "gated", GATED | ON_CPU, spans, gated)
    return compare_runs([folder])


def energy_ratio(comparison: Comparison, name: str = "gated") -> float | None:
    (run,) = (run for run in comparison.runs if run.name == name)
    assert run.against_twin is not None
    assert run.against_twin["time_s"] is not None
    return run.against_twin["energy_j"]


@pytest.mark.parametrize(
    ("dense", "gated"),
    [
        (HERE, HERE),
        (HERE, HERE | {"host": "a-container-of-it"}),
        (OLD, OLD),  # of versions that told the host's name alone
        (OLD, HERE),
    ],
)
def test_joules_of_runs_that_were_on_one_machine_at_once_are_not_compared(
    tmp_path: Path, dense: dict[str, Any], gated: dict[str, Any]
) -> None:
    comparison = compare(tmp_path, dense, gated, [(150.0, 250.0)])
    assert energy_ratio(comparison) is None
    assert comparison.notes == (
        "dense and gated shared a machine while they ran: the joules of its CPU and memory count the work of all of "
        "them, so no ratios of joules and CO2e",
    )


@pytest.mark.parametrize(
    ("gated", "spans"),
    [
        (HERE, [(200.0, 300.0)]),
        (HERE, [(199.5, 300.0)]),  # for half a percent of its time
        (HERE, [(0.0, 99.0), (201.0, 250.0)]),  # stopped, and gone on afterwards
        (HERE | {"machines": ["m2"]}, [(100.0, 200.0)]),  # two machines of one name
        (OLD | {"host": "node2"}, [(100.0, 200.0)]),
        ({key: value for key, value in OLD.items() if key != "host"}, [(100.0, 200.0)]),
    ],
)
def test_joules_of_runs_after_each_other_or_on_two_machines_are_compared(
    tmp_path: Path, gated: dict[str, Any], spans: list[tuple[float, float]]
) -> None:
    comparison = compare(tmp_path, HERE, gated, spans)
    assert energy_ratio(comparison) == pytest.approx(0.65)
    assert not comparison.notes


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        ({GPU.replace("1a", "2b"): 90.0}, None),  # nothing that the machine's other work is in
        ({GPU.replace("1a", "2b"): 90.0, CPU: 9.0}, "CPU and memory"),
        ({GPU: 90.0}, "GPU"),
        ({GPU: 90.0, CPU: 9.0}, "GPU, CPU and memory"),
        ({GPU.replace("1a", "2b"): 90.0, "cpu (estimate: no load)": None}, None),
    ],
)
def test_what_two_runs_shared_is_named(tmp_path: Path, devices: dict[str, float | None], told: str | None) -> None:
    mine = {GPU: 90.0} | ({CPU: 9.0} if told and "CPU" in told else {})
    mine |= {name: None for name, joules in devices.items() if joules is None}
    for name, summary, metered in (("dense", DENSE, mine), ("gated", GATED, devices)):
        write_run(tmp_path / name, summary | {"energy_by_device_j": metered}, [(0.0, 9.0)], HERE)
    comparison = compare_runs([tmp_path])
    assert (energy_ratio(comparison) is None) == (told is not None)
    assert [f"the joules of its {told} count" in note for note in comparison.notes] == ([True] if told else [])


def test_of_a_long_run_and_a_short_one_beside_it_only_the_short_one_is_doubtful(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE | ON_CPU, [(0.0, 1000.0)], HERE | {"machines": ["m2"]})
    write_run(tmp_path / "long", GATED | ON_CPU, [(0.0, 1000.0)], HERE)
    write_run(tmp_path / "short", GATED | ON_CPU | {"seed": 1}, [(10.0, 12.0)], HERE)
    comparison = compare_runs([tmp_path])
    assert energy_ratio(comparison, "long") == pytest.approx(0.65)
    assert comparison.notes[0].startswith("short shared a machine with long while it ran: the joules of its CPU and")


def test_a_run_that_did_not_finish_was_there_too(tmp_path: Path) -> None:
    write_run(tmp_path / "killed", {}, [(0.0, 90.0)], HERE, ended=False)
    write_run(tmp_path / "dense", DENSE | ON_CPU, [(100.0, 200.0)], HERE)
    write_run(tmp_path / "gated", GATED | ON_CPU, [(0.0, 99.0)], HERE)
    comparison = compare_runs([tmp_path])
    assert energy_ratio(comparison) is None
    assert comparison.notes[0].startswith("gated shared a machine with killed while it ran")


def test_of_several_twins_the_one_that_was_alone_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "dense-1", DENSE | ON_CPU, [(0.0, 9.0)], HERE)
    write_run(tmp_path / "dense-2", DENSE | ON_CPU, [(10.0, 19.0)], HERE)
    write_run(tmp_path / "other", DENSE | ON_CPU | {"seed": 7}, [(0.0, 9.0)], HERE)
    write_run(tmp_path / "gated", GATED | ON_CPU, [(20.0, 29.0)], HERE)
    assert {run.name: run.twin for run in compare_runs([tmp_path]).runs}["gated"] == "dense-2"


def test_many_that_shared_a_machine_are_told_in_one_line(tmp_path: Path) -> None:
    for number in range(30):
        write_run(tmp_path / f"run-{number:02}", DENSE | ON_CPU | {"seed": number}, [(0.0, 9.0)], HERE)
    (note,) = compare_runs([tmp_path]).notes
    assert note.startswith("run-00, run-01, ")
    assert " and 20 more shared a machine while they ran" in note


def test_runs_that_shared_two_machines_are_told_in_two_lines(tmp_path: Path) -> None:
    """Linked by those that were there in between."""
    spans = ((0.0, 9.0), (5.0, 14.0), (10.0, 19.0))
    for number in range(6):
        made = HERE | {"machines": [f"m{number % 2}"]}
        write_run(tmp_path / f"run-{number}", DENSE | ON_CPU | {"seed": number}, [spans[number // 2]], made)
    notes = compare_runs([tmp_path]).notes
    assert [note.partition(" shared")[0] for note in notes] == ["run-0, run-2 and run-4", "run-1, run-3 and run-5"]


def record_two(folder: Path, **made: Any) -> None:
    """A dense run and a gated one, at one time."""
    for name in ("dense", "gated"):
        record_run(folder / name, gated=name == "gated")
        path = folder / name / "provenance.jsonl"
        path.write_text(json.dumps(json.loads(path.read_text()) | made) + "\n")


@pytest.mark.parametrize("machines", [["m1"], []])
def test_a_report_draws_no_front_over_joules_that_count_each_others_work(tmp_path: Path, machines: list[str]) -> None:
    record_two(tmp_path, machines=machines)
    report = build_report([tmp_path])
    (task,) = report.tasks
    assert (task.front is None) == bool(machines)
    assert ("count other work" in task.front_reason) == bool(machines)
    assert any("dense and gated shared a machine" in note for note in report.notes) == bool(machines)
    assert ("joules not comparable" in " ".join(findings_of(task))) == bool(machines)


# A part of a machine.

WHOLE = {"cpu_cores": 64, "cpu_cores_physical": 64, "cpu_cores_usable": 64}
THREADED = {"cpu_cores": 128, "cpu_cores_physical": 64, "cpu_cores_usable": 128}


@pytest.mark.parametrize(
    ("attempt", "found"),
    [
        (WHOLE | {"slurm": None}, None),
        (WHOLE | {"slurm": {"job": "1", "cpus_per_node": "64(x2)"}}, None),
        (WHOLE | {"slurm": {"job": "1", "cpus_per_node": "8"}}, Allotment(8, 64, by_slurm=True)),
        (WHOLE | {"slurm": {"job": "1", "cpus_per_node": "8(x2),64"}}, Allotment(8, 64, by_slurm=True)),
        (WHOLE | {"slurm": {"job": "1", "cpus_on_node": "8"}}, Allotment(8, 64, by_slurm=True)),
        # A step of a job that has the whole node may be held to some of it.
        (WHOLE | {"cpu_cores_usable": 8, "slurm": {"job": "1", "cpus_per_node": "64", "cpus_on_node": "8"}}, None),
        # Slurm may count cores where the system counts threads of them.
        (THREADED | {"slurm": {"job": "1", "cpus_per_node": "64"}}, None),
        (THREADED | {"cpu_cores_usable": 64, "slurm": {"job": "1", "cpus_per_node": "64"}}, Allotment(64, 128, True)),
        (WHOLE | {"cpu_cores_usable": 8, "slurm": {"job": "1"}}, Allotment(8, 64, by_slurm=True)),  # of older versions
        (WHOLE | {"cpu_cores_usable": 8}, Allotment(8, 64, by_slurm=False)),
        ({"cpu_cores_usable": 8, "slurm": {"job": "1", "cpus_per_node": "8"}}, None),
        (WHOLE | {"slurm": {"job": "1", "cpus_per_node": "many"}}, None),
        ({}, None),
    ],
)
def test_a_job_may_have_a_part_of_its_machine(attempt: dict[str, Any], found: Allotment | None) -> None:
    assert allotment_of(attempt) == found


@pytest.mark.parametrize(
    ("slurm", "comparable", "told"),
    [
        (
            {"job": "1", "cpus_per_node": "8"},
            False,
            "dense and gated had 8 of the 64 cores of their machines: the joules of CPU and memory count the work of "
            "other jobs there too, so no ratios of joules and CO2e (exclusive: true in a site profile gives a job "
            "whole machines)",
        ),
        (
            None,
            True,
            "dense and gated could use 8 of the 64 cores of their machines: what else went on there is in the joules "
            "of CPU and memory",
        ),
    ],
)
def test_the_joules_of_a_part_of_a_machine_are_compared_only_if_nobody_gave_the_rest_away(
    tmp_path: Path, slurm: dict[str, str] | None, comparable: bool, told: str
) -> None:
    made = HERE | WHOLE | {"cpu_cores_usable": 8, "slurm": slurm}
    comparison = compare(tmp_path, made, made, [(300.0, 400.0)])
    assert (energy_ratio(comparison) is not None) == comparable
    assert comparison.notes == (told,)


def test_of_gpus_alone_the_joules_of_a_part_of_a_machine_are_its_own(tmp_path: Path) -> None:
    made = HERE | WHOLE | {"cpu_cores_usable": 8, "slurm": {"job": "1", "cpus_per_node": "8"}}
    for name, summary, span in (("dense", DENSE, (0.0, 9.0)), ("gated", GATED, (10.0, 19.0))):
        write_run(tmp_path / name, summary | {"energy_by_device_j": {GPU: 9.0}}, [span], made)
    comparison = compare_runs([tmp_path])
    assert energy_ratio(comparison) == pytest.approx(0.65)
    assert not comparison.notes
