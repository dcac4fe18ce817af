"""A run goes on with the images that it was started on, wherever they lie, and with no others."""

from __future__ import annotations

import io
import shutil
import signal
from pathlib import Path

import pytest
from torch import Tensor

from greenprune.config import Config, DataConfig, GateConfig, ModelConfig, OptimConfig, UserError
from greenprune.interrupt import Interrupted
from greenprune.progress import Display
from greenprune.run import train
from greenprune.trainer import Trainer


def go(root: Path, folder: Path) -> float:
    config = Config(
        data=DataConfig(name="image_folder", root=str(root), image_size=32, batch_size=4, workers=0),
        model=ModelConfig(name="resnet20"),
        gate=GateConfig(enabled=False),
        optim=OptimConfig(epochs=2),
        output_dir=str(folder),
        run_name="it",
        resume="auto",
    )
    loss = train(config, {}, lambda: Display(io.StringIO())).summary["loss"]
    assert isinstance(loss, float)
    return loss


def test_a_run_goes_on_with_its_own_images_only(
    folder_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def asked_to_stop(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
        step(trainer, images, labels)
        if trainer.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", asked_to_stop)
        with pytest.raises(Interrupted):
            go(folder_root, tmp_path)
    shutil.copytree(folder_root, tmp_path / "moved")
    shutil.copytree(folder_root, tmp_path / "other")
    (tmp_path / "other" / "val" / "n02" / "n02_0.JPEG").rename(tmp_path / "other" / "val" / "n01" / "n02_0.JPEG")
    before = {path: path.read_bytes() for path in (tmp_path / "it").rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"data\.root: it holds another image_folder than the one that the run in .*it'"
    ):
        go(tmp_path / "other", tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "it").rglob("*") if path.is_file()} == before
    assert go(tmp_path / "moved", tmp_path) == go(folder_root, tmp_path / "whole")
