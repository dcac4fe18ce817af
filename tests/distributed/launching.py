"""Start real training processes the way a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "greenprune" / "train.py"


def environment() -> dict[str, str]:
    """This environment without what a launcher or a user's shell may have left in it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "WANDB_"))}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GREENPRUNE_DATA"):
        inherited.pop(key, None)
    # These tests are of CPU training, also on a machine with GPUs.
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "CUDA_VISIBLE_DEVICES": ""}


def command(script: Path, args: list[str], processes: int = 1, launch: str | None = None) -> list[str]:
    """The command line that runs a script on one process, on two through launch/cpu_2.yaml, or through another file."""
    if processes == 1 and launch is None:
        return [sys.executable, str(script), *args]
    file = ROOT / "launch" / f"{launch or 'cpu_2'}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(file)]
    return [*launcher, str(script), *args]


def run(
    script: Path,
    args: list[str],
    processes: int = 1,
    timeout_s: float = 240,
    launch: str | None = None,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, with further environment variables."""
    return subprocess.run(
        command(script, args, processes, launch),
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
