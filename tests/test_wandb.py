"""W&B and TensorBoard offline, for real: the run's numbers are in the files that they read."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import wandb

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
sys.path.insert(0, str(Path(__file__).parent / "report"))
from google.protobuf.message import DecodeError
from launching import TRAIN, command, environment
from recording import STEPS, record_run, write_events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from wandb.proto import wandb_internal_pb2

from greenprune.cli import main
from greenprune.config import Config, ConfigError, GateConfig, ModelConfig, OptimConfig, TrackingConfig
from greenprune.locking import FolderLock
from greenprune.mirrors import GuardedMirror
from greenprune.progress import Display
from greenprune.run import train
from greenprune.tensorboard_mirror import TensorBoardMirror
from greenprune.tracking import RunFolder
from greenprune.wandb_mirror import wandb_options, where_to_see

BLOCK = 32768
HEADER = 7


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The protobuf records of a .wandb file: a LevelDB-style log after a 7-byte header."""
    content, position, parts = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + HEADER])
        if kind == 0:
            position += left
            continue
        parts += content[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def all_records(path: Path) -> list[wandb_internal_pb2.Record]:
    """The records of a run that has ended; W&B's own process may still be writing the last of them."""
    deadline = time.monotonic() + 20
    while True:
        with suppress(DecodeError):  # a record is there in part
            found = list(records(path))
            if any(record.WhichOneof("record_type") == "exit" for record in found):
                return found
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.1)


class Uploaded:
    """What the .wandb file of a run that has ended tells."""

    def __init__(self, path: Path) -> None:
        self.history: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.summary: dict[str, Any] = {}
        self.artifacts: dict[str, set[str]] = {}
        self.config: dict[str, Any] = {}
        self.run = wandb_internal_pb2.RunRecord()
        for record in all_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run.CopyFrom(record.run)
                self._update(self.config, record.run.config.update)
            elif kind == "config":
                self._update(self.config, record.config.update)
            elif kind == "history":
                self.history.append({})
                self._update(self.history[-1], record.history.item)
            elif kind == "metric":
                self.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif kind == "summary":
                self._update(self.summary, record.summary.update)
            elif kind == "artifact":
                self.artifacts[record.artifact.type] = {entry.path for entry in record.artifact.manifest.contents}

    @staticmethod
    def _update(values: dict[str, Any], items: Iterable[Any]) -> None:
        values.update({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})

    def rows(self, key: str) -> list[dict[str, Any]]:
        return [row for row in self.history if key in row]


NAME = "größe+1"
"""A run's name with what W&B does not take everywhere."""

