"""One-pass gated training: train, find the sub-network, remove the rest, and account for all of it."""

from __future__ import annotations

import math
import shlex
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from greenprune.accounts import Records
from greenprune.checkpoint import Checkpoint, CheckpointCorrupt
from greenprune.config import Config, shaping_values
from greenprune.data import ImageData, derive_seed
from greenprune.engine import Engine
from greenprune.evaluation import Evaluation, evaluate
from greenprune.gating import GatePolicy, Verdict, default_window
from greenprune.interrupt import Interrupted, InterruptRequest
from greenprune.network import Network, kept_cost, units_present
from greenprune.optimization import WeightAverage, build_optimizer, build_schedule, load_optimizer
from greenprune.process_load import ProcessLoad
from greenprune.recording import Recorder, Told
from greenprune.saving import Saving
from greenprune.skipping import MOST_IN_A_ROW, StepSkipper
from greenprune.surgery import Operation, Structure, carry_out, replay, update_optimizer
from greenprune.timing import IntervalClock, StepTimes
from greenprune.tracking import Ledger

_ASK_S = 1.0  # a question to all ranks, or a look at the loss, waits for the device: once a second cannot be seen
# A loss scaler halves its scale with each gradient that is not finite, from 2^16 on: below this it is not the scale's
# fault (our choice). It knows no end, and with a scale of 0 nothing is finite.
_LEAST_LOSS_SCALE = 2.0**-14
_LOG_EVERY = 10  # steps between two train events at least, where the config does not say


