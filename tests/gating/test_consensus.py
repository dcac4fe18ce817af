"""Consensus: exact counts over a window, and what is removed, frozen and settled at its end."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import time
from collections.abc import Iterable

import pytest
import torch

from greenprune.config import ModelConfig
from greenprune.gating import Consensus, UnitCosts, UnitWindow, Verdict, decide, settle
from greenprune.gating.settling import can_settle
from greenprune.models import build_model
from greenprune.network import UnitTable

CPU = torch.device("cpu")
TOLERANCE = 1e-8
TARGETS = [round(0.2 + 0.05 * step, 2) for step in range(15)]


def unit(on: int = 50, *, samples: int = 100, openness: float = 0.5, always_on: int = 0) -> UnitWindow:
    return UnitWindow(on, samples, openness, always_on)


def equal_costs(units: int, fixed: float = 0.0) -> UnitCosts:
    return UnitCosts(fixed, {f"u{index}": (1 - fixed) / units for index in range(units)})


def verdicts_of(
    window: dict[str, UnitWindow],
    costs: UnitCosts,
    target: float,
    *,
    present: Iterable[str] | None = None,
    ceiling: float = 1.0,
    freeze_after: int = 2,
    final: bool = False,
) -> list[Verdict]:
    everything = set(costs.units) if present is None else set(present)
    return decide(window, everything, costs, target, ceiling=ceiling, freeze_after=freeze_after, final=final)


def removed(verdicts: list[Verdict]) -> list[str]:
    return [verdict.unit for verdict in verdicts if verdict.action == "remove"]


def frozen(verdicts: list[Verdict]) -> list[str]:
    return [verdict.unit for verdict in verdicts if verdict.action == "freeze"]


# Counting.


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_counts_are_exact_over_many_steps_of_odd_batches(ranks: int) -> None:
    consensus = Consensus(["a", "b", "c"], CPU)
    expected, samples = torch.zeros(3, dtype=torch.int64), 0
    for step in range(300):
        batch = ranks * (1, 3, 7, 37, 129, 333)[step % 6]
        decisions = torch.rand(3, batch) < torch.tensor([[0.003], [0.5], [0.997]])
        rates = torch.stack([share.float().mean(1) for share in decisions.chunk(ranks, 1)]).mean(0)
        observe(consensus, rates, torch.tensor([0.1, 0.5, 0.9]), batch)
        expected += decisions.sum(1)
        samples += batch
    window = consensus.close_window()
    assert [window[name].on for name in "abc"] == expected.tolist()
    assert {window[name].samples for name in "abc"} == {samples}
    assert [window[name].openness for name in "abc"] == pytest.approx([0.1, 0.5, 0.9], abs=1e-4)


@pytest.mark.parametrize("batch", [7, 49, 4096, 65_537])
def test_one_sample_among_many_is_not_lost(batch: int) -> None:
    consensus = Consensus(["almost off", "almost on", "off", "on"], CPU)
    rates = torch.tensor([1 / batch, (batch - 1) / batch, 0.0, 1.0])
    for _ in range(100):
        observe(consensus, rates, torch.zeros(4), batch)
    counts = [unit.on for unit in consensus.close_window().values()]
    assert counts == [100, 100 * (batch - 1), 0, 100 * batch]


def observe(consensus: Consensus, rates: torch.Tensor, openness: torch.Tensor, samples: int) -> None:
    consensus.observe(rates, openness, samples)
    consensus.count(samples, 1)


def test_a_closed_window_is_over() -> None:
    consensus = Consensus(["a"], CPU)
    observe(consensus, torch.tensor([1.0]), torch.tensor([0.9]), 8)
    assert consensus.close_window() == {"a": UnitWindow(8, 8, pytest.approx(0.9), 1)}
    observe(consensus, torch.tensor([0.25]), torch.tensor([0.5]), 4)
    second = consensus.close_window()["a"]
    assert second == UnitWindow(1, 4, 0.5, 0)
    assert second.rate == 0.25


def test_windows_of_being_on_count_only_in_a_row() -> None:
    consensus = Consensus(["a", "b"], CPU)
    seen = []
    for rates in ([1.0, 1.0], [1.0, 1.0], [0.75, 1.0], [1.0, 1.0]):
        observe(consensus, torch.tensor([1.0, 1.0]), torch.ones(2), 4)
        observe(consensus, torch.tensor(rates), torch.ones(2), 4)
        window = consensus.close_window()
        seen.append((window["a"].always_on, window["b"].always_on))
    assert seen == [(1, 1), (2, 2), (0, 3), (1, 4)]


def test_dropped_units_are_forgotten_and_the_others_kept_apart() -> None:
    consensus = Consensus(["a", "b", "c"], CPU)
    observe(consensus, torch.tensor([1.0, 0.5, 1.0]), torch.ones(3), 4)
    consensus.close_window()
    consensus.drop({"b"})
    observe(consensus, torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.75]), 4)
    window = consensus.close_window()
    assert window == {"a": UnitWindow(2, 4, 0.5, 0), "c": UnitWindow(4, 4, 0.75, 2)}


def test_a_window_goes_on_from_its_state() -> None:
    first = Consensus(["a", "b"], CPU)
    observe(first, torch.tensor([1.0, 0.5]), torch.ones(2), 4)
    first.close_window()
    observe(first, torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.2]), 5)
    second = Consensus(["a", "b"], CPU)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for consensus in (first, second):
        observe(consensus, torch.tensor([1.0, 1.0]), torch.tensor([0.7, 0.6]), 3)
    window = second.close_window()
    assert window == first.close_window()
    assert (window["a"].on, window["a"].always_on) == (8, 2)
    assert (window["b"].on, window["b"].samples, window["b"].openness) == (3, 8, pytest.approx(0.4))


def test_steps_that_are_taken_back_do_not_count() -> None:
    consensus = Consensus(["a", "b"], CPU)
    for skipped, rates in ((False, [1.0, 0.5]), (True, [0.0, 0.0]), (False, [1.0, 0.0])):
        consensus.remember()
        for _ in range(2):
            consensus.observe(torch.tensor(rates), torch.tensor([0.75, 0.25]), 4)
        consensus.count(8, 2)
        consensus.take_back(torch.tensor(skipped), 2)
    assert consensus.close_window() == {"a": UnitWindow(16, 16, 0.75, 1), "b": UnitWindow(4, 16, 0.25, 0)}


def test_a_window_whose_steps_are_all_taken_back_tells_nothing_of_any_unit() -> None:
    consensus = Consensus(["a"], CPU)
    observe(consensus, torch.tensor([1.0]), torch.tensor([0.75]), 4)
    consensus.close_window()
    consensus.remember()
    observe(consensus, torch.tensor([0.0]), torch.tensor([0.25]), 4)
    consensus.take_back(torch.tensor(True))
    assert consensus.close_window() == {}
    observe(consensus, torch.tensor([1.0]), torch.tensor([0.75]), 4)
    assert consensus.close_window() == {"a": UnitWindow(4, 4, 0.75, 2)}


def test_the_state_of_other_units_is_refused() -> None:
    state = Consensus(["a", "b"], CPU).state_dict()
    with pytest.raises(AssertionError):
        Consensus(["a", "c"], CPU).load_state_dict(state)


# Deciding in the course of the run.


def test_units_off_for_every_sample_are_removed_and_no_others() -> None:
    window = {"u0": unit(0), "u1": unit(1), "u2": unit(100), "u3": unit(0), "u4": unit(99)}
    verdicts = verdicts_of(window, equal_costs(5), 0.2)
    assert set(removed(verdicts)) == {"u0", "u3"}
    assert {verdict.reason for verdict in verdicts} == {"off"}
    assert frozen(verdicts) == []


def test_the_least_open_unit_goes_first_and_none_once_the_budget_is_met() -> None:
    window = {f"u{index}": unit(0, openness=0.4 - index / 100) for index in range(10)}
    verdicts = verdicts_of(window, equal_costs(10), 0.7)
    assert removed(verdicts) == ["u9", "u8", "u7"]


def test_after_every_removal_the_kept_cost_can_still_end_within_the_cheapest_unit_of_the_target() -> None:
    rng = random.Random(1)
    settleable = 0
    for _ in range(300):
        costs = random_costs(rng)
        names = list(costs.units)
        window = {name: unit(rng.choice((0, 0, 1, 60, 100)), openness=rng.random()) for name in names}
        target = rng.uniform(0.1, 1.0)
        ceiling = rng.uniform(target, 1.0)
        gone = removed(verdicts_of(window, costs, target, ceiling=ceiling))
        assert len(set(gone)) == len(gone)
        if gone:
            left = set(names) - set(gone)
            assert costs.kept(left) > target - costs.cheapest - TOLERANCE
            if can_settle(list(costs.units.values()), costs, costs.fixed, target):
                assert can_settle([costs.units[name] for name in left], costs, costs.fixed, target)
                settleable += 1
    assert settleable > 50


def test_of_units_too_unequal_for_the_window_those_that_are_off_go_as_long_as_enough_stays() -> None:
    """No choice keeps 0.75 to 0.85: without the small unit 0.9 is left, without the large one 0.1."""
    costs = UnitCosts(fixed=0.1, units={"large": 0.8, "small": 0.1})
    window = {"large": unit(0, openness=0.3), "small": unit(0, openness=0.4)}
    assert removed(verdicts_of(window, costs, 0.85)) == ["small"]


def test_units_over_the_ceiling_are_settled_by_rate_and_then_by_openness() -> None:
    window = {
        "u0": unit(80, openness=0.1),
        "u1": unit(30, openness=0.9),
        "u2": unit(30, openness=0.6),
        "u3": unit(0, openness=0.4),
        "u4": unit(100, openness=0.95),
    }
    assert verdicts_of(window, equal_costs(5), 0.2, ceiling=0.4) == [
        Verdict("u3", "remove", "off"),
        Verdict("u2", "remove", "settled"),
        Verdict("u1", "remove", "settled"),
    ]
    assert verdicts_of(window, equal_costs(5), 0.2, ceiling=0.8) == [Verdict("u3", "remove", "off")]
    assert verdicts_of(window, equal_costs(5), 0.2, ceiling=0.79)[1:] == [Verdict("u2", "remove", "settled")]


def test_no_unit_is_settled_below_the_ceiling() -> None:
    window = {f"u{index}": unit(1) for index in range(5)}
    assert verdicts_of(window, equal_costs(5), 0.2, ceiling=1.0) == []


def test_absent_units_cost_nothing_and_frozen_ones_are_kept_for_good() -> None:
    costs = equal_costs(10)
    window = {name: unit(0) for name in ("u0", "u1", "u2", "u3")}
    present = [*window, "u4", "u5"]  # two are frozen, four are gone
    assert len(removed(verdicts_of(window, costs, 0.5, present=present))) == 1
    assert len(removed(verdicts_of(window, costs, 0.2, present=present))) == 4
    assert removed(verdicts_of(window, costs, 0.6, present=present)) == []


def test_units_freeze_only_once_the_budget_is_met() -> None:
    window = {
        "u0": unit(100, always_on=2),
        "u1": unit(100, always_on=1),
        "u2": unit(100, always_on=7),
        "u3": unit(50),
    }
    costs = equal_costs(4)
    assert verdicts_of(window, costs, 0.75) == []
    assert verdicts_of(window, costs, 1.0) == [Verdict("u0", "freeze", "on"), Verdict("u2", "freeze", "on")]
    met_by_this_window = {**window, "u3": unit(0)}
    assert verdicts_of(met_by_this_window, costs, 0.75) == [
        Verdict("u3", "remove", "off"),
        Verdict("u0", "freeze", "on"),
        Verdict("u2", "freeze", "on"),
    ]


# Deciding at the deadline.


def test_the_deadline_leaves_nothing_undecided_and_meets_the_target() -> None:
    rng = random.Random(2)
    for _ in range(200):
        costs = equal_costs(rng.randint(1, 27), fixed=rng.uniform(0, 0.3))
        target = rng.uniform(costs.fixed, 1.0)
        window = {name: unit(rng.randint(0, 100), openness=rng.random()) for name in costs.units if rng.random() < 0.8}
        present = set(window) | {name for name in costs.units if rng.random() < 0.1}
        if costs.kept(present - set(window)) > target:
            continue
        verdicts = verdicts_of(window, costs, target, present=present, final=True)
        assert sorted(verdict.unit for verdict in verdicts) == sorted(window)
        kept = costs.kept(present - set(removed(verdicts)))
        assert kept <= target + TOLERANCE
        if frozen(verdicts) and removed(verdicts):
            assert kept > target - costs.cheapest - TOLERANCE


def test_the_deadline_keeps_the_units_of_the_highest_rate_and_says_why() -> None:
    window = {
        "u0": unit(0, openness=0.1),
        "u1": unit(100, openness=0.9),
        "u2": unit(60, openness=0.6),
        "u3": unit(60, openness=0.5),
        "u4": unit(0, openness=0.3),
    }
    assert verdicts_of(window, equal_costs(5), 0.4, final=True) == [
        Verdict("u0", "remove", "off"),
        Verdict("u4", "remove", "off"),
        Verdict("u3", "remove", "settled"),
        Verdict("u1", "freeze", "on"),
        Verdict("u2", "freeze", "settled"),
    ]


def test_a_unit_that_was_off_stays_where_the_target_has_room_for_it() -> None:
    window = {"u0": unit(0), "u1": unit(100)}
    assert verdicts_of(window, equal_costs(2), 1.0, final=True) == [
        Verdict("u0", "freeze", "settled"),
        Verdict("u1", "freeze", "on"),
    ]


@pytest.mark.parametrize("final", [False, True])
def test_equal_inputs_give_equal_verdicts_whatever_their_order(final: bool) -> None:
    rng = random.Random(3)
    costs = random_costs(rng)
    names = list(costs.units)
    window = {name: unit(rng.choice((0, 40)), openness=rng.choice((0.3, 0.4))) for name in names}
    expected = verdicts_of(window, costs, 0.5, ceiling=0.6, final=final)
    assert removed(expected)
    for _ in range(20):
        rng.shuffle(names)
        shuffled = {name: window[name] for name in names}
        present = sorted(names, key=lambda _: rng.random())
        found = verdicts_of(shuffled, costs, 0.5, present=present, ceiling=0.6, final=final)
        assert removed(found) == removed(expected)
        assert sorted(found, key=lambda v: v.unit) == sorted(expected, key=lambda v: v.unit)


# Settling.


def random_costs(rng: random.Random, most: int = 30) -> UnitCosts:
    """Like those of a residual network: few distinct costs. Or any, of fewer units."""
    few = [rng.choice((0.5, 0.75, 1.0, 1.5)) for _ in range(rng.randint(1, 3))]
    if rng.random() < 0.5:
        weights = [rng.choice(few) for _ in range(rng.randint(1, most))]
    else:
        units = rng.randint(1, min(most, 11))
        weights = [rng.choice(few) if rng.random() < 0.3 else rng.uniform(0.1, 5) for _ in range(units)]
    return UnitCosts.of({f"u{index}": w for index, w in enumerate(weights)}, sum(weights) * rng.uniform(1, 1.3))


def settled_cost(costs: UnitCosts, order: list[str], target: float) -> float:
    chosen = settle(order, costs, costs.fixed, target)
    assert chosen <= set(order)
    return costs.fixed + sum(costs.units[name] for name in chosen)


def test_whatever_the_costs_the_target_is_never_exceeded() -> None:
    rng = random.Random(4)
    for _ in range(800):
        costs = random_costs(rng)
        target = rng.uniform(costs.fixed, 1.0)
        order = rng.sample(list(costs.units), len(costs.units))
        chosen = settle(order, costs, costs.fixed, target)
        kept = costs.kept(chosen)
        assert kept <= target + TOLERANCE
        # Nothing that was left out would still fit.
        assert all(kept + costs.units[name] > target - TOLERANCE for name in set(order) - chosen)


def test_units_of_equal_cost_leave_no_room_for_another() -> None:
    rng = random.Random(5)
    for _ in range(300):
        costs = equal_costs(rng.randint(1, 54), fixed=rng.uniform(0, 0.3))
        target = rng.uniform(costs.fixed, 1.0)
        order = rng.sample(list(costs.units), len(costs.units))
        assert target - costs.cheapest - TOLERANCE < settled_cost(costs, order, target) <= target + TOLERANCE


RESNET20 = UnitCosts.of({f"u{index}": 0.75 if index in (3, 6) else 1.0 for index in range(9)}, 8.5 / (1 - 0.094))


@functools.cache
def table_of(name: str, shortcut: str) -> UnitTable:
    side = 224 if name == "resnet50" else 32
    with torch.device("meta"):
        model = build_model(
            ModelConfig(name=name, shortcut=shortcut),  # type: ignore[arg-type]
            classes=10,
            channels=3,
            image_size=side,
        )
        return UnitTable.of(model, (3, side, side))


def real_costs(name: str, shortcut: str, cost: str) -> UnitCosts:
    """Shares of a network's cost, as a run has them."""
    table = table_of(name, shortcut)
    units = {unit: getattr(branch, cost) for unit, branch in table.branches.items()}
    return UnitCosts.of(units, getattr(table.dense, cost))


