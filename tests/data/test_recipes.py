"""The configs for data that is not here: each is a whole run, done on small data of the same layout."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from greenprune.config import load_config
from greenprune.progress import Display
from greenprune.run import train

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"optim.epochs": 2, "data.batch_size": 4, "data.workers": 0, "precision": "no", "tracking.log_every": 1}


def run(name: str, root: Path, folder: Path, **changes: object) -> dict:
    overrides = {**SMALL, "data.root": str(root), "output_dir": str(folder), "run_name": "it", **changes}
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    train(config, {}, lambda: Display(io.StringIO()))
    summary = json.loads((folder / "it" / "summary.json").read_text())
    assert summary["kept_cost"] <= summary["budget_target"] == 0.5
    assert summary["gates_left"] == 0
    return summary


@pytest.mark.parametrize("name", ["cifar10_resnet56", pytest.param("cifar10_resnet110", marks=pytest.mark.slow)])
def test_cifar10(name: str, cifar10_root: Path, tmp_path: Path) -> None:
    summary = run(name, cifar10_root, tmp_path, **{"data.batch_size": 20})
    assert summary["blocks_dense"] == {"cifar10_resnet56": 27, "cifar10_resnet110": 54}[name]


def test_cifar100(cifar100_root: Path, tmp_path: Path) -> None:
    assert run("cifar100_resnet56", cifar100_root, tmp_path, **{"data.batch_size": 40})["blocks_dense"] == 27


@pytest.mark.parametrize(
    "name", ["tiny_imagenet_resnet18", pytest.param("tiny_imagenet_resnet50", marks=pytest.mark.slow)]
)
def test_tiny_imagenet(name: str, tiny_root: Path, tmp_path: Path) -> None:
    summary = run(name, tiny_root, tmp_path)
    assert summary["channels_dense"] == {"tiny_imagenet_resnet18": 0, "tiny_imagenet_resnet50": 7552}[name]


@pytest.mark.slow
def test_imagenet(folder_root: Path, tmp_path: Path) -> None:
    summary = run("imagenet_resnet50", folder_root, tmp_path, **{"data.image_size": 64})
    assert summary["blocks_dense"] == 16
