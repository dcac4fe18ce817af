"""Small image sets read whole from their published files, which are checked for truncation and corruption."""

from __future__ import annotations

import functools
import importlib.util
import math
import struct
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

from greenprune.config import UserError
from greenprune.data.image_data import split_off

DIGITS_TEST_SHARE = 0.2


class Samples(NamedTuple):
    """Images uint8 [N, C, H, W] and their labels int64 [N]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Source:
    """Where a small set comes from and how it is augmented."""

    classes: int
    read: Callable[[Path, bool], Samples]
    """Reads the training set (True) or the test set (False) below a root."""
    padding: int
    """Black pixels around an image from which a random crop of the image's size is taken."""
    flips: bool
    """Whether a mirrored image is still of its class."""
    files: tuple[str, ...] = ()
    """Files that must lie below the root; none for an embedded set."""
    fetch: Callable[[Path], object] | None = None
    """Downloads the set from its publisher."""
    mean: tuple[float, ...] | None = None
    """Published mean of each channel in [0, 1]; None: computed from the training set."""
    std: tuple[float, ...] | None = None
    """Published standard deviation of each channel in [0, 1]."""


def read_digits(root: Path, train: bool) -> Samples:
    """Read scikit-learn's 1797 grey 8x8 digits with values 0 to 16; nothing is read below ``root``.

    The set has no split of its own. The test set is a fixed stratified fifth (our choice), the same for all
    seeds.

    Raises:
        UserError: scikit-learn is not installed, or without its data.
    """
    rows = _digits_table()
    labels = torch.from_numpy(rows[:, -1].astype(np.int64))
    chosen = split_off(labels, DIGITS_TEST_SHARE)[0 if train else 1]
    images = torch.from_numpy(rows[:, :-1].reshape(-1, 1, 8, 8))
    return Samples(images[chosen], labels[chosen])


@functools.lru_cache(maxsize=1)  # the training set and the test set come from the same file
def _digits_table() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """scikit-learn's own file: 64 pixels and the label of each digit, uint8 [1797, 65].

    Its ``load_digits`` reads the same file, but importing it brings SciPy's statistics: a second of a start of six.
    """
    package = importlib.util.find_spec("sklearn")
    folders = [] if package is None else package.submodule_search_locations or []
    file = next((path for folder in folders if (path := Path(folder) / "datasets/data/digits.csv.gz").is_file()), None)
    if file is None:
        raise UserError("data.name: 'digits' is not valid here; it comes with scikit-learn, which is not installed")
    return np.loadtxt(file, delimiter=",", dtype=np.uint8)


def read_fashion_mnist(root: Path, train: bool) -> Samples:
    """Read Fashion-MNIST (Xiao et al. 2017): grey 28x28 images in IDX files.

    Raises:
        UserError: A file is truncated or corrupt.
    """
    raw = root / "FashionMNIST" / "raw"
    part = "train" if train else "t10k"
    images_file, labels_file = raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"
    counts = [_check_idx(images_file, (28, 28)), _check_idx(labels_file, ())]
    if counts[0] != counts[1]:
        raise _corrupt(labels_file, f"{counts[1]} labels for {counts[0]} images")
    images, labels = read_image_file(str(images_file)), read_label_file(str(labels_file))
    if labels.max() > 9:
        raise _corrupt(labels_file, f"{len(labels)} labels up to {labels.max()} for {len(images)} images of 10 classes")
    return Samples(images.unsqueeze(1), labels)


def _check_idx(path: Path, item: tuple[int, ...]) -> int:
    """Compare a file of bytes in IDX format with its own header, which torchvision's reader does not.

    Only the header is read, so that a file of any size costs nothing before it is known to be right.

    Returns:
        The number of items, which have the shape ``item``.
    """
    dimensions = len(item) + 1
    with path.open("rb") as file:
        header = file.read(4 * (dimensions + 1))
    if len(header) < 4 * (dimensions + 1) or list(header[:4]) != [0, 0, 8, dimensions]:
        raise _corrupt(path, "its header is not that of an IDX file of bytes")
    count, *shape = struct.unpack(f">{dimensions}I", header[4:])
    if tuple(shape) != item or count == 0:
        raise _corrupt(path, f"{count} items of shape {tuple(shape)} instead of {item}")
    expected, found = len(header) + math.prod((count, *item)), path.stat().st_size
    if found != expected:
        raise _corrupt(path, f"{found} bytes instead of {expected}")
    return int(count)


