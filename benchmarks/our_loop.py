"""The whole training loop of greenprune as a contestant: what ``greenprune train`` does, a turn at a time.

    python benchmarks/our_loop.py --config configs/digits.yaml --gate.enabled false

Takes the flags of ``greenprune train``. Nothing is left out: metering, events, checkpoints, the progress display.
Beside steps it does, on the network as it is, forward and backward alone ("kernels"), and tells the memory of a step
("memory").
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from memory import kept_by, peak_of_tensors, peak_rss
from process import Pacer
from torch.nn import functional
from training import kernels_s

import greenprune.run
from greenprune.command import run_command
from greenprune.trainer import Trainer


class PacedTrainer(Trainer):
    """A trainer that does its steps when they are asked for."""

    pacer: Pacer

    def __init__(self, *args: Any) -> None:
        pacer = self.pacer
        super().__init__(*args)
        engine, data, all_batches = self.engine, self.data, self.data.train_batches
        pacer.others |= {"kernels": self._kernels, "memory": self._memory}
        pacer.synchronize = engine.synchronize
        self._batch = next(iter(all_batches(0)))
        data.train_batches = lambda *of, **share: pacer.pace(all_batches(*of, **share))  # type: ignore[method-assign]
        gated = self.policy is not None
        pacer.ready(flops_train=self.cost.flops_train, params=self.cost.params, gated=gated)

    def _forward_backward(self) -> None:
        images, labels = self._batch
        self.engine.backward(functional.cross_entropy(self.engine.model(images), labels))
        self.engine.optimizer.zero_grad()

    def _kernels(self, steps: int) -> dict[str, Any]:
        """Seconds of forward and backward of one batch, without anything else of a step.

        On a GPU those of their kernels alone: as a graph they run without the host, which kernels launched one by one
        would wait for.
        """
        if self.engine.device.type == "cuda":
            return {"step_s": kernels_s(lambda _: self._forward_backward(), self.engine, steps), "busy_s": 1.0}
        self.engine.synchronize()
        started_s, busy_s = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._forward_backward()
        self.engine.synchronize()
        wall_s, busy_s = time.perf_counter() - started_s, time.process_time() - busy_s
        return {"step_s": wall_s / steps, "busy_s": busy_s / steps}

    def _memory(self, steps: int) -> dict[str, Any]:
        """Most bytes that whole steps need: of tensors, and of the process."""
        engine, batch = self.engine, self._batch
        if engine.device.type == "cuda":  # before the step is recorded, and after the optimizer has made its state
            self._train_step(*batch)
            tensors = peak_of_tensors(lambda: self._train_step(*batch), engine.device)
        rss = peak_rss(lambda: [self._train_step(*batch) for _ in range(steps)])
        if engine.device.type != "cuda":
            tensors = peak_of_tensors(lambda: self._train_step(*batch), engine.device)
        return {"rss": rss, "tensors": tensors + kept_by(engine.module, engine.optimizer)}


def main() -> None:
    PacedTrainer.pacer = Pacer()
    greenprune.run.Trainer = PacedTrainer  # type: ignore[misc]
    sys.exit(run_command(sys.argv[1:], os.environ, "our_loop.py"))


if __name__ == "__main__":
    main()
