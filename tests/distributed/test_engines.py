"""Every engine trains on after a removal as the masked network does, and takes up what another one has saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TRAIN, run
from safetensors.torch import load_file

pytestmark = pytest.mark.system

HERE = Path(__file__).parent
ENGINES = {
    "cpu_2": "DDP",
    "deepspeed_zero0_cpu_2": "DeepSpeed ZeRO-0",
    "deepspeed_zero1_cpu_2": "DeepSpeed ZeRO-1",
    "deepspeed_zero2_cpu_2": "DeepSpeed ZeRO-2",
}


# The others say little more, and a launch takes ten seconds.
SLOW = [("deepspeed_zero0_cpu_2", "bf16"), ("deepspeed_zero1_cpu_2", "bf16")]
CASES = [
    pytest.param(
        (launch, precision), id=f"{launch}-{precision}", marks=[pytest.mark.slow] * ((launch, precision) in SLOW)
    )
    for launch in ENGINES
    for precision in ("no", "bf16")
]


@pytest.fixture(scope="module", params=CASES)
def cases(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, Any]]:
    """Runs of removal_worker.py under one engine in one precision, by optimizer and parts of a batch."""
    launch, precision = request.param
    done = run(HERE / "removal_worker.py", [precision], launch=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    return launch, precision, json.loads(done.stdout.strip().splitlines()[-1])


def test_a_removal_keeps_the_optimizer_and_the_ranks_alike(cases: tuple[str, str, dict[str, Any]]) -> None:
    launch, _, found = cases
    assert found.keys() == {"sgd", "adamw", "sgd in 2 parts"}
    for case in found.values():
        masked, removed = case["masked"], case["removed"]
        assert removed["engine"] == ENGINES[launch]
        assert removed["world_size"] == 2
        assert removed["parameters"] < masked["parameters"]
        assert removed["state_kept"] == [True, True]
        assert removed["released"] == [True, True]
        assert removed["digests"][0] == removed["digests"][1]


def test_training_goes_on_as_that_of_the_masked_network(cases: tuple[str, str, dict[str, Any]]) -> None:
    _, precision, found = cases
    for name, case in found.items():
        masked, removed = case["masked"]["losses"], case["removed"]["losses"]
        assert len(masked) == 30
        assert removed[:10] == masked[:10], name
        if precision == "no":
            assert removed == pytest.approx(masked, rel=1e-6), name
            assert case["difference"] <= 1e-5, name
        else:
            # A sum over fewer channels is rounded elsewhere, to 8 bits: exact at first, then apart like two runs.
            assert removed[10] == pytest.approx(masked[10], rel=1e-3), name
            assert removed == pytest.approx(masked, rel=0.05), name


def test_a_rebuild_without_a_change_changes_no_bit(cases: tuple[str, str, dict[str, Any]]) -> None:
    _, _, found = cases
    for case in found.values():
        assert case["untouched"]["digests"] == case["masked"]["digests"]


RUN = """
model: {name: resnet20, shortcut: B, channels_last: true}
data: {name: digits, batch_size: 64}
optim: {epochs: 6, lr: 0.05, ema: 0.9}
gate: {units: [block, channel], warmup: 0.0}
budget: {target: 0.6}
removal: {window: 11, decide_by: 0.4}
checkpoint: {keep_last: 10}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two DDP processes that removed blocks and channels in its first half."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "config.yaml").write_text(RUN)
    done = train(folder, folder, launch="cpu_2")
    assert done["attempts"] == 1
    assert len(done["removals"]) > 0
    assert all(removal["epoch"] < 3 for removal in done["removals"])
    return folder


def train(folder: Path, output: Path, **how: Any) -> dict[str, Any]:
    args = ["--config", str(folder / "config.yaml"), "--output_dir", str(output), "--run_name", "run"]
    done = run(TRAIN, [*args, "--resume", "auto"], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "run" / "summary.json").read_text())


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.mark.parametrize(
    ("how", "engine"),
    [
        ({"processes": 1}, "one process"),
        ({"launch": "deepspeed_zero1_cpu_2"}, "DeepSpeed ZeRO-1"),
    ],
    ids=["alone", "zero1"],
)
def test_another_engine_goes_on_with_what_ddp_has_saved(
    saved: Path, tmp_path: Path, how: dict[str, Any], engine: str
) -> None:
    through = json.loads((saved / "run" / "summary.json").read_text())
    folder = tmp_path / "run"
    shutil.copytree(saved / "run", folder)
    (folder / "summary.json").unlink()
    for checkpoint in sorted((folder / "checkpoints").iterdir())[3:]:
        shutil.rmtree(checkpoint)
    summary = train(saved, tmp_path, **how)
    assert summary["engine"] == engine
    assert summary["attempts"] == 2
    assert summary["removals"] == through["removals"]
    assert (folder / "structure.json").read_text() == (saved / "run" / "structure.json").read_text()
    for figure in ("flops_train", "flops_train_dense", "samples", "steps", "params"):
        assert summary[figure] == through[figure], figure
    resumed, whole = events_of(tmp_path, "epoch"), events_of(saved, "epoch")
    # BatchNorm sees other batches per process; the loss goes on where it was, and not from anew.
    assert resumed[6]["train/loss"] == pytest.approx(whole[3]["train/loss"], rel=0.25)
    assert resumed[6]["train/loss"] < 0.5 * whole[0]["train/loss"]
    assert summary["accuracy"] == pytest.approx(through["accuracy"], abs=0.05)


def test_the_state_of_zero_is_saved_whole(saved: Path, tmp_path: Path) -> None:
    """What ZeRO-2 saves after going on is what a single process would have: same names, same shapes."""
    shutil.copytree(saved / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    for checkpoint in sorted((tmp_path / "run" / "checkpoints").iterdir())[5:]:
        shutil.rmtree(checkpoint)
    train(saved, tmp_path, launch="deepspeed_zero2_cpu_2")
    theirs, ours = (sorted((folder / "run" / "checkpoints").iterdir())[-1] for folder in (tmp_path, saved))
    assert theirs.name == ours.name
    shapes = [{n: t.shape for n, t in load_file(path / "model.safetensors").items()} for path in (theirs, ours)]
    assert shapes[0] == shapes[1]
    states = [torch.load(path / "training.pt", weights_only=True)["optimizer"] for path in (theirs, ours)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, kept in states[0]["state"].items():
        assert kept["momentum_buffer"].shape == states[1]["state"][number]["momentum_buffer"].shape
    assert [g["params"] for g in states[0]["param_groups"]] == [g["params"] for g in states[1]["param_groups"]]
