"""A process of a run that is killed, freezes or fails ends the run soon, by name; launchers can start it again."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import TRAIN, command, environment, run
from safetensors.torch import load_file

pytestmark = pytest.mark.system

CONFIG = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: 8, lr: 0.05}
gate: {units: [block, channel], warmup: 0.0}
budget: {target: 0.6}
removal: {window: 11, decide_by: 0.4}
checkpoint: {keep_last: 20}
"""


class Launched:
    """A run on several processes, going on."""

    def __init__(self, folder: Path, config: Path, *launcher_flags: str, launch: str = "cpu_2") -> None:
        self.folder = folder / "run"
        args = ["--config", str(config), "--output_dir", str(folder), "--run_name", "run", "--resume", "auto"]
        line = command(TRAIN, args, launch=launch)
        place = line.index("--config_file")
        self.process = subprocess.Popen(
            [*line[:place], *launcher_flags, *line[place:]],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def count(self, kind: str) -> int:
        """Events of a kind so far."""
        path = self.folder / "events.jsonl"
        return len(re.findall(rf'"kind": ?"{kind}"', path.read_text())) if path.exists() else 0

    def wait_for(self, kind: str, number: int) -> None:
        while self.count(kind) < number:
            assert self.process.poll() is None, self.process.communicate()[0][-3000:]
            time.sleep(0.05)

    def wait_for_checkpoint(self) -> None:
        """Until there is one to go on from: an epoch's event comes before its checkpoint, which a thread writes."""
        while not list((self.folder / "checkpoints").glob("step-*")):
            assert self.process.poll() is None, self.process.communicate()[0][-3000:]
            time.sleep(0.05)

    def pid_of(self, rank: int) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            if f"RANK={rank}" in variables:
                return int(pid)
        raise AssertionError(f"no rank {rank} among {children}")

    def end(self, within_s: float) -> str:
        """What it printed, once it has ended."""
        return self.process.communicate(timeout=within_s)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it is when nothing happens to it, and its config beside it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "config.yaml").write_text(CONFIG)
    args = ["--config", str(folder / "config.yaml"), "--output_dir", str(folder), "--run_name", "run"]
    done = run(TRAIN, args, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def launched(whole: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Launched]:
    flags = request.param if hasattr(request, "param") else ()
    run = Launched(tmp_path, whole / "config.yaml", *flags)
    yield run
    run.process.kill()
    run.process.wait()


def weights(folder: Path) -> dict[str, Any]:
    newest = sorted((folder / "run" / "checkpoints").iterdir())[-1]
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(newest / "model.safetensors").items()}


def assert_same_end(folder: Path, whole: Path) -> None:
    assert weights(folder) == weights(whole)
    ours, theirs = (json.loads((place / "run" / "summary.json").read_text()) for place in (folder, whole))
    for figure in ("removals", "flops_train", "samples", "accuracy", "steps"):
        assert ours[figure] == theirs[figure], figure


def messages(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("greenprune: ")]


def kill_and_resume(launched: Launched, whole: Path, tmp_path: Path, rank: int) -> None:
    launched.wait_for_checkpoint()
    time.sleep(random.uniform(0, 1.5))
    pid = launched.pid_of(rank)
    os.kill(pid, signal.SIGKILL)
    output = launched.end(within_s=60)
    assert launched.process.returncode != 0
    assert len(messages(output)) == 1, output[-3000:]
    host = os.uname().nodename
    assert f"rank {rank} on {host} (process {pid}) has ended without a word: killed" in messages(output)[0]
    assert "--resume auto --run_name run" in messages(output)[0]
    args = ["--config", str(whole / "config.yaml"), "--output_dir", str(tmp_path), "--run_name", "run"]
    done = run(TRAIN, [*args, "--resume", "auto"], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_end(tmp_path, whole)


def test_a_killed_rank_is_named_and_the_run_resumes_to_the_same_bits(
    launched: Launched, whole: Path, tmp_path: Path
) -> None:
    kill_and_resume(launched, whole, tmp_path, random.randrange(2))


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(20))
def test_twenty_kills_at_random_moments(launched: Launched, whole: Path, tmp_path: Path, repeat: int) -> None:
    kill_and_resume(launched, whole, tmp_path, repeat % 2)


@pytest.mark.parametrize("launched", [("--max_restarts", "3", "--rdzv_backend", "c10d")], indirect=True)
def test_a_launcher_that_restarts_goes_on_from_the_last_checkpoint(
    launched: Launched, whole: Path, tmp_path: Path
) -> None:
    launched.wait_for("epoch", 2)
    os.kill(launched.pid_of(0), signal.SIGKILL)
    launched.wait_for("epoch", 4)
    os.kill(launched.pid_of(1), signal.SIGKILL)
    output = launched.end(within_s=240)
    assert launched.process.returncode == 0, output[-3000:]
    assert_same_end(tmp_path, whole)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["attempts"] == 3
    assert summary["energy_j"] > 0


@pytest.mark.slow
def test_a_frozen_rank_ends_the_run(launched: Launched) -> None:
    launched.wait_for("epoch", 1)
    pid = launched.pid_of(1)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    output = launched.end(within_s=90)
    assert time.monotonic() - started < 75  # 20 s of silence, and 30 s that torchrun waits for the frozen one
    assert len(messages(output)) == 1
    assert f"(process {pid}) has not been heard of for 2" in messages(output)[0]


WORKER = """
import sys, time
from dataclasses import replace
import torch
from greenprune.command import run_command
from greenprune.surgery import Operation
from greenprune.trainer import Trainer

step = Trainer._train_step

def faulty(self, images, labels):
    if self.step == 30 and self.engine.rank == 1:
        {fault}
    step(self, images, labels)

Trainer._train_step = faulty
sys.exit(run_command(sys.argv[1:], __import__("os").environ, prog="train.py"))
"""

FAULTS = {
    "an error": ('raise RuntimeError("a broken image")', "rank 1 on .* has ended: a broken image. Go on from step-"),
    "another structure": (
        'self.structure.operations.append(Operation("freeze", "stages.0.0", 1, 0.1, "on", None))',
        "the structure differs from rank 0 on rank 1 ",
    ),
    "a hang": ("time.sleep(1000)", r"no step for \d+ s: rank 0 .*engine.*; rank 1 .* is in "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_disagrees_or_hangs_is_named_once(whole: Path, tmp_path: Path, fault: str) -> None:
    code, message = FAULTS[fault]
    script = tmp_path / "faulty.py"
    script.write_text(WORKER.replace("{fault}", code))
    args = ["--config", str(whole / "config.yaml"), "--output_dir", str(tmp_path), "--run_name", "run"]
    started = time.monotonic()
    done = run(script, [*args, "--stall_s", "8"], processes=2)
    assert time.monotonic() - started < 60
    assert done.returncode != 0
    said = [line for line in messages(done.stderr) if "error" in line]
    assert len(said) == 1, done.stderr[-3000:]
    assert re.search(message, said[0]), said
