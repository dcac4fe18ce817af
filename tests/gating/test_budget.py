"""The budget: shares of cost, rates over all ranks, the price of keeping too much, and the penalty made of them."""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from greenprune.config import BudgetConfig, Config, ConfigError, GateConfig, RemovalConfig
from greenprune.gating import (
    BudgetController,
    GatePolicy,
    UnitCosts,
    Verdict,
    attach_gates,
    default_window,
    find_gates,
    gate_parameters,
    gated_units,
    global_rates,
    polarization,
    take_decisions,
)
from greenprune.gating.gates import BOUND
from greenprune.models import ResidualBlock
from greenprune.surgery import Surgeon

CPU = torch.device("cpu")


def controller(target: float = 0.4, **changes: int) -> BudgetController:
    steps = {"passes": 1000, "warmup_end": 100, "ramp_end": 500, **changes}
    return BudgetController(target, **steps, device=CPU)


def pay(budget: BudgetController, kept: float, step: int) -> tuple[float, float]:
    """The penalty and its gradient for a kept cost."""
    rho = torch.tensor(kept, requires_grad=True)
    budget.aim(step)
    penalty = budget.penalty(rho, rho.detach())
    penalty.backward()
    return penalty.item(), rho.grad.item()


# Costs.


def test_fixed_and_unit_shares_sum_to_one() -> None:
    costs = UnitCosts.of({"a": 30, "b": 20, "c": 10}, 100)
    assert costs.units == pytest.approx({"a": 0.3, "b": 0.2, "c": 0.1})
    assert costs.fixed + sum(costs.units.values()) == pytest.approx(1.0, abs=1e-12)
    assert costs.cheapest == pytest.approx(0.1)


def test_kept_counts_present_units_and_what_has_no_gate() -> None:
    costs = UnitCosts.of({"a": 30, "b": 20, "c": 10}, 100)
    assert costs.kept({"a", "b", "c"}) == pytest.approx(1.0)
    assert costs.kept({"b"}) == pytest.approx(0.6)
    assert costs.kept(frozenset()) == pytest.approx(0.4)


@pytest.mark.parametrize("target", [0.4, 0.41, 1.0])
def test_a_target_that_can_be_met_is_accepted(target: float) -> None:
    UnitCosts(fixed=0.4, units={"a": 0.6}).check_target(target)


def test_an_impossible_target_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"^budget\.target: 0\.39 .* 0\.40* .*expected a share from 0\.40* to 1"):
        UnitCosts(fixed=0.4, units={"a": 0.6}).check_target(0.39)


def advised_share(costs: UnitCosts) -> str:
    """The least share that the refusal of an impossible target names."""
    with pytest.raises(ConfigError) as refused:
        costs.check_target(1e-6)
    named = re.search(r"; ([\d.]+) of .* expected a share from ([\d.]+) to 1$", str(refused.value))
    assert named[1] == named[2]
    return named[1]


@pytest.mark.parametrize(
    ("fixed", "share"),
    [(0.0664, 0.067), (0.0666, 0.067), (0.12345, 0.124), (0.4, 0.4), (0.07, 0.07), (0.0001, 0.001), (0.9999, 1.0)],
)
def test_the_share_that_the_message_names_is_the_least_of_three_digits_that_can_be_met(
    fixed: float, share: float
) -> None:
    costs = UnitCosts(fixed=fixed, units={"a": 1 - fixed})
    assert float(advised_share(costs)) == share
    costs.check_target(share)


def test_whatever_the_costs_the_share_that_the_message_names_can_be_met() -> None:
    rng = random.Random(1)
    for _ in range(1000):
        units = {f"u{index}": rng.uniform(0.1, 5) for index in range(rng.randint(1, 30))}
        costs = UnitCosts.of(units, sum(units.values()) * rng.uniform(1.001, 20))
        share = advised_share(costs)
        costs.check_target(float(share))
        assert len(share) <= len("0.123")
        assert float(share) - costs.fixed <= 1e-3


