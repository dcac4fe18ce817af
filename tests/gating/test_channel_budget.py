"""Channels in the budget: what they cost beside what their neighbours have lost, and how they are settled."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from greenprune.config import BudgetConfig, Config, ConfigError, GateConfig, ModelConfig
from greenprune.gating import CostTerm, UnitCosts, UnitWindow, Verdict, channel_unit, decide, split_unit
from greenprune.gating.budget import ExpectedCost, KeptCost
from greenprune.gating.settling import find_pieces
from greenprune.network import Network, prepare_network

SAMPLES = 100

# Two removable blocks and one that has to stay. "a" has a layer between its two sets, "b" none with channels.
COSTS = UnitCosts(
    fixed=0.1,
    units={"a": 0.4, "b": 0.2},
    channels={"a:hidden1": 8, "a:hidden2": 4, "c:hidden": 10},
    terms=(
        CostTerm(0.1, "a", ("a:hidden1",)),
        CostTerm(0.2, "a", ("a:hidden1", "a:hidden2")),
        CostTerm(0.05, "a", ("a:hidden2",)),
        CostTerm(0.05, "a"),
        CostTerm(0.3, "c", ("c:hidden",)),
    ),
)


def units_of(name: str, indices: range) -> list[str]:
    return [channel_unit(name, index) for index in indices]


def window_of(rates: dict[str, int], openness: dict[str, float] | None = None) -> dict[str, UnitWindow]:
    return {
        name: UnitWindow(on, SAMPLES, (openness or {}).get(name, 0.5), int(on == SAMPLES)) for name, on in rates.items()
    }


def random_window(rng: random.Random, names: list[str]) -> dict[str, UnitWindow]:
    return window_of({name: rng.choice([0, 0, 30, 60, SAMPLES]) for name in names}, {n: rng.random() for n in names})


def after(present: set[str], verdicts: list[Verdict]) -> set[str]:
    left = set(present)
    for verdict in verdicts:
        if verdict.channels is not None:
            gone = {channel_unit(verdict.unit, index) for index in verdict.channels}
            assert gone <= left, "removed once"
            left -= gone
        elif verdict.action == "remove":
            left = {unit for unit in left if unit != verdict.unit and not unit.startswith(f"{verdict.unit}:")}
    return left


def test_names_of_units_are_read_back() -> None:
    assert split_unit(channel_unit("layer1.0:hidden", 12)) == ("layer1.0:hidden", 12)
    assert split_unit("layer1.0") == ("layer1.0", None)


def test_the_cheapest_unit_is_one_channel_where_channels_have_gates_and_else_a_block() -> None:
    """A channel of a:hidden1 costs 0.3 / 8, of a:hidden2 0.25 / 4, of c 0.3 / 10."""
    assert COSTS.cheapest == pytest.approx(0.03)
    assert UnitCosts(fixed=0.4, units={"a": 0.4, "b": 0.2}).cheapest == 0.2


def test_a_layer_between_two_sets_costs_the_product_of_both() -> None:
    kept = KeptCost(COSTS, COSTS.everything())
    assert kept.total == pytest.approx(1.0)
    assert kept.cost_of_channels("a:hidden1", 4) == pytest.approx(0.15)
    kept.remove_channels("a:hidden2", 2)
    assert kept.total == pytest.approx(1.0 - 0.1 - 0.025)
    assert kept.cost_of_channels("a:hidden1", 4) == pytest.approx(0.1)  # its neighbour has lost half
    kept.remove_channels("a:hidden1", 4)
    assert kept.cost_of_block("a") == pytest.approx(0.05 + 0.05 + 0.025 + 0.05)
    kept.remove_block("a")
    assert kept.total == pytest.approx(0.1 + 0.2 + 0.3)
    assert kept.left == {"a:hidden1": 0, "a:hidden2": 0, "c:hidden": 10}


def test_the_kept_cost_of_units_is_the_same_by_every_way() -> None:
    rng = random.Random(1)
    everything = sorted(COSTS.everything())
    for _ in range(50):
        present = {unit for unit in everything if rng.random() < 0.6}
        present = {unit for unit in present if ":" not in unit or unit.startswith("c:") or "a" in present}
        rates = torch.tensor([float(unit in present) for unit in everything])
        expected = ExpectedCost(COSTS, everything, set(everything), torch.device("cpu"))
        assert expected(rates).item() == pytest.approx(COSTS.kept(present), abs=1e-6)
        # The same with part of the units without a gate.
        gated = [unit for unit in everything if rng.random() < 0.5]
        fixed = (present - set(gated)) | set(gated)
        partly = ExpectedCost(COSTS, gated, fixed, torch.device("cpu"))
        on = torch.tensor([float(unit in present) for unit in gated])
        assert partly(on).item() == pytest.approx(COSTS.kept(present), abs=1e-6)


def test_the_expected_cost_has_the_gradient_of_every_rate() -> None:
    units = sorted(COSTS.everything())
    expected = ExpectedCost(COSTS, units, set(units), torch.device("cpu"))
    rates = torch.rand(len(units), requires_grad=True)
    expected(rates).backward()
    step = 1e-2
    for index in range(len(units)):  # linear in each rate alone
        moved = [rates.detach().clone(), rates.detach().clone()]
        moved[0][index] += step
        moved[1][index] -= step
        slope = (expected(moved[0]) - expected(moved[1])) / (2 * step)
        assert rates.grad[index].item() == pytest.approx(slope.item(), abs=1e-5)


@pytest.mark.parametrize("step", [1, 3, 4, 16])
def test_pieces_leave_a_multiple_of_the_rounding(step: int) -> None:
    rng = random.Random(step)
    names = units_of("a:hidden1", range(10))
    pieces = find_pieces(random_window(rng, names), {"a:hidden1": step})
    left = 10
    for piece in pieces:
        assert piece.channels is not None
        left -= len(piece.channels)
        assert left % step == 0
    assert left == 0
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sorted(index for piece in pieces for index in piece.channels or ()) == list(range(10))
    assert [piece.rate for piece in pieces] == sorted(piece.rate for piece in pieces)


@pytest.mark.parametrize(("units", "step"), [(20, 8), (10, 3), (28, 12)])
@pytest.mark.parametrize("openness", [0.85, 0.9, 0.8808])
def test_pieces_that_are_alike_keep_their_order(units: int, step: int, openness: float) -> None:
    """Means of equal numbers differ by rounding: the odd piece comes first and the last one last all the same."""
    window = {name: UnitWindow(8, 8, openness, 1) for name in units_of("a:hidden1", range(units))}
    pieces = find_pieces(window, {"a:hidden1": step})
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(pieces[0].channels or ()) == units % step


@pytest.mark.parametrize("seed", range(80))
def test_the_deadline_ends_within_a_piece_of_the_budget(seed: int) -> None:
    rng = random.Random(seed)
    everything = COSTS.everything()
    gated = sorted(everything)
    rounding = {name: rng.choice([1, 2, 4]) for name in COSTS.channels}
    target = rng.uniform(0.25, 0.9)
    verdicts = decide(
        random_window(rng, gated),
        everything,
        COSTS,
        target,
        ceiling=target,
        freeze_after=2,
        final=True,
        rounding=rounding,
    )
    left = after(everything, verdicts)
    kept = COSTS.kept(left)
    assert kept <= target + 1e-9
    counts = {name: sum(unit.startswith(f"{name}[") for unit in left) for name in COSTS.channels}
    assert all(counts[name] % rounding[name] == 0 or counts[name] == COSTS.channels[name] for name in counts)
    assert counts["c:hidden"] > 0, "a block without a shortcut keeps something"
    assert (counts["a:hidden1"] > 0) == (counts["a:hidden2"] > 0) == ("a" in left)
    # What is left over is less than the largest piece of any set.
    largest = max(rounding[name] * KeptCost(COSTS, everything).cost_of_channels(name, 1) for name in counts)
    assert target - kept < largest
    frozen = {verdict.unit for verdict in verdicts if verdict.action == "freeze"}
    assert frozen == {split_unit(unit)[0] for unit in left}


def test_the_least_wanted_go_first() -> None:
    everything = COSTS.everything()
    rates = dict.fromkeys(everything, SAMPLES)
    rates |= dict.fromkeys(units_of("c:hidden", range(0, 3)), 10) | dict.fromkeys(units_of("a:hidden1", range(2)), 20)
    verdicts = decide(
        window_of(rates), everything, COSTS, 0.86, ceiling=0.86, freeze_after=2, final=True, rounding=None
    )
    removed = {verdict.unit: verdict.channels for verdict in verdicts if verdict.action == "remove"}
    assert removed["c:hidden"] == (0, 1, 2)
    assert set(removed["a:hidden1"]) <= {0, 1}
    assert {verdict.reason for verdict in verdicts if verdict.action == "remove"} == {"settled"}


def test_where_what_is_left_is_too_coarse_the_block_that_is_just_enough_goes_and_the_room_is_filled_again() -> None:
    """A channel of c went first: 0.9 are left, of 0.75. Without b it is 0.6, without a 0.5; c's channel fits again."""
    costs = UnitCosts(
        fixed=0.1,
        units={"a": 0.4, "b": 0.3},
        channels={"c:hidden": 2},
        terms=(CostTerm(0.2, "c", ("c:hidden",)),),
    )
    window = window_of({"a": 50, "b": 60, "c:hidden[0]": 0, "c:hidden[1]": 70})
    verdicts = decide(window, costs.everything(), costs, 0.75, ceiling=1.0, freeze_after=9, final=True)
    assert [verdict.unit for verdict in verdicts if verdict.action == "remove"] == ["b"]