COSTS = pytest.mark.parametrize("cost", ["flops_forward", "params"])
NETWORKS = pytest.mark.parametrize(
    ("name", "shortcut"),
    [("resnet20", "A"), ("resnet20", "B"), ("resnet38", "A"), ("resnet56", "A"), ("resnet50", "A")],
)


def within_the_cheapest(kept: float, costs: UnitCosts, target: float) -> bool:
    return target - costs.cheapest - TOLERANCE < kept <= target + TOLERANCE


@COSTS
@NETWORKS
def test_a_real_network_settles_within_its_cheapest_unit_of_the_target(name: str, shortcut: str, cost: str) -> None:
    costs = real_costs(name, shortcut, cost)
    assert len(costs.units) == {"resnet20": 9, "resnet38": 18, "resnet56": 27, "resnet50": 16}[name]
    rng = random.Random(6)
    missed = []
    for target in TARGETS:
        for _ in range(8):
            kept = settled_cost(costs, rng.sample(list(costs.units), len(costs.units)), target)
            if not within_the_cheapest(kept, costs, target):
                missed.append((target, kept))
    assert missed == []


def subset_sums(costs: UnitCosts) -> list[float]:
    return [
        sum(choice)
        for size in range(len(costs.units) + 1)
        for choice in itertools.combinations(costs.units.values(), size)
    ]


