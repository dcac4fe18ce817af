"""Sweeps and single runs on a real Slurm: arrays, requeueing, preemption, many nodes, cancelling."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from slurm_cluster import (
    Cluster,
    assert_nothing_was_lost,
    assert_same_result,
    greenprune,
    has_begun_to_remove,
    read_events,
    read_summary,
    seconds_to_checkpoint,
    submit_alone,
    wait_until,
)

from greenprune.report import compare_runs
from greenprune.sweep.jobs import Shape

pytestmark = pytest.mark.system

# Long enough that a run is still going on when Slurm has taken in what was submitted after its first removal.
BASE = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: 18, lr: 0.05}
gate: {warmup: 0.1}
budget: {target: 0.5}
removal: {window: 11, decide_by: 0.6}
tracking: {log_every: 2}
"""

# Number 3 asks for less than the network has without its gated blocks: it is refused when its network is built.
SWEEP = """
base: "base.yaml"
runs:
  - {budget.target: 0.5}
  - {budget.target: 0.7}
  - {budget.target: 0.001}
  - {seed: 1}
at_once: 2
"""
FAILS = 3
STOPPED_AND_RESUMED = 1

SITE = """
time: "10"
environment: {OMP_NUM_THREADS: "1"}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name would do harm where it passes a shell or one of Slurm's own patterns."""
    folder = tmp_path_factory.mktemp("slurm") / "runs of $(touch pwned) 100%j"
    folder.mkdir()
    (folder / "base.yaml").write_text(BASE)
    (folder / "six.yaml").write_text(SWEEP)
    (folder / "site.yaml").write_text(SITE)
    return folder


@pytest.fixture(scope="module")
def sweep(cluster: Cluster, place: Path) -> Path:
    """Folder of a sweep that was submitted as a user does, and has ended with its report."""
    # Held back until all is asked that is asked of jobs that wait: on fast cores the first would have ended by then.
    partition = ("scontrol", "update", "PartitionName=main")
    cluster.ask(*partition, "State=DOWN")
    submitted = greenprune(cluster, "sweep", "six.yaml", "--submit", "--site", "site.yaml", cwd=place)
    assert submitted.returncode == 0, submitted.stderr
    folder = place / "runs" / "sweeps" / "six"
    (submission,) = (json.loads(line) for line in (folder / "submissions.jsonl").read_text().splitlines())
    assert submission["runs"] == [0, 1, 2, 3, 4, 5]
    # Again while they wait: nothing is submitted twice.
    again = greenprune(cluster, "sweep", "six.yaml", "--submit", "--site", "site.yaml", cwd=place)
    assert again.returncode == 0, again.stderr
    assert "nothing to submit" in again.stdout
    status = greenprune(cluster, "sweep", "status", str(folder), "--json", cwd=place)
    states = json.loads(status.stdout)
    assert len(states) == 6
    assert {state["state"] for state in states} == {"waiting"}
    cluster.ask(*partition, "State=UP")
    cluster.wait_for_end(submission["collect"])
    return folder


def test_an_array_of_six_two_at_a_time(sweep: Path) -> None:
    folders = sorted((sweep / "runs").iterdir())
    assert [folder.name[:4] for folder in folders] == ["0000", "0001", "0002", "0004", "0005"]
    spans = []
    for folder in folders:
        events = read_events(folder)
        assert events[-1]["kind"] == "end"
        spans.append((events[0]["time"], events[-1]["time"]))
    at_once = [sum(begin <= moment < end for begin, end in spans) for moment, _ in spans]
    assert max(at_once) == 2, "a second one was to run beside the first, and no third"
    assert not list(sweep.parents[2].rglob("pwned"))
    for label in ("0000", "0005"):
        assert "The run's files are in" in (sweep / "logs" / f"{label}.log").read_text()
        assert (sweep / "exits" / label).read_text() == "0\n"


def test_one_that_fails_leaves_the_others_and_the_report_says_so(cluster: Cluster, sweep: Path) -> None:
    assert (sweep / "exits" / f"{FAILS:04d}").read_text() == "2\n"
    assert "budget.target: 0.001" in (sweep / "logs" / f"{FAILS:04d}.log").read_text()
    report = (sweep / "report.md").read_text()
    assert f"{FAILS:04d}-digits-resnet20-block-0.001-seed0 has no result: failed (exit code 2" in report
    assert "exit code 2" in (sweep / "report.html").read_text()
    comparison = {run.name[:4]: run for run in compare_runs([sweep / "runs"]).runs}
    twins = {label: run.twin for label, run in comparison.items() if run.summary["gated"]}
    assert {label: twin and twin[:4] for label, twin in twins.items()} == {
        "0001": "0000",
        "0002": "0000",
        "0005": "0004",
    }
    for label in twins:
        run = comparison[label]
        assert run.against_twin is not None
        assert run.summary["kept_cost"] <= run.summary["budget_target"]
        assert f"{100 * run.summary['accuracy']:.2f} %" in report
    status = greenprune(cluster, "sweep", "status", str(sweep), "--json", cwd=sweep)
    states = [(state["state"], state["progress"]) for state in json.loads(status.stdout)]
    assert states == [("failed", None) if number == FAILS else ("finished", 1.0) for number in range(6)]