class TrainingDiverged(RuntimeError):
    """The loss or its gradients are no numbers any more; the message names the last good checkpoint."""


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
        self.recorder = Recorder(config, data, engine, network, records)
        self.accounts = self.recorder.accounts
        self.saving = Saving(config.checkpoint, records.folder, engine, self.recorder.written)
        self.total_steps = config.optim.epochs * data.steps_per_epoch
        self._parts = config.optim.accumulate
        self.step = 0
        self.structure = Structure(list(network.given.operations))
        self.step_times = StepTimes()
        self.last_evaluation: Evaluation | None = None
        self.interrupt = InterruptRequest()
        self._load_of_process = ProcessLoad()
        self._step_s = 0.0
        # Steps between two questions to all ranks whether to stop, and between two train events; alike on every rank.
        self._ask_every = 1
        self._log_every = config.tracking.log_every or _LOG_EVERY
        self._told_at = 0  # step of the last train event of this attempt, or at which it began
        # Loss and hits of this epoch, and its steps that were skipped.
        self._totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
        self._seen = self._totals[:2]
        self.unit_table = network.table
        self.costs = network.costs
        self._unit_cost = network.measured
        self._round_to = network.round_to
        try:
            self._build(network.model, resume[1] if resume else None)
        except (LookupError, TypeError, ValueError) as error:
            if resume is None:
                raise
            raise CheckpointCorrupt(f"{resume[0]}: does not fit this run ({' '.join(str(error).split())})") from error
        if resume is not None:  # once it is taken up whole, and before anything tells of it
            self.saving.goes_on_from(resume[0], self.step)
        self.recorder.begin(self.step, self.structure, resume[0] if resume else None)

    # Setting up.

    def _build(self, model: nn.Module, checkpoint: Checkpoint | None) -> None:
        """Replay the structure to begin with on the dense network, then load a checkpoint's tensors and prepare."""
        config = self.config
        if checkpoint is not None:
            self.structure = Structure.from_dict(checkpoint.state["structure"])
        replay(self.structure, model)
        if checkpoint is not None:
            model.load_state_dict(checkpoint.model)
        if config.model.sync_batchnorm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        model.to(self.engine.device)
        if config.model.channels_last:
            model.to(memory_format=torch.channels_last)
        self.average = WeightAverage(model, config.optim.ema) if config.optim.ema is not None else None
        optimizer = build_optimizer(config, model, self.total_steps)
        if checkpoint is not None:
            load_optimizer(optimizer, checkpoint.training["optimizer"])
        # Before the optimizer is prepared, which for fp16 keeps the step that it finds: torch looks for the schedule's.
        self.schedule = build_schedule(config, optimizer, self.total_steps)
        self.engine.prepare(model, optimizer)
        self._do_passes = self.engine.recorded(self._pass if self._parts == 1 else self._passes)
        self.policy = self._new_policy() if config.gate.enabled else None
        self.skipper = self._new_skipper() if config.optim.nonfinite == "skip" else None
        self._structure_changed()
        self._part_from_other_ranks()
        if checkpoint is not None:
            self._load(checkpoint)

    def _part_from_other_ranks(self) -> None:
        """Draw other numbers than the other ranks from now on, for dropout; the weights were drawn alike on all."""
        if self.engine.rank > 0:
            torch.manual_seed(derive_seed(self.config.seed, "rank", self.engine.rank))

    def _new_policy(self) -> GatePolicy:
        return GatePolicy(
            self.config,
            self.engine.module,
            self.costs,
            units_present(self.costs, self.structure),
            rounding=self.unit_table.rounding(self._round_to),
            total_steps=self.total_steps,
            window=self.config.removal.window
            or default_window(self.data.steps_per_epoch, self.total_steps, self.config.data.batch_size),
            parts=self._parts,
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
            self._totals[2] *= self.engine.world_size / len(totals)  # steps left out, which every rank counts
        self.step = self._told_at = state["step"]
        self.accounts.ledger = Ledger(**state["ledger"])
        self.step_times = StepTimes(**state["step_times"])
        if state["evaluation"] is not None:
            self.last_evaluation = Evaluation(**state["evaluation"])
        if self.engine.rank < len(training["random"]):  # else there were fewer ranks
            random = training["random"][self.engine.rank]
            # Older checkpoints have the state of the host's generator alone.
            self.engine.load_random_states([random] if isinstance(random, Tensor) else random)

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
            TrainingDiverged: The loss is not finite, or its gradients are not and do not become so.
            StorageFailed: A file of the run cannot be written.
        """
        with self.interrupt, self.saving.naming_the_last(lambda: self.step):
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
            if stop or in_epoch == 0 or self._train_event_is_due():
                stop = self._record_train(clock)
            if at_boundary:
                self._at_boundary()
                clock = IntervalClock()
            if stop and in_epoch != 0:
                self._stop()

    def _train_event_is_due(self) -> bool:
        if self.config.tracking.log_every is not None:
            return self.step % self._log_every == 0
        return self.step - self._told_at >= self._log_every

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        """One optimizer step on this rank's slice of a global batch."""
        if self.skipper is not None:
            self.skipper.begin(self.engine.module)
        in_warmup = None
        if self.policy is not None and self.policy.active:
            self.policy.begin_step(self.step, self.config.data.batch_size, self._parts)
            in_warmup = self.policy.in_warmup
        seen = self._do_passes(images, labels, in_warmup)
        if self.skipper is not None:
            self.skipper.judge(self.engine.module)
        self.engine.step()
        if self.policy is not None and self.policy.active:
            self.policy.after_step()
        self.schedule.step()
        if self.skipper is None:
            self._seen += seen
        else:
            self._totals += self.skipper.end(seen.double())
        if self.average is not None:  # after the skipper: what is not finite once would never leave the average
            self.average.update(self.step, self.skipper.skipped if self.skipper is not None else None)
        self.step += 1
        self.accounts.ledger.add_step(
            self.config.data.batch_size, self.cost.flops_train, self.unit_table.dense.flops_train
        )

    def _passes(self, images: Tensor, labels: Tensor) -> Tensor:
        """The passes over the parts of a batch, whose gradients add up."""
        seen = []
        for number, (part, targets) in enumerate(
            zip(images.chunk(self._parts), labels.chunk(self._parts), strict=True)
        ):
            with self.engine.accumulating(last=number + 1 == self._parts):
                seen.append(self._pass(part, targets))
        return torch.stack(seen).sum(0)

    def _pass(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward, which adds to the gradients. May be recorded: it must not look at the device.

        Returns:
            Sum of the losses and number of hits [2], on the device.
        """
        logits = self.engine.model(images)
        task = functional.cross_entropy(logits, labels, label_smoothing=self.config.optim.label_smoothing)
        loss = task
        if self.policy is not None and self.policy.active:
            penalty = self.policy.penalty_of_pass(self.config.data.batch_size // self._parts, self.engine.mean)
            loss = task if penalty is None else task + penalty
        if self._parts > 1:
            loss = loss / self._parts
        self.engine.backward(loss if self.skipper is None else self.skipper.marked(loss))
        return torch.stack([task.detach() * len(labels), (logits.argmax(1) == labels).sum()])

    # Changing the structure.

    def _at_boundary(self) -> None:
        """End a window: record what the gates did, and carry out what follows from it."""
        assert self.policy is not None
        self._check_skipped()
        window, verdicts = self.policy.close_window(self.step)
        if not all(math.isfinite(unit.openness) for unit in window.values()):
            self._diverged(math.nan)
        if window:
            self.recorder.window(self.step, self.policy, window)
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
        self.recorder.operated(self.step, self.structure, operations, time.monotonic() - started)

    def _structure_changed(self) -> None:
        """Take up what depends on the structure: its cost, the tensors to average, and what events tell of it."""
        self.cost = self.recorder.structure_is(
            self.structure,
            self.policy.kept_cost if self.policy is not None else kept_cost(self.costs, self.structure),
        )
        if self.average is not None:
            self.average.link(self.engine.module)
        if self.policy is not None:
            self.policy.scale_losses_by(self.engine.loss_scale)

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
        self._check_skipped()
        self.saving.look()
        step_s = self._step_s = clock.seconds_per_step()
        self.step_times.add(step_s)
        self._told_at = self.step
        samples = self._samples_in_epoch(told.skipped)
        if not math.isfinite(told.loss):
            self._diverged(told.loss / samples)
        if told.loss_scale is not None and told.loss_scale < _LEAST_LOSS_SCALE:
            self._give_up(
                f"the gradients are not finite whatever the loss is scaled by (fp16; the scale has come down to "
                f"{told.loss_scale:.1e}, and steps are left out) after step {self.step}"
            )
        self.recorder.train(self.step, told, samples, step_s, float(self.schedule.get_last_lr()[0]))
        clock.restart()
        return told.signal

    def _samples_in_epoch(self, skipped: int) -> int:
        in_epoch = self.step % self.data.steps_per_epoch or self.data.steps_per_epoch
        return max(1, in_epoch - skipped) * self.config.data.batch_size

    def _check_skipped(self) -> None:
        """Stop, on every rank alike, where skipping steps does not help; the device is read beside it anyway."""
        skipped = 0 if self.skipper is None else self.skipper.in_a_row
        if skipped >= min(self.total_steps, MOST_IN_A_ROW):
            self._give_up(
                f"the gradients of {skipped} steps in a row, up to step {self.step}, were not finite, and all of them "
                "were skipped (optim.nonfinite skip)"
            )

    def _read(self) -> Told:
        """What all ranks have to tell since the epoch began, in one collective; waits for the device.

        Raises:
            OSError: A checkpoint could not be written, known to all ranks.
        """
        engine = self.engine
        price = self.policy.controller.price if self.policy is not None else torch.zeros((), device=engine.device)
        loads = self._load_of_process.among(engine.rank, engine.world_size, engine.device_memory)
        scale = engine.loss_scale
        scales = self._totals[:0] if scale is None else scale.double().view(1)  # alike on all ranks
        told = [self.interrupt.signal, self._step_s, self.saving.failed, *loads]
        mine = torch.tensor(told, dtype=torch.float64, device=engine.device)
        shared = engine.sum(torch.cat([self._totals, mine]))
        values = torch.cat([scales, price.double().view(1), shared]).tolist()
        loss_scale = None if scale is None else values.pop(0)
        price_now, loss, hits, skipped, stop, step_s, failed, *loads = values
        if failed:
            self.saving.wait()
        self._ask_again_after(step_s)
        price_known = price_now if self.policy is not None else None
        return Told(loss, hits, round(skipped / engine.world_size), price_known, loss_scale, int(stop), loads)

    def _ask_again_after(self, step_s: float) -> None:
        """Set after how many steps ranks look up again; ``step_s`` is the sum over the ranks, alike on all."""
        self._ask_every = max(1, int(_ASK_S * self.engine.world_size / step_s)) if step_s else 1
        if self.config.tracking.log_every is None:
            self._log_every = max(_LOG_EVERY, self._ask_every)

    def _record_epoch(self, epoch: int) -> None:
        assert self.last_evaluation is not None
        told = self._read()
        samples = self._samples_in_epoch(told.skipped)
        self.recorder.epoch(self.step, epoch + 1, told, samples, self.last_evaluation)
        self._totals.zero_()

    def _diverged(self, loss: float) -> None:
        self._give_up(f"the loss, a weight or a statistic of it is {loss} after step {self.step}")

    def _give_up(self, why: str) -> None:
        raise TrainingDiverged(f"{why}; {self.saving.last()}. A smaller optim.lr or optim.clip_norm may help")

    # Saving and stopping.

    def _checkpoint(self) -> Path:
        """Take a checkpoint, unless this step has one; rank 0 writes it while all go on.

        Raises:
            TrainingDiverged: A parameter is not finite.
            OSError: The one before could not be written.
        """
        path = self.folder.checkpoints / f"step-{self.step:09d}"
        if self.saving.has(self.step):
            return path
        started = time.monotonic()
        with self.meter.window("checkpoint"):
            self.saving.wait()
            self.engine.sync_buffers(self.engine.module)
            # Statistics too, which are alike on all ranks now: a variance is infinite long before its weights are.
            buffers = [buffer for buffer in self.engine.module.buffers() if buffer.is_floating_point()]
            size = float(torch.nn.utils.get_total_norm([*self.engine.module.parameters(), *buffers]))
            if not math.isfinite(size):
                self._diverged(size)
            if self.average is not None:
                self.engine.sync_buffers(self.average.module)
            of_ranks = self.engine.gather_objects((self.engine.random_states(), self._totals.cpu()))
            snapshot = self._snapshot(of_ranks, self.accounts.ledger_now())
            self.saving.begin(self.step, snapshot, self._score(), started)
        return path

    def _score(self) -> float | None:
        """Accuracy of the network as it is; None within an epoch, where it is not known."""
        within = self.step % self.data.steps_per_epoch != 0
        return None if within or self.last_evaluation is None else self.last_evaluation.accuracy

    def _snapshot(self, of_ranks: list[tuple[list[Tensor], Tensor]], ledger: Ledger) -> Checkpoint:
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
            "data": self.data.digest,
            "structure": self.structure.to_dict(),
            "unit_cost": None if self._unit_cost is None else self._unit_cost.to_dict(),
            "round_to": self._round_to,
            "ledger": ledger.to_dict(),
            "step_times": asdict(self.step_times),
            "evaluation": asdict(self.last_evaluation) if self.last_evaluation else None,
        }
        return Checkpoint(self.engine.module.state_dict(), training, state)

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop, known to all."""
        mine = torch.tensor([self.interrupt.signal, self._step_s], dtype=torch.float64, device=self.engine.device)
        stop, step_s = self.engine.sum(mine).tolist()
        self._ask_again_after(step_s)
        return bool(stop)

    def _stop(self) -> None:
        path = self._checkpoint()
        self.saving.wait()
        number = max(self.engine.gather_objects(self.interrupt.signal)) or signal.SIGTERM
        name = signal.Signals(number).name
        self.recorder.interrupted(self.step, name, path)
        raise Interrupted(
            number,
            f"stopped by {name} after step {self.step} of {self.total_steps}; {path} is written. "
            f"Go on with the same command and --resume auto --run_name {shlex.quote(self.folder.path.name)}",
        )

    def _finish(self) -> dict[str, Any]:
        """Wait for the last checkpoint, and tell what came of the run."""
        assert self.last_evaluation is not None
        self.saving.wait()
        return self.recorder.finish(self.step, self.structure, self.last_evaluation, self.step_times)

    def close(self) -> None:
        """Finish the checkpoint in hand and close the log; may be called twice."""
        self.saving.close()
        self.recorder.events.close()
