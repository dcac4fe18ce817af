"""Runs within the process of a test: what ends them at a step, and one on a folder of small images."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from torch import Tensor

from greenprune.config import Config, DataConfig, GateConfig, ModelConfig, OptimConfig
from greenprune.interrupt import Interrupted
from greenprune.progress import Display
from greenprune.run import RunResult, train
from greenprune.trainer import Trainer


class Killed(BaseException):
    """Ends a run where it is, with nothing written any more."""


@contextmanager
def stopped_at(step: int) -> Iterator[None]:
    """Within, a run gets a SIGTERM after so many steps, and has to end by it."""
    with after_step(step, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        yield


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Within, a run ends after so many steps, if it comes so far, as if it were killed."""

    def kill() -> None:
        raise Killed

    with after_step(step, kill), suppress(Killed):
        yield


@contextmanager
def after_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Within, a run does something after so many steps."""
    take_step = Trainer._train_step

    def take_step_and_act(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
        take_step(trainer, images, labels)
        if trainer.step == step:
            act()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "_train_step", take_step_and_act)
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
