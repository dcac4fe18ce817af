"""Signals, terminals and clocks: what a run does when they do something to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from launching import TRAIN, command, environment

from greenprune.interrupt import InterruptRequest
from greenprune.tracking import read_events

FLAGS = ["--model.name", "resnet20", "--optim.epochs", "500", "--tracking.log_every", "2", "--run_name", "it"]


def wait_for(events: Path, kind: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not (events.exists() and f'"{kind}"' in events.read_text()):
        time.sleep(0.02)


@pytest.mark.parametrize(("ignored", "last"), [(False, "interrupt"), (True, "train")])
def test_a_closed_terminal(ignored: bool, last: str, tmp_path: Path) -> None:
    """The run stops in good order at SIGHUP with its output gone; one started by nohup goes on."""
    reader, writer = os.pipe()
    # The process starts with the signal as a terminal has it, also where nohup has started these tests.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(
        [*(["nohup"] if ignored else []), *command(TRAIN, [*FLAGS, "--output_dir", str(tmp_path)], 1)],
        env=environment(),
        stdout=writer,
        stderr=writer,
    )
    signal.signal(signal.SIGHUP, before)
    os.close(writer)
    events = tmp_path / "it" / "events.jsonl"
    wait_for(events, "epoch", process)
    os.close(reader)  # the terminal and with it the reader is gone
    process.send_signal(signal.SIGHUP)
    if ignored:
        told_before = len(read_events(events))
        while process.poll() is None and len(read_events(events)) < told_before + 40:
            time.sleep(0.02)
        assert process.poll() is None
        process.kill()
        process.wait()
    else:
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    told = [event["kind"] for event in read_events(events)]
    assert (told[-1] == "interrupt") == (last == "interrupt")
    assert "train" in told


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        request = InterruptRequest()
        with request:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
        assert request.signal == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_clock_that_jumps_changes_no_duration(tmp_path: Path) -> None:
    """Two years forward and back within a run: only the events' times follow; seconds and joules do not."""
    jumping = (
        "import sys, time, random; real = time.time; chance = random.Random(0)\n"
        "time.time = lambda: real() + chance.uniform(-6e7, 6e7)\n"
        "import os; from greenprune.command import run_command\n"
        "sys.exit(run_command(sys.argv[1:], os.environ, 'train.py'))"
    )
    args = [*FLAGS, "--optim.epochs", "1", "--removal.decide_by", "1", "--output_dir", str(tmp_path)]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", jumping, *args], env=environment(), capture_output=True, check=False)
    took_s = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "it" / "summary.json").read_text())
    assert 0 < summary["time_s"] < took_s
    assert all(0 < seconds < took_s for seconds in summary["step_time_s"].values() if seconds is not None)
    times = [event["time"] for event in read_events(tmp_path / "it" / "events.jsonl")]
    assert times != sorted(times)
