"""W&B offline, for real: the run's numbers are in the file that `wandb sync` uploads."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launching import TRAIN, command, environment
from wandb.proto import wandb_internal_pb2

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


def test_a_run_without_network_or_key_is_logged_offline(tmp_path: Path) -> None:
    args = ["--model.name", "resnet20", "--optim.epochs", "3", "--removal.decide_by", "0.7", "--optim.lr", "0.05"]
    args += ["--output_dir", str(tmp_path), "--run_name", "w", "--tracking.trackers", "[wandb]"]
    # A home without a netrc, so that nobody is logged in.
    done = subprocess.run(
        command(TRAIN, args, 1),
        env=environment() | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wandb sync" in done.stdout
    (path,) = (tmp_path / "w" / "wandb").glob("offline-run-*/*.wandb")
    history: list[dict[str, float]] = []
    axes: dict[str, str] = {}
    summary: dict[str, object] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "summary":
            summary.update({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update})
    assert axes["eval/*"] == "energy/total_j"
    evaluated = [row for row in history if "eval/accuracy" in row]
    assert len(evaluated) == 3
    assert all({"energy/total_j", "flops/train", "structure/blocks"} <= row.keys() for row in evaluated)
    written = json.loads((tmp_path / "w" / "summary.json").read_text())
    assert evaluated[-1]["eval/accuracy"] == written["accuracy"]
    assert summary["energy_j"] == written["energy_j"]
