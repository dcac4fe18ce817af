"""One-pass gated training: train, find the sub-network, remove the rest, and account for all of it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from greenprune.accounts import Accounts, Records
from greenprune.checkpoint import Checkpoint, CheckpointCorrupt, CheckpointWriter, Written, list_checkpoints
from greenprune.config import Config, shaping_values
from greenprune.data import ImageData
from greenprune.energy import co2_g
from greenprune.engine import Engine
from greenprune.evaluation import Evaluation, evaluate
from greenprune.gating import GatePolicy, Verdict, by_gate, find_gates
from greenprune.interrupt import Interrupted, InterruptRequest
from greenprune.models import residual_blocks
from greenprune.network import Network, units_present
from greenprune.optimization import WeightAverage, build_optimizer, build_schedule
from greenprune.process_load import ProcessLoad, by_rank
from greenprune.skipping import MOST_IN_A_ROW, StepSkipper
from greenprune.surgery import Operation, Structure, carry_out, replay, update_optimizer
from greenprune.timing import IntervalClock, StepTimes
from greenprune.tracking import Event, EventLog, Ledger, salvage_events, write_json

_ASK_S = 1.0  # a question to all ranks waits for the device: once a second costs nothing that can be seen


class TrainingDiverged(RuntimeError):
    """The loss is not a number any more; the message names the last good checkpoint."""


class StorageFailed(OSError):
    """A file of the run cannot be written any more; the message names the last good checkpoint.

    Attributes:
        known_to_all: Whether all ranks have the same to say.
    """

    known_to_all = False


class _Told(NamedTuple):
    """What all ranks have told.

    Attributes:
        loss: Sum over the samples of the epoch so far.
        hits: The same of those that were recognised.
        skipped: Steps of the epoch that were left out.
        price: The price of kept cost, if there are gates.
        signal: A signal that asks to stop, or 0.
        loads: The load of each rank's process.
    """

    loss: float
    hits: float
    skipped: int
    price: float | None
    signal: int
    loads: list[float]


class Trainer:
    """Trains one network and removes what it does not need while it trains.

    Args:
        config: The run.
        data: The data set, on the device.
        engine: The engine, not yet prepared.
        network: The network, from :func:`prepare_network`.
        records: Where its figures come from and go.
        resume: Checkpoint to go on from, and its path.
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        engine: Engine,
        network: Network,
        records: Records,
        resume: tuple[Path, Checkpoint] | None,
    ) -> None:
        self.config = config
        self.data = data
        self.engine = engine
        self.folder = records.folder
        self.meter = records.meter
        self.accounts = Accounts(engine, records.meter, records.carbon, records.slurm_job)
        self.notes = [*network.notes, *records.notes]
        self.total_steps = config.optim.epochs * data.steps_per_epoch
        self.step = 0
        self._saved_step = -1
        self.structure = Structure()
        self.step_times = StepTimes()
        self.last_evaluation: Evaluation | None = None
        self.interrupt = InterruptRequest()
        self._load_of_process = ProcessLoad()
        self._step_s = 0.0
        self._ask_every = 1  # steps between two questions to all ranks whether to stop, the same on every rank
        # Loss and hits of this epoch, and its steps that were skipped.
        self._totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
        self.unit_table = network.table
        self.costs = network.costs
        kept = config.checkpoint
        self.writer = CheckpointWriter(self.folder.checkpoints, kept.keep_last, kept.keep_best, self.folder.events)
        self._pause_s: float | None = None  # of the checkpoint that is being written
        try:
            self._build(network.model, resume[1] if resume else None)
        except (LookupError, TypeError, ValueError) as error:
            if resume is None:
                raise
            raise CheckpointCorrupt(f"{resume[0]}: does not fit this run ({' '.join(str(error).split())})") from error
        previous, damaged = salvage_events(self.folder.events)
        self.events = EventLog(self.folder.events if engine.is_main else None, records.mirrors)
        self.accounts.add_earlier_attempts(previous, complete=not damaged)
        self.notes += self._notes_on_resuming(previous, damaged)
        self._record_start(resume[0] if resume else None)
        if resume is not None:
            self._catch_up(resume[0], previous)

    # Setting up.

    def _build(self, model: nn.Module, checkpoint: Checkpoint | None) -> None:
        """Replay a checkpoint's structure on the dense network, then load its tensors and prepare."""
        config = self.config
        if checkpoint is not None:
            self.structure = Structure.from_dict(checkpoint.state["structure"])
            replay(self.structure, model)
            model.load_state_dict(checkpoint.model)
        if config.model.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        model.to(self.engine.device)
        if config.model.channels_last:
            model.to(memory_format=torch.channels_last)
        self.average = WeightAverage(model, config.optim.ema) if config.optim.ema is not None else None
        optimizer = build_optimizer(config, model, self.total_steps)
        if checkpoint is not None:
            optimizer.load_state_dict(checkpoint.training["optimizer"])
        self.engine.prepare(model, optimizer)
        self.schedule = build_schedule(config, self.engine.optimizer, self.total_steps)
        self.policy = self._new_policy() if config.gate.enabled else None
        self.skipper = self._new_skipper() if config.optim.nonfinite == "skip" else None
        self._structure_changed()
        if checkpoint is not None:
            self._load(checkpoint)

    def _new_policy(self) -> GatePolicy:
        return GatePolicy(
            self.config,
            self.engine.module,
            self.costs,
            units_present(self.costs, self.structure),
            rounding=self.unit_table.rounding(self.config.surgery, self.engine.device),
            total_steps=self.total_steps,
            window=self.config.removal.window or self.data.steps_per_epoch,
            parts=self.config.optim.accumulate,
        )

    def _new_skipper(self) -> StepSkipper:
        engine = self.engine
        return StepSkipper(engine.optimizer, self.policy, scaled=engine.loss_scale is not None, device=engine.device)

    def _load(self, checkpoint: Checkpoint) -> None:
        """Take up everything but the network's tensors from a checkpoint."""
        training, state = checkpoint.training, checkpoint.state
        self.engine.load_scaler_state(training["scaler"])
        self.schedule.load_state_dict(training["schedule"])
        for group, lr in zip(self.engine.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr  # building the schedule has set the rate of the first step
        if self.average is not None:
            self.average.module.load_state_dict(training["average"])
        if self.policy is not None:
            self.policy.load_state_dict(training["policy"])
        totals = training["totals"]
        if len(totals) == self.engine.world_size:
            self._totals.copy_(totals[self.engine.rank])
        elif self.engine.is_main:
            self._totals.copy_(torch.stack(totals).sum(0))
        self.step = self._saved_step = state["step"]
        self.accounts.ledger = Ledger(**state["ledger"])
        self.step_times = StepTimes(**state["step_times"])
        if state["evaluation"] is not None:
            self.last_evaluation = Evaluation(**state["evaluation"])
        torch.set_rng_state(training["random"][min(self.engine.rank, len(training["random"]) - 1)])

    def _notes_on_resuming(self, previous: list[Event], damaged: list[str]) -> list[str]:
        """What going on costs: steps that are done again, lines of the log that tell nothing any more."""
        notes = [f"{self.folder.events}: {line}; what was spent is a lower bound now" for line in damaged]
        reached = max((event["step"] for event in previous), default=0)
        if reached > self.step:
            since = "the beginning" if self.step == 0 else f"the checkpoint at step {self.step}"
            notes.append(f"the run had come to step {reached}: the {reached - self.step} steps since {since} are lost")
        return notes

    def _catch_up(self, path: Path, previous: list[Event]) -> None:
        """Bring the files of the run to the checkpoint: an attempt that was killed may have been behind or ahead."""
        if self.engine.is_main and self.folder.structure.exists():
            write_json(self.folder.structure, self.structure.to_dict())
        if not any(event["kind"] == "checkpoint" and event["step"] == self.step for event in previous):
            self.events.record("checkpoint", self.step, path=str(path), pause_s=None, write_s=None)

    def _record_start(self, resumed_from: Path | None) -> None:
        config = self.config
        self.events.record(
            "start",
            self.step,
            run=self.folder.path.name,
            attempt=self.accounts.ledger.attempts,
            resumed_from=str(resumed_from) if resumed_from else None,
            model=config.model.name,
            data=config.data.name,
            gated=config.gate.enabled,
            budget_target=config.budget.target if config.gate.enabled else None,
            budget_unit=config.budget.unit,
            precision=config.precision,
            device=str(self.engine.device),
            engine=self.engine.name,
            world_size=self.engine.world_size,
            batch_size=config.data.batch_size,
            train_samples=self.data.train_samples,
            eval_samples=self.data.eval_samples,
            accuracy_kind=self.data.accuracy_kind,
            classes=self.data.classes,
            image_shape=[self.data.channels, self.data.image_size, self.data.image_size],
            epochs=config.optim.epochs,
            steps_per_epoch=self.data.steps_per_epoch,
            units=list(self.costs.units),
            channels=self.costs.channels,
            energy_sources=self.accounts.sources(),
            notes=[*self.meter.notes, *self.notes],
            **self._structure_numbers,
            **self.accounts.begin(),
            flops__forward_dense=self.unit_table.dense.flops_forward,
            structure__params_dense=self.unit_table.dense.params,
        )

    # The run.

    def fit(self) -> dict[str, Any]:
        """Train to the end, or until asked to stop, and return the summary.

        ::

            for each epoch
                for each batch: loss = task + gate penalty; backward; step; count FLOPs
                                at a removal boundary: decide, operate, rebuild the engine, recount, record
                evaluate; record; checkpoint

        Raises:
            Interrupted: A signal asked to stop; a checkpoint is written.
            TrainingDiverged: The loss is not finite.
            StorageFailed: A file of the run cannot be written.
        """
        with self.interrupt, self._naming_the_last_checkpoint():
            for epoch in range(self.step // self.data.steps_per_epoch, self.config.optim.epochs):
                with self.meter.window("train"):
                    self._train_epoch(epoch)
                with self.meter.window("eval"):
                    self.last_evaluation = evaluate(self.engine, self.data, self._model_to_evaluate)
                if not math.isfinite(self.last_evaluation.loss):
                    self._diverged(self.last_evaluation.loss)
                self._record_epoch(epoch)
                last = epoch + 1 == self.config.optim.epochs
                if last or (epoch + 1) % self.config.checkpoint.every == 0:
                    self._checkpoint()
                if not last and self._stop_agreed():
                    self._stop()
            return self._finish()

    def _train_epoch(self, epoch: int) -> None:
        """All batches of an epoch, or those that a resumed run still has to do."""
        first = self.step % self.data.steps_per_epoch
        batches = self.data.train_batches(epoch, first, rank=self.engine.rank, world_size=self.engine.world_size)
        self.engine.model.train()
        clock = IntervalClock()
        for images, labels in batches:
            self._train_step(images, labels)
            clock.steps += 1
            in_epoch = self.step % self.data.steps_per_epoch
            at_boundary = self.policy is not None and self.policy.at_boundary(self.step)
            if self.engine.world_size == 1:
                stop = self.interrupt.signal
            else:  # ranks must stop after the same step
                stop = self.step % self._ask_every == 0 and self._stop_agreed()
            if stop or in_epoch == 0 or self.step % self.config.tracking.log_every == 0:
                stop = self._record_train(clock)
            if at_boundary:
                self._at_boundary()
                clock = IntervalClock()
            if stop and in_epoch != 0:
                self._stop()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step on this rank's slice of a global batch."""
        parts = self.config.optim.accumulate
        if self.skipper is not None:
            self.skipper.begin(self.engine.module)
        seen = torch.zeros(2, device=self.engine.device)
        for number, (part, targets) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            with self.engine.accumulating(last=number + 1 == parts):
                seen = seen + self._pass(part, targets) if parts > 1 else self._pass(part, targets)
        if self.skipper is not None:
            self.skipper.judge(self.engine.module)
        self.engine.step()
        if self.policy is not None and self.policy.active:
            self.policy.after_step()
        if self.average is not None:
            self.average.update(self.step, self.skipper.skipped if self.skipper is not None else None)
        self.schedule.step()
        if self.skipper is None:
            self._totals[:2] += seen
        else:
            self._totals += self.skipper.end(seen.double())
        self.step += 1
        self.accounts.ledger.add_step(
            self.config.data.batch_size, self.cost.flops_train, self.unit_table.dense.flops_train
        )

    def _pass(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward, which adds to the gradients.

        Returns:
            Sum of the losses and number of hits [2], on the device.
        """
        parts = self.config.optim.accumulate
        logits = self.engine.model(images)
        task = functional.cross_entropy(logits, labels, label_smoothing=self.config.optim.label_smoothing)
        loss = task
        if self.policy is not None and self.policy.active:
            penalty = self.policy.penalty(self.step, self.config.data.batch_size // parts, self.engine.mean)
            loss = task if penalty is None else task + penalty
        if parts > 1:
            loss = loss / parts
        self.engine.backward(loss if self.skipper is None else self.skipper.marked(loss))
        return torch.stack([task.detach() * len(labels), (logits.argmax(1) == labels).sum()])

    # Changing the structure.

    def _at_boundary(self) -> None:
        """End a window: record what the gates did, and carry out what follows from it."""
        assert self.policy is not None
        self._check_skipped(self.policy.window)
        window, verdicts = self.policy.close_window(self.step)
        if not all(math.isfinite(unit.openness) for unit in window.values()):
            self._diverged(math.nan)
        self.events.record(
            "window",
            self.step,
            gate__price=self.policy.controller.price.item(),
            gate__target=self.policy.controller.target_at(self.step),
            structure__kept_cost=self.policy.kept_cost,
            units=by_gate(window),
        )
        if verdicts:
            with self.meter.window("surgery"):
                self._operate(verdicts)

    def _operate(self, verdicts: list[Verdict]) -> None:
        """Carry verdicts out on the network, the optimizer and the engine, alike on every rank."""
        assert self.policy is not None
        started = time.monotonic()
        epoch = self.step / self.data.steps_per_epoch
        operations = [Operation.of(verdict, self.step, epoch) for verdict in verdicts]
        self.structure.operations += operations
        self.engine.check_agreement("the structure", self.structure.checksum())

        def operate(model: nn.Module, optimizer: Optimizer) -> None:
            update_optimizer(optimizer, carry_out(operations, model))
            if self.average is not None:
                carry_out(operations, self.average.module)

        self.engine.rebuild(operate)
        self.policy.carried_out(self.engine.module, verdicts)
        self._structure_changed()
        if any(verdict.action == "remove" for verdict in verdicts):
            self.step_times.cut()
        if self.engine.is_main:
            write_json(self.folder.structure, self.structure.to_dict())
        for operation in operations:
            kind = "removal" if operation.action == "remove" else "freeze"
            self.events.record(
                kind,
                self.step,
                epoch=epoch,
                unit=operation.unit,
                reason=operation.reason,
                channels=operation.channels,
                **self._structure_numbers,
            )
        self.events.record("surgery", self.step, pause_s=time.monotonic() - started)

    def _structure_changed(self) -> None:
        """Take up what depends on the structure: its cost, and the numbers that events tell of it."""
        self.cost = self.unit_table.cost_of(self.structure)
        if self.average is not None:
            self.average.link(self.engine.module)
        if self.policy is not None:
            self.policy.scale_losses_by(self.engine.loss_scale)
        self._structure_numbers = {
            "structure__blocks": len(residual_blocks(self.engine.module)),
            "structure__gates": len(find_gates(self.engine.module)),
            "structure__channels": sum(self.unit_table.channels_left(self.structure).values()),
            "structure__params": self.cost.params,
            "structure__kept_cost": self.policy.kept_cost if self.policy is not None else 1.0,
            "flops__forward": self.cost.flops_forward,
        }

    @property
    def _model_to_evaluate(self) -> nn.Module:
        return self.engine.module if self.average is None else self.average.module

    # Recording.

    def _record_train(self, clock: IntervalClock) -> int:
        """Read the device, record progress since the epoch began, and agree on whether to stop.

        Returns:
            The signal that asked any rank to stop, or 0.
        """
        told = self._read()
        self._check_skipped(self.total_steps)
        self._record_written(self.writer.take())
        step_s = self._step_s = clock.seconds_per_step()
        self.step_times.add(step_s)
        clock.restart()
        samples = self._samples_in_epoch(told.skipped)
        if not math.isfinite(told.loss):
            self._diverged(told.loss / samples)
        self.events.record(
            "train",
            self.step,
            epoch=self.step / self.data.steps_per_epoch,
            train__loss=told.loss / samples,
            train__accuracy=told.hits / samples,
            train__lr=self.schedule.get_last_lr()[0],
            train__samples_per_s=self.config.data.batch_size / step_s,
            train__step_time_s=step_s,
            **self._skipped_numbers(told.skipped),
            gate__price=told.price,
            **self._structure_numbers,
            **self.accounts.numbers(),
            **by_rank(told.loads),
        )
        return told.signal

    def _samples_in_epoch(self, skipped: int) -> int:
        in_epoch = self.step % self.data.steps_per_epoch or self.data.steps_per_epoch
        return max(1, in_epoch - skipped) * self.config.data.batch_size

    def _skipped_numbers(self, skipped: int) -> dict[str, int]:
        return {} if self.skipper is None else {"train__skipped_steps": self.accounts.ledger.skipped_steps + skipped}

    def _check_skipped(self, window: int) -> None:
        """Stop, on every rank alike, where skipping steps does not help; the device is read beside it anyway."""
        if self.skipper is not None and self.skipper.in_a_row >= min(window, MOST_IN_A_ROW):
            self._diverged(math.nan)

    def _read(self) -> _Told:
        """What all ranks have to tell since the epoch began, in one collective; waits for the device.

        Raises:
            OSError: A checkpoint could not be written, known to all ranks.
        """
        engine = self.engine
        price = self.policy.controller.price if self.policy is not None else torch.zeros((), device=engine.device)
        loads = self._load_of_process.among(engine.rank, engine.world_size, engine.device_memory)
        told = [self.interrupt.signal, self._step_s, self.writer.failed, *loads]
        mine = torch.tensor(told, dtype=torch.float64, device=engine.device)
        shared = engine.sum(torch.cat([self._totals, mine]))
        loss, hits, skipped, stop, step_s, failed, *loads, price_now = torch.cat(
            [shared, price.double().view(1)]
        ).tolist()
        if failed:
            self._await_checkpoint()
        self._ask_every = max(1, int(_ASK_S * engine.world_size / step_s)) if step_s else 1
        price_known = price_now if self.policy is not None else None
        return _Told(loss, hits, round(skipped / engine.world_size), price_known, int(stop), loads)

    def _record_epoch(self, epoch: int) -> None:
        assert self.last_evaluation is not None
        told = self._read()
        samples = self._samples_in_epoch(told.skipped)
        self.accounts.ledger.skipped_steps += told.skipped
        self.events.record(
            "epoch",
            self.step,
            epoch=epoch + 1,
            train__loss=told.loss / samples,
            train__accuracy=told.hits / samples,
            eval__loss=self.last_evaluation.loss,
            eval__accuracy=self.last_evaluation.accuracy,
            **self._structure_numbers,
            **self.accounts.end_epoch(),
        )
        self._totals.zero_()

    def _diverged(self, loss: float) -> None:
        raise TrainingDiverged(
            f"the loss or a weight is {loss} after step {self.step}; {self._last_checkpoint()}. "
            "A smaller optim.lr or optim.clip_norm may help"
        )

    # Saving and stopping.

    def _checkpoint(self) -> Path:
        """Take a checkpoint, unless this step has one; rank 0 writes it while all go on.

        Raises:
            TrainingDiverged: A parameter is not finite.
            OSError: The one before could not be written.
        """
        path = self.folder.checkpoints / f"step-{self.step:09d}"
        if self._saved_step == self.step:
            return path
        started = time.monotonic()
        with self.meter.window("checkpoint"):
            self._await_checkpoint()
            size = float(torch.nn.utils.get_total_norm(self.engine.module.parameters()))
            if not math.isfinite(size):
                self._diverged(size)
            self.engine.sync_buffers(self.engine.module)
            if self.average is not None:
                self.engine.sync_buffers(self.average.module)
            of_ranks = self.engine.gather_objects((torch.get_rng_state(), self._totals.cpu()))
            snapshot = self._snapshot(of_ranks, self.accounts.ledger_now())
            if self.engine.is_main:
                self.writer.begin(self.step, snapshot, self._score())
        self._saved_step = self.step
        self._pause_s = time.monotonic() - started
        return path

    def _score(self) -> float | None:
        """Accuracy of the network as it is; None within an epoch, where it is not known."""
        within = self.step % self.data.steps_per_epoch != 0
        return None if within or self.last_evaluation is None else self.last_evaluation.accuracy

    def _await_checkpoint(self) -> None:
        """Wait until the checkpoint in hand is on disk; all ranks call it.

        Raises:
            OSError: It could not be written.
        """
        self._record_written(self.engine.together(self.writer.wait, main_only=True))

    def _record_written(self, written: Written | None) -> None:
        if written is not None:
            self.events.record(
                "checkpoint", written.step, path=str(written.path), pause_s=self._pause_s, write_s=written.write_s
            )

    def _last_checkpoint(self) -> str:
        self.writer.close()
        good = list_checkpoints(self.folder.checkpoints)
        return f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"

    @contextmanager
    def _naming_the_last_checkpoint(self) -> Iterator[None]:
        """Have an error of the file system say where the run can go on from."""
        try:
            yield
        except OSError as error:
            failed = StorageFailed(
                f"{error.filename or self.folder.path}: {error.strerror or error} after step {self.step}; "
                f"{self._last_checkpoint()}. Once there is room to write, go on with the same command and "
                f"--resume auto --run_name {self.folder.path.name}"
            )
            failed.known_to_all = getattr(error, "known_to_all", False)
            raise failed from error

    def _snapshot(self, of_ranks: list[tuple[Tensor, Tensor]], ledger: Ledger) -> Checkpoint:
        training = {
            "optimizer": self.engine.optimizer_state(),
            "scaler": self.engine.scaler_state(),
            "schedule": self.schedule.state_dict(),
            "policy": self.policy.state_dict() if self.policy is not None else None,
            "average": self.average.module.state_dict() if self.average is not None else None,
            "random": [random for random, _ in of_ranks],
            "totals": [totals for _, totals in of_ranks],
        }
        state = {
            "step": self.step,
            "config": shaping_values(self.config.to_dict()),
            "structure": self.structure.to_dict(),
            "ledger": ledger.to_dict(),
            "step_times": vars(self.step_times),
            "evaluation": vars(self.last_evaluation) if self.last_evaluation else None,
        }
        return Checkpoint(self.engine.module.state_dict(), training, state)

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop, known to all."""
        mine = torch.tensor([self.interrupt.signal, self._step_s], dtype=torch.float64, device=self.engine.device)
        stop, step_s = self.engine.sum(mine).tolist()
        self._ask_every = max(1, int(_ASK_S * self.engine.world_size / step_s)) if step_s else 1
        return bool(stop)

    def _stop(self) -> None:
        path = self._checkpoint()
        self._await_checkpoint()
        number = max(self.engine.gather_objects(self.interrupt.signal)) or signal.SIGTERM
        name = signal.Signals(number).name
        self.events.record("interrupt", self.step, signal=name, checkpoint=str(path), **self.accounts.numbers())
        raise Interrupted(
            number,
            f"stopped by {name} after step {self.step} of {self.total_steps}; {path} is written. "
            f"Go on with the same command and --resume auto --run_name {self.folder.path.name}",
        )

    def _finish(self) -> dict[str, Any]:
        """Write the structure and the summary, and say that the run is done."""
        self._await_checkpoint()
        summary = self._summary(self.accounts.ledger_now())
        if self.engine.is_main:
            write_json(self.folder.structure, self.structure.to_dict())
            write_json(self.folder.summary, summary)
        self.events.record("end", self.step, summary=summary)
        self.events.close()
        return summary

    def _summary(self, ledger: Ledger) -> dict[str, Any]:
        config, dense = self.config, self.unit_table.dense
        assert self.last_evaluation is not None
        energy_j, carbon = ledger.energy_j, self.accounts.carbon
        return {
            "run": self.folder.path.name,
            "model": config.model.name,
            "data": config.data.name,
            "seed": config.seed,
            "gated": config.gate.enabled,
            "accuracy": self.last_evaluation.accuracy,
            "accuracy_kind": self.data.accuracy_kind,
            "loss": self.last_evaluation.loss,
            "params": self.cost.params,
            "params_dense": dense.params,
            "flops_forward": self.cost.flops_forward,
            "flops_forward_dense": dense.flops_forward,
            "flops_train": ledger.flops_train,
            "flops_train_dense": ledger.flops_train_dense,
            "kept_cost": self.policy.kept_cost if self.policy is not None else 1.0,
            "cheapest_unit_cost": self.costs.cheapest,
            "budget_target": config.budget.target if config.gate.enabled else None,
            "budget_unit": config.budget.unit,
            "gates_left": len(find_gates(self.engine.module)),
            "blocks": len(residual_blocks(self.engine.module)),
            "blocks_dense": len(self.costs.units),
            "channels": sum(self.unit_table.channels_left(self.structure).values()),
            "channels_dense": sum(self.unit_table.channels.values()),
            "removals": [
                {
                    "unit": o.unit,
                    "step": o.step,
                    "epoch": o.epoch,
                    "reason": o.reason,
                    "channels": None if o.channels is None else len(o.channels),
                }
                for o in self.structure.removed()
            ],
            "energy_j": energy_j,
            "energy_quality": ledger.energy_quality,
            **self.accounts.energy_figures(ledger),
            "co2_g": co2_g(energy_j, carbon),
            "carbon_intensity_g_per_kwh": carbon.g_per_kwh if carbon else None,
            "carbon_intensity_source": carbon.source if carbon else None,
            "pue": carbon.pue if carbon else None,
            "time_s": ledger.time_s,
            "step_time_s": self.step_times.medians(),
            "attempts": ledger.attempts,
            "samples": ledger.samples,
            "steps": self.step,
            "skipped_steps": ledger.skipped_steps,
            "epochs": config.optim.epochs,
            "batch_size": config.data.batch_size,
            "precision": config.precision,
            "device": str(self.engine.device),
            "engine": self.engine.name,
            "world_size": self.engine.world_size,
        }
