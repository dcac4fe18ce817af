"""Slow cases on a real Slurm: a time limit that is really met, launchers of several processes, arrays that requeue."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from slurm_cluster import (
    Cluster,
    assert_nothing_was_lost,
    greenprune,
    has_begun_to_remove,
    read_events,
    read_summary,
    seconds_to_checkpoint,
    submit_alone,
    wait_until,
)

from greenprune.sweep.jobs import Shape

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RUN = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: %d, lr: 0.05}
gate: {warmup: 0.1}
removal: {window: 11, decide_by: 0.6}
tracking: {log_every: 2}
"""


def config(folder: Path, epochs: int) -> Path:
    path = folder / "base.yaml"
    path.write_text(RUN % epochs)
    return path


def test_a_run_longer_than_its_time_limit_takes_several_attempts(cluster: Cluster, tmp_path: Path) -> None:
    """One minute, the signal 40 s before: Slurm looks every 30 s, so an attempt has 20 to 50 s."""
    folder = tmp_path / "long"
    job = submit_alone(cluster, config(tmp_path, 120), folder, Shape(), time_limit="1")
    cluster.wait_for_end(job, seconds=600)
    assert_nothing_was_lost(folder)
    assert read_summary(folder)["attempts"] > 1
    assert read_summary(folder)["gates_left"] == 0


@pytest.mark.parametrize("shape", [Shape(1, 2), Shape(2, 2)], ids=["two processes", "two nodes of two"])
def test_stopped_in_every_way_it_goes_on(cluster: Cluster, tmp_path: Path, shape: Shape) -> None:
    """By USR1, by a TERM to the batch shell, and by preemption, one after the other."""
    folder = tmp_path / "run"
    job = submit_alone(cluster, config(tmp_path, 40), folder, shape)

    def starts() -> int:
        return sum(event["kind"] == "start" for event in read_events(folder))

    ways = {
        "USR1": lambda: cluster.ask("scancel", "--batch", "--signal=USR1", job),
        "TERM": lambda: cluster.ask("scancel", "--batch", "--signal=TERM", job),
        "preemption": lambda: cluster.sbatch(
            "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
        ),
    }
    for attempt, (way, tell) in enumerate(ways.items(), start=1):
        wait_until("a removal", lambda attempt=attempt: starts() == attempt and has_begun_to_remove(folder))
        took_s = seconds_to_checkpoint(folder, tell)
        print(f"{way} to checkpoint, {shape}: {took_s:.2f} s")
        assert took_s < 10
    cluster.wait_for_end(job)
    assert_nothing_was_lost(folder)
    summary = read_summary(folder)
    assert (summary["attempts"], summary["world_size"]) == (4, shape.nodes * shape.processes)
    assert summary["gates_left"] == 0


def test_the_report_waits_for_a_task_that_queued_itself_again(cluster: Cluster, tmp_path: Path) -> None:
    config(tmp_path, 6)
    (tmp_path / "two.yaml").write_text("base: base.yaml\ntargets: [0.5]\nat_once: 2\n")
    (tmp_path / "site.yaml").write_text('environment: {OMP_NUM_THREADS: "1"}\n')
    submitted = greenprune(cluster, "sweep", "two.yaml", "--submit", "--site", "site.yaml", cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stderr
    sweep = tmp_path / "runs" / "sweeps" / "two"
    submission = json.loads((sweep / "submissions.jsonl").read_text())
    folder = sweep / "runs" / "0001-digits-resnet20-block-0.5-seed0"
    wait_until("a removal", lambda: has_begun_to_remove(folder))
    cluster.ask("scancel", "--batch", "--signal=USR1", f"{submission['array']}_1")
    cluster.wait_for_end(submission["collect"])
    assert_nothing_was_lost(folder)
    report = (sweep / "report.md").read_text()
    assert "has no result" not in report
    assert f"{folder.name} in 2" in report
    rows = [json.loads(line)["slurm"] for line in (folder / "provenance.jsonl").read_text().splitlines()]
    assert [row.get("requeued") for row in rows] == [None, "1"]
