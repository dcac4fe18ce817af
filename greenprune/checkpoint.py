"""Checkpoints that are whole or not there, and that hold no code.

One checkpoint is a folder ``step-<n>``: the network's tensors as safetensors, the rest of the training state in a
file that PyTorch reads with ``weights_only=True``, the plain values as JSON, and a manifest with the size and SHA-256
of each file and of itself. It is written under a temporary name, flushed to disk and renamed; older ones go only after
that. A thread does it, while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import stat
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

FORMAT = 2  # 1 had no checksum of the manifest itself
_NAME = re.compile(r"step-([0-9]+)")
_MODEL, _TRAINING, _STATE, _MANIFEST = "model.safetensors", "training.pt", "state.json", "manifest.json"
FILES = (_MODEL, _TRAINING, _STATE)
"""The files that a manifest names; there are no others in a checkpoint."""

_MANIFEST_BYTES = 1 << 16  # many times what one takes: more is none, and is not read


class CheckpointCorrupt(RuntimeError):
    """A checkpoint that is incomplete, damaged or of another run; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        model: The unwrapped network's tensors by name.
        training: Optimizer, schedule, gates' policy, scaler, random state: tensors and plain values, nested.
        state: Plain values: step, structure, ledger, the config that shapes the result.
    """

    model: dict[str, Tensor]
    training: dict[str, Any]
    state: dict[str, Any]


# Writing.


def save_checkpoint(
    folder: Path,
    step: int,
    checkpoint: Checkpoint,
    keep_last: int,
    *,
    keep_best: int = 0,
    score: float | None = None,
    flush_first: Path | None = None,
) -> Path:
    """Write ``folder/step-<step>`` and delete all but the newest and the best ones.

    Args:
        folder: Folder of the run's checkpoints.
        step: Steps done.
        checkpoint: What to write.
        keep_last: How many of the newest checkpoints stay.
        keep_best: How many of those with the highest score stay besides.
        score: How good this one is; None: not known, and no reason to keep it.
        flush_first: A log that must be on disk before the checkpoint counts.

    Returns:
        Path of the new checkpoint.

    Raises:
        OSError: It cannot be written; those that were there are as they were.
    """
    target = folder / f"step-{step:09d}"
    temporary = folder / f".{target.name}.tmp"
    for left_over in folder.glob(".step-*.tmp"):  # of a save that was cut short
        shutil.rmtree(left_over)
    is_first = not folder.is_dir()
    temporary.mkdir(parents=True)
    try:
        files = {
            _MODEL: write_file(temporary / _MODEL, lambda file: _write_tensors(checkpoint.model, file)),
            _TRAINING: write_file(temporary / _TRAINING, lambda file: torch.save(checkpoint.training, file)),
            _STATE: write_file(
                temporary / _STATE, lambda file: file.write(json.dumps(checkpoint.state, indent=1).encode())
            ),
        }
        text = manifest_text(files, score)
        write_file(temporary / _MANIFEST, lambda file: file.write(text.encode()))
        _flush(temporary)
        if flush_first is not None and flush_first.exists():
            _flush(flush_first)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk it would stand in its own way
        raise
    if target.exists():  # the same step again, after a resume: the one on disk may be damaged
        _set_aside(target)
    temporary.rename(target)
    _flush(folder)
    if is_first:
        _flush(folder.parent)
    _delete_others(folder, target, keep_last, keep_best)
    return target


class _HashingFile:
    """A file that hashes what is written to it and remembers why a write failed.

    Serialisers report a full disk as an error of their own, in words that differ; the system's is kept here.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            self._file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(content)
        self.bytes += len(content)
        return len(content)

    def flush(self) -> None:
        """For serialisers that ask for it; what counts is the flush at the end."""


def write_file(path: Path, serialise: Callable[[Any], object]) -> dict[str, Any]:
    """Write a file through to the disk.

    Args:
        path: The file.
        serialise: Writes the content to what it is given, which has ``write`` and ``flush``.

    Returns:
        Its size (``bytes``) and checksum (``sha256``) as they should be there.

    Raises:
        OSError: It cannot be written, in the system's words whatever the serialiser's are; it bears the file's name.
    """
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        try:
            serialise(hashing)
        except RuntimeError as error:
            if hashing.error is None:
                raise
            raise OSError(hashing.error.errno, hashing.error.strerror, str(path)) from error
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


