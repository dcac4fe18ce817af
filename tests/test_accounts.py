"""The books of a run: what they hold after attempts, epochs, kills and resumes; with a meter that the test sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from greenprune.accounts import Accounts
from greenprune.config import Config
from greenprune.energy import Meter, MeterUnavailable
from greenprune.energy.source import CounterSource, PowerSource, UnreadableSource
from greenprune.engine import Engine
from greenprune.tracking import Event, Ledger


class Dial:
    """A counter that shows what the test sets."""

    def __init__(self) -> None:
        self.joules = 1000.0

    def read(self) -> float:
        return self.joules


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(Config(device="cpu"))
    yield engine
    engine.finish()


@pytest.fixture
def dial() -> Dial:
    return Dial()


@pytest.fixture
def meter(dial: Dial) -> Iterator[Meter]:
    source = CounterSource("GPU-1", "test counter", dial.read, model="H100", period_s=0.001, limit_w=500)
    with Meter([source]) as meter:
        yield meter


def attempt(total_j: list[float | None], resumed_at_j: float = 0.0, last: str = "train") -> list[Event]:
    """Events of one attempt, as far as the books read them: totals at its start, in between and at its end."""
    kinds = ["start", *["train"] * (len(total_j) - 2), last]
    events: list[Event] = [
        {"kind": kind, "energy/total_j": joules, "time_s": 1.0} for kind, joules in zip(kinds, total_j, strict=True)
    ]
    events[0]["energy/resumed_at_j"] = resumed_at_j
    return events


def figures(accounts: Accounts) -> dict[str, Any]:
    return accounts.energy_figures(accounts.ledger_now())


def test_a_first_attempt_has_all_joules_and_lost_none(engine: Engine, meter: Meter, dial: Dial) -> None:
    accounts = Accounts(engine, meter, None)
    accounts.add_earlier_attempts([], 0)
    accounts.ledger.add_step(10, 1, 1)
    with meter.window("train"):
        dial.joules += 70
    dial.joules += 30
    found = figures(accounts)
    assert found["energy_by_phase_j"] == {"idle": 30, "train": 70}
    assert found["energy_by_attempt"] == [{"attempt": 1, "energy_j": 100, "lost_j": 0}]
    assert found["energy_by_device_j"] == {"GPU-1 H100 (counter: test counter)": 100}
    assert accounts.ledger_now().time_s == pytest.approx(meter.total().seconds, abs=0.1)
    assert found["energy_per_sample_j"] == 10
    assert found["energy_lost_j"] == 0
    assert found["energy_bound_j"] == 0.5  # 0.001 s at 500 W
    assert found["energy_by_phase_bound_j"] == {"idle": 1.0, "train": 0.5}
    assert found["energy_complete"]
    assert (found["energy_slurm_j"], found["energy_slurm_reason"]) == (None, "not a Slurm job")


def test_joules_after_the_checkpoint_are_lost_to_the_attempt_that_spent_them(
    engine: Engine, meter: Meter, dial: Dial
) -> None:
    """Checkpoint at 60 J; killed at 100 J; a second attempt is killed at 130 J before it has saved anything."""
    accounts = Accounts(engine, meter, None)
    accounts.ledger = Ledger(energy_by_phase_j={"train": 60.0}, energy_by_phase_bound_j={"train": 0.5}, samples=5)
    accounts.add_earlier_attempts([*attempt([5.0, 60.0, 100.0]), *attempt([104.0, 130.0], resumed_at_j=60.0)], 0)
    dial.joules += 20
    ledger = accounts.ledger_now()
    assert ledger.energy_j == 150
    assert ledger.attempts == 3
    found = accounts.energy_figures(ledger)
    assert found["energy_lost_j"] == 70
    assert found["energy_by_attempt"] == [
        {"attempt": 1, "energy_j": 100, "lost_j": 40},
        {"attempt": 2, "energy_j": 30, "lost_j": 30},
        {"attempt": 3, "energy_j": 20, "lost_j": 0},
    ]
    assert not found["energy_complete"], "what a killed attempt took after its last event is on no record"
    phases_j = sum(found["energy_by_phase_j"].values()) + found["energy_lost_j"]
    assert abs(phases_j - ledger.energy_j) <= found["energy_bound_j"]
    assert found["energy_bound_j"] == 3 * 0.5


def test_losses_of_several_resumes_are_each_counted_once(engine: Engine, meter: Meter, dial: Dial) -> None:
    """After the losses above a checkpoint at 180 J, a kill at 200 J, and a fourth attempt."""
    accounts = Accounts(engine, meter, None)
    accounts.ledger = Ledger(energy_by_phase_j={"train": 110.0}, energy_lost_j=70.0)
    events = [
        *attempt([5.0, 100.0]),
        *attempt([104.0, 130.0], resumed_at_j=60.0),
        *attempt([135.0, 200.0], resumed_at_j=60.0),
    ]
    accounts.add_earlier_attempts(events, 0)
    dial.joules += 1
    found = figures(accounts)
    assert [each["lost_j"] for each in found["energy_by_attempt"]] == [40, 30, 20, 0]
    assert [each["energy_j"] for each in found["energy_by_attempt"]] == [100, 30, 70, 1]
    assert found["energy_lost_j"] == 90


def test_a_run_that_was_asked_to_stop_has_lost_nothing(engine: Engine, dial: Dial) -> None:
    """Checkpoint at 50 J, 3 J to write it; the next attempt stops at once, another is killed 20 J later."""

    def begun(events: list[Event]) -> Accounts:
        source = CounterSource("GPU-1", "test counter", dial.read, model="H100", period_s=0.001, limit_w=500)
        accounts = Accounts(engine, Meter([source]), None)
        accounts.ledger = Ledger(**at_checkpoint)
        accounts.add_earlier_attempts(events, 7)
        return accounts

    def told(accounts: Accounts, kind: str) -> Event:
        told = {"start": accounts.begin, "train": accounts.numbers, "interrupt": accounts.stop}[kind]()
        values = {key.replace("__", "/"): value for key, value in told.items()}
        return {"kind": kind, "step": 0 if not events else 7, **values}

    events: list[Event] = []
    at_checkpoint = Ledger().to_dict()
    first = begun(events)
    events.append(told(first, "start"))
    with first.meter.window("train"):
        dial.joules += 50
    at_checkpoint = first.ledger_now().to_dict()
    with first.meter.window("checkpoint"):
        dial.joules += 3
    events.append(told(first, "interrupt"))
    second = begun(events)
    found = figures(second)
    assert (found["energy_complete"], found["energy_lost_j"]) == (True, 0)
    assert found["energy_by_phase_j"] == {"idle": 0, "train": 50, "checkpoint": 3}
    assert sum(found["energy_by_device_j"].values()) == 53
    events.append(told(second, "start"))
    dial.joules += 4
    events.append(told(second, "interrupt"))
    third = begun(events)
    assert figures(third)["energy_lost_j"] == 0
    events.append(told(third, "start"))
    dial.joules += 20
    events.append(told(third, "train"))
    found = figures(begun(events))
    assert (found["energy_complete"], found["energy_lost_j"]) == (False, 20)
    assert [each["energy_j"] for each in found["energy_by_attempt"]] == [53, 4, 20, 0]
    assert [each["lost_j"] for each in found["energy_by_attempt"]] == [0, 0, 20, 0]


def test_epochs_add_up_from_the_start_and_include_what_was_done_twice(engine: Engine, meter: Meter, dial: Dial) -> None:
    first = Accounts(engine, meter, None)
    first.add_earlier_attempts([], 0)
    dial.joules += 7  # setting up
    assert first.begin()["energy__resumed_at_j"] == 0
    dial.joules += 20
    assert first.end_epoch()["energy__epoch_j"] == 20
    saved = first.ledger_now()
    dial.joules += 5  # of the second epoch, and lost
    second_meter = Meter([CounterSource("GPU-1", "test counter", dial.read, period_s=0.001, limit_w=500)])
    second = Accounts(engine, second_meter, None)
    second.ledger = Ledger(**saved.to_dict())
    second.add_earlier_attempts(attempt([7.0, 27.0, 32.0]), 0)
    assert second.begin()["energy__resumed_at_j"] == 27
    dial.joules += 20
    assert second.end_epoch()["energy__epoch_j"] == 25
    found = figures(second)
    assert found["energy_by_epoch_j"] == [20, 25]
    assert found["energy_per_epoch_j"] == 22.5
    second_meter.close()


def test_a_bound_is_unknown_where_an_earlier_attempt_was_estimated(engine: Engine, meter: Meter, dial: Dial) -> None:
    """As on a machine whose counters could not be read then."""
    accounts = Accounts(engine, meter, None)
    accounts.ledger = Ledger(energy_by_phase_j={"train": 60.0}, energy_by_phase_bound_j={"train": None}, samples=5)
    accounts.add_earlier_attempts(attempt([5.0, 60.0]), 0)
    dial.joules += 20
    assert figures(accounts)["energy_bound_j"] is None


def test_lost_work_that_was_estimated_makes_the_run_an_estimate(engine: Engine, meter: Meter, dial: Dial) -> None:
    """Killed before its first checkpoint on a machine without counters, and begun anew on one that has them."""
    accounts = Accounts(engine, meter, None)
    events = attempt([5.0, 60.0])
    events[0]["energy_sources"] = [["cpu", "CodeCarbon: load of 8 W", "estimate"], ["GPU-1", "none", None]]
    accounts.add_earlier_attempts(events, 0)
    dial.joules += 20
    ledger = accounts.ledger_now()
    assert (ledger.energy_j, ledger.energy_lost_j, ledger.energy_quality) == (80, 60, "estimate")
    assert accounts.energy_figures(ledger)["energy_bound_j"] is None


def test_what_a_stopped_attempt_could_not_read_stays_missing_after_an_older_checkpoint(
    engine: Engine, meter: Meter, dial: Dial
) -> None:
    """It stopped in good order, with a GPU that had failed meanwhile; the run goes on from before that."""
    events = attempt([5.0, 60.0], last="interrupt")
    events[-1] |= {"step": 7, "energy/ledger": {"energy_complete": False}}
    accounts = Accounts(engine, meter, None)
    accounts.ledger = Ledger(energy_by_phase_j={"train": 30.0}, energy_quality="counter")
    accounts.add_earlier_attempts(events, 3)
    dial.joules += 20
    found = figures(accounts)
    assert found["energy_lost_j"] == 30
    assert not found["energy_complete"]


def test_a_bound_is_unknown_where_a_part_is_an_estimate(engine: Engine, dial: Dial) -> None:
    counter = CounterSource("GPU-1", "test counter", dial.read, period_s=0.001, limit_w=500)
    estimate = PowerSource("cpu", "guess", "estimate", lambda: 5.0, mean=True, min_span_s=0)
    with Meter([counter, estimate]) as meter:
        accounts = Accounts(engine, meter, None)
        accounts.add_earlier_attempts([], 0)
        with meter.window("train"):
            pass
        found = figures(accounts)
    assert found["energy_bound_j"] is None
    assert found["energy_by_phase_bound_j"]["train"] is None


def test_unknown_energy_is_unknown_in_every_figure(engine: Engine) -> None:
    with Meter([UnreadableSource("gpu", MeterUnavailable("it is broken", "mend it"))]) as meter:
        accounts = Accounts(engine, meter, None)
        accounts.add_earlier_attempts(attempt([None, None, None]), 0)
        accounts.begin()
        with meter.window("train"):
            pass
        accounts.end_epoch()
        accounts.ledger.add_step(10, 1, 1)
        found = figures(accounts)
    assert found["energy_by_attempt"] == [
        {"attempt": 1, "energy_j": None, "lost_j": None},
        {"attempt": 2, "energy_j": None, "lost_j": None},
    ]
    for key in ("energy_bound_j", "energy_per_sample_j", "energy_per_epoch_j", "energy_lost_j"):
        assert found[key] is None, key
    assert found["energy_by_epoch_j"] == [None]
    assert set(found["energy_by_phase_j"].values()) == {None}
    assert not found["energy_complete"]


def test_why_joules_are_missing_is_told_and_kept_by_the_attempts_that_follow(engine: Engine, dial: Dial) -> None:
    """The GPU falls off in the first attempt, which is asked to stop; the second one can read it to the end."""
    lost = MeterUnavailable("GPU is lost", "reboot")

    def read() -> float:
        if dial.joules < 0:
            raise lost
        return dial.joules

    def accounts_of(ledger: Ledger, events: list[Event]) -> Accounts:
        source = CounterSource("GPU-1", "test counter", read, model="H100", period_s=0.001, limit_w=500)
        accounts = Accounts(engine, Meter([source]), None)
        accounts.ledger = ledger
        accounts.add_earlier_attempts(events, 7)
        return accounts

    first = accounts_of(Ledger(), [])
    dial.joules += 50
    assert figures(first)["energy_missing"] == {}
    saved = first.ledger_now()
    with first.meter.window("train"):
        dial.joules = -1
    expected = {"GPU-1 H100 (counter: test counter)": "GPU is lost"}
    assert figures(first)["energy_missing"] == expected
    stop = {"kind": "interrupt", "step": 7} | {key.replace("__", "/"): value for key, value in first.stop().items()}
    dial.joules = 5.0
    for step in (7, 3):  # gone on with as it stopped, or from before that
        second = accounts_of(saved, [{"kind": "start"}, stop | {"step": step}])
        found = figures(second)
        assert (found["energy_missing"], found["energy_complete"]) == (expected, False)


def test_slurms_own_figure_stands_beside_the_meters_and_is_not_added(
    engine: Engine, meter: Meter, dial: Dial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sacct = tmp_path / "sacct"
    sacct.write_text("#!/bin/sh\necho '42|5000'\n")
    sacct.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    accounts = Accounts(engine, meter, None, slurm_job="42")
    accounts.add_earlier_attempts([], 0)
    dial.joules += 70
    ledger = accounts.ledger_now()
    found = accounts.energy_figures(ledger)
    assert (found["energy_slurm_j"], found["energy_slurm_reason"]) == (5000, None)
    assert ledger.energy_j == 70
