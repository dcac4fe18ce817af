"""Checkpoints damaged in every class of places; none may be taken for whole."""

from __future__ import annotations

import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from greenprune.checkpoint import FILES, Checkpoint, load_checkpoint, load_newest, save_checkpoint
from greenprune.config import GateConfig, ModelConfig
from greenprune.gating import attach_gates
from greenprune.models import build_model
from greenprune.tracking import Ledger

Span = tuple[str, int, int]
"""A file of a checkpoint, and the first and one past the last byte of a part of it."""


def two_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Checkpoints of a gated network and its optimizer after 22 and 44 steps."""
    torch.manual_seed(0)
    model = build_model(ModelConfig("resnet20"), classes=10, channels=1, image_size=8)
    attach_gates(model, GateConfig(units=["block", "channel"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    paths = []
    for step in (22, 44):
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        training = {"optimizer": optimizer.state_dict(), "random": [torch.get_rng_state()]}
        state = {"step": step, "structure": {"format": 2, "operations": []}, "ledger": Ledger().to_dict()}
        paths.append(save_checkpoint(folder, step, Checkpoint(model.state_dict(), training, state), 2))
    return paths[0], paths[1]


def parts_of(checkpoint: Path) -> dict[str, Span]:
    """The classes of bytes of a checkpoint, and where they lie."""
    model = checkpoint / "model.safetensors"
    (header,) = struct.unpack("<Q", model.read_bytes()[:8])
    size = {name: (checkpoint / name).stat().st_size for name in (*FILES, "manifest.json")}
    parts: dict[str, Span] = {
        "length of the safetensors header": (model.name, 0, 8),
        "safetensors header": (model.name, 8, 8 + header),
        "tensors": (model.name, 8 + header, size[model.name]),
        "state": ("state.json", 0, size["state.json"]),
        "manifest": ("manifest.json", 0, size["manifest.json"]),
    }
    with zipfile.ZipFile(checkpoint / "training.pt") as archive:
        entries = archive.infolist()
        pickled = next(entry for entry in entries if entry.filename.endswith("data.pkl"))
        largest = max(entries, key=lambda entry: entry.file_size)
        for name, entry in (("pickle of the training state", pickled), ("optimizer's tensors", largest)):
            begin = entry.header_offset + 30 + len(entry.filename)  # the local header's extra field pads up to the data
            parts[name] = ("training.pt", begin, begin + entry.file_size)
        parts["archive's headers"] = ("training.pt", pickled.header_offset, pickled.header_offset + 30)
        parts["archive's directory"] = ("training.pt", archive.start_dir, size["training.pt"])
    return parts


def _flip(content: bytearray, begin: int, end: int, chance: random.Random) -> None:
    content[chance.randrange(begin, end)] ^= 1 << chance.randrange(8)


def _overwrite(content: bytearray, begin: int, end: int, chance: random.Random) -> None:
    at = chance.randrange(begin, end)
    length = min(chance.randrange(1, 64), end - at)
    content[at : at + length] = chance.randbytes(length)


def _zero(content: bytearray, begin: int, end: int, chance: random.Random) -> None:
    at = chance.randrange(begin, end)
    content[at : min(end, at + 512)] = bytes(min(end, at + 512) - at)


def _cut(content: bytearray, begin: int, end: int, chance: random.Random) -> None:
    del content[chance.randrange(begin, end) :]


def _remove(content: bytearray, begin: int, end: int, chance: random.Random) -> None:
    del content[chance.randrange(begin, end)]


def _insert(content: bytearray, begin: int, end: int, chance: random.Random) -> None:
    content.insert(chance.randrange(begin, end), chance.randrange(256))


def _append(content: bytearray, begin: int, end: int, chance: random.Random) -> None:
    content += chance.randbytes(chance.randrange(1, 20))


DAMAGES: list[Callable[[bytearray, int, int, random.Random], None]] = [
    _flip,
    _flip,
    _overwrite,
    _zero,
    _cut,
    _remove,
    _insert,
    _append,
]


def _of_whole_files(newest: Path, older: Path, chance: random.Random) -> str:
    name = chance.choice([*FILES, "manifest.json"])
    how = chance.choice(["missing", "of the checkpoint before", "a link", "swapped"])
    target = newest / name
    if how == "missing":
        target.unlink()
    elif how == "of the checkpoint before":
        shutil.copy(older / name, target)
    elif how == "a link":
        aside = newest.parent / "aside"
        target.replace(aside)
        target.symlink_to(aside)
    else:
        other = chance.choice([file for file in FILES if file != name])
        content = target.read_bytes()
        target.write_bytes((newest / other).read_bytes())
        (newest / other).write_bytes(content)
    return f"{name} {how}"


def corrupt(folder: Path, count: int, chance: random.Random) -> dict[str, dict[str, int]]:
    """Damage the newer of two checkpoints again and again.

    Returns:
        For each class of places how many damages were made, how many of them were taken for whole (``accepted``), and
        after how many the one before was not used, bit for bit (``lost``).
    """
    older, newest = two_checkpoints(folder / "checkpoints")
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    expected = load_checkpoint(older)
    parts = parts_of(newest)
    kinds = [*parts, "whole files"]
    tally = {kind: {"damages": 0, "accepted": 0, "lost": 0} for kind in kinds}
    for number in range(count):
        kind = kinds[number % len(kinds)]
        if kind == "whole files":
            _of_whole_files(newest, older, chance)
        else:
            name, begin, end = parts[kind]
            content = bytearray(whole[name])
            while content == whole[name]:  # zeros over zeros are no damage
                chance.choice(DAMAGES)(content, begin, end, chance)
            (newest / name).write_bytes(content)
        found = load_newest(folder / "checkpoints")
        assert found is not None
        path, checkpoint, damaged = found
        same = json.dumps(checkpoint.state) == json.dumps(expected.state) and all(
            torch.equal(tensor, expected.model[name]) for name, tensor in checkpoint.model.items()
        )
        tally[kind]["damages"] += 1
        tally[kind]["accepted"] += path == newest
        tally[kind]["lost"] += not (path == older and same and len(damaged) == 1 and str(newest) in damaged[0])
        for file in newest.iterdir():
            file.unlink()
        for name, content in whole.items():
            (newest / name).write_bytes(content)
    return tally
