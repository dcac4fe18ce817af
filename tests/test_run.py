"""Whole runs as a user starts them: results, files, interruption and resume, bad input."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from in_process import Killed, after_step, killed_at, stopped_at
from launching import ROOT, TRAIN, command, environment, run
from PIL import Image
from safetensors.torch import load_file
from torch import equal

from greenprune.checkpoint import CheckpointCorrupt, list_checkpoints, load_checkpoint, save_checkpoint
from greenprune.command import run_command
from greenprune.config import Config, ConfigError, UserError, load_config, parse_config
from greenprune.progress import Display
from greenprune.recording import Recorder
from greenprune.run import _new_or_same_folder, train
from greenprune.tracking import EventLog, RunFolder, course_of
from greenprune.trainer import Trainer
from greenprune.verify import verify_run

SMALL = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: 6, lr: 0.05}
gate: {warmup: 0.1}
budget: {target: 0.5}
removal: {window: 11, decide_by: 0.6}
"""

CONTRACT = """
    accuracy accuracy_kind params params_dense flops_forward flops_forward_dense flops_train flops_train_dense
    kept_cost budget_target gates_left removals energy_j energy_quality energy_by_phase_j co2_g time_s step_time_s
    attempts samples world_size
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one uninterrupted gated run."""
    output = tmp_path_factory.mktemp("runs")
    args = ["--config", str(config), "--output_dir", str(output), "--run_name", "whole", "--energy.country", "FRA"]
    done = run(TRAIN, args)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr
    return output / "whole"


def read_summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def read_events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def final_tensors(folder: Path) -> dict:
    newest = max((folder / "checkpoints").iterdir())
    return load_file(newest / "model.safetensors")


def test_a_gated_run_meets_its_budget_and_leaves_no_gate(finished: Path) -> None:
    summary = read_summary(finished)
    assert set(CONTRACT.split()) <= summary.keys()
    assert summary["budget_target"] - summary["cheapest_unit_cost"] < summary["kept_cost"] <= summary["budget_target"]
    assert summary["kept_cost"] == pytest.approx(summary["flops_forward"] / summary["flops_forward_dense"])
    assert summary["gates_left"] == 0
    assert summary["flops_train"] < summary["flops_train_dense"]
    assert summary["params"] < summary["params_dense"]
    assert len(summary["removals"]) == summary["blocks_dense"] - summary["blocks"]
    assert summary["samples"] == 6 * 22 * 64
    assert summary["accuracy"] > 0.8
    assert not any("gate" in name for name in final_tensors(finished))


def test_the_ledger_is_the_sum_of_its_steps(finished: Path) -> None:
    """FLOPs executed follow from the structure of the moment, as the events tell it."""
    events = read_events(finished)
    summary = read_summary(finished)
    start = events[0]
    assert start["kind"] == "start"
    assert start["flops/forward_dense"] == summary["flops_forward_dense"]
    totals = [event["flops/train"] for event in events if event["kind"] == "train"]
    assert totals == sorted(totals)
    assert totals[-1] == summary["flops_train"]
    first_removal = next(event["step"] for event in events if event["kind"] == "removal")
    before = [event for event in events if event["kind"] == "train" and event["step"] <= first_removal]
    # Gates cost a little on top of the dense twin until units go.
    per_sample = before[-1]["flops/train"] / (before[-1]["step"] * 64)
    dense_per_sample = summary["flops_train_dense"] / summary["samples"]
    assert dense_per_sample < per_sample < 1.001 * dense_per_sample


def test_energy_adds_up_and_names_its_source(finished: Path) -> None:
    summary = read_summary(finished)
    assert summary["energy_j"] > 0
    assert summary["energy_quality"] in ("counter", "integrated power", "estimate")
    known = [joules for joules in summary["energy_by_phase_j"].values() if joules is not None]
    assert sum(known) == pytest.approx(summary["energy_j"])
    assert set(summary["energy_by_phase_j"]) == {"data", "setup", "train", "eval", "surgery", "checkpoint", "idle"}
    assert sum(summary["energy_by_device_j"].values()) == pytest.approx(summary["energy_j"])
    assert summary["energy_by_attempt"] == [{"attempt": 1, "energy_j": summary["energy_j"], "lost_j": 0.0}]
    assert summary["energy_per_sample_j"] == pytest.approx(summary["energy_j"] / summary["samples"])
    epochs = summary["energy_by_epoch_j"]
    assert len(epochs) == 6
    assert epochs == [event["energy/epoch_j"] for event in read_events(finished) if event["kind"] == "epoch"]
    assert 0.5 * summary["energy_j"] < sum(epochs) < summary["energy_j"]  # less what setting up and ending took
    assert summary["co2_g"] == pytest.approx(summary["energy_j"] / 3.6e6 * summary["carbon_intensity_g_per_kwh"])


