"""A structure that one run has found, trained from scratch by another."""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launching import TRAIN, run
from safetensors.torch import load_file
from torch import Tensor

from greenprune.checkpoint import list_checkpoints
from greenprune.config import BudgetConfig, Config, ConfigError, GateConfig, ModelConfig, OptimConfig, RemovalConfig
from greenprune.export import export_run
from greenprune.interrupt import Interrupted
from greenprune.progress import Display
from greenprune.report import compare_runs
from greenprune.run import train
from greenprune.trainer import Trainer
from greenprune.verify import verify_run

SMALL = Config(
    model=ModelConfig(name="resnet20"),
    optim=OptimConfig(epochs=3, lr=0.05),
    gate=GateConfig(units=["block", "channel"], warmup=0.0),
    budget=BudgetConfig(target=0.5),
    removal=RemovalConfig(window=11, decide_by=0.4),
)


def trained(config: Config, folder: Path, name: str, **changes: Any) -> tuple[Path, str]:
    """A run in this process: its folder and what its display showed."""
    shown = io.StringIO()
    config = replace(config, output_dir=str(folder), run_name=name, **changes)
    train(config, {}, lambda: Display(shown))
    return folder / name, shown.getvalue()


def from_scratch(structure: Path, **changes: Any) -> Config:
    model = ModelConfig(name="resnet20", structure=str(structure))
    return replace(SMALL, model=model, gate=GateConfig(enabled=False), **changes)


def read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    assert isinstance(values, dict)
    return values


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated run that lost blocks and channels."""
    folder, _ = trained(SMALL, tmp_path_factory.mktemp("found"), "gated")
    removals = read(folder / "summary.json")["removals"]
    assert {removal["channels"] is None for removal in removals} == {True, False}
    return folder


@pytest.fixture(scope="module")
def scratch(found: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return trained(from_scratch(found), tmp_path_factory.mktemp("scratch"), "scratch")


def test_the_network_is_the_one_that_was_found_from_the_first_step(found: Path, scratch: tuple[Path, str]) -> None:
    folder, shown = scratch
    before, after = read(found / "summary.json"), read(folder / "summary.json")
    for figure in ("params", "params_dense", "flops_forward", "flops_forward_dense", "blocks", "blocks_dense"):
        assert after[figure] == before[figure], figure
    assert after["flops_train"] / after["flops_train_dense"] < before["flops_train"] / before["flops_train_dense"]
    assert {(removal["step"], removal["reason"]) for removal in after["removals"]} == {(0, "given")}
    assert [removal["unit"] for removal in after["removals"]] == [removal["unit"] for removal in before["removals"]]
    shapes = [
        {name: tensor.shape for name, tensor in load_file(list_checkpoints(run)[-1] / "model.safetensors").items()}
        for run in (found / "checkpoints", folder / "checkpoints")
    ]
    assert shapes[0] == shapes[1]
    assert "a given structure, without gates:" in shown
    assert "removed at step 0 (epoch 0):" in shown


def test_its_files_are_whole_and_do_without_the_other_run(scratch: tuple[Path, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(scratch[0], tmp_path / "alone"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("structure: ", "structure: /gone"))
    # The path has changed, which is seen; nothing is read from it.
    assert all("model.structure" in finding.detail for finding in verify_run(folder) if finding.good is False)
    export_run(scratch[0], "safetensors", tmp_path / "out")


def test_it_is_nobodys_dense_twin(found: Path, scratch: tuple[Path, str]) -> None:
    comparison = compare_runs([found, scratch[0]])
    assert [run.twin for run in comparison.runs] == [None, None]


def test_interrupted_and_resumed_it_is_the_same_run(
    scratch: tuple[Path, str], found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._train_step

    def asked_to_stop(trainer: Trainer, images: Tensor, labels: Tensor) -> None:
        step(trainer, images, labels)
        if trainer.step == 30:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_train_step", asked_to_stop)
        with pytest.raises(Interrupted):
            trained(from_scratch(found), tmp_path, "scratch")
    folder, _ = trained(from_scratch(found), tmp_path, "scratch", resume="auto")
    assert not [finding for finding in verify_run(folder) if finding.good is False]
    ours, theirs = (read(path / "summary.json") for path in (folder, scratch[0]))
    for figure in ("removals", "flops_train", "accuracy", "loss", "steps", "samples"):
        assert ours[figure] == theirs[figure], figure


def test_more_may_go_with_gates(found: Path, tmp_path: Path) -> None:
    gated = replace(SMALL, model=replace(SMALL.model, structure=str(found / "structure.json")))
    folder, _ = trained(gated, tmp_path, "more", budget=BudgetConfig(target=0.3))
    summary = read(folder / "summary.json")
    assert summary["kept_cost"] <= 0.3 + summary["cheapest_unit_cost"]
    assert summary["gates_left"] == 0
    assert {removal["reason"] == "given" for removal in summary["removals"]} == {True, False}
    assert not [finding for finding in verify_run(folder) if finding.good is False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "model.structure: cannot read '{path}' (No such file or directory); expected the structure.json of a run",
        ),
        ("{", "model.structure: '{path}' is not a structure (Expecting property name"),
        ("[]", "model.structure: '{path}' is not a structure (not a structure of format 1 or 2)"),
        (
            '{"format": 2, "operations": [{"action": "remove", "unit": "stages.7.0", "step": 1, "epoch": 0.1, '
            '"reason": "off"}]}',
            "model.structure: '{path}' does not fit resnet20 (",
        ),
    ],
)
def test_what_is_no_structure_of_the_network_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "structure.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        trained(from_scratch(path), tmp_path, "it")
    assert message.format(path=path) in str(refused.value)
    assert not (tmp_path / "it").exists()


def test_a_structure_that_has_changed_is_not_gone_on_with(found: Path, tmp_path: Path) -> None:
    path = tmp_path / "structure.json"
    path.write_text((found / "structure.json").read_text())
    args = ["--model.name", "resnet20", "--model.structure", str(path), "--gate.enabled", "false"]
    args += ["--optim.epochs", "2", "--output_dir", str(tmp_path), "--run_name", "it", "--resume", "auto"]
    done = run(TRAIN, args, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "it" / "summary.json").unlink()  # as if it had been killed right before
    values = read(path)
    values["operations"] = values["operations"][:1]
    path.write_text(json.dumps(values))
    done = run(TRAIN, args, processes=2)
    assert done.returncode == 1
    assert "it did not begin with the removals that model.structure has now" in done.stderr
