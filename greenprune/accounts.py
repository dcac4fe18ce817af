"""The books of a run over all its ranks and attempts: joules, CO2, FLOPs, samples and seconds."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch

from greenprune.energy import CarbonIntensity, Meter, co2_g
from greenprune.engine import Engine
from greenprune.tracking import Event, Ledger, RunFolder

_WORST_FIRST = ("estimate", "integrated power", "counter")


@dataclass(frozen=True)
class Records:
    """Where a run's figures come from and where they go.

    Attributes:
        folder: The run's folder, created.
        meter: Meter of this process's share of the devices.
        carbon: What a joule costs in CO2, if the country is known.
        mirrors: Called with every event on rank 0.
        notes: What the user should know of them, one line each.
    """

    folder: RunFolder
    meter: Meter
    carbon: CarbonIntensity | None
    mirrors: list[Callable[[Event], None]]
    notes: list[str]


class Accounts:
    """Keeps the ledger of a run: what earlier attempts spent, and what this one's meters say on every rank.

    Args:
        engine: The run's engine.
        meter: Meter of this process's share of the devices.
        carbon: What a joule costs in CO2, if the country is known.

    Attributes:
        ledger: Totals; its joules and seconds are those of earlier attempts, the rest is up to date.
    """

    def __init__(self, engine: Engine, meter: Meter, carbon: CarbonIntensity | None) -> None:
        self.meter = meter
        self.carbon = carbon
        self.ledger = Ledger()
        self._engine = engine
        self._started = time.monotonic()

    def add_earlier_attempts(self, events: Iterable[Event]) -> None:
        """Add what earlier attempts spent after the checkpoint, if any, that this one goes on from.

        Args:
            events: All events of the run so far; call once, after the checkpoint's ledger was taken up.
        """
        ledger = self.ledger
        ledger.attempts = 1
        last: Event | None = None
        for event in events:
            ledger.attempts += event["kind"] == "start"
            last = event if "energy/total_j" in event else last
        if last is None:
            return
        if last["energy/total_j"] is not None:
            ledger.energy_lost_j += max(0.0, last["energy/total_j"] - (ledger.energy_j or 0.0))
        ledger.time_s = max(ledger.time_s, last["time_s"])

    def sources(self) -> list[tuple[str, str | None, str | None]]:
        """Device, source and quality of every meter on every rank; all ranks call it."""
        mine = [(reading.device, reading.source, reading.quality) for reading in self.meter.total().readings]
        return [source for rank in self._engine.gather_objects(mine) for source in rank]

    def numbers(self) -> dict[str, object]:
        """What was spent so far, as events tell it; all ranks call it. Unknown only where no rank can read anything."""
        known = [_known(self.meter.total().energy_j), _known(self.meter.power_w())]
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
            "time_s": self._seconds(),
        }

    def ledger_now(self) -> Ledger:
        """The ledger with this attempt's joules and seconds so far, of all ranks; all ranks call it."""
        shares = self._engine.gather_objects(
            (socket.gethostname(), self.meter.by_phase_j(), self.meter.total().readings)
        )
        several_hosts = len({host for host, _, _ in shares}) > 1
        phases, devices = dict(self.ledger.energy_by_phase_j), dict(self.ledger.energy_by_device_j)
        qualities = {self.ledger.energy_quality}
        for host, by_phase, readings in shares:
            for phase, joules in by_phase.items():
                phases[phase] = _add(phases.get(phase), joules)
            for reading in readings:
                qualities.add(reading.quality)
                name = f"{host}: {reading.device}" if several_hosts else reading.device
                name = f"{name} ({reading.source})" if reading.source else name
                devices[name] = _add(devices.get(name), reading.joules)
        return replace(
            self.ledger,
            energy_by_phase_j=phases,
            energy_by_device_j=devices,
            energy_quality=next((quality for quality in _WORST_FIRST if quality in qualities), None),
            time_s=self._seconds(),
        )

    def _seconds(self) -> float:
        return self.ledger.time_s + time.monotonic() - self._started


def _known(value: float | None) -> tuple[float, float]:
    """A value for a sum over ranks, and whether it is known."""
    return (0.0, 0.0) if value is None else (value, 1.0)


def _add(left: float | None, right: float | None) -> float | None:
    """Sum of what is known; unknown only if neither is known."""
    known = [value for value in (left, right) if value is not None]
    return sum(known) if known else None