def test_fast_steps_are_told_about_once_a_second(config: Path, tmp_path: Path) -> None:
    """Reading the device and the meters every ten steps would slow down steps of milliseconds."""
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--gate.enabled", "false", "--data.batch_size", "2"]
    done = run(TRAIN, [*args, "--run_name", "it", "--optim.epochs", "2"])
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [event["step"] for event in read_events(tmp_path / "it") if event["kind"] == "train"]
    per_epoch = steps[-1] // 2
    assert per_epoch > 700
    second = [step for step in steps if step > per_epoch]
    assert second[-1] == 2 * per_epoch
    assert len(second) < per_epoch / 10 / 2


def test_the_dense_twin_removes_nothing(config: Path, tmp_path: Path) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--gate.enabled", "false", "--optim.epochs", "1"]
    done = run(TRAIN, args)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = read_summary(tmp_path / "digits-resnet20-dense-seed0")
    assert summary["flops_train"] == summary["flops_train_dense"]
    assert summary["params"] == summary["params_dense"]
    assert summary["removals"] == []
    assert summary["budget_target"] is None
    assert summary["co2_g"] is None  # no country, no CO2; never 0


@pytest.mark.parametrize(
    ("launch", "flags"),
    [
        (None, ""),
        pytest.param(
            "cpu_2",
            "--optim.name adamw --optim.lr 0.002 --optim.ema 0.9 --optim.accumulate 2",
            marks=pytest.mark.system,
        ),
        (None, "--gate.units [block,channel]"),
        pytest.param(  # tests/distributed/test_engines.py has its state in short
            "deepspeed_zero2_cpu_2",
            "--gate.units [channel] --optim.ema 0.9 --optim.clip_norm 1.0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_interrupted_after_a_removal_and_resumed_is_the_uninterrupted_run(
    config: Path, finished: Path, tmp_path: Path, launch: str | None, flags: str
) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--tracking.log_every", "2", *flags.split()]
    whole = finished
    if flags:
        done = run(TRAIN, [*args, "--run_name", "whole"], launch=launch)
        assert done.returncode == 0, done.stderr[-3000:]
        whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    named = [*args, "--run_name", "cut", "--resume", "auto"]
    interrupt_after_removal(command(TRAIN, named, launch=launch), cut)
    assert not (cut / "summary.json").exists()
    stopped = [event for event in read_events(cut) if event["kind"] == "interrupt"]
    assert len(stopped) == 1
    assert stopped[0]["step"] % 22 != 0, "the interrupt was to fall within an epoch"
    done = run(TRAIN, named, launch=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (cut / "structure.json").read_text() == (whole / "structure.json").read_text()
    expected, found = final_tensors(whole), final_tensors(cut)
    assert expected.keys() == found.keys()
    assert all(equal(expected[name], found[name]) for name in expected)
    once, twice = read_summary(whole), read_summary(cut)
    for key in ("flops_train", "flops_train_dense", "samples", "accuracy", "loss", "removals", "kept_cost"):
        assert once[key] == twice[key], key
    assert (once["attempts"], twice["attempts"]) == (1, 2)
    losses = {event["step"]: event["train/loss"] for event in read_events(whole) if event["kind"] == "epoch"}
    resumed = {event["step"]: event["train/loss"] for event in read_events(cut) if event["kind"] == "epoch"}
    assert resumed == pytest.approx(losses, rel=1e-12)  # sums over ranks, in another order


def interrupt_after_removal(arguments: list[str], folder: Path) -> None:
    """Start a run and send it SIGTERM a few steps after its first removal, within an epoch."""
    process = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    events = folder / "events.jsonl"
    deadline = time.monotonic() + 200
    try:
        while time.monotonic() < deadline and process.poll() is None:
            text = events.read_text() if events.exists() else ""
            seen = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # the last may be half written
            removals = [event["step"] for event in seen if event["kind"] == "removal"]
            steps = [event["step"] for event in seen if event["kind"] == "train"]
            if removals and steps[-1] > removals[0] and 2 <= steps[-1] % 22 <= 12:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode != 0, output
    assert "--resume auto" in output, output


SHORT = ["--model.name", "resnet20", "--optim.epochs", "3", "--optim.lr", "0.05", "--device", "cpu"]
SHORT += ["--removal.window", "5", "--removal.decide_by", "0.6"]


def silent() -> Display:
    return Display(io.StringIO())


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was killed in its third epoch and has checkpoints of two, between which units went."""
    config = parse_config([*SHORT, "--output_dir", str(tmp_path_factory.mktemp("runs")), "--run_name", "killed"])
    with killed_at(50):
        train(config, {}, silent)
    return Path(config.output_dir) / "killed"


def checkpoints_in(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "checkpoints")]


def test_a_course_that_was_left_for_an_older_checkpoint_is_not_gone_on_with(killed: Path, tmp_path: Path) -> None:
    """Also if the new one is killed before it has a checkpoint of its own."""
    folder = Path(shutil.copytree(killed, tmp_path / "it"))
    assert checkpoints_in(folder) == ["step-000000022", "step-000000044"]
    assert {event["step"] for event in read_events(folder) if event["kind"] == "removal"} & set(range(23, 45))
    older = parse_config([*SHORT, "--resume", str(folder / "checkpoints" / "step-000000022")])
    with killed_at(24):
        train(older, {}, silent)
    assert not [finding for finding in verify_run(folder) if finding.good is False]
    train(parse_config([*SHORT, "--output_dir", str(tmp_path), "--run_name", "it", "--resume", "auto"]), {}, silent)
    assert [event["step"] for event in read_events(folder) if event["kind"] == "start"] == [0, 22, 22]
    assert not [finding for finding in verify_run(folder) if finding.good is False]


def test_the_structure_of_a_course_without_a_checkpoint_is_lost_with_it(tmp_path: Path) -> None:
    """structure.json is a run's own so far, which others may be given: not that of removals which are undone."""
    config = parse_config([*SHORT, "--checkpoint.every", "3", "--output_dir", str(tmp_path), "--run_name", "it"])
    with killed_at(41):
        train(config, {}, silent)
    structure = tmp_path / "it" / "structure.json"
    assert json.loads(structure.read_text())["operations"]
    with killed_at(1):
        train(dataclasses.replace(config, resume="auto"), {}, silent)
    assert json.loads(structure.read_text())["operations"] == []


def test_joules_of_an_attempt_that_was_killed_before_it_told_anything_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It set up for so long that it got no further: what it took is on no record."""
    config = parse_config([*SHORT, "--optim.epochs", "1", "--output_dir", str(tmp_path), "--run_name", "it"])

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(Recorder, "begin", kill)
        train(config, {}, silent)
    assert not (tmp_path / "it" / "events.jsonl").exists()
    train(dataclasses.replace(config, resume="auto"), {}, silent)
    assert not read_summary(tmp_path / "it")["energy_complete"]
    (start,) = (event for event in read_events(tmp_path / "it") if event["kind"] == "start")
    assert any("before anything was recorded" in note for note in start["notes"])


@pytest.mark.parametrize("damage", ["a file cut short", "an optimizer of another network", "channels by halves"])
def test_an_older_checkpoint_that_cannot_be_used_costs_no_newer_one(killed: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "it"))
    older = folder / "checkpoints" / "step-000000022"
    if damage == "a file cut short":
        (older / "training.pt").write_bytes(b"")
    else:
        whole = load_checkpoint(older)
        if damage == "channels by halves":
            whole.state["round_to"] = 0.5
        else:
            whole.training["optimizer"]["param_groups"].pop()
        shutil.rmtree(older)
        save_checkpoint(tmp_path / "elsewhere", 22, whole, 1).rename(older)
    with pytest.raises(CheckpointCorrupt, match=r"step-000000022|round_to 0\.5"):
        train(parse_config([*SHORT, "--resume", str(older)]), {}, silent)
    assert checkpoints_in(folder) == ["step-000000022", "step-000000044"]


def test_why_a_run_failed_is_in_its_folder(killed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "it"))
    config = parse_config([*SHORT, "--output_dir", str(tmp_path), "--run_name", "it", "--resume", "auto"])

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate s3cr3t-planted")

    with after_step(50, fail), pytest.raises(torch.OutOfMemoryError):
        train(config, {"SOME_TOKEN": "s3cr3t-planted"}, silent)
    last = read_events(folder)[-1]
    assert {key: last[key] for key in ("kind", "step", "error")} == {
        "kind": "failure",
        "step": 50,
        "error": "CUDA out of memory. Tried to allocate ***",
    }
    assert "failure" not in [event["kind"] for event in course_of(read_events(folder))]
    assert not [finding for finding in verify_run(folder) if finding.good is False]
    train(config, {}, silent)
    assert not [finding for finding in verify_run(folder) if finding.good is False]
    assert not read_summary(folder)["energy_complete"]  # as after a kill: what it took after its last report


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory is full"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate s3cr3t-planted"),
            "CUDA .* allocate \\*\\*\\*",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), ".* can't allocate .*"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "DataLoader .* by signal: Killed\\."),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "DataLoader .* exited unexpectedly"),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_that_memory_is_full_is_told_in_one_line_and_a_mistake_of_the_program_with_its_traceback(
    error: Exception, said: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("greenprune.run.train", fail)
    if said is None:
        with pytest.raises(RuntimeError, match="shapes do not match"):
            run_command(SHORT, {}, "train.py")
        return
    assert run_command(SHORT, {"SOME_TOKEN": "s3cr3t-planted"}, "train.py") == 1
    assert re.fullmatch(f"greenprune: error: {said}\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyError("x"), "KeyError: 'x'"), (MemoryError(), "MemoryError"), (OSError(5, "bad"), "bad after step 45; the")],
)
def test_a_failure_that_cannot_be_recorded_is_still_the_one_that_is_told(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    folder = Path(shutil.copytree(killed, tmp_path / "it"))
    told: list[bytes] = []

    def full(_: EventLog, __: int, line: bytes) -> None:
        told.append(line)
        raise OSError(28, "No space left on device")

    def fail() -> None:
        monkeypatch.setattr(EventLog, "_append", full)
        raise error

    config = parse_config([*SHORT, "--output_dir", str(tmp_path), "--run_name", "it", "--resume", "auto"])
    with after_step(45, fail), pytest.raises(type(error)):
        train(config, {}, silent)
    assert said in json.loads(told[-1])["error"]
    assert [event["kind"] for event in read_events(folder)].count("failure") == 0


def with_a_text_for_an_image(root: Path) -> list[str]:
    """The flags of a short run on a set of small images, one of which to train on is none."""
    for part in ("train", "val"):
        (root / part / "n01").mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(root / part / "n01" / f"{number}.png")
    (root / "train" / "n01" / "zz.jpg").write_text("no image")
    args = ["--data.name", "image_folder", "--data.root", str(root), "--data.image_size", "32"]
    args += ["--data.batch_size", "2", "--model.name", "resnet20", "--optim.epochs", "3", "--gate.enabled", "false"]
    return [*args, "--output_dir", str(root / "runs"), "--run_name", "it", "--device", "cpu"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_cannot_be_read_ends_a_run_that_was_runnable_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    args = [*with_a_text_for_an_image(tmp_path), "--data.workers", workers]
    assert run_command([*args, "--data.batch_size", "20"], {}, "train.py") == 2
    assert not (tmp_path / "runs").exists()
    capsys.readouterr()
    assert run_command(args, {}, "train.py") == 1
    told = capsys.readouterr().err.splitlines()[-1]
    last = read_events(tmp_path / "runs" / "it")[-1]
    assert last["kind"] == "failure"
    assert "zz.jpg' is truncated, corrupt or missing" in last["error"]
    assert told == f"greenprune: error: {last['error']}"


def test_a_setting_that_shows_in_training_to_be_impossible_is_not_runnable_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a step that cannot be recorded: the same command would end so again."""

    def refuse(*_: object) -> None:
        raise ConfigError("model.cuda_graph: True is not valid for this network")

    monkeypatch.setattr(Trainer, "_train_step", refuse)
    args = [*SHORT, "--output_dir", str(tmp_path), "--run_name", "it"]
    assert run_command(args, {}, "train.py") == 2
    assert read_events(tmp_path / "it")[-1]["kind"] == "failure"


@pytest.mark.system
def test_an_image_that_one_of_two_processes_cannot_read_ends_both(tmp_path: Path) -> None:
    done = run(TRAIN, with_a_text_for_an_image(tmp_path), processes=2)
    assert "zz.jpg' is truncated, corrupt or missing" in done.stderr
    # The launcher's own code is 1 whatever theirs are. It sends a SIGTERM to whichever is not the first to end.
    assert re.search(r"failed \(exitcode: (\d+)\)", done.stderr)[1] == "1"  # type: ignore[index]


# Of MobileNet's blocks some have no shortcut and keep a piece of their channels: one of 8 channels is too much.
ROUNDED = ["--model.name", "mobilenet_v2", "--gate.units", "[channel]", "--budget.target", "0.196", "--device", "cpu"]
ROUNDED += ["--data.batch_size", "512", "--optim.epochs", "2", "--removal.window", "2", "--run_name", "it"]


def test_a_run_rounds_to_the_end_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where surgery.round_to is null it is 8 on a GPU, on which a run may go on that was begun on a CPU."""
    config = parse_config([*ROUNDED, "--output_dir", str(tmp_path), "--resume", "auto"])
    with stopped_at(2):
        train(config, {}, silent)
    monkeypatch.setattr("greenprune.run.round_to_on", lambda *_: 8)
    train(config, {}, silent)
    assert read_summary(tmp_path / "it")["kept_cost"] <= 0.196


def test_a_budget_that_rounding_puts_out_of_reach_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greenprune.run.round_to_on", lambda *_: 8)
    with pytest.raises(ConfigError, match=r"is kept by surgery\.round_to"):
        train(parse_config([*ROUNDED, "--output_dir", str(tmp_path)]), {}, silent)
    assert list(tmp_path.iterdir()) == []


def test_exit_code_and_advice_after_an_interrupt(config: Path, tmp_path: Path) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--run_name", "cut", "--tracking.log_every", "1"]
    process = subprocess.Popen(command(TRAIN, args, 1), env=environment(), stderr=subprocess.PIPE, text=True)
    events = tmp_path / "cut" / "events.jsonl"
    while process.poll() is None and not (events.exists() and '"train"' in events.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "stopped by SIGINT" in message
    assert "Traceback" not in message


def test_stopping_the_launcher_stops_the_training_in_good_order(config: Path, tmp_path: Path) -> None:
    """accelerate launch forwards no signal to a single process; it must not leave an orphan behind."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--run_name", "cut", "--optim.epochs", "500"]
    process = subprocess.Popen(
        [*launcher, str(ROOT / "launch" / "cpu.yaml"), str(TRAIN), *args], env=environment(), stdout=subprocess.DEVNULL
    )
    events = tmp_path / "cut" / "events.jsonl"
    while process.poll() is None and not (events.exists() and '"epoch"' in events.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while read_events(tmp_path / "cut")[-1]["kind"] != "interrupt":
        assert time.monotonic() < deadline, "the training went on without its launcher"
        time.sleep(0.1)


def test_a_finished_run_is_not_done_again(config: Path, finished: Path) -> None:
    before = (finished / "events.jsonl").read_bytes()
    args = ["--config", str(config), "--output_dir", str(finished.parent), "--run_name", "whole", "--resume", "auto"]
    done = run(TRAIN, args)
    assert done.returncode == 0, done.stderr
    assert (finished / "events.jsonl").read_bytes() == before
    assert done.stdout.startswith("Finished before, so nothing was done")


def test_a_finished_run_is_told_where_nothing_can_be_written(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = Path.mkdir

    def read_only(path: Path, *args: Any, **more: Any) -> None:
        if path.parent == finished.parent:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *args, **more)

    monkeypatch.setattr(Path, "mkdir", read_only)
    args = ["--config", str(config), "--output_dir", str(finished.parent), "--resume", "auto"]
    assert run_command([*args, "--run_name", "whole"], os.environ, "train.py") == 0
    assert capsys.readouterr().out.startswith("Finished before, so nothing was done")
    assert run_command([*args, "--run_name", "another"], os.environ, "train.py") == 2
    assert "(Read-only file system); expected a folder you can write to" in capsys.readouterr().err


def test_runs_without_a_name_do_not_share_a_folder(config: Path, tmp_path: Path) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--optim.epochs", "1", "--removal.decide_by", "1"]
    for _ in range(2):
        assert run(TRAIN, args).returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "digits-resnet20-block-0.5-seed0",
        "digits-resnet20-block-0.5-seed0-2",
    }


def test_a_finished_run_whose_summary_tells_nothing_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "whole"))
    (folder / "summary.json").write_text("{}")
    again = dataclasses.replace(load_config(finished / "config.yaml"), output_dir=str(tmp_path), resume="auto")
    with pytest.raises(UserError, match=r"^resume: .*summary\.json' does not tell run; .* made again from the last"):
        train(again, {}, silent)
    (folder / "summary.json").unlink()
    assert train(again, {}, silent).summary["accuracy"] == read_summary(finished)["accuracy"]


