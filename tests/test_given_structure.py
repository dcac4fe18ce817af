"""model.structure: a structure that one run found is what another is trained with, and that run is whole by itself."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from in_process import stopped_at
from launching import TRAIN, run
from safetensors.torch import load_file
from torch import equal

from greenprune.cli import main
from greenprune.config import BudgetConfig, Config, ConfigError, GateConfig, ModelConfig, UserError, parse_config
from greenprune.flops import count_costs
from greenprune.models import find_channels
from greenprune.network import kept_cost, prepare_network, with_unit_cost
from greenprune.progress import Display
from greenprune.report.comparison import compare_runs
from greenprune.report.history import read_history
from greenprune.run import train
from greenprune.surgery import Operation, Structure, replay, resolve_structure, structure_text
from greenprune.sweep.plan import read_sweep
from greenprune.tracking import course_of, read_events
from greenprune.unit_cost import UnitCost
from greenprune.verify import verify_run

FLAGS = ["--model.name", "resnet20", "--optim.epochs", "2", "--optim.lr", "0.05", "--removal.window", "5"]
DENSE = ["--gate.enabled", "false"]
HIDDEN = "stages.1.2:hidden"


def trained(folder: Path, *flags: str) -> str:
    """A run in this process, in its folder: what its display showed."""
    shown = io.StringIO()
    place = ["--output_dir", str(folder.parent), "--run_name", folder.name]
    train(parse_config([*FLAGS, *flags, *place]), {}, lambda: Display(shown))
    return shown.getvalue()


def removed(unit: str, channels: tuple[int, ...] | None = None) -> Operation:
    return Operation("remove", unit, 12, 0.5, "off", channels)


FOUND = Structure([removed(HIDDEN, (3, 0, 1)), removed("stages.0.1"), removed(HIDDEN, (9, 2))])
TEXT = f"remove stages.0.1 {HIDDEN}[0-3,9]"


class Images:
    classes, channels, image_size = 10, 1, 8


def with_structure(structure: str) -> Config:
    return Config(model=ModelConfig(name="resnet20", structure=structure), gate=GateConfig(enabled=False))


@pytest.fixture
def found(tmp_path: Path) -> Path:
    file = tmp_path / "structure.json"
    file.write_text(json.dumps(FOUND.to_dict()))
    return file


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that removed blocks and channels."""
    folder = tmp_path_factory.mktemp("runs") / "gated"
    trained(folder, "--gate.units", "[block,channel]")
    return folder


@pytest.fixture(scope="module")
def scratch(gated: Path) -> Path:
    """A run of its structure from scratch, whose origin is gone meanwhile."""
    copied = Path(shutil.copytree(gated, gated.with_name("copied")))
    folder = gated.with_name("scratch")
    assert "(given)" in trained(folder, *DENSE, "--model.structure", str(copied))
    shutil.rmtree(copied)
    return folder


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def final_tensors(folder: Path) -> dict:
    return load_file(max((folder / "checkpoints").iterdir()) / "model.safetensors")


# The text.


def test_a_structure_is_kept_as_text_that_says_what_is_gone(found: Path) -> None:
    for given in (str(found), str(found.parent), TEXT):
        assert resolve_structure(with_structure(given)).model.structure == TEXT
    assert structure_text(Structure([Operation("freeze", "stages.0.1", 1, 0.1, "on")])) is None


def test_channels_of_a_block_that_went_later_are_not_told() -> None:
    assert structure_text(Structure([removed(HIDDEN, (1,)), removed("stages.1.2")])) == "remove stages.1.2"


def test_a_changed_file_is_a_changed_run(found: Path) -> None:
    before = resolve_structure(with_structure(str(found))).identity()
    found.write_text(json.dumps(Structure([removed("stages.0.1")]).to_dict()))
    assert resolve_structure(with_structure(str(found))).identity() != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "not JSON"),
        ("[]", "not a structure of format"),
        ('{"format": 2, "operations": [{"action": "remove"}]}', "malformed structure"),
        ('{"format": 2, "operations": []}', "removes nothing"),
    ],
)
def test_what_is_no_structure_is_refused_in_one_line(found: Path, content: str | None, message: str) -> None:
    found.unlink() if content is None else found.write_text(content)
    with pytest.raises(ConfigError, match=rf"^model\.structure: .*{message}.*expected"):
        resolve_structure(with_structure(str(found)))


