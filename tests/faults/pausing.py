"""What a checkpoint takes from training on digits: on a thread, in line, and by PyTorch's distributed checkpoints."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.nn import functional

from greenprune.checkpoint import Checkpoint, CheckpointWriter, save_checkpoint
from greenprune.config import Config, DataConfig, ModelConfig
from greenprune.data import open_data
from greenprune.engine import Engine
from greenprune.gating import attach_gates
from greenprune.models import build_model
from greenprune.optimization import build_optimizer


class _Training:
    """A gated network on digits."""

    def __init__(self, name: str) -> None:
        config = Config(device="cpu", model=ModelConfig(name, channels_last=True), data=DataConfig(batch_size=64))
        torch.manual_seed(0)
        self.data = open_data(config.data, None, 0).to("cpu", channels_last=True)
        model = build_model(config.model, classes=10, channels=1, image_size=8)
        attach_gates(model, config.gate)
        model.to(memory_format=torch.channels_last)
        self.engine = Engine(config)
        self.engine.prepare(model, build_optimizer(config, model, total_steps=1000))
        self.epoch = 0

    def train(self, begin: Callable[[], object]) -> tuple[float, float]:
        """One epoch that begins with a checkpoint: seconds that it waits for it, and seconds in all."""
        started = time.perf_counter()
        begin()
        waited = time.perf_counter()
        for images, labels in self.data.train_batches(self.epoch):
            self.engine.backward(functional.cross_entropy(self.engine.model(images), labels))
            self.engine.step()
        self.epoch += 1
        return waited - started, time.perf_counter() - started

    def snapshot(self) -> Checkpoint:
        return Checkpoint(
            self.engine.module.state_dict(), {"optimizer": self.engine.optimizer.state_dict()}, {"step": self.epoch}
        )


def measure(name: str, turns: int) -> dict[str, Any]:
    """Median seconds of the pause and of the epoch, each kind in turn with the others.

    Args:
        name: The network.
        turns: Checkpoints of each kind.
    """
    training, folder = _Training(name), Path(tempfile.mkdtemp(prefix="pause-"))
    writer = CheckpointWriter(folder / "thread", 2, 0, folder / "events.jsonl")
    futures: list[Any] = []

    def on_a_thread() -> None:
        writer.wait()
        writer.begin(training.epoch, training.snapshot(), None)

    def in_line() -> None:
        save_checkpoint(folder / "line", training.epoch, training.snapshot(), 2)

    def distributed() -> None:
        if futures:
            futures.pop().result()
        values = training.snapshot()
        state = {"model": values.model, **values.training}
        futures.append(dcp.async_save(state, checkpoint_id=folder / "dcp" / str(training.epoch), no_dist=True))

    kinds = {"none": lambda: None, "thread": on_a_thread, "in line": in_line, "torch.distributed": distributed}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in _warmed(turns):
        for kind, begin in kinds.items():
            found[kind].append(training.train(begin))
    writer.close()
    if futures:
        futures.pop().result()
    training.engine.finish()
    shutil.rmtree(folder)
    epoch_s = statistics.median(seconds for _, seconds in found["none"][1:])
    result: dict[str, Any] = {"network": name, "turns": turns, "epoch_s": epoch_s}
    for kind in ("thread", "in line", "torch.distributed"):
        pauses = sorted(waited for waited, _ in found[kind][1:])
        # The next epoch's pause includes what is left of this write: the whole epoch is compared with one without.
        ratios = [both[1] / alone[1] for both, alone in zip(found[kind][1:], found["none"][1:], strict=True)]
        result[kind] = {
            "pause_s": statistics.median(pauses),
            "longest_pause_s": pauses[-1],
            "pause_of_epoch": statistics.median(pauses) / epoch_s,
            "epoch_over_one_without": statistics.median(ratios),
        }
    return result


def _warmed(turns: int) -> Iterator[int]:
    """One turn more than asked for: the first is left out."""
    yield from range(turns + 1)
