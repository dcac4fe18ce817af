"""Checkpoints that are whole or not there, and that hold no code.

One checkpoint is a folder ``step-<n>``: the network's tensors as safetensors, the rest of the training state in a
file that PyTorch reads with ``weights_only=True``, the plain values as JSON, and a manifest with the size and SHA-256
of each file. It is written under a temporary name, flushed to disk and renamed; older ones go only after that.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_NAME = re.compile(r"step-(\d+)")
_MODEL, _TRAINING, _STATE, _MANIFEST = "model.safetensors", "training.pt", "state.json", "manifest.json"


class CheckpointCorrupt(RuntimeError):
    """A checkpoint that is incomplete or damaged; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        model: The unwrapped network's tensors by name.
        training: Optimizer, schedule, gates' policy, scaler, random state: tensors and plain values, nested.
        state: Plain values: step, structure, ledger, identity of the run.
    """

    model: dict[str, Tensor]
    training: dict[str, Any]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write ``folder/step-<step>`` and delete all but the newest ``keep_last`` checkpoints.

    Args:
        folder: Folder of the run's checkpoints.
        step: Steps done.
        checkpoint: What to write.
        keep_last: How many checkpoints stay.

    Returns:
        Path of the new checkpoint.
    """
    target = folder / f"step-{step:09d}"
    temporary = folder / f".{target.name}.tmp"
    for left_over in folder.glob(".step-*.tmp"):  # of a save that was cut short
        shutil.rmtree(left_over)
    temporary.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in checkpoint.model.items()}, temporary / _MODEL)
    torch.save(checkpoint.training, temporary / _TRAINING)
    (temporary / _STATE).write_text(json.dumps(checkpoint.state, indent=1))
    files = {name: _fingerprint(temporary / name) for name in (_MODEL, _TRAINING, _STATE)}
    (temporary / _MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    for path in temporary.iterdir():
        _flush(path)
    _flush(temporary)
    if target.exists():  # the same step again, after a resume: the one on disk may be damaged
        target.rename(folder / f".{target.name}.old.tmp")
    temporary.rename(target)
    _flush(folder)
    # Steps beyond this one are of a course that was left for an earlier checkpoint.
    checkpoints = list_checkpoints(folder)
    position = checkpoints.index(target)
    for path in [*checkpoints[position + 1 :], *checkpoints[: max(0, position + 1 - keep_last)]]:
        shutil.rmtree(path)
    for aside in folder.glob(".step-*.old.tmp"):
        shutil.rmtree(aside)
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _sha256(file.read())
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _sha256(content: bytes) -> Any:
    return hashlib.sha256(content)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    named = [(int(found[1]), path) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named)]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU after checking every file against the manifest.

    Raises:
        CheckpointCorrupt: A file is missing, has another size or checksum, or is not what it should be.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise CheckpointCorrupt(f"{path}: format {manifest['format']} is not {FORMAT}, the one read here")
        for name in (_MODEL, _TRAINING, _STATE):
            if _fingerprint(path / name) != files[name]:
                raise CheckpointCorrupt(f"{path / name}: size or checksum differs from the manifest")
        return Checkpoint(
            model=load_file(path / _MODEL),
            training=_load_training(path / _TRAINING),
            state=json.loads((path / _STATE).read_text()),
        )
    except OSError as error:
        raise CheckpointCorrupt(f"{error.filename or path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointCorrupt(f"{path}: not a checkpoint ({' '.join(str(error).split())[:200]})") from None


def _load_training(path: Path) -> dict[str, Any]:
    """Tensors and plain values only; anything that would run code is refused."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, IndexError) as error:
        raise CheckpointCorrupt(f"{path}: not a training state ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(values, dict):
        raise CheckpointCorrupt(f"{path}: not a training state")
    return values


def load_newest(folder: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest checkpoint that is whole.

    Returns:
        Its path, its content, and a line for each newer one that is damaged; None if no checkpoint was ever written.

    Raises:
        CheckpointCorrupt: There are checkpoints but none is whole.
    """
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_checkpoint(path), damaged
        except CheckpointCorrupt as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointCorrupt("no checkpoint is whole: " + "; ".join(damaged))
    return None
