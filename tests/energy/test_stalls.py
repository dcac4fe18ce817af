"""Counters that stick in mid-run, and a meter that was stopped: what may be missing is never left unsaid."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from greenprune.energy.meter import Meter
from greenprune.energy.source import CounterSource, MeterUnavailable, PowerSource


class Device:
    """A device that shows what the test sets, and a clock that the test moves."""

    def __init__(self) -> None:
        self.value = 0.0
        self.now_s = 0.0

    def after(self, seconds: float, value: float) -> None:
        self.now_s += seconds
        self.value = value

    def counter(self, **options: Any) -> CounterSource:
        return CounterSource("gpu", "test counter", lambda: self.value, clock=lambda: self.now_s, **options)

    def samples(self, *, mean: bool) -> PowerSource:
        return PowerSource(
            "gpu",
            "samples",
            "integrated power",
            lambda: self.value,
            clock=lambda: self.now_s,
            period_s=1.0,
            mean=mean,
            min_span_s=0.1,
        )


def test_a_counter_that_sticks_in_the_middle_of_a_run_makes_its_joules_a_lower_bound() -> None:
    """300 W, of which the counter shows the first ten seconds alone: 3 kJ of all that the run took are no total."""
    device = Device()
    with Meter([device.counter(period_s=0.1)]) as meter:
        with meter.window("train"):
            device.after(10, 3000)
        with meter.window("eval"):
            device.after(1, 3000)  # less than would tell
        assert meter.total().complete
        with meter.window("train") as train:
            device.after(60, 3000)
        with meter.window("eval") as late:
            device.after(60, 3000)
        total, phases = meter.total(), meter.by_phase()
    for measured in (train.measurement, late.measurement):
        (reading,) = measured.readings
        assert reading.joules is None
        assert "the energy counter did not move in" in str(reading.reason)
    assert total.energy_j == 3000
    assert not total.complete
    assert phases["train"].energy_j == 3000
    assert not phases["train"].complete
    assert not phases["eval"].complete
    assert any("did not move" in note for note in meter.notes)


def test_what_a_counter_that_stuck_shows_as_it_goes_on_counts_and_the_total_stays_doubtful() -> None:
    device = Device()
    with Meter([device.counter(period_s=0.1)]) as meter:
        device.after(5, 500)
        meter.total()
        device.after(5, 500)
        meter.total()
        device.after(1, 600)
        with meter.window("train") as window:
            device.after(1, 700)
        assert window.measurement.complete
        assert meter.total().energy_j == 700
        assert not meter.total().complete


def test_a_counter_that_catches_up_is_believed_as_far_as_the_device_could_take_it() -> None:
    """At most 500 W: after 10 s without a move, read every second, 3 kJ are what it took, and 30 kJ are not."""
    device = Device()
    source = device.counter(period_s=0.1, implausible_w=500)
    for _ in range(9):
        device.after(1, 0)
        with contextlib.suppress(MeterUnavailable):
            source.read_j()
    device.after(1, 3000)
    assert source.read_j() == 3000
    assert source.gaps == 1
    device.after(1, 33_000)
    assert source.read_j() == 3000
    assert source.gaps == 2


def test_a_counter_that_is_not_asked_for_long_and_has_moved_is_whole() -> None:
    device = Device()
    source = device.counter(period_s=0.1)
    device.after(3600, 1000)
    assert source.read_j() == 1000
    device.after(1.9, 1000)
    assert source.read_j() == 1000
    assert source.gaps == 0


def test_a_counter_that_may_have_wrapped_unseen_is_a_lower_bound() -> None:
    """The meter was stopped (Ctrl-Z, a suspended job) for an hour: at 200 W RAPL's counter wraps 2.7 times in it."""
    device = Device()
    source = device.counter(period_s=0.001, implausible_w=5000, wraps_at_j=262_144)
    device.after(1, 200)
    source.read_j()
    assert source.gaps == 0
    device.after(3600, (200 + 3600 * 200) % 262_144)
    assert source.read_j() <= 200 + 3600 * 200
    assert source.gaps == 1
    assert "may have wrapped" in str(source.last_gap)
    device.after(5, device.value + 1000)
    source.read_j()
    assert source.gaps == 1


def test_power_that_nobody_sampled_for_long_is_not_made_up() -> None:
    """Stopped for an hour between two samples of 100 W: what the GPU drew in it is not known."""
    device = Device()
    device.value = 100
    source = device.samples(mean=False)
    device.after(1, 100)
    assert source.read_j() == pytest.approx(100)
    device.after(3600, 100)
    assert source.read_j() == pytest.approx(100)
    assert source.gaps == 1
    assert "no power was sampled for 3,600 s" in str(source.last_gap)
    device.after(1, 100)
    assert source.read_j() == pytest.approx(200)
    assert source.gaps == 1


def test_samples_that_come_late_and_means_of_any_span_count() -> None:
    device = Device()
    late, mean = device.samples(mean=False), device.samples(mean=True)
    device.after(5, 100)
    assert late.read_j() == pytest.approx(250)
    device.after(3600, 100)
    assert mean.read_j() == pytest.approx(360_500)
    assert (late.gaps, mean.gaps) == (0, 0)


def test_a_counter_that_stands_still_cannot_be_read() -> None:
    device = Device()
    source = device.counter(period_s=0.1)
    device.after(3, 0)
    with pytest.raises(MeterUnavailable, match=r"^the energy counter did not move in 3 s; "):
        source.read_j()
