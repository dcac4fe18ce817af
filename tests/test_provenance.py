"""Provenance: what a run says of the program and the machines that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from greenprune.provenance import git_revision


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
