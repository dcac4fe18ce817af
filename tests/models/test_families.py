"""Every family: taken apart it computes the same with the same tensors, and all its channels are found."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import BATCH, CLASSES, FAMILIES, build, difference, wake
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import efficientnet_b0, regnet, resnet, vision_transformer
from torchvision.models import swin_transformer as swin
from torchvision.ops import SqueezeExcitation, StochasticDepth

from greenprune.config import GateConfig, ModelConfig
from greenprune.gating import attach_gates, find_gates
from greenprune.models import (
    BlockError,
    PlainBlock,
    ResidualBlock,
    build_model,
    convert_blocks,
    find_channels,
    register_block,
    register_channelwise,
    residual_blocks,
)
from greenprune.models.attention import SelfAttention, SeparateSelfAttention
from greenprune.models.blocks import _SPLITS
from greenprune.surgery import Surgeon

EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


def gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits = model.train()(images)
    functional.cross_entropy(logits, torch.arange(BATCH) % CLASSES).backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


@EVERY_FAMILY
def test_a_converted_network_computes_the_same_with_the_same_parameters(name: str) -> None:
    model = FAMILIES[name].build()
    wake(model, FAMILIES[name].images(2))
    original = copy.deepcopy(model)
    parameters, images = list(model.parameters()), FAMILIES[name].images()
    blocks = convert_blocks(model, images)
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in parameters}
    assert difference(original.eval()(images).detach(), model.eval()(images).detach()) <= 1e-6
    expected, expected_gradients = gradients(original, images)
    got, _ = gradients(model, images)
    assert difference(expected, got) <= 1e-6
    whole = float(torch.stack([gradient.norm() for gradient in expected_gradients]).norm())
    for parameter, gradient in zip(parameters, expected_gradients, strict=True):
        assert difference(gradient, parameter.grad, 1e-3 * whole) <= 1e-5
    assert convert_blocks(model, images) == blocks  # a second time nothing is left to do


@EVERY_FAMILY
def test_without_an_example_a_network_is_taken_apart_alike(name: str) -> None:
    model = FAMILIES[name].build()
    convert_blocks(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in build(name).modules()]


# Residual blocks, blocks without a shortcut, and the sets as (label, units, channels of a unit), block by block.
FOUND: dict[str, tuple[int, int, list[tuple[str, int, int]]]] = {
    "cifar-a": (6, 0, [("hidden", width, 1) for width in (16, 16, 32, 32, 64, 64)]),
    "cifar-b": (6, 0, [("hidden", width, 1) for width in (16, 16, 32, 32, 64, 64)]),
    "resnet-basic": (5, 0, [("hidden", width, 1) for width in (16, 16, 32, 64, 128)]),
    "resnet-bottleneck": (
        5,
        0,
        [(label, width, 1) for width in (16, 16, 32, 64, 128) for label in ("hidden1", "hidden2")],
    ),
    "resnext": (5, 0, [("hidden", 8, width) for width in (2, 2, 4, 8, 16)]),
    "wide-resnet": (5, 0, [(label, width, 1) for width in (32, 32, 64, 128, 256) for label in ("hidden1", "hidden2")]),
    "regnet-x": (4, 0, [("hidden", groups, 8) for groups in (2, 2, 4, 4)]),
    "regnet-y": (4, 0, [("hidden", groups, 8) for groups in (2, 2, 4, 4)]),
    "mobilenet-v2": (3, 2, [("hidden", width, 1) for width in (32, 32, 32, 64)]),
    "mobilenet-v3-small": (3, 2, [("hidden", width, 1) for width in (24, 32, 40, 40)]),
    "mobilenet-v3-large": (3, 2, [("hidden", width, 1) for width in (32, 40, 48, 48)]),
    "efficientnet-b0": (3, 3, [("hidden", width, 1) for width in (32, 64, 64, 96)]),
    "efficientnet-v2-s": (4, 2, [("hidden", width, 1) for width in (64, 96, 96, 128)]),
    "convnext": (4, 0, [("hidden", width, 1) for width in (32, 32, 64, 64)]),
    "vit": (4, 0, [("heads", 4, 8), ("hidden", 48, 1)] * 2),
    "swin": (8, 0, [("heads", 2, 8), ("hidden", 32, 1)] * 2 + [("heads", 4, 8), ("hidden", 64, 1)] * 2),
    "swin-v2": (8, 0, [("heads", 2, 8), ("hidden", 32, 1)] * 2 + [("heads", 4, 8), ("hidden", 64, 1)] * 2),
    "timm-resnet": (5, 0, [(label, width, 1) for width in (8, 8, 16, 24, 32) for label in ("hidden1", "hidden2")]),
    "timm-resnet-basic": (5, 0, [("hidden", width, 1) for width in (8, 8, 16, 24, 32)]),
    "timm-resnet-se": (5, 0, [(label, width, 1) for width in (8, 8, 16, 24, 32) for label in ("hidden1", "hidden2")]),
    "timm-resnext": (5, 0, [("hidden", 4, width) for width in (4, 4, 8, 12, 16)]),
    "timm-convnext": (5, 0, [("hidden", width, 1) for width in (32, 64, 96, 96, 128)]),
    "timm-convnext-linear": (5, 0, [("hidden", width, 1) for width in (32, 64, 96, 96, 128)]),
    "timm-mobilenet-v3": (
        7,
        3,
        [("hidden", width, 1) for width in (40, 56, 64, 144, 144, 72, 72, 144, 288, 288)],
    ),
    "timm-byobnet": (
        4,
        0,
        [("hidden", width, 1) for width in (16, 32, 32)] + [(label, 64, 1) for label in ("hidden1", "hidden2")],
    ),
    "timm-vit": (4, 0, [("heads", 3, 8), ("hidden", 96, 1)] * 2),
    "transformers-resnet": (3, 0, [(label, width, 1) for width in (4, 4, 8) for label in ("hidden1", "hidden2")]),
    "transformers-resnet-basic": (3, 0, [("hidden", width, 1) for width in (8, 8, 16)]),
    "transformers-convnext": (3, 0, [("hidden", width, 1) for width in (32, 64, 64)]),
    "transformers-vit": (4, 0, [("heads", 3, 8), ("hidden", 48, 1)] * 2),
    "transformers-dinov2": (4, 0, [("heads", 3, 8), ("hidden", 48, 1)] * 2),
}

TIMM_CONVNEXT = [f"stages.{at}" for at in ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")]

# What is not gated: channels whose convolution works in groups on the block's input.
NOTES = {
    "mobilenet-v2": ["features.1"],
    "mobilenet-v3-small": ["features.1"],
    "mobilenet-v3-large": ["features.1"],
    "efficientnet-b0": ["features.1.0", "features.1.1"],
    "convnext": ["features.1.0", "features.1.1", "features.3.0", "features.3.1"],
    "timm-convnext": TIMM_CONVNEXT,
    "timm-convnext-linear": TIMM_CONVNEXT,
    "transformers-convnext": [
        f"network.convnext.encoder.stages.{at}" for at in ("0.layers.0", "1.layers.0", "1.layers.1")
    ],
}


@EVERY_FAMILY
def test_all_blocks_and_channels_of_a_family_are_found(name: str) -> None:
    model = build(name)
    residual, plain, sets = FOUND[name]
    assert len(residual_blocks(model)) == residual
    assert sum(isinstance(module, PlainBlock) for module in model.modules()) == plain
    found = find_channels(model)
    assert [(one.label, one.units, one.width) for one in found.sets.values()] == sets
    assert list(found.sets) == [f"{one.block}:{one.label}" for one in found.sets.values()]
    for one in found.sets.values():
        assert one.removable == (one.block in residual_blocks(model))
    noted = NOTES.get(name, [])
    assert [note.partition(":")[0] for note in found.notes] == noted
    assert all("take the block's input, whose width stays" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "blocks", "sets"),
    [
        ("resnet18", 8, 8),
        ("resnet50", 16, 32),
        ("resnext50_32x4d", 16, 16),
        ("wide_resnet50_2", 16, 32),
        ("regnet_x_400mf", 22, 22),
        ("regnet_y_400mf", 16, 16),
        ("mnasnet1_0", 10, 16),
        ("timm/regnety_002", 13, 13),
        ("timm/mixer_s32_224", 16, 16),
        ("mobilenet_v2", 10, 16),
        ("mobilenet_v3_small", 6, 10),
        ("mobilenet_v3_large", 10, 14),
        ("efficientnet_b0", 9, 15),
        ("efficientnet_v2_s", 35, 38),
        ("convnext_tiny", 18, 18),
        ("vit_b_16", 24, 24),
        ("swin_t", 24, 24),
        ("swin_v2_t", 24, 24),
    ],
)
def test_a_published_network_has_its_blocks_and_sets(name: str, blocks: int, sets: int) -> None:
    # RegNet computes its widths with tensors.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = build_model(ModelConfig(name=name), classes=10, channels=3, image_size=224)
    assert len(residual_blocks(model)) == blocks
    assert len(find_channels(model).sets) == sets


# What a branch is made of.


VIT_BLOCK = "encoder.layers.encoder_layer_0"


def block_of(*branch: nn.Module) -> nn.Module:
    """A network of one block with this branch."""
    return nn.Sequential(ResidualBlock(nn.Sequential(*branch), nn.Identity(), nn.ReLU(), input_activated=True))


class Doubled(nn.Conv2d):
    """A convolution that does not use its weight as it is."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, 2 * self.weight / self.weight.norm(), self.bias)


