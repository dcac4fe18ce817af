"""The one interface to all data sets, and the keyed randomness that makes their batches reproducible."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from greenprune.config import DataConfig, UserError

Batch = tuple[Tensor, Tensor]
"""Images float32 [B, C, H, W], normalised, and labels int64 [B]."""

SPLIT_SEED = 0
"""Seed of every split made here, fixed so that runs with different seeds are measured on the same samples."""


def derive_seed(*key: int | str) -> int:
    """A seed in [0, 2^32) that depends on every part of the key.

    PyTorch's CPU generator looks at the low 32 bits of its seed only, so parts cannot be packed side by side.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def digest_of(parts: Iterable[bytes]) -> str:
    """A short digest that depends on every part, and on where one ends and the next begins."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def split_off(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Split samples in two, class by class, the same way on every machine and for every run.

    Args:
        labels: Class of each sample, int64 [N].
        share: Share of each class that is split off, in [0, 1); rounded, and never the whole class.

    Returns:
        Indices of the samples that stay and of those split off, both ascending.
    """
    classes = labels.numpy()
    # RandomState is the one generator whose stream NumPy has frozen for good (NEP 19).
    order = np.random.RandomState(SPLIT_SEED).permutation(len(classes))
    order = order[np.argsort(classes[order], kind="stable")]  # random within a class, classes one after another
    counts = np.bincount(classes)
    quota = np.minimum(np.rint(share * counts), np.maximum(counts - 1, 0))
    within_class = np.arange(len(order)) - (np.cumsum(counts) - counts)[classes[order]]
    is_off = np.zeros(len(order), dtype=bool)
    is_off[order[within_class < quota[classes[order]]]] = True
    return torch.from_numpy(np.flatnonzero(~is_off)), torch.from_numpy(np.flatnonzero(is_off))


