"""A running Slurm cluster, as tests speak to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from launching import ROOT, environment
from safetensors.torch import load_file
from torch import equal

from greenprune.sweep.jobs import Shape, render_job
from greenprune.sweep.site import Site


def wait_until(what: str, is_so: Callable[[], object], seconds: float = 120) -> None:
    """Wait for something, and say what it was if it does not come."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell on it has: Slurm's commands, and greenprune."""
        paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        return environment() | {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": paths, "PYTHONPATH": str(ROOT)}

    def ask(self, *command: str, cwd: Path | None = None) -> str:
        """Run a command there."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        return done.stdout

    def sbatch(self, *args: str | Path) -> str:
        """Submit a job."""
        return self.ask("sbatch", "--parsable", *map(str, args)).strip()

    def state(self, job: str) -> str:
        """A job's state, also after its end."""
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def wait_for_end(self, job: str, state: str = "COMPLETED", seconds: float = 200) -> None:
        """Wait until a job has ended, in a certain state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
        wait_until(f"the end of job {job}", lambda: self.state(job) in ended, seconds)
        assert self.state(job) == state


def greenprune(cluster: Cluster, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "greenprune.cli", *args]
    return subprocess.run(
        command, env=cluster.environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def read_events(folder: Path) -> list[dict]:
    """Events so far; the last line may not be whole yet."""
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def tensors(folder: Path) -> dict:
    return load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")


def has_begun_to_remove(folder: Path) -> bool:
    """Whether a run is a few steps after its first removal, within an epoch."""
    events = read_events(folder)
    removed = any(event["kind"] == "removal" for event in events)
    return removed and events[-1]["kind"] == "train" and events[-1]["step"] % 22 in range(2, 18)


def assert_same_result(once: Path, again: Path) -> None:
    """An interrupted run has the bits of an uninterrupted one."""
    assert (once / "structure.json").read_text() == (again / "structure.json").read_text()
    expected, found = tensors(once), tensors(again)
    assert expected.keys() == found.keys()
    assert all(equal(expected[name], found[name]) for name in expected)
    whole, cut = read_summary(once), read_summary(again)
    for key in ("accuracy", "loss", "flops_train", "samples", "removals", "kept_cost"):
        assert whole[key] == cut[key], key


def assert_nothing_was_lost(folder: Path) -> None:
    """Every attempt went on at the step that the one before had stopped after, and its joules are counted."""
    events = read_events(folder)
    starts = [event for event in events if event["kind"] == "start"]
    stops = [event for event in events if event["kind"] == "interrupt"]
    assert [start["step"] for start in starts[1:]] == [stop["step"] for stop in stops]
    assert len({start["run"] for start in starts}) == 1
    summary = read_summary(folder)
    assert summary["attempts"] == len(starts)
    by_attempt = [attempt["energy_j"] for attempt in summary["energy_by_attempt"]]
    assert len(by_attempt) == len(starts)
    assert all(joules > 0 for joules in by_attempt)
    assert sum(by_attempt) == pytest.approx(summary["energy_j"])
    assert by_attempt[0] == pytest.approx(stops[0]["energy/total_j"])


def submit_alone(cluster: Cluster, config: Path, folder: Path, shape: Shape, time_limit: str = "10") -> str:
    """Submit a run as a job of its own, from the text that slurm/ holds for a site."""
    site = Site(time=time_limit, warning_s=40, environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    job = folder.parent / f"{folder.name}.sbatch"
    job.write_text(render_job("many_nodes" if shape.nodes > 1 else "single_node", site, shape))
    run = ["--config", config, "--output_dir", folder.parent, "--run_name", folder.name, "--resume", "auto"]
    return cluster.sbatch(f"--output={folder.parent}/{folder.name}.log", job, *run)


def seconds_to_checkpoint(folder: Path, tell: Callable[[], object]) -> float:
    """Tell a run to stop, and wait until it has stopped with a checkpoint."""
    asked = time.time()
    tell()
    wait_until("an interrupt", lambda: read_events(folder)[-1]["kind"] == "interrupt", 60)
    checkpoints = [event["time"] for event in read_events(folder) if event["kind"] == "checkpoint"]
    return next(moment for moment in checkpoints if moment > asked) - asked