@pytest.mark.parametrize(
    "text",
    ["remove stages.0.1[", "remove stages.0.1[a]", "remove stages.0.1[1-]", "remove a[2]", "remove a:b[0-99999999999]"],
)
def test_text_that_names_no_units_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.structure: .* is not a unit; expected"):
        resolve_structure(with_structure(text))


@pytest.mark.parametrize("text", ["remove stages.9.9", f"remove {HIDDEN}[400]", f"remove {HIDDEN}[0-31]"])
def test_the_structure_of_another_network_is_refused(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.structure: does not fit resnet20 .*expected a structure of the same"
    ):
        prepare_network(with_structure(text), Images())


def test_gates_on_top_of_what_meets_the_budget_already_are_refused() -> None:
    gated = Config(model=ModelConfig(name="resnet20", structure=TEXT), budget=BudgetConfig(target=0.9))
    with pytest.raises(ConfigError, match=r"^budget\.target: 0\.9 .*which keeps 0\.8\d+; expected less"):
        prepare_network(gated, Images())


def test_gates_on_top_are_judged_by_what_the_budget_counts() -> None:
    """By what was measured, once it is: its share of the FLOPs says nothing of its share of the seconds."""
    budget = BudgetConfig(target=0.9, unit="time")
    text = "remove stages.1.1"
    network = prepare_network(Config(model=ModelConfig(name="resnet20", structure=text), budget=budget), Images())
    assert kept_cost(network.costs, network.given) <= 0.9
    seconds = dict.fromkeys(network.table.branches, 0.1)
    dear, cheap = UnitCost(1.05, seconds), UnitCost(1.05, seconds | {"stages.1.1": 0.2})
    assert with_unit_cost(network, dear, budget).measured == dear
    with pytest.raises(ConfigError, match=r"^budget\.target: 0\.9 .*which keeps 0\.810; expected less"):
        with_unit_cost(network, cheap, budget)


# What it costs.


@pytest.mark.parametrize("name", ["resnet20", "resnext50_32x4d"])
def test_the_cost_is_that_of_the_smaller_network(name: str) -> None:
    class Larger:
        classes, channels, image_size = 10, 3, 32

    dense = Config(model=ModelConfig(name=name), gate=GateConfig(enabled=False))
    network = prepare_network(dense, Larger())
    blocks = list(network.table.branches)
    sets = [item for item, at in find_channels(network.model).sets.items() if at.block != blocks[1]]
    text = f"remove {blocks[1]} " + " ".join(f"{item}[0-1]" for item in sets[:3])
    given = prepare_network(
        resolve_structure(Config(model=ModelConfig(name=name, structure=text), gate=GateConfig(enabled=False))),
        Larger(),
    )
    assert given.table.dense == network.table.dense
    cost = given.table.cost_of(given.given)
    replay(given.given, given.model)
    assert cost == count_costs(given.model, (3, 32, 32))[""]
    share = cost.flops_forward / network.table.dense.flops_forward
    assert kept_cost(given.costs, given.given) == pytest.approx(share)


# Whole runs.


def test_a_structure_is_trained_from_scratch(gated: Path, scratch: Path) -> None:
    theirs, mine = read(gated / "summary.json"), read(scratch / "summary.json")
    for key in ("params", "params_dense", "flops_forward", "flops_forward_dense", "flops_train_dense", "blocks"):
        assert mine[key] == theirs[key], key
    assert mine["flops_train"] < theirs["flops_train"]
    assert mine["flops_train"] / mine["flops_train_dense"] < 0.51
    assert mine["kept_cost"] == pytest.approx(theirs["kept_cost"])
    assert (mine["gated"], mine["structure_given"], mine["budget_target"]) == (False, True, None)
    assert {(r["reason"], r["step"]) for r in mine["removals"]} == {("given", 0)}
    shapes = {name: tensor.shape for name, tensor in final_tensors(scratch).items()}
    assert shapes == {name: tensor.shape for name, tensor in final_tensors(gated).items()}


