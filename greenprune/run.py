"""From a config to a finished run: data, engine, folder, meter, mirrors, and the trainer that uses them."""

from __future__ import annotations

import copy
import glob
import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from greenprune.accounts import Records
from greenprune.checkpoint import Checkpoint, CheckpointCorrupt, list_checkpoints, load_checkpoint, load_newest
from greenprune.config import MAY_CHANGE, Config, ConfigError, UserError, load_config, shaping_values
from greenprune.data import ImageData, open_data
from greenprune.energy import CO2_IS_UNKNOWN, Meter, carbon_intensity, node_id, open_meter, share_devices, slurm_job
from greenprune.engine import Engine
from greenprune.interrupt import Interrupted
from greenprune.late_files import PATIENCE_S, await_attempt, take_lock
from greenprune.mirrors import start_mirrors
from greenprune.network import Network, prepare_network, round_to_on, with_round_to, with_unit_cost
from greenprune.progress import Display
from greenprune.provenance import Place, collect_provenance, place_of
from greenprune.redaction import without_secrets
from greenprune.report.writing import write_run_report
from greenprune.summary_file import read_whole_summary
from greenprune.surgery import resolve_structure
from greenprune.tracking import Event, EventLog, RunFolder, default_run_name, salvage_events
from greenprune.trainer import Trainer
from greenprune.unit_cost import MEASURED, MeasuredUnit, UnitCost, measure_unit_cost
from greenprune.verify import check_fits
from greenprune.wandb_mirror import wandb_goes_online


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        summary: Content of summary.json.
        folder: The run's folder.
        is_main: Whether this process speaks for the run.
        was_finished: Whether it was finished before, so that nothing was done.
    """

    summary: dict[str, Any]
    folder: RunFolder
    is_main: bool
    was_finished: bool = False


def train(config: Config, environment: Mapping[str, str], display: Callable[[], Display]) -> RunResult:
    """Do one complete run, or go on with it.

    Args:
        config: The run.
        environment: The process's environment: GREENPRUNE_DATA, the folder of the data sets if the config names none,
            what tells of a W&B login, and what Slurm says of its job.
        display: Makes the progress display; called on rank 0 only.

    Raises:
        UserError: The run cannot be done as asked; nothing was written, unless ``ended_run`` says that it had begun.
        Interrupted: A signal asked to stop; a checkpoint is written.
        TrainingDiverged: The loss is not finite.
        PeerLost: Another process of the run is gone.
        CheckpointCorrupt: None of the run's checkpoints can be used.
        StorageFailed: A file of the run cannot be written any more.
    """
    carbon = carbon_intensity(
        config.energy.country,
        config.energy.region,
        g_per_kwh=config.energy.intensity_g_per_kwh,
        pue=config.energy.pue,
    )
    online = "wandb" in config.tracking.trackers and wandb_goes_online(config, environment)
    engine = _open_engine(config)
    with ExitStack() as stack:
        stack.callback(engine.finish)
        engine.check_trackers(config.tracking.trackers)
        places: list[Place] = engine.gather_objects(place_of(engine.device, node_id()))
        meter = stack.enter_context(_open_meter(config, engine, places, environment))
        with meter.window("data"):
            data = _open_data(config, environment.get("GREENPRUNE_DATA"), engine)
        config = _resolve_structure(config, engine)
        with meter.window("setup"):
            network = engine.together(lambda: prepare_network(config, data))
        engine.together(lambda: _check_passes(config, network, data, engine))
        claim = engine.together(lambda: _claim(config, network, stack, environment), main_only=True)
        folder = RunFolder(claim.path)
        if claim.finished:
            return RunResult(engine.together(lambda: _result(folder)), folder, engine.is_main, was_finished=True)
        resume = None
        if claim.checkpoint is not None:
            path = claim.checkpoint
            resume = path, engine.together(lambda: _load(path, data))
        round_to = round_to_on(config.surgery, engine.device)
        if resume is not None:  # which may have begun on another device; older checkpoints do not tell
            round_to = resume[1].state.get("round_to", round_to)
        with _left_as_found(claim, engine):
            network = engine.together(partial(with_round_to, network, round_to, config.budget))
        if config.budget.unit in MEASURED and config.gate.enabled:
            if resume is not None:  # what was measured first counts to the end
                network = with_unit_cost(network, UnitCost.of_state(resume[1].state), config.budget)
            else:
                with meter.window("setup"), _left_as_found(claim, engine):
                    network = _with_measured_cost(config, config.budget.unit, network, data, engine)
        mirrors, notes = engine.together(
            lambda: _start_mirrors(config, engine, places, folder, stack, display, environment, online=online)
        )
        notes += claim.notes
        if carbon is None:
            notes.append(CO2_IS_UNKNOWN)
        records = Records(folder, meter, carbon, mirrors, notes, slurm_job(environment))
        with meter.window("setup"):
            trainer = Trainer(config, data, engine, network, records, resume)
        stack.callback(trainer.close)
        with _failures_recorded(trainer, environment), engine.watching(config.stall_s, lambda: _advice(folder)):
            return RunResult(trainer.fit(), folder, engine.is_main)


def _check_passes(config: Config, network: Network, data: ImageData, engine: Engine) -> None:
    """Check that the network can be trained on a single image, if that is a process's share of a pass.

    Raises:
        ConfigError: It cannot: batch norm over one value has no variance.
    """
    if config.data.batch_size // engine.world_size // config.optim.accumulate > 1:
        return
    model = copy.deepcopy(network.model).to("meta").train()
    try:
        model(torch.empty(1, data.channels, data.image_size, data.image_size, device="meta"))
    except ValueError as error:
        raise ConfigError(
            f"data.batch_size: {config.data.batch_size!r} is not valid: it leaves one image for a pass of a process "
            f"({engine.world_size} processes, optim.accumulate {config.optim.accumulate}), and {config.model.name} "
            f"cannot be trained on one ({error}); expected at least twice as many"
        ) from None


def _load(path: Path, data: ImageData) -> Checkpoint:
    """A checkpoint of a run on this data set.

    Raises:
        UserError: The run was started on other images; those of before it had digests pass.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint.state.get("data", data.digest) != data.digest:
        raise UserError(
            f"data.root: it holds another {data.name} than the one that the run in {str(path.parent.parent)!r} was "
            "started on; expected the same files (their place may change), or another run_name"
        )
    return checkpoint


