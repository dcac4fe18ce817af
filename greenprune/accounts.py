"""The books of a run over all its ranks and attempts: joules, CO2, FLOPs, samples and seconds."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from greenprune.energy import CarbonIntensity, Meter, Reading, SlurmEnergy, co2_g, node_id, slurm_energy
from greenprune.engine import Engine
from greenprune.tracking import Event, Ledger, RunFolder

_WORST_FIRST = ("estimate", "integrated power", "counter")
_OF_ENERGY = (
    *("energy_by_phase_j", "energy_by_phase_bound_j", "energy_by_device_j"),
    *("energy_lost_j", "energy_quality", "energy_complete", "energy_missing"),
)
"""Fields of a ledger that tell all joules of the run up to some moment."""


@dataclass(frozen=True)
class Records:
    """Where a run's figures come from and where they go.

    Attributes:
        folder: The run's folder, created.
        meter: Meter of this process's share of the devices.
        carbon: What a joule costs in CO2, if the country is known.
        mirrors: Called with every event on rank 0.
        notes: What the user should know of them, one line each.
        slurm_job: The Slurm job that the run is, if it is one.
    """

    folder: RunFolder
    meter: Meter
    carbon: CarbonIntensity | None
    mirrors: list[Callable[[Event], None]]
    notes: list[str]
    slurm_job: str | None = None


class Accounts:
    """Keeps the ledger of a run: what earlier attempts spent, and what this one's meters say on every rank.

    Args:
        engine: The run's engine.
        meter: Meter of this process's share of the devices.
        carbon: What a joule costs in CO2, if the country is known.
        slurm_job: The Slurm job that the run is, if it is one.

    Attributes:
        ledger: Totals; its joules and seconds are those of earlier attempts, the rest is up to date.
    """

    def __init__(
        self, engine: Engine, meter: Meter, carbon: CarbonIntensity | None, slurm_job: str | None = None
    ) -> None:
        self.meter = meter
        self.carbon = carbon
        self.ledger = Ledger()
        self._engine = engine
        self._slurm_job = slurm_job
        # On the scale of energy/total_j: where each earlier attempt ended, as far as it is known, where the last known
        # one did, and the spans whose work was done again.
        self._ended_j: list[float | None] = []
        self._reached_j = 0.0
        self._lost_j: list[tuple[float, float]] = []
        self._resumed_at_j = 0.0

    def add_earlier_attempts(self, events: Sequence[Event], step: int, *, complete: bool = True) -> None:
        """Add what earlier attempts spent after the checkpoint, if any, that this one goes on from.

        If one of them was asked to stop at this step, the books are those that it closed: writing the checkpoint is in
        them, and not lost.

        Args:
            events: All events of the run so far; call once, after the checkpoint's ledger was taken up.
            step: Steps done by then.
            complete: Whether these are all events, and of all attempts; else some could not be read, or are not there.
        """
        ledger = self.ledger = _as_closed(self.ledger, events, step)
        ledger.energy_complete &= complete
        self._resumed_at_j = ledger.energy_j or 0.0
        last: Event = {}
        time_s = 0.0
        qualities, missing = {ledger.energy_quality}, dict(ledger.energy_missing)
        for event in events:
            if event["kind"] == "start" or not self._ended_j:  # a first line may be damaged
                self._end_attempt(last.get("kind"), event.get("energy/resumed_at_j"))
                self._ended_j.append(None)
            # Of all attempts, for the joules of those that left no checkpoint count as well.
            qualities |= {quality for _, _, quality in event.get("energy_sources", ())}
            books = event.get("energy/ledger") or {}
            ledger.energy_complete &= books.get("energy_complete", True)
            missing |= books.get("energy_missing", {})
            if event.get("energy/total_j") is not None:
                self._ended_j[-1] = self._reached_j = event["energy/total_j"]
            time_s = event.get("time_s", time_s)
            last = event
        self._end_attempt(last.get("kind"), self._resumed_at_j)
        ledger.energy_quality, ledger.energy_missing = _worst(qualities), missing
        ledger.attempts = len(self._ended_j) + 1
        ledger.energy_lost_j += max(0.0, self._reached_j - self._resumed_at_j)
        ledger.time_s = max(ledger.time_s, time_s)

    def _end_attempt(self, last_kind: str | None, resumed_at_j: float | None) -> None:
        """An attempt ended with an event of some kind, and the next went on from a checkpoint at so many joules."""
        if not self._ended_j:
            return
        if last_kind not in ("interrupt", "end"):
            self.ledger.energy_complete = False  # killed: what it took after its last event is on no record
        if resumed_at_j is not None:
            self._lost_j.append((resumed_at_j, self._reached_j))

    def begin(self) -> dict[str, object]:
        """:meth:`numbers` as an attempt starts, and at how many joules its checkpoint was; all ranks call it."""
        numbers = self.numbers()
        if not self.ledger.energy_by_epoch_j and self.ledger.energy_at_epoch_j is None:
            self.ledger.energy_at_epoch_j = _joules(numbers)
        return {**numbers, "energy__resumed_at_j": self._resumed_at_j}

    def stop(self) -> dict[str, object]:
        """:meth:`numbers` as an attempt stops because it was asked to, and its books; all ranks call it."""
        numbers, so_far = self.numbers(), self.ledger_now()
        return {**numbers, "energy__ledger": {key: getattr(so_far, key) for key in _OF_ENERGY}}

    def end_epoch(self) -> dict[str, object]:
        """:meth:`numbers` as an epoch ends, its joules, and all so far by phase and by device; all ranks call it."""
        numbers, ledger = self.numbers(), self.ledger
        now_j, before_j = _joules(numbers), ledger.energy_at_epoch_j
        epoch_j = None if now_j is None or before_j is None else now_j - before_j
        ledger.energy_by_epoch_j.append(epoch_j)
        ledger.energy_at_epoch_j = now_j
        so_far = self.ledger_now()
        return {
            **numbers,
            "energy__epoch_j": epoch_j,
            "energy__by_phase_j": so_far.energy_by_phase_j,
            "energy__by_device_j": so_far.energy_by_device_j,
        }

    def sources(self) -> list[tuple[str, str | None, str | None]]:
        """Device, source and quality of every meter on every rank; all ranks call it."""
        mine = [(reading.device, reading.source, reading.quality) for reading in self.meter.total().readings]
        return [source for rank in self._engine.gather_objects(mine) for source in rank]

    def numbers(self) -> dict[str, object]:
        """What was spent so far, as events tell it; all ranks call it. Unknown only where no rank can read anything."""
        total = self.meter.total()
        known = [_known(total.energy_j), _known(self.meter.power_w())]
        here = torch.tensor(known, dtype=torch.float64, device=self._engine.device)
        (joules, some_joules), (power_w, some_power) = self._engine.sum(here).tolist()
        earlier_j = self.ledger.energy_j
        energy_j = joules + (earlier_j or 0.0) if some_joules else earlier_j
        return {
            "flops__train": self.ledger.flops_train,
            "flops__train_dense": self.ledger.flops_train_dense,
            "energy__total_j": energy_j,
            "energy__power_w": power_w if some_power else None,
            "energy__co2_g": co2_g(energy_j, self.carbon),
            "time_s": self.ledger.time_s + total.seconds,
        }

    def ledger_now(self) -> Ledger:
        """The ledger with this attempt's joules and seconds so far, of all ranks; all ranks call it."""
        shares = self._engine.gather_objects((node_id(), socket.gethostname(), self.meter.by_phase()))
        several_nodes = len({node for node, _, _ in shares}) > 1
        ledger = self.ledger
        phases, devices = dict(ledger.energy_by_phase_j), dict(ledger.energy_by_device_j)
        bounds = dict(ledger.energy_by_phase_bound_j)
        qualities = {ledger.energy_quality}
        complete, missing = ledger.energy_complete, dict(ledger.energy_missing)
        for _, host, by_phase in shares:
            for phase, measured in by_phase.items():
                if measured.energy_j is not None:
                    bounds[phase] = _add_bounds(bounds.get(phase, 0.0), measured.bound_j)
                phases[phase] = _add(phases.get(phase), measured.energy_j)
                qualities.add(measured.quality)
                complete &= measured.complete
                # By device from the same reads as by phase, so that both add up to the same total.
                for reading in measured.readings:
                    name = f"{host}: {_name(reading)}" if several_nodes else _name(reading)
                    devices[name] = _add(devices.get(name), reading.joules)
                    if not reading.complete:
                        missing[name] = str(reading.reason)
        mine = shares[self._engine.rank][2].values()
        return replace(
            ledger,
            energy_by_phase_j=phases,
            energy_by_phase_bound_j=bounds,
            energy_by_device_j=devices,
            energy_quality=_worst(qualities),
            energy_complete=complete,
            energy_missing=missing,
            time_s=ledger.time_s + sum(measured.seconds for measured in mine),
        )

    def energy_figures(self, ledger: Ledger) -> dict[str, object]:
        """The joules of a summary by phase, device, epoch and attempt, and what they are worth; all ranks call it.

        Args:
            ledger: What :meth:`ledger_now` gave.
        """
        energy_j, epochs = ledger.energy_j, ledger.energy_by_epoch_j
        slurm = self._slurm()
        return {
            "energy_complete": ledger.energy_complete,
            "energy_missing": ledger.energy_missing,
            "energy_bound_j": self._bound_j(ledger),
            "energy_by_phase_j": ledger.energy_by_phase_j,
            "energy_by_phase_bound_j": ledger.energy_by_phase_bound_j,
            "energy_by_device_j": ledger.energy_by_device_j,
            "energy_by_epoch_j": epochs,
            "energy_by_attempt": self._by_attempt(energy_j),
            # Nothing is known to be lost where nothing is known, unless there was nothing to lose.
            "energy_lost_j": None if energy_j is None and ledger.attempts > 1 else ledger.energy_lost_j,
            "energy_per_sample_j": energy_j / ledger.samples if energy_j is not None and ledger.samples else None,
            "energy_per_epoch_j": _mean(epochs),
            "energy_slurm_j": slurm.energy_j,
            "energy_slurm_reason": slurm.reason,
        }

    def _by_attempt(self, energy_j: float | None) -> list[dict[str, float | int | None]]:
        """Joules of each attempt, and how many of them were for work that a later one did again."""
        attempts: list[dict[str, float | int | None]] = []
        begun_j = 0.0
        for number, ended_j in enumerate([*self._ended_j, energy_j], start=1):
            spent_j = None if ended_j is None else ended_j - begun_j
            lost_j = None if ended_j is None else _overlap_j(self._lost_j, begun_j, ended_j)
            attempts.append({"attempt": number, "energy_j": spent_j, "lost_j": lost_j})
            begun_j = begun_j if ended_j is None else ended_j
        return attempts

    def _bound_j(self, ledger: Ledger) -> float | None:
        """Most joules that the run's total is off because its sources move in steps; None if not known.

        Every attempt is one span, and is taken to have been metered as this one is, unless one of them was estimated.
        """
        shares = self._engine.gather_objects(self.meter.total().readings)
        bounds = [reading.bound_j for share in shares for reading in share if reading.joules is not None]
        is_estimated = ledger.energy_quality == "estimate"  # of lost work too, which is in no phase
        if is_estimated or not bounds or None in [*bounds, *ledger.energy_by_phase_bound_j.values()]:
            return None
        return self.ledger.attempts * float(sum(bounds))

    def _slurm(self) -> SlurmEnergy:
        """What Slurm says that the run's job took, as a check."""
        if self._slurm_job is None or not self._engine.is_main:
            return SlurmEnergy(None, "not a Slurm job")
        return slurm_energy(self._slurm_job)