def conv(*sizes: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(*sizes, 1, **options)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ([nn.LayerNorm([8, 4, 4])], r"0\.branch\.1 \(LayerNorm\) is not known to treat each channel by itself"),
        ([nn.GroupNorm(2, 8)], r"0\.branch\.1 \(GroupNorm\) is not known"),
        ([nn.ReLU(), nn.InstanceNorm2d(8)], r"0\.branch\.2 \(InstanceNorm2d\) is not known"),
        ([nn.Softmax(1)], r"0\.branch\.1 \(Softmax\) is not known"),
        ([nn.PReLU(8)], r"0\.branch\.1 \(PReLU\) is not known"),
        (
            [SqueezeExcitation(8, 2), nn.Sigmoid()],
            r"0\.branch\.2 \(Sigmoid\) makes a constant of a channel that is off",
        ),
        ([SqueezeExcitation(8, 2), nn.BatchNorm2d(8)], r"0\.branch\.2 makes a constant of a channel that is off"),
        ([SqueezeExcitation(8, 2), nn.AlphaDropout(0.1)], r"0\.branch\.2 \(AlphaDropout\) makes a constant"),
        ([SqueezeExcitation(8, 2), conv(8, 8, groups=8)], r"0\.branch\.2 works in groups behind a squeeze"),
        ([conv(8, 8, groups=8), SqueezeExcitation(8, 2), nn.Softplus()], r"\(Softplus\) makes a constant"),
    ],
    ids=lambda value: "-".join(type(module).__name__ for module in value) if isinstance(value, list) else "",
)
def test_channels_that_cannot_be_switched_are_noted_with_the_reason(between: list[nn.Module], reason: str) -> None:
    model = block_of(conv(4, 8), *between, conv(8, 4))
    found = find_channels(model)
    assert found.sets == {}
    (note,) = found.notes
    assert note.startswith("0: channels from 0.branch.0 to 0.branch.")
    with pytest.raises(BlockError, match=reason):
        attach_gates(model, GateConfig(units=["channel"]))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Doubled(4, 8, 1), r"0\.branch\.0 \(Doubled\) is not known|0\.branch\.0: the channels inside a Doubled"),
        (nn.utils.parametrizations.weight_norm(conv(4, 8)), r"the channels inside a ParametrizedConv2d are not gated"),
        (nn.utils.parametrizations.spectral_norm(conv(4, 8)), r"the channels inside a ParametrizedConv2d"),
        (nn.ConvTranspose2d(4, 8, 1), r"0\.branch\.0 \(ConvTranspose2d\) is not known"),
    ],
    ids=["own class", "weight norm", "spectral norm", "transposed"],
)
@pytest.mark.parametrize("position", ["first", "last"])
def test_a_layer_that_derives_its_weight_is_left_alone(layer: nn.Module, reason: str, position: str) -> None:
    if position == "first":
        found = find_channels(block_of(layer, nn.ReLU(), conv(8, 4)))
        if not isinstance(layer, nn.ConvTranspose2d):
            assert any(re.search(reason, note) for note in found.notes)
    else:
        found = find_channels(block_of(conv(8, 4), nn.ReLU(), layer, nn.ReLU(), conv(8, 8)))
        assert any("channels from 0.branch.0 to 0.branch.4 are not gated: 0.branch.2" in note for note in found.notes)
    assert found.sets == {}


