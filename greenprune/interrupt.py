"""Stopping in good order when the system or the user asks for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to stop."""


class Interrupted(Exception):
    """The run stopped in good order because it was asked to, after a checkpoint.

    Attributes:
        signal: The signal that asked.
        advice: How to go on.
    """

    def __init__(self, signal_number: int, advice: str) -> None:
        super().__init__(advice)
        self.signal = signal_number
        self.advice = advice


class InterruptRequest:
    """While entered, a SIGTERM, SIGINT, SIGHUP or SIGUSR1 is remembered instead of ending the process.

    A second Ctrl-C ends it at once. What a launcher passes on of the first one is not a second one. A signal that the
    process was started to ignore, as nohup does with SIGHUP, stays ignored.

    Args:
        at_second: Called before a second Ctrl-C ends the process, if there is something to be ended with it.

    Attributes:
        signal: The first signal that came, or 0.
    """

    _ECHO_S = 1.0  # launchers forward within milliseconds

    def __init__(self, at_second: Callable[[], None] | None = None) -> None:
        self.signal = 0
        self._came = 0.0
        self._at_second = at_second

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            self._came = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._came > self._ECHO_S:
            if self._at_second is not None:
                self._at_second()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __enter__(self) -> None:
        heard = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._remember) for number in heard}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Within, a Ctrl-C ends the process at once and without a word, as a SIGTERM does: there is nothing to be lost.

    Python's own KeyboardInterrupt would come out of whatever module is being imported, with all its frames, or be
    swallowed there. What there is to be lost an :class:`InterruptRequest` within looks after. A Ctrl-C that the
    process was started to ignore, as a shell has it for what runs in the background, stays ignored.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def undone_by_ctrl_c() -> Iterator[None]:
    """Within, a Ctrl-C undoes what is half done, as an error does, and then ends it as :func:`ended_by_ctrl_c` does.

    Where it is caught as a KeyboardInterrupt, the process goes on.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def outlive_signals() -> None:
    """Have a helper process ignore the signals that stop a run, but for the SIGTERM that its parent sends (Linux)."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # threads that are started from here on have it too
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A handler is not told who sent a signal.
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def end_with_launcher() -> None:
    """Have the system send this process a SIGTERM when its parent dies (Linux; elsewhere nothing happens).

    ``accelerate launch`` does not pass signals on to a single process: without this, stopping the launcher would leave
    the training running, unseen.
    """
    if sys.platform == "linux":
        import ctypes  # which the command line does without

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


_PR_SET_PDEATHSIG = 1  # linux/prctl.h