def hold_out(labels: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Indices to train on and to validate on; see :func:`split_off`.

    Raises:
        UserError: The share is so small that no sample is held out.
    """
    kept, held = split_off(labels, share)
    if len(held) == 0:
        raise UserError(
            f"data.validation: {share!r} is not valid; it holds out none of {len(labels)} training samples; "
            "expected 0 or a larger share"
        )
    return kept, held


class ImageData(ABC):
    """Batches of one labelled image set, for training and for evaluation.

    A batch depends on the seed, the epoch and its place in the epoch only: not on the number of processes and
    not on which batches were read before. Rank r of R gets the r-th of R equal slices of each global batch.

    Attributes:
        name: Registered name of the set.
        classes: Number of classes; labels are 0 to ``classes - 1``.
        channels: Channels of an image.
        image_size: Side of the square images in pixels.
        train_samples: Samples in the training set, without those held out for validation.
        eval_samples: Samples that evaluation covers.
        accuracy_kind: What evaluation measures: ``test``, or ``validation`` with ``data.validation`` above 0.
        batch_size: Training samples a step, over all processes.
        steps_per_epoch: Whole batches in the training set; the samples left over sit out this epoch.
        digest: Tells one set from another, wherever it lies: of a folder by the names of its files, else by its labels
            and some of its pixels.
    """

    digest: str
    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        shape: tuple[int, int],
        classes: int,
        train_samples: int,
        eval_samples: int,
    ) -> None:
        """Describe the set; ``shape`` is channels and side of an image.

        Raises:
            UserError: The batch is larger than the training set.
        """
        self.name = config.name
        self.channels, self.image_size = shape
        self.classes = classes
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.accuracy_kind: Literal["test", "validation"] = "validation" if config.validation > 0 else "test"
        self.batch_size = config.batch_size
        self.steps_per_epoch = train_samples // config.batch_size
        self._eval_batch_size = config.eval_batch_size
        self._seed = seed
        self._device = torch.device("cpu")
        self._memory_format = torch.contiguous_format
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.batch_size: {self.batch_size!r} is not valid; expected at most {train_samples}, "
                f"the samples that {self.name} has to train on"
            )

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel that images are normalised with, in the units of the stored pixels."""
        return self._mean.flatten().tolist(), self._std.flatten().tolist()

    def to(self, device: torch.device | str, channels_last: bool = False) -> ImageData:
        """Deliver batches on a device and in a memory format from now on.

        Args:
            device: Where batches are made or moved to; sets held in memory move there once, now.
            channels_last: Lay out images as NHWC instead of NCHW; their shape stays [B, C, H, W].

        Returns:
            This object.
        """
        self._device = torch.device(device)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._move_()
        return self

    def check_world(self, world_size: int, parts: int = 1) -> None:
        """Check that every process gets the same number of samples of each training batch, and at least one.

        Args:
            world_size: Number of processes.
            parts: Parts in which each process does its share, all of one size.

        Raises:
            UserError: The batch cannot be divided that way.
        """
        if self.batch_size % (world_size * parts) != 0:
            divided = f"{world_size} processes" + (f" and optim.accumulate {parts}" if parts > 1 else "")
            raise UserError(
                f"data.batch_size: {self.batch_size!r} is not valid with {divided}; expected a multiple of "
                f"{world_size * parts}, so that every process gets the same number of samples"
            )

    def train_batches(
        self, epoch: int, first: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's slice of the batches of an epoch, in order.

        Args:
            epoch: Epoch, from 0; each has its own order and augmentation.
            first: Batch of the epoch to start with, from 0, as a resumed run does.
            rank: This process.
            world_size: Number of processes.

        Returns:
            Images float32 [batch_size / world_size, C, H, W], normalised, and labels int64.

        Raises:
            UserError: The batch cannot be divided among the processes; while iterating: an image is broken.
        """
        self.check_world(world_size)
        share = self.batch_size // world_size
        first_start = first * self.batch_size + rank * share
        starts = range(first_start, self.steps_per_epoch * self.batch_size, self.batch_size)
        return self._train(epoch, (slice(start, start + share) for start in starts))

    def eval_batches(self, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of the evaluation set; over all ranks every sample comes exactly once.

        Batches are nearly equal in size. All ranks get the same number, so that collectives in a forward pass
        match, unless there are fewer samples than processes or ``eval_batch_size`` is 1.

        Args:
            rank: This process.
            world_size: Number of processes.

        Returns:
            Images float32 [at most eval_batch_size, C, H, W], normalised, and labels int64.

        Raises:
            UserError: While iterating: an image is broken.
        """
        begin, end = (self.eval_samples * r // world_size for r in (rank, rank + 1))
        largest_share = -(-self.eval_samples // world_size)
        steps = -(-largest_share // self._eval_batch_size)
        bounds = [begin + (end - begin) * step // steps for step in range(steps + 1)]
        return self._eval(slice(low, high) for low, high in itertools.pairwise(bounds) if low < high)

    def _epoch_order(self, epoch: int) -> Tensor:
        """The training samples in the order of an epoch, int64 [train_samples]."""
        generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch, "order"))
        return torch.randperm(self.train_samples, generator=generator)

    def _normalised(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Float images in the asked-for memory format, with mean 0 and deviation 1 over the training set."""
        return images.to(torch.float32, memory_format=self._memory_format).sub_(mean).div_(std)

    @abstractmethod
    def _move_(self) -> None:
        """Move what is held in memory to ``self._device``."""

    @abstractmethod
    def _train(self, epoch: int, positions: Iterator[slice]) -> Iterator[Batch]:
        """One augmented batch for each slice of positions in the epoch's order."""

    @abstractmethod
    def _eval(self, samples: Iterator[slice]) -> Iterator[Batch]:
        """One batch for each slice of the evaluation set."""


def per_channel(values: tuple[float, ...]) -> Tensor:
    """One value a channel, shaped to broadcast over images: float32 [1, C, 1, 1]."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
