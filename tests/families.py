"""The smallest useful network of each family, and what the tests of several rooms do with them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import convnext, efficientnet, mobilenetv2, mobilenetv3, regnet, resnet, vision_transformer
from torchvision.models import swin_transformer as swin

from greenprune.config import GateConfig
from greenprune.gating import attach_gates, find_gates
from greenprune.models import CifarResNet, ResidualBlock, convert_blocks, find_channels, residual_blocks
from greenprune.surgery import Operation, Surgeon

BATCH = 6
CLASSES = 5

TRANSFORMERS = "5.24"  # layers of older releases may be made otherwise

Setting = mobilenetv3.InvertedResidualConfig


@dataclass(frozen=True)
class Family:
    """One network of a family.

    Attributes:
        build: Builds it, dense and as its library gives it.
        size: Side of its images.
    """

    build: Callable[[], nn.Module]
    size: int = 32

    def images(self, seed: int = 1) -> Tensor:
        """Images [BATCH, 3, size, size]."""
        return torch.randn(BATCH, 3, self.size, self.size, generator=torch.Generator().manual_seed(seed))


def _mobilenet_v3(settings: list[tuple[Any, ...]]) -> nn.Module:
    rows = [Setting(*row, dilation=1, width_mult=1.0) for row in settings]
    return mobilenetv3.MobileNetV3(rows, last_channel=32, num_classes=CLASSES, dropout=0.0)


def _mobilenet_v3_small() -> nn.Module:
    """Its first blocks, narrower: without expansion, without and with squeeze-and-excitation, with both activations."""
    return _mobilenet_v3(
        [
            (16, 3, 16, 16, True, "RE", 2),
            (16, 3, 24, 16, False, "RE", 1),
            (16, 5, 32, 24, True, "HS", 2),
            (24, 5, 40, 24, True, "HS", 1),
            (24, 5, 40, 24, True, "HS", 1),
        ]
    )


def _mobilenet_v3_large() -> nn.Module:
    return _mobilenet_v3(
        [
            (16, 3, 16, 16, False, "RE", 1),
            (16, 3, 32, 24, False, "RE", 2),
            (24, 5, 40, 24, True, "RE", 1),
            (24, 3, 48, 32, False, "HS", 2),
            (32, 3, 48, 32, True, "HS", 1),
        ]
    )


def _efficientnet(settings: list[Any]) -> nn.Module:
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    model = efficientnet.EfficientNet(
        settings, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, norm_layer=norm, last_channel=32
    )
    return model


def _efficientnet_b0() -> nn.Module:
    config = efficientnet.MBConvConfig
    return _efficientnet([config(1, 3, 1, 16, 8, 2), config(4, 3, 2, 8, 16, 2), config(4, 5, 2, 16, 24, 2)])


def _efficientnet_v2_s() -> nn.Module:
    fused, config = efficientnet.FusedMBConvConfig, efficientnet.MBConvConfig
    return _efficientnet([fused(1, 3, 1, 16, 16, 2), fused(4, 3, 2, 16, 24, 2), config(4, 3, 2, 24, 32, 2)])


def _regnet(se_ratio: float | None) -> nn.Module:
    parameters = regnet.BlockParams(
        depths=[2, 2],
        widths=[16, 32],
        group_widths=[8, 8],
        bottleneck_multipliers=[1.0, 1.0],
        strides=[2, 2],
        se_ratio=se_ratio,
    )
    return regnet.RegNet(parameters, num_classes=CLASSES, stem_width=16)


def _swin(block: type[nn.Module], merging: type[nn.Module]) -> nn.Module:
    return swin.SwinTransformer(
        patch_size=[2, 2],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[4, 4],
        mlp_ratio=2.0,
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
        block=block,
        downsample_layer=merging,
    )


def _timm(name: str, **options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)


class Logits(nn.Module):
    """A network of transformers that gives its logits alone."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).logits
        return logits


def transformers_network(name: str, **options: Any) -> Any:
    """An image classifier of transformers by the beginning of its class's name, with these settings."""
    transformers = pytest.importorskip("transformers", minversion=TRANSFORMERS)
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    return getattr(transformers, f"{name}ForImageClassification")(config)


TRANSFORMERS_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
}


class _Narrow(resnet.ResNet):
    """Torchvision's ResNet with a quarter of its width."""

    def __init__(self, block: Any, **options: Any) -> None:
        super().__init__(block, [2, 1, 1, 1], **options)
        self.fc = nn.Linear(self.inplanes, CLASSES)

    def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *args, **options)


NARROW = (8, 16, 24, 32)

