"""Disks that are full, read-only or faulty, and processes that die while they write: always one checkpoint is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from corrupting import corrupt
from launching import TRAIN, command, environment, run

from greenprune.checkpoint import (
    Checkpoint,
    CheckpointCorrupt,
    CheckpointWriter,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from greenprune.config import UserError
from greenprune.locking import FolderLock
from greenprune.timing import StepTimes
from greenprune.tracking import EventLog, read_events

FLAGS = ["--model.name", "resnet20", "--optim.epochs", "3", "--optim.lr", "0.05", "--run_name", "it", "--device", "cpu"]


def checkpoint_of(step: int, size: int = 1000) -> Checkpoint:
    return Checkpoint({"w": torch.full((size,), float(step))}, {"m": torch.ones(size)}, {"step": step})


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Any]:
    """Mounts small file systems; skips where that is not allowed."""
    targets: list[Path] = []

    def mount(target: Path, *options: str) -> Path:
        target.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(target)], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
        targets.append(target)
        return target

    yield mount
    for target in reversed(targets):
        subprocess.run(["umount", "--lazy", str(target)], check=True)


# Damage.


def test_no_damage_is_taken_for_whole(tmp_path: Path) -> None:
    tally = corrupt(tmp_path, 110, random.Random(5))
    assert all(count["damages"] == 11 for count in tally.values())
    assert {kind: (count["accepted"], count["lost"]) for kind, count in tally.items()} == dict.fromkeys(tally, (0, 0))


def test_a_link_or_a_pipe_is_no_file_of_a_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, checkpoint_of(1), 1)
    content = (path / "state.json").read_bytes()
    (tmp_path / "outside").write_bytes(content)
    for make in (lambda file: file.symlink_to(tmp_path / "outside"), os.mkfifo):
        (path / "state.json").unlink()
        make(path / "state.json")
        with pytest.raises(CheckpointCorrupt, match=r"state\.json: not a regular file"):
            load_checkpoint(path)


# Death in the middle of a write.


def test_a_death_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process is killed at each call to the system that saving makes, one after the other."""
    calls = 0
    for dies_at in range(1, 200):
        folder = tmp_path / str(dies_at)
        save_checkpoint(folder, 10, checkpoint_of(10), 1)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                _save_and_die(folder, dies_at)
            os._exit(1)
        _, status = os.waitpid(pid, 0)
        found = load_newest(folder)
        assert found is not None
        path, checkpoint, damaged = found
        assert damaged == [], f"died at call {dies_at}"
        assert checkpoint.state["step"] == float(checkpoint.model["w"][0]) == int(path.name[-9:])
        save_checkpoint(folder, 20, checkpoint_of(20), 1)
        assert os.listdir(folder) == ["step-000000020"]
        if os.waitstatus_to_exitcode(status) == 0:
            break
        calls += 1
    assert calls > 15


def _save_and_die(folder: Path, dies_at: int) -> None:
    seen = 0

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if name in (
            "open",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.scandir",
            "shutil.rmtree",
        ):
            seen += 1
            if seen == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save_checkpoint(folder, 20, checkpoint_of(20), 1)
    os._exit(0)


# Keeping.


def test_the_best_stay_besides_the_newest(tmp_path: Path) -> None:
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.7, 5: 0.9, 6: 0.6, 7: 0.1}
    for step, score in scores.items():
        save_checkpoint(tmp_path, step, checkpoint_of(step), 1, keep_best=2, score=score)
    assert [int(path.name[-9:]) for path in list_checkpoints(tmp_path)] == [2, 5, 7]
    save_checkpoint(tmp_path, 3, checkpoint_of(3), 1, keep_best=2, score=0.8)  # a course that leaves 5 and 7 behind
    assert [int(path.name[-9:]) for path in list_checkpoints(tmp_path)] == [2, 3]


# Writing beside training.


def test_a_snapshot_is_of_the_moment(tmp_path: Path) -> None:
    """What training does to its tensors and figures while they are being written is not in the checkpoint."""
    weights, moments, step_times = torch.zeros(2_000_000), torch.zeros(2_000_000), StepTimes([1.0])
    writer = CheckpointWriter(tmp_path, 1, 0, tmp_path / "events.jsonl")
    state = {"step": 1, "step_times": vars(step_times)}
    writer.begin(1, Checkpoint({"w": weights}, {"m": [moments]}, state), None)
    step_times.add(2.0)
    step_times.cut()
    for _ in range(20):
        weights += 1
        moments += 1
    written = writer.wait()
    writer.close()
    assert written is not None
    loaded = load_checkpoint(written.path)
    assert loaded.model["w"].abs().max() == 0
    assert loaded.training["m"][0].abs().max() == 0
    assert StepTimes(**loaded.state["step_times"]) == StepTimes([1.0])