def test_whether_it_can_be_settled_is_what_trying_every_choice_says() -> None:
    rng = random.Random(11)
    answers = []
    for _ in range(150):
        costs = random_costs(rng, most=8)
        target = rng.uniform(0.0, 1.05)
        kept_for_good = rng.uniform(0.0, 0.5)
        every = [kept_for_good + chosen for chosen in subset_sums(costs)]
        expected = any(target - costs.cheapest < kept <= target for kept in every)
        assert can_settle(costs.units.values(), costs, kept_for_good, target) == expected
        answers.append(expected)
    assert 20 < sum(answers) < 130


def test_no_choice_that_meets_the_target_keeps_more_wanted_units() -> None:
    """Trying every choice: of those in the window, the one that keeps the most wanted, then the next, and so on."""
    rng = random.Random(12)
    compared = 0
    for _ in range(100):
        costs = random_costs(rng, most=7)
        target = rng.uniform(costs.fixed, 1.0)
        order = rng.sample(list(costs.units), len(costs.units))
        choices = itertools.product((True, False), repeat=len(order))  # the most wanted first
        wanted = order[::-1]
        for choice in choices:
            best = set(itertools.compress(wanted, choice))
            if target - costs.cheapest < costs.kept(best) <= target:
                assert settle(order, costs, costs.fixed, target) == best
                compared += 1
                break
    assert compared > 50


