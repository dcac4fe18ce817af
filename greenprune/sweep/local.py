"""A sweep's runs on this machine, some at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from greenprune.energy import MeterUnavailable, visible_gpu_names
from greenprune.interrupt import InterruptRequest
from greenprune.sweep.folder import PlannedRun, SweepFolder
from greenprune.tracking import salvage_events

_POLL_S = 0.1


@dataclass
class _Started:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    since: float
    is_launcher: bool
    events: Path
    events_bytes: int  # as it was started, of earlier attempts
    is_told: bool = False  # to stop
    gpus: str | None = None  # that it may use; None: all

    def exit_code(self) -> int | None:
        """128 + n if signal n ended it; None if it goes on."""
        code = self.process.poll()
        if code is None or code < 0:
            return None if code is None else 128 - code
        return 128 + signal.SIGTERM if code == 1 and self.is_launcher and self._is_stopped() else code

    def _is_stopped(self) -> bool:
        """Whether its processes ended as they were asked to; their launcher ends with 1 whatever ended them."""
        if _size(self.events) == self.events_bytes:  # they have recorded nothing yet
            return self.is_told
        events, _ = salvage_events(self.events)
        return bool(events) and events[-1]["kind"] == "interrupt"

    def stop(self) -> None:
        """Tell the training processes: not their launcher, which would kill them after 30 s."""
        self.is_told = True
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            for process in (own.children() if self.is_launcher else []) or [own]:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def shares_of_gpus(environment: Mapping[str, str], processes: int) -> list[str]:
    """The GPUs of this machine in parts, each of as many as a run has processes.

    Args:
        environment: With the CUDA_VISIBLE_DEVICES that says which of them may be used.
        processes: Processes of each run.

    Returns:
        A CUDA_VISIBLE_DEVICES for each part; none where there are not enough GPUs for a run, or none are known.
    """
    try:
        names = visible_gpu_names(environment.get("CUDA_VISIBLE_DEVICES"))
    except MeterUnavailable:
        return []
    whole = len(names) - len(names) % processes
    return [",".join(names[first : first + processes]) for first in range(0, whole, processes)]


def run_here(
    folder: SweepFolder,
    runs: Sequence[PlannedRun],
    at_once: int,
    processes: int,
    tell: Callable[[PlannedRun, int | None, float], None],
    shares: Sequence[str] = (),
) -> int:
    """Do runs as processes of their own; on a signal stop them all in good order.

    Args:
        folder: The sweep's folder.
        runs: What to do, in this order.
        at_once: How many at the same time.
        processes: Processes of each run.
        tell: Called with a run when it starts (exit code None) and when it has ended, and the seconds that it took. If
            it fails, the runs that go on are stopped in good order.
        shares: GPUs for runs side by side (:func:`shares_of_gpus`): each gets those that the fewest others have. None:
            every run sees all of them.

    Returns:
        The signal that stopped it, or 0.
    """
    waiting, going = list(runs), list[_Started]()

    def kill_all() -> None:
        for started in going:
            started.kill()

    request = InterruptRequest(at_second=kill_all)
    with request:
        try:
            while going or waiting:
                while waiting and len(going) < at_once and not request.signal:
                    run = waiting.pop(0)
                    taken = Counter(started.gpus for started in going)
                    gpus = min(shares, key=lambda share: taken[share], default=None)
                    going.append(_start(folder, run, processes, gpus))
                    tell(run, None, 0.0)
                if request.signal:
                    break
                _take_ended(folder, going, tell)
                time.sleep(_POLL_S)
        finally:
            for started in going:
                started.stop()
            while going:
                try:
                    _take_ended(folder, going, tell)
                except OSError:  # whoever listened is gone; the runs still have to be awaited
                    tell = _tell_nobody
                time.sleep(_POLL_S)
    return request.signal


def _tell_nobody(*_: object) -> None: ...


def _take_ended(
    folder: SweepFolder, going: list[_Started], tell: Callable[[PlannedRun, int | None, float], None]
) -> None:
    """Take the runs that have ended off the list, and tell of each."""
    for started in list(going):
        code = started.exit_code()
        if code is None:
            continue
        going.remove(started)
        folder.exit_of(started.run).write_text(f"{code}\n")
        tell(started.run, code, time.monotonic() - started.since)


def command_of(config: str, processes: int) -> list[str]:
    """The command line of one run.

    Args:
        config: Its config file.
        processes: How many processes it has.
    """
    launcher = ["-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_machines=1"]
    launcher += [f"--num_processes={processes}", "--main_process_port=0"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", "--max_restarts=0"]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "greenprune.train", "--config", config]


def _start(folder: SweepFolder, run: PlannedRun, processes: int, gpus: str | None) -> _Started:
    folder.exit_of(run).unlink(missing_ok=True)
    events = folder.run_folder(run).events
    events_bytes = _size(events)
    environment = dict(os.environ)
    if not folder.log_of(run).exists():
        # Of the job that this is in, which was queued again; this run has not begun, and there is nothing to wait for.
        environment.pop("SLURM_RESTART_COUNT", None)
    if gpus is not None:
        if "CUDA_VISIBLE_DEVICES" not in environment:  # indices are then NVML's, whose order CUDA has only when asked
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    with folder.log_of(run).open("ab") as log:
        process = subprocess.Popen(
            command_of(str(folder.config_of(run)), processes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches them through this process alone, once
        )
    return _Started(run, process, time.monotonic(), processes > 1, events, events_bytes, gpus=gpus)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