def _advice(folder: RunFolder) -> str:
    """How to go on with a run that did not end in good order."""
    there = list_checkpoints(folder.checkpoints)
    if not there:
        return "There is no checkpoint yet"
    name = shlex.quote(folder.path.name)
    return f"Go on from {there[-1].name} with the same command and --resume auto --run_name {name}"


@contextmanager
def _failures_recorded(trainer: Trainer, environment: Mapping[str, str]) -> Iterator[None]:
    """Within, an error that ends the run is recorded in its log, if that can still be written."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        with suppress(OSError):  # on a full disk the error is told all the same, and the log stays as it was
            trainer.recorder.failed(trainer.step, without_secrets(_in_one_line(error), environment))
        if isinstance(error, UserError) and not isinstance(error, ConfigError):  # that would end it again
            error.ended_run = True
        raise


def _in_one_line(error: Exception) -> str:
    said = " ".join(str(error).split())
    if said and isinstance(error, UserError | RuntimeError | OSError):  # which speak for themselves
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _resolve_structure(config: Config, engine: Engine) -> Config:
    """The config with the structure that it names read, alike on every rank."""
    resolved = engine.together(lambda: resolve_structure(config))
    if resolved.model.structure is not None:
        engine.check_agreement("model.structure", resolved.model.structure)
    return resolved


@contextmanager
def _left_as_found(claim: _Claim, engine: Engine) -> Iterator[None]:
    """Within, a run that turns out not to be possible as asked takes its new folder away again."""
    try:
        yield
    except ConfigError:
        if claim.is_new and engine.is_main:
            shutil.rmtree(claim.path)
        raise


def _with_measured_cost(
    config: Config, unit: MeasuredUnit, network: Network, data: ImageData, engine: Engine
) -> Network:
    """The network with costs as rank 0 has measured them: all ranks decide by the same figures."""
    samples = config.data.batch_size // engine.world_size // config.optim.accumulate
    shape = (samples, data.channels, data.image_size, data.image_size)

    def measure() -> UnitCost:
        # Not zeros, from which batch norm makes nothing but zeros: what they take is less than what images take.
        example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(engine.device)
        return measure_unit_cost(
            unit,
            network.model,
            example,
            autocast=engine.autocast,
            channels_last=config.model.channels_last,
            recorded=engine.records,
        )

    return with_unit_cost(network, engine.together(measure, main_only=True), config.budget)


def _open_engine(config: Config) -> Engine:
    """The engine; what is wrong with the launch is seen alike by all of its processes."""
    try:
        return Engine(config)
    except UserError as error:
        error.known_to_all = True
        raise


def _open_data(config: Config, data_root: str | None, engine: Engine) -> ImageData:
    """The data set, on the device; where it may be downloaded, one process a node goes first."""

    def open_and_move() -> ImageData:
        with engine.local_main_first() if config.data.download else nullcontext():
            data = open_data(config.data, config.data.root or data_root, config.seed)
        data.check_world(engine.world_size, config.optim.accumulate)
        return data.to(engine.device, config.model.channels_last)

    data = engine.together(open_and_move)
    engine.check_agreement(f"{config.data.name} in data.root", data.digest)
    return data


def _open_meter(config: Config, engine: Engine, places: list[Place], environment: Mapping[str, str]) -> Meter:
    """A meter of this process's share: each GPU is read by one rank, each machine by one rank of it."""
    claims = [(place.machine, [] if place.gpu_uuid is None else [place.gpu_uuid]) for place in places]
    share = share_devices(engine.rank, claims)
    return open_meter(
        gpu_uuids=share.gpu_uuids,
        host=share.host,
        interval_s=config.energy.interval_s,
        synchronize=engine.synchronize,
        environment=environment,
    )