def test_where_no_choice_ends_in_the_window_the_most_wanted_that_fit_are_kept() -> None:
    costs = UnitCosts.of({"tiny": 1.0, "big": 60.0, "bigger": 80.0}, 141.0)
    target = 70.0 / 141.0
    assert not can_settle(costs.units.values(), costs, 0.0, target)
    assert settle(["tiny", "big", "bigger"], costs, 0.0, target) == {"tiny", "big"}
    assert settle(["big", "bigger", "tiny"], costs, 0.0, target) == {"tiny", "big"}


def test_many_units_of_different_costs_are_settled_from_real_choices() -> None:
    """More choices than are looked at one by one."""
    rng = random.Random(13)
    weights = {f"u{index}": rng.uniform(0.1, 5) for index in range(19)}
    costs = UnitCosts.of(weights, sum(weights.values()))
    assert can_settle(costs.units.values(), costs, 0.0, 0.31)
    assert within_the_cheapest(settled_cost(costs, list(weights), 0.31), costs, 0.31)


# Whole courses of windows, up to the deadline.


def course(rng: random.Random, costs: UnitCosts, target: float, *, windows: int = 5) -> tuple[set[str], int]:
    """Any gates' course: what is kept at its end, and how many units went before it."""
    present, gated = set(costs.units), set(costs.units)
    early = 0
    for number in range(windows):
        final = number == windows - 1
        share_off, share_on, ceiling = rng.random(), rng.random(), rng.uniform(target, 1.0)
        window = {}
        for name in [name for name in costs.units if name in gated]:
            on = 0 if rng.random() < share_off else 100 if rng.random() < share_on else rng.randint(1, 99)
            window[name] = unit(
                on, openness=rng.choice((0.2, 0.5, rng.random())), always_on=rng.randint(1, 3) * (on == 100)
            )
        found = decide(window, present, costs, target, ceiling=ceiling, freeze_after=2, final=final)
        decided = [verdict.unit for verdict in found]
        assert len(decided) == len(set(decided))
        assert set(decided) <= gated
        assert all(window[verdict.unit].on == 0 for verdict in found if verdict.reason == "off")
        present -= set(removed(found))
        gated -= set(decided)
        early += 0 if final else len(removed(found))
    assert gated == set()
    return present, early


