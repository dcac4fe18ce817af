"""The meter: joules and seconds of named, nestable windows, and of the phases they make up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from greenprune.energy.source import BEST_FIRST, MeterUnavailable, Quality, Source

IDLE = "idle"
"""The phase outside all windows."""

# Watts over less than this many periods of a counter would show its steps.
_POWER_PERIODS = 10


@dataclass(frozen=True)
class Reading:
    """The energy of one device over a span."""

    device: str
    """The device's name: a GPU's UUID, ``cpu:package-0``, ``dram``."""
    source: str
    """How it was read; none if it was not."""
    quality: Quality | None
    """How much the figure is worth; None for a device that has no source."""
    joules: float | None
    """Joules over the span; None if unknown, never 0 for unknown."""
    reason: str | None = None
    """Why ``joules`` is None or does not hold exactly for the span; None if it does."""
    model: str | None = None
    """What the device is sold as; None if that is not told."""
    bound_j: float | None = None
    """Most joules that ``joules`` is off because the source is brought up to date in steps; None if not known. What
    the sensor itself is off by comes on top."""
    too_short: bool = False
    """Whether the span is shorter than the time between two updates: then ``joules`` says nothing about it."""
    complete: bool = True
    """Whether nothing is missing in ``joules``; else it is a lower bound, or None."""


@dataclass(frozen=True)
class Measurement:
    """Seconds and joules of a span."""

    seconds: float
    """Length of the span."""
    readings: tuple[Reading, ...]
    """One reading for each device that is metered."""

    @property
    def energy_j(self) -> float | None:
        """Joules of all devices that could be read; None if none could."""
        return _sum([reading.joules for reading in self.readings])

    @property
    def bound_j(self) -> float | None:
        """Most joules that ``energy_j`` is off by its sources' steps; None if any part has no known bound."""
        known = [reading.bound_j for reading in self.readings if reading.joules is not None]
        return None if not known or None in known else _sum(known)

    @property
    def quality(self) -> Quality | None:
        """The worst quality among the readings that ``energy_j`` adds up; None if there are none."""
        known = {reading.quality for reading in self.readings if reading.joules is not None}
        return next((quality for quality in reversed(BEST_FIRST) if quality in known), None)

    @property
    def complete(self) -> bool:
        """Whether every device was read over the whole span; else ``energy_j`` is a lower bound."""
        return all(reading.complete for reading in self.readings)

    @property
    def too_short(self) -> bool:
        """Whether the span is shorter than an update of any source in ``energy_j``."""
        return any(reading.too_short for reading in self.readings)


@dataclass
class _Account:
    """What one phase took; lists are by device."""

    seconds: float
    entered: int
    joules: list[float | None]
    missing: list[str | None]


@dataclass(frozen=True)
class _Snapshot:
    """What the meter shows at one moment; two of them make a measurement."""

    time_s: float
    joules: tuple[float | None, ...]
    unreadable: tuple[str | None, ...]
    gaps: tuple[int, ...]


