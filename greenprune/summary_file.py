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
_MOST_BITS = 1023  # of a whole number that a float can hold
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
_SWITCHES = ("energy_complete", "gated", "structure_given")

# What every finished run tells; the second are null where they are not known, or there is nothing to tell.
_ALWAYS_KNOWN = (
    *("run", "model", "data", "gated", "epochs", "world_size", "params", "params_dense", "flops_forward"),
    *("flops_forward_dense", "kept_cost", "gates_left", "blocks", "blocks_dense", "removals", "flops_train"),
    *("flops_train_dense", "energy_by_device_j", "energy_by_phase_j", "time_s", "attempts", "samples"),
    *("accuracy_kind", "budget_unit", "step_time_s", "steps"),
)
_ALWAYS_THERE = (
    *("accuracy", "budget_target", "carbon_intensity_g_per_kwh", "co2_g", "energy_j", "energy_lost_j"),
    "energy_quality",
)


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
        if key in _SWITCHES and not isinstance(value, bool):
            return f"{key} {value!r} is neither true nor false"
        if key in _MAPPINGS and not (isinstance(value, dict) and all(map(_is_number_or_null, value.values()))):
            return f"{key} {value!r} is no object of numbers"
        if key == "removals" and not (isinstance(value, list) and all(map(_is_removal, value))):
            return "removals are no list of objects, each with its unit, epoch and reason"
        if key == "energy_by_attempt" and not (isinstance(value, list) and all(map(_is_attempt, value))):
            return "energy_by_attempt is no list of objects, each with its attempt, energy_j and lost_j"
        if key == "energy_missing" and not isinstance(value, dict):
            return f"{key} {value!r} is no object"
    return ""


def read_whole_summary(path: Path) -> dict[str, Any]:
    """Content of the summary.json of a finished run, with all that every run tells of its result.

    Raises:
        UserError: As :func:`read_summary`, or something is not there.
    """
    values = read_summary(path)
    for key in (*_ALWAYS_KNOWN, *_ALWAYS_THERE):
        if key not in values or (values[key] is None and key in _ALWAYS_KNOWN):
            raise UserError(f"RUN: {str(path)!r} does not tell {key}; expected the summary of a finished run")
    return values


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value read from JSON is a number, which true and false are not, nor what no float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or value.bit_length() <= _MOST_BITS


def _is_number_or_null(value: object) -> bool:
    return value is None or is_number(value)


def _is_removal(value: object) -> bool:
    if not isinstance(value, dict) or not is_number(value.get("epoch")):
        return False
    channels = value.get("channels")
    known = channels is None or (isinstance(channels, int) and not isinstance(channels, bool))
    return known and isinstance(value.get("unit"), str) and isinstance(value.get("reason"), str)


def _is_attempt(value: object) -> bool:
    keys = {"attempt", "energy_j", "lost_j"}
    return isinstance(value, dict) and keys <= value.keys() and all(_is_number_or_null(value[key]) for key in keys)
