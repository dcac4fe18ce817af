"""From a config to a finished run: data, engine, folder, meter, mirrors, and the trainer that uses them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenprune.accounts import Records
from greenprune.checkpoint import load_checkpoint, load_newest
from greenprune.config import Config, ConfigError, UserError, load_config, shaping_values
from greenprune.data import ImageData, open_data
from greenprune.energy import Meter, carbon_intensity, node_id, open_meter, share_devices
from greenprune.engine import Engine
from greenprune.late_files import PATIENCE_S, await_attempt, take_lock
from greenprune.mirrors import start_mirrors
from greenprune.network import prepare_network
from greenprune.progress import Display
from greenprune.provenance import collect_provenance
from greenprune.report.writing import write_run_report
from greenprune.tracking import Event, RunFolder, default_run_name
from greenprune.trainer import Trainer
from greenprune.wandb_mirror import wandb_goes_online


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        summary: Content of summary.json.
        folder: The run's folder.
        is_main: Whether this process speaks for the run.
    """

    summary: dict[str, Any]
    folder: RunFolder
    is_main: bool


def train(config: Config, environment: Mapping[str, str], display: Callable[[], Display]) -> RunResult:
    """Do one complete run, or go on with it.

    Args:
        config: The run.
        environment: The process's environment: GREENPRUNE_DATA, the folder of the data sets if the config names none,
            what tells of a W&B login, SLURM_JOB_ID and SLURM_ARRAY_JOB_ID.
        display: Makes the progress display; called on rank 0 only.

    Raises:
        UserError: The run cannot be done as asked; nothing was written.
        Interrupted: A signal asked to stop; a checkpoint is written.
        TrainingDiverged: The loss is not finite.
    """
    carbon = carbon_intensity(
        config.energy.country,
        config.energy.region,
        g_per_kwh=config.energy.intensity_g_per_kwh,
        pue=config.energy.pue,
    )
    online = "wandb" in config.tracking.trackers and wandb_goes_online(config, environment)
    engine = Engine(config)
    with ExitStack() as stack:
        stack.callback(engine.finish)
        engine.check_trackers(config.tracking.trackers)
        meter = stack.enter_context(_open_meter(config, engine))
        with meter.window("data"):
            data = _open_data(config, environment.get("GREENPRUNE_DATA"), engine)
        with meter.window("setup"):
            network = engine.together(lambda: prepare_network(config, data))
        claim = engine.together(lambda: _claim(config, stack, environment), main_only=True)
        folder = RunFolder(claim.path)
        if claim.finished:
            return RunResult(json.loads(folder.summary.read_text()), folder, engine.is_main)
        resume = None
        if claim.checkpoint is not None:
            path = claim.checkpoint
            resume = path, engine.together(lambda: load_checkpoint(path))
        mirrors, notes = engine.together(
            lambda: _start_mirrors(config, engine, folder, stack, display, environment, online=online)
        )
        notes += claim.notes
        if carbon is None:
            notes.append("CO2 is unknown: set energy.country to the country whose grid feeds this machine")
        records = Records(folder, meter, carbon, mirrors, notes, environment.get("SLURM_JOB_ID"))
        with meter.window("setup"):
            trainer = Trainer(config, data, engine, network, records, resume)
        stack.callback(trainer.events.close)
        return RunResult(trainer.fit(), folder, engine.is_main)


def _open_data(config: Config, data_root: str | None, engine: Engine) -> ImageData:
    """The data set, on the device; where it may be downloaded, one process a node goes first."""

    def open_and_move() -> ImageData:
        with engine.local_main_first() if config.data.download else nullcontext():
            data = open_data(config.data, config.data.root or data_root, config.seed)
        data.check_world(engine.world_size)
        return data.to(engine.device, config.model.channels_last)

    return engine.together(open_and_move)


def _open_meter(config: Config, engine: Engine) -> Meter:
    """A meter of this process's share: each GPU is read by one rank, each machine by one rank of it."""
    gpu = engine.gpu_uuid
    claims = engine.gather_objects((node_id(), [] if gpu is None else [gpu]))
    share = share_devices(engine.rank, claims)
    return open_meter(
        gpu_uuids=share.gpu_uuids,
        host=share.host,
        interval_s=config.energy.interval_s,
        synchronize=engine.synchronize,
    )


