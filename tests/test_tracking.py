"""Tracking: a log that only grows, totals that add up, and files that are whole."""

from __future__ import annotations

import json
import math
import os
import pickle
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from greenprune.config import BudgetConfig, Config, DataConfig, GateConfig, ModelConfig, UserError
from greenprune.locking import FolderInUse, FolderLock, find_holder, is_held
from greenprune.tracking import (
    Event,
    EventLog,
    Ledger,
    RunFolder,
    default_run_name,
    gpus_of_attempt,
    numbers_of,
    read_events,
    write_json,
)
from greenprune.whole_files import write_atomically

# Events.


def test_each_event_is_one_line_with_time_step_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, [])
    before = time.time()
    log.record("start", 0, model="resnet20", note="two\nlines", units=["a", "b"])
    log.record("train", 10, train__loss=0.5, gate__price=None, flops__train=2**70)
    log.close()
    log.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 2
    first, second = map(json.loads, lines)
    assert before <= first.pop("time") <= second.pop("time") <= time.time()
    assert first == {"step": 0, "kind": "start", "model": "resnet20", "note": "two\nlines", "units": ["a", "b"]}
    assert second == {"step": 10, "kind": "train", "train/loss": 0.5, "gate/price": None, "flops/train": 2**70}
    assert [event["kind"] for event in read_events(path)] == ["start", "train"]


def test_an_event_is_on_disk_at_once(tmp_path: Path) -> None:
    """A process that is killed right after recording has recorded."""
    path = tmp_path / "events.jsonl"
    code = (
        "import os, sys, pathlib; from greenprune.tracking import EventLog;"
        "log = EventLog(pathlib.Path(sys.argv[1]), []); log.record('train', 3, x=1); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == -9
    assert [event["step"] for event in read_events(path)] == [3]


def test_reopening_appends(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for step in range(3):
        before = path.read_bytes() if path.exists() else b""
        log = EventLog(path, [])
        log.record("train", step)
        log.close()
        assert path.read_bytes().startswith(before)
    assert [event["step"] for event in read_events(path)] == [0, 1, 2]


@pytest.mark.parametrize("rest", ['{"time": 1.0, "st', '{"time": 1.0, "step": 5, "kind": "train"}', "\x00\x00"])
def test_a_line_half_written_is_cut_off(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, [])
    log.record("train", 4)
    log.close()
    whole = path.read_text()
    path.write_text(whole + rest)
    assert [event["step"] for event in read_events(path)] == [4]
    log = EventLog(path, [])
    log.record("train", 6)
    log.close()
    assert path.read_text().startswith(whole)
    assert [event["step"] for event in read_events(path)] == [4, 6]


def test_a_log_with_nothing_but_half_a_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time"')
    log = EventLog(path, [])
    assert read_events(path) == []
    log.record("start", 0)
    log.close()
    assert len(read_events(path)) == 1


def test_a_log_that_was_never_written_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path / "events.jsonl") == []


def test_what_is_not_a_finite_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path, [])
    log.record("train", 1, a=math.nan, b=[math.inf, 1.0], c={"d": (-math.inf, {"e": math.nan})}, f=True, g=0.0)
    log.close()
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    event = json.loads(text)
    assert {key: event[key] for key in "abcfg"} == {
        "a": None,
        "b": [None, 1.0],
        "c": {"d": [None, {"e": None}]},
        "f": True,
        "g": 0.0,
    }