@pytest.mark.parametrize(("unit", "total", "share"), [(93, 500, 0.814), (7, 10, 0.3)])
def test_shares_of_round_numbers_can_be_met_as_well(unit: int, total: int, share: float) -> None:
    costs = UnitCosts.of({"a": unit}, total)
    assert float(advised_share(costs)) == share
    costs.check_target(share)


# Rates.


@pytest.mark.parametrize(
    ("rates", "expected"), [([0.0], 0.0), ([1.0], 0.0), ([0.5], 1.0), ([0.0, 1.0, 0.5, 0.25], 0.4375)]
)
def test_polarization(rates: list[float], expected: float) -> None:
    assert polarization(torch.tensor(rates)).item() == pytest.approx(expected)


def test_units_count_in_the_polarization_by_their_weights() -> None:
    """As the two channels of one gate beside a block's: the mean is over gates."""
    scattered = polarization(torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0.5, 0.25, 0.25]))
    assert scattered.item() == pytest.approx(0.5 * 1.0 + 0.25 * 0.75)


def test_polarization_pushes_a_rate_to_its_nearer_end() -> None:
    rates = torch.tensor([0.2, 0.5, 0.8], requires_grad=True)
    polarization(rates).backward()
    below, middle, above = rates.grad.tolist()
    assert below > 0  # a step goes against the gradient: down
    assert middle == 0
    assert above < 0


def test_the_rate_is_that_of_the_global_batch() -> None:
    local = torch.tensor([0.25, 1.0], requires_grad=True)
    shared = torch.tensor([0.5, 0.75])
    assert torch.equal(global_rates(local, shared), shared)


def loss_of_rates(rates: Tensor, costs: Tensor, price: float) -> Tensor:
    return 0.3 * polarization(rates) + price * (costs @ rates - 0.4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_mean_gradient_is_that_of_one_process(dtype: torch.dtype, ranks: int) -> None:
    samples, units = 16, 5
    decisions = (torch.rand(units, samples) < torch.rand(units, 1)).to(dtype)
    costs = torch.rand(units, dtype=dtype)
    whole = decisions.clone().requires_grad_()
    loss_of_rates(whole.mean(1), costs, 2.5).backward()

    # A parameter that all samples share, such as a gate's bias, gets the sum over its samples on each rank.
    per_sample = torch.randn(units, samples, dtype=dtype)
    expected = (whole.grad * per_sample).sum(1)
    shares = decisions.chunk(ranks, 1)
    shared = torch.stack([share.mean(1) for share in shares]).mean(0)
    total = torch.zeros(units, dtype=dtype)
    for share, factor in zip(shares, per_sample.chunk(ranks, 1), strict=True):
        mine = share.clone().requires_grad_()
        rates = global_rates(mine.mean(1), shared)
        torch.testing.assert_close(rates.detach(), decisions.mean(1))
        loss_of_rates(rates, costs, 2.5).backward()
        total += (mine.grad * factor).sum(1)
    torch.testing.assert_close(total / ranks, expected)


def test_gates_get_the_gradient_of_one_process_through_two_emulated_ranks(
    make_network: Callable[..., nn.Module],
) -> None:
    """The gates themselves, with their bounded gradient."""
    model = make_network()
    for parameter in gate_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its statistics are a rank's own in data-parallel training
    images = torch.randn(8, 3, 8, 8)
    costs = torch.rand(9)

    def gradient(batch: Tensor, shared: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        task = model(batch).logsumexp(1).mean()
        local, _ = take_decisions(list(find_gates(model).values()))
        rates = global_rates(local, local.detach() if shared is None else shared)
        (task + loss_of_rates(rates, costs, 5.0)).backward()
        return local.detach(), [parameter.grad.clone() for parameter in gate_parameters(model)]

    rates, expected = gradient(images, None)
    assert 0 < rates.mean() < 1
    _, left = gradient(images[:4], rates)
    _, right = gradient(images[4:], rates)
    for one, two, whole in zip(left, right, expected, strict=True):
        torch.testing.assert_close((one + two) / 2, whole, rtol=1e-4, atol=1e-7)


# The controller.


def test_the_target_is_ramped_from_one() -> None:
    budget = controller(0.4)
    assert budget.target_at(0) == budget.target_at(99) == 1.0
    assert budget.target_at(100) == 1.0
    assert budget.target_at(300) == pytest.approx(0.7)
    assert budget.target_at(500) == pytest.approx(0.4)
    assert budget.target_at(999) == pytest.approx(0.4)
    assert budget.target_at(-50) == 1.0


def test_a_ramp_without_length_jumps_to_the_target() -> None:
    budget = controller(0.4, warmup_end=100, ramp_end=100)
    assert budget.target_at(99) == 1.0
    assert budget.target_at(101) == pytest.approx(0.4)


def test_nothing_is_paid_while_no_more_is_kept_than_the_ramp_allows() -> None:
    budget = controller(0.4)
    assert pay(budget, 1.0, 100) == (0.0, 0.0)  # the ramp still allows all
    for step in (300, 301, 302):
        assert pay(budget, 0.5, step) == (0.0, 0.0)
    assert budget.price.item() == 0


def test_keeping_too_much_is_paid_for_at_the_price() -> None:
    budget = controller(0.4)
    penalty, gradient = pay(budget, 0.6, 600)
    assert gradient == pytest.approx(budget.price.item())
    assert gradient > 0
    assert penalty == pytest.approx(gradient * 0.2, rel=1e-5)


def test_the_price_rises_while_too_much_is_kept_and_falls_when_it_is_not() -> None:
    budget = controller(0.4)
    rising = [pay(budget, 0.9, step)[1] for step in range(600, 650)]
    assert all(later > earlier for earlier, later in itertools.pairwise(rising))
    falling = [pay(budget, 0.35, step)[1] for step in range(650, 660)]
    assert falling[0] < rising[-1]
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))