def test_units_that_were_off_go_and_no_others_before_the_deadline() -> None:
    everything = COSTS.everything()
    rates = dict.fromkeys(everything, 50) | dict.fromkeys(units_of("c:hidden", range(4)), 0) | {"b": 0}
    verdicts = decide(window_of(rates), everything, COSTS, 0.3, ceiling=1.0, freeze_after=2, final=False)
    assert verdicts[0] == Verdict("b", "remove", "off")
    assert verdicts[1] == Verdict("c:hidden", "remove", "off", (0, 1, 2, 3))
    assert len(verdicts) == 2


def test_a_piece_waits_until_all_of_it_is_off() -> None:
    everything = COSTS.everything()
    rates = dict.fromkeys(everything, 50) | dict.fromkeys(units_of("c:hidden", range(3)), 0)
    verdicts = decide(
        window_of(rates), everything, COSTS, 0.3, ceiling=1.0, freeze_after=2, final=False, rounding={"c:hidden": 4}
    )
    assert verdicts == [Verdict("c:hidden", "remove", "off", (0, 1))]  # 8 are left; the third waits for three others


def test_a_block_goes_with_the_last_of_its_channels() -> None:
    everything = COSTS.everything()
    rates = dict.fromkeys(everything, SAMPLES) | dict.fromkeys(units_of("a:hidden2", range(4)), 0)
    verdicts = decide(window_of(rates), everything, COSTS, 0.3, ceiling=1.0, freeze_after=9, final=False)
    assert verdicts == [Verdict("a", "remove", "off")]


