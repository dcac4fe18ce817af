"""Image sets too large for memory: folders of image files, decoded and augmented by loader processes."""

from __future__ import annotations

import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from greenprune.config import DataConfig, UserError
from greenprune.data.image_data import Batch, ImageData, derive_seed, digest_of, hold_out, per_channel
from greenprune.interrupt import outlive_signals

# Mean and deviation of ImageNet's channels in [0, 1], as in torchvision's reference training.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_MOST_TEXT_BYTES = 1 << 26
_MOST_PIXELS = 1 << 26  # of an image to train on; three bytes each are taken before anything is decoded

Files = list[tuple[Path, int]]
"""Image files with their labels."""


class Tree(NamedTuple):
    """The files of an image set."""

    classes: int
    train: Files
    evaluated: Files


def scan_image_folder(root: Path) -> Tree:
    """List ``root/{train,val}/<class>/*`` (ImageNet's layout); classes are numbered in order of their names.

    Raises:
        UserError: A folder is missing or empty, or ``val`` has a class that ``train`` has not.
    """
    layout = "expected train/<class>/* and val/<class>/*"
    names = {part: _folders(root / part, layout) for part in ("train", "val")}
    label_of = {name: label for label, name in enumerate(names["train"])}
    unknown = [name for name in names["val"] if name not in label_of]
    if unknown:
        raise UserError(f"data.root: {str(root / 'val' / unknown[0])!r} is not a class of {str(root / 'train')!r}")
    train, evaluated = (
        [(path, label_of[name]) for name in names[part] for path in _images(root / part / name, layout)]
        for part in ("train", "val")
    )
    return Tree(len(label_of), train, evaluated)


def scan_tiny_imagenet(root: Path) -> Tree:
    """List ``root/tiny-imagenet-200``; its labelled validation set serves as the test set.

    Raises:
        UserError: A file or folder is missing, or an annotation cannot be read.
    """
    base = root / "tiny-imagenet-200"
    layout = (
        "expected tiny-imagenet-200/ with wnids.txt, train/<wnid>/images/*.JPEG, val/val_annotations.txt and "
        "val/images/*.JPEG; tiny_imagenet cannot be downloaded with data.download"
    )
    wnids = _text(base / "wnids.txt", layout).split()
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    strange = next((f"{wnid!r} is no name of a class" for wnid in wnids if re.fullmatch(r"\w+", wnid) is None), None)
    if len(label_of) < len(wnids):
        strange = strange or "it names a class twice"
    if strange or not wnids:
        told = strange or "it names no class"
        raise UserError(f"data.root: {str(base / 'wnids.txt')!r} is truncated or corrupt ({told}); {layout}")
    train = [
        (path, label) for wnid, label in label_of.items() for path in _images(base / "train" / wnid / "images", layout)
    ]
    annotations = base / "val" / "val_annotations.txt"
    present = {path.name: path for path in _images(base / "val" / "images", layout)}
    evaluated = []
    for number, line in enumerate(_text(annotations, layout).splitlines(), start=1):
        file, wnid = [*line.split("\t"), "", ""][:2]
        if wnid not in label_of:
            raise UserError(
                f"data.root: line {number} of {str(annotations)!r} is truncated or corrupt; expected a file "
                "name and a class of wnids.txt, separated by a tab"
            )
        if file not in present:
            raise _missing(base / "val" / "images" / file, layout)
        evaluated.append((present[file], label_of[wnid]))
    named = {path.name for path, _ in evaluated}
    if len(named) < max(len(present), len(evaluated)):  # cut off between two lines, it would be a smaller test set
        told = f"{len(evaluated)} lines name {len(named)} of {len(present)} images"
        raise UserError(f"data.root: {str(annotations)!r} is truncated or corrupt ({told}); {layout}")
    return Tree(len(label_of), train, evaluated)


def _digest(root: Path, tree: Tree) -> str:
    """Of the files' names below the root, and of their labels."""
    below = len(os.fsencode(root / "x")) - 1
    names = (b"\n".join(os.fsencode(path)[below:] for path, _ in files) for files in (tree.train, tree.evaluated))
    labels = (np.array([label for _, label in files]).tobytes() for files in (tree.train, tree.evaluated))
    return digest_of([*names, *labels])


def _missing(path: Path, layout: str) -> UserError:
    return UserError(f"data.root: there is no {str(path)!r}; {layout}")


def _text(path: Path, layout: str) -> str:
    if not path.is_file():
        raise _missing(path, layout)
    if path.stat().st_size > _MOST_TEXT_BYTES:
        raise UserError(f"data.root: {str(path)!r} is too large for such a list; {layout}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.root: {str(path)!r} is truncated or corrupt ({error}); {layout}") from None