def missed_by(costs: UnitCosts, targets: Iterable[float], courses: int, seed: int) -> list[tuple[float, float]]:
    """Targets that a course did not end at though it could, and what it kept."""
    rng = random.Random(seed)
    missed, early = [], 0
    for target in targets:
        assert can_settle(costs.units.values(), costs, costs.fixed, target)
        for _ in range(courses):
            present, before_the_deadline = course(rng, costs, target)
            early += before_the_deadline
            kept = costs.kept(present)
            if not within_the_cheapest(kept, costs, target):
                missed.append((target, kept))
    assert early > 0
    return missed


def test_whatever_goes_on_the_way_resnet20_ends_within_its_cheapest_unit_of_the_target() -> None:
    assert RESNET20.fixed == pytest.approx(0.094)
    assert missed_by(RESNET20, TARGETS, courses=40, seed=21) == []


@COSTS
@NETWORKS
def test_whatever_goes_on_the_way_a_real_network_ends_within_its_cheapest_unit_of_the_target(
    name: str, shortcut: str, cost: str
) -> None:
    costs = real_costs(name, shortcut, cost)
    courses = {"resnet20": 12, "resnet38": 5, "resnet56": 3, "resnet50": 8}[name]
    assert missed_by(costs, TARGETS, courses, seed=22) == []


