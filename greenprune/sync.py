"""Catching up: a run's events brought to a tracker after the fact, from its log alone."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from greenprune.config import Config, UserError, load_config
from greenprune.locking import is_held
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
    if is_held(folder.path):
        raise UserError(
            f"RUN: {str(path)!r} still goes on and tells its trackers itself; expected one that has stopped"
        )
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