def test_a_checkpoint_in_hand_is_finished_on_closing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 1, 0, tmp_path / "events.jsonl")
    writer.begin(1, checkpoint_of(1, 1_000_000), None)
    writer.close()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000001"]


# No room, and nowhere to write.


def test_a_full_disk_leaves_the_older_checkpoint_and_no_rubbish(mounted: Any, tmp_path: Path) -> None:
    disk = mounted(tmp_path / "disk", "size=2m")
    save_checkpoint(disk, 1, checkpoint_of(1), 2)
    for size in (270_000, 400_000, 600_000):  # full in the second file, and in the first
        with pytest.raises(OSError, match="No space left") as failed:
            save_checkpoint(disk, 2, checkpoint_of(2, size), 2)
        assert failed.value.errno == errno.ENOSPC
        assert str(disk) in str(failed.value.filename)
        assert os.listdir(disk) == ["step-000000001"]
    assert load_newest(disk)[1].state == {"step": 1}


def test_a_limit_on_files_is_told_as_the_system_tells_it(tmp_path: Path, files_of_at_most: Any) -> None:
    """The same without a file system of its own, for machines that allow no mounting."""
    save_checkpoint(tmp_path, 1, checkpoint_of(1), 2)
    with files_of_at_most(100_000), pytest.raises(OSError, match="File too large") as failed:
        save_checkpoint(tmp_path, 2, checkpoint_of(2, 100_000), 2)
    assert failed.value.errno == errno.EFBIG
    assert load_newest(tmp_path)[1].state == {"step": 1}


def test_an_event_that_does_not_fit_leaves_a_whole_log(mounted: Any, tmp_path: Path) -> None:
    disk = mounted(tmp_path / "disk", "size=64k")
    log = EventLog(disk / "events.jsonl", [])
    recorded = 0
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012 - the last one fails
        for step in range(1000):
            log.record("train", step, text="x" * 3000)
            recorded += 1
    assert 0 < recorded < 1000
    assert (disk / "events.jsonl").read_bytes().endswith(b"\n")
    assert [event["step"] for event in read_events(disk / "events.jsonl")] == list(range(recorded))
    log.close()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.system)])
def test_a_disk_that_fills_stops_the_run_and_names_the_last_checkpoint(
    processes: int, mounted: Any, tmp_path: Path
) -> None:
    disk = mounted(tmp_path / "disk", "size=4m")
    (disk / "ballast").write_bytes(bytes(700_000))  # room for one checkpoint of 2.2 MB, not for two
    args = [*FLAGS, "--gate.enabled", "false", "--output_dir", str(disk)]  # nothing gets smaller
    stopped = run(TRAIN, args, processes)
    assert stopped.returncode != 0
    told = [line for line in stopped.stderr.splitlines() if line.startswith("greenprune: error:")]
    assert len(told) == 1, stopped.stderr
    assert "No space left on device" in told[0]
    newest = list_checkpoints(disk / "it" / "checkpoints")[-1]
    assert f"the last good checkpoint is {newest}. Once there is room" in told[0]
    assert "trainer.py" not in stopped.stderr, stopped.stderr  # no traceback but the launcher's
    (disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
    done = run(TRAIN, [*args, "--resume", "auto"], processes)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.system
def test_checkpoints_that_cannot_be_written(mounted: Any, tmp_path: Path) -> None:
    """A file system that is read-only where the checkpoints go."""
    (tmp_path / "runs").mkdir()
    args = [*FLAGS, "--output_dir", str(tmp_path / "runs"), "--resume", "auto"]
    process = subprocess.Popen(
        command(TRAIN, [*args, "--optim.epochs", "2000"], 1), env=environment(), stdout=subprocess.DEVNULL
    )
    first = tmp_path / "runs" / "it" / "checkpoints"
    while process.poll() is None and not list_checkpoints(first):
        pass
    process.kill()
    process.wait()
    kept = tmp_path / "kept"
    shutil.copytree(first, kept)
    mounted(first, "size=16m")
    shutil.copytree(kept, first, dirs_exist_ok=True)
    newest = list_checkpoints(first)[-1]
    subprocess.run(["mount", "-o", "remount,ro", str(first)], check=True)
    stopped = run(TRAIN, [*args, "--optim.epochs", "2000"])
    assert stopped.returncode == 1
    assert "Read-only file system" in stopped.stderr
    assert f"the last good checkpoint is {newest}" in stopped.stderr
    assert len(stopped.stderr.strip().splitlines()) == 1, stopped.stderr


def test_an_output_folder_that_is_read_only(mounted: Any, tmp_path: Path) -> None:
    disk = mounted(tmp_path / "disk", "size=1m", "ro")
    refused = run(TRAIN, [*FLAGS, "--output_dir", str(disk)])
    assert refused.returncode == 2
    assert "output_dir: cannot write" in refused.stderr
    assert "Read-only file system" in refused.stderr


# One process a folder.


def test_a_lock_left_behind_on_this_machine_is_taken_over(tmp_path: Path) -> None:
    code = "import sys, pathlib, os; from greenprune.locking import FolderLock; FolderLock(pathlib.Path(sys.argv[1]));"
    subprocess.run([sys.executable, "-c", code + "os.kill(os.getpid(), 9)", tmp_path], check=False)
    lock = FolderLock(tmp_path)
    assert lock.left_by.startswith("process ")
    lock.release()
    again = FolderLock(tmp_path)
    assert again.left_by == ""  # let go of in good order
    again.release()


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "lock.release(); os._exit(0)"], ids=["killed", "let go"])
def test_a_process_that_was_started_beside_the_run_does_not_hold_its_folder(tmp_path: Path, end: str) -> None:
    """As loader processes of a killed run do not, which find out seconds later that they are alone."""
    code = f"""
import os, pathlib, sys, time
from greenprune.locking import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
sys.stdin.readline()
{end}
"""
    args = [sys.executable, "-c", code, tmp_path]
    with subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        helper = int(owner.stdout.readline())
        try:
            owner.stdin.close()
            owner.wait()
            FolderLock(tmp_path).release()
        finally:
            os.kill(helper, signal.SIGKILL)


