"""What a run's events become in W&B, whether they come as it trains or are read back from its log."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from greenprune.config import Config, ConfigError
from greenprune.tracking import Event, RunFolder, has_wandb_login, name_without_seed, numbers_of, read_attempts

Log = Callable[[dict[str, Any]], None]
WriteReport = Callable[[RunFolder, Path], list[Path]]

_MIRRORED = ("start", "train", "epoch", "removal", "freeze", "checkpoint")
_INIT_TIMEOUT_S = 20
_FINISH_TIMEOUT_S = 120
# What everything is drawn over. A metric has one x-axis: accuracy and loss are told three times, once for each.
_OVER_STEPS = (
    "train/*",
    "gate/*",
    "gate_rate/*",
    "structure/*",
    "flops/*",
    "energy/*",
    "eval_over_steps/*",
    "process/*",
)
_AXES = {
    **dict.fromkeys(_OVER_STEPS, "step"),
    "eval/*": "energy/total_j",
    "eval_over_flops/*": "flops/train",
}
_BINS = 32
_ARTIFACT_NAME_LENGTH = 128


class WandbMirror:
    """Sends a run's events to a W&B run.

    Rows are not tied to W&B's own step, which may not go back: a run that was killed goes on from a checkpoint before
    its last row. Every row has ``step``, the x-axis of all that has no other.

    Args:
        run: The W&B run, started.
        log: Sends a row to it.
        folder: The run's folder.
        write_report: Writes the run's report into a folder and gives the files, once it is finished.
    """

    def __init__(self, run: Any, log: Log, folder: RunFolder, write_report: WriteReport) -> None:
        self._run = run
        self._log = log
        self._folder = folder
        self._write_report = write_report
        for axis in ("step", "energy/total_j", "flops/train"):
            run.define_metric(axis)
        for names, axis in _AXES.items():
            run.define_metric(names, step_metric=axis)

    def __call__(self, event: Event) -> None:
        """Send one event."""
        kind = event["kind"]
        if kind in _MIRRORED:
            numbers = numbers_of(event)
            if kind == "epoch":
                numbers |= _over_other_axes(numbers)
            self._log({**_place(event), **numbers})
        elif kind == "window":
            self._log({**_place(event), **numbers_of(event), **_gates(event.get("units", {}))})
        elif kind == "end":
            self._end(event.get("summary", {}))

    def _end(self, summary: dict[str, Any]) -> None:
        flops, dense = summary.get("flops_train"), summary.get("flops_train_dense")
        self._run.summary.update({key: value for key, value in summary.items() if not isinstance(value, list)})
        self._run.summary["flops_saved"] = 1 - flops / dense if flops is not None and dense else None
        if self._folder.structure.is_file():
            self._keep("structure", [self._folder.structure])
        with tempfile.TemporaryDirectory() as scratch:
            files = self._write_report(self._folder, Path(scratch))
            if files:
                self._keep("report", files)

    def _keep(self, kind: str, files: list[Path]) -> None:
        import wandb

        # W&B takes fewer characters in an artifact's name than a run's may have.
        name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{kind}-{self._run.id}")[:_ARTIFACT_NAME_LENGTH]
        artifact = wandb.Artifact(name, type=kind)
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)


def _place(event: Event) -> dict[str, float]:
    """When the event was, in steps and in seconds, also if it is sent later."""
    return {"step": event["step"], "_timestamp": event["time"]}


def _over_other_axes(numbers: dict[str, float]) -> dict[str, float]:
    """The figures of an evaluation under the names that are drawn over FLOPs and over steps."""
    evaluated = {key.partition("/")[2]: value for key, value in numbers.items() if key.startswith("eval/")}
    axes = ("eval_over_flops", "eval_over_steps")
    return {f"{axis}/{key}": value for axis in axes for key, value in evaluated.items()}


def _gates(units: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How far all gates are open as a histogram, which W&B draws over time as a heat map, and each unit's rate."""
    import numpy as np
    import wandb

    openness: list[float] = []
    rates: dict[str, Any] = {}
    for name, seen in units.items():
        several = isinstance(seen["rate"], list)
        openness += seen["openness"] if several else [seen["openness"]]
        rate = sum(seen["rate"]) / max(1, len(seen["rate"])) if several else seen["rate"]
        rates[f"gate_rate/{name.replace(':', '.')}"] = rate
    if openness:
        rates["gate/openness"] = wandb.Histogram(np_histogram=np.histogram(openness, bins=_BINS, range=(0, 1)))
    return rates


def wandb_options(config: Config, folder: RunFolder, *, online: bool, resume: bool) -> dict[str, Any]:
    """Arguments of ``wandb.init`` for a run: the same identity in every attempt, nothing asked, nothing waited for.

    Args:
        config: The run.
        folder: The run's folder, whose provenance tells of its last attempt; W&B writes its files below it.
        online: Whether to talk to the server.
        resume: Whether to go on with rows that the server has; else they are replaced.
    """
    import wandb

    job_type = "gated" if config.gate.enabled else "dense" if config.is_dense else "structure"
    tags = [config.data.name, config.model.name, job_type]
    if config.gate.enabled:
        tags += [f"{unit} gates" for unit in config.gate.units] + [f"keep {config.budget.target:g}"]
    array = _slurm_array(folder)
    return {
        "name": folder.path.name,
        "id": _run_id(config, folder),
        "resume": "allow" if online and resume else None,
        "group": config.tracking.group or (f"slurm-array-{array}" if array else name_without_seed(config)),
        "job_type": job_type,
        "tags": [tag[:64] for tag in tags],
        "dir": str(folder.path),
        "mode": "online" if online else "offline",
        "settings": wandb.Settings(
            init_timeout=_INIT_TIMEOUT_S,
            finish_timeout=_FINISH_TIMEOUT_S,
            console="off",
            silent=True,
            x_label="rank 0",  # of the system metrics: they are those of this process's machine
        ),
    }


def _slurm_array(folder: RunFolder) -> str | None:
    """The Slurm array that the last attempt was a task of, whoever tells of it and from where; None if of none."""
    attempts = read_attempts(folder.provenance)
    slurm: dict[str, str] = (attempts[-1].get("slurm") if attempts else None) or {}
    return slurm.get("array")


def _run_id(config: Config, folder: RunFolder) -> str:
    if folder.id.is_file():
        return folder.id.read_text().strip()
    return f"{folder.path.name}-{config.identity()}"  # of a run from before folders had an id


def where_to_see(run: Any, folder: RunFolder) -> str:
    """One line that says where a W&B run is to be seen, or how to get it there."""
    if run.settings._offline:
        # All attempts together: W&B puts those of one run after each other.
        return f"W&B is offline; to upload: wandb sync {shlex.quote(str(folder.path / 'wandb'))}/offline-run-*"
    return f"W&B: {run.url}"


def wandb_goes_online(config: Config, environment: Mapping[str, str]) -> bool:
    """Whether W&B is to be online: if the config lets it and a key is at hand, which W&B would otherwise ask for.

    Args:
        config: The run.
        environment: The process's environment.

    Raises:
        ConfigError: ``tracking.mode`` is online and nobody is logged in.
    """
    logged_in = has_wandb_login(environment)
    if config.tracking.mode == "online":
        if not logged_in:
            raise ConfigError(
                "tracking.mode: 'online' is not valid without a W&B login; "
                "expected auto or offline, or run: wandb login"
            )
        return True
    return config.tracking.mode == "auto" and logged_in and environment.get("WANDB_MODE") not in ("offline", "disabled")
