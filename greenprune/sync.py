"""Catching up: a run's events brought to a tracker after the fact, from its log alone."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from greenprune.config import Config, UserError, load_config
from greenprune.locking import FolderInUse, FolderLock, find_holder
from greenprune.report.writing import write_run_report
from greenprune.tracking import Event, RunFolder, describe_damage, salvage_events

SYNCED = ("wandb", "tensorboard")
"""Trackers that a run can be brought to."""


def sync_run(path: Path, tracker: str, environment: Mapping[str, str], *, offline: bool = False) -> str:
    """Bring all of a run's events to a tracker, in place of what that has of the run.

    Args:
        path: The run's folder.
        tracker: One of :data:`SYNCED`.
        environment: The process's environment, which tells of a W&B login.
        offline: Whether W&B is only to write the file that ``wandb sync`` uploads.

    Returns:
        One line that says what was done, which lines of the log were left out because they are no events, and where
        the run is to be seen.

    Raises:
        UserError: There is no run with events at the path, it still goes on, or the tracker cannot be reached.
        OSError: What the tracker reads cannot be written; what it had is as it was.
    """
    folder = RunFolder(path.resolve())  # "." has no name, and a link may have another one
    if not folder.config.is_file() or not folder.events.is_file():
        raise UserError(f"RUN: {str(path)!r} is not a run with events; expected the folder of one")
    with _in_hand(folder.path, repr(str(path))):
        return _tell_all(folder, tracker, environment, offline=offline)


@contextmanager
def _in_hand(folder: Path, shown: str) -> Iterator[None]:
    """Keep a run from going on meanwhile, on any machine.

    A folder that cannot be written, as in an archive, is taken for one that nobody has if its lock says so.

    Raises:
        UserError: The run goes on, or that cannot be told.
    """
    lock = None
    try:
        lock = FolderLock(folder)
    except FolderInUse as error:
        raise UserError(
            f"RUN: {shown} still goes on ({error.owner}) and tells its trackers itself; expected one that has stopped"
        ) from None
    except UserError:
        holder = find_holder(folder)
        if holder.is_held is not False:
            raise UserError(
                f"RUN: whether {shown} still goes on cannot be told ({holder.doubt}); expected a folder that you can "
                "write to, or one that its run has let go of"
            ) from None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _tell_all(folder: RunFolder, tracker: str, environment: Mapping[str, str], *, offline: bool) -> str:
    config = load_config(folder.config)
    events, damaged = salvage_events(folder.events)
    left_out = describe_damage(damaged)
    if damaged and not events:
        raise UserError(f"RUN: {str(folder.events)!r} cannot be read ({left_out}); expected a log as the run wrote it")
    if tracker == "wandb":
        where = _sync_wandb(config, folder, events, environment, offline=offline)
    else:
        where = _sync_tensorboard(config, folder, events)
    told = f"{len(events):,} events of {folder.path.name} are told."
    return f"{told} Left out: {left_out}. {where}" if damaged else f"{told} {where}"


def _sync_wandb(
    config: Config, folder: RunFolder, events: list[Event], environment: Mapping[str, str], *, offline: bool
) -> str:
    import wandb

    from greenprune.wandb_mirror import WandbMirror, wandb_goes_online, wandb_options

    online = not offline and wandb_goes_online(config, environment)
    options = wandb_options(config, folder, online=online, resume=False)
    try:
        run = wandb.init(project=config.tracking.project, config=config.to_dict(), **options)
    except wandb.errors.Error as error:
        raise UserError(
            f"W&B cannot be reached ({' '.join(str(error).split())}); expected a network, or --offline"
        ) from None
    _tell(WandbMirror(run, run.log, folder, write_run_report), events)
    run.finish()
    if online:
        return f"W&B: {run.url}"
    return f"W&B is offline; to upload: wandb sync {shlex.quote(str(Path(run.dir).parent))}"


def _sync_tensorboard(config: Config, folder: RunFolder, events: list[Event]) -> str:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise UserError("--to: 'tensorboard' needs its package; expected wandb, or: pip install tensorboard") from None
    from greenprune.tensorboard_mirror import TENSORBOARD_FOLDER, TensorBoardMirror, failing_once

    target = folder.path / TENSORBOARD_FOLDER
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with failing_once():
            writer: Any = SummaryWriter(str(temporary))
            _tell(TensorBoardMirror(writer, config.to_dict()), events)
            writer.close()
        if target.exists():
            shutil.rmtree(target)  # its files would be read together with the new ones
        temporary.rename(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"TensorBoard: tensorboard --logdir {shlex.quote(str(folder.path.parent))}"


def _tell(mirror: Callable[[Event], None], events: list[Event]) -> None:
    for event in events:
        mirror(event)
