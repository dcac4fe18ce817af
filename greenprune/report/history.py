"""What a run's events tell epoch by epoch: accuracy, joules, FLOPs, and what became of every unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from greenprune.energy import CO2_IS_UNKNOWN, CarbonIntensity, co2_g
from greenprune.tracking import Event

REMOVED = -1.0
"""What the gate map holds where a unit is gone; everything else in it is a share, or None where nothing is known."""

_DONE_AGAIN = ("train", "window", "removal", "freeze", "surgery", "epoch")


@dataclass(frozen=True)
class EpochFigures:
    """What one epoch event tells; None is unknown.

    Attributes:
        epoch: Its number, from 1.
        step: Training steps so far.
        accuracy: Of the evaluation, 0 to 1.
        eval_loss: Of the evaluation.
        train_loss: Mean over the epoch.
        energy_j: Joules of the run so far, over all attempts, work done again included.
        epoch_j: Joules of this epoch alone.
        flops_train: FLOPs of the training steps so far.
        flops_train_dense: What the dense network would have taken for the same samples.
        co2_g: Grams of CO2e so far.
        time_s: Seconds so far.
        blocks: Residual branches that are there.
        channels: Gated channels that are there.
    """

    epoch: int
    step: int
    accuracy: float | None
    eval_loss: float | None
    train_loss: float | None
    energy_j: float | None
    epoch_j: float | None
    flops_train: float | None
    flops_train_dense: float | None
    co2_g: float | None
    time_s: float | None
    blocks: int | None
    channels: int | None


@dataclass(frozen=True)
class Change:
    """A removal or a freeze.

    Attributes:
        unit: A block, or a set of channels ``<block>:<label>``.
        step: When, in training steps.
        epoch: When, in epochs; None if the event does not tell.
        action: ``removed`` or ``frozen``.
        reason: Why, in the event's word.
        channels: How many channels of the set went; None for a block.
    """

    unit: str
    step: int
    epoch: float | None
    action: str
    reason: str
    channels: int | None


@dataclass(frozen=True)
class GateMap:
    """How far every gated unit was open at the end of every epoch.

    Attributes:
        units: Rows, in the order of the network: blocks, or sets of channels.
        epochs: Columns.
        open_share: For each unit and epoch the share of images for which the gate is open (for a set, of images times
            channels that it had at first); :data:`REMOVED` once it is gone; None before its first window.
    """

    units: tuple[str, ...]
    epochs: tuple[int, ...]
    open_share: tuple[tuple[float | None, ...], ...]


@dataclass
class ChannelSet:
    """A block's set of channels: how many there were and are.

    Attributes:
        label: Its name within the block.
        dense: Channels at first.
        left: Channels now; those of a removed block are gone with it.
    """

    label: str
    dense: int
    left: int


@dataclass
class BlockFate:
    """What became of one residual branch.

    Attributes:
        name: The block.
        removed: Its removal, if it is gone.
        frozen: When it was found to be on for good, if it was.
        sets: Its gated sets of channels.
        changes: Removals of its channels, in order.
    """

    name: str
    removed: Change | None = None
    frozen: Change | None = None
    sets: list[ChannelSet] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True)
class History:
    """A run, as far as its events tell.

    Attributes:
        start: The last start event; empty if there is none.
        attempts: Start events.
        energy_sources: Device, source and quality of everything that any attempt metered or could not.
        last_time: Seconds since 1970 of the last event; None if there is none.
        epochs: One entry for each epoch that counts: of one done twice, the second.
        changes: Removals and freezes that count, in order.
        gate_map: Gates over epochs; without rows if nothing was gated.
        network: Every block in order, and what became of it.
        energy_by_phase_j: Joules by phase, as of the end or of the last epoch that tells; empty if none does.
        energy_by_device_j: The same by device, with its source and quality in the name.
    """

    start: Event
    attempts: int
    energy_sources: tuple[tuple[str, str | None, str | None], ...]
    last_time: float | None
    epochs: tuple[EpochFigures, ...]
    changes: tuple[Change, ...]
    gate_map: GateMap
    network: tuple[BlockFate, ...]
    energy_by_phase_j: dict[str, float | None]
    energy_by_device_j: dict[str, float | None]

    def at_intensity(self, carbon: CarbonIntensity) -> History:
        """The same with CO2e told at another carbon intensity and PUE, and no note that it is unknown."""
        notes = [note for note in self.start.get("notes", []) if note != CO2_IS_UNKNOWN]
        epochs = tuple(replace(one, co2_g=co2_g(one.energy_j, carbon)) for one in self.epochs)
        return replace(self, start=self.start | {"notes": notes}, epochs=epochs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = asdict(self)
        values["notes"] = self.start.get("notes", [])
        del values["start"]
        return values


def read_history(events: Sequence[Event]) -> History:
    """Put a run's events together.

    Work that was lost and done again counts once, as it was done last; its joules are in the totals all the same.

    Args:
        events: All events of the run, in order.
    """
    kept = _without_work_done_again(events)
    starts = [event for event in events if event["kind"] == "start"]
    start = starts[-1] if starts else {}
    epochs = tuple(_epoch_figures(event) for event in kept if _is_epoch(event))
    changes = tuple(_change(event) for event in kept if event["kind"] in ("removal", "freeze"))
    network = _network(start, changes)
    end: Event = next((event for event in events if event["kind"] == "end"), {})
    by_phase: dict[str, float | None] = {}
    by_device: dict[str, float | None] = {}
    for event in kept:
        by_phase = event.get("energy/by_phase_j", by_phase)
        by_device = event.get("energy/by_device_j", by_device)
    summary = end.get("summary", {})
    return History(
        start=start,
        attempts=len(starts),
        energy_sources=tuple(dict.fromkeys(tuple(of) for event in starts for of in event.get("energy_sources", []))),
        last_time=events[-1]["time"] if events else None,
        epochs=epochs,
        changes=changes,
        gate_map=_gate_map(kept, start, network),
        network=network,
        energy_by_phase_j=summary.get("energy_by_phase_j") or by_phase,
        energy_by_device_j=summary.get("energy_by_device_j") or by_device,
    )


def _without_work_done_again(events: Sequence[Event]) -> list[Event]:
    """The events, less those of steps that a later attempt did again from an earlier checkpoint."""
    kept: list[Event] = []
    for event in events:
        if event["kind"] == "start":
            # At the beginning all is done again, also what was given before it.
            step = event["step"] or -1
            kept = [past for past in kept if past["kind"] not in _DONE_AGAIN or past["step"] <= step]
        kept.append(event)
    return kept


def _is_epoch(event: Event) -> bool:
    """Whether an event tells of an epoch, and of which."""
    return event["kind"] == "epoch" and isinstance(event.get("epoch"), int)


def _epoch_figures(event: Event) -> EpochFigures:
    return EpochFigures(
        epoch=event["epoch"],
        step=event["step"],
        accuracy=event.get("eval/accuracy"),
        eval_loss=event.get("eval/loss"),
        train_loss=event.get("train/loss"),
        energy_j=event.get("energy/total_j"),
        epoch_j=event.get("energy/epoch_j"),
        flops_train=event.get("flops/train"),
        flops_train_dense=event.get("flops/train_dense"),
        co2_g=event.get("energy/co2_g"),
        time_s=event.get("time_s"),
        blocks=event.get("structure/blocks"),
        channels=event.get("structure/channels"),
    )


def _change(event: Event) -> Change:
    channels = event.get("channels")
    return Change(
        unit=event["unit"],
        step=event["step"],
        epoch=event.get("epoch"),
        action="removed" if event["kind"] == "removal" else "frozen",
        reason=event.get("reason", "unknown"),
        channels=len(channels) if isinstance(channels, list) else channels,
    )


def _network(start: Event, changes: Sequence[Change]) -> tuple[BlockFate, ...]:
    """Every block that the start event or a change names."""
    fates = {name: BlockFate(name) for name in start.get("units", [])}
    for name, dense in start.get("channels", {}).items():
        owner, _, label = name.rpartition(":")
        fates.setdefault(owner, BlockFate(owner)).sets.append(ChannelSet(label, dense, dense))
    for change in changes:
        owner, colon, label = change.unit.rpartition(":")
        fate = fates.setdefault(owner if colon else change.unit, BlockFate(owner if colon else change.unit))
        if colon and change.channels is not None:
            fate.changes.append(change)
            for channels in fate.sets:
                if channels.label == label:
                    channels.left -= change.channels
        elif not colon and change.action == "removed":
            fate.removed = change
            for channels in fate.sets:
                channels.left = 0
        elif not colon:
            fate.frozen = change
    return tuple(fates.values())


def _gate_map(events: Sequence[Event], start: Event, network: Sequence[BlockFate]) -> GateMap:
    """The state of every gated unit whenever an epoch ended."""
    gated: set[str] = set()
    for event in events:
        gated.update(event.get("units", {}) if event["kind"] == "window" else ())
        if event["kind"] in ("removal", "freeze"):
            gated.add(event["unit"])
    in_order = [unit for fate in network for unit in (fate.name, *(f"{fate.name}:{s.label}" for s in fate.sets))]
    units = [unit for unit in dict.fromkeys([*in_order, *sorted(gated)]) if unit in gated]
    states = {unit: _UnitState(start.get("channels", {}).get(unit)) for unit in units}
    epochs: list[int] = []
    columns: list[list[float | None]] = []
    for event in events:
        kind = event["kind"]
        if kind == "window":
            for unit, seen in event.get("units", {}).items():
                states[unit].see(seen)
        elif kind in ("removal", "freeze"):
            change = _change(event)
            states[change.unit].take(change)
            if change.action == "removed" and change.channels is None:
                for unit, state in states.items():
                    if unit.startswith(f"{change.unit}:"):
                        state.take(change)
        elif _is_epoch(event):
            epochs.append(event["epoch"])
            columns.append([states[unit].open_share for unit in units])
    rows = tuple(tuple(column[index] for column in columns) for index in range(len(units)))
    return GateMap(tuple(units), tuple(epochs), rows)


class _UnitState:
    """How far one gated unit is open; ``channels`` are those that a set had at first."""

    def __init__(self, channels: int | None) -> None:
        self.open_share: float | None = None
        self._dense = channels
        self._left = channels

    def see(self, window: dict[str, Any]) -> None:
        rate = window["rate"]
        if not isinstance(rate, list):
            self.open_share = rate
        elif self._dense:
            self.open_share = sum(rate) / self._dense

    def take(self, change: Change) -> None:
        if change.action == "frozen":
            self.open_share = 1.0 if not self._dense or self._left is None else self._left / self._dense
        elif change.channels is None:
            self.open_share = REMOVED
        elif self._dense and self._left is not None:
            self._left -= change.channels
            at_most = self._left / self._dense
            if self._left == 0:
                self.open_share = REMOVED
            elif self.open_share is not None:
                self.open_share = min(self.open_share, at_most)