def test_the_run_is_whole_and_exported_without_the_file_it_came_from(scratch: Path, tmp_path: Path) -> None:
    assert [finding for finding in verify_run(scratch) if finding.good is False] == []
    assert main(["export", str(scratch), "--format", "safetensors", "-o", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Removed: " in card
    trained(tmp_path / "again", "--config", str(scratch / "config.yaml"), "--optim.epochs", "1")


def test_verify_finds_a_structure_that_is_not_the_given_one(scratch: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(scratch, tmp_path / "it"))
    config = (copied / "config.yaml").read_text()
    text = read_text(config)
    (copied / "config.yaml").write_text(config.replace(text, "remove stages.0.1"))
    assert any(finding.what.startswith("step-") and finding.good is False for finding in verify_run(copied))


def read_text(config: str) -> str:
    lines = config.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("  structure:"))
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith("    "))
    return "\n".join(lines[start:end]).partition("structure: ")[2]


def test_it_is_compared_with_the_dense_twin_and_is_none_itself(gated: Path, scratch: Path) -> None:
    trained(gated.with_name("dense"), *DENSE)
    runs = {one.name: one for one in compare_runs([gated.parent]).runs}
    assert {name: one.twin for name, one in runs.items()} == {"gated": "dense", "scratch": "dense", "dense": None}
    assert runs["scratch"].against_twin is not None
    without = {one.name: one for one in compare_runs([gated, scratch]).runs}
    assert without["gated"].standing == "gated, no dense twin here"
    assert without["scratch"].standing == "structure given, no dense twin here"


def test_interrupted_and_resumed_is_the_uninterrupted_run(gated: Path, scratch: Path, tmp_path: Path) -> None:
    folder = tmp_path / "it"
    with stopped_at(25):
        trained(folder, *DENSE, "--model.structure", str(gated))
    with pytest.raises(UserError, match=r"it differs in model\.structure"):
        trained(folder, *DENSE, "--resume", "auto", "--model.structure", "remove stages.0.1")
    trained(folder, *DENSE, "--resume", "auto", "--model.structure", str(gated))
    assert all(equal(tensor, final_tensors(scratch)[name]) for name, tensor in final_tensors(folder).items())
    assert [finding for finding in verify_run(folder) if finding.good is False] == []
    assert read(folder / "summary.json")["flops_train"] == read(scratch / "summary.json")["flops_train"]


def test_an_attempt_that_ended_before_its_first_checkpoint_tells_it_once(scratch: Path) -> None:
    events = read_events(scratch / "events.jsonl")
    given = [event for event in events if event["kind"] == "removal"]
    twice = [*events[: 1 + len(given)], *events]
    assert [event for event in course_of(twice) if event["kind"] == "removal"] == given
    assert len(read_history(twice).changes) == len(given)


def test_more_may_go_with_gates(gated: Path, tmp_path: Path) -> None:
    structure = ["--model.structure", str(gated / "structure.json")]
    trained(tmp_path / "more", *structure, "--budget.target", "0.3", "--gate.units", "[block,channel]")
    summary = read(tmp_path / "more" / "summary.json")
    assert 0.3 - summary["cheapest_unit_cost"] < summary["kept_cost"] <= 0.3
    assert summary["gates_left"] == 0
    assert {removal["reason"] == "given" for removal in summary["removals"]} == {True, False}
    assert [finding for finding in verify_run(tmp_path / "more") if finding.good is False] == []


def test_two_processes_begin_with_the_same(gated: Path, tmp_path: Path) -> None:
    flags = [*DENSE, "--model.structure", str(gated), "--output_dir", str(tmp_path), "--run_name", "two"]
    done = run(TRAIN, [*FLAGS, *flags], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr
    assert read(tmp_path / "two" / "summary.json")["params"] == read(gated / "summary.json")["params"]


def test_a_bad_structure_leaves_no_file(tmp_path: Path) -> None:
    flags = ["--gate.enabled", "false", "--model.structure", "remove stages.9.9", "--output_dir", str(tmp_path / "no")]
    done = run(TRAIN, [*FLAGS, *flags])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not (tmp_path / "no").exists()


def test_a_sweep_over_structures_has_each_beside_one_dense_twin(found: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {name: resnet20}\ngate: {enabled: false}\n")
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"base: base.yaml\ngrid: {{model.structure: ['{found}', 'remove stages.0.1']}}\nseeds: [0, 1]\n")
    tasks = read_sweep(sweep).tasks
    assert [task.config.model.structure for task in tasks if task.config.seed == 0] == [None, TEXT, "remove stages.0.1"]
    assert [task.is_twin for task in tasks if task.config.seed == 0] == [True, False, False]
    assert len({task.config.identity() for task in tasks}) == 6
