"""Stopping in good order when the system or the user asks for it."""

from __future__ import annotations

import os
import signal
from types import FrameType


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
    """While entered, the first SIGTERM, SIGINT, SIGHUP or SIGUSR1 is remembered; the second has its usual effect.

    Attributes:
        signal: The signal that came, or 0.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal = 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number

    def __enter__(self) -> None:
        self._previous = {number: signal.signal(number, self._remember) for number in self._NUMBERS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
