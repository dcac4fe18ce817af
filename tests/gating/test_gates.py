"""Gates: their decisions, the gradient that passes them, and what they leave behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from greenprune.config import GateConfig
from greenprune.gating import (
    BlockGate,
    ChannelGate,
    Gate,
    attach_gates,
    find_gates,
    gate_parameters,
    straight_through,
    take_decisions,
)
from greenprune.gating.gates import BOUND, CURVATURE, hold_within_bounds
from greenprune.models import residual_blocks
from greenprune.models.residual import ResidualBlock

CHANNELS = 6


def gate_of(kind: str, openness: float = 0.9) -> Gate:
    return BlockGate(CHANNELS if kind == "conditional" else None, openness)


def two_sided_gate() -> tuple[Gate, Tensor]:
    """A gate that looks at the first channel, and a batch in which it is the largest in every second sample."""
    gate = BlockGate(CHANNELS, 0.9)
    x = torch.rand(8, CHANNELS, 4, 4)
    x[::2, 0] += 5
    x[1::2, 0] -= 5
    with torch.no_grad():
        gate.weight[0, 0] = 2.0
        gate.bias.zero_()
    return gate, x


def openness_of(gate: Gate) -> float:
    """Mean openness of the last forward pass, whose decisions stay in the gate."""
    assert not gate.logit.requires_grad
    return gate.logit.sigmoid().mean().item()


@pytest.mark.parametrize("kind", ["conditional", "static"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_new_gate_is_open_for_every_input(kind: str, scale: float) -> None:
    gate = gate_of(kind, openness=0.8)
    assert gate(scale * torch.randn(16, CHANNELS, 4, 4)).tolist() == [1.0] * 16
    assert openness_of(gate) == pytest.approx(0.8)


def test_a_conditional_gate_decides_sample_by_sample() -> None:
    gate, x = two_sided_gate()
    assert gate(x).tolist() == [1.0, 0.0] * 4


def test_a_conditional_gate_does_not_see_the_scale_of_its_input() -> None:
    gate, x = two_sided_gate()
    gate(x)
    logit = gate.logit
    assert gate(1000 * x).tolist() == [1.0, 0.0] * 4
    torch.testing.assert_close(gate.logit, logit)


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
    assert (gate.logit.shape, gate.logit.dtype) == ((4, 1), torch.float32)
    assert openness_of(gate) == pytest.approx(0.9, abs=1e-6)  # bfloat16 would be off by 1e-3
    decision.sum().backward()
    assert gate.bias.grad.dtype == torch.float32


def test_a_whole_network_trains_its_gates_under_autocast(make_network: Callable[..., nn.Module]) -> None:
    model = make_network().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(4, 3, 8, 8)).float().logsumexp(1).sum()
    rates, openness = take_decisions(list(find_gates(model).values()))
    (loss + rates.sum()).backward()
    assert (rates.dtype, openness.dtype) == (torch.float32, torch.float32)
    assert all(parameter.grad.abs().sum() > 0 for parameter in gate_parameters(model))


# The gradient.


def gradient(logits: list[float], upstream: list[float]) -> list[float]:
    logit = torch.tensor(logits, requires_grad=True)
    straight_through(logit)[1].backward(torch.tensor(upstream))
    return logit.grad.tolist()


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("loss_scale", [None, 1024.0])
def test_the_tasks_gradient_is_what_the_loss_loses_with_the_unit_to_second_order(
    parts: int, loss_scale: float | None
) -> None:
    """For losses ``(t - g v)^2 / 2`` with t = v + e the square of the gradient is the curvature times e^2."""
    value = torch.tensor([0.3, -0.5, 0.2, 0.4])
    noise = torch.tensor([1.0, -1.0, -1.0, 1.0]) / math.sqrt(CURVATURE)
    logit = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    scale = None if loss_scale is None else torch.tensor(loss_scale)
    decision, _ = straight_through(logit, scale, parts=parts)
    losses = (value + noise - decision * value).square() / 2
    (losses.mean() / parts * (loss_scale or 1.0)).backward()
    without, with_it = (value + noise).square() / 2, noise.square() / 2
    exactly = (with_it - without) / 4 / parts
    assert (logit.grad / (loss_scale or 1.0)).tolist() == pytest.approx(exactly.tolist())


def test_a_unit_that_is_off_has_its_gradient_as_it_is() -> None:
    logit = torch.tensor([-0.5, -0.5, 0.5, 0.5], requires_grad=True)
    straight_through(logit)[0].backward(torch.tensor([0.1, -0.1, 0.1, -0.1]))
    # Of a mean over four: 4 * 0.1 is the gradient of a sample's own loss.
    bent = [(0.4 - CURVATURE * 0.4**2 / 2) / 4, (-0.4 - CURVATURE * 0.4**2 / 2) / 4]
    assert logit.grad.tolist() == pytest.approx([0.1, -0.1, *bent])


def test_a_unit_without_a_mean_gradient_is_held_by_its_curvature() -> None:
    """Where batch norm has trained a branch's scale, the first order says nothing of what the branch is worth."""
    logit = torch.full((64,), 0.5, requires_grad=True)
    towards = torch.randn(64, generator=torch.Generator().manual_seed(0)).mul_(0.1 / 64)
    straight_through(logit)[0].backward(towards - towards.mean())
    assert logit.grad.sum().item() == pytest.approx(-CURVATURE * 0.005, rel=0.3)  # mean square of 0.1


