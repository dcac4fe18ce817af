"""Removals without end in one process: what a rebuild must not leave behind."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass

import psutil
import torch
from torch import nn

from greenprune.config import Config, GateConfig, ModelConfig
from greenprune.engine import Engine
from greenprune.gating import attach_gates
from greenprune.models import build_model, residual_blocks
from greenprune.optimization import build_optimizer
from greenprune.surgery import Operation, carry_out, update_optimizer


@dataclass(frozen=True)
class Level:
    """What a process holds.

    Attributes:
        removals: How many there have been.
        bytes: Memory of its own.
        handles: Open files.
        threads: Threads.
        objects: Modules and tensors alive.
        hooks: Hooks on the modules alive.
    """

    removals: int
    bytes: int
    handles: int
    threads: int
    objects: int
    hooks: int


def measure(removals: int) -> Level:
    """What this process holds now."""
    gc.collect()
    alive = [found for found in gc.get_objects() if isinstance(found, nn.Module | torch.Tensor)]
    modules = [found for found in alive if isinstance(found, nn.Module)]
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    process = psutil.Process()
    return Level(
        removals, process.memory_full_info().uss, process.num_fds(), threading.active_count(), len(alive), hooks
    )


def soak(removals: int, warm_up: int, every: int) -> list[Level]:
    """Train tiny networks, remove their blocks one at a time, rebuild, and begin with the next one.

    Args:
        removals: How many removals and rebuilds in all.
        warm_up: After how many of them the first level is taken.
        every: After how many more the next.
    """
    config = Config(device="cpu", model=ModelConfig("resnet20"), gate=GateConfig(units=["block", "channel"]))
    images = torch.randn(2, 1, 8, 8)
    levels: list[Level] = []
    done = 0
    while done < removals:
        model = build_model(config.model, classes=10, channels=1, image_size=8)
        attach_gates(model, config.gate)
        engine = Engine(config)
        engine.prepare(model, build_optimizer(config, model, total_steps=100))
        del model
        for name in list(residual_blocks(engine.module)):
            engine.backward(engine.model(images).square().mean())
            engine.step()
            operation = Operation("remove", name, done, 0.0, "off")

            def operate(module: nn.Module, optimizer: torch.optim.Optimizer, operation: Operation = operation) -> None:
                update_optimizer(optimizer, carry_out([operation], module))

            engine.rebuild(operate)
            done += 1
            if done >= warm_up and (done - warm_up) % every == 0:
                levels.append(measure(done))
            if done == removals:
                break
        engine.finish()
    return levels
