"""Times of steps: their medians, before and after removals, in a run of any length."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from greenprune.timing import StepTimes


def test_what_was_timed_between_removals_counts_nowhere() -> None:
    times = StepTimes()
    assert times.medians() == {"before": None, "after": None}
    for seconds in (3.0, 1.0, 2.0):
        times.add(seconds)
    assert times.medians() == {"before": 2.0, "after": None}
    for seconds in (9.0, 0.5):
        times.cut()
        times.add(seconds)
    assert times.medians() == {"before": 2.0, "after": 0.5}


@pytest.mark.parametrize("removed", [False, True])
def test_a_long_run_keeps_a_sample_with_the_same_median(removed: bool) -> None:
    """Also of times that go up and down from one report to the next, and that grow, as where memory gets short."""
    times, count = StepTimes(removed=removed), 20_000
    for number in range(count):
        if number == count // 2:  # stopped and gone on with
            times = StepTimes(**asdict(times))
        times.add(number / count + number % 2)
    kept = times.after if removed else times.before
    assert len(kept) == 4096
    assert times.medians()["after" if removed else "before"] == pytest.approx(1.0, abs=0.05)
    assert sum(seconds >= 1 for seconds in kept) / len(kept) == pytest.approx(0.5, abs=0.03)
    assert sum(kept) / len(kept) == pytest.approx(1.0, abs=0.03)


def test_times_of_an_older_checkpoint_count_as_many_as_there_are() -> None:
    times = StepTimes(**{"before": [1.0] * 5000, "after": [], "removed": False})
    times.add(2.0)
    assert len(times.before) == 5000
    assert times.medians()["before"] == 1.0