def test_the_gradient_passes_the_threshold_unchanged() -> None:
    upstream = [0.01, -0.02, 0.2, -0.25]
    assert gradient([-2.0, -0.1, 0.1, 2.9], upstream) == pytest.approx(upstream)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_gradient_of_a_sample_is_bounded_by_its_share_of_the_batch(batch: int) -> None:
    upstream = [1e6 * (-1) ** index for index in range(batch)]
    assert gradient([0.5] * batch, upstream) == pytest.approx([(-1) ** index / batch for index in range(batch)])


@pytest.mark.parametrize("units", [1, 9, 64])
def test_the_gradient_of_a_channel_grows_with_the_root_of_their_number(units: int) -> None:
    gate = ChannelGate(units, 0.9, 1, conditional=False)
    gate(torch.rand(2, units, 3, 3))
    (0.01 * gate.decision).sum().backward()
    assert gate.bias.grad.tolist() == pytest.approx([2 * 0.01 * math.sqrt(units)] * units)


def test_one_sample_cannot_drown_the_others() -> None:
    assert gradient([0.5] * 4, [1e9, -0.2, 0.0, 0.1]) == pytest.approx([0.25, -0.2, 0.0, 0.1])


@pytest.mark.parametrize("samples", [1, 5, 6, 64])
@pytest.mark.parametrize("every", [2, 3])
def test_the_first_of_every_few_samples_speaks_for_all_of_them(samples: int, every: int) -> None:
    logit = torch.full((samples, 2), 0.5, requires_grad=True)
    straight_through(logit, every=every)[1].backward(torch.full((samples, 2), 0.3 / samples))
    voices = logit.grad[::every]
    assert voices.sum(0).tolist() == pytest.approx([0.3, 0.3])  # as with every sample
    assert (voices == voices[0]).all()
    assert logit.grad.sum(0).tolist() == pytest.approx([0.3, 0.3])  # nobody else says anything


def test_what_a_few_samples_say_for_others_is_bounded_by_the_share_of_all_of_them() -> None:
    logit = torch.tensor([0.5, 0.5, 0.5, 0.5, BOUND, BOUND], requires_grad=True)
    upstream = torch.tensor([9.0, -9.0, -9.0, 9.0, -0.1, 9.0])
    straight_through(logit, every=2)[1].backward(upstream)
    # The last that speaks is at its bound and may not go further up.
    assert logit.grad.tolist() == pytest.approx([2 / 6, 0, -2 / 6, 0, 0, 0])


