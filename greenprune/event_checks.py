"""What the lines of a run's events.jsonl may hold, for whoever reads one back: it may have been damaged or edited."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from greenprune.summary_file import is_number, wrong_with_summary

Check = Callable[[Any], bool]

_MOST = 1 << 63  # of anything that is counted


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_finite(value: object) -> bool:
    return is_number(value) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_list(of: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(of, value))


def _is_table(of: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_source(value: object) -> bool:
    """Device, source and quality, the last two null for a device that nothing reads."""
    if not isinstance(value, list) or len(value) != 3:
        return False
    device, *metered = value
    return _is_text(device) and all(one is None or _is_text(one) for one in metered)


def _is_gate(value: object) -> bool:
    """What a gate did in a window: of a block's one rate, of those of a set of channels a list."""
    if not isinstance(value, dict):
        return False
    rate = value.get("rate")
    return _is_finite(rate) or _is_list(_is_finite)(rate)


_WHOLE = (_is_count, "whole number")
_NUMBER = (_is_finite, "number")
_TEXT = (_is_text, "text")
_TEXTS = (_is_list(_is_text), "list of texts")
_JOULES = (_is_table(_or_null(_is_finite)), "object of numbers")
_BOOKS: dict[str, Check] = {
    "energy_by_phase_j": _is_table(_or_null(_is_finite)),
    "energy_by_phase_bound_j": _is_table(_or_null(_is_finite)),
    "energy_by_device_j": _is_table(_or_null(_is_finite)),
    "energy_complete": lambda value: isinstance(value, bool),
    "energy_lost_j": _is_finite,
    "energy_quality": _or_null(_is_text),
    "energy_missing": _is_table(_is_text),
}


def _are_books(value: object) -> bool:
    """Joules of a ledger, of which an older version may lack some."""
    return isinstance(value, dict) and all(check(value[key]) for key, check in _BOOKS.items() if key in value)


# What may be null, because it is not known or there is none; figures, which have a slash in their names, may be too.
_MAY_BE_NULL = {
    *("budget_target", "budget_unit", "checkpoint", "data_digest", "pause_s", "path", "resumed_from", "signal"),
    *("time_s", "unit_cost", "write_s"),
}

# By key, in events of any kind, what a value is. Other keys with a slash are numbers.
_KINDS: dict[str, tuple[Check, str]] = {
    **dict.fromkeys(("attempt", "batch_size", "classes", "epochs", "steps_per_epoch", "world_size"), _WHOLE),
    **dict.fromkeys(("eval_samples", "seed", "train_samples"), _WHOLE),
    **dict.fromkeys(("structure/blocks", "structure/channels", "structure/gates"), _WHOLE),
    **dict.fromkeys(("budget_target", "epoch", "pause_s", "time_s", "write_s"), _NUMBER),
    **dict.fromkeys(("accuracy_kind", "budget_unit", "checkpoint", "data", "data_digest", "device", "engine"), _TEXT),
    **dict.fromkeys(("error", "model", "path", "precision", "reason", "resumed_from", "run", "signal"), _TEXT),
    "energy/by_device_j": _JOULES,
    "energy/by_phase_j": _JOULES,
    "energy/ledger": (_are_books, "ledger of joules"),
    "energy_sources": (_is_list(_is_source), "list of devices, each with its source and quality"),
    "image_shape": (_is_list(_is_count), "list of whole numbers"),
    "notes": _TEXTS,
}
_OF_A_CHANGE: dict[str, tuple[Check, str]] = {
    "unit": _TEXT,
    "channels": (lambda value: value is None or _is_count(value) or _is_list(_is_count)(value), "list of channels"),
}
# The same in events of one kind.
_BY_KIND: dict[str, dict[str, tuple[Check, str]]] = {
    "start": {"units": _TEXTS, "channels": (_is_table(_is_count), "object of whole numbers")},
    "epoch": {"epoch": _WHOLE},
    "window": {"units": (_is_table(_is_gate), "object of gates, each with its rate")},
    "removal": _OF_A_CHANGE,
    "freeze": _OF_A_CHANGE,
}
_LONGEST_SHOWN = 80  # characters of a value


def wrong_with_event(event: dict[str, Any]) -> str:
    """What keeps a JSON object from being an event, by the first key that is at fault; empty if nothing does.

    Keys that are not there, as those of newer versions in older logs, are not missed, but for the three that every
    event has, and for the unit that was removed or frozen.
    """
    kind, step, time = event.get("kind"), event.get("step"), event.get("time")
    if not isinstance(kind, str):
        return "it has no kind"
    if not _is_count(step):
        return f"step {step!r} is no number of steps"
    if not _is_finite(time):
        return f"time {time!r} is no number of seconds"
    of_kind = _BY_KIND.get(kind, {})
    if of_kind is _OF_A_CHANGE and not isinstance(event.get("unit"), str):
        return "its unit is missing or no text"
    for key, value in event.items():
        found = of_kind.get(key) or _KINDS.get(key)
        if found is None and "/" not in key:
            continue
        is_right, what = found or _NUMBER
        if not is_right(value) and not (value is None and (key in _MAY_BE_NULL or "/" in key)):
            return f"{key} {_shown(value)} is no {what}"
    summary = event.get("summary", {})
    if not isinstance(summary, dict):
        return "its summary is no object"
    return wrong_with_summary(summary)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
