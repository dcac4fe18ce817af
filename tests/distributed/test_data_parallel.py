"""Two real processes over gloo compute what one process computes, and stay together through removals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import TRAIN, run

from greenprune.checkpoint import list_checkpoints, load_checkpoint

HERE = Path(__file__).parent

CONFIG = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: 3, lr: 0.02}
gate: {kind: conditional, warmup: 0.0, lr: 3.0, polarization: 2.0}
budget: {target: 0.6}
removal: {window: 11, decide_by: 0.8}
"""


# Among hundreds of channels one logit comes within a rounding error of its threshold sooner or later: there the
# gradients are compared up to the first removals, and these. Blocks alone keep together to the end where their gates,
# which are fast here, learn from every sample.
@pytest.mark.parametrize(("units", "steps"), [("[block], every: 1", 66), ("[block, channel]", 11)])
def test_gate_gradients_and_structure_are_those_of_one_process(tmp_path: Path, units: str, steps: int) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("gate: {", f"gate: {{units: {units}, "))
    for processes in (1, 2):
        done = run(HERE / "gradients_worker.py", [str(config), str(tmp_path)], processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"world-{world}" / "gradients.json").read_text()) for world in (1, 2))
    assert len(one) == len(two) == 66
    compared = 0
    for step, (alone, together) in enumerate(zip(one[:steps], two[:steps], strict=True)):
        assert alone.keys() == together.keys(), f"different units have gates at step {step}"
        # fp32 sums in another order; training amplifies the difference from step to step.
        tolerance = 1e-5 if step < 5 else 2e-3
        for name, gradient in alone.items():
            assert together[name] == pytest.approx(gradient, rel=tolerance, abs=tolerance), (step, name)
            compared += any(value != 0 for value in gradient)
    assert compared > 100
    structures = [json.loads((tmp_path / f"world-{world}" / "structure.json").read_text()) for world in (1, 2)]
    first, second = ([done for done in found["operations"] if done["step"] <= steps] for found in structures)
    assert first == second
    assert any(done["action"] == "remove" for done in first)


def test_a_run_on_two_processes_from_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    done = run(TRAIN, ["--config", str(config), "--output_dir", str(tmp_path), "--run_name", "two"], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["gates_left"] == 0
    assert summary["samples"] == 3 * 22 * 64
    assert summary["kept_cost"] <= 0.6
    events = [json.loads(line) for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()]
    # One host, read once however many processes share it; known live although one rank reads nothing.
    devices = [device for device, _, _ in events[0]["energy_sources"]]
    assert len(devices) == len(set(devices)) > 0
    assert all(event["energy/total_j"] > 0 for event in events if event["kind"] in ("train", "epoch"))
    assert [event["epoch"] for event in events if event["kind"] == "epoch"] == [1, 2, 3]
    # Dropout is to draw other numbers on each rank, though all began with the same weights.
    checkpoint = load_checkpoint(list_checkpoints(tmp_path / "two" / "checkpoints")[-1])
    (first, *_), (second, *_) = checkpoint.training["random"]
    assert not torch.equal(first, second)