def test_mirrors_are_called_in_their_order_after_the_write(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    seen: list[tuple[str, Event, list[Event]]] = []
    log = EventLog(
        path,
        [
            lambda event: seen.append(("first", event, read_events(path))),
            lambda event: seen.append(("second", event, read_events(path))),
        ],
    )
    log.record("train", 1, train__loss=math.nan)
    log.close()
    assert [name for name, _, _ in seen] == ["first", "second"]
    for _, event, on_disk in seen:
        assert on_disk == [event]
        assert event["train/loss"] is None


def test_other_ranks_write_and_mirror_nothing() -> None:
    seen: list[Event] = []
    log = EventLog(None, [seen.append])
    log.record("train", 1)
    log.close()
    assert seen == []


def test_joules_of_devices_that_trackers_call_alike_are_added_up() -> None:
    """Such as those of one processor each on two machines, on which a run was in turn."""
    devices = {
        "cpu (estimate: CodeCarbon: 42 W)": 2.0,
        "cpu (estimate: CodeCarbon: 64 W)": 3.0,
        "cpu (unreadable: no counter)": None,
        "dram (counter: RAPL)": 1.0,
    }
    numbers = numbers_of(
        {"time": 0.0, "step": 1, "kind": "epoch", "energy/by_device_j": devices, "energy/total_j": 6.0}
    )
    assert numbers == {
        "energy/by_device_j/cpu_estimate_CodeCarbon": 5.0,
        "energy/by_device_j/dram_counter_RAPL": 1.0,
        "energy/total_j": 6.0,
    }


# The ledger.


def test_the_ledger_counts_samples_and_flops() -> None:
    ledger = Ledger()
    ledger.add_step(64, 10, 20)
    ledger.add_step(64, 5, 20)
    ledger.add_step(1, 0, 3)
    assert (ledger.samples, ledger.flops_train, ledger.flops_train_dense) == (129, 960, 2563)


@pytest.mark.parametrize(
    ("phases", "lost", "total"),
    [
        ({}, 0.0, None),
        ({"train": None, "eval": None}, 5.0, 5.0),
        ({"train": 10.0, "eval": None}, 0.0, 10.0),
        ({"train": 10.0, "eval": 2.5}, 1.0, 13.5),
        ({"train": 0.0}, 0.0, 0.0),
    ],
)
def test_unknown_joules_are_unknown_and_not_zero(
    phases: dict[str, float | None], lost: float, total: float | None
) -> None:
    assert Ledger(energy_by_phase_j=phases, energy_lost_j=lost).energy_j == total


def test_the_ledger_survives_json() -> None:
    ledger = Ledger(2**70, 2**71, 5, 1.5, {"train": 0.1, "eval": None}, {"gpu0 (nvml)": None}, 2, 0.25)
    assert Ledger(**json.loads(json.dumps(ledger.to_dict()))) == ledger


def test_ledgers_do_not_share_their_totals() -> None:
    one = Ledger()
    one.energy_by_phase_j["train"] = 1.0
    assert Ledger().energy_by_phase_j == {}


# Files.


def test_json_is_written_whole_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"a": math.nan, "b": [1, (math.inf,)]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"a": None, "b": [1, [None]]}
    assert path.read_text().endswith("\n")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["summary.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "structure.json"
    write_atomically(path, "old")
    seen = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        seen.append((path.read_text(), stat.S_ISREG(os.fstat(descriptor).st_mode), os.fstat(descriptor).st_size))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    write_atomically(path, "newer")
    assert seen[0] == ("old", True, 5)
    assert path.read_text() == "newer"
    assert [item.name for item in tmp_path.iterdir()] == ["structure.json"]


# Attempts.


@pytest.mark.parametrize(
    ("attempt", "gpus"),
    [
        ({"machines": ["m"], "device": "cuda:3", "processes": 1, "gpus": ["H100"]}, ["H100"]),
        ({"machines": ["m"], "device": "cpu", "processes": 1, "gpus": []}, []),
        # Of older versions, which told all that rank 0 could see.
        ({"device": "cuda:0", "processes": 1, "gpus": ["H100"] * 8}, ["H100"]),
        ({"device": "cuda:1", "processes": 1, "gpus": ["H100", "A100"]}, ["A100"]),
        ({"device": "cuda", "gpus": ["H100", "A100"]}, ["H100"]),
        ({"device": "cuda:0", "processes": 2, "gpus": ["H100", "H100", "A100"]}, ["H100", "H100"]),
        ({"device": "cuda:0", "processes": 16, "gpus": ["H100"] * 8}, ["H100"] * 16),
        ({"device": "cuda:0", "processes": 4, "gpus": ["H100", "A100"]}, ["H100", "A100"]),
        ({"device": "cpu", "processes": 1, "gpus": ["H100"] * 8}, []),
        ({"device": "cpu:0", "processes": 2, "gpus": ["H100"] * 8}, []),
        ({"device": "cuda:9", "processes": 1, "gpus": ["H100"]}, ["H100"]),
        ({"gpus": ["H100"]}, ["H100"]),
        ({}, []),
    ],
)
def test_the_gpus_of_an_attempt_are_those_that_it_used(attempt: dict[str, Any], gpus: list[str]) -> None:
    assert gpus_of_attempt(attempt) == gpus


# The folder.


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    folder.create(Config(seed=3))
    assert yaml.safe_load(folder.config.read_text()) == Config(seed=3).to_dict()
    with pytest.raises(FileExistsError):
        folder.create(Config(seed=3))


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "one")
    folder.create(Config())
    lock = FolderLock(folder.path)
    with pytest.raises(FolderInUse, match=rf"in use by another process \(process {os.getpid()} on ") as refused:
        FolderLock(folder.path)
    told = pickle.loads(pickle.dumps(refused.value))  # as one rank tells the others
    assert (str(told), told.owner) == (str(refused.value), refused.value.owner)
    lock.release()
    FolderLock(folder.path).release()


