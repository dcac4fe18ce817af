"""greenprune sweep as a user gives it, without Slurm: folders, states, runs on this machine, wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
sys.path.insert(0, str(Path(__file__).parents[1] / "report"))
from launching import ROOT, environment
from recording import damage_line, record_run, stop_before

from greenprune.config import load_config
from greenprune.formatting import format_joules, format_seconds
from greenprune.sweep.command import main
from greenprune.sweep.folder import PlannedRun
from greenprune.sweep.local import _Started

BASE = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: 2, lr: 0.05}
gate: {warmup: 0.1}
removal: {window: 11, decide_by: 0.6}
tracking: {log_every: 2}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a sweep of two runs in it, on a machine without Slurm."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "two.yaml").write_text("base: base.yaml\ntargets: [0.5]\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(args)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_dry_run_shows_all_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(place.rglob("*"))
    code, out, _ = sweep(capsys, "two.yaml", "--dry-run", "--at-once", "3")
    assert code == 0
    assert "0000-digits-resnet20-dense-seed0" in out
    assert "0001-digits-resnet20-block-0.5-seed0" in out
    assert "#SBATCH --signal=B:USR1@120" in out
    assert "--array=0-1%3" in out
    assert "--dependency=afterany:ARRAY" in out
    assert sorted(place.rglob("*")) == before


def test_configs_are_numbered_and_complete(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    dense, gated = (load_config(folder / "configs" / name) for name in ("0000.yaml", "0001.yaml"))
    assert (dense.gate.enabled, gated.gate.enabled) == (False, True)
    assert gated.run_name == "0001-digits-resnet20-block-0.5-seed0"
    code, out, _ = sweep(capsys, "status", str(folder), "--json")
    assert code == 0
    assert [(state["state"], state["progress"]) for state in json.loads(out)] == [("missing", None)] * 2


def test_what_does_not_change_results_may_change(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(capsys, "two.yaml")[0] == 0
    (place / "base.yaml").write_text(BASE + "energy: {country: FRA}\n")
    assert sweep(capsys, "two.yaml")[0] == 0
    assert load_config(place / "runs" / "sweeps" / "two" / "configs" / "0001.yaml").energy.country == "FRA"


@pytest.mark.parametrize("how", [(), ("--submit",), ("--local",), ("--dry-run",)])
def test_the_folder_of_another_sweep_is_left_alone(
    place: Path, capsys: pytest.CaptureFixture[str], how: tuple[str, ...]
) -> None:
    assert sweep(capsys, "two.yaml")[0] == 0
    before = {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()}
    for change, difference in (
        ("base: base.yaml\ntargets: [0.4]\n", "run 0001 is 0001-digits-resnet20-block-0.4-seed0 here"),
        ("base: base.yaml\ntargets: [0.5]\nseeds: [0, 1]\n", "run 0002 is new"),
        ("base: base.yaml\ntargets: [0.5]\nsettings: {optim.lr: 0.1}\n", "run 0000 differs in optim.lr"),
    ):
        (place / "two.yaml").write_text(change)
        code, _, err = sweep(capsys, "two.yaml", *how)
        assert code == 2
        assert err.startswith("greenprune: error: name: ")
        assert "holds another sweep of 2 runs" in err
        assert difference in err
        assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in (place / "runs").rglob("*") if path.is_file()} == before


def test_a_folder_of_something_else_is_left_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "runs" / "sweeps" / "two"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    code, _, err = sweep(capsys, "two.yaml")
    assert code == 2
    assert "holds something other than a sweep" in err
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_without_slurm_submit_says_what_is_missing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = sweep(capsys, "two.yaml", "--submit")
    assert code == 2
    assert err.startswith("greenprune: error: --submit: Slurm is not here (sbatch, squeue, scontrol, scancel not on")
    assert not (place / "runs").exists()


def slurm(place: Path, **bodies: str) -> Path:
    """Put stand-ins for Slurm's commands on the PATH, and give the file in which they write how they were called."""
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        program = place / "programs" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >>"{place}/called"\n{bodies.get(name, ":")}\n')
        program.chmod(0o755)
    return place / "called"


IDS = 'case "$*" in *dependency*) echo 78;; *) echo 77;; esac'