def _entries(folder: Path, layout: str) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        raise _missing(folder, layout)
    with os.scandir(folder) as entries:
        # What is hidden a program has put there: .ipynb_checkpoints, or macOS's ._it.jpg, which is no image.
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _folders(folder: Path, layout: str) -> list[str]:
    names = [entry.name for entry in _entries(folder, layout) if entry.is_dir()]
    if not names:
        raise UserError(f"data.root: {str(folder)!r} holds no class folders; {layout}")
    return names


def _images(folder: Path, layout: str) -> list[Path]:
    suffixes = tuple(IMG_EXTENSIONS)
    names = [entry.name for entry in _entries(folder, layout) if entry.name.lower().endswith(suffixes)]
    if not names:
        raise UserError(f"data.root: {str(folder)!r} holds no images ({', '.join(suffixes)}); {layout}")
    return [folder / name for name in names]


Transform = Callable[[Image.Image], Tensor]


def tiny_imagenet_transforms(size: int) -> tuple[Transform, Transform]:
    """Flip, and random crop after padding with size / 8 black pixels (our choice); none in evaluation."""
    fit = v2.Resize((size, size))  # leaves images that have the size as they are
    train = v2.Compose([fit, v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return train, v2.Compose([fit, v2.PILToTensor()])


class _ShortSide:
    """Resizes an image so that its short side has so many pixels.

    Raises:
        ValueError: The image is so long and narrow that its long side would then fill the memory.
    """

    def __init__(self, pixels: int) -> None:
        self._pixels = pixels
        self._resize = v2.Resize(pixels)

    def __call__(self, image: Image.Image) -> Image.Image:
        if self._pixels**2 * max(image.size) > _MOST_PIXELS * min(image.size):
            shape = " x ".join(map(str, image.size))
            raise ValueError(f"of {shape} pixels, resized to {self._pixels} on its short side it has too many")
        resized: Image.Image = self._resize(image)
        return resized


def imagenet_transforms(size: int) -> tuple[Transform, Transform]:
    """The usual recipe: random resized crop and flip; in evaluation the centre when resized by 256 / 224."""
    train = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return train, v2.Compose([_ShortSide(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])


class Layout(NamedTuple):
    """A way to keep an image set in folders."""

    scan: Callable[[Path], Tree]
    transforms: Callable[[int], tuple[Transform, Transform]]
    """Training and evaluation transform for a side in pixels."""
    image_size: int
    """Side of the images unless ``data.image_size`` says otherwise."""


LAYOUTS = {
    "tiny_imagenet": Layout(scan_tiny_imagenet, tiny_imagenet_transforms, 64),
    "image_folder": Layout(scan_image_folder, imagenet_transforms, 224),
}


class _Ticket(NamedTuple):
    """One image to load: its row in the table of files, and the seed of its augmentation (None: none)."""

    row: int
    seed: int | None


# What Pillow raises for a file it cannot decode, by format and by place.
BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Those of IMG_EXTENSIONS. Pillow goes by content, not by name: it would hand PostScript to an interpreter.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")

Loaded = tuple[Tensor, int] | str
"""Image uint8 [C, H, W] and its label, or what is wrong with the file.

Errors travel as text, because a DataLoader buries what a worker raises in a traceback of many lines.
"""


class _Decoder(Dataset[Loaded]):
    """Loads single images; a copy lives in each loader process."""

    def __init__(self, files: Files, train: Transform, plain: Transform) -> None:
        # One array: strings would be copied into each worker, page by page, as their reference counts change.
        self._paths = np.array([os.fsencode(path) for path, _ in files])
        self._labels = np.array([label for _, label in files], dtype=np.int64)
        self._train, self._plain = train, plain

    def __getitem__(self, ticket: _Ticket) -> Loaded:
        path = os.fsdecode(self._paths[ticket.row])
        label = int(self._labels[ticket.row])
        try:
            image = _decoded(path)
            if ticket.seed is None:
                return self._plain(image), label
        except BROKEN_IMAGE as error:
            return f"data.root: {path!r} is truncated, corrupt or missing ({error}); expected an image"
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(ticket.seed)
            return self._train(image), label


def _decoded(path: str) -> Image.Image:
    """An image in RGB; one that says that it is huge is refused before memory is taken for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is odd about a file that can be decoded all the same
        with Image.open(path, formats=_FORMATS) as file:
            width, height = file.size
            if width * height > _MOST_PIXELS:
                raise ValueError(f"it is said to have {width} x {height} pixels, more than {_MOST_PIXELS:,}")
            # Of deep PGM files Pillow makes numbers of 32 bits, of which 65535 is white.
            is_deep = file.mode.startswith("I;16") or (file.mode, file.format) == ("I", "PPM")
            if file.mode in ("I", "F") and not is_deep:
                raise ValueError(f"its pixels are of mode {file.mode!r}, numbers that do not say which one is white")
            return (_eight_bits(file) if is_deep else file).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits in 8, rounded; Pillow would cut all above 255 off to white."""
    grey = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))


def _collate(samples: list[Loaded]) -> Batch | str:
    """Stack samples to images uint8 [B, C, H, W] and labels int64 [B], or hand on the first error."""
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, str):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return torch.stack(images), torch.tensor(labels, dtype=torch.int64)