@pytest.mark.parametrize("units", [["block"], ["channel"], ["block", "channel"]])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gates_that_learn_from_a_few_samples_leave_the_networks_own_gradients_alone(
    make_network: Callable[..., nn.Module], units: list[str], precision: torch.dtype
) -> None:
    images = torch.randn(9, 3, 8, 8)

    def gradients(every: int, rows: slice) -> tuple[dict[str, Tensor], Tensor]:
        """Of all parameters; and for each unit the bounded gradient of some samples' decisions, summed."""
        torch.manual_seed(0)
        model = make_network(kind=None).train()
        attach_gates(model, GateConfig(units=units, every=every))  # type: ignore[arg-type]
        gates = list(find_gates(model).values())
        decisions: list[Tensor] = []
        for gate in gates:
            gate.register_forward_hook(lambda _, __, decision: decisions.append(decision))
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            loss = model(images).float().logsumexp(1).mean()
        towards = torch.autograd.grad(loss, decisions, retain_graph=True)
        take_decisions(gates)
        loss.backward()
        samples = len(images)
        bent = [grad.view(samples, -1) for grad in towards]
        bent = [grad - CURVATURE * samples / 2 * grad.square() for grad in bent]  # all units are on
        bounded = [(gate.gain * grad).clamp(-1 / samples, 1 / samples) for gate, grad in zip(gates, bent, strict=True)]
        told = torch.cat([grad[rows].sum(0) for grad in bounded])
        return {name: parameter.grad for name, parameter in model.named_parameters()}, told

    all_of_them, told = gradients(1, slice(None, None, 4))
    some, _ = gradients(4, slice(None))
    assert all_of_them.keys() == some.keys()
    biases = []
    for name, gradient in some.items():
        if name.endswith("gate.bias"):
            biases.append(gradient)
        elif "gate." not in name:
            assert torch.equal(gradient, all_of_them[name]), name
    # Samples 0, 4 and 8 of 9 speak, each for three. The order of the gates is that of the parameters.
    torch.testing.assert_close(torch.cat(biases).sort().values, (3 * told).sort().values, rtol=2e-2, atol=1e-6)


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
        return openness_of(gate)

    at_bound = torch.sigmoid(torch.tensor(-BOUND * direction)).item()
    # A conditional gate's weight takes single logits a little past the bound.
    assert push(direction, 500) == pytest.approx(at_bound, abs=5e-3 if kind == "static" else 2e-2)
    assert abs(gate.bias.item()) < BOUND + 0.2  # unbounded it would be at 50
    push(-direction, 80)
    assert gate(x).tolist() == [float(direction > 0)] * 8


@pytest.mark.parametrize("kind", ["conditional", "static"])
@pytest.mark.parametrize("direction", [1, -1])
def test_momentum_carries_no_gate_past_its_bounds(kind: str, direction: int) -> None:
    x = torch.randn(8, CHANNELS, 4, 4)

    def push(gate: Gate, optimizer: torch.optim.Optimizer, sign: int, steps: int, held: bool) -> list[float]:
        biases = []
        for _ in range(steps):
            optimizer.zero_grad()
            (-sign * gate(x).mean()).backward()
            optimizer.step()
            if held:
                hold_within_bounds([gate])
            biases.append(sign * gate.bias.item())
        return biases

    gates = [gate_of(kind) for _ in range(2)]
    optimizers = [torch.optim.SGD(gate.parameters(), lr=0.1, momentum=0.9) for gate in gates]
    held = push(gates[0], optimizers[0], direction, 300, True)
    unheld = push(gates[1], optimizers[1], direction, 300, False)
    assert max(unheld) > BOUND + 1  # the test would notice
    assert max(held) <= BOUND
    assert held[-1] == pytest.approx(BOUND)
    back = push(gates[0], optimizers[0], -direction, 30, True)
    assert max(back) <= BOUND
    assert next(step for step, bias in enumerate(back) if bias > 0) < 15
    assert gates[0](x).tolist() == [float(direction < 0)] * 8


