"""Following a run from another process, and bringing it to a tracker after the fact."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "report"))
from recording import damage_line, record_run, stop_before, write_events

from greenprune.cli import main
from greenprune.config import UserError
from greenprune.locking import FolderLock
from greenprune.watch import watch_run

Event = dict[str, Any]


def test_a_finished_run_is_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "it")
    assert main(["watch", str(tmp_path / "it")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("it: resnet38 on digits, 4 epochs")
    assert any(
        line.startswith("removed at step 20 (epoch 2): stages.1.2, 4 channels of stages.0.0 (off)") for line in lines
    )
    assert sum(line.lstrip().startswith(("1/4", "2/4", "3/4", "4/4")) for line in lines) == 4
    assert lines[-1] == "The run is finished."


def test_events_are_shown_as_they_come_and_only_whole_lines(tmp_path: Path) -> None:
    events = record_run(tmp_path / "it")
    first, second = events[:3], events[3:]
    (tmp_path / "it" / "summary.json").unlink()
    lock = FolderLock(tmp_path / "it")
    cut = json.dumps(second[0])
    write_events(tmp_path / "it", first, rest=cut[:20])
    seen: list[Event] = []
    endings: list[str] = []
    watcher = threading.Thread(target=lambda: endings.append(watch_run(tmp_path / "it", seen.append)))
    watcher.start()
    deadline = time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert seen == first
    with (tmp_path / "it" / "events.jsonl").open("a") as file:
        file.write(cut[20:] + "\n")
        file.writelines(json.dumps(event) + "\n" for event in second[1:])
    watcher.join(timeout=10)
    lock.release()
    assert seen == events
    assert endings == ["The run is finished."]


@pytest.mark.parametrize("seen_between", [True, False])
def test_a_half_line_that_the_next_attempt_cuts_off_hides_nothing(tmp_path: Path, seen_between: bool) -> None:
    """Also where the log has grown longer again before it is looked at."""
    events = record_run(tmp_path / "it")
    first = events[:5]
    second = [{**events[0], "attempt": 2, "step": 10}, *events[5:]]
    half = json.dumps(events[5])[:-1]
    write_events(tmp_path / "it", first, rest=half)
    (tmp_path / "it" / "summary.json").unlink()
    path = tmp_path / "it" / "events.jsonl"
    lock = FolderLock(tmp_path / "it")
    seen: list[Event] = []
    endings: list[str] = []
    watcher = threading.Thread(target=lambda: endings.append(watch_run(tmp_path / "it", seen.append)), daemon=True)
    watcher.start()
    deadline = time.monotonic() + 10
    while len(seen) < len(first) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # it has read the half line as well
    os.truncate(path, path.stat().st_size - len(half))
    if seen_between:
        time.sleep(1.0)
    with path.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in second)
    watcher.join(timeout=10)
    lock.release()
    assert seen == [*first, *second]
    assert endings == ["The run is finished."]


def test_a_killed_run_is_not_waited_for(tmp_path: Path) -> None:
    stop_before(tmp_path / "it", record_run(tmp_path / "it"), 20, rest='{"time": 1')
    lock = FolderLock(tmp_path / "it")
    timer = threading.Timer(1.0, lock.release)
    timer.start()
    seen: list[Event] = []
    assert watch_run(tmp_path / "it", seen.append) == "The run has stopped without a word."
    assert seen[-1]["step"] == 20
    timer.join()


def test_why_a_run_failed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = record_run(tmp_path / "it")
    failure = {"time": 1.0, "step": 19, "kind": "failure", "error": "the loss is nan"}
    stop_before(tmp_path / "it", events, 18, rest=json.dumps(failure) + "\n")
    (tmp_path / "it" / ".lock").write_text("process 1 on another-machine")  # of which it is not seen that it is gone
    assert main(["watch", str(tmp_path / "it")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "The run failed: the loss is nan"


def test_the_command_that_a_failure_ends_with_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = record_run(tmp_path / "it")
    command = "the disk is full; go on with the same command and --resume auto --run_name it"
    failure = {"time": 1.0, "step": 19, "kind": "failure", "error": command}
    stop_before(tmp_path / "it", events, 18, rest=json.dumps(failure) + "\n")
    assert main(["watch", "--once", str(tmp_path / "it")]) == 0
    assert capsys.readouterr().out.endswith(" --run_name it\n")


@pytest.mark.parametrize("owner", ["", "process 4194305 on {host}"])
def test_a_run_that_was_killed_before_is_not_waited_for(tmp_path: Path, owner: str) -> None:
    stop_before(tmp_path / "it", record_run(tmp_path / "it"), 20)
    (tmp_path / "it" / ".lock").write_text(owner.format(host=socket.gethostname()))
    assert watch_run(tmp_path / "it", lambda _: None) == "The run has stopped without a word."


def test_a_run_of_another_machine_is_waited_for(tmp_path: Path) -> None:
    events = record_run(tmp_path / "it")
    write_events(tmp_path / "it", events[:-1])
    (tmp_path / "it" / ".lock").write_text("process 1 on another-machine")
    seen: list[Event] = []
    timer = threading.Timer(1.0, write_events, [tmp_path / "it", events])
    timer.start()
    assert watch_run(tmp_path / "it", seen.append) == "The run is finished."
    timer.join()
    assert seen == events


def test_a_ctrl_c_leaves_the_run_alone_and_says_so(tmp_path: Path) -> None:
    run = tmp_path / "it"
    stop_before(run, record_run(run), 20)
    lock = FolderLock(run)
    process = subprocess.Popen(
        [sys.executable, "-m", "greenprune.cli", "watch", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = ""
    while not line.lstrip().startswith("2/4"):
        line = process.stdout.readline()
        assert line
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    lock.release()
    assert (process.returncode, err) == (0, "")
    assert out.splitlines()[-1] == "The run goes on."


def test_once_does_not_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_before(tmp_path / "it", record_run(tmp_path / "it"), 20)
    assert main(["watch", str(tmp_path / "it"), "--once"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "These are its events so far."


@pytest.mark.parametrize("command", ["watch", "sync"])
def test_what_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "is not a run with events" in capsys.readouterr().err


def test_events_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "it")
    (tmp_path / "it" / "events.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"cannot be read \(line 1 is no event"):
        watch_run(tmp_path / "it", lambda _: None)
    assert main(["sync", str(tmp_path / "it"), "--to", "tensorboard"]) == 2
    assert "cannot be read (line 1 is no event" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{}", "line 3 is no event: it has no kind"),
        (b"[]", "line 3 is no event: expected a JSON object"),
        (b"\xff", "line 3 is no event: "),
    ],
)
def test_a_line_that_is_no_event_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes, said: str
) -> None:
    events = record_run(tmp_path / "it")
    damage_line(tmp_path / "it", 3, line)
    damage_line(tmp_path / "it", 5)
    seen: list[Event] = []
    watch_run(tmp_path / "it", seen.append, follow=False)
    assert seen == events[:2] + events[3:4] + events[5:]
    assert main(["watch", str(tmp_path / "it"), "--once"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown.startswith(f"The run is finished. Left out: {said}")
    assert "line 5 is no event: " in shown
    assert main(["sync", str(tmp_path / "it"), "--to", "tensorboard"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{len(events) - 2} events of it are told. Left out: {said}")
    assert "line 5 is no event: " in told


def test_an_event_that_lacks_what_is_shown_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "it" / "events.jsonl"
    record_run(path.parent)
    damage_line(path.parent, 2, b'{"kind": "epoch", "step": 5, "time": 1.0}')
    assert main(["watch", str(path.parent), "--once"]) == 2
    error = capsys.readouterr().err
    said = "its epoch event of step 5 lacks 'epoch'"
    assert error.startswith(f"greenprune: error: RUN: {str(path)!r} cannot be read ({said}")
    assert error.count("\n") == 1


def test_a_log_without_its_first_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(tmp_path / "it", record_run(tmp_path / "it")[1:])
    assert main(["watch", str(tmp_path / "it"), "--once"]) == 2
    assert "line 1 is not a start" in capsys.readouterr().err


def test_watching_loads_no_torch(tmp_path: Path) -> None:
    record_run(tmp_path / "it")
    code = (
        f"import sys; from greenprune.cli import main; main(['watch', {str(tmp_path / 'it')!r}]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("size", [10, 3000], ids=["at once", "on the way"])
def test_what_does_not_fit_in_a_tracker_is_one_line_and_leaves_what_it_had(
    tmp_path: Path, files_of_at_most: Any, size: int
) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "it"
    record_run(run)
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "earlier").touch()
    (run / ".lock").touch()
    before = sorted(run.iterdir())
    with files_of_at_most(size):
        command = [sys.executable, "-m", "greenprune.cli", "sync", str(run), "--to", "tensorboard"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == f"greenprune: error: [Errno 27] File too large: {str(run / 'tensorboard')!r}\n"
    assert done.returncode == 1
    assert sorted(run.iterdir()) == before
    assert [path.name for path in (run / "tensorboard").iterdir()] == ["earlier"]


def test_a_run_that_goes_on_at_another_machine_is_not_synced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the machine that a cluster is logged in to: its writer there would lose the folder that it writes."""
    run = tmp_path / "it"
    stop_before(run, record_run(run), 20)
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "written").touch()
    lock, ended = run / ".lock", threading.Event()
    lock.write_text("process 4242 on gpu-node-17")

    def renew() -> None:
        while not ended.wait(0.1):
            os.utime(lock)

    owner = threading.Thread(target=renew)
    owner.start()
    code = main(["sync", str(run), "--to", "tensorboard"])
    ended.set()
    owner.join()
    assert code == 2
    error = capsys.readouterr().err
    assert "still goes on (process 4242 on gpu-node-17)" in error
    assert error.count("\n") == 1
    assert [path.name for path in (run / "tensorboard").iterdir()] == ["written"]
    assert lock.read_text() == "process 4242 on gpu-node-17"


@pytest.mark.parametrize(
    ("owner", "told"),
    [
        ("", "events of it are told"),
        ("process 4242 on gpu-node-17", "cannot be told (last held by process 4242 on gpu-node-17)"),
    ],
)
def test_a_run_in_a_folder_that_cannot_be_written_is_synced_unless_it_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], owner: str, told: str
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    run = tmp_path / "it"
    record_run(run)
    (run / ".lock").write_text(owner)
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    monkeypatch.setattr("greenprune.sync._sync_tensorboard", lambda *_: "")
    monkeypatch.setattr("greenprune.locking.FolderLock._take", read_only)
    code = main(["sync", str(run), "--to", "tensorboard"])
    printed = capsys.readouterr()
    assert told in printed.out + printed.err
    assert code == (2 if owner else 0)