def test_a_block_without_a_shortcut_keeps_its_last_channels() -> None:
    everything = COSTS.everything()
    rates = dict.fromkeys(everything, SAMPLES) | dict.fromkeys(units_of("c:hidden", range(10)), 0)
    verdicts = decide(window_of(rates), everything, COSTS, 0.3, ceiling=1.0, freeze_after=9, final=False)
    assert [verdict.unit for verdict in verdicts] == ["c:hidden"]
    assert len(verdicts[0].channels) == 9


def test_a_set_is_frozen_when_all_of_it_was_on_and_the_budget_is_met() -> None:
    everything = COSTS.everything()
    rates = dict.fromkeys(everything, SAMPLES) | {channel_unit("c:hidden", 0): 99}
    verdicts = decide(window_of(rates), everything, COSTS, 1.0, ceiling=1.0, freeze_after=1, final=False)
    assert {verdict.unit for verdict in verdicts} == {"a", "b", "a:hidden1", "a:hidden2"}
    assert {(verdict.action, verdict.reason) for verdict in verdicts} == {("freeze", "on")}
    assert decide(window_of(rates), everything, COSTS, 0.9, ceiling=1.0, freeze_after=1, final=False) == []


def test_a_budget_below_what_must_stay_is_refused() -> None:
    gates = [*COSTS.units, *COSTS.channels]
    COSTS.check_target(0.14, gates)
    with pytest.raises(ConfigError, match=r"^budget\.target: 0\.12 cannot be met; 0\.13 "):
        COSTS.check_target(0.12, gates)  # one of ten channels of the block that has to stay
    with pytest.raises(ConfigError, match=r"; 0\.73 "):
        COSTS.check_target(0.5, ["c:hidden"])