def test_holding_a_gate_changes_its_bias_in_place_and_only_if_it_must() -> None:
    gates = [gate_of("conditional"), gate_of("static"), gate_of("static")]
    parameters = gate_parameters(nn.ModuleList(gates))
    nn.init.constant_(gates[0].weight, 50.0)
    for gate, bias in zip(gates, (4.0, -70.0, -2.9), strict=True):
        nn.init.constant_(gate.bias, bias)
    hold_within_bounds(gates)
    assert [gate.bias.item() for gate in gates] == [BOUND, -BOUND, pytest.approx(-2.9)]
    assert torch.equal(gates[0].weight, torch.full((1, CHANNELS), 50.0))
    assert all(one is other for one, other in zip(parameters, gate_parameters(nn.ModuleList(gates)), strict=True))
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in parameters)


# The gradient under mixed precision, which scales the loss (fp16).


def scaled_case(kind: str) -> tuple[Gate, Tensor, Tensor]:
    """A gate, a batch, and gradients of its decisions: far beyond the bound, within it, and far below."""
    gate = gate_of(kind)
    if gate.weight is not None:
        nn.init.normal_(gate.weight, std=0.5)
    upstream = torch.tensor([9.0, -9.0, 40.0, 0.03, -0.02, 1e-5, 0.0, 0.12])
    return gate, torch.randn(len(upstream), CHANNELS, 4, 4), upstream


def gradients_of(gate: Gate, loss: Tensor) -> list[Tensor]:
    gate.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in gate.parameters()]


@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_a_scaled_loss_leaves_the_same_gradients_once_they_are_unscaled(kind: str) -> None:
    gate, x, upstream = scaled_case(kind)
    expected = gradients_of(gate, gate(x) @ upstream)
    assert all(gradient.abs().sum() > 0 for gradient in expected)

    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    scaler.scale(torch.ones(()))  # makes the factor
    gate.loss_scale = scaler._scale
    for scale in (65536.0, 1024.0, 1.0):
        scaler.update(scale)  # the gate follows: it holds the scaler's own tensor
        optimizer.zero_grad()
        scaler.scale(gate(x) @ upstream).backward()
        assert gate.bias.grad.item() == pytest.approx(scale * expected[-1].item())
        scaler.unscale_(optimizer)
        found = [parameter.grad for parameter in gate.parameters()]
        # The factor is a power of two: nothing is rounded.
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        scaler.step(optimizer)


@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_a_gate_that_is_not_told_of_the_scale_would_bound_its_gradient_too_tightly(kind: str) -> None:
    gate, x, upstream = scaled_case(kind)
    expected = gradients_of(gate, gate(x) @ upstream)
    unaware = gradients_of(gate, 65536.0 * (gate(x) @ upstream))
    assert (unaware[-1] / 65536.0).abs() < 1e-3 * expected[-1].abs()


def test_the_scaled_gradient_is_bounded_at_the_bounds_as_well() -> None:
    logit = torch.tensor([BOUND, BOUND, -BOUND, 0.5], requires_grad=True)
    upstream = torch.tensor([0.1, -0.1, 0.1, -7.0])
    straight_through(logit, torch.tensor(512.0))[1].backward(512.0 * upstream)
    assert (logit.grad / 512).tolist() == pytest.approx([0.1, 0.0, 0.0, -0.25])


# Gates watch.


def test_no_gradient_goes_from_the_decision_into_what_it_looks_at() -> None:
    gate, x = two_sided_gate()
    x.requires_grad_()
    gate(x).sum().backward()
    assert x.grad is None
    assert gate.weight.grad.abs().sum() > 0