def test_jobs_and_nodes_are_on_record(sweep: Path) -> None:
    submission = json.loads((sweep / "submissions.jsonl").read_text().splitlines()[0])
    folder = next((sweep / "runs").glob("0001-*"))
    (attempt,) = (json.loads(line) for line in (folder / "provenance.jsonl").read_text().splitlines())
    slurm = attempt["slurm"]
    assert (slurm["array"], slurm["task"]) == (submission["array"], "1")
    assert slurm["job"]
    assert slurm["nodes"] in ("node1", "node2")
    assert attempt["host"] == slurm["nodes"]
    assert "requeued" not in slurm
    assert read_summary(folder)["energy_slurm_reason"], "this cluster has no sacct: a reason is to be told"


def test_again_fills_only_the_gaps(cluster: Cluster, sweep: Path, place: Path) -> None:
    """A run that was cancelled has a checkpoint, and is submitted again with the one that failed."""
    cut = next((sweep / "runs").glob("0002-*"))
    whole = cut.rename(sweep / "whole")
    kept = {path: path.read_bytes() for path in (sweep / "runs").rglob("events.jsonl")}
    again = ("sweep", "six.yaml", "--submit", "--site", "site.yaml", "--at-once", "1")
    assert greenprune(cluster, *again, cwd=place).returncode == 0
    submission = json.loads((sweep / "submissions.jsonl").read_text().splitlines()[-1])
    assert submission["runs"] == [2, FAILS]
    wait_until("a removal", lambda: has_begun_to_remove(cut))
    took_s = seconds_to_checkpoint(cut, lambda: cluster.ask("scancel", f"{submission['array']}_2"))
    print(f"scancel to checkpoint: {took_s:.2f} s")
    assert took_s < 10
    cluster.wait_for_end(submission["collect"])
    assert cluster.state(f"{submission['array']}_2") == "CANCELLED"
    assert f"{cut.name} has no result: stopped" in (sweep / "report.md").read_text()

    assert greenprune(cluster, *again, cwd=place).returncode == 0
    submission = json.loads((sweep / "submissions.jsonl").read_text().splitlines()[-1])
    assert submission["runs"] == [2, FAILS]
    cluster.wait_for_end(submission["collect"])
    assert_same_result(whole, cut)
    assert_nothing_was_lost(cut)
    assert {path: path.read_bytes() for path in kept} == kept
    report = (sweep / "report.md").read_text()
    assert f"{cut.name} has no result" not in report


@pytest.fixture(scope="module")
def whole(sweep: Path) -> Path:
    """An uninterrupted run."""
    return next((sweep / "runs").glob(f"{STOPPED_AND_RESUMED:04d}-*"))


def submit_run(cluster: Cluster, sweep: Path, folder: Path, shape: Shape) -> str:
    """Submit the run that :func:`whole` is as a job of its own."""
    return submit_alone(cluster, sweep / "configs" / f"{STOPPED_AND_RESUMED:04d}.yaml", folder, shape)


def test_stopped_by_usr1_it_queues_itself_and_ends_with_the_same_bits(
    cluster: Cluster, sweep: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "usr1"
    job = submit_run(cluster, sweep, folder, Shape())
    wait_until("a removal", lambda: has_begun_to_remove(folder))
    # As Slurm does before the time limit.
    took_s = seconds_to_checkpoint(folder, lambda: cluster.ask("scancel", "--batch", "--signal=USR1", job))
    print(f"USR1 to checkpoint: {took_s:.2f} s")
    assert took_s < 10
    assert not (folder / "summary.json").exists()
    cluster.wait_for_end(job)
    assert_same_result(whole, folder)
    assert_nothing_was_lost(folder)
    assert read_summary(folder)["attempts"] == 2
    attempts = [json.loads(line)["slurm"] for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert [attempt.get("requeued") for attempt in attempts] == [None, "1"]
    assert len({attempt["job"] for attempt in attempts}) == 1


def test_preempted_by_a_more_urgent_job_it_goes_on_afterwards(
    cluster: Cluster, sweep: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "preempted"
    job = submit_run(cluster, sweep, folder, Shape())
    wait_until("a removal", lambda: has_begun_to_remove(folder))
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    between = cluster.sbatch(*urgent)
    cluster.wait_for_end(between)
    cluster.wait_for_end(job)
    assert_same_result(whole, folder)
    assert_nothing_was_lost(folder)
    assert read_summary(folder)["attempts"] == 2


def test_two_nodes_of_two_processes_train_remove_and_are_requeued(
    cluster: Cluster, sweep: Path, tmp_path: Path
) -> None:
    """On nodes with network namespaces of their own; a rendezvous on localhost would never come together."""
    folder = tmp_path / "many"
    job = submit_run(cluster, sweep, folder, Shape(nodes=2, processes=2))
    wait_until("a removal", lambda: has_begun_to_remove(folder))
    # As Slurm does before the time limit.
    took_s = seconds_to_checkpoint(folder, lambda: cluster.ask("scancel", "--batch", "--signal=USR1", job))
    print(f"USR1 to checkpoint on two nodes: {took_s:.2f} s")
    assert took_s < 10
    cluster.wait_for_end(job)
    summary = read_summary(folder)
    assert summary["world_size"] == 4
    assert summary["attempts"] == 2
    assert summary["blocks"] < summary["blocks_dense"]
    assert summary["gates_left"] == 0
    assert_nothing_was_lost(folder)
    attempt = json.loads((folder / "provenance.jsonl").read_text().splitlines()[0])
    assert attempt["slurm"]["nodes"] == "node[1-2]"
