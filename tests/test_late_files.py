"""A file system that shows late what another machine has written: files are put aside and come back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launching import TRAIN, command, environment, run

from greenprune.checkpoint import Checkpoint, save_checkpoint
from greenprune.config import UserError
from greenprune.late_files import await_attempt, take_lock
from greenprune.locking import FolderLock
from greenprune.tracking import RunFolder

SMALL = "model: {name: resnet20}\noptim: {epochs: 3, lr: 0.05}\nremoval: {window: 11}\ntracking: {log_every: 1}\n"


def stopped_run(folder: RunFolder, step: int) -> Path:
    """A run's folder as an interrupt leaves it, and its checkpoint."""
    folder.path.mkdir(parents=True)
    folder.config.write_text("")
    tensors = {"a": torch.zeros(2)}
    path = save_checkpoint(folder.checkpoints, step, Checkpoint(tensors, {}, {"step": step}), keep_last=2)
    with folder.events.open("a") as file:
        file.write(json.dumps({"time": 0.0, "step": step, "kind": "interrupt", "checkpoint": str(path)}) + "\n")
    return path


def seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def test_what_can_be_seen_is_not_waited_for(tmp_path: Path) -> None:
    new, stopped = RunFolder(tmp_path / "runs" / "new"), RunFolder(tmp_path / "runs" / "stopped")
    stopped_run(stopped, 5)
    assert seconds(lambda: await_attempt(new, requeued=False)) < 0.5
    assert seconds(lambda: await_attempt(stopped, requeued=True)) < 0.5


def test_a_damaged_line_of_the_log_is_no_reason_to_wait_or_to_fail(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "run")
    stopped_run(folder, 5)
    folder.events.write_bytes(b"\0" * 64 + b"\n" + folder.events.read_bytes())
    assert seconds(lambda: await_attempt(folder, requeued=True)) < 0.5


@pytest.mark.parametrize("late", ["folder", "checkpoint", "one file"])
def test_what_comes_late_is_waited_for(tmp_path: Path, late: str) -> None:
    folder = RunFolder(tmp_path / "runs" / "run")
    checkpoint = stopped_run(folder, 5)
    path = {"folder": folder.path, "checkpoint": checkpoint, "one file": checkpoint / "model.safetensors"}[late]
    aside = path.rename(tmp_path / "aside")
    comes = threading.Timer(1.5, lambda: aside.rename(path))
    comes.start()
    assert 1 < seconds(lambda: await_attempt(folder, requeued=True)) < 10
    comes.join()


def test_what_never_comes_is_not_waited_for_forever(tmp_path: Path) -> None:
    gone = RunFolder(tmp_path / "run")
    assert 0.9 < seconds(lambda: await_attempt(gone, requeued=True, patience_s=1)) < 5


def test_a_lock_that_goes_late_is_waited_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    goes = threading.Timer(1.5, FolderLock(folder.path).release)
    goes.start()
    with pytest.raises(UserError, match="in use by another process"):
        take_lock(folder, 0.0)
    lock = take_lock(folder, 20)
    goes.join()
    lock.release()


@pytest.mark.system
def test_a_job_that_queued_itself_goes_on_from_what_it_sees_late(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(SMALL)
    args = ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path), "--run_name", "run"]
    args += ["--resume", "auto"]
    folder = RunFolder(tmp_path / "run")
    first = subprocess.Popen(command(TRAIN, args, 1), env=environment(), stderr=subprocess.DEVNULL)
    while not (folder.events.exists() and '"step": 30,' in folder.events.read_text()):
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 143
    stopped = json.loads(folder.events.read_text().splitlines()[-1])
    newest = Path(stopped["checkpoint"])
    aside = newest.rename(tmp_path / "aside")
    comes = threading.Timer(14, lambda: aside.rename(newest))
    comes.start()
    done = run(TRAIN, args, SLURM_JOB_ID="1", SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    comes.join()
    starts = [event for event in map(json.loads, folder.events.read_text().splitlines()) if event["kind"] == "start"]
    assert [start["step"] for start in starts] == [0, stopped["step"]]
