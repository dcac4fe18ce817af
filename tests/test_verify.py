"""verify: a run that is whole is said to be, and whatever is changed in its files is found and named."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launching import TRAIN, run

from greenprune.checkpoint import Checkpoint, load_checkpoint
from greenprune.cli import main
from greenprune.locking import FolderLock
from greenprune.tracking import read_events
from greenprune.verify import verify_run

FLAGS = ["--model.name", "resnet20", "--optim.epochs", "4", "--optim.lr", "0.05"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    done = run(TRAIN, [*FLAGS, "--output_dir", str(output), "--run_name", "it"])
    assert done.returncode == 0, done.stderr[-3000:]
    return output / "it"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "it"))


def wrong(path: Path) -> list[str]:
    return [finding.what for finding in verify_run(path) if finding.good is False]


def test_a_finished_run_is_whole(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["verify", str(finished)]) == 0
    told = capsys.readouterr().out
    assert "The run is whole." in told
    assert "step-000000088" in told
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before  # nothing is written
    assert main(["verify", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"]


def rewrite(path: Path, change: Callable[[list[dict]], None]) -> None:
    events = read_events(path)
    change(events)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def of_kind(events: list[dict], kind: str) -> dict:
    return [event for event in events if event["kind"] == kind][1]


def drop(events: list[dict], kind: str) -> None:
    events.remove(of_kind(events, kind))


CHANGES: dict[str, tuple[Callable[[list[dict]], object], str]] = {
    "a figure of FLOPs": (lambda events: of_kind(events, "train").update({"flops/train": 1}), "ledger: FLOPs"),
    "joules that fall": (lambda events: of_kind(events, "epoch").update({"energy/total_j": 1e9}), "ledger: joules"),
    "an epoch left out": (lambda events: drop(events, "epoch"), "events.jsonl"),
    "a step twice": (lambda events: events.insert(3, dict(of_kind(events, "train"))), "events.jsonl"),
    "a removal left out": (lambda events: drop(events, "removal"), "structure.json"),
    "a removal of nothing": (lambda events: of_kind(events, "removal").update(unit="stages.9.9"), "ledger"),
    "a removal without a unit": (lambda events: of_kind(events, "removal").pop("unit"), "events.jsonl"),
    "another summary": (lambda events: events[-1]["summary"].update(accuracy=1), "summary.json"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_log_is_found(copied: Path, change: str) -> None:
    apply, what = CHANGES[change]
    rewrite(copied / "events.jsonl", apply)
    assert what in wrong(copied)


def test_joules_that_were_added_up_in_another_order_do_not_fall(copied: Path) -> None:
    """As an attempt tells those of the one before: by phase, and not by device."""

    def fall_a_little(events: list[dict]) -> None:
        told = [event for event in events if event.get("energy/total_j") is not None]
        told[3]["energy/total_j"] = math.nextafter(told[2]["energy/total_j"], 0)

    rewrite(copied / "events.jsonl", fall_a_little)
    assert wrong(copied) == []


def test_a_torn_line_in_the_middle_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (copied / "events.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2][:20] + "\n"
    (copied / "events.jsonl").write_text("".join(lines))
    assert main(["verify", str(copied)]) == 1
    assert "line 3 is no event" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["samples", "flops_train", "attempts", "energy_lost_j", "energy_j", "steps"])
def test_a_changed_total_is_found(copied: Path, key: str) -> None:
    summary = json.loads((copied / "summary.json").read_text())
    summary[key] += 1
    text = json.dumps(summary)
    (copied / "summary.json").write_text(text)
    rewrite(copied / "events.jsonl", lambda events: events[-1].update(summary=json.loads(text)))
    assert wrong(copied)


def test_a_changed_structure_is_found(copied: Path) -> None:
    values = json.loads((copied / "structure.json").read_text())
    values["operations"].pop()
    (copied / "structure.json").write_text(json.dumps(values))
    assert wrong(copied) == ["structure.json"]


def test_a_damaged_checkpoint_is_found(copied: Path) -> None:
    path = copied / "checkpoints" / "step-000000066" / "training.pt"
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    assert wrong(copied) == ["step-000000066"]


def test_a_checkpoint_under_another_name_is_found(copied: Path) -> None:
    folder = copied / "checkpoints"
    shutil.rmtree(folder / "step-000000088")
    (folder / "step-000000066").rename(folder / "step-000000088")
    assert wrong(copied) == ["step-000000088"]


@pytest.mark.parametrize("left", ["", None])
def test_a_log_that_is_gone_is_found(copied: Path, left: str | None) -> None:
    (copied / "events.jsonl").unlink()
    if left is not None:
        (copied / "events.jsonl").write_text(left)
    (found,) = [finding for finding in verify_run(copied) if finding.good is False]
    assert found.what == "events.jsonl"
    assert "summary.json, structure.json, step-000000066, step-000000088" in found.detail


def test_a_summary_that_is_gone_is_found(copied: Path) -> None:
    (copied / "summary.json").unlink()
    assert wrong(copied) == ["summary.json"]


@pytest.mark.parametrize("gone", [False, True])
def test_what_a_run_does_while_it_is_looked_at_is_nothing_wrong(
    copied: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    """It tells of removals, writes its last checkpoint and deletes an older one while the first is being read."""
    whole = (copied / "events.jsonl").read_bytes().splitlines(keepends=True)
    first = next(number for number, line in enumerate(whole) if b'"removal"' in line)
    (copied / "events.jsonl").write_bytes(b"".join(whole[:first]))
    (copied / "summary.json").unlink()
    structure = json.loads((copied / "structure.json").read_text())
    structure["operations"] = structure["operations"][:1]
    (copied / "structure.json").write_text(json.dumps(structure))

    def load(path: Path) -> Checkpoint:
        (copied / "events.jsonl").write_bytes(b"".join(whole))
        if gone and path.name == "step-000000066":
            shutil.rmtree(path)
        return load_checkpoint(path)

    monkeypatch.setattr("greenprune.verify.load_checkpoint", load)
    lock = FolderLock(copied)
    try:
        findings = verify_run(copied)
    finally:
        lock.release()
    assert not [finding for finding in findings if finding.good is False]
    assert "the run still goes on" in findings[0].detail
    assert ("step-000000066" in [finding.what for finding in findings]) != gone


@pytest.mark.parametrize(
    ("age_s", "readable", "said", "good"),
    [
        (0, True, "the run still goes on (process 4242 on gpu-node-17)", True),
        (60, True, "the run is not finished", False),
        (0, False, "whether it goes on cannot be told (last held by process 4242 on gpu-node-17)", True),
    ],
)
def test_what_a_run_does_on_another_machine_is_nothing_wrong(
    copied: Path, monkeypatch: pytest.MonkeyPatch, age_s: float, readable: bool, said: str, good: bool
) -> None:
    """It deletes a checkpoint while that is being read; the other machine is known by the lock that it renews."""
    (copied / "summary.json").unlink()
    rewrite(copied / "events.jsonl", lambda events: events.pop())
    lock = copied / ".lock"
    lock.write_text("process 4242 on gpu-node-17")
    os.utime(lock, (0, time.time() - age_s))

    def load(path: Path) -> Checkpoint:
        shutil.rmtree(path)
        return load_checkpoint(path)

    def read_only(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("greenprune.verify.load_checkpoint", load)
    if not readable:
        monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    findings = verify_run(copied)
    assert said in findings[0].detail
    assert all(finding.good is not False for finding in findings) == good


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
