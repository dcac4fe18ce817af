"""What a run tells of itself: the events of its log, and the summary of what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from greenprune.accounts import Accounts, Records
from greenprune.checkpoint import Written
from greenprune.config import Config
from greenprune.data import ImageData
from greenprune.energy import co2_g, format_intensity
from greenprune.engine import Engine
from greenprune.evaluation import Evaluation
from greenprune.flops import Cost
from greenprune.gating import GatePolicy, UnitWindow, by_gate, find_gates
from greenprune.models import residual_blocks
from greenprune.network import Network
from greenprune.process_load import by_rank
from greenprune.surgery import Operation, Structure
from greenprune.timing import StepTimes
from greenprune.tracking import Event, EventLog, read_attempts, salvage_events, write_json
from greenprune.unit_cost import MEASURED


class Told(NamedTuple):
    """What all ranks have told.

    Attributes:
        loss: Sum over the samples of the epoch so far.
        hits: The same of those that were recognised.
        skipped: Steps of the epoch that were left out.
        price: The price of kept cost, if there are gates.
        loss_scale: What the loss is multiplied by in fp16; None in other precisions.
        signal: A signal that asks to stop, or 0.
        loads: The load of each rank's process.
    """

    loss: float
    hits: float
    skipped: int
    price: float | None
    loss_scale: float | None
    signal: int
    loads: list[float]


class Recorder:
    """Writes a run's events, structure and summary; on rank 0, the others only take part.

    Args:
        config: The run.
        data: The data set.
        engine: The engine.
        network: The network, from :func:`prepare_network`.
        records: Where its figures come from and go.

    Attributes:
        accounts: What the run has spent.
        events: Its log, once :meth:`begin` has opened it.
    """

    events: EventLog

    def __init__(self, config: Config, data: ImageData, engine: Engine, network: Network, records: Records) -> None:
        self._config = config
        self._data = data
        self._engine = engine
        self._folder = records.folder
        self._mirrors = records.mirrors
        self._notes = [*records.meter.notes, *network.notes, *records.notes]
        self._table, self._costs, self._measured = network.table, network.costs, network.measured
        # Without gates there is no budget, and nothing is measured for it.
        unit = config.budget.unit
        self._unit = "flops" if unit in MEASURED and network.measured is None else unit
        self.accounts = Accounts(engine, records.meter, records.carbon, records.slurm_job)

    def structure_is(self, structure: Structure, kept_cost: float) -> Cost:
        """Take up what events tell of a structure, from now on.

        Returns:
            What the network costs in it.
        """
        cost = self._cost = self._table.cost_of(structure)
        self._numbers = {
            "structure__blocks": len(residual_blocks(self._engine.module)),
            "structure__gates": len(find_gates(self._engine.module)),
            "structure__channels": sum(self._table.channels_left(structure).values()),
            "structure__params": cost.params,
            "structure__kept_cost": kept_cost,
            "flops__forward": cost.flops_forward,
        }
        return cost

    # Events.

    def begin(self, step: int, structure: Structure, resumed_from: Path | None) -> None:
        """Open the log, add what earlier attempts spent, and record the start of this one.

        Args:
            step: Steps done.
            structure: The structure to begin with.
            resumed_from: The checkpoint that the run goes on from.
        """
        previous, damaged = salvage_events(self._folder.events)
        self.events = EventLog(self._folder.events if self._engine.is_main else None, self._mirrors)
        silent = self._silent_attempts(previous)
        self.accounts.add_earlier_attempts(previous, step, complete=not damaged and not silent)
        self._notes += self._on_resuming(step, previous, damaged)
        if silent and not damaged:
            times = "an earlier attempt" if silent == 1 else f"{silent} earlier attempts"
            self._notes.append(f"{times} ended before anything was recorded; what was spent is a lower bound now")
        self._start(step, resumed_from)
        if self._engine.is_main and self._folder.structure.exists():  # an attempt that was killed was behind or ahead
            write_json(self._folder.structure, structure.to_dict())
        if resumed_from is not None:
            self._catch_up(step, resumed_from, previous)
        elif structure.operations:  # given before training
            self._tell(step, structure, structure.operations)

    def _silent_attempts(self, previous: list[Event]) -> int:
        """Earlier attempts that ended before their first event: of each that took the folder there is a provenance."""
        begun = [event["kind"] for event in previous].count("start")
        attempts = len(read_attempts(self._folder.provenance)) - 1  # without this one
        return max(0, attempts - begun)

    def _on_resuming(self, step: int, previous: list[Event], damaged: list[str]) -> list[str]:
        """What going on costs: steps that are done again, lines of the log that tell nothing any more."""
        notes = [f"{self._folder.events}: {line}; what was spent is a lower bound now" for line in damaged]
        told = (event.get("energy/co2_g_per_kwh") for event in previous)
        known = [g_per_kwh for g_per_kwh in told if g_per_kwh is not None]
        now = self._g_per_kwh
        if known and now is not None and known[-1] != now:
            notes.append(
                f"CO2e of the whole run, earlier attempts included, is told at {format_intensity(now)} from now on "
                f"(with the site's share); it was at {format_intensity(known[-1])}"
            )
        reached = max((event["step"] for event in previous), default=0)
        if reached > step:
            since = "the beginning" if step == 0 else f"the checkpoint at step {step}"
            notes.append(f"the run had come to step {reached}: the {reached - step} steps since {since} are lost")
        return notes

    @property
    def _g_per_kwh(self) -> float | None:
        """Grams of CO2e for each metered kilowatt-hour, the site's share counted; None if the grid is not known."""
        carbon = self.accounts.carbon
        return None if carbon is None else carbon.g_per_kwh * carbon.pue

    def _catch_up(self, step: int, path: Path, previous: list[Event]) -> None:
        """Tell of the checkpoint where the attempt that wrote it was killed before it did."""
        if not any(event["kind"] == "checkpoint" and event["step"] == step for event in previous):
            self.events.record("checkpoint", step, path=str(path), pause_s=None, write_s=None)

    def _start(self, step: int, resumed_from: Path | None) -> None:
        config, data, engine = self._config, self._data, self._engine
        self.events.record(
            "start",
            step,
            run=self._folder.path.name,
            attempt=self.accounts.ledger.attempts,
            resumed_from=str(resumed_from) if resumed_from else None,
            model=config.model.name,
            data=config.data.name,
            data_digest=data.digest,
            seed=config.seed,
            gated=config.gate.enabled,
            structure_given=config.model.structure is not None,
            budget_target=config.budget.target if config.gate.enabled else None,
            budget_unit=self._unit,
            precision=config.precision,
            device=str(engine.device),
            engine=engine.name,
            world_size=engine.world_size,
            batch_size=config.data.batch_size,
            train_samples=data.train_samples,
            eval_samples=data.eval_samples,
            accuracy_kind=data.accuracy_kind,
            classes=data.classes,
            image_shape=[data.channels, data.image_size, data.image_size],
            epochs=config.optim.epochs,
            steps_per_epoch=data.steps_per_epoch,
            units=list(self._costs.units),
            channels=self._costs.channels,
            unit_cost=None if self._measured is None else self._measured.to_dict(),
            energy_sources=self.accounts.sources(),
            energy__co2_g_per_kwh=self._g_per_kwh,
            notes=self._notes,
            **self._numbers,
            **self.accounts.begin(),
            flops__forward_dense=self._table.dense.flops_forward,
            structure__params_dense=self._table.dense.params,
        )

    def train(self, step: int, told: Told, samples: int, step_s: float, lr: float) -> None:
        """Record how training goes.

        Args:
            step: Steps done.
            told: What all ranks have told.
            samples: Samples of the epoch so far that count.
            step_s: Seconds a step since the last such event.
            lr: The learning rate of the weights.
        """
        self.events.record(
            "train",
            step,
            epoch=step / self._data.steps_per_epoch,
            train__loss=told.loss / samples,
            train__accuracy=told.hits / samples,
            train__lr=lr,
            train__samples_per_s=self._config.data.batch_size / step_s,
            train__step_time_s=step_s,
            **self._skipped(told),
            **({} if told.loss_scale is None else {"train__loss_scale": told.loss_scale}),
            gate__price=told.price,
            **self._numbers,
            **self.accounts.numbers(),
            **by_rank(told.loads),
        )

    @property
    def _is_left_to_scaler(self) -> bool:
        """Whether steps may be left out that nobody counts."""
        return self._engine.loss_scale is not None and self._config.optim.nonfinite != "skip"

    def _skipped(self, told: Told) -> dict[str, int]:
        if self._config.optim.nonfinite != "skip":
            return {}
        return {"train__skipped_steps": self.accounts.ledger.skipped_steps + told.skipped}

    def epoch(self, step: int, epoch: int, told: Told, samples: int, evaluation: Evaluation) -> None:
        """Record the end of an epoch, from 1."""
        self.accounts.ledger.skipped_steps += told.skipped
        self.events.record(
            "epoch",
            step,
            epoch=epoch,
            train__loss=told.loss / samples,
            train__accuracy=told.hits / samples,
            eval__loss=evaluation.loss,
            eval__accuracy=evaluation.accuracy,
            **self._numbers,
            **self.accounts.end_epoch(),
        )

    def window(self, step: int, policy: GatePolicy, window: dict[str, UnitWindow]) -> None:
        """Record what the gates did in a window."""
        self.events.record(
            "window",
            step,
            gate__price=policy.controller.price.item(),
            gate__target=policy.controller.target_at(step),
            structure__kept_cost=policy.kept_cost,
            units=by_gate(window),
        )

    def operated(self, step: int, structure: Structure, operations: list[Operation], pause_s: float) -> None:
        """Record operations that were carried out, in the new structure, and how long training stood still."""
        self._tell(step, structure, operations)
        self.events.record("surgery", step, pause_s=pause_s)

    def _tell(self, step: int, structure: Structure, operations: list[Operation]) -> None:
        """Write a structure, and an event for each of the operations that led to it."""
        if self._engine.is_main:
            write_json(self._folder.structure, structure.to_dict())
        for operation in operations:
            self.events.record(
                "removal" if operation.action == "remove" else "freeze",
                step,
                epoch=operation.epoch,
                unit=operation.unit,
                reason=operation.reason,
                channels=operation.channels,
                **self._numbers,
            )

    def written(self, checkpoint: Written, pause_s: float) -> None:
        """Record a checkpoint that is on disk."""
        self.events.record(
            "checkpoint", checkpoint.step, path=str(checkpoint.path), pause_s=pause_s, write_s=checkpoint.write_s
        )

    def interrupted(self, step: int, signal_name: str, checkpoint: Path) -> None:
        """Record that the run stops because it was asked to."""
        self.events.record("interrupt", step, signal=signal_name, checkpoint=str(checkpoint), **self.accounts.stop())

    def failed(self, step: int, error: str) -> None:
        """Record that the run ends by an error; no other rank takes part, for some may be gone.

        Args:
            step: Steps done.
            error: What it is, in one line without secrets.

        Raises:
            OSError: It cannot be recorded.
        """
        self.events.record("failure", step, error=error)

    # What came of it.

    def finish(self, step: int, structure: Structure, evaluation: Evaluation, step_times: StepTimes) -> dict[str, Any]:
        """Write the structure and the summary, and say that the run is done.

        Returns:
            Content of summary.json.
        """
        summary = {
            **self._settings(),
            **self._network(structure),
            **self._spent(),
            "accuracy": evaluation.accuracy,
            "accuracy_kind": self._data.accuracy_kind,
            "loss": evaluation.loss,
            "step_time_s": step_times.medians(),
            "steps": step,
        }
        if self._engine.is_main:
            write_json(self._folder.structure, structure.to_dict())
            write_json(self._folder.summary, summary)
        self.events.record("end", step, summary=summary)
        self.events.close()
        return summary

    def _settings(self) -> dict[str, Any]:
        config = self._config
        return {
            "run": self._folder.path.name,
            "model": config.model.name,
            "data": config.data.name,
            "data_digest": self._data.digest,
            "seed": config.seed,
            "gated": config.gate.enabled,
            "structure_given": config.model.structure is not None,
            "budget_target": config.budget.target if config.gate.enabled else None,
            "budget_unit": self._unit,
            "epochs": config.optim.epochs,
            "batch_size": config.data.batch_size,
            "precision": config.precision,
            "device": str(self._engine.device),
            "engine": self._engine.name,
            "world_size": self._engine.world_size,
        }

    def _network(self, structure: Structure) -> dict[str, Any]:
        numbers, dense = self._numbers, self._table.dense
        return {
            "params": self._cost.params,
            "params_dense": dense.params,
            "flops_forward": self._cost.flops_forward,
            "flops_forward_dense": dense.flops_forward,
            "kept_cost": numbers["structure__kept_cost"],
            "cheapest_unit_cost": self._costs.cheapest,
            "gates_left": numbers["structure__gates"],
            "blocks": numbers["structure__blocks"],
            "blocks_dense": len(self._costs.units),
            "channels": numbers["structure__channels"],
            "channels_dense": sum(self._table.channels.values()),
            "removals": [
                {
                    "unit": o.unit,
                    "step": o.step,
                    "epoch": o.epoch,
                    "reason": o.reason,
                    "channels": None if o.channels is None else len(o.channels),
                }
                for o in structure.removed()
            ],
        }

    def _spent(self) -> dict[str, Any]:
        ledger, carbon = self.accounts.ledger_now(), self.accounts.carbon
        return {
            "flops_train": ledger.flops_train,
            "flops_train_dense": ledger.flops_train_dense,
            "energy_j": ledger.energy_j,
            "energy_quality": ledger.energy_quality,
            **self.accounts.energy_figures(ledger),
            "co2_g": co2_g(ledger.energy_j, carbon),
            "carbon_intensity_g_per_kwh": carbon.g_per_kwh if carbon else None,
            "carbon_intensity_source": carbon.source if carbon else None,
            "pue": carbon.pue if carbon else None,
            "time_s": ledger.time_s,
            "attempts": ledger.attempts,
            "samples": ledger.samples,
            # Those that a loss scaler leaves out by itself are not counted: its scale alone tells of them.
            "skipped_steps": None if self._is_left_to_scaler else ledger.skipped_steps,
        }
