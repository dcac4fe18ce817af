"""A running Slurm cluster, as tests speak to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from launching import ROOT, environment


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
