"""Image sets small enough to lie whole on the training device, where their batches are made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from greenprune.config import DataConfig, UserError
from greenprune.data.image_data import Batch, ImageData, derive_seed, digest_of, hold_out, per_channel
from greenprune.data.readers import SOURCES, Samples, ensure_files


class InMemoryData(ImageData):
    """A set held as uint8 on the training device; a batch takes a few tensor operations and no host sync."""

    def __init__(self, config: DataConfig, root: Path, seed: int) -> None:
        """Read the set.

        Raises:
            UserError: Files are missing or corrupt, or the config does not suit the set.
        """
        source = SOURCES[config.name]
        ensure_files(config.name, source, root, config.download)
        train = source.read(root, True)
        if config.validation > 0:
            kept, held = hold_out(train.labels, config.validation)
            evaluated = Samples(train.images[held], train.labels[held])
            train = Samples(train.images[kept], train.labels[kept])
        else:
            evaluated = source.read(root, False)
        channels, side = train.images.shape[1:3]
        if config.image_size not in (None, side):
            raise UserError(
                f"data.image_size: {config.image_size!r} is not valid; expected null or {side}, "
                f"the size of the images in {config.name}"
            )
        super().__init__(config, seed, (channels, side), source.classes, len(train.labels), len(evaluated.labels))
        self.digest = digest_of(part for samples in (train, evaluated) for part in _some_bytes(samples))
        self._train_set, self._eval_set = train, evaluated
        if source.mean is None or source.std is None:
            mean, std = _statistics(train.images)
        else:
            mean, std = per_channel(source.mean) * 255, per_channel(source.std) * 255
        self._mean, self._std = mean, std
        self._padding = source.padding if config.augment else 0
        self._flips = source.flips and config.augment

    def _move_(self) -> None:
        self._train_set, self._eval_set = (
            Samples(images.to(self._device, memory_format=self._memory_format), labels.to(self._device))
            for images, labels in (self._train_set, self._eval_set)
        )
        self._mean, self._std = self._mean.to(self._device), self._std.to(self._device)

    def _train(self, epoch: int, positions: Iterator[slice]) -> Iterator[Batch]:
        plan = self._epoch_plan(epoch)
        for position in positions:
            index, top, left, mirrored = plan[:, position]
            images = self._train_set.images[index]
            if self._padding:
                images = _crop(images, top, left, self._padding)
            if self._flips:
                images = torch.where(mirrored.bool().view(-1, 1, 1, 1), images.flip(-1), images)
            yield self._normalised(images, self._mean, self._std), self._train_set.labels[index]

    def _eval(self, samples: Iterator[slice]) -> Iterator[Batch]:
        images, labels = self._eval_set
        for chosen in samples:
            yield self._normalised(images[chosen], self._mean, self._std), labels[chosen]

    def _epoch_plan(self, epoch: int) -> Tensor:
        """Sample, top and left of its crop, and whether it is mirrored, for each position of an epoch.

        Drawn for the whole epoch and moved to the device at once, so that no batch waits for the host.

        Returns:
            int64 [4, train_samples].
        """
        generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch, "augmentation"))
        offsets = torch.randint(2 * self._padding + 1, (2, self.train_samples), generator=generator)
        mirrored = torch.randint(2, (1, self.train_samples), generator=generator)
        plan = torch.cat([self._epoch_order(epoch).unsqueeze(0), offsets, mirrored])
        if self._device.type == "cuda":
            plan = plan.pin_memory()
        return plan.to(self._device, non_blocking=True)


def _some_bytes(samples: Samples) -> tuple[bytes, bytes]:
    """All labels, and the pixels of every 64th image: all of them would take as long as reading them did."""
    return samples.labels.numpy().tobytes(), samples.images[::64].numpy().tobytes()


def _crop(images: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """Pad images with black and cut out a window of their own size from each.

    Args:
        images: uint8 [B, C, S, S].
        top: First row of each window in the padded image, int64 [B].
        left: First column of each window in the padded image, int64 [B].
        padding: Pixels added on each side.
    """
    side = images.shape[-1]
    windows = F.pad(images, [padding] * 4).unfold(2, side, 1).unfold(3, side, 1)  # a view of all possible crops
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images [N, C, H, W], float32 [1, C, 1, 1] each."""
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(1):
        weights = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (weights * values).sum()
        means.append(mean.item())
        deviations.append((weights * (values - mean) ** 2).sum().sqrt().item())
    return per_channel(tuple(means)), per_channel(tuple(deviations))
