"""Checkpoints: bit for bit or not at all, never code, and always one that is whole."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from greenprune.checkpoint import (
    Checkpoint,
    CheckpointCorrupt,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    manifest_text,
    save_checkpoint,
)

MakeNetwork = Callable[..., nn.Module]
FILES = ["model.safetensors", "training.pt", "state.json"]


def small(step: int = 0) -> Checkpoint:
    return Checkpoint({"w": torch.full((3,), float(step))}, {"lr": step / 10}, {"step": step})


def save(folder: Path, *steps: int, keep_last: int = 9) -> list[Path]:
    return [save_checkpoint(folder, step, small(step), keep_last) for step in steps]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def sign_again(path: Path) -> None:
    """Make the manifest match files that were changed after it."""
    contents = {name: (path / name).read_bytes() for name in FILES}
    files = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    (path / "manifest.json").write_text(manifest_text(files))


def assert_equal(one: Any, other: Any) -> None:
    """Equal to the bit, with types, also of what is nested."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


# Round trips.


def test_everything_comes_back_bit_for_bit(tmp_path: Path, make_network: MakeNetwork) -> None:
    model = make_network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
        schedule.step()
    training = {
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": None,
        "totals": torch.tensor([0.1, 1e-300], dtype=torch.float64),
        "random": [torch.get_rng_state(), torch.arange(3, dtype=torch.int64)],
        "half": torch.randn(3).bfloat16(),
        "policy": {"counts": {"stages.0.1": 2**60}, "flag": True, "pair": (1, 2.5)},
    }
    state = {"step": 3, "structure": {"format": 1, "operations": []}, "loss": 0.1, "none": None, "joules": [1.5, None]}
    before = copy.deepcopy((dict(model.state_dict()), training, state))
    path = save_checkpoint(tmp_path / "new" / "folder", 3, Checkpoint(model.state_dict(), training, state), 1)
    loaded = load_checkpoint(path)
    assert_equal(dict(sorted(loaded.model.items())), dict(sorted(before[0].items())))
    assert_equal(loaded.training, before[1])
    assert_equal(loaded.state, before[2])
    twin = make_network()
    twin.load_state_dict(loaded.model)
    again = torch.optim.AdamW(twin.parameters(), lr=0.5, fused=True)
    again.load_state_dict(loaded.training["optimizer"])
    images = torch.randn(4, 3, 8, 8)
    for network, optim in ((model, optimizer), (twin, again)):
        optim.zero_grad()
        network.train()(images).sum().backward()
        optim.step()
    assert_equal(dict(model.state_dict()), dict(twin.state_dict()))


def test_tensors_that_are_not_contiguous_survive(tmp_path: Path, make_network: MakeNetwork) -> None:
    model = make_network().to(memory_format=torch.channels_last)
    weight = model.state_dict()["stages.0.0.branch.0.weight"]
    assert not weight.is_contiguous()
    base = torch.arange(12.0).reshape(3, 4)
    training = {"momentum": weight.clone(memory_format=torch.preserve_format), "view": base.t()}
    path = save_checkpoint(tmp_path, 1, Checkpoint({**model.state_dict(), "view": base[:, ::2]}, training, {}), 1)
    loaded = load_checkpoint(path)
    assert_equal(loaded.model["view"], torch.tensor([[0.0, 2], [4, 6], [8, 10]]))
    assert_equal(loaded.training["view"], base.t())
    assert torch.equal(loaded.training["momentum"], weight)
    assert loaded.training["momentum"].stride() == weight.stride()
    twin = make_network().to(memory_format=torch.channels_last)
    del loaded.model["view"]
    twin.load_state_dict(loaded.model)
    assert_equal(dict(twin.state_dict()), dict(model.state_dict()))
    assert twin.state_dict()["stages.0.0.branch.0.weight"].stride() == weight.stride()


def test_the_path_names_the_step(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1234)
    assert path.parent == tmp_path
    assert path.name == "step-000001234"
    assert names(path) == sorted([*FILES, "manifest.json"])


# Which ones stay.


def test_only_the_newest_stay(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 20, keep_last=2)
    assert names(tmp_path) == ["step-000000015", "step-000000020"]
    save(tmp_path, 25, keep_last=1)
    assert names(tmp_path) == ["step-000000025"]


def test_the_order_is_that_of_the_steps(tmp_path: Path) -> None:
    paths = save(tmp_path, 99, 100, 999_999_999, 1_000_000_000)
    assert list_checkpoints(tmp_path) == paths


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_one_just_written_stays_whatever_lies_there(tmp_path: Path, keep_last: int) -> None:
    """A run that goes on from an older checkpoint, by its path or because newer ones are damaged."""
    save(tmp_path, 10, 20, 30)
    path = save_checkpoint(tmp_path, 15, small(15), keep_last)
    assert load_checkpoint(path).state == {"step": 15}


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 10)
    (path / "model.safetensors").write_bytes(b"damaged")
    save_checkpoint(tmp_path, 10, small(11), 2)
    assert load_checkpoint(path).state == {"step": 11}


def test_there_are_none_before_the_first(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "nothing") == []
    assert load_newest(tmp_path / "nothing") is None
    assert load_newest(tmp_path) is None