def test_a_lock_of_another_machine_is_taken_over_once_it_is_not_renewed(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 7 on elsewhere")
    lock = FolderLock(tmp_path, watch_s=0.6)
    assert lock.left_by == "process 7 on elsewhere"
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()


def test_a_lock_that_another_machine_renews_is_respected(tmp_path: Path) -> None:
    """As on a shared file system that keeps locks to one machine."""
    path = tmp_path / ".lock"
    path.write_text("process 7 on elsewhere")
    code = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.1)"
    owner = subprocess.Popen([sys.executable, "-c", code, path])
    try:
        with pytest.raises(UserError, match="in use by another process \\(process 7 on elsewhere\\)"):
            FolderLock(tmp_path, watch_s=20)
    finally:
        owner.kill()
        owner.wait()


def test_where_there_are_no_locks_a_living_owner_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    (tmp_path / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    with pytest.raises(UserError, match="in use by another process"):
        FolderLock(tmp_path)
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / ".lock").write_text(f"process {dead.pid} on {socket.gethostname()}")
    FolderLock(tmp_path).release()


# Falling back.


def test_going_on_from_the_checkpoint_before_says_what_is_lost_and_what_it_tells_otherwise(tmp_path: Path) -> None:
    args = [*FLAGS, "--output_dir", str(tmp_path), "--resume", "auto"]
    whole = run(TRAIN, [*args, "--energy.intensity_g_per_kwh", "50"])
    assert whole.returncode == 0, whole.stderr[-3000:]
    folder = tmp_path / "it"
    accuracy = json.loads((folder / "summary.json").read_text())["accuracy"]
    (folder / "summary.json").unlink()
    damaged = folder / "checkpoints" / "step-000000066" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = run(TRAIN, [*args, "--energy.intensity_g_per_kwh", "400", "--energy.pue", "1.5"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert "CO2e of the whole run, earlier attempts included, is told at 600 g/kWh from now on" in again.stdout
    assert "it was at 50" in again.stdout
    assert f"going on from step-000000044, because {damaged}: size or checksum differs" in again.stdout
    assert "the 22 steps since the checkpoint at step 44 are lost" in again.stdout
    assert json.loads((folder / "summary.json").read_text())["accuracy"] == accuracy


def test_a_checkpoint_of_another_run_is_named_and_not_used(tmp_path: Path) -> None:
    for seed, name in (("0", "it"), ("1", "other")):
        done = run(TRAIN, [*FLAGS, "--output_dir", str(tmp_path), "--run_name", name, "--seed", seed])
        assert done.returncode == 0, done.stderr[-3000:]
    checkpoints = tmp_path / "it" / "checkpoints"
    shutil.rmtree(checkpoints / "step-000000066")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-000000066", checkpoints / "step-000000066")
    (tmp_path / "it" / "summary.json").unlink()
    again = run(TRAIN, [*FLAGS, "--output_dir", str(tmp_path), "--resume", "auto"])
    assert again.returncode == 0, again.stderr[-3000:]
    assert "step-000000066: of another run (it differs in seed)" in again.stdout