class Halved(nn.Module):
    """What a parametrization makes of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def derived(module: nn.Module, tensor: str) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, tensor, Halved())
    return module


def derived_inside(module: nn.Module, path: str) -> nn.Module:
    derived(module.get_submodule(path), "weight")
    return module


def plain_attention() -> SelfAttention:
    return SelfAttention(nn.Linear(8, 24), nn.Linear(8, 8), 2)


def separate_attention() -> SeparateSelfAttention:
    return SeparateSelfAttention(*(nn.Linear(8, 8) for _ in range(4)), heads=2)


@pytest.mark.parametrize(
    "branch",
    [
        [derived(conv(4, 8), "bias"), nn.ReLU(), conv(8, 4)],
        [conv(4, 8), derived(nn.BatchNorm2d(8), "weight"), nn.ReLU(), conv(8, 4)],
        [conv(4, 8), derived(nn.BatchNorm2d(8), "running_var"), nn.ReLU(), conv(8, 4)],
        [conv(4, 8), nn.ReLU(), derived_inside(SqueezeExcitation(8, 2), "fc2"), conv(8, 4)],
        [derived_inside(plain_attention(), "qkv")],
        [derived_inside(plain_attention(), "proj")],
        [derived_inside(separate_attention(), "query")],
        [derived_inside(separate_attention(), "key")],
        [derived_inside(separate_attention(), "value")],
    ],
    ids=[
        "bias",
        "norm",
        "statistics",
        "squeeze and excitation",
        "queries, keys and values",
        "projection of heads",
        "queries",
        "keys",
        "values",
    ],
)
def test_what_derives_a_tensor_that_would_be_cut_is_left_alone(branch: list[nn.Module]) -> None:
    found = find_channels(block_of(*branch))
    assert found.sets == {}
    assert found.notes


def test_an_attention_whose_projection_is_derived_cannot_be_taken_apart() -> None:
    model = FAMILIES["vit"].build()
    nn.utils.parametrizations.weight_norm(model.encoder.layers[0].self_attention, "in_proj_weight")
    with pytest.raises(BlockError, match="encoder_layer_0: a EncoderBlock cannot be taken apart: its attention"):
        convert_blocks(model, FAMILIES["vit"].images())


@pytest.mark.parametrize(
    "branch",
    [
        [nn.Linear(4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(8, 4)],
        [nn.Linear(4, 8), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(8, 4)],
        [conv(4, 8), nn.ReLU(), nn.Linear(4, 4)],
        [nn.Linear(4, 8), nn.AvgPool1d(3, 1, 1), nn.Linear(8, 4)],
        [nn.Linear(4, 8), nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.Linear(8, 4)],
        [nn.Conv1d(4, 8, 1), nn.AvgPool2d(3, 1, 1), nn.Conv1d(8, 4, 1)],
    ],
    ids=[
        "a norm of rows",
        "a norm of tokens",
        "a layer along a row",
        "a pool over neurons",
        "a pool over neurons of rows",
        "a pool over channels",
    ],
)
def test_channels_are_not_mistaken_for_another_dimension(branch: list[nn.Module]) -> None:
    found = find_channels(block_of(*branch))
    assert found.sets == {}
    assert len(found.notes) == 1


def test_timms_own_activations_are_switched_where_they_map_zero_to_zero() -> None:
    activations = pytest.importorskip("timm.layers.activations")
    squeeze = (conv(4, 8), SqueezeExcitation(8, 2))
    for kind in (activations.Swish, activations.HardSwish, activations.GELU):
        assert len(find_channels(block_of(*squeeze, kind(), conv(8, 4))).sets) == 1
    for kind in (activations.Sigmoid, activations.HardSigmoid):
        assert len(find_channels(block_of(conv(4, 8), kind(), conv(8, 4))).sets) == 1  # switched behind it
        found = find_channels(block_of(*squeeze, kind(), conv(8, 4)))
        assert found.sets == {}
        assert f"0.branch.2 ({kind.__name__}) makes a constant of a channel that is off" in found.notes[0]


def test_activations_of_transformers_are_switched_where_they_map_zero_to_zero() -> None:
    activations = pytest.importorskip("transformers.activations")
    squeeze = (conv(4, 8), SqueezeExcitation(8, 2))
    for name in ("gelu", "gelu_new", "quick_gelu", "gelu_pytorch_tanh", "silu", "mish", "relu2"):
        assert len(find_channels(block_of(*squeeze, activations.ACT2FN[name], conv(8, 4))).sets) == 1
    laplace = activations.ACT2FN["laplace"]
    assert len(find_channels(block_of(conv(4, 8), laplace, conv(8, 4))).sets) == 1  # switched behind it
    found = find_channels(block_of(*squeeze, laplace, conv(8, 4)))
    assert found.sets == {}
    assert "0.branch.2 (LaplaceActivation) makes a constant of a channel that is off" in found.notes[0]


def test_a_module_that_changes_the_number_of_channels_is_seen_even_if_declared_channelwise() -> None:
    @register_channelwise
    class BothSigns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.relu(), (-x).relu()], 1)

    found = find_channels(block_of(conv(4, 8), BothSigns(), conv(16, 4)))
    assert found.sets == {}
    assert found.notes == [
        "0: channels from 0.branch.0 to 0.branch.2 are not gated: 0.branch.2 does not take the same channels"
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_input_of_a_block_is_that_of_its_first_layer(name: str) -> None:
    """What a run by name goes by, without an example, is what is seen with one."""

    def gates(example: Tensor | None) -> list[tuple[int, torch.Size]]:
        model = build(name)
        attach_gates(model, GateConfig(), example)
        return [(gate.dim, gate.weight.shape) for gate in find_gates(model).values()]

    assert gates(None) == gates(FAMILIES[name].images())


def test_a_branch_that_is_no_chain_is_gated_as_a_whole_and_noted() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(4, 8), conv(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    model = nn.Sequential(ResidualBlock(Branch(), nn.Identity(), nn.ReLU(), input_activated=True))
    assert find_channels(model).notes == ["0.branch: the channels inside a Branch are not gated"]
    assert attach_gates(model, GateConfig(units=["block"])) == ["0"]


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"scale_attn_norm": True}], ids=str)
def test_an_attention_with_more_in_it_is_kept_whole_and_noted(options: dict[str, bool]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=4, **options
    )
    original, images = copy.deepcopy(model), torch.randn(2, 3, 16, 16)
    convert_blocks(model, images)
    assert difference(original.eval()(images).detach(), model.eval()(images).detach()) <= 1e-6
    found = find_channels(model)
    assert list(found.sets) == ["blocks.0.mlp:hidden"]
    assert found.notes == ["blocks.0.attention.branch.1: the channels inside a Attention are not gated"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"aa_layer": "BlurPool2d"}, r"BlurPool2d\) is not known"),
        ({"drop_block_rate": 0.1}, r"DropBlock2d\) is not known"),
        ({"act_layer": "prelu"}, r"PReLU\) is not known"),
        ({"norm_layer": "groupnorm"}, r"GroupNorm\) is not known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_timm_can_put_into_a_block_is_noted(options: dict[str, Any], reason: str) -> None:
    timm = pytest.importorskip("timm")
    if "aa_layer" in options:
        options = {"aa_layer": timm.layers.BlurPool2d}
    model = timm.create_model("resnet26", layers=(1, 1, 1, 1), channels=(32, 32, 64, 64), num_classes=4, **options)
    convert_blocks(model)
    found = find_channels(model)
    assert any(re.search(reason, note) for note in found.notes)
    assert len(found.sets) + len(found.notes) == 8


# What is refused, and what is put right.


class Block(nn.Module):
    """A user's own block: two convolutions around an own activation."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.first, self.norm = conv(width, hidden), nn.BatchNorm2d(hidden)
        self.second = conv(hidden, width)
        nn.init.zeros_(self.second.weight)  # a branch that starts at zero hides what it computes
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        return torch.tanh(x + self.second(hidden * torch.tanh(hidden)))