class Given(nn.Module):
    """Gives one tensor, whatever it is shown."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.tensor


def test_the_gradient_of_a_blocks_input_is_that_with_the_decisions_given(
    make_network: Callable[..., nn.Module],
) -> None:
    block = residual_blocks(make_network())["stages.0.1"].train()
    nn.init.zeros_(block.gate.bias)
    nn.init.normal_(block.gate.weight)
    x = torch.randn(16, 16, 8, 8, requires_grad=True)
    decided = block.gate(x).detach()
    assert 0 < decided.mean() < 1

    def gradient() -> Tensor:
        (gradient,) = torch.autograd.grad(block(x).square().sum(), x)
        return gradient

    with_gate = gradient()
    block.gate = Given(decided)
    assert torch.equal(with_gate, gradient())


@pytest.mark.parametrize("shortcut", [nn.Identity(), nn.Conv2d(CHANNELS, CHANNELS, 1)], ids=["identity", "projection"])
@pytest.mark.parametrize("size", [1, 6])
def test_open_gates_have_the_gradient_of_their_branch(shortcut: nn.Module, size: int) -> None:
    """The way that does not keep the branch's output gives what autograd gives with it."""
    branch = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    block = ResidualBlock(branch, shortcut, nn.ReLU(inplace=True), input_activated=True)
    decision = torch.ones(5, requires_grad=True)
    block.gate = Given(decision)
    x = torch.randn(5, CHANNELS, size, size, requires_grad=True)
    weights = torch.randn(5, CHANNELS, size, size)

    def gradients(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((out * weights).square().sum(), [x, decision, *block.parameters()]))

    found = gradients(block(x))
    expected = gradients(torch.relu(shortcut(x) + decision.view(-1, 1, 1, 1) * branch(x)))
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(found, expected, strict=True))


def test_open_gates_keep_no_more_for_the_backward_than_no_gates() -> None:
    branch = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS))
    block = ResidualBlock(branch, nn.Identity(), nn.ReLU(inplace=True), input_activated=True)
    x = torch.randn(5, CHANNELS, 8, 8, requires_grad=True)

    def kept() -> set[int]:
        storages: set[int] = set()

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() >= x.numel():
                storages.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = block(x)
        assert out.requires_grad
        return storages

    without = len(kept())
    decision = torch.ones(5, requires_grad=True)
    block.gate = Given(decision)
    assert len(kept()) == without
    decision.data[0] = 0.0
    assert len(kept()) == without + 1  # for a sample that is off, the branch cannot be told from the result


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
    assert gate.decision is gate.logit is static.decision is static.logit is None
    with pytest.raises(RuntimeError, match="not decided anything"):
        take_decisions([gate, static])


def test_decisions_without_a_gradient_are_taken_only_where_none_is_kept() -> None:
    gate, x = two_sided_gate()
    with torch.no_grad():
        gate(x)
        rates, _ = take_decisions([gate])
        gate(x)
    assert rates.tolist() == [0.5]
    with pytest.raises(RuntimeError, match="would learn nothing"):
        take_decisions([gate])


def gate_openness(gate: Gate, x: Tensor) -> object:
    """Mean openness by its definition."""
    pooled = x.mean((2, 3))
    direction = (pooled - pooled.mean(1, keepdim=True)) / pooled.var(1, unbiased=False, keepdim=True).sqrt()
    logit = direction @ gate.weight[0] / math.sqrt(CHANNELS) + gate.bias
    return pytest.approx(torch.sigmoid(logit).mean().item(), rel=1e-4)


