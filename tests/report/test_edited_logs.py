"""Logs with values of another kind, as by an edit by hand: whoever reads one takes them for damage, and says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from recording import record_run

from greenprune.config import UserError
from greenprune.progress import RunStatus
from greenprune.report.contents import build_report
from greenprune.tracking import Event, EventsCorrupt, parse_event
from greenprune.watch import watch_run

OTHER_KINDS: list[Any] = ["x", None, -1.5, 10**400, {}, [["a"]], {"a": None}]


def edited(events: list[Event], kind: str) -> Iterator[tuple[str, list[Event]]]:
    """The log with one value of its first event of a kind exchanged, or taken out, by what was done."""
    place = next(place for place, event in enumerate(events) if event["kind"] == kind)
    for key in events[place]:
        without = {other: value for other, value in events[place].items() if other != key}
        for value in OTHER_KINDS:
            changed = [*events[:place], {**without, key: value}, *events[place + 1 :]]
            yield f"{key} {value!r}", changed
        yield f"without {key}", [*events[:place], without, *events[place + 1 :]]


def show(paths: list[Path]) -> None:
    status = RunStatus()

    def take(event: Event) -> None:
        status.take(event)
        status.flush()
        status.panel()

    watch_run(paths[0], take, follow=False)


@pytest.mark.parametrize("kind", ["start", "train", "window", "removal", "surgery", "epoch", "checkpoint"])
def test_no_reader_fails_by_a_value_of_another_kind(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    whole = record_run(run)
    (run / "summary.json").unlink()
    unfinished = [event for event in whole if event["kind"] != "end"]
    for what, events in edited(unfinished, kind):
        (run / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
        for reader in (build_report, show):
            try:
                reader([run])
            except UserError:
                pass
            except Exception as error:
                raise AssertionError(f"{kind}: {what}, {reader.__name__}") from error


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("start", {"units": "stages.0.0"}, "units 'stages.0.0' is no list of texts"),
        ("start", {"epochs": "6"}, "epochs '6' is no whole number"),
        ("start", {"world_size": None}, "world_size None is no whole number"),
        ("start", {"energy_sources": [["cpu", "RAPL"]]}, "is no list of devices, each with its source and quality"),
        ("window", {"units": {"stages.0.0": {"rate": "0.5"}}}, "is no object of gates, each with its rate"),
        ("removal", {"channels": "all"}, "channels 'all' is no list of channels"),
        ("epoch", {"eval/accuracy": "99 %"}, "eval/accuracy '99 %' is no number"),
        ("epoch", {"energy/by_phase_j": [1.0]}, "energy/by_phase_j [1.0] is no object of numbers"),
        ("interrupt", {"energy/ledger": {"energy_complete": 1}}, "is no ledger of joules"),
        ("interrupt", {"energy/ledger": {"energy_lost_j": "x"}}, "is no ledger of joules"),
        ("interrupt", {"energy/ledger": {"energy_quality": 3}}, "is no ledger of joules"),
        ("train", {"train/loss": 10**400}, "is no number"),
    ],
)
def test_a_value_of_another_kind_is_named(kind: str, changes: dict[str, Any], told: str) -> None:
    event = {"time": 1.0, "step": 3, "kind": kind, "unit": "stages.0.0", **changes}
    if kind not in ("removal", "freeze"):
        del event["unit"]
    with pytest.raises(EventsCorrupt, match=re.escape(told)):
        parse_event(json.dumps(event).encode())


def test_a_long_value_is_told_in_part() -> None:
    event = {"time": 1.0, "step": 3, "kind": "start", "units": list(range(1000))}
    with pytest.raises(EventsCorrupt, match=r"units \[0, 1, .*\.\.\. is no list of texts") as refused:
        parse_event(json.dumps(event).encode())
    assert len(str(refused.value)) < 150


def test_figures_that_are_not_known_are_right() -> None:
    parse_event(b'{"time": 1.0, "step": 3, "kind": "train", "energy/total_j": null, "train/loss": null, "mine": [1]}')
