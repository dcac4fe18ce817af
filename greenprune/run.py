"""From a config to a finished run: data, engine, folder, meter, mirrors, and the trainer that uses them."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from greenprune.checkpoint import Checkpoint, load_checkpoint, load_newest
from greenprune.config import Config, UserError, shaping_values
from greenprune.data import open_data
from greenprune.energy import Meter, carbon_intensity, open_meter
from greenprune.engine import Engine
from greenprune.network import prepare_network
from greenprune.progress import Display
from greenprune.provenance import collect_provenance
from greenprune.tracking import Event, RunFolder, default_run_name
from greenprune.trainer import Records, Trainer
from greenprune.wandb_mirror import start_wandb


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


def train(config: Config, data_root: str | None, display: Callable[[], Display]) -> RunResult:
    """Do one complete run, or go on with it.

    Args:
        config: The run.
        data_root: Folder of the data sets, if the config names none.
        display: Makes the progress display; called on rank 0 only.

    Raises:
        UserError: The run cannot be done as asked; nothing was written.
        Interrupted: A signal asked to stop; a checkpoint is written.
        TrainingDiverged: The loss is not finite.
    """
    carbon = carbon_intensity(config.energy.country, config.energy.region)
    engine = Engine(config)
    try:
        with engine.local_main_first() if config.data.download else nullcontext():
            data = open_data(config.data, config.data.root or data_root, config.seed)
        data.check_world(engine.world_size)
        data.to(engine.device, config.model.channels_last)
        network = prepare_network(config, data)
        folder, resume = _open_run(config, engine)
        if folder.summary.exists():
            return RunResult(yaml.safe_load(folder.summary.read_text()), folder, engine.is_main)
        with ExitStack() as stack:
            mirrors, notes = _start_mirrors(config, engine, folder, stack, display)
            if carbon is None:
                notes.append("CO2 is unknown: set energy.country to the country whose grid feeds this machine")
            meter = stack.enter_context(_open_meter(config, engine))
            trainer = Trainer(config, data, engine, network, Records(folder, meter, carbon, mirrors, notes), resume)
            return RunResult(trainer.fit(), folder, engine.is_main)
    finally:
        engine.finish()


def _open_meter(config: Config, engine: Engine) -> Meter:
    """A meter of this process's share: each GPU is read by one rank, each host by one rank of it."""
    host = socket.gethostname()
    ranks = engine.gather_objects((host, engine.gpu_uuid))
    gpu = engine.gpu_uuid
    mine = gpu is not None and [uuid for _, uuid in ranks].index(gpu) == engine.rank
    reads_host = [name for name, _ in ranks].index(host) == engine.rank
    return open_meter(
        gpu_uuids=[gpu] if mine and gpu is not None else [],
        host=reads_host,
        interval_s=config.energy.interval_s,
        synchronize=engine.synchronize,
    )


def _start_mirrors(
    config: Config, engine: Engine, folder: RunFolder, stack: ExitStack, display: Callable[[], Display]
) -> tuple[list[Callable[[Event], None]], list[str]]:
    """What shows the run's events while it goes on, and notes about it; on rank 0 only."""
    if not engine.is_main:
        return [], []
    with folder.provenance.open("a") as file:
        file.write(json.dumps(collect_provenance(engine.world_size, engine.device)) + "\n")
    shown = display()
    stack.callback(shown.close)
    if "wandb" in config.tracking.trackers:
        mirror, note = start_wandb(engine, config, folder)
        return [shown, mirror], [note]
    return [shown], []


def _open_run(config: Config, engine: Engine) -> tuple[RunFolder, tuple[Path, Checkpoint] | None]:
    """Choose the run's folder, check that it may be used, and find the checkpoint to go on from.

    Rank 0 decides and creates; the others follow, or fail with the same message.
    """
    outcome: tuple[str, object]
    if engine.is_main:
        try:
            folder, checkpoint = _claim(config)
            outcome = ("ok", (str(folder.path), str(checkpoint) if checkpoint else None))
        except UserError as error:
            outcome = ("error", str(error))
    else:
        outcome = ("", None)
    kind, value = engine.from_main(outcome)
    if kind == "error":
        raise UserError(value)
    path, checkpoint_path = value
    resume = (Path(checkpoint_path), load_checkpoint(Path(checkpoint_path))) if checkpoint_path else None
    return RunFolder(Path(path)), resume


def _claim(config: Config) -> tuple[RunFolder, Path | None]:
    """The run's folder, created, and the checkpoint to go on from if any.

    Raises:
        UserError: The folder holds another run, or cannot be written, or there is no such checkpoint.
    """
    if config.resume not in ("auto", "never"):
        return _claim_checkpoint(config, Path(config.resume))
    name = config.run_name or default_run_name(config)
    folder = RunFolder(Path(config.output_dir) / name)
    number = 1
    while folder.exists and config.run_name is None and not _can_go_on(config, folder):
        number += 1
        folder = RunFolder(Path(config.output_dir) / f"{name}-{number}")
    if not folder.exists:
        folder.create(config)
        return folder, None
    if config.resume == "never":
        raise UserError(
            f"run_name: {str(folder.path)!r} already holds a run; expected --resume auto to go on with it, "
            "another run_name, or none to have one chosen"
        )
    _check_same_run(config, folder)
    newest = load_newest(folder.checkpoints)
    return folder, newest[0] if newest else None


def _can_go_on(config: Config, folder: RunFolder) -> bool:
    """Whether ``resume: auto`` without a name may take up this run: the same run, not finished."""
    if config.resume != "auto" or folder.summary.exists():
        return False
    return not _differences(config, folder)


def _claim_checkpoint(config: Config, path: Path) -> tuple[RunFolder, Path | None]:
    if not (path / "manifest.json").is_file():
        raise UserError(f"resume: {config.resume!r} is not a checkpoint; expected never, auto or a folder step-<n>")
    folder = RunFolder(path.resolve().parent.parent)
    _check_same_run(config, folder)
    return folder, path


def _check_same_run(config: Config, folder: RunFolder) -> None:
    different = _differences(config, folder)
    if different:
        raise UserError(
            f"run_name: {str(folder.path)!r} holds a different run (it differs in {', '.join(different)}); "
            "expected the same config, or another run_name"
        )


def _differences(config: Config, folder: RunFolder) -> list[str]:
    """Keys that shape the result and differ between a config and the one a folder's run was started with."""
    if not folder.config.is_file():
        return ["config.yaml, which is missing"]
    saved = yaml.safe_load(folder.config.read_text())
    mine, theirs = shaping_values(config.to_dict()), shaping_values(saved)
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
