"""What DeepSpeed's settings may say, and what is refused with a reason before anything starts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from greenprune.config import Config, ConfigError, DataConfig, OptimConfig, UserError
from greenprune.engine.zero import zero_plugin, zero_stage

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2"}
CONFIG = Config(device="cpu", data=DataConfig(batch_size=64))


def with_file(tmp_path: Path, settings: object) -> dict[str, str]:
    path = tmp_path / "deepspeed.json"
    path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


def test_without_deepspeed_there_is_no_stage() -> None:
    assert zero_stage({}) is None
    assert zero_stage({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}) is None


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_stage_is_the_launchers(tmp_path: Path, stage: int) -> None:
    assert zero_stage(DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}) == stage
    assert zero_stage(with_file(tmp_path, {"zero_optimization": {"stage": stage}})) == stage


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, r"^zero_stage: 3 is not valid; expected 0, 1 or 2: stage 3 also"),
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            r"^offload_optimizer_device: 'cpu' is not valid; expected none$",
        ),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, r"^deepspeed_config_file: cannot read 'nowhere.json'"),
    ],
)
def test_what_cannot_be_done_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        zero_stage(DEEPSPEED | variables)


@pytest.mark.parametrize("settings", ["{", "[1]"])
def test_a_broken_settings_file_is_refused(tmp_path: Path, settings: str) -> None:
    with pytest.raises(UserError, match=r"^deepspeed_config_file: .*deepspeed.json"):
        zero_stage(with_file(tmp_path, settings))


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"train_batch_size": 128}, "data.batch_size"),
        ({"train_micro_batch_size_per_gpu": 4}, "data.batch_size"),
        ({"gradient_accumulation_steps": 2}, "optim.accumulate"),
        ({"gradient_clipping": 1.0}, "optim.clip_norm"),
        ({"bf16": {"enabled": True}}, "precision"),
        ({"fp16": {"enabled": True}}, "precision"),
        ({"optimizer": {"type": "Adam"}}, "optim.name"),
        ({"scheduler": {"type": "WarmupLR"}}, "optim.schedule"),
    ],
)
def test_settings_that_the_run_has_to_say_are_refused(tmp_path: Path, settings: dict[str, object], field: str) -> None:
    key, value = next(iter(settings.items()))
    message = f"^{key}: {re.escape(repr(value))} in the launcher's DeepSpeed settings is not valid; .* in {field}$"
    with pytest.raises(ConfigError, match=message):
        zero_plugin(CONFIG, with_file(tmp_path, settings | {"zero_optimization": {"stage": 1}}), 1)


@pytest.mark.parametrize("key", ["GRADIENT_CLIPPING", "GRADIENT_ACCUMULATION_STEPS"])
def test_flags_of_the_launcher_count_as_settings(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key.lower()}: '4' in the launcher's DeepSpeed settings"):
        zero_plugin(CONFIG, DEEPSPEED | {f"ACCELERATE_{key}": "4"}, 1)


def test_loss_scaling_is_refused_with_deepspeed() -> None:
    with pytest.raises(ConfigError, match=r"^precision: 'fp16' is not valid with DeepSpeed; expected no or bf16"):
        zero_plugin(Config(precision="fp16"), DEEPSPEED, 1)


def test_what_else_the_file_says_is_kept(tmp_path: Path) -> None:
    settings = {
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    config = Config(data=DataConfig(batch_size=64), optim=OptimConfig(clip_norm=0.5))
    made = zero_plugin(config, with_file(tmp_path, settings), 2).deepspeed_config
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert made["wall_clock_breakdown"] is True
    assert made["train_micro_batch_size_per_gpu"] == 32
    assert made["gradient_clipping"] == 0.5
    assert zero_plugin(CONFIG, DEEPSPEED, 1).deepspeed_config["gradient_clipping"] == 0.0


WITHOUT_DEEPSPEED = """
import os, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "deepspeed":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "deepspeed" else found(name, *rest)
from greenprune.command import run_command
sys.exit(run_command(["--output_dir", sys.argv[1]], os.environ, prog="train.py"))
"""


def test_deepspeed_that_is_not_installed_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED, str(tmp_path / "runs")],
        env=os.environ | DEEPSPEED | {"RANK": "0", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "the launcher asks for DeepSpeed, which is not installed" in done.stderr
    assert not (tmp_path / "runs").exists()
