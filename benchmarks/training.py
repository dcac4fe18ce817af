"""A network that trains a few steps at a time, in this process: a contestant of :mod:`turns`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from greenprune.allocation import keep_freed_memory
from greenprune.config import Config
from greenprune.engine import Engine
from greenprune.flops import Cost, count_costs
from greenprune.gating import GatePolicy, attach_gates
from greenprune.models import build_model
from greenprune.network import UnitTable, unit_costs, units_present
from greenprune.optimization import build_optimizer
from greenprune.surgery import Structure, replay

keep_freed_memory()  # as a run does

Batch = tuple[Tensor, Tensor]


def kernels_s(passes: Callable[[int], object], engine: Engine, steps: int) -> float:
    """Seconds a step that the GPU's kernels take, added up from torch's profiler. Gradients are freed; a
    recorded step finds its own again.

    Args:
        passes: Does the passes of a step, given its number.
        engine: Of the network.
        steps: How many are measured, after two that are not.
    """
    for number in range(2):
        passes(number)
        engine.optimizer.zero_grad()
    engine.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for number in range(steps):
            passes(number)
            engine.optimizer.zero_grad()
        engine.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / steps


def random_batch(config: Config, image_size: int, device: torch.device, channels: int = 3) -> Batch:
    """Images [B, C, S, S] in the run's memory format and labels of ten classes, on a device."""
    torch.manual_seed(config.seed)
    images = torch.randn(config.data.batch_size, channels, image_size, image_size, device=device)
    if config.model.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, 10, (config.data.batch_size,), device=device)


class Training:
    """One network with its engine, its optimizer and, if gated, its gates' policy.

    A step is the whole of it: forward, loss with the gates' penalty, backward, optimizer, bounds. Gates stand still,
    open, so that a gated network does the same work as one without gates, apart from them.

    Args:
        config: The run.
        image_size: Side of an image in pixels.
        channels: Channels of an image.
        classes: Number of classes.
        structure: What is removed before the first step.
        build: Makes the dense network in place of ``config.model.name``.
        batches: What it trains on, in turn; default: one batch of random images.

    Attributes:
        cost: What the network costs, with its gates.
        busy_s: Processor seconds a step of each turn, over all threads of this process.
    """

    def __init__(
        self,
        config: Config,
        image_size: int,
        *,
        channels: int = 3,
        classes: int = 10,
        structure: Structure | None = None,
        build: Callable[[], nn.Module] | None = None,
        batches: list[Batch] | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        shape = (channels, image_size, image_size)
        structure = structure or Structure()
        model = (
            build() if build else build_model(config.model, classes=classes, channels=channels, image_size=image_size)
        )
        if config.gate.enabled:
            attach_gates(model, config.gate)
        table = UnitTable.of(model, shape) if config.gate.enabled else None
        replay(structure, model)
        self.cost: Cost = count_costs(model, shape)[""]
        if config.model.channels_last:
            model.to(memory_format=torch.channels_last)
        self.engine = Engine(config)
        self.engine.prepare(model, build_optimizer(config, model, total_steps=10**9))  # gates stand still
        self.engine.model.train()
        self._do_passes = self.engine.recorded(self._pass)
        self.policy = None if table is None else self._policy(config, table, structure)
        self.batches = batches or [random_batch(config, image_size, self.engine.device, channels)]
        self.busy_s: list[float] = []

    def _policy(self, config: Config, table: UnitTable, structure: Structure) -> GatePolicy:
        costs = unit_costs(table, config.budget)
        present = units_present(costs, structure)
        return GatePolicy(config, self.engine.module, costs, present, rounding={}, total_steps=10**6, window=10**6)

    def step(self, number: int = 0) -> None:
        """One whole step, on one of the batches."""
        images, labels = self.batches[number % len(self.batches)]
        if self.policy is not None:
            self.policy.begin_step(500_000, len(images) * self.engine.world_size)
        self._do_passes(images, labels, None)
        self.engine.step()
        if self.policy is not None:
            self.policy.after_step()

    def _pass(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(self.engine.model(images), labels)
        if self.policy is not None:
            penalty = self.policy.penalty_of_pass(len(images) * self.engine.world_size, self.engine.mean)
            assert penalty is not None
            loss = loss + penalty
        self.engine.backward(loss)
        return loss.detach()

    def kernels_s(self, steps: int) -> float:
        """Seconds of the GPU's kernels in forward and backward of a step, added up; nothing between them counts."""
        return kernels_s(lambda number: self._pass(*self.batches[number % len(self.batches)]), self.engine, steps)

    def turn(self, steps: int) -> float:
        """Seconds a step over some steps."""
        self.engine.synchronize()
        started_s, busy_s = time.perf_counter(), time.process_time()
        for number in range(steps):
            self.step(number)
        self.engine.synchronize()
        self.busy_s.append((time.process_time() - busy_s) / steps)
        return (time.perf_counter() - started_s) / steps
