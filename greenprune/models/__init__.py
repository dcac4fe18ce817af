"""The networks that can be trained, by name, and the blocks that can be gated in any other."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

from greenprune.config import ConfigError, ModelConfig
from greenprune.models.blocks import convert_blocks, knows_blocks, put_back_on_failure, register_block
from greenprune.models.channels import ChannelMap, ChannelSet, Slice, find_channels, register_channelwise
from greenprune.models.cifar_resnet import CifarResNet
from greenprune.models.residual import (
    ChannelSlot,
    PlainBlock,
    ResidualBlock,
    kernels_for,
    residual_blocks,
    sum_over,
    why_left_alone,
)
from greenprune.models.sameness import BlockError, pass_through

__all__ = [
    "BlockError",
    "ChannelMap",
    "ChannelSet",
    "ChannelSlot",
    "CifarResNet",
    "PlainBlock",
    "ResidualBlock",
    "Slice",
    "build_model",
    "check_model_name",
    "convert_blocks",
    "find_channels",
    "kernels_for",
    "model_names",
    "pass_through",
    "put_back_on_failure",
    "register_block",
    "register_channelwise",
    "residual_blocks",
    "sum_over",
    "why_left_alone",
]

SMALL_IMAGE = 64  # pixels; up to this side the "auto" stem of a ResNet keeps the resolution

_CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 38, 44, 56, 110)}
_RESNETS = ("resnet", "resnext", "wide_resnet")  # prefixes of names in torchvision.models
_OTHERS = ("regnet", "mobilenet", "mnasnet", "efficientnet", "convnext", "vit", "swin")
_TIMM = "timm/"


def model_names() -> list[str]:
    """Names of the networks that can be built; timm's come on top, as ``timm/<its name>``."""
    from_torchvision = torchvision.models.list_models(module=torchvision.models)
    return [*_CIFAR_DEPTHS, *(name for name in from_torchvision if name.startswith((*_RESNETS, *_OTHERS)))]


def build_model(config: ModelConfig, *, classes: int, channels: int, image_size: int) -> nn.Module:
    """Build the dense, ungated network, untrained, in blocks that can be gated.

    Args:
        config: Which network, with which shortcut and stem.
        classes: Number of classes.
        channels: Channels of the images.
        image_size: Side of the images in pixels.

    Returns:
        The network, from images [B, channels, image_size, image_size] to logits [B, classes].

    Raises:
        ConfigError: No network has this name, it has no such stem, or cannot be had here.
    """
    name = config.name
    if name.startswith(_TIMM) and importlib.util.find_spec("timm") is None:
        raise ConfigError(f"model.name: {name!r} needs timm, which is not installed; expected greenprune[timm]")
    check_model_name(name)
    if name in _CIFAR_DEPTHS:
        if config.stem == "imagenet":
            raise ConfigError(f"model.stem: 'imagenet' is not valid for {name}; expected auto or small")
        return CifarResNet(_CIFAR_DEPTHS[name], classes, channels, config.shortcut)
    if name.startswith(_TIMM):
        model = _from_timm(name, config, classes, channels, image_size)
    else:
        small = config.stem == "small" or (config.stem == "auto" and image_size <= SMALL_IMAGE)
        model = _from_torchvision(name, config, classes, channels, image_size, small=small)
    try:
        convert_blocks(model, None if knows_blocks(model) else _some_images(model, channels, image_size))
    except BlockError as error:
        raise ConfigError(f"model.name: {name!r} cannot be gated: {error}") from None
    return model


def _some_images(model: nn.Module, channels: int, image_size: int) -> Tensor | None:
    """Images to check blocks with that are found in a network; none if it cannot take them, which is told elsewhere."""
    device = next(model.parameters()).device
    if device.type == "meta":
        return None
    images = torch.randn(2, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    try:
        pass_through(model, images.to(device))
    except Exception:  # noqa: BLE001 - libraries say in many ways that images are too small for a network
        return None
    return images.to(device)


def check_model_name(name: str) -> None:
    """Check that there is a network of this name, without building it; of timm's only where timm is installed.

    Raises:
        ConfigError: There is none.
    """
    if not name.startswith(_TIMM):
        if name not in model_names():
            raise ConfigError(_unknown_name(name))
        return
    if importlib.util.find_spec("timm") is not None:
        timm, short = importlib.import_module("timm"), name.removeprefix(_TIMM)
        if not timm.is_model(short):
            close = difflib.get_close_matches(short, timm.list_models(), n=1)
            hint = f"; did you mean {_TIMM}{close[0]}?" if close else ""
            raise ConfigError(f"model.name: timm has no network {short!r}{hint}")


def _unknown_name(name: str) -> str:
    close = difflib.get_close_matches(name, model_names(), n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    families = ", ".join(f"{prefix}..." for prefix in (*_RESNETS, *_OTHERS))
    return (
        f"model.name: {name!r} is unknown; {hint}valid: {', '.join(_CIFAR_DEPTHS)}, torchvision's networks by their "
        f"names there ({families}), or {_TIMM}NAME for timm's"
    )


def _from_torchvision(
    name: str, config: ModelConfig, classes: int, channels: int, image_size: int, *, small: bool
) -> nn.Module:
    is_resnet = name.startswith(_RESNETS)
    if config.stem == "small" and not is_resnet:
        raise ConfigError(f"model.stem: 'small' is not valid for {name}; expected auto or imagenet")
    options = {"image_size": image_size} if name.startswith("vit") else {}
    model = _build(name, torchvision.models.get_model, name, weights=None, num_classes=classes, **options)
    if is_resnet and (small or channels != 3):
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        model.conv1 = nn.Conv2d(channels, 64, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        if small:
            model.maxpool = nn.Identity()
    elif channels != 3:
        _take_channels(model, channels)
    return model


def _take_channels(model: nn.Module, channels: int) -> None:
    """Exchange the first convolution for one of images with another number of channels."""
    path, first = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    replacement = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement)


def _from_timm(name: str, config: ModelConfig, classes: int, channels: int, image_size: int) -> nn.Module:
    if config.stem == "small":
        raise ConfigError(f"model.stem: 'small' is not valid for {name}; expected auto or imagenet")
    timm, short = importlib.import_module("timm"), name.removeprefix(_TIMM)
    options: dict[str, object] = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    about = timm.get_pretrained_cfg(short)
    if short.startswith("vit") or (about is not None and about.fixed_input_size):
        try:
            return _build(name, timm.create_model, short, **options, img_size=image_size)
        except ConfigError as error:
            if "'img_size'" not in str(error):  # made for one size, and cannot be told another
                raise
    return _build(name, timm.create_model, short, **options)


def _build(name: str, build: Callable[..., nn.Module], *args: object, **options: object) -> nn.Module:
    """Call a builder of another library and tell what it refuses.

    Raises:
        ConfigError: It cannot build a network for these images.
    """
    try:
        return build(*args, **options)
    except (AssertionError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.name: {name!r} cannot be built for these images: {reason}") from None
