"""The meter's books: windows, phases, totals; with sources whose joules the test sets."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from greenprune.config import UserError
from greenprune.energy import open_local_meter, open_meter
from greenprune.energy.meter import Meter
from greenprune.energy.source import CounterSource, MeterUnavailable, PowerSource, Source, UnreadableSource

BROKEN = MeterUnavailable("it is broken", "mend it")


class Dial:
    """What a test's device shows; None: it cannot be read."""

    def __init__(self, value: float | None = 0.0) -> None:
        self.value = value

    def read(self) -> float:
        if self.value is None:
            raise BROKEN
        return self.value


def counter(dial: Dial, device: str = "gpu", **options: Any) -> Source:
    return CounterSource(device, "test counter", dial.read, **options)


def test_a_window_measures_what_was_used_between_its_edges() -> None:
    dial = Dial(1000)
    with Meter([counter(dial)]) as meter:
        dial.value = 1010
        with meter.window("train") as window:
            dial.value = 1017
            time.sleep(0.02)
        dial.value = 1020
    assert window.measurement.energy_j == 7
    assert 0.02 <= window.measurement.seconds < 2
    assert window.measurement.quality == "counter"
    assert meter.total().energy_j == 20
    assert meter.by_phase_j() == {"idle": 13, "train": 7}


def test_phases_count_a_joule_once_for_the_innermost_window() -> None:
    dial = Dial()
    meter = Meter([counter(dial)])
    with meter.window("train") as outer:
        dial.value = 1
        with meter.window("evaluate") as inner:
            dial.value = 11
            with meter.window("train"):
                dial.value = 111
            dial.value = 1111
        dial.value = 11111
    dial.value = 111111
    meter.close()
    assert outer.measurement.energy_j == 11111
    assert inner.measurement.energy_j == 1110
    assert meter.by_phase_j() == {"idle": 100000, "train": 1 + 100 + 10000, "evaluate": 10 + 1000}


def test_phases_sum_to_the_total() -> None:
    dials = [Dial(0.1), Dial(0.7)]
    meter = Meter([counter(dials[0], "a"), counter(dials[1], "b")])
    for step in range(200):
        with meter.window("train"):
            dials[0].value = (dials[0].value or 0) + 0.1 * step
            if step % 10 == 0:
                with meter.window("evaluate"):
                    dials[1].value = (dials[1].value or 0) + 0.3
    meter.close()
    total = meter.total()
    phases_j = [joules for joules in meter.by_phase_j().values() if joules is not None]
    assert sum(phases_j) == pytest.approx(total.energy_j, rel=1e-12)
    phases = meter.by_phase().values()
    assert sum(phase.seconds for phase in phases) == pytest.approx(total.seconds, rel=1e-9)
    assert [reading.joules for reading in total.readings] == pytest.approx([1990, 6])


def test_a_total_may_be_asked_for_at_any_time_and_disturbs_no_window() -> None:
    dial = Dial()
    with Meter([counter(dial)]) as meter:
        with meter.window("train") as window:
            dial.value = 5
            assert meter.total().energy_j == 5
            assert meter.by_phase_j() == {"idle": 0, "train": 5}
            dial.value = 9
        assert window.measurement.energy_j == 9


def test_what_cannot_be_read_is_none_and_never_zero() -> None:
    with Meter([UnreadableSource("gpu", BROKEN)]) as meter, meter.window("train") as window:
        pass
    (reading,) = window.measurement.readings
    assert (reading.joules, reading.quality, reading.reason) == (None, None, "it is broken")
    assert window.measurement.energy_j is None
    assert window.measurement.quality is None
    assert meter.by_phase_j() == {"idle": None, "train": None}
    assert meter.power_w() is None
    assert window.measurement.seconds > 0


def test_a_meter_without_sources_measures_time_alone() -> None:
    with Meter([]) as meter, meter.window("train") as window:
        pass
    assert (window.measurement.energy_j, window.measurement.readings) == (None, ())


def test_the_quality_of_a_sum_is_that_of_its_worst_part() -> None:
    estimate = PowerSource("cpu", "guess", "estimate", lambda: 5, mean=True, min_span_s=0)
    samples = PowerSource("gpu1", "samples", "integrated power", lambda: 5, mean=False, min_span_s=0)
    broken = UnreadableSource("gpu2", BROKEN)
    with Meter([counter(Dial()), samples, broken]) as meter:
        assert meter.total().quality == "integrated power"
    with Meter([counter(Dial()), estimate, samples]) as meter:
        assert meter.total().quality == "estimate"


