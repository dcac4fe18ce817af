"""FLOPs: the counter agrees with the literature and with arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from greenprune.flops import Cost, count_costs, subtract
from greenprune.gating import find_gates
from greenprune.models import residual_blocks

MakeNetwork = Callable[..., nn.Module]

PUBLISHED = [  # name, shortcut, image side, classes, million multiply-adds
    ("resnet20", "A", 32, 10, 40.55),
    ("resnet20", "B", 32, 10, 40.81),
    ("resnet56", "A", 32, 10, 125.49),
    ("resnet18", "A", 224, 1000, 1814.0),  # torchvision's own figures for its weights
    ("resnet50", "A", 224, 1000, 4089.0),
]


def meta_network(make: MakeNetwork, name: str, shortcut: str, side: int, classes: int, kind: str | None) -> nn.Module:
    with torch.device("meta"):
        return make(name, shortcut=shortcut, kind=kind, image_size=side, classes=classes)


def input_channels(model: nn.Module) -> list[int]:
    """Of every block's input."""
    branches = [block.branch for block in residual_blocks(model).values()]
    return [next(m for m in branch.modules() if isinstance(m, nn.Conv2d)).in_channels for branch in branches]


@pytest.mark.parametrize(("name", "shortcut", "side", "classes", "millions"), PUBLISHED)
def test_a_forward_pass_costs_what_is_published(
    make_network: MakeNetwork, name: str, shortcut: str, side: int, classes: int, millions: float
) -> None:
    model = meta_network(make_network, name, shortcut, side, classes, None)
    cost = count_costs(model, (3, side, side))[""]
    assert cost.flops_forward == pytest.approx(2e6 * millions, rel=2e-3)
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["conditional", None])
@pytest.mark.parametrize(
    ("name", "shortcut", "side", "stem"),
    [
        ("resnet20", "A", 32, 2 * 9 * 3 * 16 * 32 * 32),
        ("resnet20", "B", 32, 2 * 9 * 3 * 16 * 32 * 32),
        ("resnet50", "A", 224, 2 * 49 * 3 * 64 * 112 * 112),
    ],
)
def test_training_costs_three_forward_passes_without_the_gradients_of_the_images_and_of_what_gates_see(
    make_network: MakeNetwork, name: str, shortcut: str, side: int, stem: int, kind: str | None
) -> None:
    model = meta_network(make_network, name, shortcut, side, 10, kind)
    cost = count_costs(model, (3, side, side))[""]
    gates = 2 * sum(input_channels(model)) if kind == "conditional" else 0
    assert cost.flops_train == 3 * cost.flops_forward - stem - gates


@pytest.mark.parametrize(
    ("name", "shortcut"), [("resnet20", "A"), ("resnet20", "B"), ("resnet18", "A"), ("resnet50", "A")]
)
def test_a_part_costs_two_backward_products_a_forward_one_and_a_gate_one(
    make_network: MakeNetwork, name: str, shortcut: str
) -> None:
    model = meta_network(make_network, name, shortcut, 32, 10, "conditional")
    blocks = residual_blocks(model)
    parts = [f"{name}.{part}" for name in blocks for part in ("branch", "gate", "shortcut")]
    costs = count_costs(model, (3, 32, 32), parts)
    for name_, channels in zip(blocks, input_channels(model), strict=True):
        gate, branch, beside = (costs[f"{name_}.{part}"] for part in ("gate", "branch", "shortcut"))
        assert gate == Cost(2 * channels, 4 * channels, channels + 1)
        assert branch.flops_train == 3 * branch.flops_forward > 0
        assert beside.flops_train == 3 * beside.flops_forward


def test_a_branch_costs_the_same_whatever_the_shortcut_beside_it(make_network: MakeNetwork) -> None:
    networks = {shortcut: meta_network(make_network, "resnet20", shortcut, 32, 10, "conditional") for shortcut in "AB"}
    branches = [f"{name}.branch" for name in residual_blocks(networks["A"])]
    without, projected = (count_costs(network, (3, 32, 32), ["", *branches]) for network in networks.values())
    assert projected.pop("").flops_train > without.pop("").flops_train
    assert projected == without


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_in_groups_trains_at_three_forward_passes(groups: int, kind: type[nn.Conv2d]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 8, 3, groups=groups))
    costs = count_costs(model, (3, 10, 10), ["", "0"])
    assert costs[""].flops_train == 3 * costs[""].flops_forward - costs["0"].flops_forward  # images need no gradient


def test_a_count_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    convolution, linear = 2 * 9 * 3 * 4 * 36, 2 * 144 * 5
    costs = count_costs(model, (3, 6, 6), ["", "0", "1", "3"])
    assert costs[""] == Cost(convolution + linear, 2 * convolution + 3 * linear, 3 * 9 * 4 + 4 + 144 * 5 + 5)
    # As inside a network, where its input has a gradient.
    assert costs["0"] == Cost(convolution, 3 * convolution, 3 * 9 * 4 + 4)
    assert costs["1"] == Cost()
    assert costs["3"] == Cost(linear, 3 * linear, 144 * 5 + 5)


@pytest.mark.parametrize(("kind", "flops", "params"), [("conditional", 1, 1), ("static", 0, 0)])
def test_the_count_of_a_gated_network_includes_its_gates(
    make_network: MakeNetwork, kind: str, flops: int, params: int
) -> None:
    gated = meta_network(make_network, "resnet20", "A", 32, 10, kind)
    plain = meta_network(make_network, "resnet20", "A", 32, 10, None)
    channels = input_channels(plain)
    with_gates, without = count_costs(gated, (3, 32, 32))[""], count_costs(plain, (3, 32, 32))[""]
    assert with_gates.flops_forward - without.flops_forward == flops * 2 * sum(channels)
    assert with_gates.flops_train - without.flops_train == flops * 4 * sum(channels)
    assert with_gates.params - without.params == params * sum(channels) + len(channels)


@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_a_gate_costs_what_the_network_costs_less_without_it(make_network: MakeNetwork, kind: str) -> None:
    model = meta_network(make_network, "resnet20", "B", 16, 10, kind)
    names = [f"{name}.gate" for name in find_gates(model)]
    costs = count_costs(model, (3, 16, 16), ["", *names])
    for block in residual_blocks(model).values():
        block.gate = None
    assert subtract(costs.pop(""), costs.values()) == count_costs(model, (3, 16, 16))[""]


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_alone(make_network: MakeNetwork, training: bool) -> None:
    model = make_network().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_costs(model, (3, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {module.training for module in model.modules()} == {training}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(gate.decision is None for gate in find_gates(model).values())


def test_frozen_parameters_are_parameters(make_network: MakeNetwork) -> None:
    model = make_network(kind=None)
    model.head.requires_grad_(False)
    assert count_costs(model, (3, 8, 8))[""].params == 269_722


def test_subtraction() -> None:
    assert subtract(Cost(10, 30, 5), [Cost(1, 3, 2), Cost(2, 6, 0)]) == Cost(7, 21, 3)
    assert subtract(Cost(10, 30, 5), iter([])) == Cost(10, 30, 5)


def test_a_module_may_be_given_a_view_of_a_parameter() -> None:
    """A learned query, one for each sample, or an embedding of positions with a dropout of its own."""

    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 6))
            self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.layer(self.query.expand(len(x), -1)) + self.frozen

    cost = count_costs(Pooling(), (6,))[""]
    forward = 2 * 6 * 6
    assert cost == Cost(forward, 3 * forward, 48)