def test_a_ctrl_c_between_the_two_jobs_of_a_submission_leaves_none_held(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first command interrupts who has called it, as a terminal does; what was submitted is told."""
    called = slurm(place, sbatch=f"kill -INT $PPID; {IDS}")
    code, out, err = sweep(capsys, "two.yaml", "--submit")
    assert code == 128 + signal.SIGINT
    assert "job 77: 2 runs" in out
    assert "scancel 77 78" in err
    assert "scontrol release 77" in called.read_text().splitlines()


def test_a_ctrl_c_of_a_terminal_does_not_reach_slurms_commands(place: Path) -> None:
    """Of an sbatch that dies of it nobody would know whether its job is in the queue."""
    slurm(place, sbatch=f"sleep 1; {IDS}")
    programs = f"{place / 'programs'}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "greenprune.cli", "sweep", "two.yaml", "--submit"],
        cwd=place,
        env=environment() | {"PATH": f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while "sbatch" not in ((place / "called").read_text() if (place / "called").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "job 77: 2 runs" in out


FAILING = {
    "the record": ("", "", "No space left on device", 1),
    "the release": ("exit 1", "", "scontrol refuses: exit code 1", 2),
    "the release, and to take them back": ("exit 1", "exit 1", "scontrol refuses: exit code 1", 2),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_submission_that_fails_takes_both_jobs_back(
    case: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol, scancel, message, expected = FAILING[case]
    called = slurm(place, sbatch=IDS, scontrol=scontrol, scancel=scancel)
    if case == "the record":

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("greenprune.sweep.command.record_submission", full)
    code, _, err = sweep(capsys, "two.yaml", "--submit")
    assert code == expected
    assert message in err.splitlines()[-1]
    assert [call for call in called.read_text().splitlines() if "scancel" in call] == ["scancel 77", "scancel 78"]
    assert ("jobs 77, 78 are still in the queue (scancel refuses: exit code 1)" in err) == bool(scancel)
    assert ("to take them back: scancel 77 78" in err) == bool(scancel)


@pytest.mark.parametrize(("args", "site"), [(["--at-once", "1"], ""), ([], "exclusive: true\n")])
def test_runs_that_cannot_share_a_node_are_submitted_without_a_note(
    place: Path, capsys: pytest.CaptureFixture[str], args: list[str], site: str
) -> None:
    for name, script in (("sbatch", "echo 7"), ("scontrol", "echo is UP"), ("squeue", ":"), ("scancel", ":")):
        (place / "programs" / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / "programs" / name).chmod(0o755)
    (place / "site.yaml").write_text(site)
    code, _, err = sweep(capsys, "two.yaml", "--submit", "--site", "site.yaml", *args)
    assert (code, err) == (0, "")
    job = (place / "runs" / "sweeps" / "two" / "array.sbatch").read_text()
    assert ("#SBATCH --exclusive\n" in job) == bool(site)
    submission = json.loads((place / "runs" / "sweeps" / "two" / "submissions.jsonl").read_text())
    assert submission["user"] == os.getuid()  # so that others who share the folder see its tasks


WRONG = {
    "no file": (["nowhere.yaml"], "sweep 'nowhere.yaml': cannot be read"),
    "no site": (["two.yaml", "--dry-run", "--site", "nowhere.yaml"], "site 'nowhere.yaml': cannot be read"),
    "unknown site key": (["two.yaml", "--submit", "--site", "bad.yaml"], "acount: unknown key"),
    "none at a time": (["two.yaml", "--local", "0"], "--local: 0 is not valid"),
    "no sweep": (["status", "."], "holds no sweep.json"),
    "nothing to report": (["collect", "runs", "--patience", "0"], "holds no sweep.json"),
    "one node of many": (
        ("jobs", "jobs", "--nodes", "1", "--processes", "1"),
        "--nodes: 1 is not valid; expected a whole number of at least 2",
    ),
    "no process": (
        ("jobs", "jobs", "--processes", "0"),
        "--processes: 0 is not valid; expected a whole number of at least 1",
    ),
    "at once here": (
        ("two.yaml", "--local", "--at-once", "7"),
        "--at-once: 7 is not valid without --submit or --dry-run; expected one of them, or --local N",
    ),
    "at once where nothing is done": (("two.yaml", "--at-once", "7"), "--at-once: 7 is not valid without --submit"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, message = WRONG[case]
    (place / "bad.yaml").write_text("acount: a\n")
    code, out, err = sweep(capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("greenprune: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (place / "runs").exists()


def test_what_slurm_refuses_leaves_nothing_in_the_queue(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report's job is refused: the array that was held for it is taken back."""
    refusal = "case \"$*\" in *dependency*) echo 'sbatch: error: invalid account' >&2; exit 1;; *) echo 77;; esac"
    called = slurm(place, sbatch=refusal)
    code, _, err = sweep(capsys, "two.yaml", "--submit")
    assert code == 2
    assert "sbatch refuses: sbatch: error: invalid account" in err
    calls = called.read_text().splitlines()
    assert "--hold" in calls[0]
    assert calls[-1] == "scancel 77"
    assert not any(call.startswith("scontrol") for call in calls)
    assert not (place / "runs" / "sweeps" / "two" / "submissions.jsonl").exists()


@pytest.mark.parametrize("late", [False, True])
def test_the_report_waits_for_runs_that_have_just_ended_elsewhere(
    place: Path, capsys: pytest.CaptureFixture[str], late: bool
) -> None:
    """On a shared file system what they wrote last may come a little later than the job that reports."""
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    names = {"0000": "0000-digits-resnet20-dense-seed0", "0001": "0001-digits-resnet20-block-0.5-seed0"}
    for label, name in names.items():
        record_run(folder / "runs" / name, gated=label == "0001")
        (folder / "exits" / label).write_text("0\n")
    written = [folder / "runs" / names["0001"] / "summary.json", folder / "exits" / "0001"]
    comes = threading.Timer(0, lambda: None)
    if late:
        aside = [path.rename(place / path.name) for path in written]
        comes = threading.Timer(1.5, lambda: [a.rename(path) for a, path in zip(aside, written, strict=True)])
    comes.start()
    started = time.monotonic()
    code, out, _ = sweep(capsys, "collect", str(folder), "--patience", "30")
    comes.join()
    assert code == 0
    assert "2 runs: 2 finished" in out
    assert (1 < time.monotonic() - started < 20) if late else True
    report = (folder / "report.md").read_text()
    assert all(name in report for name in names.values())
    assert "has no result" not in report


def test_the_report_waits_until_a_run_that_was_killed_elsewhere_is_known_to_be_gone(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    names = ["0000-digits-resnet20-dense-seed0", "0001-digits-resnet20-block-0.5-seed0"]
    for name in names:
        record_run(folder / "runs" / name, gated=name == names[1])
    (folder / "runs" / names[0] / "summary.json").unlink()
    lock = folder / "runs" / names[0] / ".lock"
    lock.write_text("process 4242 on gpu-node-17")
    os.utime(lock, (0, time.time() - 13.5))
    code, out, _ = sweep(capsys, "collect", str(folder), "--patience", "3")
    assert code == 0
    assert "2 runs: 1 failed, 1 finished" in out


def test_a_finished_run_with_a_damaged_line_is_finished(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    runs = ["0000-digits-resnet20-dense-seed0", "0001-digits-resnet20-block-0.5-seed0"]
    for name in runs:
        record_run(folder / "runs" / name, gated=name == runs[1])
        damage_line(folder / "runs" / name, 3)
    code, out, _ = sweep(capsys, "status", str(folder), "--json")
    assert code == 0
    for state in json.loads(out):
        assert (state["state"], state["attempts"]) == ("finished", 1)
        assert state["energy_j"] > 0
        assert state["why"].startswith("events.jsonl: line 3 is no event: ")
    code, out, _ = sweep(capsys, "two.yaml", "--local")
    assert code == 0
    assert "2 of 2 runs are finished" in out
    assert "started" not in out


@pytest.mark.parametrize("machines", [["m1"], []])
def test_totals_say_that_joules_of_shared_machines_are_counted_more_than_once(
    place: Path, capsys: pytest.CaptureFixture[str], machines: list[str]
) -> None:
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    for name in ("0000-digits-resnet20-dense-seed0", "0001-digits-resnet20-block-0.5-seed0"):
        record_run(folder / "runs" / name)  # both at one time
        (folder / "runs" / name / "provenance.jsonl").write_text(json.dumps({"machines": machines}) + "\n")
    out = " ".join(sweep(capsys, "status", str(folder))[1].split())
    assert " J so far" in out
    assert ("J so far, other work on machines that were shared counted as well" in out) == bool(machines)


def here(place: Path, *args: str, **more: str) -> subprocess.Popen[str]:
    variables = environment() | {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)} | more
    command = [sys.executable, "-m", "greenprune.cli", "sweep", *args]
    return subprocess.Popen(
        command, cwd=place, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(process: subprocess.Popen[str], text: str, *files: Path) -> None:
    """Wait until a text is in all of the files that a sweep's runs write, while the sweep goes on."""
    deadline = time.monotonic() + 100
    while not all(file.exists() and text in file.read_text() for file in files):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_here_a_reader_that_leaves_leaves_no_run_behind(place: Path) -> None:
    command = [sys.executable, "-m", "greenprune.cli", "sweep", "two.yaml", "--local", "2"]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"started")
    process.stdout.close()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert b"error" not in process.stderr.read()
    process.stderr.close()
    left = [other.info["cmdline"] for other in psutil.process_iter(["cmdline"])]
    assert not [
        words for words in left if words and "greenprune.train" in words and "runs/sweeps/two" in " ".join(words)
    ]


@pytest.mark.system
def test_here_it_is_stopped_in_good_order_and_goes_on(place: Path) -> None:
    (place / "base.yaml").write_text(BASE.replace("epochs: 2", "epochs: 8"))
    folder = place / "runs" / "sweeps" / "two"
    first = here(place, "two.yaml", "--local", "2")
    names = ["0000-digits-resnet20-dense-seed0", "0001-digits-resnet20-block-0.5-seed0"]
    events = [folder / "runs" / name / "events.jsonl" for name in names]
    wait_for(first, '"train"', *events)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGINT
    assert "go on with the same command" in err
    states = json.loads(here(place, "status", str(folder), "--json").communicate(timeout=60)[0])
    assert [(state["state"], state["attempts"]) for state in states] == [("stopped", 1)] * 2
    assert all(0 < state["progress"] < 1 for state in states)
    assert all(state["energy_j"] > 0 for state in states)

    again = here(place, "two.yaml", "--local", "2")
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    assert "counts the joules of the whole machine" in err
    assert "2/2" in out
    for name in names:  # joules and seconds of both attempts
        summary = json.loads((folder / "runs" / name / "summary.json").read_text())
        told = f"{format_joules(summary['energy_j'])}, {format_seconds(summary['time_s'])}"
        assert any(line.endswith(told) for line in out.splitlines() if f"/2 {name}: " in line)
    states = json.loads(here(place, "status", str(folder), "--json").communicate(timeout=60)[0])
    assert [(state["state"], state["attempts"], state["progress"]) for state in states] == [("finished", 2, 1.0)] * 2
    assert all(name in (folder / "report.md").read_text() for name in names)

    nothing = here(place, "two.yaml", "--local")
    out, err = nothing.communicate(timeout=60)
    assert nothing.returncode == 0
    assert "whole machine" not in err
    assert "started" not in out


STARTING = """
import sys, time
if "greenprune.train" in sys.orig_argv and "accelerate.commands.launch" not in sys.orig_argv:
    print("starting", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.system)])
def test_here_runs_that_are_stopped_as_they_start_have_not_failed(place: Path, processes: int) -> None:
    (place / "two.yaml").write_text(f"base: base.yaml\ntargets: [0.5]\nprocesses: {processes}\n")
    (place / "sitecustomize.py").write_text(STARTING)  # training stands still before its first import
    folder = place / "runs" / "sweeps" / "two"
    process = here(place, "two.yaml", "--local", "1", PYTHONPATH=f"{place}{os.pathsep}{ROOT}")
    log = folder / "logs" / "0000.log"
    wait_for(process, "starting", log)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "0000-digits-resnet20-dense-seed0: stopped, as it was starting" in out
    assert "2 runs: 1 stopped, 1 missing" in err
    states = json.loads(here(place, "status", str(folder), "--json").communicate(timeout=60)[0])
    assert [state["state"] for state in states] == ["stopped", "missing"]


@pytest.mark.parametrize(
    ("code", "state"), [(130, "stopped"), (143, "stopped"), (137, "failed"), (139, "failed"), (1, "failed")]
)
def test_what_ended_a_run_that_has_no_checkpoint(
    place: Path, capsys: pytest.CaptureFixture[str], code: int, state: str
) -> None:
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    (folder / "exits" / "0000").write_text(f"{code}\n")
    (folder / "logs" / "0000.log").write_text("")
    code, out, _ = sweep(capsys, "status", str(folder), "--json")
    assert code == 0
    assert [found["state"] for found in json.loads(out)] == [state, "missing"]


def test_why_a_run_failed_is_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    run = folder / "runs" / "0000-digits-resnet20-dense-seed0"
    failure = {"time": 1.0, "step": 19, "kind": "failure", "error": "the loss is nan"}
    stop_before(run, record_run(run), 18, rest=json.dumps(failure) + "\n")
    for code, why in ((None, "the loss is nan; see"), (1, "the loss is nan; see"), (143, "as it was starting")):
        if code is not None:
            (folder / "exits" / "0000").write_text(f"{code}\n")
        _, out, _ = sweep(capsys, "status", str(folder), "--json")
        assert json.loads(out)[0]["why"].startswith(why)


@pytest.mark.parametrize("code", ["2", "1", "137"])
def test_a_stopped_run_that_failed_since_then_has_failed(
    place: Path, capsys: pytest.CaptureFixture[str], code: str
) -> None:
    """Its last attempt ended before it could record anything: the log ends with how the one before was stopped."""
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    run = folder / "runs" / "0000-digits-resnet20-dense-seed0"
    stop_before(run, record_run(run, gated=False), 20)
    interrupt = {"time": 1.0, "step": 20, "kind": "interrupt", "signal": "SIGUSR1", "checkpoint": "step-000000020"}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps(interrupt) + "\n")
    for written, state, why in (
        (None, "stopped", "it has a checkpoint"),
        ("143", "stopped", "it has a checkpoint"),
        (code, "failed", f"exit code {code}; see {folder / 'logs' / '0000.log'}"),
    ):
        if written is not None:
            (folder / "exits" / "0000").write_text(f"{written}\n")
        (first, _) = json.loads(sweep(capsys, "status", str(folder), "--json")[1])
        assert (first["state"], first["why"]) == (state, why)
    assert sweep(capsys, "collect", str(folder), "--patience", "0")[0] == 0
    told = f"has no result: failed (exit code {code}; see {folder / 'logs' / '0000.log'})"
    assert told in (folder / "report.md").read_text().replace("\\", "")


def test_a_run_that_goes_on_at_another_machine_is_told_by_the_lock_that_it_renews(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Slurm's queue: at a machine that only sees the files."""
    assert sweep(capsys, "two.yaml")[0] == 0
    folder = place / "runs" / "sweeps" / "two"
    run = folder / "runs" / "0000-digits-resnet20-dense-seed0"
    stop_before(run, record_run(run, gated=False), 20)
    lock = run / ".lock"
    lock.write_text("process 4242 on gpu-node-17")

    def state() -> tuple[str, str]:
        (first, _) = json.loads(sweep(capsys, "status", str(folder), "--json")[1])
        return first["state"], first["why"]

    assert state() == ("running", "on gpu-node-17")
    (folder / "exits" / "0000").write_text("137\n")  # killed since it renewed its lock last
    assert state() == ("failed", f"exit code 137; see {folder / 'logs' / '0000.log'}")
    os.utime(lock)  # and begun anew, by hand
    assert state() == ("running", "on gpu-node-17")
    (folder / "exits" / "0000").unlink()
    os.utime(lock, (0, time.time() - 60))
    assert state() == ("failed", f"it was killed; see {folder / 'logs' / '0000.log'}")

    def read_only(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    assert state() == ("unknown", "cannot be told (last held by process 4242 on gpu-node-17)")


def test_here_a_run_that_fails_as_it_is_stopped_has_failed(place: Path) -> None:
    """That it was told to stop explains no error and no kill, unless its processes recorded a stop."""
    events = place / "events.jsonl"
    stopped, going = (f'{{"time": 1.0, "step": 3, "kind": "{kind}"}}\n' for kind in ("interrupt", "train"))
    for is_launcher, recorded, ending, code in (
        (False, "", "exit 1", 1),
        (True, going, "exit 1", 1),
        (True, stopped, "exit 1", 128 + signal.SIGTERM),
        (True, "", "exit 1", 128 + signal.SIGTERM),
        (True, "", "kill -KILL $$", 128 + signal.SIGKILL),
    ):
        events.write_text(stopped)  # of an earlier attempt
        process = subprocess.Popen(["/bin/sh", "-c", ending])
        started = _Started(PlannedRun(0, "it", {}, ""), process, 0.0, is_launcher, events, events.stat().st_size)
        process.wait()
        started.stop()
        events.write_text(stopped + recorded)
        assert started.exit_code() == code
