"""The networks that can be trained, by name."""

from __future__ import annotations

import difflib
from functools import partial
from typing import Protocol

from torch import nn

from greenprune.config import ConfigError, ModelConfig
from greenprune.models.cifar_resnet import CifarResNet
from greenprune.models.residual import ResidualBlock, residual_blocks
from greenprune.models.torchvision_resnet import torchvision_resnet

__all__ = ["MODELS", "CifarResNet", "ResidualBlock", "build_model", "residual_blocks"]

SMALL_IMAGE = 64  # pixels; up to this side the "auto" stem keeps the resolution


class ModelBuilder(Protocol):
    """Builds a network for images of one shape."""

    def __call__(self, config: ModelConfig, *, classes: int, channels: int, image_size: int) -> nn.Module:
        """The untrained network, from images [B, channels, image_size, image_size] to logits [B, classes]."""


def _cifar(depth: int, config: ModelConfig, *, classes: int, channels: int, image_size: int) -> nn.Module:
    if config.stem == "imagenet":
        raise ConfigError(f"model.stem: 'imagenet' is not valid for {config.name}; expected auto or small")
    return CifarResNet(depth, classes, channels, config.shortcut)


def _torchvision(name: str, config: ModelConfig, *, classes: int, channels: int, image_size: int) -> nn.Module:
    small = config.stem == "small" or (config.stem == "auto" and image_size <= SMALL_IMAGE)
    return torchvision_resnet(name, classes, channels, small_stem=small)


MODELS: dict[str, ModelBuilder] = {
    **{f"resnet{depth}": partial(_cifar, depth) for depth in (20, 32, 38, 44, 56, 110)},
    **{name: partial(_torchvision, name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
}


def build_model(config: ModelConfig, *, classes: int, channels: int, image_size: int) -> nn.Module:
    """Build the dense, ungated network.

    Args:
        config: Which network, with which shortcut and stem.
        classes: Number of classes.
        channels: Channels of the images.
        image_size: Side of the images in pixels.

    Raises:
        ConfigError: No network has this name, or it has no such stem.
    """
    if config.name not in MODELS:
        close = difflib.get_close_matches(config.name, MODELS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"model.name: {config.name!r} is unknown; {hint}valid: {', '.join(MODELS)}")
    return MODELS[config.name](config, classes=classes, channels=channels, image_size=image_size)
