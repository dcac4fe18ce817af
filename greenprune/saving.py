"""A run's checkpoints as all of its ranks see them: written by rank 0 while training goes on, awaited together."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from greenprune.checkpoint import Checkpoint, CheckpointWriter, Written, leave_later, list_checkpoints
from greenprune.config import CheckpointConfig
from greenprune.engine import Engine
from greenprune.tracking import RunFolder


class StorageFailed(OSError):
    """A file of the run cannot be written any more; the message names the last good checkpoint.

    Attributes:
        known_to_all: Whether all ranks have the same to say.
    """

    known_to_all = False


class Saving:
    """Has checkpoints written and their completion told.

    Args:
        config: How many stay.
        folder: The run's folder.
        engine: The engine.
        tell: Takes each checkpoint that is on disk, and the seconds that training stood still for it; on rank 0.
    """

    def __init__(
        self, config: CheckpointConfig, folder: RunFolder, engine: Engine, tell: Callable[[Written, float], None]
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._tell = tell
        self._writer = CheckpointWriter(folder.checkpoints, config.keep_last, config.keep_best, folder.events)
        self._pause_s = 0.0  # of the checkpoint that is being written
        self._steps = -1

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of this step, or there will be."""
        return self._steps == step

    def goes_on_from(self, path: Path, step: int) -> None:
        """Take note of the checkpoint that the run was resumed from, and leave those after it; all ranks call it.

        Args:
            path: The checkpoint, which all ranks have taken up.
            step: Steps done by then.

        Raises:
            OSError: Those after it cannot be set aside.
        """
        self._engine.together(lambda: leave_later(self._folder.checkpoints, path), main_only=True)
        self._steps = step

    def begin(self, step: int, snapshot: Checkpoint, score: float | None, since: float) -> None:
        """Have a checkpoint written from now on; the one before has been awaited.

        Args:
            step: Steps done.
            snapshot: What to write; may change as soon as this returns.
            score: How good it is, if that is known.
            since: When training stopped for it, by ``time.monotonic``.
        """
        if self._engine.is_main:
            self._writer.begin(step, snapshot, score)
        self._steps = step
        self._pause_s = time.monotonic() - since

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in hand could not be written; :meth:`wait` says why."""
        return self._writer.failed

    def look(self) -> None:
        """Tell of the checkpoint in hand if it is on disk by now; waits for nothing."""
        self._told(self._writer.take())

    def wait(self) -> None:
        """Wait until the checkpoint in hand is on disk; all ranks call it.

        Raises:
            OSError: It could not be written.
        """
        self._told(self._engine.together(self._writer.wait, main_only=True))

    def _told(self, written: Written | None) -> None:
        if written is not None:
            self._tell(written, self._pause_s)

    def close(self) -> None:
        """Finish what is in hand; may be called twice."""
        self._writer.close()

    def last(self) -> str:
        """Where the run can go on from, for people."""
        self.close()
        good = list_checkpoints(self._folder.checkpoints)
        return f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"

    @contextmanager
    def naming_the_last(self, step: Callable[[], int]) -> Iterator[None]:
        """Have an error of the file system say where the run can go on from.

        Args:
            step: Says how many steps are done.
        """
        try:
            yield
        except OSError as error:
            failed = StorageFailed(
                f"{error.filename or self._folder.path}: {error.strerror or error} after step {step()}; "
                f"{self.last()}. Once there is room to write, go on with the same command and "
                f"--resume auto --run_name {shlex.quote(self._folder.path.name)}"
            )
            failed.known_to_all = getattr(error, "known_to_all", False)
            raise failed from error