def test_whatever_the_costs_a_course_ends_at_the_target_if_it_could_at_its_start() -> None:
    rng = random.Random(23)
    tried = 0
    for _ in range(150):
        costs = random_costs(rng, most=16)
        target = rng.uniform(costs.fixed, 1.0)
        kept = costs.kept(course(rng, costs, target)[0])
        assert kept <= target + TOLERANCE
        if can_settle(costs.units.values(), costs, costs.fixed, target):
            assert within_the_cheapest(kept, costs, target)
            tried += 1
    assert tried > 75


@pytest.mark.parametrize("units", [1, 3, 7, 9, 16, 27])
def test_equal_costs_end_exactly_at_a_target_of_whole_units(units: int) -> None:
    """As with ``budget.unit=blocks``; neither k/n nor the sum of k times 1/n is exact."""
    rng = random.Random(24)
    costs = UnitCosts.of(dict.fromkeys((f"u{index}" for index in range(units)), 1), units)
    for count in range(units + 1):
        order = rng.sample(list(costs.units), units)
        assert settle(order, costs, costs.fixed, count / units) == set(order[units - count :])
        if count:
            assert len(course(rng, costs, count / units)[0]) == count


def decide_seconds(costs: UnitCosts, target: float, share_off: float) -> float:
    """Processor time of one call; the least of three, as the machine may be busy."""
    rng = random.Random(25)
    window = {name: unit(0 if rng.random() < share_off else 50, openness=rng.random()) for name in costs.units}
    seconds = []
    for _ in range(3):
        started = time.process_time()
        verdicts_of(window, costs, target, ceiling=target)
        seconds.append(time.process_time() - started)
    return min(seconds)