def test_the_quality_of_a_sum_is_not_that_of_a_part_that_could_not_be_read() -> None:
    power = Dial(5)
    estimate = PowerSource("cpu", "guess", "estimate", power.read, mean=True, min_span_s=0)
    with Meter([counter(Dial()), estimate], interval_s=60) as meter:
        power.value = None
        with meter.window("train") as window:
            pass
    assert window.measurement.quality == "counter"


def test_the_bound_of_a_sum_is_known_where_that_of_every_part_is() -> None:
    dial = Dial()
    exact, coarse = counter(Dial(), "a", period_s=0.1, limit_w=300), counter(dial, "b", period_s=1, limit_w=50)
    estimate = PowerSource("cpu", "guess", "estimate", lambda: 5, mean=True, min_span_s=0)
    with Meter([exact, coarse, UnreadableSource("c", BROKEN)]) as meter:
        assert meter.total().bound_j == 30 + 50
        dial.value = None
        with meter.window("train") as window:
            pass
        assert window.measurement.bound_j == 30
    with Meter([exact, estimate]) as meter:
        assert meter.total().bound_j is None


def test_a_device_that_drops_out_for_a_while_loses_no_joules_of_its_counter() -> None:
    dial, steady = Dial(100), Dial(0)
    with Meter([counter(dial, "gpu"), counter(steady, "cpu")]) as meter:
        with meter.window("before") as before:
            dial.value = 110
        dial.value = None
        with meter.window("during") as during:
            steady.value = 3
        dial.value = 150
        with meter.window("after") as after:
            dial.value = 155
    assert before.measurement.energy_j == 10
    assert [reading.joules for reading in during.measurement.readings] == [None, 3]
    assert during.measurement.readings[0].reason == "it is broken"
    assert after.measurement.readings[0].joules == 5
    assert meter.total().energy_j == 55 + 3


def test_what_was_read_before_a_device_dropped_out_is_a_lower_bound() -> None:
    dial = Dial()
    with Meter([counter(dial)]) as meter, meter.window("train") as window:
        dial.value = 10
        meter.total()
        dial.value = None
    (reading,) = window.measurement.readings
    assert (reading.joules, reading.complete, reading.reason) == (10, False, "it is broken")


def test_a_device_that_can_be_read_only_after_the_meter_was_opened_gives_a_lower_bound() -> None:
    dial = Dial(100)
    source = counter(dial)
    dial.value = None
    with Meter([source]) as meter:
        assert meter.total().energy_j is None
        dial.value = 107
        total = meter.total()
    assert (total.energy_j, total.complete) == (7, False)


def test_phases_are_incomplete_for_what_was_lost_in_them_and_stay_so() -> None:
    dial = Dial(100)
    with Meter([counter(dial)]) as meter:
        with meter.window("restarted"):
            dial.value = 8
        with meter.window("broken"):
            dial.value = None
        dial.value = 9
        for phase in ("restarted", "broken", "steady"):
            with meter.window(phase):
                dial.value += 1
        phases = meter.by_phase()
    assert {name: phase.complete for name, phase in phases.items()} == {
        "idle": True,
        "restarted": False,
        "broken": False,
        "steady": True,
    }


def test_a_span_shorter_than_an_update_says_so_unless_worse_is_to_be_said() -> None:
    dial = Dial(100)
    with Meter([counter(dial, period_s=60)]) as meter:
        with meter.window("short") as short:
            dial.value = 101
        with meter.window("restarted") as restarted:
            dial.value = 5
    (reading,), (worse,) = short.measurement.readings, restarted.measurement.readings
    assert reading.too_short
    assert "shorter than the 60 s between two updates" in str(reading.reason)
    assert worse.too_short
    assert "restarted" in str(worse.reason)


def test_a_counter_that_restarts_never_gives_negative_joules() -> None:
    dial = Dial(1e6)
    with Meter([counter(dial)]) as meter, meter.window("train") as window:
        dial.value = 1e6 + 50
        meter.total()
        dial.value = 8  # The driver was loaded anew: 8 J since then.
    (reading,) = window.measurement.readings
    assert reading.joules == 58
    assert reading.reason is not None
    assert "restarted" in reading.reason
    assert any("restarted" in note for note in meter.notes)