ARGS = ["--model.name", "resnet20", "--optim.epochs", "3", "--removal.decide_by", "0.7", "--optim.lr", "0.05"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without network or key, told to W&B and TensorBoard."""
    folder = tmp_path_factory.mktemp("runs")
    args = [*ARGS, "--output_dir", str(folder), "--run_name", NAME, "--tracking.trackers", "[wandb,tensorboard]"]
    # A home without a netrc, so that nobody is logged in.
    done = subprocess.run(
        command(TRAIN, [*args, "--energy.country", "FRA"], 1),
        env=environment() | {"HOME": str(folder)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if "wandb sync" in line]
    assert len(told) == 1
    return folder / NAME


@pytest.fixture(scope="module")
def uploaded(run: Path) -> Uploaded:
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    return Uploaded(path)


def events_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def test_every_figure_of_the_events_is_told(run: Path, uploaded: Uploaded) -> None:
    epochs = uploaded.rows("eval/accuracy")
    for row, event in zip(epochs, events_of(run, "epoch"), strict=True):
        assert row["step"] == event["step"]
        assert row["_timestamp"] == pytest.approx(event["time"])
        told = ["eval/accuracy", "eval/loss", "train/loss", "flops/train", "flops/train_dense", "flops/forward"]
        told += ["energy/total_j", "energy/epoch_j", "energy/power_w", "energy/co2_g"]
        told += ["structure/blocks", "structure/channels", "structure/kept_cost"]
        assert {key: row[key] for key in told} == {key: event[key] for key in told}
        phases = {key: value for key, value in event["energy/by_phase_j"].items() if value is not None}
        assert {key.rpartition("/")[2]: row[key] for key in row if key.startswith("energy/by_phase_j/")} == phases
        devices = [row[key] for key in row if key.startswith("energy/by_device_j/")]
        assert sum(devices) == pytest.approx(sum(event["energy/by_device_j"].values()))
        assert sum(devices) == pytest.approx(sum(phases.values()))
    trained = uploaded.rows("train/samples_per_s")
    for row, event in zip(trained, events_of(run, "train"), strict=True):
        told = ["train/loss", "train/accuracy", "train/lr", "train/samples_per_s", "train/step_time_s", "gate/price"]
        assert {key: row[key] for key in told} == {key: event[key] for key in told}
    windows = uploaded.rows("gate/openness/values")
    gated = [event for event in events_of(run, "window") if event["units"]]
    for row, event in zip(windows, gated, strict=True):
        rates = {key.removeprefix("gate_rate/"): row[key] for key in row if key.startswith("gate_rate/")}
        assert rates == {name: unit["rate"] for name, unit in event["units"].items()}
        assert row["gate/openness/_type"] == "histogram"
        assert sum(row["gate/openness/values"]) == len(rates)
        edges = row["gate/openness/bins"]
        assert (edges[0], edges[-1]) == (0, 1)  # the same in every row: a heat map


def test_accuracy_is_drawn_over_joules_over_flops_and_over_steps(uploaded: Uploaded) -> None:
    assert uploaded.axes["eval/*"] == "energy/total_j"
    assert uploaded.axes["eval_over_flops/*"] == "flops/train"
    for names in ("eval_over_steps/*", "train/*", "energy/*", "structure/*", "gate_rate/*"):
        assert uploaded.axes[names] == "step"
    for row in uploaded.rows("eval/accuracy"):
        assert row["eval_over_flops/accuracy"] == row["eval_over_steps/accuracy"] == row["eval/accuracy"]
        assert {"energy/total_j", "flops/train", "step"} <= row.keys()


def test_the_table_of_runs_is_useful_at_once(run: Path, uploaded: Uploaded) -> None:
    written = json.loads((run / "summary.json").read_text())
    for key in ("accuracy", "energy_j", "co2_g", "flops_train", "kept_cost", "blocks", "energy_quality"):
        assert uploaded.summary[key] == written[key]
    assert uploaded.summary["flops_saved"] == pytest.approx(1 - written["flops_train"] / written["flops_train_dense"])
    assert uploaded.config["budget"]["target"] == 0.5
    record = uploaded.run
    assert record.display_name == NAME
    assert record.run_id.startswith(f"{NAME}-")
    assert record.run_group == "digits-resnet20-block-0.5"
    assert record.job_type == "gated"
    assert set(record.tags) == {"digits", "resnet20", "gated", "block gates", "keep 0.5"}


def test_structure_and_report_are_kept_with_the_run(uploaded: Uploaded) -> None:
    assert uploaded.artifacts == {"structure": {"structure.json"}, "report": {"report.md", "report.html"}}


def test_tensorboard_has_the_same(run: Path) -> None:
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    for key in ("eval/accuracy", "energy/total_j", "flops/train", "structure/blocks", "energy/co2_g"):
        told = {scalar.step: scalar.value for scalar in board.Scalars(key)}  # the last one of each step
        assert {event["step"] for event in events_of(run, "epoch")} <= told.keys()
        for event in events_of(run, "epoch"):
            assert told[event["step"]] == pytest.approx(event[key], rel=1e-6)
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]
    assert board.Scalars("result/accuracy")[-1].value == pytest.approx(accuracy, rel=1e-6)
    rates = [scalar.value for scalar in board.Scalars("gate_rate/stages.0.1")]
    assert len(rates) >= 2


def test_a_run_is_caught_up_from_its_events(
    run: Path, uploaded: Uploaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / NAME
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("wandb", "tensorboard", "checkpoints"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "77")  # of the shell that syncs, not of the run
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    assert main(["sync", str(copy)]) == 0
    said = capfd.readouterr().out
    assert f"events of {NAME} are told" in said
    (path,) = (copy / "wandb").glob("offline-run-*/*.wandb")
    assert f"wandb sync {shlex.quote(str(path.parent))}" in said
    again = Uploaded(path)
    assert again.run.run_id == uploaded.run.run_id
    assert again.run.run_group == uploaded.run.run_group
    assert again.axes == uploaded.axes
    assert again.artifacts == uploaded.artifacts
    left_out = ("_runtime",)
    for row, other in zip(again.history, uploaded.history, strict=True):
        assert {k: v for k, v in row.items() if k not in left_out} == {
            k: v for k, v in other.items() if k not in left_out
        }
    assert main(["sync", str(copy), "--to", "tensorboard"]) == 0
    assert main(["sync", str(copy), "--to", "tensorboard"]) == 0  # in place of what is there
    board = EventAccumulator(str(copy / "tensorboard"))
    board.Reload()
    assert len(board.Scalars("eval/accuracy")) == 3


def test_a_killed_run_that_goes_on_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both attempts bear one identity, and what the killed one had not written is caught up from the events."""
    args = ["--output_dir", str(tmp_path), "--run_name", NAME, "--model.name", "resnet20", "--optim.lr", "0.05"]
    args += ["--resume", "auto", "--tracking.trackers", "[wandb]", "--optim.epochs", "6"]
    variables = environment() | {"HOME": str(tmp_path)}
    killed = subprocess.Popen(command(TRAIN, args), env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / NAME / "events.jsonl"
    while not log.exists() or log.read_text().count('"kind": "checkpoint"') < 2:
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    done = subprocess.run(command(TRAIN, args), env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    newest = max((tmp_path / NAME / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    second = Uploaded(newest)
    assert second.run.run_id.startswith(f"{NAME}-")
    assert newest.name == f"run-{second.run.run_id}.wandb"
    assert {path.name for path in (tmp_path / NAME / "wandb").glob("offline-run-*/*.wandb")} == {newest.name}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["sync", str(tmp_path / NAME)]) == 0
    synced = max((tmp_path / NAME / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    caught_up = Uploaded(synced)
    assert caught_up.run.run_id == second.run.run_id
    epochs = [row["step"] for row in caught_up.history if "eval/accuracy" in row]
    assert epochs[-1] == 132
    assert set(epochs) == {22 * epoch for epoch in range(1, 7)}
    assert caught_up.summary["attempts"] == 2


def test_a_tracker_whose_process_is_killed_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B writes from a process of its own: SIGKILL takes it in the middle of a run, which goes on and is caught up."""
    args = ["--output_dir", str(tmp_path), "--run_name", NAME, "--model.name", "resnet20", "--optim.lr", "0.05"]
    args += ["--tracking.trackers", "[wandb]", "--optim.epochs", "6"]
    run = subprocess.Popen(
        command(TRAIN, args), env=environment() | {"HOME": str(tmp_path)}, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / NAME / "events.jsonl"
    while not log.exists() or log.read_text().count('"kind": "epoch"') < 2:
        assert run.poll() is None
        time.sleep(0.05)
    (service,) = (child for child in psutil.Process(run.pid).children(recursive=True) if "wandb-core" in child.name())
    service.kill()
    killed_s = time.monotonic()
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said[-3000:]
    assert time.monotonic() - killed_s < 60
    assert said.count("wandb has failed and gets nothing more of this run") == 1, said[-3000:]
    assert f"greenprune sync {shlex.quote(str(tmp_path / NAME))} --to wandb" in said
    assert "Traceback" not in said
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["sync", str(tmp_path / NAME)]) == 0
    synced = max((tmp_path / NAME / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert [row["step"] for row in Uploaded(synced).history if "eval/accuracy" in row] == [22 * n for n in range(1, 7)]


def test_a_run_that_goes_on_is_not_synced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "events.jsonl").write_text("")
    lock = FolderLock(tmp_path)
    assert main(["sync", str(tmp_path)]) == 2
    lock.release()
    assert "still goes on" in capsys.readouterr().err


def test_every_runs_folder_is_one_wandb_run(tmp_path: Path) -> None:
    """Also two of one name and config: runs of two sweeps or output folders, or one that was deleted and done again."""
    config = Config(run_name=NAME)

    def id_of(path: Path) -> str:
        return str(wandb_options(config, RunFolder(path), online=True, resume=True)["id"])

    first, second = RunFolder(tmp_path / "a" / NAME), RunFolder(tmp_path / "b" / NAME)
    first.create(config)
    second.create(config)
    known = id_of(first.path)
    assert known.startswith(f"{NAME}-")
    assert known != id_of(second.path)
    assert known == id_of(first.path)  # in the next attempt
    shutil.copytree(first.path, tmp_path / "copy")
    moved = first.path.rename(tmp_path / "moved")
    assert known == id_of(tmp_path / "copy") == id_of(moved)
    first.create(config)
    assert known != id_of(first.path)
    first.id.unlink()
    assert id_of(first.path) == f"{NAME}-{config.identity()}"  # as for all folders from before there was a file


@pytest.mark.parametrize("name", ["x" * 240, "ü" * 120])
def test_of_the_longest_name_wandb_can_make_a_folder(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path / name)
    folder.create(Config(run_name=name))
    options = wandb_options(Config(), folder, online=False, resume=True)
    (tmp_path / f"offline-run-20261231_235959-{options['id']}").mkdir()
    (tmp_path / f"run-{options['id']}.wandb").touch()
    assert options["name"] == name


@pytest.mark.parametrize(
    ("config", "attempts", "group"),
    [
        (Config(), [{"slurm": {"job": "78", "array": "77"}}], "slurm-array-77"),
        (Config(), [{"slurm": {"array": "60"}}, {"slurm": {"array": "77"}}], "slurm-array-77"),
        (Config(), [{"slurm": {"job": "78"}}], "digits-resnet38-block-0.5"),
        (Config(), [{"slurm": None}], "digits-resnet38-block-0.5"),
        (Config(), [], "digits-resnet38-block-0.5"),
        (Config(tracking=TrackingConfig(group="mine")), [{"slurm": {"job": "78", "array": "77"}}], "mine"),
    ],
)
def test_the_array_that_a_run_was_a_task_of_is_its_group_wherever_it_is_told(
    tmp_path: Path, config: Config, attempts: list[dict[str, Any]], group: str
) -> None:
    folder = RunFolder(tmp_path)
    folder.provenance.write_text("".join(json.dumps(attempt) + "\n" for attempt in attempts))
    assert wandb_options(config, folder, online=False, resume=False)["group"] == group


def test_within_a_runs_folder_it_is_synced_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The commands that are told to copy do what they say, also where a path holds spaces."""
    run = tmp_path / "my runs" / "it"
    record_run(run)
    monkeypatch.chdir(run)
    assert main(["sync", ".", "--offline"]) == 0
    said = capfd.readouterr().out
    assert "events of it are told" in said
    (path,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert shlex.split(said.partition("to upload: ")[2]) == ["wandb", "sync", str(path.parent)]
    assert main(["sync", str(run), "--offline"]) == 0
    told = [Uploaded(found).run for found in (run / "wandb").glob("offline-run-*/*.wandb")]
    assert {record.display_name for record in told} == {"it"}
    assert len({record.run_id for record in told}) == 1
    assert main(["sync", ".", "--to", "tensorboard"]) == 0
    said = capfd.readouterr().out
    assert shlex.split(said.partition("TensorBoard: ")[2]) == ["tensorboard", "--logdir", str(run.parent)]


def read_board(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder))
    board.Reload()
    return board


def test_tensorboard_has_every_figure_at_the_time_of_its_event(tmp_path: Path) -> None:
    """Also those that were brought to it long after."""
    events = record_run(tmp_path / "it")
    assert main(["sync", str(tmp_path / "it"), "--to", "tensorboard"]) == 0
    board = read_board(tmp_path / "it" / "tensorboard")
    times = {event["step"]: event["time"] for event in events}
    names = board.Tags()["scalars"]
    assert {"train/loss", "eval/accuracy", "gate_rate/stages.0.0"} <= set(names)
    for name in names:
        if not name.startswith("result/"):
            assert {point.step: point.wall_time for point in board.Scalars(name)}.items() <= times.items(), name
    assert [point.wall_time for point in board.Scalars("result/accuracy")] == [events[-1]["time"]]


@pytest.mark.parametrize(("resumed_at", "first_again"), [(0, 1), (STEPS, 2)])
def test_in_tensorboard_steps_that_were_done_again_are_there_once(
    tmp_path: Path, resumed_at: int, first_again: int
) -> None:
    """With the figures of the second time, whether an attempt follows the other as it trains or from the log."""
    whole = record_run(tmp_path / "it")
    first = [event for event in whole if event["step"] <= 3 * STEPS and event["kind"] != "end"]
    again = [whole[0] | {"step": resumed_at, "attempt": 2}]
    again += [event | {"train/loss": 7.0} for event in whole[1:] if event["step"] > resumed_at]
    write_events(tmp_path / "it", [*first, *again])
    assert main(["sync", str(tmp_path / "it"), "--to", "tensorboard"]) == 0
    for attempt in (first, again):
        writer = SummaryWriter(str(tmp_path / "live"))
        mirror = TensorBoardMirror(writer, {})
        for event in attempt:
            mirror(event)
        writer.close()
    for folder in (tmp_path / "it" / "tensorboard", tmp_path / "live"):
        board = read_board(folder)
        points = [(point.step, point.value) for point in board.Scalars("eval/accuracy")]
        told = [(event["step"], event["eval/accuracy"]) for event in whole if event["kind"] == "epoch"]
        assert points == [(step, pytest.approx(accuracy, rel=1e-6)) for step, accuracy in told]
        losses = {point.step // STEPS: point.value for point in board.Scalars("train/loss")}
        assert [epoch for epoch, loss in losses.items() if loss == 7] == list(range(first_again, 5))


# Trackers that fail.


def train_shortly(folder: Path, trackers: list[str], **environment: str) -> tuple[dict[str, Any], str]:
    """A short run in this process, its summary and what its display showed."""
    config = Config(
        output_dir=str(folder),
        run_name=NAME,
        model=ModelConfig(name="resnet20"),
        optim=OptimConfig(epochs=1),
        gate=GateConfig(enabled=False),
        tracking=TrackingConfig(trackers=trackers),  # type: ignore[arg-type]
    )
    shown = io.StringIO()
    return train(config, environment, lambda: Display(shown)).summary, shown.getvalue()


def test_a_server_that_does_not_answer_leaves_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = wandb.init

    def unreachable(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.CommError("no answer")
        return init(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    summary, shown = train_shortly(tmp_path, ["wandb"], WANDB_API_KEY="x" * 40)
    assert summary["accuracy"] is not None
    assert "wandb sync" in shown
    (path,) = (tmp_path / NAME / "wandb").glob("offline-run-*/*.wandb")
    assert Uploaded(path).rows("eval/accuracy")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), wandb.errors.UsageError("gone")])
def test_a_tracker_that_cannot_start_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(**_: Any) -> Any:
        raise error

    monkeypatch.setattr(wandb, "init", broken)
    summary, shown = train_shortly(tmp_path, ["wandb", "tensorboard"])
    assert summary["accuracy"] is not None
    assert "wandb has failed" in shown
    assert f"greenprune sync {shlex.quote(str(tmp_path / NAME))} --to wandb" in shown
    assert list((tmp_path / NAME / "tensorboard").glob("events*"))  # the other one is not harmed


def test_a_tracker_that_fails_on_the_way_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def mirror(event: dict[str, Any]) -> None:
        calls.append(event["step"])
        raise BrokenPipeError(32, "Broken pipe")

    guarded = GuardedMirror("wandb", mirror, RunFolder(tmp_path))
    guarded({"step": 1})
    guarded({"step": 2})
    guarded.close()
    assert calls == [1]
    error = capsys.readouterr().err
    assert "wandb has failed and gets nothing more of this run ([Errno 32] Broken pipe); training goes on." in error
    assert error.count("\n") == 1


def test_commands_to_copy_are_quoted_where_a_path_holds_spaces(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "my runs" / "it"
    run.mkdir(parents=True)

    def fail(_: dict[str, Any]) -> None:
        raise OSError("gone")

    guarded = GuardedMirror("wandb", fail, RunFolder(run))
    guarded({"step": 1})
    guarded.close()
    told = capsys.readouterr().err.partition("To catch up later: ")[2]
    assert shlex.split(told) == ["greenprune", "sync", str(run), "--to", "wandb"]
    offline = SimpleNamespace(settings=SimpleNamespace(_offline=True))
    told = where_to_see(offline, RunFolder(run)).partition("to upload: ")[2]
    assert shlex.split(told) == ["wandb", "sync", str(run / "wandb" / "offline-run-*")]
    assert told.endswith("/offline-run-*")  # for the shell to expand


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hangs = threading.Event()

    def mirror(_: dict[str, Any]) -> None:
        hangs.wait(30)

    guarded = GuardedMirror("wandb", mirror, RunFolder(tmp_path))
    began_s = time.perf_counter()
    for step in range(1000):
        guarded({"step": step})
    assert time.perf_counter() - began_s < 0.5
    guarded.close(timeout_s=0.1)
    hangs.set()
    assert "it has not taken everything within 0.1 s" in capsys.readouterr().err


class Told(dict[str, Any]):
    """An event of which it can be seen whether anything still holds it."""


def tell(guarded: GuardedMirror, count: int) -> list[weakref.ref[Told]]:
    events = []
    for step in range(count):
        event = Told(step=step)
        guarded(event)
        events.append(weakref.ref(event))
    return events


def count_kept(events: list[weakref.ref[Told]]) -> int:
    return sum(event() is not None for event in events)


def test_a_tracker_that_has_failed_keeps_no_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither those that waited as it failed nor those that come after that: a run may have millions."""
    fails = threading.Event()

    def mirror(_: dict[str, Any]) -> None:
        fails.wait(30)
        raise BrokenPipeError(32, "Broken pipe")

    guarded = GuardedMirror("wandb", mirror, RunFolder(tmp_path))
    waited = tell(guarded, 100)
    fails.set()
    deadline = time.monotonic() + 10
    while count_kept(waited) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count_kept(waited) <= 1  # the one that it failed at, in the error's frames
    assert count_kept(tell(guarded, 100)) <= 1
    guarded.close()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tracker_that_hangs_keeps_so_many_events_and_is_told_the_next_ones_once_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hangs, taken = threading.Event(), []

    def mirror(event: dict[str, Any]) -> None:
        hangs.wait(30)
        taken.append(event["step"])

    guarded = GuardedMirror("wandb", mirror, RunFolder(tmp_path))
    kept = count_kept(tell(guarded, 10_000))
    assert 1000 < kept < 5000
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "wandb does not keep up" in told
    assert f"greenprune sync {shlex.quote(str(tmp_path))} --to wandb" in told
    hangs.set()
    deadline = time.monotonic() + 10
    while len(taken) < kept and time.monotonic() < deadline:
        time.sleep(0.01)
    guarded({"step": -1})
    guarded.close()
    assert (taken[: kept - 1], len(taken), taken[-1]) == ([*range(kept - 1)], kept + 1, -1)


def test_a_tracker_whose_package_is_missing_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking.trackers: 'clearml' is not valid here.*pip install clearml"):
        train_shortly(tmp_path, ["clearml"])
    assert not (tmp_path / NAME).exists()