def test_the_price_is_never_negative_and_does_not_wind_up_below_zero() -> None:
    budget = controller(0.4)
    prices = [pay(budget, 0.1, step)[1] for step in range(500, 600)]
    assert prices == [0.0] * 100
    assert pay(budget, 0.5, 600)[1] == pytest.approx(pay(controller(0.4), 0.5, 600)[1])


def test_a_run_twice_as_long_pays_the_same_price_over_its_course() -> None:
    short, long = controller(passes=1000), controller(passes=2000)
    for step in range(600, 700):
        pay(short, 0.8, step)
    for step in range(600, 800):
        pay(long, 0.8, step)
    assert long.price.item() == pytest.approx(short.price.item(), rel=1e-4)


def test_the_gradient_of_a_step_is_that_of_its_own_price() -> None:
    """The next step's price does not reach back into a loss that is not yet differentiated."""
    budget = controller()
    rho = torch.tensor(0.8, requires_grad=True)
    budget.aim(600)
    loss = budget.penalty(rho, rho.detach())
    price = budget.price.item()
    pay(budget, 0.9, 601)
    loss.backward()
    assert rho.grad.item() == pytest.approx(price)


def test_ranks_whose_kept_cost_differs_in_the_last_bit_pay_the_same_price() -> None:
    """Each rank adds up its own rates; what the price follows is the same on all of them."""
    one, other = controller(), controller()
    for step in range(300, 700):
        shared = torch.rand(())
        kept = shared.clone().requires_grad_()
        beside = torch.nextafter(shared, torch.tensor(step % 2.0)).requires_grad_()
        assert kept.item() != beside.item()
        gradients = []
        for budget, rho in ((one, kept), (other, beside)):
            budget.aim(step)
            budget.penalty(rho, shared).backward()
            gradients.append(rho.grad.item())
        assert gradients[0] == gradients[1] == one.price.item() == other.price.item()
        assert torch.equal(one.integral, other.integral)
    assert one.integral.item() > 0


def test_a_controller_goes_on_from_its_state() -> None:
    first = controller()
    for step in range(600, 620):
        pay(first, 0.7, step)
    second = controller()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.price.item() == first.price.item() > 0
    assert [pay(second, 0.6, step) for step in range(620, 640)] == [pay(first, 0.6, step) for step in range(620, 640)]