def test_a_counter_that_wraps_goes_on() -> None:
    dial = Dial(990)
    with Meter([counter(dial, wraps_at_j=1000)]) as meter:
        dial.value = 15
        assert meter.total().energy_j == 25
        assert meter.notes == ()


def test_power_samples_are_integrated_by_trapezoids_up_to_the_read() -> None:
    clock, power = Dial(0), Dial(100)
    source = PowerSource("gpu", "", "integrated power", power.read, mean=False, min_span_s=0.1, clock=clock.read)
    clock.value, power.value = 1, 300
    assert source.read_j() == pytest.approx(200)  # (100 + 300) / 2 W for 1 s
    clock.value, power.value = 1.05, 999
    assert source.read_j() == pytest.approx(215)  # Too soon for a new sample: 300 W go on for 0.05 s.
    clock.value, power.value = 2.05, 100
    assert source.read_j() == pytest.approx(215 + 200)


def test_mean_power_counts_for_the_span_that_it_is_the_mean_of() -> None:
    clock, power = Dial(0), Dial(0)
    source = PowerSource("cpu", "", "estimate", power.read, mean=True, min_span_s=0.1, clock=clock.read)
    clock.value, power.value = 2, 50
    assert source.read_j() == 100


def test_power_that_cannot_be_sampled_leaves_a_gap_on_record() -> None:
    clock, power = Dial(0), Dial(100)
    source = PowerSource("gpu", "", "integrated power", power.read, mean=False, min_span_s=0.1, clock=clock.read)
    clock.value, power.value = 1, None
    with pytest.raises(MeterUnavailable):
        source.read_j()
    clock.value, power.value = 5, 100
    assert source.read_j() == 0
    clock.value = 6
    assert source.read_j() == 100
    assert (source.gaps, source.last_gap) == (1, "it is broken")


def test_power_is_sampled_anew_after_a_failure_however_soon() -> None:
    clock, power = Dial(0), Dial(100)
    source = PowerSource("gpu", "", "integrated power", power.read, mean=False, min_span_s=10, clock=clock.read)
    clock.value, power.value = 1, None
    source.poll()
    clock.value, power.value = 2, 50
    assert source.read_j() == 0
    clock.value = 3
    assert source.read_j() == 50


def test_without_a_limit_a_span_is_off_by_a_period_of_the_highest_power_seen() -> None:
    clock, power = Dial(0), Dial(100)
    options = {"period_s": 0.5, "mean": False, "min_span_s": 0, "clock": clock.read}
    source = PowerSource("gpu", "", "integrated power", power.read, **options)
    bounds_j = [source.bound_j]
    for clock.value, power.value in ((1, 300), (2, 50)):
        source.read_j()
        bounds_j.append(source.bound_j)
    assert bounds_j == [50, 150, 150]


def test_a_step_of_a_counter_is_no_peak_of_its_power() -> None:
    clock, dial = Dial(0), Dial(0)
    source = counter(dial, period_s=0.125, clock=clock.read)
    bounds_j = [source.bound_j]
    for clock.value, dial.value in ((0.125, 100), (0.25, 100), (1.25, 200), (1.375, 500), (1.5, 500)):
        source.read_j()
        bounds_j.append(source.bound_j)
    assert bounds_j == [None, None, 0.125 * 400, 0.125 * 400, 0.125 * 400, 0.125 * 1200]


def test_a_counter_may_be_read_twice_within_a_tick_of_the_clock() -> None:
    clock, dial = Dial(0), Dial(0)
    source = counter(dial, clock=clock.read)
    dial.value = 3
    assert (source.read_j(), source.read_j()) == (3, 3)


def test_no_thread_is_started_where_nothing_needs_to_be_sampled() -> None:
    with Meter([counter(Dial()), UnreadableSource("gpu", BROKEN)]):
        assert "greenprune-meter" not in [thread.name for thread in threading.enumerate()]


def test_one_thread_samples_at_the_interval_and_ends_at_closing() -> None:
    taken: list[str] = []

    def sample() -> float:
        taken.append(threading.current_thread().name)
        return 10

    meter = Meter([PowerSource("cpu", "", "estimate", sample, mean=True, min_span_s=9)], interval_s=0.02)
    time.sleep(0.15)
    meter.close()
    count = len(taken)
    assert 2 <= taken.count("greenprune-meter") <= 8
    time.sleep(0.05)
    assert len(taken) == count
    assert "greenprune-meter" not in [thread.name for thread in threading.enumerate()]
    assert meter.total().energy_j == pytest.approx(10 * meter.total().seconds, rel=0.01)