class Window:
    """A named span of time, opened and closed by ``with``; :meth:`Meter.window` makes it."""

    def __init__(self, meter: Meter, name: str) -> None:
        self.name = name
        self._meter = meter
        self._start: _Snapshot | None = None
        self._measurement: Measurement | None = None

    @property
    def measurement(self) -> Measurement:
        """What was measured between the window's edges, windows inside it included.

        Raises:
            RuntimeError: The window is not closed yet.
        """
        if self._measurement is None:
            raise RuntimeError(f"window {self.name!r} has no measurement before it is closed")
        return self._measurement

    def __enter__(self) -> Window:
        self._start = self._meter._open_window(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._start is not None
        end = self._meter._close_window(self, synchronize=error is None)
        self._measurement = self._meter._between(self._start, end)


class Meter:
    """Reads devices at the edges of windows and says what each phase took.

    Windows nest. A window's own measurement covers everything between its edges; the phases count a joule
    once, for the innermost window that was open, and for the phase ``idle`` where none was. So the phases
    add up to the total.

    Windows are opened by one thread. In a process forked while the meter is open (a data loader's worker) the
    meter reads nothing: windows work and say that their joules are unknown.

    Args:
        sources: What is read; the meter owns and closes them.
        interval_s: Seconds between two samples of sources that need them; one daemon thread takes them. They are
            taken more often where a counter could else wrap unseen.
        synchronize: Called at both edges of a window, so that work queued on a device falls into the window
            that queued it. Not called when a window is left by an exception: a broken device would raise
            again and hide the first error.
        notes: One line for each thing that is not measured as well as it could be.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        interval_s: float = 1.0,
        synchronize: Callable[[], None] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self._sources = tuple(sources)
        self._synchronize = synchronize
        self._notes = tuple(notes)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._windows: list[Window] = []
        self._closed = False
        count = len(self._sources)
        self._unreadable: list[str | None] = [None] * count
        # By device: what the source showed last, what was counted since the meter was opened, and known gaps.
        self._last_j = [0.0] * count
        self._total_j: list[float | None] = [None] * count
        self._seen_gaps = [0] * count
        self._phases: dict[str, _Account] = {}
        idle = self._enter(IDLE)
        for index, source in enumerate(self._sources):
            try:
                self._last_j[index] = source.read_j()
                self._total_j[index] = idle.joules[index] = 0.0
            except MeterUnavailable as error:
                self._unreadable[index] = idle.missing[index] = error.reason
        self._opened_s = self._now_s = time.perf_counter()
        self._first = self._power_from = self._power_mark = self._shown()
        self._power_span_s = _POWER_PERIODS * self.counter_period_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        polled = [source for source in self._sources if source.polled]
        if polled:
            every_s = min(interval_s, *(source.poll_within_s for source in polled))
            self._thread = threading.Thread(
                target=_sample, args=(polled, every_s, self._stop), name="greenprune-meter", daemon=True
            )
            self._thread.start()

    @property
    def notes(self) -> tuple[str, ...]:
        """One line for each thing unknown or estimated: why, and what would help; and for joules lost."""
        lost = (f"{source.device}: {source.last_gap}" for source in self._sources if source.gaps)
        return self._notes + tuple(lost)

    @property
    def counter_period_s(self) -> float:
        """Seconds between two updates of the slowest counter; 0 if there is none."""
        periods = [source.period_s or 0.0 for source in self._sources if source.quality == "counter"]
        return max(periods, default=0.0)

    def window(self, name: str) -> Window:
        """A window to be used with ``with``; all windows of one name make up the phase of that name.

        Windows nest, and belong to one thread. Entering one once the meter is closed, or leaving it before another that
        was entered after it, raises a RuntimeError.

        Raises:
            ValueError: The name is that of the phase outside all windows.
        """
        if name == IDLE:
            raise ValueError(f"window {name!r}: the name stands for the time outside all windows; choose another")
        return Window(self, name)

    def total(self) -> Measurement:
        """Seconds and joules since the meter was opened, up to now or to its closing; disturbs no window."""
        return self._between(self._first, self._read())

    def by_phase(self) -> dict[str, Measurement]:
        """What each phase took, up to now or to the closing; the phases add up to the total.

        A phase that was entered n times is off by up to n times a single span's bound. Empty in a forked process.
        """
        if os.getpid() != self._pid:
            return {}
        self._read()
        return {name: self._of_phase(account) for name, account in self._phases.items()}

    def by_phase_j(self) -> dict[str, float | None]:
        """Joules by phase, up to now or to the closing; None for a phase in which nothing could be read."""
        return {name: measured.energy_j for name, measured in self.by_phase().items()}

    def power_w(self) -> float | None:
        """Watts of all readable devices, averaged since the previous call; None if nothing could be read.

        Calls that follow each other faster than ten updates of a counter are given the mean over ten to twenty.
        """
        now = self._read()
        if now.time_s - self._power_mark.time_s >= self._power_span_s:
            self._power_from, self._power_mark = self._power_mark, now
        measured = self._between(self._power_from, now)
        if measured.energy_j is None or measured.seconds <= 0:
            return None
        return measured.energy_j / measured.seconds

    def close(self) -> None:
        """Read a last time, stop the sampling thread and release the sources; later calls do nothing."""
        if self._closed or os.getpid() != self._pid:
            return
        self._read()
        self._closed = True
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for source in self._sources:
            source.close()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_window(self, window: Window) -> _Snapshot:
        if self._closed:  # nothing is read any more, and the window would tell 0 J
            raise RuntimeError(f"window {window.name!r}: the meter is closed; open it before, or another meter")
        if self._synchronize is not None:
            self._synchronize()
        snapshot = self._read()
        self._windows.append(window)
        self._enter(window.name)
        return snapshot

    def _close_window(self, window: Window, synchronize: bool) -> _Snapshot:
        if synchronize and self._synchronize is not None:
            self._synchronize()
        snapshot = self._read()
        innermost = self._windows[-1]
        self._windows.remove(window)
        self._enter(self._windows[-1].name if self._windows else IDLE)
        if innermost is not window:
            raise RuntimeError(
                f"window {window.name!r} was closed before {innermost.name!r}, which was opened inside it; windows "
                "nest, and belong to one thread"
            )
        return snapshot

    def _enter(self, phase: str) -> _Account:
        count = len(self._sources)
        account = self._phases.setdefault(phase, _Account(0.0, 0, [None] * count, [None] * count))
        account.entered += 1
        return account

    def _read(self) -> _Snapshot:
        """Count everything up to now for the innermost window's phase."""
        if os.getpid() != self._pid:
            # No lock here: the parent may have held it when this process was forked.
            count = len(self._sources)
            reason = "the process that opened the meter reads it, not one forked from it"
            return _Snapshot(time.perf_counter(), (None,) * count, (reason,) * count, (0,) * count)
        with self._lock:
            if not self._closed:
                self._count()
            return self._shown()

    def _count(self) -> None:
        account = self._phases[self._windows[-1].name if self._windows else IDLE]
        now_s = time.perf_counter()
        account.seconds += now_s - self._now_s
        self._now_s = now_s
        for index, source in enumerate(self._sources):
            try:
                value_j = source.read_j()
            except MeterUnavailable as error:
                self._unreadable[index] = account.missing[index] = error.reason
                continue
            finally:
                if source.gaps > self._seen_gaps[index]:
                    self._seen_gaps[index] = source.gaps
                    account.missing[index] = source.last_gap
            delta_j = value_j - self._last_j[index]
            self._unreadable[index] = None
            self._last_j[index] = value_j
            self._total_j[index] = (self._total_j[index] or 0.0) + delta_j
            account.joules[index] = (account.joules[index] or 0.0) + delta_j

    def _shown(self) -> _Snapshot:
        gaps = tuple(source.gaps for source in self._sources)
        return _Snapshot(self._now_s, tuple(self._total_j), tuple(self._unreadable), gaps)

    def _between(self, start: _Snapshot, end: _Snapshot) -> Measurement:
        seconds = end.time_s - start.time_s
        readings = []
        for index, source in enumerate(self._sources):
            missing = end.unreadable[index] or start.unreadable[index]
            if end.gaps[index] > start.gaps[index]:
                missing = source.last_gap
            joules = end.joules[index]
            if joules is not None:
                joules -= start.joules[index] or 0.0
                if joules == 0 and end.unreadable[index] is not None:
                    joules = None  # Nothing was read within the span.
            readings.append(_reading(source, seconds, joules, missing))
        return Measurement(seconds, tuple(readings))

    def _of_phase(self, account: _Account) -> Measurement:
        readings = [
            _reading(source, account.seconds, joules, missing, account.entered)
            for source, joules, missing in zip(self._sources, account.joules, account.missing, strict=True)
        ]
        return Measurement(account.seconds, tuple(readings))


def _reading(source: Source, seconds: float, joules: float | None, missing: str | None, spans: int = 1) -> Reading:
    """What is known of a device over a span, or over several that make up ``seconds``.

    Args:
        source: Where the joules come from.
        seconds: Length of all spans together.
        joules: What was counted.
        missing: Why joules are missing; None if none are.
        spans: How many spans there are: the edges of each may fall between two updates.
    """
    period_s = source.period_s or 0.0
    if joules == 0 and seconds > source.still_s:
        joules, missing = None, missing or f"the energy counter did not move in {seconds:.3g} s"
    too_short = joules is not None and seconds < spans * period_s
    reason = missing
    if too_short and reason is None:
        what = "the span" if spans == 1 else f"a span (of {spans})"
        reason = (
            f"{what} of {seconds / spans:.2g} s is shorter than the {period_s:.2g} s between two updates of its "
            "source, and says nothing"
        )
    bound_j = None if joules is None or source.bound_j is None else spans * source.bound_j
    return Reading(
        source.device, source.name, source.quality, joules, reason, source.model, bound_j, too_short, missing is None
    )


def _sample(sources: Sequence[Source], every_s: float, stop: threading.Event) -> None:
    while not stop.wait(every_s):
        for source in sources:
            source.poll()


def _sum(joules: Sequence[float | None]) -> float | None:
    known = [value for value in joules if value is not None]
    return sum(known) if known else None