# The policy that puts them together.


def policy_of(model: nn.Module, target: float = 0.5, *, total_steps: int = 100, window: int = 10) -> GatePolicy:
    names = list(find_gates(model))
    config = Config(
        budget=BudgetConfig(target=target), gate=GateConfig(warmup=0.1), removal=RemovalConfig(decide_by=0.5)
    )
    costs = UnitCosts.of(dict.fromkeys(names, 1), len(names) + 1)
    return GatePolicy(config, model, costs, set(names), rounding={}, total_steps=total_steps, window=window)


def same(tensor: Tensor) -> Tensor:
    return tensor


def test_there_is_no_penalty_in_the_warm_up(make_network: Callable[..., nn.Module]) -> None:
    model = make_network()
    policy = policy_of(model)
    images = torch.randn(4, 3, 8, 8)
    for step, paid in ((0, False), (9, False), (10, True), (30, True)):
        model(images)
        penalty = policy.penalty(step, 4, same)
        assert (penalty is not None) == paid
    assert penalty.item() > 0  # all units on, half of them too many
    penalty.backward()
    assert all(parameter.grad.item() > 0 for parameter in gate_parameters(model) if parameter.ndim == 1)


def test_the_warm_up_counts_towards_the_window(make_network: Callable[..., nn.Module]) -> None:
    model = make_network()
    policy = policy_of(model)
    for step in range(3):
        model(torch.randn(4, 3, 8, 8))
        policy.penalty(step, 4, same)
    window, verdicts = policy.close_window(3)
    assert {(unit.on, unit.samples) for unit in window.values()} == {(12, 12)}
    assert verdicts == []


def test_boundaries_are_every_window_and_the_deadline(make_network: Callable[..., nn.Module]) -> None:
    policy = policy_of(make_network(), window=20)
    assert [step for step in range(1, 101) if policy.at_boundary(step)] == [20, 40, 50, 60, 80, 100]


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_even_a_run_of_a_few_steps_comes_to_a_deadline(
    make_network: Callable[..., nn.Module], total_steps: int
) -> None:
    policy = policy_of(make_network(), total_steps=total_steps, window=10)
    assert any(policy.at_boundary(step) for step in range(1, total_steps + 1))


def test_the_target_is_reached_in_three_fifths_of_the_way_from_the_warm_up_to_the_deadline(
    make_network: Callable[..., nn.Module],
) -> None:
    """The warm-up ends after 10 steps, and the deadline is after 50: gates then have the rest to come to rest."""
    target_at = policy_of(make_network(), 0.4).controller.target_at
    assert target_at(10) == 1.0
    assert target_at(22) == pytest.approx(0.7)
    assert target_at(33) > 0.41
    assert target_at(34) == pytest.approx(0.4)


@pytest.mark.parametrize(("steps_done", "settled"), [(18, False), (20, True)])
def test_units_are_settled_on_the_way_only_where_removals_trail_the_ramp_by_two_windows(
    make_network: Callable[..., nn.Module], steps_done: int, settled: bool
) -> None:
    """The target leaves 1 after 10 steps, and windows have 4: until step 18 gates decide for themselves."""
    model = make_network()
    policy = policy_of(model, window=4)
    for gate in find_gates(model).values():
        gate.decision, gate.logit = torch.tensor([[0.0], [1.0]], requires_grad=True), torch.zeros(2, 1)
    policy.penalty(steps_done - 1, 2, same)
    _, verdicts = policy.close_window(steps_done)
    assert ({verdict.reason for verdict in verdicts} == {"settled"}) == settled
    assert bool(verdicts) == settled


def test_a_window_tells_rates_and_openness_apart(make_network: Callable[..., nn.Module]) -> None:
    model = make_network()
    policy = policy_of(model)
    for gate in find_gates(model).values():
        gate.decision, gate.logit = torch.tensor([[0.0], [1.0]], requires_grad=True), torch.full((2, 1), 3.0)
    policy.penalty(0, 2, same)
    window, _ = policy.close_window(1)
    assert {(unit.on, unit.samples) for unit in window.values()} == {(1, 2)}
    assert [unit.openness for unit in window.values()] == pytest.approx([0.9526] * 9, abs=1e-4)


