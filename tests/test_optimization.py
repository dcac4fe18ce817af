"""The optimizer's groups and the learning rate over the run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from greenprune.config import Config, GateConfig, OptimConfig
from greenprune.gating import gate_parameters
from greenprune.optimization import WeightAverage, build_optimizer, build_schedule, load_optimizer
from greenprune.surgery import Surgeon

MakeNetwork = Callable[..., nn.Module]
TOTAL = 100


def config_of(**optim: Any) -> Config:
    return Config(optim=OptimConfig(**{"lr": 0.4, "warmup": 0.1, **optim}), gate=GateConfig(lr=30.0))


@pytest.mark.parametrize("kind", ["conditional", "static", None])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_every_parameter_is_in_one_group(make_network: MakeNetwork, name: str, kind: str | None) -> None:
    model = make_network(kind=kind)
    optimizer = build_optimizer(config_of(name=name, weight_decay=0.01), model, TOTAL)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert list(groups) == ["decayed", "undecayed", "gates"]
    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len(list(model.parameters()))
    assert set(grouped) == set(model.parameters())
    assert set(groups["gates"]["params"]) == set(gate_parameters(model))
    assert len(groups["gates"]["params"]) == {"conditional": 18, "static": 9, None: 0}[str(kind) if kind else None]
    assert {parameter.ndim for parameter in groups["decayed"]["params"]} == {2, 4}
    assert {parameter.ndim for parameter in groups["undecayed"]["params"]} == {1}
    assert [group["weight_decay"] for group in groups.values()] == [0.01, 0.0, 0.0]


@pytest.mark.parametrize("total", [10, 3000])
def test_the_gates_rate_is_a_length_spread_over_the_run(make_network: MakeNetwork, total: int) -> None:
    optimizer = build_optimizer(config_of(), make_network(), total)
    build_schedule(config_of(), optimizer, total)
    assert optimizer.param_groups[2]["lr"] == pytest.approx(30.0 / total)


def test_sgd_has_nesterov_momentum_where_there_is_momentum(make_network: MakeNetwork) -> None:
    model = make_network()
    with_momentum = build_optimizer(config_of(momentum=0.8), model, TOTAL)
    assert isinstance(with_momentum, torch.optim.SGD)
    assert {(group["momentum"], group["nesterov"]) for group in with_momentum.param_groups} == {(0.8, True)}
    without = build_optimizer(config_of(momentum=0.0), model, TOTAL)
    assert {(group["momentum"], group["nesterov"]) for group in without.param_groups} == {(0.0, False)}


def test_adamw_is_adamw(make_network: MakeNetwork) -> None:
    assert isinstance(build_optimizer(config_of(name="adamw"), make_network(), TOTAL), torch.optim.AdamW)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_matrices_of_weights_decay(make_network: MakeNetwork, name: str) -> None:
    """With no gradient from the data, only decay moves anything."""
    model = make_network()
    optimizer = build_optimizer(config_of(name=name, weight_decay=0.1, warmup=0.0, momentum=0.0), model, TOTAL)
    before = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    gates = set(gate_parameters(model))
    for parameter, old in before.items():
        factor = 1 - 0.4 * 0.1 if parameter.ndim > 1 and parameter not in gates else 1.0
        torch.testing.assert_close(parameter.detach(), factor * old)


def rates(config: Config, total: int = TOTAL) -> list[list[float]]:
    """Learning rates of the groups at each step, and after the last."""
    parameters = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))]
    model = nn.ParameterList(parameters)
    optimizer = build_optimizer(config, model, total)
    schedule = build_schedule(config, optimizer, total)
    seen = []
    for _ in range(total):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    seen.append([group["lr"] for group in optimizer.param_groups])
    return seen


def test_the_rate_warms_up_and_follows_a_cosine_to_zero() -> None:
    seen = rates(config_of())
    weights = [step[0] for step in seen]
    assert weights[0] == pytest.approx(0.4 / 11)
    assert weights[4] == pytest.approx(0.4 * 5 / 11)
    assert weights[9] == pytest.approx(0.4 * 10 / 11)
    assert weights[10] == pytest.approx(0.4)
    assert weights[55] == pytest.approx(0.2)
    assert 0 < weights[99] < 0.001
    assert weights[100] == pytest.approx(0.0, abs=1e-12)
    assert max(weights) == weights[10]
    assert weights[:11] == sorted(weights[:11])
    assert weights[10:] == sorted(weights[10:], reverse=True)
    assert weights == [step[1] for step in seen]


def test_the_gates_rate_is_constant() -> None:
    assert {step[2] for step in rates(config_of())} == {0.3}


def test_a_constant_schedule_stays_at_its_peak() -> None:
    weights = [step[0] for step in rates(config_of(schedule="constant"))]
    assert weights[0] == pytest.approx(0.4 / 11)
    assert weights[10:] == [0.4] * 91


def test_without_a_warm_up_the_first_step_has_the_peak_rate() -> None:
    weights = [step[0] for step in rates(config_of(warmup=0.0))]
    assert weights[0] == 0.4
    assert weights[50] == pytest.approx(0.2)


@pytest.mark.parametrize("total", [1, 2, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.99])
def test_a_very_short_run_has_a_rate_at_every_step(total: int, warmup: float) -> None:
    weights = [step[0] for step in rates(config_of(warmup=warmup), total)][:total]
    assert all(0 < rate <= 0.4 for rate in weights)


def test_the_schedule_goes_on_from_its_state() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(2, 2))])
    optimizers = [build_optimizer(config_of(), model, TOTAL) for _ in range(2)]
    first, second = (build_schedule(config_of(), optimizer, TOTAL) for optimizer in optimizers)
    for _ in range(37):
        optimizers[0].step()
        first.step()
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for optimizer, schedule in zip(optimizers, (first, second), strict=True):
        optimizer.step()
        schedule.step()
    assert first.get_last_lr() == second.get_last_lr()
    assert optimizers[0].param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"]


def test_the_average_forgets_where_it_started(make_network: MakeNetwork) -> None:
    model = make_network()
    average = WeightAverage(model, decay=0.5)
    average.link(model)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        average.update(step)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = [kept * old + (1 - kept) * p.detach() for old, p in zip(expected, model.parameters(), strict=True)]
    for mine, theirs in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_the_average_takes_in_running_statistics(make_network: MakeNetwork) -> None:
    model = make_network()
    average = WeightAverage(model, decay=0.9)
    average.link(model)
    for step in range(200):
        model.train()(torch.randn(4, 3, 8, 8) + 3.0)
        average.update(step)
    ours, theirs = dict(average.module.named_buffers()), dict(model.named_buffers())
    name = next(name for name in ours if name.endswith("running_mean"))
    torch.testing.assert_close(ours[name], theirs[name], rtol=0.2, atol=0.2)


def test_the_average_goes_through_the_same_operations(make_network: MakeNetwork) -> None:
    model = make_network()
    average = WeightAverage(model, decay=0.5)
    for network in (model, average.module):
        Surgeon(network).remove_block("stages.1.1")
    average.link(model)
    average.update(0)
    assert sum(p.numel() for p in average.module.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("skipped", [False, True])
def test_a_step_that_is_left_out_leaves_the_average_alone(make_network: MakeNetwork, skipped: bool) -> None:
    model = make_network()
    average, plain = WeightAverage(model, decay=0.5), WeightAverage(model, decay=0.5)
    average.link(model)
    plain.link(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = [parameter.clone() for parameter in average.module.parameters()]
    average.update(20, torch.tensor(float(skipped)))
    plain.update(20)
    expected = before if skipped else list(plain.module.parameters())
    for mine, theirs in zip(average.module.parameters(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_state_saved_row_by_row_fits_weights_laid_out_channels_last(make_network: MakeNetwork, name: str) -> None:
    """The fused kernels go through both in the order of memory, as they lie."""

    def stepped(layout: torch.memory_format) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = make_network(kind=None).to(memory_format=layout)
        optimizer = build_optimizer(config_of(name=name), model, TOTAL)
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.empty_like(parameter).copy_(
                torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape) * (number + 1)
            )
        return model, optimizer

    plain, optimizer = stepped(torch.contiguous_format)
    optimizer.step()
    other, resumed = stepped(torch.channels_last)
    other.load_state_dict(plain.state_dict())
    load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()))
    for taken in (optimizer, resumed):
        taken.step()
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-7)


def test_gates_learn_as_fast_as_the_noise_of_their_gradient_allows() -> None:
    """A step moves a gate by its mean gradient and by noise, which is the less the more samples it learns from."""
    assert GateConfig().lr_of_step(2808, 128, adaptive=False) == 300 / 2808  # sqrt(2808 * 128 / 4), to two digits
    assert GateConfig(every=1).lr_of_step(2808, 128, adaptive=False) == 600 / 2808
    assert GateConfig().lr_of_step(2808, 512, adaptive=False) == 600 / 2808
    assert GateConfig().lr_of_step(2808, 512, adaptive=True) == 30 / 2808
    assert GateConfig(lr=7.0).lr_of_step(1000, 512, adaptive=True) == 7 / 1000
