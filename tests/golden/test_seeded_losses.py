"""Seeded losses of the first steps, so that a change not meant to alter results shows if it does.

To record anew after a change that is meant to: ``python tests/golden/test_seeded_losses.py``; say why in the commit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from launching import TRAIN, run

from greenprune.provenance import cpu_name

RECORD = Path(__file__).with_name("seeded_losses.json")
VARIANTS = {
    "gated": [],
    "static": ["--gate.kind", "static"],
    "dense": ["--gate.enabled", "false"],
    "adamw": ["--optim.name", "adamw", "--optim.lr", "0.002"],
}


def losses(variant: str, folder: Path) -> list[float]:
    args = ["--model.name", "resnet20", "--optim.epochs", "2", "--optim.lr", "0.05", "--tracking.log_every", "1"]
    args += ["--gate.warmup", "0.1", "--removal.window", "8", "--removal.decide_by", "0.6"]
    done = run(TRAIN, [*args, *VARIANTS[variant], "--output_dir", str(folder), "--run_name", variant])
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in (folder / variant / "events.jsonl").read_text().splitlines()]
    return [event["train/loss"] for event in events if event["kind"] == "train"]


def kernels() -> str:
    """What decides how sums are rounded."""
    return f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_the_recorded_ones(variant: str, tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text())
    recorded, found = record["losses"][variant], losses(variant, tmp_path)
    assert len(found) == len(recorded) == 44
    assert found[:5] == pytest.approx(recorded[:5], rel=1e-4)
    # Training amplifies other processors' rounding until another unit goes first; then only the start can be compared.
    if record["kernels"] == kernels():
        assert found == pytest.approx(recorded, rel=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        values = {variant: [round(x, 6) for x in losses(variant, Path(scratch))] for variant in VARIANTS}
    RECORD.write_text(json.dumps({"kernels": kernels(), "losses": values}, indent=1) + "\n")