def _write_tensors(tensors: dict[str, Tensor], file: _HashingFile) -> None:
    file.write(safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def manifest_text(files: dict[str, dict[str, Any]], score: float | None = None) -> str:
    """The one text of a manifest that :func:`load_checkpoint` takes.

    Args:
        files: Size (``bytes``) and checksum (``sha256``) of each of :data:`FILES`.
        score: How good the checkpoint is, if that is known.
    """
    body = {"format": FORMAT, "files": files, "score": score}
    return json.dumps({**body, "sha256": _manifest_digest(body)}, indent=1)


def _manifest_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete_others(folder: Path, newest: Path, keep_last: int, keep_best: int) -> None:
    """Delete what is neither among the newest nor among the best; a kill in between leaves no half of one."""
    checkpoints = list_checkpoints(folder)
    position = checkpoints.index(newest)
    # Steps beyond this one are of a course that was left for an earlier checkpoint.
    going = {*checkpoints[position + 1 :], *checkpoints[: max(0, position + 1 - keep_last)]}
    if keep_best:
        scores = [(_score(path), path) for path in checkpoints[: position + 1]]
        known = sorted((score, path) for score, path in scores if score is not None)
        going -= {path for _, path in known[-keep_best:]}
    for path in going:
        _set_aside(path)
    for aside in folder.glob(".step-*.old.tmp"):
        shutil.rmtree(aside)


def _set_aside(path: Path) -> None:
    """Make a checkpoint none, to be deleted as the next one is written."""
    path.rename(path.with_name(f".{path.name}.old.tmp"))


def leave_later(folder: Path, chosen: Path) -> None:
    """Set aside the checkpoints after the one that a run goes on from: they are of a course that it leaves.

    An attempt that is killed before its first checkpoint would otherwise be followed by one that goes on from theirs.

    Args:
        folder: Folder of the run's checkpoints.
        chosen: The checkpoint; of one that lies elsewhere none is after it.

    Raises:
        OSError: The folder cannot be written.
    """
    checkpoints = list_checkpoints(folder)
    later = checkpoints[checkpoints.index(chosen) + 1 :] if chosen in checkpoints else []
    for path in reversed(later):  # if it is cut short, the newest that is left is still one of its course
        _set_aside(path)
    if later:
        _flush(folder)


def _score(path: Path) -> float | None:
    try:
        score: float | None = _read_manifest(path)["score"]
    except (CheckpointCorrupt, OSError):
        return None
    return score


@dataclass(frozen=True)
class Written:
    """A checkpoint that is on disk.

    Attributes:
        path: Its folder.
        step: Steps done.
        write_s: Seconds that writing it took, while training went on.
    """

    path: Path
    step: int
    write_s: float


class CheckpointWriter:
    """Writes checkpoints on a thread, one after the other: training waits only for a copy of its tensors.

    Args:
        folder: Folder of the run's checkpoints.
        keep_last: How many of the newest checkpoints stay.
        keep_best: How many of those with the highest score stay besides.
        flush_first: A log that must be on disk before a checkpoint counts.
    """

    def __init__(self, folder: Path, keep_last: int, keep_best: int, flush_first: Path) -> None:
        self._folder = folder
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._flush_first = flush_first
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="greenprune-checkpoint")
        self._pending: Future[Written] | None = None

    def begin(self, step: int, checkpoint: Checkpoint, score: float | None) -> None:
        """Copy a checkpoint, and write it from now on; the one before must have been taken.

        Args:
            step: Steps done.
            checkpoint: What to write; may change as soon as this returns.
            score: How good it is, if that is known.
        """
        assert self._pending is None, "a checkpoint is still being written"
        copied = Checkpoint(_copied(checkpoint.model), _copied(checkpoint.training), _copied(checkpoint.state))
        self._pending = self._executor.submit(self._save, step, copied, score)

    def _save(self, step: int, checkpoint: Checkpoint, score: float | None) -> Written:
        started = time.monotonic()
        path = save_checkpoint(
            self._folder,
            step,
            checkpoint,
            self._keep_last,
            keep_best=self._keep_best,
            score=score,
            flush_first=self._flush_first,
        )
        return Written(path, step, time.monotonic() - started)

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in hand could not be written; :meth:`wait` says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def take(self) -> Written | None:
        """The checkpoint in hand if it is on disk by now; waits for nothing."""
        if self._pending is None or not self._pending.done() or self.failed:
            return None
        return self.wait()

    def wait(self) -> Written | None:
        """The checkpoint in hand, once it is on disk; None if there is none.

        Raises:
            OSError: It could not be written.
        """
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """Finish what is in hand; may be called twice."""
        self._executor.shutdown(wait=True)


