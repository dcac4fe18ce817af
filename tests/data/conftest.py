"""Miniatures of every on-disk format, written in the layouts that the publishers use."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image


@pytest.fixture(scope="session")
def real_root():
    root = os.environ.get("GREENPRUNE_DATA")
    if root is None:
        pytest.skip("GREENPRUNE_DATA is not set")
    return root


def write_cifar(folder: Path, file: str, samples: int, classes: int, key: str, seed: int) -> None:
    rng = np.random.RandomState(seed)
    labels = [n % classes for n in range(samples)]
    data = rng.randint(0, 256, (samples, 3072)).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(pickle.dumps({"data": data, key: labels}))


def publish(monkeypatch, reader, root: Path) -> None:
    """Take the sums of the files that lie there for the published ones."""

    def entry(file):
        return [file, hashlib.md5((root / reader.base_folder / file).read_bytes()).hexdigest()]

    monkeypatch.setattr(reader, "train_list", [entry(file) for file, _ in reader.train_list])
    monkeypatch.setattr(reader, "test_list", [entry(file) for file, _ in reader.test_list])
    meta = reader.meta["filename"]
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": entry(meta)[1]})


@pytest.fixture
def cifar10_root(tmp_path, monkeypatch):
    reader = torchvision.datasets.CIFAR10
    folder = tmp_path / reader.base_folder
    for number in range(1, 6):
        write_cifar(folder, f"data_batch_{number}", 20, 10, "labels", number)
    write_cifar(folder, "test_batch", 37, 10, "labels", 6)
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    publish(monkeypatch, reader, tmp_path)
    return tmp_path


@pytest.fixture
def cifar100_root(tmp_path, monkeypatch):
    reader = torchvision.datasets.CIFAR100
    folder = tmp_path / reader.base_folder
    write_cifar(folder, "train", 200, 100, "fine_labels", 1)
    write_cifar(folder, "test", 100, 100, "fine_labels", 2)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {n}" for n in range(100)]}))
    publish(monkeypatch, reader, tmp_path)
    return tmp_path


def write_idx(path: Path, data: np.ndarray) -> None:
    header = bytes([0, 0, 8, data.ndim]) + np.array(data.shape, dtype=">u4").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + data.astype(np.uint8).tobytes())


@pytest.fixture
def fashion_root(tmp_path):
    rng = np.random.RandomState(0)
    for part, samples in (("train", 60), ("t10k", 20)):
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.randint(0, 256, (samples, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(samples) % 10)
    return tmp_path


def write_image(path: Path, size: tuple[int, int], rng: np.random.RandomState, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.randint(0, 256, (4, 4, 3)).astype(np.uint8))
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)


@pytest.fixture(scope="session")
def folder_root(tmp_path_factory):
    """Two classes, 10 training and 5 test images each, of different sizes; one is grey."""
    root = tmp_path_factory.mktemp("imagenet")
    rng = np.random.RandomState(0)
    for part, count in (("train", 10), ("val", 5)):
        for name in ("n01", "n02"):
            for number in range(count):
                size, mode = (40 + number, 60 - number), "L" if number == 3 else "RGB"
                write_image(root / part / name / f"{name}_{number}.JPEG", size, rng, mode)
    (root / "train" / "n01" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """Three classes, 4 training and 3 test images each, of 64x64 pixels."""
    root = tmp_path_factory.mktemp("tiny")
    base = root / "tiny-imagenet-200"
    rng = np.random.RandomState(0)
    wnids = ["n30", "n10", "n20"]
    for wnid in wnids:
        for number in range(4):
            write_image(base / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", (64, 64), rng)
    lines = []
    for number in range(9):
        write_image(base / "val" / "images" / f"val_{number}.JPEG", (64, 64), rng)
        lines.append(f"val_{number}.JPEG\t{wnids[number % 3]}\t0\t0\t63\t63\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    (base / "wnids.txt").write_text("\n".join(wnids) + "\n")
    return root
