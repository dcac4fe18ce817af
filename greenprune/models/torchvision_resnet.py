"""torchvision's ResNets with each block as one :class:`ResidualBlock`, so that it can be gated and removed."""

from __future__ import annotations

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from greenprune.models.residual import ResidualBlock


def _as_residual_block(block: BasicBlock | Bottleneck) -> ResidualBlock:
    layers = [block.conv1, block.bn1, nn.ReLU(inplace=True), block.conv2, block.bn2]
    if isinstance(block, Bottleneck):
        layers += [nn.ReLU(inplace=True), block.conv3, block.bn3]
    shortcut = nn.Identity() if block.downsample is None else block.downsample
    return ResidualBlock(nn.Sequential(*layers), shortcut, nn.ReLU(inplace=True), input_activated=True)


def torchvision_resnet(name: str, classes: int, channels: int = 3, *, small_stem: bool = False) -> nn.Module:
    """A torchvision ResNet, untrained, in blocks that can be gated.

    Args:
        name: Name in ``torchvision.models`` (resnet18, resnet34, resnet50, resnet101, resnet152).
        classes: Number of classes.
        channels: Channels of the images.
        small_stem: A 3x3 convolution with stride 1 and no pooling in place of 7x7, stride 2 and pooling.

    Returns:
        The network, from images [B, channels, H, W] to logits [B, classes].
    """
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes)
    if small_stem or channels != 3:
        kernel, stride, padding = (3, 1, 1) if small_stem else (7, 2, 3)
        model.conv1 = nn.Conv2d(channels, 64, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small_stem:
        model.maxpool = nn.Identity()
    for stage in map(model.get_submodule, ("layer1", "layer2", "layer3", "layer4")):
        for child, block in stage.named_children():
            setattr(stage, child, _as_residual_block(block))
    return model