FAMILIES: dict[str, Family] = {
    "cifar-a": Family(lambda: CifarResNet(14, CLASSES, option="A"), 16),
    "cifar-b": Family(lambda: CifarResNet(14, CLASSES, option="B"), 16),
    "resnet-basic": Family(lambda: _Narrow(resnet.BasicBlock), 64),
    "resnet-bottleneck": Family(lambda: _Narrow(resnet.Bottleneck), 64),
    "resnext": Family(lambda: _Narrow(resnet.Bottleneck, groups=8, width_per_group=8), 64),
    "wide-resnet": Family(lambda: _Narrow(resnet.Bottleneck, width_per_group=128), 64),
    "regnet-x": Family(lambda: _regnet(None)),
    "regnet-y": Family(lambda: _regnet(0.25)),
    "mobilenet-v2": Family(
        lambda: mobilenetv2.MobileNetV2(
            CLASSES,
            width_mult=0.25,
            dropout=0.0,
            inverted_residual_setting=[[1, 16, 1, 1], [4, 32, 2, 2], [4, 64, 2, 2]],
        )
    ),
    "mobilenet-v3-small": Family(_mobilenet_v3_small),
    "mobilenet-v3-large": Family(_mobilenet_v3_large),
    "efficientnet-b0": Family(_efficientnet_b0),
    "efficientnet-v2-s": Family(_efficientnet_v2_s),
    "convnext": Family(
        lambda: convnext.ConvNeXt(
            [convnext.CNBlockConfig(8, 16, 2), convnext.CNBlockConfig(16, None, 2)], num_classes=CLASSES
        )
    ),
    "vit": Family(
        lambda: vision_transformer.VisionTransformer(
            image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=CLASSES
        ),
        16,
    ),
    "swin": Family(lambda: _swin(swin.SwinTransformerBlock, swin.PatchMerging), 24),
    "swin-v2": Family(lambda: _swin(swin.SwinTransformerBlockV2, swin.PatchMergingV2), 24),
    "timm-resnet": Family(lambda: _timm("resnet26", layers=(2, 1, 1, 1), channels=NARROW), 64),
    "timm-resnet-basic": Family(lambda: _timm("resnet18", layers=(2, 1, 1, 1), channels=NARROW), 64),
    "timm-resnet-se": Family(lambda: _timm("seresnet50", layers=(2, 1, 1, 1), channels=NARROW), 64),
    "timm-resnext": Family(
        lambda: _timm("resnext50_32x4d", layers=(2, 1, 1, 1), channels=NARROW, cardinality=4, base_width=32), 64
    ),
    "timm-convnext": Family(lambda: _timm("convnext_atto", depths=(1, 1, 2, 1), dims=NARROW), 64),
    "timm-convnext-linear": Family(
        lambda: _timm("convnext_tiny", depths=(1, 1, 2, 1), dims=NARROW, drop_path_rate=0.0), 64
    ),
    "timm-mobilenet-v3": Family(lambda: _timm("mobilenetv3_small_050", drop_rate=0.0), 64),
    "timm-byobnet": Family(lambda: _timm("test_byobnet"), 64),
    "timm-vit": Family(
        lambda: _timm("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3), 16
    ),
    "transformers-resnet": Family(
        lambda: Logits(transformers_network("ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1])), 64
    ),
    "transformers-resnet-basic": Family(
        lambda: Logits(
            transformers_network("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic")
        ),
        64,
    ),
    "transformers-convnext": Family(
        lambda: Logits(transformers_network("ConvNext", hidden_sizes=NARROW[:2], depths=[1, 2], num_stages=2)), 32
    ),
    "transformers-vit": Family(
        lambda: Logits(transformers_network("ViT", intermediate_size=48, **TRANSFORMERS_VIT)), 16
    ),
    "transformers-dinov2": Family(
        lambda: Logits(transformers_network("Dinov2", mlp_ratio=2, use_mask_token=False, **TRANSFORMERS_VIT)), 16
    ),
}


FOLLOWED = ("timm-mobilenet-v3", "timm-byobnet")
"""Those of blocks that nobody registered, in networks that have no plain form."""


def sharing(act: nn.Module, order: str) -> nn.Module:
    """A network with one activation at all places of its branches, as in blocks with one ``self.relu``.

    Args:
        act: The activation.
        order: Of a branch: ``basic``, ``bottleneck`` or ``pre-activation``.
    """

    def branch() -> nn.Module:
        if order == "basic":
            return nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), act, nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8))
        if order == "bottleneck":
            first, last = (nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)), (nn.Conv2d(10, 8, 1), nn.BatchNorm2d(8))
            return nn.Sequential(*first, act, nn.Conv2d(6, 10, 3, 1, 1), nn.BatchNorm2d(10), act, *last)
        return nn.Sequential(
            nn.BatchNorm2d(8), act, nn.Conv2d(8, 6, 3, 1, 1), nn.BatchNorm2d(6), act, nn.Conv2d(6, 8, 1)
        )

    blocks = [ResidualBlock(branch(), nn.Identity(), nn.Identity(), input_activated=True) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    wake(model, torch.randn(BATCH, 3, 8, 8))
    return model


ONE_ACTIVATION = pytest.mark.parametrize(
    "act",
    [lambda: nn.ReLU(inplace=True), nn.ReLU, nn.Sigmoid, lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Tanh())],
    ids=["ReLU in place", "ReLU", "Sigmoid", "chain"],
)
EVERY_ORDER = pytest.mark.parametrize("order", ["basic", "bottleneck", "pre-activation"])


