"""The accuracy studies: every cell has its command, and the table says what there is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "accuracy"))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import study
import torch
from launching import ROOT, environment
from norm_removal import ByNorm, group_norms

from greenprune.config import GateConfig, ModelConfig
from greenprune.gating import attach_gates, gated_units
from greenprune.models import build_model, find_channels


def test_every_cell_has_a_command_and_what_it_needs_comes_before(tmp_path: Path) -> None:
    digits = study.Study.read(ROOT / "benchmarks" / "accuracy" / "digits.yaml")
    cells = study.cells_of(digits)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert all(cell.after is None or cell.after in names[: names.index(cell.name)] for cell in cells)
    runner = study.Runner(digits, tmp_path)
    commands = [shlex.join(runner.command(cell, 0)) for cell in cells]
    assert len(set(commands)) == len(commands)
    assert all("--seed 0" in command for command in commands)


def test_what_takes_a_structure_over_needs_no_more_than_what_is_kept_beside_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    named = replace(study.Study.read(ROOT / "benchmarks" / "accuracy" / "digits.yaml"), config=tmp_path / "it.yaml")
    cells = {cell.name: cell for cell in study.cells_of(named)}
    runner = study.Runner(named, tmp_path / "runs")
    before = runner.command(cells["scratch-block-0.5"], 1)
    assert before[before.index("--model.structure") + 1] == str(tmp_path / "runs" / "digits" / "block-0.5-seed1")
    kept = tmp_path / "results" / "digits" / "structures" / "block-0.5-seed1.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    for name in ("scratch-block-0.5", "random-0.5"):
        assert "results/digits/structures/block-0.5-seed1.json" in runner.command(cells[name], 1)
    assert "structures" not in shlex.join(runner.command(cells["scratch-block-0.5"], 2))


def test_a_cell_is_asked_for_by_its_name_or_with_others_by_how_theirs_begin() -> None:
    cells = study.cells_of(study.Study.read(ROOT / "benchmarks" / "accuracy" / "fashion_mnist.yaml"))
    assert study.select(cells, None) == cells
    assert [cell.name for cell in study.select(cells, ["dense"])] == ["dense"]  # and not dense-b
    assert [cell.name for cell in study.select(cells, ["scratch-block", "slimming-0.5"])] == [
        "scratch-block-0.7",
        "scratch-block-0.5",
        "scratch-block-0.3",
        "slimming-0.5",
    ]
    with pytest.raises(SystemExit, match=r"--cells chanel: no such cell; expected one of block-0\.3"):
        study.select(cells, ["chanel"])


def test_no_job_waits_while_there_is_a_run_and_a_run_waits_for_what_it_needs() -> None:
    cells = [
        study.Cell("dense", "dense"),
        study.Cell("block", "ours", 0.5),
        study.Cell("scratch", "s", 0.5, after="block"),
    ]
    order: list[str] = []
    both = threading.Barrier(2, timeout=30)

    class Runner:
        def choose(self, peer: str) -> None: ...

        def train(self, cell: study.Cell, seed: int) -> None:
            if cell.name == "scratch":
                assert f"block {seed}" in order
            if (cell.name, seed) in {("scratch", 0), ("dense", 1)}:
                both.wait()  # passes only if the next seed begins beside the last run of this one
            order.append(f"{cell.name} {seed}")
            if (cell.name, seed) == ("block", 1):
                raise RuntimeError("block, seed 1: out of memory")

    failed = study.train_all(Runner(), cells, [0, 1], jobs=2)  # type: ignore[arg-type]
    assert sorted(order) == sorted(f"{name} {seed}" for name in ("dense", "block", "scratch") for seed in (0, 1))
    assert failed == ["block, seed 1: out of memory"]  # and what needs it is tried, and tells that it is missing


def test_an_unknown_key_of_a_study_is_named(tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text("config: configs/digits.yaml\nseeds: [0]\ntargets: [0.5]\nepochs: 3\n")
    with pytest.raises(SystemExit, match=r"unexpected keyword argument 'epochs'; expected config, seeds, targets"):
        study.Study.read(tmp_path / "it.yaml")


def result(accuracy: float, kept: float, **more: Any) -> dict[str, Any]:
    figures = {"flops_forward": 100 * kept, "flops_forward_dense": 100, "params": 10, "params_dense": 20}
    spent = {"flops_train": 30, "flops_train_dense": 40, "energy_j": 5.0, "time_s": 2.0}
    return {"accuracy": accuracy, **figures, **spent, **more}


def test_the_table_compares_seed_by_seed_and_leaves_out_what_is_not_there() -> None:
    cells = [
        study.Cell("dense", "dense twin"),
        study.Cell("block-0.5", "ours, block", 0.5),
        study.Cell("x", "other", 0.5),
    ]
    found = {
        "dense": {0: result(0.90, 1.0), 1: result(0.92, 1.0)},
        "block-0.5": {0: result(0.89, 0.5, energy_j=4.0), 1: result(0.93, 0.4, energy_j=None), 2: result(0.5, 0.5)},
        "x": {},
    }
    rows = study.table(cells, found)[2:]
    assert rows[0].startswith("| dense twin | 2 | 91.00 ± 1.41 | 0.00 ± 0.00 | 1.000 ± 0.000 |")
    assert "| ours, block, 0.5 | 3 | 77.33 ± 23.76 | 0.00 ± 1.41 | 0.467 ± 0.058 |" in rows[1]
    assert "| 0.80 |" in rows[1]  # joules of the one seed that has them
    assert len(rows) == 2  # nothing of what was not trained
    shared = study.table(cells, found, metered=False)  # with other work beside
    assert "joules" not in shared[0]
    assert shared[2:] == [" | ".join(row.split(" | ")[:-2]) + " |" for row in rows]
    drawn = {point["series"]: point["training"] for point in study.points(cells, found)}
    assert drawn == {"dense twin": 0.75, "ours, block": 0.75}


def test_a_variant_that_is_trained_longer_is_set_against_the_dense_twin_of_the_study() -> None:
    variants = {"channel, 10 epochs": ["--gate.units", "[channel]", "--optim.epochs", "10"]}
    longer = {"dense, 10 epochs": ["--optim.epochs", "10"]}
    config = ROOT / "configs" / "digits.yaml"
    named = study.Study("it", config, [0], targets=[0.5], variants=variants, dense_variants=longer)
    cells = {cell.name: cell for cell in study.cells_of(named)}
    for name in ("channel-10-epochs-0.5", "dense-10-epochs"):
        command = study.Runner(named, Path("runs")).command(cells[name], 0)
        assert command[command.index("--optim.epochs") + 1] == "10"
    assert command[command.index("--gate.enabled") + 1] == "false"
    dense = {"flops_train": 40, "flops_train_dense": 40}
    found = {name: {} for name in cells} | {
        "dense": {0: result(0.9, 1.0, **dense)},
        "channel-0.5": {0: result(0.89, 0.5)},
        "channel-10-epochs-0.5": {0: result(0.9, 0.5, flops_train=42, flops_train_dense=60), 1: result(0.9, 0.5)},
        "dense-10-epochs": {0: result(0.91, 1.0, flops_train=60, flops_train_dense=60)},
    }
    rows = study.table(list(cells.values()), found)[2:]
    shown = {row.split(" | ")[0]: row.split(" | ")[6] for row in rows}
    assert shown["| ours, channel, 0.5"] == "0.750"
    assert shown["| ours, channel, 10 epochs, 0.5"] == "1.050"
    assert shown["| dense, 10 epochs"] == "1.500"


def test_variants_are_trained_for_their_own_targets() -> None:
    config, variants = ROOT / "configs" / "digits.yaml", {"static": ["--gate.kind", "static"]}
    everywhere = study.Study("it", config, [0], targets=[0.7, 0.5], variants=variants)
    at_one = study.Study("it", config, [0], targets=[0.7, 0.5], variants=variants, variant_targets=[0.5])
    for named, expected in ((everywhere, {"static-0.7", "static-0.5"}), (at_one, {"static-0.5"})):
        assert {cell.name for cell in study.cells_of(named) if cell.varied} == expected
        assert {"channel-0.7", "channel-0.5"} <= {cell.name for cell in study.cells_of(named)}


def test_settings_of_peers_are_chosen_on_held_out_training_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    digits = study.Study.read(ROOT / "benchmarks" / "accuracy" / "digits.yaml")
    runner = study.Runner(digits, tmp_path / "runs")
    seen = []

    def run(command: list[str], name: str) -> None:
        seen.append(command)
        strength, lr = (float(command[command.index(flag) + 1]) for flag in ("--strength", "--finetune-lr"))
        output = Path(command[command.index("--output") + 1])
        output.parent.mkdir(parents=True, exist_ok=True)
        accuracy = 0.9 - abs(strength - 3.0) / 10 - lr / 100
        output.write_text(json.dumps({"accuracy": accuracy, "accuracy_kind": "validation"}))

    monkeypatch.setattr(runner, "_run", run)
    for _ in range(2):
        runner.choose("slimming")
        assert len(seen) == 4 * 2 * 2  # strengths, learning rates, seeds; once
    assert all(command[-2:] == ["--data.validation", "0.2"] for command in seen)
    cell = next(cell for cell in study.cells_of(digits) if cell.peer == "slimming")
    told = shlex.join(runner.command(cell, 0))
    assert "--strength 3 --finetune-lr 0.3" in told
    assert "validation" not in told
    taken_over = replace(digits, name="other", choices={}, chosen_in="digits")
    other = study.Runner(taken_over, tmp_path / "runs")
    other.choose("slimming")
    assert "--strength 3 --finetune-lr 0.3" in shlex.join(other.command(cell, 0))


def test_every_ablation_changes_one_thing() -> None:
    cells = study.cells_of(study.Study.read(ROOT / "benchmarks" / "accuracy" / "digits_ablations.yaml"))
    assert len({(cell.flags, cell.ablated) for cell in cells}) == len(cells)
    assert {cell.target for cell in cells} == {None, 0.5}


@pytest.mark.slow
def test_masking_ends_with_the_accuracy_of_removing(tmp_path: Path) -> None:
    flags = ["--config", "configs/digits.yaml", "--model.name", "resnet20", "--optim.epochs", "6"]
    flags += ["--output_dir", str(tmp_path), "--run_name"]
    scripts = {
        "removed": ["-m", "greenprune.train"],
        "masked": ["benchmarks/accuracy/ablated.py", "--mask", "--"],
    }
    found = {}
    for name, script in scripts.items():
        command = [sys.executable, *script, *flags, name]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
    assert found["masked"]["removals"] == found["removed"]["removals"]
    assert found["masked"]["accuracy"] == found["removed"]["accuracy"]
    assert found["masked"]["loss"] == pytest.approx(found["removed"]["loss"], rel=1e-4)
    assert found["masked"]["flops_forward"] == found["masked"]["flops_forward_dense"]
    assert found["removed"]["flops_forward"] < found["removed"]["flops_forward_dense"]


def test_channels_are_ordered_by_the_norm_of_all_that_goes_with_them() -> None:
    model = build_model(ModelConfig(name="resnet20"), classes=10, channels=3, image_size=32)
    attach_gates(model, GateConfig(units=["channel"], kind="static"))
    sets = find_channels(model).sets
    small = {("stages.1.1:hidden", 3): 0.0, ("stages.2.0:hidden", 60): 0.1, ("stages.0.2:hidden", 7): 0.2}
    with torch.no_grad():
        for (name, index), factor in small.items():
            for piece in sets[name].slices:
                tensor = getattr(model.get_submodule(piece.module), piece.tensor)
                tensor.select(piece.dim, index).mul_(factor)
    before, after = group_norms(model, sets["stages.1.1:hidden"]), group_norms(model, sets["stages.0.2:hidden"])
    assert before[3] == 0
    assert after[7] < after.median() / 4
    choice = object.__new__(ByNorm)
    choice.model, choice._units = model, gated_units(model)
    order = choice.order()
    assert order[:3] == list(small)
    assert len(order) == len(set(order)) == 3 * (16 + 32 + 64) - 9  # one of each set stays


def test_other_channels_go_when_those_of_a_run_went(tmp_path: Path) -> None:
    flags = ["--config", "configs/digits.yaml", "--model.name", "resnet20", "--optim.epochs", "2"]
    flags += ["--output_dir", str(tmp_path), "--run_name"]
    ours = [sys.executable, "-m", "greenprune.train", *flags, "ours", "--gate.units", "[channel]"]
    for_random = [sys.executable, "benchmarks/accuracy/random_removal.py", str(tmp_path / "ours"), *flags, "random"]
    by_norm = [sys.executable, "benchmarks/accuracy/norm_removal.py", str(tmp_path / "ours"), *flags, "norm"]
    found = {}
    for name, command in {"ours": ours, "random": for_random, "norm": by_norm}.items():
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / name / "summary.json").read_text())
    steps = {name: [removal["step"] for removal in summary["removals"]] for name, summary in found.items()}
    for name in ("random", "norm"):
        assert set(steps[name]) == set(steps["ours"])
        assert 0.49 < found[name]["kept_cost"] <= found["ours"]["kept_cost"]
    gone: dict[str, int] = {}
    for removal in found["random"]["removals"]:
        gone[removal["unit"]] = gone.get(removal["unit"], 0) + removal["channels"]
    widths = {f"stages.{stage}.{block}:hidden": 16 * 2**stage for stage in range(3) for block in range(3)}
    shares = [gone[name] / width for name, width in widths.items()]
    assert max(shares) - min(shares) <= 1 / 16


@pytest.mark.slow
def test_a_small_study_is_trained_kept_and_not_trained_again(tmp_path: Path) -> None:
    folder = ROOT / "benchmarks" / "results" / "accuracy"
    (tmp_path / "small-test.yaml").write_text(
        "config: configs/digits.yaml\nseeds: [0]\ntargets: [0.5]\nflags: ['--optim.epochs', '2']\n"
    )
    command = [sys.executable, "benchmarks/accuracy/study.py", str(tmp_path / "small-test.yaml")]
    command += ["--runs", str(tmp_path / "runs"), "--cells", "dense", "block", "scratch-block", "random-0.5"]
    try:
        cut = subprocess.run(
            [*command, "--minutes", "0.08"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
        assert cut.returncode == 1, cut.stderr
        assert "goes on with the next command" in cut.stderr or "not begun" in cut.stderr
        assert "Traceback" not in cut.stderr
        for _ in range(2):
            done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            times = {path.name: path.stat().st_mtime_ns for path in (folder / "small-test").glob("*.json")}
            assert len(times) == 4
        found = {path.name: json.loads(path.read_text()) for path in (folder / "small-test").glob("*.json")}
        assert "small-test/structures/block-0.5-seed0.json" in found["scratch-block-0.5-seed0.json"]["command"]
        ours, random = found["block-0.5-seed0.json"], found["random-0.5-seed0.json"]
        assert random["flops_forward"] == ours["flops_forward"]
        assert random["flops_train"] == pytest.approx(ours["flops_train"], rel=1e-3)  # its gates are static
        assert found["scratch-block-0.5-seed0.json"]["params"] == ours["params"]
        assert {path.name: path.stat().st_mtime_ns for path in (folder / "small-test").glob("*.json")} == times
    finally:
        shutil.rmtree(folder / "small-test")
        for path in folder.glob("small-test.*"):
            path.unlink()


def test_the_figure_has_room_for_the_names_of_all_its_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a picture nobody can scroll to those that are cut off."""
    curves = pytest.importorskip("curves")
    without = SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None))
    monkeypatch.setattr(curves, "importlib", without)  # no kaleido: a page, which is text
    points = [
        {"series": f"way {number}", "seeds": 2, "accuracy": 90.0, "deviation": 0.1, "flops": 0.5}
        for number in range(20)
    ]
    page = curves.write_curves(points, "it", tmp_path / "it", ["flops"]).read_text()
    (height,) = re.findall(r'"height":(\d+)', page)
    assert int(height) > 20 * 29 + 150
    unknown = [point | {"joules": None} for point in points]  # as before the dense twin is trained
    page = curves.write_curves(unknown, "it", tmp_path / "it", ["flops", "joules"]).read_text()
    assert "FLOPs of inference" in page
    assert "joules of training" not in page


def test_random_channels_go_for_a_run_in_which_a_whole_block_went(tmp_path: Path) -> None:
    """A block of whose channels none is left is taken out; that makes no run of blocks of it."""
    blocks = [{"action": "remove", "unit": "stages.0.1", "step": 1, "epoch": 0.05, "reason": "off"}]
    channels = [{**blocks[0], "unit": "stages.2.0:hidden", "channels": [0, 1, 2, 3]}]
    (tmp_path / "structure.json").write_text(json.dumps({"format": 2, "operations": [*blocks, *channels]}))
    command = [sys.executable, "benchmarks/accuracy/random_removal.py", str(tmp_path / "structure.json")]
    command += ["--config", "configs/digits.yaml", "--model.name", "resnet20", "--optim.epochs", "2", "--seed", "3"]
    command += ["--budget.target", "0.5", "--output_dir", str(tmp_path), "--run_name", "random"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "random" / "summary.json").read_text())
    assert {removal["unit"].rpartition(":")[2] for removal in summary["removals"]} == {"hidden"}
    assert summary["seed"] == 3