def test_without_a_name_auto_goes_on_with_the_same_run_and_does_no_finished_one_again(
    config: Path, tmp_path: Path
) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--optim.epochs", "1", "--removal.decide_by", "1"]
    name = "digits-resnet20-block-0.5-seed0"
    for flags in ([], ["--optim.lr", "0.04"], ["--optim.lr", "0.04"]):
        done = run(TRAIN, [*args, *flags, "--resume", "auto"])
        assert done.returncode == 0, done.stderr
        number = "-2" if flags else ""
        assert f"{name}{number}\n" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{name}-2"}
    assert read_summary(tmp_path / f"{name}-2")["attempts"] == 1
    # Of two of one config it goes on with that which is not finished.
    shutil.copytree(tmp_path / name, tmp_path / f"{name}-3")
    (tmp_path / f"{name}-3" / "summary.json").unlink()
    done = run(TRAIN, [*args, "--resume", "auto"])
    assert done.returncode == 0, done.stderr
    assert read_summary(tmp_path / f"{name}-3")["attempts"] == 2
    assert len(list(tmp_path.iterdir())) == 3
    # Also where a number is missing.
    shutil.rmtree(tmp_path / name)
    done = run(TRAIN, [*args, "--resume", "auto"])
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}-2", f"{name}-3"}