def _start_mirrors(
    config: Config,
    engine: Engine,
    places: list[Place],
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
        file.write(json.dumps(collect_provenance(engine.world_size, engine.device, places)) + "\n")
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
        is_new: Whether the folder was made for it.
    """

    path: Path
    finished: bool = False
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    is_new: bool = False


def _claim(config: Config, network: Network, stack: ExitStack, environment: Mapping[str, str]) -> _Claim:
    """Take a folder for the run, new or to go on in, and hold it until the stack is closed.

    In a Slurm job it waits for what an earlier attempt, maybe on another machine, has written or not let go of yet.

    Raises:
        UserError: The folder holds another run or is in use, cannot be written, or there is no such checkpoint.
        CheckpointCorrupt: No checkpoint of the run can be used.
    """

    def check(checkpoint: Checkpoint) -> None:
        check_fits(checkpoint, config, network.model)

    if config.resume not in ("auto", "never"):
        return _claim_checkpoint(config, stack, Path(config.resume), check)
    in_job, requeued = "SLURM_JOB_ID" in environment, environment.get("SLURM_RESTART_COUNT", "0") != "0"
    if in_job and config.resume == "auto" and config.run_name is not None:
        await_attempt(RunFolder(Path(config.output_dir) / config.run_name), requeued=requeued)
    folder, is_new = _new_or_same_folder(config)
    if not folder.config.is_file():
        raise UserError(f"run_name: {str(folder.path)!r} is not the folder of a run; expected another run_name")
    if folder.summary.exists():
        _end_log(folder, stack)
        return _Claim(folder.path, finished=True)
    notes = _hold(folder, stack, PATIENCE_S if requeued else 0.0)
    newest = load_newest(folder.checkpoints, check)
    if newest is None:
        return _Claim(folder.path, notes=notes, is_new=is_new)
    path, _, damaged = newest
    notes += tuple(f"going on from {path.name}, because {line}" for line in damaged)
    return _Claim(folder.path, checkpoint=path, notes=notes)


def _end_log(folder: RunFolder, stack: ExitStack) -> None:
    """Record the end of a run that was killed between its summary and its last event."""
    events, _ = salvage_events(folder.events)
    if events and events[-1]["kind"] != "end":
        _hold(folder, stack)
        summary = _result(folder)
        log = EventLog(folder.events, [])
        log.record("end", summary["steps"], summary=summary)
        log.close()


def _result(folder: RunFolder) -> dict[str, Any]:
    """The summary of a run that is finished."""
    try:
        return read_whole_summary(folder.summary)
    except UserError as error:
        told = str(error).removeprefix("RUN: ")
        raise UserError(f"resume: {told}, or no such file, to have it made again from the last checkpoint") from None


def _new_or_same_folder(config: Config) -> tuple[RunFolder, bool]:
    """A new folder with the config in it, or that of the same run to go on with or finished; and whether it is new."""
    if config.run_name is None:
        return _numbered_folder(config)
    folder = RunFolder(Path(config.output_dir) / config.run_name)
    with suppress(FileExistsError):
        folder.create(config)
        return folder, True
    if config.resume == "never":
        raise UserError(
            f"run_name: {str(folder.path)!r} already holds a run; expected --resume auto to go on with it, "
            "another run_name, or none to have one chosen"
        )
    _check_same_run(config, folder)
    return folder, False


def _numbered_folder(config: Config) -> tuple[RunFolder, bool]:
    """The same for a run without a name of its own, whose folder has a number if its name was taken."""
    name = default_run_name(config)
    if config.resume == "auto":
        same = [folder for folder in _numbered_folders(config, name) if not _differences(config, folder)]
        same.sort(key=lambda folder: folder.summary.exists())  # one that is not finished first
        if same:
            return same[0], False
    for number in itertools.count(1):
        folder = RunFolder(Path(config.output_dir) / (name if number == 1 else f"{name}-{number}"))
        with suppress(FileExistsError):
            folder.create(config)
            break
        if config.resume == "auto" and not _differences(config, folder):
            return folder, False  # begun since by the same command
    return folder, True


def _numbered_folders(config: Config, name: str) -> list[RunFolder]:
    """The runs' folders of this name, whatever number they have, in the order of the numbers; some may be gone."""
    pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    found = (
        (pattern.fullmatch(path.name), RunFolder(path))
        for path in Path(config.output_dir).glob(f"{glob.escape(name)}*")
    )
    numbered = [(int(match[1] or 1), folder) for match, folder in found if match and folder.config.is_file()]
    return [folder for _, folder in sorted(numbered, key=itemgetter(0))]


def _hold(folder: RunFolder, stack: ExitStack, patience_s: float = 0.0) -> tuple[str, ...]:
    """Hold a folder until the stack is closed; a note if its last owner ended without letting go."""
    lock = take_lock(folder, patience_s)
    stack.callback(lock.release)
    return (f"the lock was left behind by {lock.left_by}, which is gone",) if lock.left_by else ()


def _claim_checkpoint(config: Config, stack: ExitStack, path: Path, check: Callable[[Checkpoint], None]) -> _Claim:
    if not (path / "manifest.json").is_file():
        raise UserError(f"resume: {config.resume!r} is not a checkpoint; expected never, auto or a folder step-<n>")
    folder = RunFolder(path.resolve().parent.parent)
    _check_same_run(config, folder)
    _check_same_place(config, folder)
    if folder.summary.exists():
        raise UserError(
            f"resume: the run in {str(folder.path)!r} is finished; expected a checkpoint of one that is not"
        )
    notes = _hold(folder, stack)
    try:
        check(load_checkpoint(path))
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{error}; --resume auto goes on from the newest that is whole") from None
    return _Claim(folder.path, checkpoint=path.resolve(), notes=notes)


def _check_same_run(config: Config, folder: RunFolder) -> None:
    different = _differences(config, folder)
    if different:
        raise UserError(
            f"run_name: {str(folder.path)!r} holds a different run (it differs in {', '.join(different)}); "
            f"expected the same config, or another run_name; what may be changed is {MAY_CHANGE}"
        )


def _check_same_place(config: Config, folder: RunFolder) -> None:
    """Refuse another name or place for a run that goes on where it is; its own config may have those of before a move.

    Raises:
        UserError: One is given.
    """
    theirs, name, place = load_config(folder.config), folder.path.name, folder.path.parent
    may_be = (Config().output_dir, theirs.output_dir)  # the default may not have been given at all
    if config.run_name not in (None, name, theirs.run_name):
        wrong, valid = f"run_name: {config.run_name!r}", name
    elif config.output_dir not in may_be and Path(config.output_dir).resolve() != place:
        wrong, valid = f"output_dir: {config.output_dir!r}", str(place)
    else:
        return
    raise UserError(
        f"{wrong} is not that of the run whose checkpoint resume names, and which goes on in its own folder; "
        f"expected {valid!r}, or none"
    )


def _differences(config: Config, folder: RunFolder) -> list[str]:
    """Keys that shape the result and differ between a config and the one a folder's run was started with."""
    try:
        theirs = shaping_values(load_config(folder.config).to_dict())
    except ConfigError as error:
        return [f"config.yaml, which cannot be read: {error}"]
    mine = shaping_values(config.to_dict())
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
