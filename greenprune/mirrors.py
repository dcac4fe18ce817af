"""Trackers as mirrors of a run's events, all through Accelerate's interface; none of them can stop a run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from types import MappingProxyType
from typing import Any

from greenprune.config import Config
from greenprune.engine import Engine
from greenprune.redaction import without_secrets
from greenprune.tensorboard_mirror import TENSORBOARD_FOLDER, TensorBoardMirror
from greenprune.tracking import Event, RunFolder, numbers_of, plain_settings
from greenprune.wandb_mirror import WandbMirror, WriteReport, wandb_options, where_to_see

Mirror = Callable[[Event], None]

_CLOSE_TIMEOUT_S = 120
_MOST_WAITING = 4096  # events: seconds to minutes of the most talkative runs, and some 30 MB
# What trackers are known to raise when a disk is full, a server is gone or a value does not suit them.
_FAILURES = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)


class GuardedMirror:
    """A tracker on a thread of its own, so that it never holds training up, and left alone once it fails.

    While it hangs only so many events wait for it. It does not get those that come beyond, which is told once.

    Args:
        name: The tracker.
        mirror: What may be slow and may fail.
        folder: The run's folder, whose log has everything that the tracker misses.
        failures: What it raises when it fails.
        environment: The process's environment, whose secrets an error may quote.
        finish: Ends the tracker, whether it has failed or not; it may fail as the mirror may.
    """

    def __init__(
        self,
        name: str,
        mirror: Mirror,
        folder: RunFolder,
        failures: tuple[type[Exception], ...] = _FAILURES,
        environment: Mapping[str, str] = MappingProxyType({}),
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._environment = environment
        self._name = name
        self._mirror = mirror
        self._folder = folder
        self._failures = failures
        self._finish = finish
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._takes = True
        self._is_behind = False
        # A daemon: a tracker that hangs does not keep the process from ending.
        self._thread = Thread(target=self._work, name=f"{name} mirror", daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        """Take one event, to be sent soon; it is left out if the tracker has failed or is too far behind."""
        if not self._takes:
            return
        if self._events.qsize() < _MOST_WAITING:
            self._events.put(event)
        elif not self._is_behind:
            self._is_behind = True
            self._print(
                f"{self._name} does not keep up: {_MOST_WAITING:,} events wait for it, and those that come while they "
                "do are left out; training goes on."
            )

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Wait until everything is sent and the tracker has ended, it has failed, or the time is up.

        Args:
            timeout_s: Most seconds to wait.
        """
        self._events.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._tell(TimeoutError(f"it has not taken everything within {timeout_s:g} s"))

    def _work(self) -> None:
        try:
            try:
                for event in iter(self._events.get, None):
                    self._mirror(event)
            finally:
                self._takes = False
                self._drop_waiting()
                self._finish()
        except self._failures as error:
            self._tell(error)

    def _drop_waiting(self) -> None:
        with suppress(Empty):
            while True:
                self._events.get_nowait()

    def _tell(self, error: Exception) -> None:
        self._print(without_secrets(_failed(self._name, error), self._environment))

    def _print(self, message: str) -> None:
        with suppress(OSError):  # the terminal may be gone
            print(f"{message} {_catch_up(self._name, self._folder)}", file=sys.stderr, flush=True)


def start_mirrors(
    engine: Engine,
    config: Config,
    folder: RunFolder,
    environment: Mapping[str, str],
    write_report: WriteReport,
    *,
    online: bool,
) -> tuple[list[GuardedMirror], list[str]]:
    """Start a run's trackers on rank 0; none asks anything, needs a network, or can stop the run.

    Args:
        engine: The run's engine.
        config: The run.
        folder: The run's folder, with the provenance of this attempt; trackers that write files write them below it.
        environment: The process's environment.
        write_report: Writes the report that W&B keeps with the run.
        online: Whether W&B talks to its server.

    Returns:
        The mirrors to give to the event log, to be closed before the engine, and one line for each about where the run
        is to be seen.
    """
    mirrors: list[GuardedMirror] = []
    notes: list[str] = []
    for name in config.tracking.trackers:
        try:
            if name == "wandb":
                mirror, note = _start_wandb(engine, config, folder, write_report, online=online)
            elif name == "tensorboard":
                mirror, note = _start_tensorboard(engine, config, folder)
            else:
                mirror, note = _start_other(engine, config, folder, name)
        except _failures_of(name) as error:
            failed = without_secrets(_failed(name, error), environment)
            notes.append(f"{failed} {_catch_up(name, folder)}")
            continue
        failures = _failures_of(name)
        mirrors.append(GuardedMirror(name, mirror, folder, failures, environment, partial(_finish, engine, name)))
        notes.append(note)
    return mirrors, notes


def _finish(engine: Engine, name: str) -> None:
    try:
        engine.finish_tracker(name)
    except _failures_of(name):
        if name == "wandb":
            import wandb

            # Else it tries again when Python ends, and fails with a traceback.
            with suppress(*_failures_of(name)):
                wandb.teardown()
        raise


def _start_wandb(
    engine: Engine,
    config: Config,
    folder: RunFolder,
    write_report: WriteReport,
    *,
    online: bool,
) -> tuple[Mirror, str]:
    import wandb

    options = wandb_options(config, folder, online=online, resume=True)
    try:
        engine.start_tracker("wandb", config.tracking.project, options)
    except wandb.errors.Error:
        # The server does not answer or does not know the key: the run is worth more than its live view.
        options |= {"mode": "offline", "resume": None}
        engine.start_tracker("wandb", config.tracking.project, options)
    run = engine.tracker("wandb")
    engine.store_settings("wandb", config.to_dict())
    mirror = WandbMirror(run, lambda row: engine.log("wandb", row, None), folder, write_report)
    return mirror, where_to_see(run, folder)


def _start_tensorboard(engine: Engine, config: Config, folder: RunFolder) -> tuple[Mirror, str]:
    engine.start_tracker("tensorboard", TENSORBOARD_FOLDER, {}, folder.path)
    note = f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder.path.parent))}"
    return TensorBoardMirror(engine.tracker("tensorboard"), config.to_dict()), note


def _start_other(engine: Engine, config: Config, folder: RunFolder, name: str) -> tuple[Mirror, str]:
    engine.start_tracker(name, config.tracking.project, {}, folder.path)
    engine.store_settings(name, plain_settings(config.to_dict()))

    def mirror(event: Event) -> None:
        numbers = numbers_of(event)
        if numbers:
            engine.log(name, numbers, event["step"])

    return mirror, f"{name}: project {config.tracking.project}"


def _failures_of(name: str) -> tuple[type[Exception], ...]:
    if name != "wandb":
        return _FAILURES
    import wandb

    error: type[Exception] = wandb.errors.Error
    return (*_FAILURES, error)


def _failed(name: str, error: Exception) -> str:
    reason: Any = " ".join(str(error).split()) or type(error).__name__
    return f"{name} has failed and gets nothing more of this run ({reason}); training goes on."


def _catch_up(name: str, folder: RunFolder) -> str:
    if name in ("wandb", "tensorboard"):
        return f"To catch up later: greenprune sync {shlex.quote(str(folder.path))} --to {name}"
    return f"Everything is in {folder.events}"