def test_openness_is_that_of_the_logits_as_they_are() -> None:
    """Not of logits held at the bounds: units past them are still told apart."""
    conditional, x = two_sided_gate()
    nn.init.constant_(conditional.weight, 0.0)
    conditional.weight.data[0, 0] = 9.0
    static, further = gate_of("static"), gate_of("static")
    nn.init.constant_(static.bias, -BOUND - 0.5)
    nn.init.constant_(further.bias, -BOUND - 1.0)
    for gate in (conditional, static, further):
        gate(x)
    assert conditional.logit.abs().max() > BOUND
    _, openness = take_decisions([conditional, static, further])
    expected = [1 / (1 + math.exp(BOUND + beyond)) for beyond in (0.5, 1.0)]
    assert openness.tolist() == [gate_openness(conditional, x), *map(pytest.approx, expected)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_a_gate_can_be_trained_after_an_evaluation_of_as_many_samples(kind: str, mode: Callable[[], Any]) -> None:
    gate, x = gate_of(kind), torch.randn(4, CHANNELS, 2, 2)
    with mode():
        evaluated = gate.eval()(x)
    decision = gate.train()(x)
    assert torch.equal(decision, evaluated)
    (4 * take_decisions([gate])[0]).sum().backward()
    assert gate.bias.grad.item() == pytest.approx(1.0)  # at first each of four may pull by a quarter


@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_evaluation_leaves_nothing_behind(kind: str) -> None:
    gate = gate_of(kind).eval()
    assert gate(torch.randn(4, CHANNELS, 2, 2)).tolist() == [1.0] * 4
    assert gate.decision is None
    assert gate.logit is None


def test_evaluation_keeps_what_training_left(make_network: Callable[..., nn.Module]) -> None:
    model = make_network().train()
    images = torch.randn(4, 3, 8, 8)
    model(images)
    model.eval()(torch.randn(2, 3, 8, 8))
    rates, _ = take_decisions(list(find_gates(model).values()))
    assert rates.tolist() == [1.0] * 9
    assert rates.requires_grad


@pytest.mark.parametrize("taken", [True, False], ids=["decisions taken", "decisions left in the gates"])
def test_a_trained_gated_network_can_be_copied(make_network: Callable[..., nn.Module], taken: bool) -> None:
    model = make_network().train()
    images = torch.randn(4, 3, 8, 8)
    model(images).sum().backward()
    if taken:
        take_decisions(list(find_gates(model).values()))
    twin = copy.deepcopy(model)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert torch.equal(twin.eval()(images), model.eval()(images))


@pytest.mark.parametrize("kind", ["conditional", "static"])
def test_a_gate_that_holds_decisions_can_be_copied(kind: str) -> None:
    gate = gate_of(kind)
    gate.loss_scale = torch.tensor(2.0)
    gate(torch.randn(4, CHANNELS, 2, 2))
    decided = gate.decision
    twin = copy.deepcopy(gate)
    assert twin.decision is twin.logit is twin.loss_scale is None
    assert all(torch.equal(one, other) for one, other in zip(twin.parameters(), gate.parameters(), strict=True))
    assert twin.bias is not gate.bias
    assert gate.decision is decided  # the original can still be trained
    rates, _ = take_decisions([gate])
    rates.sum().backward()
    assert gate.bias.grad.item() == pytest.approx(1.0)
    assert twin.bias.grad is None


# In a network.


@pytest.mark.parametrize("kind", ["conditional", "static"])
@pytest.mark.parametrize(("name", "units"), [("resnet20", 9), ("resnet18", 8), ("resnet50", 16)])
def test_every_residual_block_gets_a_gate(
    make_network: Callable[..., nn.Module], name: str, units: int, kind: str
) -> None:
    model = make_network(name, kind=None)
    names = attach_gates(model, GateConfig(kind=kind))  # type: ignore[arg-type]
    assert names == list(find_gates(model)) == list(residual_blocks(model))
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


# The sum in a gated block.


def terms(
    dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format, *, binary: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shortcut, branch and decisions, all to be differentiated, and a gradient to send back."""
    shortcut, branch, upstream = (torch.randn(6, 5, 4, 3).to(dtype=dtype, memory_format=layout) for _ in range(3))
    decision = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]) if binary else torch.rand(6)
    decision = decision.double() if dtype == torch.float64 else decision
    return shortcut.requires_grad_(), branch.requires_grad_(), decision.requires_grad_(), upstream


def gated_sum(shortcut: Tensor, branch: Tensor, decision: Tensor) -> Tensor:
    """As a block computes it."""
    block = ResidualBlock(Given(branch), Given(shortcut), nn.Identity(), input_activated=False)
    block.gate = Given(decision)
    out: Tensor = block(shortcut)
    return out


def plain_sum(shortcut: Tensor, branch: Tensor, decision: Tensor) -> Tensor:
    return shortcut + decision.to(branch.dtype).view(-1, 1, 1, 1) * branch


LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"]
)


@LAYOUTS
@pytest.mark.parametrize("binary", [True, False], ids=["decisions", "any factors"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gated_sum_and_its_gradients_are_those_of_autograd(
    dtype: torch.dtype, binary: bool, layout: torch.memory_format
) -> None:
    *inputs, upstream = terms(dtype, layout, binary=binary)
    out = gated_sum(*inputs)
    found = torch.autograd.grad(out, inputs, upstream)
    # The reference is computed in double precision, so that in bfloat16 its own rounding does not count.
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    wanted = plain_sum(*exact)
    expected = torch.autograd.grad(wanted, exact, upstream.double())
    assert out.dtype == dtype
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out, wanted.to(dtype), **close)
    for tensor, gradient, reference in zip(inputs, found, expected, strict=True):
        assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
        # A decision's gradient sums 60 products, each rounded to bfloat16.
        wide = {"rtol": 1e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(gradient, reference.to(gradient.dtype), **wide)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gated_sum_keeps_the_layout_of_the_activations(dtype: torch.dtype, layout: torch.memory_format) -> None:
    *inputs, upstream = terms(dtype, layout)
    out = gated_sum(*inputs)
    towards_shortcut, towards_branch, _ = torch.autograd.grad(out, inputs, upstream)
    for tensor in (out, towards_shortcut, towards_branch):
        assert tensor.is_contiguous(memory_format=layout)


def test_decisions_are_exact_in_half_precision() -> None:
    shortcut, branch, decision, upstream = terms(torch.bfloat16)
    out = gated_sum(shortcut, branch, decision)
    off = decision == 0
    assert torch.equal(out[off], shortcut[off])
    assert torch.equal(out[~off], (shortcut + branch)[~off])
    towards_shortcut, towards_branch, _ = torch.autograd.grad(out, (shortcut, branch, decision), upstream)
    assert torch.equal(towards_shortcut, upstream)
    assert torch.equal(towards_branch[~off], upstream[~off])
    assert towards_branch[off].abs().max() == 0


def test_the_gated_sum_passes_autograds_own_check() -> None:
    *inputs, _ = terms(torch.float64, binary=False)
    assert torch.autograd.gradcheck(gated_sum, inputs)


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU()], ids=["no activation", "ReLU"])
@pytest.mark.parametrize("all_on", [True, False], ids=["all on", "some off"])
def test_with_a_gradient_for_every_third_decision_only_the_others_have_none(
    activation: nn.Module, all_on: bool
) -> None:
    shortcut, branch, decision, upstream = terms(torch.float32)
    if all_on:
        decision = torch.ones(6, requires_grad=True)
    block = ResidualBlock(Given(branch), Given(shortcut), activation, input_activated=False)
    block.gate = Given(decision)
    wanted = torch.autograd.grad(block(shortcut), (shortcut, branch, decision), upstream)
    block.every = 3
    found = torch.autograd.grad(block(shortcut), (shortcut, branch, decision), upstream)
    assert all(torch.equal(one, other) for one, other in zip(found[:2], wanted[:2], strict=True))
    assert found[2].tolist() == [wanted[2][0].item(), 0, 0, wanted[2][3].item(), 0, 0]


@pytest.mark.parametrize("wide", ["shortcut", "branch"])
def test_under_autocast_the_terms_may_differ_in_precision(wide: str) -> None:
    shortcut, branch, decision, upstream = terms(torch.float32)
    given = [shortcut, branch.bfloat16()] if wide == "shortcut" else [shortcut.bfloat16(), branch]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, wanted = gated_sum(*given, decision), plain_sum(*given, decision)
    assert out.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out, (shortcut, branch, decision), upstream)
    expected = torch.autograd.grad(wanted, (shortcut, branch, decision), upstream)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-2, atol=5e-2)


def test_a_process_without_samples_counts_none() -> None:
    """As one of several whose last batch is empty; the others' rates are not lost in what is no number."""
    conditional, static = gate_of("conditional"), gate_of("static")
    conditional(torch.randn(0, CHANNELS, 2, 2))
    static(torch.randn(0, CHANNELS, 2, 2))
    rates, openness = take_decisions([conditional, static])
    assert rates.tolist() == openness.tolist() == [0.0, 0.0]
    rates.sum().backward()
    assert static.bias.grad is not None
    assert static.bias.grad.item() == 0.0
