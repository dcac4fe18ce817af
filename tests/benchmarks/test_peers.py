"""The peers of the benchmarks: they meet their budget, and stopped anywhere they come to the same end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from launching import ROOT, environment

pytestmark = pytest.mark.slow

PRUNING = ROOT / "benchmarks" / "peers" / "pruning.py"
CONFIG = ROOT / "configs" / "digits.yaml"


def command(method: str, output: Path, *flags: str) -> list[str]:
    args = ["--method", method, "--config", str(CONFIG), "--target", "0.5", "--output", str(output), *flags]
    return [sys.executable, str(PRUNING), *args, "--", "--model.name", "resnet20", "--optim.epochs", "6"]


def run(method: str, output: Path, *flags: str) -> dict:
    done = subprocess.run(
        command(method, output, *flags), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("method", ["slimming", "polarization", "torch-pruning"])
def test_a_peer_stopped_and_gone_on_with_ends_as_if_it_had_not(method: str, tmp_path: Path) -> None:
    whole = run(method, tmp_path / "whole.json")
    assert 0.45 < whole["flops_forward"] / whole["flops_forward_dense"] <= 0.5
    assert whole["flops_train"] < whole["flops_train_dense"]
    output = tmp_path / "it.json"
    for epochs in (1, 4):  # in the sparse training, and in the fine-tuning
        process = subprocess.Popen(command(method, output), env=environment(), stderr=subprocess.PIPE, text=True)
        state = output.with_suffix(".state")
        changes, last, deadline = 0, 0, time.monotonic() + 120
        while changes < (epochs if epochs == 1 else 3) and time.monotonic() < deadline:
            now = state.stat().st_mtime_ns if state.exists() else 0
            changes, last = changes + (now != last), now
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, errors
    resumed = run(method, output)
    assert not output.with_suffix(".state").exists()
    for key in (
        "accuracy",
        "accuracy_before_pruning",
        "accuracy_after_pruning",
        "flops_forward",
        "flops_train",
        "params",
    ):
        assert resumed[key] == whole[key], key
    assert resumed["attempts"] == 3


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "it.json"
    process = subprocess.Popen(command("slimming", output), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not output.with_suffix(".state").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    other = subprocess.run(
        command("slimming", output, "--strength", "3"), env=environment(), capture_output=True, text=True, check=False
    )
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "is of a run with other settings" in other.stderr
