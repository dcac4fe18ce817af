"""The networks: shapes, sizes, stems, and agreement with the originals."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import nn

from greenprune.config import ConfigError, ModelConfig
from greenprune.models import CifarResNet, build_model, model_names, residual_blocks
from greenprune.models.cifar_resnet import SubsamplePad

MakeNetwork = Callable[..., nn.Module]

CIFAR = ["resnet20", "resnet32", "resnet38", "resnet44", "resnet56", "resnet110"]
TORCHVISION = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_documented_name_is_registered() -> None:
    assert {*CIFAR, *TORCHVISION} <= set(model_names())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [*CIFAR, *TORCHVISION])
def test_every_network_gives_one_logit_a_class(make_network: MakeNetwork, name: str, channels: int) -> None:
    with torch.device("meta"):
        model = make_network(name, kind=None, classes=7, channels=channels, image_size=32)
        assert model(torch.empty(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet44", 0.66), ("resnet56", 0.85)]
)
def test_cifar_networks_are_as_large_as_published(make_network: MakeNetwork, name: str, millions: float) -> None:
    """He et al. 2015 (arXiv 1512.03385), table 6."""
    with torch.device("meta"):
        assert round(parameters_of(make_network(name, kind=None)) / 1e6, 2) == millions


def test_resnet110_is_as_large_as_published(make_network: MakeNetwork) -> None:
    with torch.device("meta"):
        assert round(parameters_of(make_network("resnet110", kind=None)) / 1e6, 1) == 1.7


@pytest.mark.parametrize("name", CIFAR)
def test_a_cifar_network_has_the_depth_of_its_name(make_network: MakeNetwork, name: str) -> None:
    with torch.device("meta"):
        model = make_network(name, kind=None)
    weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == int(name.removeprefix("resnet"))
    assert 2 * len(residual_blocks(model)) + 2 == len(weighted)


def test_a_depth_that_is_not_6n_plus_2_is_refused() -> None:
    with pytest.raises(ValueError, match="21 is not 6n"):
        CifarResNet(21, 10)


def test_the_options_differ_in_two_projections(make_network: MakeNetwork) -> None:
    padded, projected = make_network(shortcut="A", kind=None), make_network(shortcut="B", kind=None)
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert parameters_of(projected) - parameters_of(padded) == projections
    assert set(padded.state_dict()) < set(projected.state_dict())


def test_the_padding_shortcut_subsamples_and_adds_zero_channels() -> None:
    x = torch.randn(2, 3, 4, 4)
    out = SubsamplePad(2, 5)(x)
    assert out.shape == (2, 8, 2, 2)
    assert torch.equal(out[:, 2:5], x[:, :, ::2, ::2])
    assert out[:, :2].abs().sum() == out[:, 5:].abs().sum() == 0


@pytest.mark.parametrize(("name", "first"), [("resnet20", "stem.0.weight"), ("resnet18", "conv1.weight")])
def test_only_the_stem_depends_on_the_images_channels(make_network: MakeNetwork, name: str, first: str) -> None:
    grey = make_network(name, kind=None, channels=1).state_dict()
    colour = make_network(name, kind=None, channels=3).state_dict()
    assert list(grey) == list(colour)
    assert {key for key in grey if grey[key].shape != colour[key].shape} == {first}
    assert grey[first].shape[1] == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_torchvision_network_computes_what_torchvision_computes(make_network: MakeNetwork, name: str) -> None:
    model = make_network(name, kind=None, stem="imagenet", classes=5, image_size=32)
    torch.manual_seed(0)
    original = torchvision.models.get_model(name, weights=None, num_classes=5)
    torch.manual_seed(0)
    model = make_network(name, kind=None, stem="imagenet", classes=5, image_size=32)
    images = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(images), original.train(mode)(images))
    assert parameters_of(model) == parameters_of(original)


@pytest.mark.parametrize(
    ("stem", "image_size", "kernel"),
    [("auto", 8, 3), ("auto", 64, 3), ("auto", 65, 7), ("auto", 224, 7), ("small", 224, 3), ("imagenet", 32, 7)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_stem_follows_the_images_unless_it_is_chosen(
    make_network: MakeNetwork, stem: str, image_size: int, kernel: int, channels: int
) -> None:
    with torch.device("meta"):
        model = make_network("resnet18", kind=None, stem=stem, image_size=image_size, channels=channels)
        seen = []
        model.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        model(torch.empty(2, channels, image_size, image_size))
    assert model.conv1.kernel_size == (kernel, kernel)
    side = image_size if kernel == 3 else -(-image_size // 4)
    assert seen == [(2, 64, side, side)]


@pytest.mark.parametrize("stem", ["auto", "small"])
def test_a_cifar_network_has_the_small_stem_only(make_network: MakeNetwork, stem: str) -> None:
    assert make_network("resnet20", stem=stem, image_size=224).stem[0].kernel_size == (3, 3)
    with pytest.raises(ConfigError, match=r"^model\.stem: 'imagenet' .*resnet20; expected auto or small"):
        make_network("resnet20", stem="imagenet")


def test_an_unknown_name_is_refused_with_the_closest_and_what_is_valid() -> None:
    with pytest.raises(ConfigError) as refused:
        build_model(ModelConfig(name="resnet21"), classes=10, channels=3, image_size=32)
    message = str(refused.value)
    assert message.startswith("model.name: 'resnet21' is unknown; did you mean resnet")
    assert all(name in message for name in [*CIFAR, "mobilenet...", "timm/NAME"])
    with pytest.raises(ConfigError, match=r"'vgg' is unknown; valid: "):
        build_model(ModelConfig(name="vgg"), classes=10, channels=3, image_size=32)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_b_16", 8, r"'vit_b_16' cannot be built for these images: .*indivisible"),
        ("timm/no_such_net", 32, r"timm has no network 'no_such_net'"),
        ("timm/resnet51", 32, r"timm has no network 'resnet51'; did you mean timm/resnet"),
        ("timm/vgg11", 32, r"'timm/vgg11' cannot be gated: VGG has no residual block"),
    ],
)
def test_a_network_that_cannot_be_had_is_refused(name: str, size: int, message: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=rf"^model\.name: {message}"):
        build_model(ModelConfig(name=name), classes=10, channels=3, image_size=size)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_tiny_patch16_224"])
def test_a_network_of_a_fixed_size_is_built_for_the_size_of_the_images(name: str) -> None:
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = build_model(ModelConfig(name=f"timm/{name}"), classes=7, channels=1, image_size=64)
        assert model(torch.empty(2, 1, 64, 64)).shape == (2, 7)


def test_stems_are_for_resnets() -> None:
    with pytest.raises(ConfigError, match=r"^model\.stem: 'small' is not valid for mobilenet_v2; expected auto or"):
        build_model(ModelConfig(name="mobilenet_v2", stem="small"), classes=10, channels=3, image_size=32)


def test_every_name_in_the_help_text_exists() -> None:
    text = " ".join(open_source_of_names().split())
    assert all(name in text for name in CIFAR)
    named = re.findall(r"\b(?:resnet|vit_|swin_|convnext_)\w*\d\w*", text)
    assert set(named) <= set(model_names())


def open_source_of_names() -> str:
    from greenprune.config import config_parser

    return config_parser().format_help()