def _read_cifar(reader: Any, root: Path, train: bool) -> Samples:
    try:
        with warnings.catch_warnings():
            # The published pickles hold an old form of dtype, which NumPy 2.4 warns about.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed", category=Warning)
            data = reader(root, train=train, download=False)
    except RuntimeError:  # all that torchvision says is that some checksum is wrong
        files = [*reader.train_list, *reader.test_list, [reader.meta["filename"], reader.meta["md5"]]]
        for file, md5 in files:
            path = root / reader.base_folder / file
            if not check_integrity(path, md5):
                raise _corrupt(path, "its MD5 is not the published one") from None
        raise
    images = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return Samples(images, torch.tensor(data.targets, dtype=torch.int64))


def read_cifar10(root: Path, train: bool) -> Samples:
    """Read CIFAR-10 (Krizhevsky 2009): 32x32 RGB images, checked against the published MD5 sums.

    Raises:
        UserError: A file is truncated or corrupt.
    """
    return _read_cifar(CIFAR10, root, train)


def read_cifar100(root: Path, train: bool) -> Samples:
    """Read CIFAR-100 (Krizhevsky 2009) with its 100 fine labels; see :func:`read_cifar10`.

    Raises:
        UserError: A file is truncated or corrupt.
    """
    return _read_cifar(CIFAR100, root, train)


def _corrupt(path: Path, finding: str) -> UserError:
    return UserError(
        f"data.root: {str(path)!r} is truncated or corrupt ({finding}); expected the published file: "
        "delete it and put it there again, for example with data.download=true"
    )


SOURCES = {
    "digits": Source(10, read_digits, padding=1, flips=False),
    "fashion_mnist": Source(
        10,
        read_fashion_mnist,
        padding=4,
        flips=False,
        files=tuple(
            f"FashionMNIST/raw/{part}-{kind}-ubyte"
            for part in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ),
        fetch=lambda root: FashionMNIST(root, download=True),
    ),
    "cifar10": Source(
        10,
        read_cifar10,
        padding=4,
        flips=True,
        files=tuple(
            f"cifar-10-batches-py/{file}"
            for file in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta")
        ),
        fetch=lambda root: CIFAR10(root, download=True),
        # https://github.com/KellerJordan/cifar10-airbench; they agree with the training images to all digits.
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Source(
        100,
        read_cifar100,
        padding=4,
        flips=True,
        files=tuple(f"cifar-100-python/{file}" for file in ("train", "test", "meta")),
        fetch=lambda root: CIFAR100(root, download=True),
        # https://github.com/weiaicunzai/pytorch-cifar100, conf/global_settings.py, rounded.
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
}


def ensure_files(name: str, source: Source, root: Path, download: bool) -> None:
    """Check that a set's files lie below the root, and fetch them if that was asked for.

    Raises:
        UserError: A file is missing, or the download failed.
    """
    missing = [file for file in source.files if not (root / file).is_file()]
    if missing and download and source.fetch is not None:
        try:
            source.fetch(root)
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            raise UserError(
                f"data.download: True is not valid here; {name} cannot be fetched into {str(root)!r} "
                f"({' '.join(str(error).split())}); expected access to its publisher and to this folder, or "
                f"{', '.join(source.files)} in it"
            ) from error
    elif missing:
        raise UserError(
            f"data.root: {str(root)!r} is not valid; there is no {str(root / missing[0])!r}; expected "
            f"a folder with {', '.join(source.files)} (data.download=true fetches {name})"
        )
