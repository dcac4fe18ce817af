"""Gates: their decisions, the gradient that passes them, and what they leave behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from greenprune.config import GateConfig
from greenprune.gating import (
    Gate,
    attach_gates,
    gate_parameters,
    gated_units,
    straight_through,
    take_decisions,
)
from greenprune.gating.gates import BOUND
from greenprune.models import residual_blocks

CHANNELS = 6


def gate_of(kind: str, openness: float = 0.9) -> Gate:
    return Gate(CHANNELS if kind == "conditional" else None, openness)


def two_sided_gate() -> tuple[Gate, Tensor]:
    """A gate that looks at the first channel, and a batch in which it is the largest in every second sample."""
    gate = Gate(CHANNELS, 0.9)
    x = torch.rand(8, CHANNELS, 4, 4)
    x[::2, 0] += 5
    x[1::2, 0] -= 5
    with torch.no_grad():
        gate.weight[0, 0] = 2.0
        gate.bias.zero_()
    return gate, x


@pytest.mark.parametrize("kind", ["conditional", "static"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_new_gate_is_open_for_every_input(kind: str, scale: float) -> None:
    gate = gate_of(kind, openness=0.8)
    assert gate(scale * torch.randn(16, CHANNELS, 4, 4)).tolist() == [1.0] * 16
    assert gate.openness.item() == pytest.approx(0.8)


def test_a_conditional_gate_decides_sample_by_sample() -> None:
    gate, x = two_sided_gate()
    assert gate(x).tolist() == [1.0, 0.0] * 4


def test_a_conditional_gate_does_not_see_the_scale_of_its_input() -> None:
    gate, x = two_sided_gate()
    gate(x)
    openness = gate.openness
    assert gate(1000 * x).tolist() == [1.0, 0.0] * 4
    torch.testing.assert_close(gate.openness, openness)


def test_a_conditional_gate_decides_a_sample_whatever_the_others_in_its_batch() -> None:
    gate, x = two_sided_gate()
    together = gate(x)
    alone = torch.cat([gate(sample[None]) for sample in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize(("bias", "expected"), [(0.1, 1.0), (0.0, 0.0), (-0.1, 0.0)])
def test_a_static_gate_decides_alike_for_all_inputs(bias: float, expected: float) -> None:
    gate = gate_of("static")
    nn.init.constant_(gate.bias, bias)
    assert gate(10 * torch.randn(16, CHANNELS, 4, 4)).tolist() == [expected] * 16


@pytest.mark.parametrize("kind", ["conditional", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decisions_are_single_precision_under_autocast(kind: str, dtype: torch.dtype) -> None:
    gate = gate_of(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decision = gate(torch.randn(4, CHANNELS, 3, 3).to(dtype))
    assert (decision.shape, decision.dtype) == ((4,), torch.float32)
    assert gate.openness.dtype == torch.float32
    assert gate.openness.item() == pytest.approx(0.9, abs=1e-6)  # bfloat16 would be off by 1e-3
    decision.sum().backward()
    assert gate.bias.grad.dtype == torch.float32


def test_a_whole_network_trains_its_gates_under_autocast(make_network: Callable[..., nn.Module]) -> None:
    model = make_network().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(4, 3, 8, 8)).float().logsumexp(1).sum()
    rates, openness = take_decisions([block.gate for block in gated_units(model).values()])
    (loss + rates.sum()).backward()
    assert (rates.dtype, openness.dtype) == (torch.float32, torch.float32)
    assert all(parameter.grad.abs().sum() > 0 for parameter in gate_parameters(model))


# The gradient.


def gradient(logits: list[float], upstream: list[float]) -> list[float]:
    logit = torch.tensor(logits, requires_grad=True)
    straight_through(logit).backward(torch.tensor(upstream))
    return logit.grad.tolist()


def test_the_gradient_passes_the_threshold_unchanged() -> None:
    upstream = [0.01, -0.02, 0.2, -0.25]
    assert gradient([-2.0, -0.1, 0.1, 2.9], upstream) == pytest.approx(upstream)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_gradient_of_a_sample_is_bounded_by_its_share_of_the_batch(batch: int) -> None:
    upstream = [1e6 * (-1) ** index for index in range(batch)]
    assert gradient([0.5] * batch, upstream) == pytest.approx([(-1) ** index / batch for index in range(batch)])


def test_one_sample_cannot_drown_the_others() -> None:
    assert gradient([0.5] * 4, [1e9, -0.2, 0.0, 0.1]) == pytest.approx([0.25, -0.2, 0.0, 0.1])


@pytest.mark.parametrize("beyond", [0.0, 2.0])
def test_at_the_bounds_only_the_inward_part_passes(beyond: float) -> None:
    logits = [BOUND + beyond, BOUND + beyond, -BOUND - beyond, -BOUND - beyond]
    # A step goes against the gradient: a positive one lowers the logit.
    assert gradient(logits, [0.1, -0.1, 0.1, -0.1]) == pytest.approx([0.1, 0.0, 0.0, -0.1])


def test_just_inside_the_bounds_both_directions_pass() -> None:
    inside = BOUND - 1e-3
    upstream = [0.1, -0.1, 0.1, -0.1]
    assert gradient([inside, inside, -inside, -inside], upstream) == pytest.approx(upstream)


@pytest.mark.parametrize("kind", ["conditional", "static"])
@pytest.mark.parametrize("direction", [1, -1])
def test_a_gate_driven_to_its_bound_stays_near_it_and_comes_back(kind: str, direction: int) -> None:
    gate = gate_of(kind)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    x = torch.randn(8, CHANNELS, 4, 4)

    def push(sign: int, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            (sign * gate(x).mean()).backward()
            optimizer.step()
        return gate.openness.item()

    at_bound = torch.sigmoid(torch.tensor(-BOUND * direction)).item()
    assert push(direction, 500) == pytest.approx(at_bound, abs=5e-3)
    assert abs(gate.bias.item()) < BOUND + 0.2  # unbounded it would be at 50
    push(-direction, 80)
    assert gate(x).tolist() == [float(direction > 0)] * 8


# Taking decisions.


def test_decisions_are_taken_once_with_their_gradient() -> None:
    gate, x = two_sided_gate()
    static = gate_of("static")
    static(x)
    gate(x)
    rates, openness = take_decisions([gate, static])
    assert rates.tolist() == [0.5, 1.0]
    assert openness.tolist() == [gate_openness(gate, x), pytest.approx(0.9)]
    assert not openness.requires_grad
    rates[0].backward()
    assert gate.bias.grad.item() == pytest.approx(1.0)
    assert static.bias.grad is None or static.bias.grad.item() == 0
    assert gate.decision is gate.openness is static.decision is static.openness is None
    with pytest.raises((RuntimeError, AssertionError)):
        take_decisions([gate, static])


def gate_openness(gate: Gate, x: Tensor) -> object:
    """Mean openness by its definition, with logits held at the bounds."""
    pooled = x.mean((2, 3))
    direction = (pooled - pooled.mean(1, keepdim=True)) / pooled.var(1, unbiased=False, keepdim=True).sqrt()
    logit = direction @ gate.weight[0] / math.sqrt(CHANNELS) + gate.bias
    return pytest.approx(torch.sigmoid(logit.clamp(-BOUND, BOUND)).mean().item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_evaluation_leaves_nothing_behind(kind: str) -> None:
    gate = gate_of(kind).eval()
    assert gate(torch.randn(4, CHANNELS, 2, 2)).tolist() == [1.0] * 4
    assert gate.decision is None
    assert gate.openness is None


def test_evaluation_keeps_what_training_left(make_network: Callable[..., nn.Module]) -> None:
    model = make_network().train()
    images = torch.randn(4, 3, 8, 8)
    model(images)
    model.eval()(torch.randn(2, 3, 8, 8))
    rates, _ = take_decisions([block.gate for block in gated_units(model).values()])
    assert rates.tolist() == [1.0] * 9
    assert rates.requires_grad


@pytest.mark.parametrize("taken", [True, False], ids=["decisions taken", "decisions left in the gates"])
def test_a_trained_gated_network_can_be_copied(make_network: Callable[..., nn.Module], taken: bool) -> None:
    model = make_network().train()
    images = torch.randn(4, 3, 8, 8)
    model(images).sum().backward()
    if taken:
        take_decisions([block.gate for block in gated_units(model).values()])
    twin = copy.deepcopy(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert torch.equal(twin.eval()(images), model.eval()(images))


# In a network.


@pytest.mark.parametrize("kind", ["conditional", "static"])
@pytest.mark.parametrize(("name", "units"), [("resnet20", 9), ("resnet18", 8), ("resnet50", 16)])
def test_every_residual_block_gets_a_gate(
    make_network: Callable[..., nn.Module], name: str, units: int, kind: str
) -> None:
    model = make_network(name, kind=None)
    names = attach_gates(model, GateConfig(kind=kind))  # type: ignore[arg-type]
    assert names == list(gated_units(model)) == list(residual_blocks(model))
    assert len(names) == units
    assert len(gate_parameters(model)) == units * (2 if kind == "conditional" else 1)
    assert model.train()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_open_gates_change_nothing(make_network: Callable[..., nn.Module]) -> None:
    model = make_network(kind=None)
    images = torch.randn(4, 3, 8, 8)
    ungated = model(images)
    attach_gates(model, GateConfig())
    torch.testing.assert_close(model(images), ungated)


def test_a_closed_gate_takes_its_branch_out_for_its_samples_only(make_network: Callable[..., nn.Module]) -> None:
    block = residual_blocks(make_network())["stages.0.1"].eval()
    nn.init.zeros_(block.gate.bias)
    nn.init.zeros_(block.gate.weight)
    block.gate.weight.data[0, 0] = 10.0
    x = torch.rand(4, 16, 8, 8)
    x[0, 0] += 5
    x[1:, 0] -= 5
    x = x.relu()
    out = block(x)
    assert torch.equal(out[1:], x[1:])
    torch.testing.assert_close(out[:1], (x[:1] + block.branch(x[:1])).relu())