def _start_mirrors(
    config: Config,
    engine: Engine,
    folder: RunFolder,
    stack: ExitStack,
    display: Callable[[], Display],
    environment: Mapping[str, str],
    *,
    online: bool,
) -> tuple[list[Callable[[Event], None]], list[str]]:
    """What shows the run's events while it goes on, and notes about it; on rank 0 only."""
    if not engine.is_main:
        return [], []
    with folder.provenance.open("a") as file:
        file.write(json.dumps(collect_provenance(engine.world_size, engine.device)) + "\n")
    shown = display()
    stack.callback(shown.close)
    mirrors, notes = start_mirrors(engine, config, folder, environment, write_run_report, online=online)
    for mirror in mirrors:
        stack.callback(mirror.close)
    return [shown, *mirrors], notes


@dataclass(frozen=True)
class _Claim:
    """The folder that a run has taken, and where in it to go on.

    Attributes:
        path: The folder.
        finished: Whether the run in it is done.
        checkpoint: Checkpoint to go on from, if any.
        notes: What the user should know, one line each.
    """

    path: Path
    finished: bool = False
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()


def _claim(config: Config, stack: ExitStack, environment: Mapping[str, str]) -> _Claim:
    """Take a folder for the run, new or to go on in, and hold it until the stack is closed.

    In a Slurm job it waits for what an earlier attempt, maybe on another machine, has written or not let go of yet.

    Raises:
        UserError: The folder holds another run or is in use, cannot be written, or there is no such checkpoint.
        CheckpointCorrupt: No checkpoint of the run is whole.
    """
    if config.resume not in ("auto", "never"):
        return _claim_checkpoint(config, stack, Path(config.resume))
    in_job, requeued = "SLURM_JOB_ID" in environment, environment.get("SLURM_RESTART_COUNT", "0") != "0"
    if in_job and config.resume == "auto" and config.run_name is not None:
        await_attempt(RunFolder(Path(config.output_dir) / config.run_name), requeued=requeued)
    folder = _new_or_same_folder(config)
    if not folder.config.is_file():
        raise UserError(f"run_name: {str(folder.path)!r} is not the folder of a run; expected another run_name")
    if folder.summary.exists():
        return _Claim(folder.path, finished=True)
    _hold(folder, stack, PATIENCE_S if requeued else 0.0)
    newest = load_newest(folder.checkpoints)
    if newest is None:
        return _Claim(folder.path)
    path, _, damaged = newest
    notes = tuple(f"going on from {path.name}, because {line}" for line in damaged)
    return _Claim(folder.path, checkpoint=path, notes=notes)


def _new_or_same_folder(config: Config) -> RunFolder:
    """A new folder with the config in it, or that of the same run to go on with."""
    name = config.run_name or default_run_name(config)
    for number in itertools.count(1):
        folder = RunFolder(Path(config.output_dir) / (name if number == 1 else f"{name}-{number}"))
        try:
            folder.create(config)
            return folder
        except FileExistsError:
            pass
        if config.run_name is not None:
            break
        if config.resume == "auto" and not folder.summary.exists() and not _differences(config, folder):
            return folder
    if config.resume == "never":
        raise UserError(
            f"run_name: {str(folder.path)!r} already holds a run; expected --resume auto to go on with it, "
            "another run_name, or none to have one chosen"
        )
    _check_same_run(config, folder)
    return folder


def _hold(folder: RunFolder, stack: ExitStack, patience_s: float = 0.0) -> None:
    stack.callback(take_lock(folder, patience_s).release)


def _claim_checkpoint(config: Config, stack: ExitStack, path: Path) -> _Claim:
    if not (path / "manifest.json").is_file():
        raise UserError(f"resume: {config.resume!r} is not a checkpoint; expected never, auto or a folder step-<n>")
    folder = RunFolder(path.resolve().parent.parent)
    _check_same_run(config, folder)
    if folder.summary.exists():
        raise UserError(
            f"resume: the run in {str(folder.path)!r} is finished; expected a checkpoint of one that is not"
        )
    _hold(folder, stack)
    return _Claim(folder.path, checkpoint=path.resolve())


def _check_same_run(config: Config, folder: RunFolder) -> None:
    different = _differences(config, folder)
    if different:
        raise UserError(
            f"run_name: {str(folder.path)!r} holds a different run (it differs in {', '.join(different)}); "
            "expected the same config, or another run_name"
        )


def _differences(config: Config, folder: RunFolder) -> list[str]:
    """Keys that shape the result and differ between a config and the one a folder's run was started with."""
    try:
        theirs = shaping_values(load_config(folder.config).to_dict())
    except ConfigError as error:
        return [f"config.yaml, which cannot be read: {error}"]
    mine = shaping_values(config.to_dict())
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
