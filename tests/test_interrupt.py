"""Being asked to stop: by a signal to one process or to all, at once or twice, within a long epoch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
sys.path.insert(0, str(Path(__file__).parent / "report"))
from launching import ROOT, TRAIN, command, environment
from recording import record_run

from greenprune.interrupt import ended_by_ctrl_c


def read_events(folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def wait_for_training(process: subprocess.Popen, folder: Path, kind: str = "train") -> None:
    deadline = time.monotonic() + 100
    while not any(event["kind"] == kind for event in read_events(folder)):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start(args: list[str], folder: Path, processes: int = 1) -> subprocess.Popen:
    own = ["--output_dir", str(folder.parent), "--run_name", folder.name, "--resume", "auto"]
    return subprocess.Popen(
        command(TRAIN, [*args, *own], processes), env=environment(), start_new_session=True, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of small images."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.RandomState(0)
    for part, count in (("train", 40), ("val", 5)):
        for label in ("n01", "n02"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 256, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.JPEG")
    return root


@pytest.mark.system
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_leaves_the_loaders_until_the_step_is_done(
    images: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """scancel signals every process of a job, Ctrl-C every process of a terminal."""
    folder = tmp_path / "run"
    data = ["--data.name", "image_folder", "--data.root", str(images), "--data.image_size", "32"]
    data += ["--data.workers", "2", "--data.batch_size", "8", "--model.name", "resnet20"]
    process = start([*data, "--optim.epochs", "500", "--tracking.log_every", "1"], folder)
    wait_for_training(process, folder, "epoch")  # the loaders have been at work
    time.sleep(0.5)
    os.killpg(process.pid, number)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + number, message.decode()[-2000:]
    assert b"Traceback" not in message
    last = read_events(folder)[-1]
    assert (last["kind"], last["signal"]) == ("interrupt", number.name)
    assert Path(last["checkpoint"], "manifest.json").exists()


@pytest.mark.system
def test_two_processes_stop_within_a_long_epoch(tmp_path: Path) -> None:
    """However seldom they report: the time does not depend on the length of an epoch."""
    folder = tmp_path / "run"
    # 719 steps an epoch, and no report before its end.
    args = ["--data.batch_size", "2", "--optim.epochs", "100", "--tracking.log_every", "100000"]
    args += ["--removal.window", "20", "--model.name", "resnet20"]
    process = start(args, folder, processes=2)
    wait_for_training(process, folder, "window")
    asked = time.time()
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    stopped = read_events(folder)[-1]
    assert stopped["kind"] == "interrupt"
    assert stopped["step"] % 719 != 0
    print(f"SIGTERM to checkpoint, two processes, 719 steps an epoch: {stopped['time'] - asked:.2f} s")
    assert stopped["time"] - asked < 5


TWICE = """
import os, signal, sys, time
from greenprune.interrupt import InterruptRequest

request = InterruptRequest(at_second=lambda: print("ending all", flush=True))
with request:
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""


def test_a_second_ctrl_c_ends_it_at_once_and_what_a_launcher_passes_on_does_not() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # the launcher's echo of the first
        process.send_signal(number)
        time.sleep(0.2)
    assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT
    assert process.stdout.read() == "ending all\n"
    process.stdout.close()


HANGING = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:  # as a library may whose callback is interrupted
    pass
"""


def start_shadowed(args: list[str], libraries: Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start Python with some libraries in place of those of the same names."""
    return subprocess.Popen(
        [sys.executable, *args],
        cwd=cwd,
        env=environment() | {"PYTHONPATH": f"{libraries}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_says(process: subprocess.Popen[str], word: str, what: str = "") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n", what


def assert_ends_without_a_word(process: subprocess.Popen[str], number: signal.Signals, what: str = "") -> None:
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", ""), what
    assert process.returncode == -number, what  # 128 + number to a shell


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("entry", "module"),
    [
        (["-m", "greenprune.cli", "train"], "jsonargparse"),
        (["-m", "greenprune.cli", "train"], "torch"),
        (["-m", "greenprune.cli", "train", "--energy.country", "FRA"], "codecarbon"),
        (["-m", "greenprune.cli", "sweep"], "psutil"),
        ([str(TRAIN)], "jsonargparse"),
        ([str(TRAIN)], "torch"),
    ],
)
def test_a_signal_while_it_starts_ends_it_without_a_word(
    entry: list[str], module: str, number: signal.Signals, tmp_path: Path
) -> None:
    """A library that takes long to import, or that swallows what interrupts it, stands for all of them."""
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(HANGING)
    process = start_shadowed([*entry, "--output_dir", str(tmp_path / "runs")], tmp_path)
    assert_says(process, "importing")
    assert_ends_without_a_word(process, number)
    assert not (tmp_path / "runs").exists()


COMMANDS = {
    "compare runs": "rich",
    "report runs": "rich",
    "watch runs": "rich",
    "verify runs": "torch",
    "sync runs": "psutil",
    "dashboard --print": "wandb_workspaces",
    "export runs --format onnx": "torch",
    "eval file --data digits": "torch",
    "infer-bench file": "torch",
    "doctor": "torch",
    "measure -- true": "jsonargparse",
}


def test_a_ctrl_c_while_a_command_still_imports_ends_it_without_a_word(tmp_path: Path) -> None:
    """Every command but train and sweep, all at the same time."""
    processes = {}
    for number, (line, module) in enumerate(COMMANDS.items()):
        libraries = tmp_path / str(number)
        (libraries / module).mkdir(parents=True)
        (libraries / module / "__init__.py").write_text(HANGING)
        processes[line] = start_shadowed(["-m", "greenprune.cli", *line.split()], libraries, cwd=tmp_path)
    for line, process in processes.items():
        assert_says(process, "importing", line)
        assert_ends_without_a_word(process, signal.SIGINT, line)


WRITES = """
import pathlib, time
class SummaryWriter:
    def __init__(self, folder):
        pathlib.Path(folder).mkdir()
        print("writing", flush=True)
        time.sleep(60)
"""


def test_a_ctrl_c_leaves_nothing_half_written(tmp_path: Path) -> None:
    run = tmp_path / "it"
    record_run(run)
    (tmp_path / "torch" / "utils").mkdir(parents=True)
    for module, text in (("__init__", ""), ("utils/__init__", ""), ("utils/tensorboard", WRITES)):
        (tmp_path / "torch" / f"{module}.py").write_text(text)
    args = ["-m", "greenprune.cli", "sync", str(run), "--to", "tensorboard"]
    process = start_shadowed(args, tmp_path)
    assert_says(process, "writing")
    assert [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    assert_ends_without_a_word(process, signal.SIGINT)
    assert not [path.name for path in run.iterdir() if path.name.endswith(".tmp")]
    assert (run / ".lock").read_text() == ""


def test_a_ctrl_c_that_is_ignored_stays_ignored_while_it_starts() -> None:
    """As a shell has it for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ended_by_ctrl_c():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with ended_by_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