@pytest.mark.parametrize("devices", ["alike", "other"])
def test_that_a_folder_is_held_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: str) -> None:
    """Also where a file's device is another one than in the kernel's list of locks, as on btrfs."""
    if devices == "other":
        monkeypatch.setattr(os, "major", lambda _: 0xEE)
    assert is_held(tmp_path) is False
    lock = FolderLock(tmp_path)
    assert is_held(tmp_path) is True
    lock.release()
    assert is_held(tmp_path) is False


def test_that_another_machine_holds_a_folder_is_seen_by_what_it_renews(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text("process 4242 on gpu-node-17")
    found = find_holder(tmp_path)
    assert (found.is_held, found.owner, found.where) == (True, "process 4242 on gpu-node-17", "on gpu-node-17")
    os.utime(lock, (0, time.time() - 60))
    assert find_holder(tmp_path).is_held is False
    lock.write_text("")  # let go of
    assert find_holder(tmp_path).is_held is False
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_whether_another_machine_holds_a_folder_cannot_be_told_without_the_time_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be written the file system's clock cannot be read, and ours may be another."""
    (tmp_path / ".lock").write_text("process 4242 on gpu-node-17")

    def read_only(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    assert find_holder(tmp_path).is_held is None


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output_dir: cannot write '.*file/run' \(Not a directory\)"):
        RunFolder(tmp_path / "file" / "run").create(Config())


def test_all_files_lie_in_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    paths = [
        folder.config,
        folder.provenance,
        folder.events,
        folder.structure,
        folder.summary,
        folder.checkpoints,
        folder.id,
    ]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "config.yaml",
        "provenance.jsonl",
        "events.jsonl",
        "structure.json",
        "summary.json",
        "checkpoints",
        "id.txt",
    ]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (Config(), "digits-resnet38-block-0.5-seed0"),
        (Config(gate=GateConfig(enabled=False), budget=BudgetConfig(0.3)), "digits-resnet38-dense-seed0"),
        (
            Config(
                seed=12,
                data=DataConfig("cifar10"),
                model=ModelConfig("resnet20"),
                budget=BudgetConfig(0.35),
            ),
            "cifar10-resnet20-block-0.35-seed12",
        ),
        (Config(budget=BudgetConfig(1.0)), "digits-resnet38-block-1-seed0"),
    ],
)
def test_a_run_is_named_after_what_it_is(config: Config, name: str) -> None:
    assert default_run_name(config) == name
    assert Config(run_name=name).run_name == name
