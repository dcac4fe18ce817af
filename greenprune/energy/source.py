"""Where joules come from: counters that are read, powers that are integrated, devices that cannot be read.

A :class:`Source` belongs to one device and gives the joules it took since the source was opened, as a number
that never falls. Vendors (:mod:`.nvml`, :mod:`.rapl`, :mod:`.estimate`) only supply the function that reads a
value.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

Quality = Literal["counter", "integrated power", "estimate"]

BEST_FIRST: tuple[Quality, ...] = ("counter", "integrated power", "estimate")

# So many polls fall into the time in which a counter could wrap: a wrap is then told from a restart by its size.
_POLLS_PER_WRAP = 10

# How long a counter may jump ahead of the clock: reads are late, and counters are brought up to date in steps.
_SLACK_S = 1.0

# A device that is on takes some energy: a counter that stands still for so many periods, and for so long, is broken.
_STILL_PERIODS = 20
_STILL_S = 1.0

# Samples come late under load; after so many periods without one the process was stopped, or its machine was.
_LATE_PERIODS = 10


class MeterUnavailable(Exception):
    """A device's energy cannot be read.

    Attributes:
        reason: Why, in one line.
        advice: What would help, in one line.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason
        self.advice = advice


class Source(ABC):
    """The energy of one device.

    Attributes:
        device: The device's name: a GPU's UUID, ``cpu:package-0``, ``dram``.
        name: How it is read, for people.
        quality: How much the figure is worth; None for a device that cannot be read.
        model: What the device is sold as; None if that is not told.
        period_s: Seconds between two updates of what is read; None if a model estimates it.
        limit_w: Most watts that the device draws by its own limit; None if it tells none.
        polled: Whether :meth:`poll` must be called at regular intervals.
        poll_within_s: Most seconds between two polls; infinite where any interval will do.
        gaps: How often joules were lost since opening, so that later figures are lower bounds.
        last_gap: Why they were lost the last time.
    """

    polled = False
    poll_within_s = math.inf

    def __init__(
        self,
        device: str,
        name: str,
        quality: Quality | None,
        *,
        model: str | None = None,
        period_s: float | None = None,
        limit_w: float | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.device = device
        self.name = name
        self.quality = quality
        self.model = model
        self.period_s = period_s
        self.limit_w = limit_w
        self._peak_w: float | None = None
        self.gaps = 0
        self.last_gap: str | None = None
        self._release = release
        # The sampling thread and the one that trains both read.
        self._lock = threading.Lock()

    def read_j(self) -> float:
        """Joules since the source was opened; never less than at the previous read.

        Raises:
            MeterUnavailable: The device cannot be read now; it may be readable later.
        """
        with self._lock:
            return self._advance(fresh=False)

    def poll(self) -> None:
        """Take a sample now; a failure shows up as a gap, or at the next read."""
        with self._lock:
            try:
                self._advance(fresh=True)
            except MeterUnavailable:
                return

    def close(self) -> None:
        """Release what the source holds; called once, and the source is not read again."""
        if self._release is not None:
            self._release()

    @property
    def still_s(self) -> float:
        """Seconds after which a counter that has not moved is broken; infinite for other sources."""
        is_counter = self.quality == "counter" and self.period_s
        return max(_STILL_S, _STILL_PERIODS * (self.period_s or 0.0)) if is_counter else math.inf

    @property
    def bound_j(self) -> float | None:
        """Most joules by which a span is off because its edges fall between two updates.

        One period at the device's limit, or at the highest power seen where it tells none. What a sensor itself is
        off by is not in it. None if it is not known: for estimates, and before any power was seen.
        """
        power_w = self._peak_w if self.limit_w is None else self.limit_w
        return None if self.period_s is None or power_w is None else self.period_s * power_w

    @abstractmethod
    def _advance(self, fresh: bool) -> float:
        """Account for the time up to now and return the joules since opening."""

    def _lose(self, reason: str) -> None:
        self.gaps += 1
        self.last_gap = reason


class CounterSource(Source):
    """A counter of joules kept by the hardware.

    A counter that steps back has wrapped, where ``wraps_at_j`` tells at what value, or was restarted: then it
    counts from zero, and what was used between the last read and the restart is lost. A step that no device could
    take in the time is not counted: it is a restart that looks like a wrap, or a broken counter. One that stands still
    for long cannot be read until it moves, and one that may have wrapped once more than was seen tells too little.

    Args:
        device: The device's name.
        name: How it is read.
        read: Gives the counter in joules; raises :class:`MeterUnavailable`.
        model: What the device is sold as.
        period_s: Seconds between two updates of the counter.
        limit_w: Most watts that the device draws by its own limit.
        implausible_w: Power above which a step of the counter is not believed; None: all are.
        wraps_at_j: Value at which the counter starts again from zero; None if it does not wrap. A counter
            that wraps is polled, so often that not even ``implausible_w`` wraps it twice between two reads.
        release: Called once when the source is closed.
        clock: Gives seconds.
    """

    def __init__(  # noqa: PLR0913 - all are named, and each is a property of one counter
        self,
        device: str,
        name: str,
        read: Callable[[], float],
        *,
        model: str | None = None,
        period_s: float = 0.0,
        limit_w: float | None = None,
        implausible_w: float | None = None,
        wraps_at_j: float | None = None,
        release: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(device, name, "counter", model=model, period_s=period_s, limit_w=limit_w, release=release)
        self.polled = wraps_at_j is not None
        if wraps_at_j is not None and implausible_w is not None:
            self.poll_within_s = wraps_at_j / implausible_w / _POLLS_PER_WRAP
        self._read = read
        self._implausible_w = implausible_w
        self._wraps_at_j = wraps_at_j
        self._clock = clock
        self._joules = 0.0
        self._last_j = read()
        self._last_s = self._moved_s = self._peak_from_s = clock()
        self._stands_still = False
        self._peak_from_j = 0.0

    def _advance(self, fresh: bool) -> float:
        value_j, now_s = self._read(), self._clock()
        delta_j, still_s, unread_s = value_j - self._last_j, now_s - self._moved_s, now_s - self._last_s
        self._last_s = now_s
        self._check_moves(delta_j, now_s)
        # What it stood still for may come all at once.
        most_j = math.inf if self._implausible_w is None else self._implausible_w * (still_s + _SLACK_S)
        if delta_j < 0 and self._wraps_at_j is not None and delta_j + self._wraps_at_j <= most_j:
            delta_j += self._wraps_at_j
        elif delta_j < 0:
            delta_j = value_j
            self._lose("the energy counter was restarted, and what it held since the last read is lost")
        if delta_j > most_j:
            self._lose(
                f"the energy counter jumped by {delta_j:,.0f} J in {still_s:.3g} s, more than the device can take; the "
                "jump is not counted"
            )
            delta_j = 0.0
        elif self._may_have_wrapped(delta_j, unread_s):
            self._lose(f"the energy counter was not read for {unread_s:,.0f} s and may have wrapped unseen")
        self._last_j = value_j
        self._joules += delta_j
        self._note_power(now_s)
        return self._joules

    def _check_moves(self, delta_j: float, now_s: float) -> None:
        """Note when the counter moved last.

        Raises:
            MeterUnavailable: It has not for long.
        """
        if delta_j:
            self._moved_s, self._stands_still = now_s, False
        elif now_s - self._moved_s > self.still_s:
            reason = f"the energy counter did not move in {now_s - self._moved_s:.3g} s"
            if not self._stands_still:
                self._lose(reason)
            self._stands_still = True
            raise MeterUnavailable(reason, "see what greenprune doctor says of it")

    def _may_have_wrapped(self, delta_j: float, span_s: float) -> bool:
        """Whether the device could take, in a span, one more round of the counter than was seen."""
        if self._wraps_at_j is None or self._implausible_w is None:
            return False
        return delta_j + self._wraps_at_j <= self._implausible_w * span_s

    def _note_power(self, now_s: float) -> None:
        """Keep the highest mean power over at least two periods: over less, a step of the counter looks like a peak."""
        span_s = now_s - self._peak_from_s
        if span_s > 0 and span_s >= 2 * (self.period_s or 0.0):
            self._peak_w = max(self._peak_w or 0.0, (self._joules - self._peak_from_j) / span_s)
            self._peak_from_s, self._peak_from_j = now_s, self._joules


class PowerSource(Source):
    """Power samples, integrated over time up to the moment of the read.

    Joules that were reported are never taken back: the span since the last read or sample is added at each of
    them. A span without samples that is much longer than it should be is left out, and on record: a model's mean power
    is of any span, but of a sensor's nothing is known.

    Args:
        device: The device's name.
        name: How it is read.
        quality: How much a sample is worth.
        sample: Gives watts; raises :class:`MeterUnavailable`.
        model: What the device is sold as.
        period_s: Seconds between two samples, or those that the device itself averages over if that is longer; None
            if a model estimates the power.
        limit_w: Most watts that the device draws by its own limit.
        mean: Whether a sample is the mean since the previous one; otherwise it is the power of the moment,
            and trapezoids are added up.
        min_span_s: Seconds within which a read goes on with the last sample, because a new one would cost
            more than it tells.
        release: Called once when the source is closed.
        clock: Gives seconds.
    """

    polled = True

    def __init__(  # noqa: PLR0913 - all are named, and each is a property of one sensor
        self,
        device: str,
        name: str,
        quality: Quality,
        sample: Callable[[], float],
        *,
        model: str | None = None,
        period_s: float | None = None,
        limit_w: float | None = None,
        mean: bool,
        min_span_s: float,
        release: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(device, name, quality, model=model, period_s=period_s, limit_w=limit_w, release=release)
        self._sample = sample
        self._mean = mean
        self._min_span_s = min_span_s
        self._clock = clock
        self._joules = 0.0
        self._power_w: float | None = sample()
        self._peak_w = self._power_w
        self._sampled_at_s = self._counted_to_s = clock()

    def _advance(self, fresh: bool) -> float:
        now_s = self._clock()
        span_s = now_s - self._counted_to_s
        power_w = self._power_w
        unsampled_s = now_s - self._sampled_at_s
        if not self._mean and power_w is not None and unsampled_s > _LATE_PERIODS * (self.period_s or math.inf):
            self._lose(f"no power was sampled for {unsampled_s:,.0f} s, and what was used meanwhile is not counted")
            power_w = None
        if fresh or power_w is None or now_s - self._sampled_at_s >= self._min_span_s:
            new_w = self._take(now_s)
            # After an outage nothing is known about the span up to now: it stays out, and the gap is on
            # record.
            mean_w = 0.0 if power_w is None else new_w if self._mean else (new_w + power_w) / 2
        else:
            mean_w = power_w
        self._joules += mean_w * span_s
        self._counted_to_s = now_s
        return self._joules

    def _take(self, now_s: float) -> float:
        try:
            power_w = self._sample()
        except MeterUnavailable as error:
            if self._power_w is not None:
                self._lose(error.reason)
            self._power_w = None
            raise
        self._power_w = power_w
        self._peak_w = max(self._peak_w or 0.0, power_w)
        self._sampled_at_s = now_s
        return power_w


class UnreadableSource(Source):
    """A device that is there and cannot be read: its joules are unknown, not zero."""

    def __init__(self, device: str, unavailable: MeterUnavailable) -> None:
        super().__init__(device, "none", None)
        self._unavailable = unavailable

    def _advance(self, fresh: bool) -> float:
        raise MeterUnavailable(self._unavailable.reason, self._unavailable.advice)
