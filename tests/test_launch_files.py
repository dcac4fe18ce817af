"""The files in launch/: each starts what it says, and leaves to the run's config what the config says."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launching import ROOT, TRAIN, command, environment, run

pytestmark = pytest.mark.system

FILES = sorted((ROOT / "launch").glob("*.yaml"))
CONFIG = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: 2, lr: 0.05}
budget: {target: 0.8}
removal: {window: 11, decide_by: 0.6}
"""


@pytest.fixture
def args(tmp_path: Path) -> list[str]:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return ["--config", str(tmp_path / "config.yaml"), "--output_dir", str(tmp_path), "--run_name", "run"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_launch_file_says_only_where_processes_run(file: Path) -> None:
    settings = load_config_from_file(str(file))
    assert settings.mixed_precision == "no"
    assert not settings.use_cpu
    assert settings.num_processes >= 1
    if settings.deepspeed_config:
        assert settings.deepspeed_config == {
            "zero_stage": int(file.stem.removeprefix("deepspeed_zero")[0]),
            "zero3_init_flag": False,
        }


def test_the_table_lists_every_launch_file() -> None:
    table = (ROOT / "launch" / "README.md").read_text()
    listed = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert listed == {file.name for file in FILES}


@pytest.mark.parametrize("launch", ["cpu", "gpu"])
def test_one_process(args: list[str], tmp_path: Path, launch: str) -> None:
    done = run(TRAIN, args, launch=launch)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["engine"]) == (1, "one process")


def test_two_machines_come_together(args: list[str], tmp_path: Path) -> None:
    """Two launchers on this machine, each as if it were on one of its own, meet over the first one's port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    line = command(TRAIN, args, launch="multinode")
    place = line.index("--config_file") + 2
    launchers = []
    for rank in ("0", "1"):
        flags = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", rank]
        flags += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        launchers.append(
            subprocess.Popen(
                [*line[:place], *flags, *line[place:]],
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for launcher in launchers:
        _, errors = launcher.communicate(timeout=200)
        assert launcher.returncode == 0, errors[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["world_size"], summary["engine"]) == (2, "DDP")
    assert summary["removals"]


@pytest.mark.parametrize(
    ("launch", "flags", "message"),
    [
        ("deepspeed_zero1_cpu_2", ["--precision", "fp16"], "precision: 'fp16' is not valid"),
        ("cpu_2", ["--model.sync_batchnorm", "true"], "model.sync_batchnorm: True is not valid on CPUs"),
        ("cpu_2", ["--data.batch_size", "63"], "data.batch_size: 63 is not valid with 2 processes"),
        (
            "cpu_2",
            ["--data.batch_size", "6", "--optim.accumulate", "2"],
            "data.batch_size: 6 is not valid with 2 processes and optim.accumulate 2",
        ),
    ],
)
def test_what_does_not_fit_the_launch_is_said_once(
    args: list[str], tmp_path: Path, launch: str, flags: list[str], message: str
) -> None:
    done = run(TRAIN, [*args, *flags], launch=launch)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("greenprune: error:")]
    assert len(said) == 1, done.stderr[-3000:]
    assert message in said[0]
    assert not (tmp_path / "run").exists()