def test_two_of_one_config_that_begin_at_once_do_not_both_train(config: Path, tmp_path: Path) -> None:
    """The one that looked before the other had its folder finds it as it makes its own, and goes on with it."""
    wanted = dataclasses.replace(load_config(config), output_dir=str(tmp_path), run_name=None, resume="auto")
    looked: list[Path] = []

    def create(folder: RunFolder, config: Config) -> None:
        if not looked:
            looked.append(folder.path)
            made(folder, config)  # the other one's
        made(folder, config)

    made = RunFolder.create
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "create", create)
        folder, is_new = _new_or_same_folder(wanted)
    assert (folder.path, is_new) == (looked[0], False)
    assert len(list(tmp_path.iterdir())) == 1


BAD_INPUT = {
    "unknown key": (["--optim.lrate", "0.1"], "optim.lrate: unknown key"),
    "wrong type": (["--optim.epochs", "many"], "optim.epochs"),
    "unknown model": (["--model.name", "resnet21"], "model.name: 'resnet21'"),
    "unknown data": (["--data.name", "digit"], "data.name: 'digit'"),
    "missing data": (["--data.name", "cifar10"], "data.root"),
    "target of 0": (["--budget.target", "0"], "budget.target: 0.0"),
    "target above 1": (["--budget.target", "1.5"], "budget.target: 1.5"),
    "target below what has no gate": (["--budget.target", "0.001"], "budget.target: 0.001"),
    "batch above the data": (["--data.batch_size", "5000"], "data.batch_size: 5000"),
    "fp16 on a CPU": (["--precision", "fp16", "--device", "cpu"], "precision: 'fp16'"),
    "unknown country": (["--energy.country", "XYZ"], "energy.country"),
    "one image a pass": (
        ["--optim.accumulate", "64", "--model.name", "mobilenet_v3_small", "--budget.target", "0.9"],
        "data.batch_size",
    ),
    "W&B online without a login": (
        ["--tracking.trackers", "[wandb]", "--tracking.mode", "online"],
        "tracking.mode: 'online'",
    ),
    "no such checkpoint": (["--resume", "nowhere/step-000000001"], "resume: 'nowhere/step-000000001'"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_message_and_nothing_is_written(case: str, config: Path, tmp_path: Path) -> None:
    flags, message = BAD_INPUT[case]
    output = tmp_path / "runs"
    done = run(TRAIN, ["--config", str(config), "--output_dir", str(output), *flags])
    assert done.returncode == 2, done.stderr[-2000:]
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("greenprune: error: ")
    assert message in lines[0]
    assert not output.exists()


@pytest.mark.parametrize(
    ("key", "flags"), [("run_name", ["--run_name", "zz"]), ("output_dir", ["--output_dir", "elsewhere"])]
)
def test_a_run_that_goes_on_from_a_checkpoint_is_not_told_another_place(
    key: str, flags: list[str], config: Path, finished: Path, tmp_path: Path
) -> None:
    """It goes on where it is: as if elsewhere, it would be changed although a new folder was asked for."""
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    (cut / "summary.json").unlink()
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    args = ["--config", str(config), "--resume", str(max((cut / "checkpoints").iterdir()))]
    done = run(TRAIN, [*args, *flags])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"greenprune: error: {key}: {flags[1]!r} is not that of the run")
    assert repr(str(tmp_path) if key == "output_dir" else "cut") in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("from_own_config", [False, True])
def test_a_run_that_goes_on_from_a_checkpoint_is_told_its_own_place(
    from_own_config: bool, config: Path, finished: Path, tmp_path: Path
) -> None:
    """Or the one that its config has from before it was moved."""
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    (cut / "summary.json").unlink()
    given = [str(config), "--output_dir", f"{cut}/..", "--run_name", "cut"]
    if from_own_config:
        given = [str(cut / "config.yaml")]
    args = ["--config", *given, "--resume", str(max((cut / "checkpoints").iterdir()))]
    done = run(TRAIN, args)
    assert done.returncode == 0, done.stderr
    assert read_summary(cut)["attempts"] == 2


def test_a_truncated_data_file_is_named(config: Path, tmp_path: Path) -> None:
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images", "t10k-images"):
        (raw / f"{name}-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\xea\x60")
    for name in ("train-labels", "t10k-labels"):
        (raw / f"{name}-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\xea\x60")
    flags = ["--data.name", "fashion_mnist", "--data.root", str(tmp_path / "data")]
    done = run(TRAIN, ["--config", str(config), "--output_dir", str(tmp_path / "runs"), *flags])
    assert done.returncode == 2
    assert "ubyte" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written(config: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    done = run(TRAIN, ["--config", str(config), "--output_dir", str(blocker)])
    assert done.returncode == 2
    assert "output_dir: cannot write" in done.stderr


def test_a_run_whose_reader_is_gone_is_done_all_the_same(config: Path, tmp_path: Path) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--optim.epochs", "1", "--removal.decide_by", "1"]
    for name in ("full", "closed"):
        line = command(TRAIN, [*args, "--run_name", name], 1)
        with Path("/dev/full").open("w") as full:
            out = full if name == "full" else subprocess.PIPE
            process = subprocess.Popen(line, env=environment(), stdout=out, stderr=subprocess.PIPE, text=True)
            if process.stdout is not None:
                process.stdout.readline()
                process.stdout.close()
            assert process.stderr is not None
            said = process.stderr.read()
            process.stderr.close()
        assert process.wait() == 0, said
        assert "Traceback" not in said
        assert (tmp_path / name / "summary.json").exists()


def test_a_folder_that_holds_another_run(config: Path, finished: Path) -> None:
    args = ["--config", str(config), "--output_dir", str(finished.parent), "--run_name", "whole"]
    again = run(TRAIN, args)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    other = run(TRAIN, [*args, "--resume", "auto", "--optim.lr", "0.07"])
    assert other.returncode == 2
    assert "optim.lr" in other.stderr


@pytest.mark.parametrize("decay", ["150", "60"], ids=["weights", "statistics"])
def test_a_loss_that_is_not_a_number_stops_the_run(config: Path, tmp_path: Path, decay: str) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--run_name", "bad"]
    # A decay above 2 / learning rate makes the weights grow without end, once the warm-up has come that far. With the
    # smaller one an epoch ends at which they are finite still, and the variances of what they make are not.
    flags = ["--optim.weight_decay", decay, "--optim.warmup", "0.99"]
    done = run(TRAIN, [*args, *flags])
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    found = re.search(r"is (nan|inf) after step (\d+); the last good checkpoint is (\S+)\.", done.stderr)
    assert found, done.stderr
    assert not (tmp_path / "bad" / "summary.json").exists()
    assert Path(found[3]) == max((tmp_path / "bad" / "checkpoints").iterdir())
    assert all(tensor.isfinite().all() for tensor in final_tensors(tmp_path / "bad").values())


def test_joules_of_a_run_killed_before_its_first_checkpoint_are_not_lost(config: Path, tmp_path: Path) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--run_name", "k", "--resume", "auto"]
    process = subprocess.Popen(
        command(TRAIN, [*args, "--tracking.log_every", "1"], 1), env=environment(), stdout=subprocess.DEVNULL
    )
    events = tmp_path / "k" / "events.jsonl"
    while process.poll() is None and not (events.exists() and '"train"' in events.read_text()):
        time.sleep(0.01)
    process.kill()
    process.wait()
    spent = [event["energy/total_j"] for event in read_events(tmp_path / "k") if event["kind"] == "train"][-1]
    done = run(TRAIN, args)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = read_summary(tmp_path / "k")
    assert summary["attempts"] == 2
    assert summary["energy_lost_j"] == pytest.approx(spent)
    first, second = summary["energy_by_attempt"]
    assert (first["energy_j"], first["lost_j"]) == (pytest.approx(spent), pytest.approx(spent))
    assert second["energy_j"] == pytest.approx(summary["energy_j"] - spent)
    assert not summary["energy_complete"]
    assert summary["energy_j"] > spent


def test_two_processes_never_train_in_one_folder(config: Path, tmp_path: Path) -> None:
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--run_name", "one", "--resume", "auto"]
    args += ["--optim.epochs", "500"]
    first = subprocess.Popen(command(TRAIN, args, 1), env=environment(), stdout=subprocess.DEVNULL)
    while first.poll() is None and not (tmp_path / "one" / "events.jsonl").exists():
        time.sleep(0.01)
    second = run(TRAIN, args)
    assert first.poll() is None, "the first was to be still at it"
    first.terminate()
    first.wait()
    assert second.returncode == 2
    assert "is in use by another process (process" in second.stderr


def test_every_complete_config_parses() -> None:
    from greenprune.config import load_config

    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path)


def test_secrets_of_the_environment_stay_there(config: Path, tmp_path: Path) -> None:
    secret = "s3cr3t-planted-key"
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--optim.epochs", "1", "--removal.decide_by", "1"]
    args += ["--tracking.trackers", "[wandb]", "--tracking.mode", "offline"]
    done = subprocess.run(
        command(TRAIN, args, 1),
        env=environment() | {"WANDB_API_KEY": secret, "WANDB_MODE": "offline", "SOME_TOKEN": secret},
        capture_output=True,
        text=True,
        check=True,
    )
    assert secret not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_a_finished_run_whose_summary_is_damaged_is_refused_in_one_line(
    finished: Path, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "whole")
    summary = tmp_path / "whole" / "summary.json"
    summary.write_text(summary.read_text()[:100])
    args = ["--config", str(config), "--output_dir", str(tmp_path), "--run_name", "whole", "--resume", "auto"]
    assert run_command(args, {}, "train") == 2
    told = capfd.readouterr().err
    assert f"resume: '{summary}' cannot be read (" in told
    assert "or no such file" in told
    assert told.count("\n") == 1
