"""The CIFAR ResNets of He et al. 2015 (arXiv 1512.03385, section 4.2): depth 6n + 2, widths 16-32-64."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from greenprune.models.residual import ResidualBlock

WIDTHS = (16, 32, 64)


class SubsamplePad(nn.Module):
    """Shortcut of option A: every second pixel, new channels zero; no parameters.

    Args:
        stride: Step between the pixels kept.
        new_channels: Channels to add; half of them before and half after the old ones.
    """

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = new_channels // 2
        self.after = new_channels - new_channels // 2

    def extra_repr(self) -> str:
        """Its arguments, as they were taken apart."""
        return f"stride={self.stride}, before={self.before}, after={self.after}"

    def forward(self, x: Tensor) -> Tensor:
        """From [B, C, H, W] to [B, C + new_channels, H / stride, W / stride]."""
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.pad(x, (0, 0, 0, 0, self.before, self.after))


def _conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)


def _block(channels_in: int, channels_out: int, stride: int, option: Literal["A", "B"]) -> ResidualBlock:
    branch = nn.Sequential(
        _conv3x3(channels_in, channels_out, stride),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
        _conv3x3(channels_out, channels_out),
        nn.BatchNorm2d(channels_out),
    )
    shortcut: nn.Module
    if stride == 1 and channels_in == channels_out:
        shortcut = nn.Identity()
    elif option == "A":
        shortcut = SubsamplePad(stride, channels_out - channels_in)
    else:
        shortcut = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
        )
    return ResidualBlock(branch, shortcut, nn.ReLU(inplace=True), input_activated=True)


class CifarResNet(nn.Module):
    """ResNet for small images: a 3x3 stem, three stages of n basic blocks, average pooling, one linear layer.

    Args:
        depth: 6n + 2 weighted layers (20, 32, 38, 44, 56, 110, ...).
        classes: Number of classes.
        channels: Channels of the images.
        option: Shortcut where the shape changes: A (subsampled, zero-padded) or B (1x1 projection).
    """

    def __init__(self, depth: int, classes: int, channels: int = 3, option: Literal["A", "B"] = "A") -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"depth {depth} is not 6n + 2")
        self.stem = nn.Sequential(_conv3x3(channels, WIDTHS[0]), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True))
        stages = []
        width_in = WIDTHS[0]
        for width in WIDTHS:
            blocks = []
            for index in range((depth - 2) // 6):
                stride = 2 if index == 0 and width != width_in else 1
                blocks.append(_block(width_in, width, stride, option))
                width_in = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(WIDTHS[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, channels, H, W]."""
        features = self.stages(self.stem(images))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits
