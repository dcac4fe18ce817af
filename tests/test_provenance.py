"""Provenance: what a run says of the program and the machines that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from greenprune.provenance import Place, collect_provenance, git_revision, gpus_used, slurm_job


def git(folder: Path, *args: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", folder, *who, *args], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A user's repository, with the program both in it and installed in an environment below it."""
    for place in ("greenprune", ".venv/lib/python3/site-packages/greenprune"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "provenance.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "greenprune")
    git(tmp_path, "commit", "--quiet", "--message", "mine")
    return tmp_path


def test_the_revision_is_that_of_the_checkout_that_the_program_runs_from(checkout: Path) -> None:
    file = checkout / "greenprune" / "provenance.py"
    revision = git(checkout, "rev-parse", "HEAD")
    assert git_revision(file) == {"revision": revision, "changed": False}
    file.write_text("changed\n")
    assert git_revision(file) == {"revision": revision, "changed": True}


def test_installed_below_another_repository_the_program_has_no_revision(checkout: Path) -> None:
    assert git_revision(checkout / ".venv/lib/python3/site-packages/greenprune/provenance.py") is None


H100, A100 = "NVIDIA H100", "NVIDIA A100"


@pytest.mark.parametrize(
    ("places", "gpus"),
    [
        ([Place("a", "GPU-3", H100, "EPYC")], [H100]),  # the others of its machine are not its own
        ([Place("a", f"GPU-{rank}", H100, "EPYC") for rank in range(2)], [H100, H100]),
        ([Place("a", "GPU-1", H100, "EPYC"), Place("b", "GPU-2", A100, "Xeon")], [H100, A100]),  # of another node
        ([Place("a", "GPU-1", H100, "EPYC"), Place("a", "GPU-1", H100, "EPYC")], [H100]),  # one that two ranks share
        ([Place("a", None, None, "EPYC")] * 2, []),
    ],
)
def test_the_gpus_of_a_run_are_those_that_its_ranks_use(places: list[Place], gpus: list[str]) -> None:
    assert gpus_used(places) == gpus


def test_the_machines_of_all_ranks_are_on_record() -> None:
    """Each once, with its processor."""
    places = [Place("a", None, None, "EPYC"), Place("a", None, None, "EPYC"), Place("b", None, None, "Xeon")]
    found = collect_provenance(3, torch.device("cpu"), places)
    assert (found["machines"], found["cpus"], found["gpus"]) == (["a", "b"], ["EPYC", "Xeon"], [])
    assert found["processes"] == 3


def test_how_much_of_its_machine_a_run_has_is_on_record() -> None:
    found = collect_provenance(1, torch.device("cpu"))
    assert 1 <= found["cpu_cores_usable"] <= found["cpu_cores"]
    assert found["cpu_cores_physical"] is None or found["cpu_cores_physical"] <= found["cpu_cores"]
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "8(x2)", "SLURM_CPUS_ON_NODE": "4", "HOME": "/"}
    assert slurm_job(environment) == {"job": "7", "cpus_per_node": "8(x2)", "cpus_on_node": "4"}
    assert slurm_job({"HOME": "/"}) is None