# Interrupted writing.


@pytest.mark.parametrize("died_after", ["model.safetensors", "manifest.json"])
def test_a_killed_write_is_ignored(tmp_path: Path, died_after: str) -> None:
    save(tmp_path, 10)
    leftover = tmp_path / ".step-000000020.tmp"
    leftover.mkdir()
    (leftover / died_after).write_bytes(b"half of")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000010"]
    path, checkpoint, damaged = load_newest(tmp_path)
    assert (path.name, checkpoint.state, damaged) == ("step-000000010", {"step": 10}, [])


@pytest.mark.parametrize("next_step", [20, 25])
def test_what_a_killed_write_left_is_gone_after_the_next(tmp_path: Path, next_step: int) -> None:
    save(tmp_path, 10)
    leftover = tmp_path / ".step-000000020.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half of a network")
    save(tmp_path, next_step)
    assert names(tmp_path) == ["step-000000010", f"step-{next_step:09d}"]
    assert load_checkpoint(tmp_path / f"step-{next_step:09d}").state == {"step": next_step}


@pytest.mark.parametrize("fails_at", ["torch.save", "os.fsync", "pathlib.Path.rename"])
def test_a_failed_write_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 10, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(fails_at, full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 20, keep_last=1)
    path, checkpoint, damaged = load_newest(tmp_path)
    assert (path.name, checkpoint.state, damaged) == ("step-000000010", {"step": 10}, [])
    save(tmp_path, 20, keep_last=1)
    assert names(tmp_path) == ["step-000000020"]


def test_the_older_one_stays_until_the_new_one_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10, keep_last=1)
    flushed: list[str] = []
    real = os.fsync

    def watch(descriptor: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        assert (tmp_path / "step-000000010").is_dir()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    save(tmp_path, 20, keep_last=1)
    assert {*FILES, "manifest.json"} < set(flushed)
    assert names(tmp_path) == ["step-000000020"]


# Damage.


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink], ids=["cut", "flipped", "emptied", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    (path,) = save(tmp_path, 10)
    damage(path / name)
    with pytest.raises(CheckpointCorrupt, match=f"{path / name}: "):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 1}',
        b'{"format": 1, "files": {}}',
        b'{"format": 1, "files": null}',
        b'{"format": 2, "files": {}}',
    ],
    ids=str,
)
def test_a_damaged_manifest_is_named(tmp_path: Path, manifest: bytes | None) -> None:
    (path,) = save(tmp_path, 10)
    (path / "manifest.json").unlink()
    if manifest is not None:
        (path / "manifest.json").write_bytes(manifest)
    with pytest.raises(CheckpointCorrupt, match=str(path)):
        load_checkpoint(path)


def test_another_format_is_refused_as_such(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 7}))
    with pytest.raises(CheckpointCorrupt, match="format 7 is not 2"):
        load_checkpoint(path)


def test_a_folder_that_is_not_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointCorrupt, match="step-000000001"):
        load_checkpoint(tmp_path / "step-000000001")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no archive", b"something else altogether"], ids=str)
def test_a_file_that_is_not_what_it_should_be_is_refused_though_its_checksum_fits(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (path,) = save(tmp_path, 10)
    (path / name).write_bytes(content)
    sign_again(path)
    with pytest.raises(CheckpointCorrupt, match=str(path)):
        load_checkpoint(path)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("wrapped", [True, False], ids=["torch archive", "plain pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, wrapped: bool) -> None:
    (path,) = save(tmp_path, 10)
    proof = tmp_path / "proof"
    if wrapped:
        torch.save({"lr": 1, "x": Payload(proof)}, path / "training.pt")
    else:
        (path / "training.pt").write_bytes(pickle.dumps(Payload(proof), protocol=2))
    sign_again(path)
    with pytest.raises(CheckpointCorrupt, match=str(path)):
        load_checkpoint(path)
    assert not proof.exists()
    if wrapped:  # it would have run
        torch.load(path / "training.pt", weights_only=False)
        assert proof.exists()


# The newest that is whole.


def test_a_damaged_one_gives_way_to_the_one_before_it(tmp_path: Path) -> None:
    _, middle, last = save(tmp_path, 10, 20, 30)
    assert load_newest(tmp_path)[0] == last
    flip(last / "training.pt")
    path, checkpoint, damaged = load_newest(tmp_path)
    assert (path, checkpoint.state) == (middle, {"step": 20})
    assert len(damaged) == 1
    assert str(last / "training.pt") in damaged[0]
    (middle / "manifest.json").unlink()
    path, checkpoint, damaged = load_newest(tmp_path)
    assert checkpoint.state == {"step": 10}
    assert [str(last) in damaged[0], str(middle) in damaged[1]] == [True, True]


def test_if_none_is_whole_all_are_named(tmp_path: Path) -> None:
    paths = save(tmp_path, 10, 20)
    for path in paths:
        cut(path / "state.json")
    with pytest.raises(CheckpointCorrupt, match="no checkpoint is whole") as refused:
        load_newest(tmp_path)
    assert all(str(path / "state.json") in str(refused.value) for path in paths)