@pytest.mark.parametrize("stepped", [True, False])
def test_what_is_settled_at_once_goes_by_what_gates_did_and_else_by_how_open_they_are(
    make_network: Callable[..., nn.Module], stepped: bool
) -> None:
    model = make_network()
    policy = policy_of(model)  # of nine units of a tenth each, four may stay
    gates = find_gates(model)
    least = list(gates)[::2]
    for name, gate in gates.items():
        if stepped:
            gate.decision = torch.full((2, 1), float(name not in least), requires_grad=True)
            gate.logit = torch.zeros(2, 1)
        elif name in least:
            nn.init.constant_(gate.bias, -1.0)
    if stepped:
        policy.penalty(20, 2, same)
    assert [verdict.unit for verdict in policy.settle_now() if verdict.action == "remove"] == least


def test_polarization_weighs_a_gate_of_many_units_as_that_of_a_block() -> None:
    branch = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))
    model = nn.Sequential(ResidualBlock(branch, nn.Identity(), nn.ReLU(), input_activated=False))
    config = Config(gate=GateConfig(units=["block", "channel"], warmup=0))
    attach_gates(model, config.gate)
    units = gated_units(model)
    costs = UnitCosts.of(dict.fromkeys(units, 1), len(units) + 1)
    policy = GatePolicy(config, model, costs, set(units), rounding={}, total_steps=100, window=10)
    gates = find_gates(model)
    penalties = []
    for scattered in gates:
        for name, gate in gates.items():
            decision = torch.ones(2, gate.units)
            decision[0] = name != scattered
            gate.decision, gate.logit = decision.requires_grad_(), torch.zeros(2, gate.units)
        penalties.append(policy.penalty(0, 2, same).item())
    assert len(penalties) == 2
    assert penalties[0] == pytest.approx(penalties[1])
    assert penalties[0] > 0


def test_after_the_deadline_no_gate_is_left(make_network: Callable[..., nn.Module]) -> None:
    model = make_network()
    policy = policy_of(model)
    model(torch.randn(4, 3, 8, 8))
    policy.penalty(49, 4, same)
    _, verdicts = policy.close_window(50)
    assert {verdict.unit for verdict in verdicts} == set(find_gates(model))
    for verdict in verdicts:
        surgeon = Surgeon(model)
        (surgeon.remove_block if verdict.action == "remove" else surgeon.freeze_block)(verdict.unit)
    policy.carried_out(model, verdicts)
    assert not policy.active
    assert not any(policy.at_boundary(step) for step in range(51, 101))
    assert policy.kept_cost == pytest.approx(0.5)  # one of ten equal shares is fixed, four units stay


def test_the_policy_follows_surgery(make_network: Callable[..., nn.Module]) -> None:
    model = make_network()
    policy = policy_of(model)
    names = list(find_gates(model))
    Surgeon(model).remove_block(names[1])
    Surgeon(model).freeze_block(names[2])
    policy.carried_out(model, [Verdict(names[1], "remove", "off"), Verdict(names[2], "freeze", "on")])
    assert policy.kept_cost == pytest.approx(0.9)
    model(torch.randn(4, 3, 8, 8))
    policy.penalty(20, 4, same)
    window, _ = policy.close_window(21)
    assert list(window) == [names[0], *names[3:]]