def test_power_is_the_mean_since_the_previous_call() -> None:
    dial = Dial()
    with Meter([counter(dial)]) as meter:
        meter.power_w()
        since_s = time.perf_counter()
        dial.value = 20
        time.sleep(0.1)
        assert meter.power_w() == pytest.approx(20 / (time.perf_counter() - since_s), rel=0.2)
        time.sleep(0.01)
        assert meter.power_w() == 0


def test_edges_synchronize_only_if_asked_and_not_after_an_error() -> None:
    calls: list[int] = []
    with Meter([counter(Dial())], synchronize=lambda: calls.append(1)) as meter:
        with meter.window("train"):
            assert len(calls) == 1
        assert len(calls) == 2
        meter.total()
        with pytest.raises(KeyError), meter.window("train"):
            raise KeyError
        assert len(calls) == 3


def test_closing_twice_is_harmless_and_freezes_the_figures() -> None:
    dial, released = Dial(), []
    meter = Meter([counter(dial, release=lambda: released.append(1))])
    dial.value = 4
    meter.close()
    dial.value = 9
    meter.close()
    assert meter.total() == meter.total()
    assert meter.total().energy_j == 4
    assert released == [1]


def test_misuse_of_windows_is_told() -> None:
    with Meter([]) as meter:
        with pytest.raises(ValueError, match="outside all windows"):
            meter.window("idle")
        with meter.window("train") as window, pytest.raises(RuntimeError, match="before it is closed"):
            _ = window.measurement


@pytest.mark.parametrize("held", [False, True])
def test_a_forked_process_neither_reads_nor_breaks(held: bool) -> None:
    reads: list[int] = []

    def sample() -> float:
        reads.append(os.getpid())
        return 10

    source = PowerSource("cpu", "", "estimate", sample, mean=True, min_span_s=0)
    released: list[int] = []
    meter = Meter([source, counter(Dial(), release=lambda: released.append(1))], interval_s=0.01)
    if held:
        meter._lock.acquire()  # As if another thread were reading at the moment of the fork.
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = len(reads)
            with meter.window("load") as window:
                time.sleep(0.05)
            assert window.measurement.energy_j is None
            assert window.measurement.seconds > 0.04
            assert meter.total().energy_j is None
            assert meter.power_w() is None
            meter.close()
            assert len(reads) == before
            assert released == []
            status = 0
        except AssertionError:
            traceback.print_exc()
        finally:
            os._exit(status)
    if held:
        meter._lock.release()
    assert os.waitpid(child, 0)[1] == 0
    meter.close()
    assert set(reads) == {os.getpid()}
    assert meter.total().energy_j is not None


def test_importing_the_package_loads_no_torch_and_touches_no_hardware(
    run_python: Callable[[str, dict[str, str]], Any],
) -> None:
    code = """
import sys
import greenprune.energy, pynvml
result = {"loaded": [name for name in ("torch", "codecarbon", "pandas") if name in sys.modules],
          "nvml": pynvml.nvmlLib is not None}
"""
    assert run_python(code, {}) == {"loaded": [], "nvml": False}


def test_a_window_of_a_closed_meter_is_refused() -> None:
    """It would tell 0 J, as if nothing had been used."""
    dial = Dial(1000)
    meter = Meter([counter(dial)])
    with meter.window("train"):
        meter.close()
    with pytest.raises(RuntimeError, match="window 'later': the meter is closed"), meter.window("later"):
        pass
    assert "later" not in meter.by_phase_j()


@pytest.mark.parametrize("interval_s", [0, -1.0, float("nan")])
def test_an_interval_that_is_none_is_refused(interval_s: float) -> None:
    refused = pytest.raises(UserError, match=r"^energy.interval_s: .* expected a number of seconds above 0")
    with refused:
        open_meter(gpu_uuids=[], host=False, interval_s=interval_s)
    with refused:
        open_local_meter({}, interval_s=interval_s)


def test_windows_that_do_not_nest_are_refused() -> None:
    """As those of two threads may not: the joules of one would be counted to the other's phase."""
    with Meter([counter(Dial())]) as meter:
        outer, inner = meter.window("outer"), meter.window("inner")
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(RuntimeError, match=r"window 'outer' was closed before 'inner', which was opened inside it"):
            outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)
        with meter.window("after") as after:
            pass
    assert inner.measurement.complete
    assert after.measurement.complete
