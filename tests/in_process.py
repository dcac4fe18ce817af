"""Runs within the process of a test: one that is asked to stop at a step, and one on a folder of small images."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import Tensor

from greenprune.config import Config, DataConfig, GateConfig, ModelConfig, OptimConfig
from greenprune.interrupt import Interrupted
from greenprune.progress import Display
from greenprune.run import RunResult, train
from greenprune.trainer import Trainer


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Within, a run gets a SIGTERM after so many steps, and has to end by it."""
    take_step = Trainer._train_step

    def asked_to_stop(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
        take_step(trainer, images, labels)
        if trainer.step == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_train_step", asked_to_stop)
        with pytest.raises(Interrupted):
            yield


def train_on_images(root: Path, folder: Path, epochs: int) -> RunResult:
    """A dense run called "it" on an image_folder, or going on with it."""
    config = Config(
        data=DataConfig(name="image_folder", root=str(root), image_size=32, batch_size=4, workers=0),
        model=ModelConfig(name="resnet20"),
        gate=GateConfig(enabled=False),
        optim=OptimConfig(epochs=epochs),
        output_dir=str(folder),
        run_name="it",
        resume="auto",
    )
    return train(config, {}, lambda: Display(io.StringIO()))