@pytest.mark.parametrize(
    "cost",
    [
        "flops_forward",
        "params",
    ],
)
def test_a_boundary_of_the_deepest_network_is_decided_in_milliseconds(cost: str) -> None:
    costs = real_costs("resnet110", "A", cost)
    assert len(costs.units) == 54
    assert max(decide_seconds(costs, target, off) for target, off in ((0.5, 0.5), (0.9, 1.0))) < 0.05


def test_of_equal_costs_the_most_wanted_are_kept() -> None:
    order = [f"u{index}" for index in (3, 1, 4, 0, 2)]
    assert settle(order, equal_costs(5), 0.0, 0.6) == {"u4", "u0", "u2"}


def test_an_exchange_uses_the_room_that_the_greedy_choice_leaves() -> None:
    costs = UnitCosts.of({"a": 1.0, "b": 0.75, "c": 0.75, "d": 1.0}, 3.5)
    # b and c fit, and leave room for 0.25 more than the cheapest unit costs: one of them makes way for a.
    chosen = settle(["a", "d", "c", "b"], costs, 0.0, 2.35 / 3.5)
    assert costs.kept(chosen) > 2.35 / 3.5 - costs.cheapest
    assert costs.kept(chosen) <= 2.35 / 3.5


def test_nothing_is_kept_if_what_stays_for_good_is_too_much() -> None:
    assert settle(["u0", "u1"], equal_costs(4), 0.5, 0.4) == set()


def test_an_empty_order_settles_to_nothing() -> None:
    assert settle([], equal_costs(2), 0.2, 0.9) == set()
