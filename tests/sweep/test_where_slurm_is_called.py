"""A sweep where it is submitted and read: the shell's variables, file systems without locks, a Slurm that is busy."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import sys
from pathlib import Path

import pytest

from greenprune.config import UserError
from greenprune.sweep.command import main
from greenprune.sweep.folder import PlannedRun, SweepFolder
from greenprune.sweep.local import run_here
from greenprune.sweep.slurm import queued_tasks, submit


@pytest.fixture
def programs(sweep_of_two: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = sweep_of_two / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def test_a_job_that_is_submitted_in_another_job_inherits_nothing_of_it(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the memory of both by two measures, srun fails; with the array of the other, it would requeue that one."""
    for name in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_RESTART_COUNT",
        "SLURM_MEM_PER_CPU",
        "SRUN_CPUS_PER_TASK",
    ):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/it")
    monkeypatch.setenv("WANDB_API_KEY", "inherited")
    program(programs, "sbatch", f'env >"{programs}/seen"; echo 5')
    assert submit(["sbatch"]) == "5"
    seen = dict(line.split("=", 1) for line in (programs / "seen").read_text().splitlines() if "=" in line)
    slurm = {name: value for name, value in seen.items() if name.startswith(("SLURM", "SRUN"))}
    assert slurm == {"SLURM_CONF": "/etc/it"}
    assert seen["WANDB_API_KEY"] == "inherited"


def test_outside_of_a_job_slurms_commands_have_the_users_settings(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_CPU_BIND", "none")
    program(programs, "sbatch", 'test "$SLURM_CPU_BIND" = none && echo "5;cluster"')
    assert submit(["sbatch"]) == "5"


def test_the_users_defaults_of_squeue_hide_no_task(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting task that is not seen would be submitted a second time."""
    monkeypatch.setenv("SQUEUE_STATES", "RUNNING")
    monkeypatch.setenv("USER", "somebody_else")
    monkeypatch.setenv("LOGNAME", "somebody_else")
    program(
        programs, "squeue", f'case "$*" in *--user={os.getuid()}\\ *) echo "9|1|${{SQUEUE_STATES:-PENDING}}|no";; esac'
    )
    (task,) = queued_tasks(["9"]).values()
    assert (task.number, task.state) == (1, "PENDING")


def test_the_tasks_of_another_who_submitted_are_seen(programs: Path) -> None:
    """Whoever shares a folder would submit them a second time."""
    other, nobody = next(user.pw_uid for user in pwd.getpwall() if user.pw_uid != os.getuid()), 2**31 - 2
    program(programs, "squeue", f'case "$*" in *--user={os.getuid()},{other}\\ *) echo "9|1|PENDING|no";; esac')
    assert [*queued_tasks(["9"], [other, nobody, other, os.getuid()])] == [1]


@pytest.mark.parametrize("said", ["Welcome to 3 clusters\\n\\n12", "12;north\\nthank you", "12"])
def test_a_sites_own_sbatch_may_greet(programs: Path, said: str) -> None:
    program(programs, "sbatch", f"printf '{said}\\n'")
    assert submit(["sbatch"]) == "12"


def test_an_answer_without_a_number_is_told(programs: Path) -> None:
    program(programs, "sbatch", "echo hello")
    with pytest.raises(UserError, match="sbatch says 'hello'; expected the number of a job"):
        submit(["sbatch"])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_holds_sweeps(
    programs: Path, monkeypatch: pytest.MonkeyPatch, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Lustre is where it is mounted without them."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(["two.yaml"]) == 0, capsys.readouterr().err
    assert len(SweepFolder(Path("runs/sweeps/two")).planned()) == 2


def test_the_report_is_written_though_slurm_does_not_answer(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A moment's silence is waited for; else the sweep of a night would have no report."""
    assert main(["two.yaml"]) == 0
    folder = SweepFolder(Path("runs/sweeps/two"))
    run = folder.planned()[0]
    place = folder.run_folder(run).path
    place.mkdir()
    (place / "config.yaml").write_bytes(folder.config_of(run).read_bytes())
    (place / "events.jsonl").write_text("")
    folder.submissions.write_text(json.dumps({"time": 1.0, "array": "9", "collect": "10", "runs": [0, 1]}) + "\n")
    for name in ("sbatch", "scontrol", "scancel"):
        program(programs, name, ":")
    program(programs, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    code = main(["collect", str(folder.path), "--patience", "0"])
    assert code == 0, capsys.readouterr().err
    report = (folder.path / "report.md").read_text()
    assert "What is in Slurm's queue is not known: squeue refuses: Unable to contact slurm controller." in report
    program(
        programs,
        "squeue",
        f'[ -e "{programs}/asked" ] && echo "9|1|PENDING|why" && exit; touch "{programs}/asked"; exit 1',
    )
    assert main(["collect", str(folder.path), "--patience", "5"]) == 0
    report = (folder.path / "report.md").read_text()
    assert "queue is not known" not in report
    assert "seed0 has no result: waiting (job 9_1 why)." in report


def test_a_run_that_is_new_is_not_taken_for_one_that_ran_before(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that does a sweep with --local and was queued again would wait two minutes for files of each new run."""
    folder = SweepFolder(tmp_path / "sweep")
    for name in ("configs", "exits", "logs", "runs"):
        (folder.path / name).mkdir(parents=True)
    runs = [PlannedRun(number, f"{number:04d}-it", {}, "") for number in range(2)]
    folder.log_of(runs[0]).write_text("of its first attempt\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    program(programs, "python", 'echo "restarts: ${SLURM_RESTART_COUNT:-none}"')
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    assert run_here(folder, runs, 1, 1, lambda *_: None) == 0
    assert [folder.log_of(run).read_text().splitlines()[-1] for run in runs] == ["restarts: 1", "restarts: none"]
