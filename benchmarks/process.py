"""A contestant in a process of its own, maybe with another Python: asked over a pipe, one JSON object a line.

The asking side is :class:`Process`, the answering one :class:`Pacer`. The module needs the standard library only, for
peers answer from environments in which greenprune is not installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

Batch = TypeVar("Batch")


class ProcessFailed(RuntimeError):
    """A contestant's process ended before it was told to; the message has its last line."""


class Process:
    """A contestant in a process of its own; close it by leaving its ``with``.

    Args:
        command: Program and arguments; it answers through a :class:`Pacer`.
        environment: Variables on top of this process's.

    Attributes:
        about: What it says of itself once it is ready.
        busy_s: Processor seconds a step of each turn, over all threads of its process.

    Raises:
        ProcessFailed: It has ended.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.busy_s: list[float] = []
        self._name = Path(command[1]).name if len(command) > 1 else command[0]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.about = self._answer()
        except ProcessFailed:
            self.__exit__()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def turn(self, steps: int) -> float:
        """Seconds a step over that many steps of its loop."""
        answer = self.ask("steps", steps)
        self.busy_s.append(answer["busy_s"])
        return float(answer["step_s"])

    def ask(self, what: str, value: object) -> dict[str, Any]:
        """Have something done, and return what it says of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, "value": value}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer tells more
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines() or ["nothing"]
        raise ProcessFailed(f"{self._name} ended with code {self._process.returncode}; its last words: {said[-1]}")


class Pacer:
    """Answers for a training loop, whose steps it counts, times and holds back.

    Whatever the process prints goes to its standard error from then on; the answers alone go to standard output.

    Args:
        synchronize: Waits for the device.

    Attributes:
        synchronize: The same; may be set later.
        others: What can be asked for besides steps: by name, what does it and returns an answer.
    """

    def __init__(self, synchronize: Callable[[], object] = lambda: None) -> None:
        self.synchronize = synchronize
        self.others: dict[str, Callable[[Any], dict[str, Any]]] = {}
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left = self._steps = 0
        self._started_s = self._out_s = self._away_s = 0.0
        self._started_busy_s = self._out_busy_s = self._away_busy_s = 0.0

    def ready(self, **about: object) -> None:
        """Say that the first step can be asked for."""
        self._say(about)

    def pace(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """An epoch's batches, each handed out when its step has been asked for.

        What happens between two epochs (evaluation, checkpoints, starting the loader) is not counted.
        """
        if self._steps:
            self.synchronize()
            self._away_s += time.perf_counter() - self._out_s
            self._away_busy_s += time.process_time() - self._out_busy_s
        for batch in batches:
            if self._left == 0:
                self._wait_for_turn()
            self._left -= 1
            yield batch
        self.synchronize()
        self._out_s, self._out_busy_s = time.perf_counter(), time.process_time()

    def _wait_for_turn(self) -> None:
        if self._steps:
            self.synchronize()
            wall_s = time.perf_counter() - self._started_s - self._away_s
            busy_s = time.process_time() - self._started_busy_s - self._away_busy_s
            self._say({"step_s": wall_s / self._steps, "busy_s": busy_s / self._steps})
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "steps":
                self._left = self._steps = asked["value"]
                self._away_s = self._away_busy_s = 0.0
                self._started_s, self._started_busy_s = time.perf_counter(), time.process_time()
                return
            self._say(self.others[asked["do"]](asked["value"]))
        os._exit(0)  # nobody asks any more, and nothing that is still open is wanted

    def _say(self, answer: Mapping[str, object]) -> None:
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