def _as_closed(ledger: Ledger, events: Sequence[Event], step: int) -> Ledger:
    """A checkpoint's ledger with the joules that an attempt had in its books when it stopped at this step, if later."""
    stops = [event for event in events if event["kind"] == "interrupt" and event["step"] == step]
    books = stops[-1].get("energy/ledger") if stops else None
    # An older version may lack one.
    closed = replace(ledger, **{key: books[key] for key in _OF_ENERGY if key in books}) if books else ledger
    return closed if (closed.energy_j or 0.0) > (ledger.energy_j or 0.0) else ledger


def _worst(qualities: Collection[str | None]) -> str | None:
    return next((quality for quality in _WORST_FIRST if quality in qualities), None)


def _joules(numbers: dict[str, object]) -> float | None:
    value = numbers["energy__total_j"]
    assert value is None or isinstance(value, float)
    return value


def _mean(joules: list[float | None]) -> float | None:
    known = [value for value in joules if value is not None]
    return sum(known) / len(known) if known and len(known) == len(joules) else None


def _name(reading: Reading) -> str:
    """A device as people know it, with the source of its joules and how much that is worth."""
    device = reading.device if reading.model is None else f"{reading.device} {reading.model}"
    return device if reading.quality is None else f"{device} ({reading.quality}: {reading.source})"


def _overlap_j(spans: Iterable[tuple[float, float]], begin_j: float, end_j: float) -> float:
    """Joules of [begin, end] that lie in any of several spans, each counted once."""
    covered_j, reached_j = 0.0, begin_j
    for start_j, stop_j in sorted(spans):
        here_j = min(stop_j, end_j) - max(start_j, reached_j)
        if here_j > 0:
            covered_j += here_j
            reached_j = stop_j
    return covered_j


def _known(value: float | None) -> tuple[float, float]:
    """A value for a sum over ranks, and whether it is known."""
    return (0.0, 0.0) if value is None else (value, 1.0)


def _add_bounds(left: float | None, right: float | None) -> float | None:
    """A bound of a sum, which is known only if those of all its parts are."""
    return None if left is None or right is None else left + right


def _add(left: float | None, right: float | None) -> float | None:
    """Sum of what is known; unknown only if neither is known."""
    known = [value for value in (left, right) if value is not None]
    return sum(known) if known else None
