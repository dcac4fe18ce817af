"""Accuracy and loss of the present network on held-out samples, each counted once whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from greenprune.data import ImageData
from greenprune.engine import Engine


@dataclass(frozen=True)
class Evaluation:
    """Result over the whole held-out set.

    Attributes:
        accuracy: Share of samples whose most likely class is right, 0 to 1.
        loss: Mean cross-entropy in nats.
        samples: Samples counted.
    """

    accuracy: float
    loss: float
    samples: int


def evaluate(engine: Engine, data: ImageData, model: nn.Module) -> Evaluation:
    """Evaluate on the held-out set, shared out over the ranks; one read of the device at the end.

    Args:
        engine: The engine.
        data: The data set.
        model: The unwrapped network, the engine's or its moving average.
    """
    engine.sync_buffers(model)
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=engine.device)
    with engine.evaluating():
        for images, labels in data.eval_batches(rank=engine.rank, world_size=engine.world_size):
            # The module, not its data-parallel wrapper: ranks may have different numbers of batches.
            logits = model(images).float()
            totals[0] += functional.cross_entropy(logits, labels, reduction="sum")
            totals[1] += (logits.argmax(1) == labels).sum()
            totals[2] += len(labels)
            engine.got_on()
    model.train()
    loss, right, samples = engine.sum(totals).tolist()
    return Evaluation(accuracy=right / samples, loss=loss / samples, samples=int(samples))