def _copied(value: Any) -> Any:
    """Nested values with every tensor copied to the CPU, in its own memory layout."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


# Reading.


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
        files = _read_manifest(path)["files"]
        for name in FILES:
            _check_file(path / name, files[name])
        return Checkpoint(
            model=safetensors.torch.load_file(path / _MODEL),
            training=_load_training(path / _TRAINING),
            state=_load_state(path / _STATE),
        )
    except OSError as error:
        raise CheckpointCorrupt(f"{error.filename or path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointCorrupt(f"{path}: not a checkpoint ({_one_line(error)})") from None


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest that is exactly as it was written, and that names the files of a checkpoint and no others."""
    manifest = path / _MANIFEST
    _check_regular(manifest)
    with manifest.open("rb") as file:
        content = file.read(_MANIFEST_BYTES + 1)
    if len(content) > _MANIFEST_BYTES:
        raise CheckpointCorrupt(f"{manifest}: longer than any manifest")
    try:
        values = json.loads(content)
        found = values["format"]
        if found != FORMAT or isinstance(found, bool):
            raise CheckpointCorrupt(f"{path}: format {found!r} is not {FORMAT}, the one read here")
        strange = sorted(values["files"].keys() ^ set(FILES))
        if strange:
            raise CheckpointCorrupt(f"{manifest}: {strange[0]!r} is not a file of a checkpoint, or is missing")
        score = values["score"]
        if isinstance(score, bool) or not isinstance(score, int | float | None):
            raise CheckpointCorrupt(f"{manifest}: its score is no number")
        text = manifest_text(values["files"], score)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointCorrupt(f"{manifest}: not the manifest of a checkpoint ({_one_line(error)})") from None
    if text.encode() != content:
        raise CheckpointCorrupt(f"{manifest}: differs from its own checksum")
    return {"files": values["files"], "score": score}


def _check_regular(path: Path) -> None:
    """Refuse what is no file of its own: a link may lead out of the folder, a pipe never ends.

    Raises:
        CheckpointCorrupt: It is so.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointCorrupt(f"{path}: not a regular file of the checkpoint's own")


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    _check_regular(path)
    if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
        raise CheckpointCorrupt(f"{path}: size or checksum differs from the manifest")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(1 << 20):
            digest.update(content)
    return digest.hexdigest()


def _load_training(path: Path) -> dict[str, Any]:
    """Tensors and plain values only; anything that would run code is refused."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, AttributeError) as error:
        raise CheckpointCorrupt(f"{path}: not a training state ({_one_line(error)})") from None
    if not isinstance(values, dict):
        raise CheckpointCorrupt(f"{path}: not a training state")
    return values


def _load_state(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    if not isinstance(values, dict):
        raise CheckpointCorrupt(f"{path}: not a JSON object")
    return values


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_newest(
    folder: Path, check: Callable[[Checkpoint], None] | None = None
) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest checkpoint that is whole.

    Args:
        folder: Folder of the run's checkpoints.
        check: Raises :class:`CheckpointCorrupt` for one that is whole but does not belong to the run.

    Returns:
        Its path, its content, and a line for each newer one that is damaged or foreign; None if no checkpoint was ever
        written.

    Raises:
        CheckpointCorrupt: There are checkpoints but none can be used.
    """
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = load_checkpoint(path)
            if check is not None:
                _check_as(path, checkpoint, check)
        except CheckpointCorrupt as error:
            damaged.append(str(error))
        else:
            return path, checkpoint, damaged
    if damaged:
        raise CheckpointCorrupt("no checkpoint is whole: " + "; ".join(damaged))
    return None


def _check_as(path: Path, checkpoint: Checkpoint, check: Callable[[Checkpoint], None]) -> None:
    try:
        check(checkpoint)
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(f"{path}: {error}") from None