@register_channelwise
class Bend(nn.Module):
    """An own activation."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(x)


def split_of(block: Block, bend: nn.Module | None = None, activation: nn.Module | None = None) -> ResidualBlock:
    branch = nn.Sequential(block.first, block.norm, bend or Bend(), block.second)
    return ResidualBlock(branch, nn.Identity(), activation or nn.Tanh(), input_activated=False)


@pytest.fixture
def register() -> Iterator[Callable[[Callable[[Any], Any]], None]]:
    """Registers how the blocks are taken apart, for one test."""
    before = dict(_SPLITS)
    yield lambda split: register_block(Block)(split) and None
    _SPLITS.clear()
    _SPLITS.update(before)


def network(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(conv(3, 8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


IMAGES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "split",
    [
        lambda block: split_of(block, bend=nn.ReLU()),
        lambda block: split_of(block, activation=nn.Identity()),
        lambda block: ResidualBlock(
            nn.Sequential(block.first, block.norm, Bend(), block.first), nn.Identity(), nn.Tanh(), input_activated=False
        ),
        lambda block: ResidualBlock(
            nn.Sequential(block.first, block.norm, Bend(), block.second),
            nn.Flatten(),
            nn.Tanh(),
            input_activated=False,
        ),
        lambda block: ResidualBlock(
            nn.Sequential(block.first, block.norm, Bend(), conv(12, 8)), nn.Identity(), nn.Tanh(), input_activated=False
        ),
        lambda block: ResidualBlock(
            nn.Sequential(nn.ReLU(inplace=True), block.first, block.norm, Bend(), block.second),
            nn.Identity(),
            nn.Tanh(),
            input_activated=False,
        ),
        lambda block: nn.Sequential(split_of(block), nn.AvgPool2d(2)),
    ],
    ids=["activation inside", "activation", "shapes that do not fit", "shortcut", "new layer", "in place", "shape"],
)
def test_a_split_that_computes_something_else_is_refused(register: Any, split: Callable[[Any], nn.Module]) -> None:
    register(split)
    with pytest.raises(BlockError, match=r"^2: taken apart by the function registered for Block, .*; expected branch"):
        convert_blocks(network(nn.Identity(), Block()), IMAGES)


class WorkingInPlace(nn.Module):
    """A block whose branch changes its input, before it is added to what the branch makes of it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.ReLU(inplace=in_place), conv(8, 12), nn.ReLU(), conv(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_branch_in_place_on_the_input_is_refused(register: Any, in_place: bool) -> None:
    """Without it the network would go on with another input: the removal would not be exact."""
    del register
    register_block(WorkingInPlace)(
        lambda block: ResidualBlock(block.branch, nn.Identity(), nn.Identity(), input_activated=True)
    )
    model = network(WorkingInPlace(in_place), WorkingInPlace(in_place))
    if in_place:
        with pytest.raises(BlockError, match=r"^1: its branch works in place on the block's input"):
            convert_blocks(model, IMAGES)
        return
    convert_blocks(model, IMAGES)
    attach_gates(model, GateConfig(units=["block"]))
    model[2].gate.bias.detach().fill_(-50)
    masked = model.eval()(IMAGES)
    Surgeon(model).remove_block("2")
    torch.testing.assert_close(model(IMAGES), masked)


class DroppingInPlace(nn.Module):
    """A block whose branch drops a part of its input in training, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Dropout(0.5, inplace=True), conv(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_a_branch_that_works_in_place_in_training_alone_is_refused(register: Any) -> None:
    del register
    register_block(DroppingInPlace)(
        lambda block: ResidualBlock(block.branch, nn.Identity(), nn.Identity(), input_activated=True)
    )
    with pytest.raises(BlockError, match=r"^1: its branch works in place on the block's input"):
        convert_blocks(network(DroppingInPlace()), IMAGES)


class Projecting(nn.Module):
    """A block whose shortcut works in place on the input, and stays."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.branch = conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu_(x)
        return self.project(x) + self.branch(x)


def test_a_shortcut_in_place_on_the_input_is_no_reason_to_refuse(register: Any) -> None:
    del register
    register_block(Projecting)(
        lambda block: ResidualBlock(
            nn.Sequential(nn.ReLU(), block.branch),
            nn.Sequential(nn.ReLU(inplace=True), block.project),
            nn.Identity(),
            input_activated=True,
        )
    )
    model = network(Projecting())
    expected = model.eval()(IMAGES)
    convert_blocks(model, IMAGES)
    torch.testing.assert_close(model(IMAGES), expected)


class Dropping(nn.Module):
    """A block that drops at two places in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(8, 12), conv(12, 8)
        self.drop, self.depth = nn.Dropout(0.1), StochasticDepth(0.1, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.depth(self.second(self.drop(self.first(x).relu())))


@pytest.mark.parametrize("kept", [(), ("drop",), ("depth",), ("drop", "depth")], ids="-".join)
def test_a_split_that_forgets_what_drops_in_training_is_refused(register: Any, kept: tuple[str, ...]) -> None:
    """In evaluation it computes the same, and the network would be trained without it."""

    def split(block: Dropping) -> nn.Module:
        drop, depth = (block.get_submodule(name) if name in kept else nn.Identity() for name in ("drop", "depth"))
        branch = nn.Sequential(block.first, nn.ReLU(), drop, block.second, depth)
        return ResidualBlock(branch, nn.Identity(), nn.Identity(), input_activated=True)

    register_block(Dropping)(split)
    torch.manual_seed(0)
    state, model = torch.get_rng_state(), network(Dropping())
    torch.set_rng_state(state)
    if kept == ("drop", "depth"):
        convert_blocks(model, IMAGES)
    else:
        with pytest.raises(BlockError, match=r"^1: .* registered for Dropping, the block draws fewer random numbers"):
            convert_blocks(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), state)


DROPPING: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: vision_transformer.VisionTransformer(
        16, 4, 2, 4, 32, 48, dropout=0.1, attention_dropout=0.1, num_classes=CLASSES
    ),
    "swin": lambda: swin.SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [4, 4], dropout=0.1, attention_dropout=0.1, stochastic_depth_prob=0.3
    ),
    "timm-vit": lambda: _timm_vit(drop_path_rate=0.3, proj_drop_rate=0.1, attn_drop_rate=0.1),
    "efficientnet-b0": lambda: efficientnet_b0(num_classes=CLASSES, stochastic_depth_prob=0.3),
}


def _timm_vit(**options: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=4, **options)


@pytest.mark.parametrize("name", DROPPING)
def test_what_drops_in_training_is_known_in_published_blocks(name: str) -> None:
    torch.manual_seed(0)
    assert convert_blocks(DROPPING[name](), FAMILIES[name].images())


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_blocks_are_compared_without_tf32(register: Any, precision: str) -> None:
    """With it, other kernels for the same products differ by more than a mistake would."""
    seen = []

    class Seeing(Bend):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return super().forward(x)

    register(lambda block: split_of(block, bend=Seeing()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        convert_blocks(network(Block()), IMAGES)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen[0] == "highest"


def test_a_split_that_gives_nan_is_refused(register: Any) -> None:
    register(lambda block: split_of(block, activation=nn.Threshold(9.0, float("nan"))))
    with pytest.raises(BlockError, match=r"^1: .* computes something else"):
        convert_blocks(network(Block()), IMAGES)


@pytest.mark.parametrize(
    ("split", "what"),
    [
        (lambda block: nn.Sequential(block.first, block.second), "gave a Sequential without"),
        (lambda block: None, "gave a NoneType without"),
        (lambda block: (block.first, block.second), "gave a tuple without"),
        (lambda block: ResidualBlock(block.nothing, nn.Identity(), nn.Tanh(), input_activated=False), "'nothing'"),
    ],
    ids=["chain", "nothing", "tuple", "missing attribute"],
)
def test_a_split_without_a_block_is_refused(register: Any, split: Callable[[Any], Any], what: str) -> None:
    register(split)
    with pytest.raises(BlockError, match=f"^1: .*{what}"):
        convert_blocks(network(Block()))


@pytest.mark.parametrize("example", [None, IMAGES], ids=["unseen", "seen"])
def test_a_block_in_two_places_is_refused(register: Any, example: Tensor | None) -> None:
    register(split_of)
    block = Block()
    with pytest.raises(BlockError, match=r"1\.branch\.0\.weight is also 2\.first\.weight: a unit that is used in two"):
        convert_blocks(network(block, block), example)


class Twice(nn.Module):
    """Calls its one block two times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.other = conv(3, 8), block, PlainBlock(conv(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.block(self.block(self.stem(x))))


@pytest.mark.parametrize("split", [split_of, lambda block: nn.Sequential(split_of(block))], ids=["block", "chain"])
@pytest.mark.parametrize("taken_apart", [True, False])
def test_a_block_that_is_called_twice_is_refused(register: Any, split: Any, taken_apart: bool) -> None:
    """It is registered once, and a gate would know of its last call alone."""
    register(split)
    block = split(Block()) if taken_apart else Block()
    name = "block.0" if taken_apart and isinstance(block, nn.Sequential) else "block"
    model = Twice(block).train()
    before = str(model)
    with pytest.raises(
        BlockError, match=rf"^{name}: the network calls it 2 times in one pass.*expected a block called once"
    ):
        convert_blocks(model, IMAGES)
    assert str(model) == before
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_a_tensor_of_two_branches_is_refused(register: Any) -> None:
    register(split_of)
    one, other = Block(), Block()
    other.second.weight = one.second.weight
    with pytest.raises(BlockError, match=r"1\.branch\.3\.weight is also 2\.branch\.3\.weight.*share nothing"):
        convert_blocks(network(one, other), IMAGES)


def test_statistics_in_two_places_are_refused(register: Any) -> None:
    register(split_of)
    one, other = Block(), Block()
    one.norm = other.norm = nn.BatchNorm2d(12, affine=False)
    with pytest.raises(BlockError, match=r"1\.branch\.1\.running_mean is also 2\.branch\.1\.running_mean"):
        convert_blocks(network(one, other), IMAGES)


def test_a_network_that_is_itself_a_block_is_refused(register: Any) -> None:
    register(split_of)
    for model in (Block(), split_of(Block()), resnet.BasicBlock(4, 4), PlainBlock(conv(4, 4))):
        with pytest.raises(BlockError, match=f"itself a block .{type(model).__name__}.; put it into a torch.nn.Seq"):
            convert_blocks(model)


def test_a_network_with_nothing_to_gate_says_what_it_is_made_of() -> None:
    class Row(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    for model, made_of in ((network(Row()), "Row"), (network(), "torch.nn's layers alone")):
        with pytest.raises(
            BlockError, match=f"block that greenprune knows or can follow; it is made of {made_of}. Exp"
        ):
            convert_blocks(model, IMAGES)


def test_a_branch_without_a_layer_is_refused_by_name() -> None:
    model = nn.Sequential(ResidualBlock(nn.Tanh(), nn.Identity(), nn.ReLU(), input_activated=True))
    with pytest.raises(BlockError, match=r"^0: a branch without a convolution or linear layer"):
        attach_gates(model, GateConfig())


def test_of_blocks_inside_each_other_the_outer_one_is_taken_apart(register: Any) -> None:
    register(split_of)
    outer = Block()
    outer.first = nn.Sequential(Block(8, 4), conv(8, 12))
    model = network(outer)
    original = copy.deepcopy(model)
    assert convert_blocks(model, IMAGES) == ["1"]
    assert difference(original.eval()(IMAGES).detach(), model.eval()(IMAGES).detach()) <= 1e-6
    assert any("inside a Block are not gated" in note for note in find_channels(model).notes)


def test_a_split_with_a_block_inside_another_is_refused(register: Any) -> None:
    def nested(block: Block) -> nn.Module:
        inner = ResidualBlock(nn.Sequential(conv(8, 8)), nn.Identity(), nn.Identity(), input_activated=True)
        return ResidualBlock(nn.Sequential(inner, conv(8, 8)), nn.Identity(), nn.Identity(), input_activated=True)

    register(nested)
    with pytest.raises(BlockError, match=r"^1\.branch\.0 lies inside the block 1; expected a chain of blocks"):
        convert_blocks(network(Block()))


def test_a_block_that_is_called_with_more_than_its_input_is_refused() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = model.blocks[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, is_causal=True)

    with pytest.raises(BlockError, match=r"^block: a Block that is called with more than its input cannot be taken"):
        convert_blocks(Masked(), torch.randn(2, 5, 24))


def test_a_block_that_is_called_with_a_mask_that_is_none_needs_a_form_that_takes_it(register: Any) -> None:
    class Masked(Block):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Masked()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(x, None)
            return out

    register_block(Masked)(split_of)
    with pytest.raises(BlockError, match=r"^block: a Masked that is called with more than its input cannot be"):
        convert_blocks(Caller(), torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("activated", [True, False])
def test_a_block_whose_input_turns_out_not_to_be_activated_keeps_its_activation(activated: bool) -> None:
    blocks = nn.Sequential(resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 8))
    model = network(nn.ReLU() if activated else nn.Identity(), blocks)
    convert_blocks(model, IMAGES)
    first, second = residual_blocks(model).values()
    assert first.input_activated == activated
    assert second.input_activated


class Whole(nn.Module):
    """A user's block that holds the form which it is taken apart into."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.form = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x)


@pytest.fixture
def whole(register: Any) -> None:
    """Has its blocks taken apart, for one test."""
    register_block(Whole)(lambda block: block.form if len(block.form) > 1 else block.form[0])


def claiming(branch: nn.Module, activation: nn.Module) -> ResidualBlock:
    """A block of which it is said that its input has passed its activation."""
    return ResidualBlock(branch, nn.Identity(), activation, input_activated=True)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("training", [True, False])
def test_an_activation_that_drops_in_training_alone_stays_when_a_branch_goes(training: bool) -> None:
    """A network may be in evaluation mode when it is taken apart, as a pretrained one is."""
    block = claiming(conv(8, 8), nn.Sequential(nn.ReLU(), nn.Dropout(0.1)))
    model = network(nn.ReLU(), Whole(block)).train(training)
    random = torch.get_rng_state()
    convert_blocks(model, IMAGES)
    assert torch.equal(torch.get_rng_state(), random)
    assert block.training == block.activation.training == training
    assert block.without_branch() is block.activation


@pytest.mark.usefixtures("whole")
def test_taking_a_network_apart_leaves_its_statistics() -> None:
    model = network(Whole(claiming(conv(8, 8), nn.BatchNorm2d(8)))).train()
    before = copy.deepcopy(list(model.buffers()))
    convert_blocks(model, IMAGES)
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), before, strict=True))


@pytest.mark.usefixtures("whole")
def test_each_block_of_a_chain_keeps_an_activation_that_its_input_has_not_passed() -> None:
    activations = (nn.Identity(), nn.ReLU(), nn.ReLU())
    model = network(Whole(*(claiming(conv(8, 8), activation) for activation in activations)))
    convert_blocks(model, IMAGES)
    assert [block.input_activated for block in residual_blocks(model).values()] == [True, False, True]


def test_an_activation_that_changes_its_own_output_stays_when_a_branch_goes() -> None:
    timm = pytest.importorskip("timm")
    regnet_silu = FAMILIES["regnet-x"].build()
    for module in regnet_silu.modules():
        if isinstance(module, regnet.ResBottleneckBlock):
            module.activation = nn.SiLU(inplace=True)
    timm_silu = timm.create_model("resnet18", layers=(2, 1, 1, 1), channels=(8, 8, 8, 8), act_layer="silu")
    for model in (regnet_silu, timm_silu):
        convert_blocks(model)
        assert not any(block.input_activated for block in residual_blocks(model).values())


def kept(model: nn.Module, path: str) -> tuple[list[Tensor], Any]:
    """What a hook sees come out of a module, and the hook's handle."""
    seen: list[Tensor] = []
    return seen, model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))


@pytest.mark.parametrize(
    ("name", "path", "rest"),
    [("resnet-basic", "layer1.1", nn.Identity), ("resnet-basic", "layer2.0", nn.Sequential), ("vit", VIT_BLOCK, None)],
    ids=["identity", "projection", "chain"],
)
def test_a_blocks_hook_sees_what_stands_in_its_place(name: str, path: str, rest: type[nn.Module] | None) -> None:
    """As those that collect features: a hook that is not called any more leaves the features of an earlier batch."""
    model, images = FAMILIES[name].build(), FAMILIES[name].images()
    wake(model, images)
    seen, handle = kept(model, path)
    model.eval()(images)
    expected = seen[-1]
    convert_blocks(model, images)
    seen.clear()
    model(images)
    assert difference(seen[0].detach(), expected.detach()) <= 1e-5
    if rest is not None:
        Surgeon(model).remove_block(path)
        assert isinstance(model.get_submodule(path), rest)
        seen.clear()
        model(images)
        assert len(seen) == 1
    handle.remove()
    model(images)
    assert len(seen) == 1


def test_what_is_left_of_a_block_is_hooked_at_its_place_alone() -> None:
    """Its activation may have other places."""
    act = nn.ReLU()
    blocks = [ResidualBlock(conv(3, 3), nn.Identity(), act, input_activated=False) for _ in range(2)]
    model, images = nn.Sequential(*blocks), torch.randn(2, 3, 4, 4)
    seen, _ = kept(model, "0")
    Surgeon(model).remove_block("0")
    out = model(images)
    assert len(seen) == 1
    assert torch.equal(seen[0], images.relu())
    assert out.shape == images.shape


@pytest.mark.parametrize(
    ("name", "path"), [("resnet-basic", "layer1.1.relu"), ("vit", f"{VIT_BLOCK}.self_attention")], ids=["act", "heads"]
)
def test_a_hook_that_would_see_nothing_any_more_is_refused(name: str, path: str) -> None:
    model = FAMILIES[name].build()
    kept(model, path)
    with pytest.raises(BlockError, match=rf"^{path}: a \w+ with hooks is taken apart .*registered afterwards"):
        convert_blocks(model, FAMILIES[name].images())


def test_frozen_norms_stay_frozen_through_the_conversion() -> None:
    model = FAMILIES["resnet-basic"].build().train()
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in frozen:
        module.eval()
    convert_blocks(model, FAMILIES["resnet-basic"].images())
    assert not any(module.training for module in frozen)
    assert all(block.training and block.branch.training for block in residual_blocks(model).values())
