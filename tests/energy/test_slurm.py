"""Slurm's own figure, from a stand-in for sacct: a program of that name on the path."""

from __future__ import annotations

from pathlib import Path

import pytest

from greenprune.energy import slurm_energy, slurm_job


@pytest.fixture
def sacct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program's file, to be filled; it keeps its arguments beside it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "sacct"


def answer(sacct: Path, text: str, code: int = 0) -> None:
    sacct.write_text(f"#!/bin/sh\necho \"$@\" > {sacct}.asked\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    sacct.chmod(0o755)


@pytest.mark.parametrize(
    ("rows", "energy_j"),
    [
        ("42|5000\n42.batch|3000\n42.0|2000", 5000),
        ("42|\n42.batch|3000\n42.0|2900\n42.1|50", 3000),  # srun on the node of the script
        ("42|\n42.batch|3000\n42.0|8000\n42.1|4000", 12000),  # srun on other nodes as well
        ("42|\n42.batch|4580\n42.extern|4581\n42.0|4570", 4581),  # three times the same nodes
        ("42|0\n42.batch|0", None),
        ("42|18446744073709551614\n42.0|700", 700),
        ("42+0|100\n42+1|200\n42+0.0|90", 300),
        ("42|1000\n42.batch|900\n42|\n42.extern|300\n42.batch|200", 1300),  # queued again once: the second goes on
        ("", None),
        ("error: something\n42|12|7", None),
    ],
)
def test_the_job_is_told_or_else_what_its_steps_took_together(sacct: Path, rows: str, energy_j: float | None) -> None:
    answer(sacct, rows)
    found = slurm_energy("42")
    assert found.energy_j == energy_j
    assert (found.reason is None) == (energy_j is not None)
    asked = Path(f"{sacct}.asked").read_text()
    assert "-j 42" in asked
    assert "ConsumedEnergyRaw" in asked


def test_without_sacct_or_with_a_broken_one_there_is_a_reason_and_no_error(
    sacct: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setenv("PATH", str(sacct.parent))  # this machine may have a Slurm
        missing = slurm_energy("42")
    assert missing.energy_j is None
    assert "not installed" in str(missing.reason)
    answer(sacct, "42|1", code=1)
    failed = slurm_energy("42")
    assert failed.energy_j is None
    assert "exit code 1" in str(failed.reason)


def test_one_task_of_an_array_is_not_taken_for_all() -> None:
    assert slurm_job({}) is None
    assert slurm_job({"SLURM_JOB_ID": "42"}) == "42"
    assert slurm_job({"SLURM_JOB_ID": "42", "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "5"}) == "42_5"
