"""W&B as a mirror of a run's events, through Accelerate's tracker interface; offline unless the user is logged in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from greenprune.config import Config, ConfigError
from greenprune.engine import Engine
from greenprune.tracking import Event, RunFolder, has_wandb_login

_MIRRORED = ("train", "epoch", "removal", "freeze")
_INIT_TIMEOUT_S = 20


def start_wandb(
    engine: Engine, config: Config, folder: RunFolder, *, online: bool
) -> tuple[Callable[[Event], None], str]:
    """Start a W&B run on rank 0; never asks anything and needs no network.

    Accuracy is drawn over joules: the metric ``energy/total_j`` is the x-axis of everything under ``eval/``.

    Args:
        engine: The run's engine.
        config: The run.
        folder: The run's folder; W&B writes its files below it.
        online: Whether to talk to the server; see :func:`wandb_goes_online`.

    Returns:
        The mirror to give to the event log, and one line that says where the run is to be seen.
    """
    import wandb

    options: dict[str, Any] = {
        "name": folder.path.name,
        "id": f"{folder.path.name}-{config.identity()}",
        "resume": "allow" if online else None,
        "job_type": "gated" if config.gate.enabled else "dense",
        "dir": str(folder.path),
        "mode": "online" if online else "offline",
        "settings": wandb.Settings(init_timeout=_INIT_TIMEOUT_S, console="off", silent=True),
    }
    try:
        engine.start_trackers(config.tracking.trackers, config.tracking.project, config.to_dict(), {"wandb": options})
    except wandb.errors.Error:
        # The server does not answer or does not know the key: the run is worth more than its live view.
        options |= {"mode": "offline", "resume": None}
        engine.start_trackers(config.tracking.trackers, config.tracking.project, config.to_dict(), {"wandb": options})
    run = engine.tracker("wandb")
    for name in ("energy/total_j", "flops/train"):
        run.define_metric(name)
    run.define_metric("eval/*", step_metric="energy/total_j")

    def mirror(event: Event) -> None:
        if event["kind"] in _MIRRORED:
            numbers = {key: value for key, value in event.items() if "/" in key and isinstance(value, int | float)}
            engine.log(numbers, step=event["step"])
        elif event["kind"] == "end":
            run.summary.update({key: value for key, value in event["summary"].items() if not isinstance(value, list)})

    if run.settings._offline:
        note = f"W&B is offline; to upload: wandb sync {Path(run.dir).parent}"
    else:
        note = f"W&B: {run.url}"
    return mirror, note


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
