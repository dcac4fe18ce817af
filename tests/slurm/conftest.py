"""A real Slurm of two nodes, one for all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from slurm_cluster import Cluster

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    there = all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("slurmctld", "munged", "ip"))
    if not there or os.geteuid() != 0:
        missing = "needs root" if there else "no Slurm: tests/slurm/install-slurm.sh"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    # Not below pytest's folder: paths of sockets must be short.
    folder = Path(tempfile.mkdtemp(prefix="slurm."))
    port = 26000 + 4 * (os.getpid() % 250)
    started = subprocess.run(
        [str(HERE / "start-slurm.sh"), str(folder), str(port)], capture_output=True, text=True, check=False, timeout=60
    )
    assert started.returncode == 0, started.stderr
    yield Cluster(folder)
    subprocess.run([str(folder / "stop-slurm")], check=True, timeout=60, capture_output=True)
    shutil.rmtree(folder)