@pytest.mark.parametrize(("step", "left", "least"), [(4, 4, "0.22"), (8, 8, "0.34"), (16, 10, "0.4")])
def test_a_budget_below_what_rounding_leaves_is_refused(step: int, left: int, least: str) -> None:
    """The last piece of a set of channels whose block has to stay is as large as the rounding says."""
    gates, rounding = [*COSTS.units, *COSTS.channels], {"c:hidden": step}
    COSTS.check_target(float(least), gates, rounding)
    with pytest.raises(ConfigError, match=f"; {least} .* has no gate or is kept by surgery.round_to, expected"):
        COSTS.check_target(float(least) - 0.01, gates, rounding)
    everything = COSTS.everything()
    window = window_of(dict.fromkeys(everything, 0))
    verdicts = decide(window, everything, COSTS, 0.1, ceiling=1.0, freeze_after=9, final=True, rounding=rounding)
    present = after(everything, verdicts)
    assert len(present) == left
    assert COSTS.kept(present) == pytest.approx(float(least))


@pytest.mark.parametrize("units", [["channel"], ["block", "channel"]])
@pytest.mark.parametrize("unit", ["flops", "params"])
def test_a_real_network_costs_one(units: list[str], unit: str) -> None:
    network = real_network(units, unit)
    assert network.costs.kept(network.costs.everything()) == pytest.approx(1.0)
    kept = KeptCost(network.costs, network.costs.everything())
    kept.remove_channels("layer1.0:hidden1", 32)
    kept.remove_channels("layer1.0:hidden2", 16)
    assert kept.total < 1


def test_blocks_cannot_be_counted_where_channels_go() -> None:
    with pytest.raises(ConfigError, match=r"^budget\.unit: 'blocks' is not valid; expected flops or params"):
        real_network(["block", "channel"], "blocks")


def real_network(units: list[str], unit: str) -> Network:
    config = Config(
        model=ModelConfig(name="resnet50"),
        gate=GateConfig(units=units),  # type: ignore[arg-type]
        budget=BudgetConfig(unit=unit),  # type: ignore[arg-type]
    )
    return prepare_network(config, SimpleNamespace(classes=10, channels=3, image_size=32))  # type: ignore[arg-type]


def test_every_process_finds_the_same_kept_cost_to_the_last_digit() -> None:
    """Sets of names have another order in every process; ranks have to decide alike all the same."""
    code = (
        "from greenprune.gating import UnitCosts, CostTerm\n"
        "units = {f'block{i}': 1 / (3 + i) / 9 for i in range(23)}\n"
        "terms = tuple(CostTerm(share, name, (f'{name}:hidden',)) for name, share in units.items())\n"
        "costs = UnitCosts(0.1, units, {f'{name}:hidden': 7 for name in units}, terms)\n"
        "print(costs.kept(costs.everything()).hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(1, 5)
    }
    assert len(found) == 1