class _Feed:
    """The batches a loader reads next; a loader keeps its sampler for life, while each stream has its own."""

    def __init__(self) -> None:
        self.batches: Iterable[list[_Ticket]] = ()

    def __iter__(self) -> Iterator[list[_Ticket]]:
        return iter(self.batches)


def _tickets(rows: Tensor, batches: Iterator[slice], key: tuple[int, int] | None) -> Iterator[list[_Ticket]]:
    """Tickets of each batch of positions in ``rows``, augmented if there is a key (seed, epoch).

    A function of its own because loaders hold on to it: with a reference back to the set there would be a
    cycle, and a loader freed by the cycle collector waits 5 s for processes whose queues have gone already.
    """
    for batch in batches:
        positions = range(batch.start, batch.stop)
        seeds = [None if key is None else derive_seed(*key, position) for position in positions]
        yield [_Ticket(row, seed) for row, seed in zip(rows[batch].tolist(), seeds, strict=True)]


def _outlive_signals(worker: int) -> None:
    """Leave it to the training process to end its loader processes.

    Who stops a job (Slurm, a terminal) sends the signal to all of its processes. A loader that dies of it raises an
    error in the training process, in the middle of the step that it wants to finish.
    """
    outlive_signals()


@contextmanager
def _without_advice() -> Iterator[None]:
    """More processes than cores are the user's choice: they help where reading, not decoding, is slow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


class FolderData(ImageData):
    """A set of image files; loader processes decode and augment, the device normalises."""

    def __init__(self, config: DataConfig, root: Path, seed: int) -> None:
        """List the files; no image is opened yet.

        Raises:
            UserError: Files are missing, or the config does not suit the set.
        """
        layout = LAYOUTS[config.name]
        tree, size = layout.scan(root), config.image_size or layout.image_size
        files = tree.train + tree.evaluated
        self._train_rows = torch.arange(len(tree.train))
        self._eval_rows = torch.arange(len(tree.train), len(files))
        if config.validation > 0:
            self._train_rows, self._eval_rows = hold_out(
                torch.tensor([label for _, label in tree.train]), config.validation
            )
        super().__init__(config, seed, (3, size), tree.classes, len(self._train_rows), len(self._eval_rows))
        self.digest = _digest(root, tree)
        self._decoder = _Decoder(files, *layout.transforms(size))
        self._augment = config.augment
        self._workers = config.workers
        # At most one: its processes wait for the next epoch.
        self._idle: list[tuple[_Feed, DataLoader[Any]]] = []
        self._mean, self._std = per_channel(IMAGENET_MEAN) * 255, per_channel(IMAGENET_STD) * 255

    def _move_(self) -> None:
        self._mean, self._std = self._mean.to(self._device), self._std.to(self._device)
        self._idle.clear()  # whether a loader pins memory depends on the device

    def _train(self, epoch: int, positions: Iterator[slice]) -> Iterator[Batch]:
        key = (self._seed, epoch) if self._augment else None
        return self._load(_tickets(self._train_rows[self._epoch_order(epoch)], positions, key))

    def _eval(self, samples: Iterator[slice]) -> Iterator[Batch]:
        return self._load(_tickets(self._eval_rows, samples, None))

    def _load(self, batches: Iterable[list[_Ticket]]) -> Iterator[Batch]:
        # Streams share one set of processes, which outlives an epoch; one opened beside another gets its own.
        feed, loader = self._idle.pop() if self._idle else self._new_loader()
        feed.batches = batches
        try:
            with _without_advice():  # the loader checks its number of processes once more
                read = iter(loader)
            for batch in read:
                if isinstance(batch, str):
                    raise UserError(batch)
                images, labels = (part.to(self._device, non_blocking=True) for part in batch)
                yield self._normalised(images, self._mean, self._std), labels
        finally:
            if not self._idle:
                self._idle.append((feed, loader))

    def _new_loader(self) -> tuple[_Feed, DataLoader[Any]]:
        feed = _Feed()
        with _without_advice():
            loader: DataLoader[Any] = DataLoader(
                self._decoder,
                batch_sampler=feed,
                num_workers=self._workers,
                collate_fn=_collate,
                pin_memory=self._device.type == "cuda",
                persistent_workers=self._workers > 0,
                worker_init_fn=_outlive_signals,
                # Without one a loader draws from the global generator and changes what the run draws next.
                generator=torch.Generator(),
            )
        return feed, loader
