"""What another machine has written or let go of, and a shared file system shows late."""

from __future__ import annotations

import time

from greenprune.checkpoint import CheckpointCorrupt, list_checkpoints, load_checkpoint
from greenprune.config import UserError
from greenprune.locking import FolderLock
from greenprune.tracking import RunFolder, salvage_events

PATIENCE_S = 120.0
"""As they are usually set up, NFS shows new files within 60 s and drops a lost node's locks in 90 s."""


def await_attempt(folder: RunFolder, *, requeued: bool, patience_s: float = PATIENCE_S) -> None:
    """Wait until the checkpoint that a run was stopped with can be seen here, or the patience is over.

    Without it the next attempt would go on from an older one, or start anew, and do the work again.

    Args:
        folder: The run's folder; it may not be there.
        requeued: Whether the job ran before, so that there should be a folder.
        patience_s: Most seconds to wait.
    """
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and not _is_seen(folder, requeued):
        time.sleep(0.5)


def take_lock(folder: RunFolder, patience_s: float) -> FolderLock:
    """Take a run's folder, which the file server may still hold for a node that is gone.

    Args:
        folder: The run's folder.
        patience_s: Most seconds to wait.

    Raises:
        UserError: Another process holds it after that, too.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return FolderLock(folder.path)
        except UserError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.5)


def _is_seen(folder: RunFolder, requeued: bool) -> bool:
    """Whether all is there that should be, as far as the files that are there tell."""
    if folder.path.parent.is_dir():
        list(folder.path.parent.iterdir())  # asks the file server again where looking for a name does not
    if not folder.config.is_file():
        return not requeued
    events, _ = salvage_events(folder.events)  # a damaged line is told where the run goes on
    if not events or events[-1]["kind"] != "interrupt":
        return True
    try:
        newest = load_checkpoint(list_checkpoints(folder.checkpoints)[-1])
        return int(newest.state["step"]) >= int(events[-1]["step"])
    except (IndexError, CheckpointCorrupt):
        return False