def build(name: str) -> nn.Module:
    """A family's network, dense, converted, with nothing at a value at which it would not matter."""
    model = FAMILIES[name].build()
    wake(model, FAMILIES[name].images(2))
    convert_blocks(model, FAMILIES[name].images())
    return model


def gated(name: str, kind: str) -> nn.Module:
    """The same with gates on its blocks and channels."""
    model = build(name)
    attach_gates(model, GateConfig(units=["block", "channel"], kind=kind))  # type: ignore[arg-type]
    return model


def wake(model: nn.Module, images: Tensor) -> None:
    """Move what starts as a constant (factors of norms and branches, statistics) or small to random values.

    Several libraries start a branch at zero or close to it, and nothing in it would matter.
    """
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            centre = float(parameter.min() == 1)
            nn.init.uniform_(parameter, centre - 0.3, centre + 0.3)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            usual = layer.weight[0].numel() ** -0.5
            if layer.weight.std() < usual / 2:
                nn.init.normal_(layer.weight, std=usual)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.7, 1.3)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)  # the statistics are those of the features: signals do not die out on their way
    for norm in norms:
        norm.momentum = 0.1


@dataclass(frozen=True)
class Pattern:
    """Which units are off for every input.

    Attributes:
        blocks: Blocks that are off.
        channels: By set of channels, the indices of the units that are off.
    """

    blocks: frozenset[str] = frozenset()
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def mask(self, model: nn.Module) -> None:
        """Force the gates of a dense network into the pattern, whatever they see."""
        for name, gate in find_gates(model).items():
            if gate.weight is not None:
                nn.init.normal_(gate.weight)
            nn.init.constant_(gate.bias, -100.0 if name in self.blocks else 100.0)
            with torch.no_grad():
                gate.bias[list(self.channels.get(name, ()))] = -100.0

    def operations(self, model: nn.Module) -> list[Operation]:
        """What removes the units that are off; a block of which a whole set is off goes as a whole."""
        sets = find_channels(model).sets
        empty = {sets[name].block for name, off in self.channels.items() if len(off) == sets[name].units}
        removals = [
            Operation("remove", name, 7, 1.5, "off", off)
            for name, off in self.channels.items()
            if off and len(off) < sets[name].units
        ]
        blocks = [name for name in residual_blocks(model) if name in self.blocks | empty]
        return [*removals, *(Operation("remove", name, 8, 1.75, "off") for name in blocks)]


def patterns(model: nn.Module, seed: int = 0) -> dict[str, Pattern]:
    """All on, all off, one left of each set, whole sets off, and two that mix all of it at random."""
    rng = random.Random(seed)
    blocks, sets = list(residual_blocks(model)), find_channels(model).sets

    def some(units: int, least: int = 1) -> tuple[int, ...]:
        kept = rng.sample(range(units), rng.randint(least, max(least, units - 1)))
        return tuple(sorted(set(range(units)) - set(kept)))

    def one_left(units: int) -> tuple[int, ...]:
        kept = rng.randrange(units)
        return tuple(index for index in range(units) if index != kept)

    def mixed() -> Pattern:
        off = frozenset(name for name in blocks if rng.random() < 0.3)
        return Pattern(off, {name: some(found.units) for name, found in sets.items() if rng.random() < 0.8})

    removable = [name for name, found in sets.items() if found.removable]
    emptied = rng.sample(removable, max(1, len(removable) // 2))
    return {
        "all-on": Pattern(),
        "all-off": Pattern(
            frozenset(blocks), {name: one_left(found.units) for name, found in sets.items() if not found.removable}
        ),
        "one-left": Pattern(channels={name: one_left(found.units) for name, found in sets.items()}),
        "whole-sets-off": Pattern(
            channels={
                name: tuple(range(found.units)) if name in emptied else some(found.units)
                for name, found in sets.items()
            }
        ),
        "mixed-1": mixed(),
        "mixed-2": mixed(),
    }


def follow(surgeon: Surgeon, parameter: nn.Parameter, value: Tensor) -> tuple[nn.Parameter, Tensor]:
    """What stands in a parameter's place after surgery, and the entries of the old one's value that belong to it."""
    while parameter in surgeon.replacements:
        replacement = surgeon.replacements[parameter]
        value = value.index_select(replacement.dim, replacement.index)
        parameter = replacement.parameter
    return parameter, value


def difference(one: Tensor, other: Tensor, scale: float = 1e-12) -> float:
    """Relative difference of two tensors in the 2-norm; what is smaller than the scale is taken to be as large."""
    return float((one - other).norm() / max(float(one.norm()), scale))