def test_a_policy_goes_on_from_its_state(make_network: Callable[..., nn.Module]) -> None:
    model = make_network()
    first = policy_of(model)
    for step in (30, 31, 32):
        model(torch.randn(4, 3, 8, 8))
        first.penalty(step, 4, same)
    second = policy_of(model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    images = torch.randn(4, 3, 8, 8)
    penalties = []
    for policy in (first, second):
        model(images)
        penalties.append(policy.penalty(33, 4, same).item())
    assert penalties[0] == penalties[1] > 0
    assert first.close_window(40) == second.close_window(40)


def test_the_ranks_prices_follow_one_kept_cost_to_the_last_bit(
    make_network: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own rates differ, and so do the roundings on the way to the kept cost."""
    model = make_network()
    gates = list(find_gates(model).values())
    ranks = [policy_of(model, 0.1), policy_of(model, 0.1)]
    seen = []
    penalty = BudgetController.penalty

    def spy(budget: BudgetController, kept: Tensor, kept_by_all: Tensor) -> Tensor:
        seen.append((kept.item(), kept_by_all.item()))
        return penalty(budget, kept, kept_by_all)

    monkeypatch.setattr(BudgetController, "penalty", spy)
    for step in range(20, 620):
        decisions = (torch.rand(2, 9, 37) < torch.rand(2, 9, 1)).float()
        shared = torch.stack([decisions.mean(2).mean(0), torch.full((9,), 0.5)])
        for policy, share in zip(ranks, decisions, strict=True):
            for gate, decision in zip(gates, share, strict=True):
                gate.decision, gate.logit = decision.unsqueeze(1).requires_grad_(), torch.zeros(37, 1)
            policy.penalty(step, 74, lambda _, shared=shared: shared)
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert any(one[0] != other[0] for one, other in pairs)
    assert all(one[1] == other[1] for one, other in pairs)
    assert all(kept == pytest.approx(kept_by_all, rel=1e-6) for kept, kept_by_all in seen)
    assert torch.equal(ranks[0].controller.price, ranks[1].controller.price)
    assert ranks[0].close_window(30) == ranks[1].close_window(30)


def test_the_policy_holds_its_gates_within_their_bounds(make_network: Callable[..., nn.Module]) -> None:
    model = make_network()
    policy = policy_of(model)
    biases = [parameter for parameter in gate_parameters(model) if parameter.ndim == 1]
    nn.init.constant_(biases[0], 100.0)
    nn.init.constant_(biases[1], -100.0)
    rest = [bias.item() for bias in biases[2:]]
    policy.begin_step(10, 4)
    policy.after_step()
    assert [bias.item() for bias in biases] == [BOUND, -BOUND, *rest]


def test_gates_stay_as_open_as_they_began_until_the_warm_up_has_ended(make_network: Callable[..., nn.Module]) -> None:
    """Nobody has learnt anything yet, and a unit that is off is not trained and stays worthless."""
    model = make_network(kind="conditional")
    policy = policy_of(model)
    began = [parameter.detach().clone() for parameter in gate_parameters(model)]
    for step in (0, 9):
        with torch.no_grad():
            for parameter in gate_parameters(model):
                parameter.sub_(2.5 + torch.rand_like(parameter))
        policy.begin_step(step, 4)
        policy.after_step()
        for now, then in zip(gate_parameters(model), began, strict=True):
            assert torch.equal(now, then)
    policy.begin_step(10, 4)
    with torch.no_grad():
        gate_parameters(model)[0].sub_(1.0)
    policy.after_step()
    assert not torch.equal(gate_parameters(model)[0], began[0])


def test_the_policy_tells_its_gates_of_the_loss_scale(make_network: Callable[..., nn.Module]) -> None:
    model = make_network()
    policy = policy_of(model)
    scale = torch.tensor(1024.0)
    gates = list(find_gates(model).values())
    policy.scale_losses_by(scale)
    assert all(gate.loss_scale is scale for gate in gates)
    policy.scale_losses_by(None)
    assert all(gate.loss_scale is None for gate in gates)


@pytest.mark.parametrize(
    ("steps_per_epoch", "epochs", "batch_size", "window"),
    [
        (22, 24, 64, 22),  # digits: an epoch has fewer samples than a window needs
        (390, 160, 128, 390),  # a long run: an epoch
        (390, 8, 128, 124),  # a short one: a 25th of it
        (390, 2, 128, 79),  # a very short one: 10,000 samples
        (1, 1, 128, 1),
    ],
)
def test_a_window_is_an_epoch_or_in_a_short_run_less(
    steps_per_epoch: int, epochs: int, batch_size: int, window: int
) -> None:
    assert default_window(steps_per_epoch, epochs * steps_per_epoch, batch_size) == window
