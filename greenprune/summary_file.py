"""A run's summary.json, read back: by whoever made it, whole or not, and perhaps edited since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeGuard

from greenprune.config import UserError

_NUMBERS = (
    "accuracy",
    "attempts",
    "batch_size",
    "blocks",
    "blocks_dense",
    "budget_target",
    "carbon_intensity_g_per_kwh",
    "channels",
    "channels_dense",
    "co2_g",
    "energy_bound_j",
    "energy_j",
    "energy_lost_j",
    "energy_per_epoch_j",
    "energy_per_sample_j",
    "energy_slurm_j",
    "epochs",
    "flops_forward",
    "flops_forward_dense",
    "flops_train",
    "flops_train_dense",
    "gates_left",
    "kept_cost",
    "loss",
    "params",
    "params_dense",
    "pue",
    "samples",
    "seed",
    "skipped_steps",
    "steps",
    "time_s",
    "world_size",
)
_TEXTS = (
    "accuracy_kind",
    "budget_unit",
    "carbon_intensity_source",
    "data",
    "data_digest",
    "device",
    "energy_quality",
    "model",
    "precision",
    "run",
)
_MAPPINGS = ("energy_by_device_j", "energy_by_phase_j", "energy_by_phase_bound_j", "step_time_s")


def read_summary(path: Path) -> dict[str, Any]:
    """Content of a summary.json.

    Raises:
        UserError: It cannot be read, is no JSON object, or has a figure of another kind than its name says.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"RUN: {str(path)!r} cannot be read ({error}); expected a run's summary") from None
    if not isinstance(values, dict):
        raise UserError(f"RUN: {str(path)!r} holds no summary; expected one JSON object with a run's figures")
    if wrong := wrong_with_summary(values):
        raise UserError(f"RUN: {str(path)!r} cannot be read ({wrong}); expected a run's summary")
    return values


def wrong_with_summary(values: dict[str, Any]) -> str:
    """The first figure of a summary that is not of the kind that its name says, and what it would be; empty if none."""
    for key, value in values.items():
        if value is None:
            continue
        if key in _NUMBERS and not is_number(value):
            return f"{key} {value!r} is no number"
        if key in _TEXTS and not isinstance(value, str):
            return f"{key} {value!r} is no text"
        if key in _MAPPINGS and not (isinstance(value, dict) and all(map(_is_number_or_null, value.values()))):
            return f"{key} {value!r} is no object of numbers"
    return ""


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value read from JSON is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_null(value: object) -> bool:
    return value is None or is_number(value)
