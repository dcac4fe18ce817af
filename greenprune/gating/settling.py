"""Settling: from what the gates did in a window, and the budget, to what is removed and frozen at its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from greenprune.gating.budget import KeptCost, UnitCosts, channel_unit, split_unit
from greenprune.gating.consensus import UnitWindow

Reason = Literal["off", "settled", "on"]

FloatArray = npt.NDArray[np.float64]

_ROUNDING = 1e-9  # shares of cost are sums of floats


@dataclass(frozen=True)
class Verdict:
    """What happens to a block, or to a set of channels, now.

    Attributes:
        unit: Its name.
        action: remove it, or some of its channels; or freeze it (its gate goes, it stays).
        reason: off or on for every sample of the window(s), or settled against the budget.
        channels: Which units of a set are removed, by their indices in the dense network; None for a block or a freeze.
    """

    unit: str
    action: Literal["remove", "freeze"]
    reason: Reason
    channels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """What can only be removed together: a block, or as many units of a set of channels as rounding asks for.

    Attributes:
        owner: Name of the block or of the set.
        channels: Indices of the units in the dense network; None for a block.
        rate: Mean activation rate over its units.
        openness: Mean openness.
        off: Whether all of it was off for every sample.
        last: Whether a set would have no units left without it.
    """

    owner: str
    channels: tuple[int, ...] | None
    rate: float
    openness: float
    off: bool
    last: bool = False

    @property
    def block(self) -> str:
        """The block that it is or lies in."""
        return self.owner if self.channels is None else self.owner.rpartition(":")[0]


def find_pieces(window: Mapping[str, UnitWindow], rounding: Mapping[str, int]) -> list[Piece]:
    """The units of a window in pieces, the least wanted first: by activation rate, then openness, then name.

    Args:
        window: The gated units' counts.
        rounding: For each set of channels, of what number of units its size should be a multiple; 1 where not given.
    """
    pieces, sets = [], dict[str, list[tuple[UnitWindow, int]]]()
    for name, unit in window.items():
        owner, index = split_unit(name)
        if index is None:
            pieces.append(Piece(owner, None, unit.rate, unit.openness, off=unit.on == 0))
        else:
            sets.setdefault(owner, []).append((unit, index))
    for owner, units in sets.items():
        units.sort(key=lambda item: (item[0].rate, item[0].openness, item[1]))
        step = rounding.get(owner, 1)
        start, rate, openness = 0, 0.0, 0.0
        while start < len(units):
            end = start + (len(units) - start) % step if (len(units) - start) % step else start + step
            members = units[start:end]
            # Rates never fall from one piece of a set to the next, nor does openness where they are equal: their means
            # would by rounding, and the pieces would change places.
            before, rate = rate, max(rate, sum(unit.rate for unit, _ in members) / len(members))
            mean = sum(unit.openness for unit, _ in members) / len(members)
            openness = max(openness, mean) if rate == before else mean
            pieces.append(
                Piece(
                    owner,
                    tuple(sorted(index for _, index in members)),
                    rate,
                    openness,
                    off=all(unit.on == 0 for unit, _ in members),
                    last=end == len(units),
                )
            )
            start = end
    # Stable: pieces of a set that are alike keep their order.
    return sorted(pieces, key=lambda piece: (piece.rate, piece.openness, piece.owner))


def decide(
    window: dict[str, UnitWindow],
    present: set[str],
    costs: UnitCosts,
    target: float,
    *,
    ceiling: float,
    freeze_after: int,
    final: bool,
    rounding: Mapping[str, int] | None = None,
) -> list[Verdict]:
    """What is removed and frozen at the end of a window.

    Units that were off for every sample go, the least open first, as long as the units left can still be settled to
    end in ``(target - cheapest unit, target]``. Where more than ``ceiling`` is kept even then, the units of the lowest
    rate (then openness) are settled: removed though undecided, so that the saving comes when the ramped budget says.
    At the deadline (``final``) everything is settled against the target and what stays is frozen.

    Channels go in pieces that leave their set at a multiple of its rounding. A block that would have no channels left
    between two of its layers goes as a block.

    Args:
        window: The gated units' counts.
        present: Names of all units that are still there, gated or frozen.
        costs: Shares of the dense cost.
        target: The budget.
        ceiling: Largest share that may be kept after this boundary; at least ``target``.
        freeze_after: Windows of rate 1 after which a unit is frozen once the budget is met.
        final: Whether this is the deadline.
        rounding: For each set of channels, of what number of units its size should be a multiple.

    Returns:
        Verdicts in the order in which they are to be carried out, removals first; the same on every rank.
    """
    pieces = find_pieces(window, rounding or {})
    plan: _Plan
    plan = _FinePlan(pieces, present, costs, target) if costs.channels else _BlockPlan(pieces, present, costs, target)
    if final:
        plan.settle()
    else:
        plan.thin_out(ceiling)
    verdicts = _removals(plan.removed)
    if final or plan.kept <= target + _ROUNDING:
        verdicts += _freezes(window, verdicts, 0 if final else freeze_after)
    return verdicts


def _freezes(window: dict[str, UnitWindow], removals: list[Verdict], freeze_after: int) -> list[Verdict]:
    """Verdicts on the gates whose units, as far as they stay, were all on for as many windows."""
    blocks = {verdict.unit for verdict in removals if verdict.channels is None}
    channels = {channel_unit(verdict.unit, index) for verdict in removals for index in verdict.channels or ()}
    staying: dict[str, list[UnitWindow]] = {}
    for name, unit in window.items():
        owner, index = split_unit(name)
        block = owner if index is None else owner.rpartition(":")[0]
        if block not in blocks and name not in channels:
            staying.setdefault(owner, []).append(unit)
    return [
        Verdict(owner, "freeze", "on" if all(unit.rate == 1 for unit in units) else "settled")
        for owner, units in staying.items()
        if all(unit.always_on >= freeze_after for unit in units)
    ]


def _removals(removed: list[Piece]) -> list[Verdict]:
    """Verdicts on removed pieces: each set once for each reason, and a block in place of the last of its channels."""
    blocks = {piece.block: _reason(piece) for piece in removed if piece.channels is None or piece.last}
    channels: dict[tuple[str, Reason], list[int]] = {}
    verdicts: dict[tuple[str, Reason], Verdict] = {}
    for piece in removed:
        if piece.channels is None or piece.block in blocks:
            reason = blocks[piece.block]
            verdicts[piece.block, reason] = Verdict(piece.block, "remove", reason)
        else:
            key = piece.owner, _reason(piece)
            channels.setdefault(key, []).extend(piece.channels)
            verdicts[key] = Verdict(piece.owner, "remove", key[1], tuple(sorted(channels[key])))
    return list(verdicts.values())


def _reason(piece: Piece) -> Reason:
    return "off" if piece.off else "settled"


class _Plan(ABC):
    """Which pieces are removed at one boundary; the ways of choosing differ with what the pieces are.

    Args:
        pieces: What can be removed, the least wanted first.
        costs: Shares of the dense cost.
        target: The budget.

    Attributes:
        removed: What is removed, in order.
    """

    def __init__(self, pieces: list[Piece], costs: UnitCosts, target: float) -> None:
        self.pieces = pieces
        self.costs = costs
        self.target = target
        self.removed: list[Piece] = []

    @property
    @abstractmethod
    def kept(self) -> float:
        """Share kept with all that is removed so far gone."""

    @abstractmethod
    def may_go(self, piece: Piece) -> bool:
        """Whether the kept cost can still end where it should without this piece."""

    @abstractmethod
    def remove(self, piece: Piece) -> None:
        """Remove a piece."""

    @abstractmethod
    def settle(self) -> None:
        """Remove what has to go for the kept cost to end in ``(target - cheapest, target]``."""

    def thin_out(self, ceiling: float) -> None:
        """Remove what was off, and while more than ``ceiling`` is kept what is least wanted, as far as it may go."""
        for piece in self.pieces:
            if (piece.off or self.kept > ceiling + _ROUNDING) and self.may_go(piece):
                self.remove(piece)


class _BlockPlan(_Plan):
    """For blocks alone, few and of unequal costs: what can still be reached is known exactly, from sums of costs."""

    def __init__(self, pieces: list[Piece], present: set[str], costs: UnitCosts, target: float) -> None:
        super().__init__(pieces, costs, target)
        self._staying = {piece.owner for piece in pieces}
        self._kept_for_good = costs.kept(present - self._staying)
        self._reachable = self._can_settle(self._staying)

    def _can_settle(self, names: set[str]) -> bool:
        return can_settle([self.costs.units[name] for name in names], self.costs, self._kept_for_good, self.target)

    @property
    def kept(self) -> float:
        staying = (cost for name, cost in self.costs.units.items() if name in self._staying)  # alike on every rank
        return self._kept_for_good + sum(staying)

    def may_go(self, piece: Piece) -> bool:
        if self._reachable:
            return self._can_settle(self._staying - {piece.owner})
        # Units too unequal for the window.
        return self.kept - self.costs.units[piece.owner] > self.target - self.costs.cheapest + _ROUNDING

    def remove(self, piece: Piece) -> None:
        self._staying.remove(piece.owner)
        self.removed.append(piece)

    def settle(self) -> None:
        chosen = settle([piece.owner for piece in self.pieces], self.costs, self._kept_for_good, self.target)
        for piece in self.pieces:
            if piece.owner not in chosen:
                self.remove(piece)


class _FinePlan(_Plan):
    """With channels there are many small pieces, which fill what the large ones leave: the least wanted go first.

    What a piece costs depends on what is gone already, so costs are looked up anew for every removal.
    """

    def __init__(self, pieces: list[Piece], present: set[str], costs: UnitCosts, target: float) -> None:
        # The last channels of a block that has to stay have to stay.
        pieces = [piece for piece in pieces if not piece.last or piece.block in costs.units]
        super().__init__(pieces, costs, target)
        self._cost = KeptCost(costs, present)
        self._slack = min((self._cost_of(piece) for piece in pieces), default=0.0)

    @property
    def kept(self) -> float:
        return self._cost.total

    def _cost_of(self, piece: Piece) -> float:
        if piece.channels is None or piece.last:
            return self._cost.cost_of_block(piece.block)
        return self._cost.cost_of_channels(piece.owner, len(piece.channels))

    def _is_there(self, piece: Piece) -> bool:
        return piece.block in self._cost.blocks or piece.block not in self.costs.units

    def may_go(self, piece: Piece) -> bool:
        return self._is_there(piece) and self.kept - self._cost_of(piece) > self.target - self._slack + _ROUNDING

    def remove(self, piece: Piece) -> None:
        if piece.channels is None or piece.last:
            self._cost.remove_block(piece.block)
        else:
            self._cost.remove_channels(piece.owner, len(piece.channels))
        self.removed.append(piece)

    def settle(self) -> None:
        for piece in self.pieces:
            if self.kept > self.target + _ROUNDING and self.may_go(piece):
                self.remove(piece)
        if self.kept > self.target + _ROUNDING:  # what is left is too coarse for the window
            self._remove_nearest()
            self._give_back()

    def _remove_nearest(self) -> None:
        """Remove the piece that brings the kept cost least below the target.

        Any that is left brings it below: it was not to go for that reason, and what went after it took no less from the
        kept cost than from the piece's own.
        """
        went = set(map(id, self.removed))
        left = [piece for piece in self.pieces if id(piece) not in went and self._is_there(piece)]
        first_of_each = {piece.owner: piece for piece in reversed(left)}
        if first_of_each:
            self.remove(min(first_of_each.values(), key=self._cost_of))

    def _give_back(self) -> None:
        """Keep after all what the last, large removal left room for, the most wanted first."""
        went = set(map(id, self.removed))
        full: set[str] = set()  # sets of which a more wanted piece stays out
        back: set[int] = set()
        for piece in reversed(self.pieces):
            if id(piece) not in went or piece.channels is None or piece.owner in full or not self._is_there(piece):
                continue
            self._cost.put_back_channels(piece.owner, len(piece.channels))
            if self.kept <= self.target + _ROUNDING:
                back.add(id(piece))
            else:
                self._cost.remove_channels(piece.owner, len(piece.channels))
                full.add(piece.owner)
        self.removed = [piece for piece in self.removed if id(piece) not in back]


_MANY_SUMS = 100_000


def _add_units(sums: FloatArray, cost: float, count: int = 1) -> FloatArray:
    """All sums of some units' costs, with more units of one cost to choose from; equal sums once.

    Networks have few distinct costs, so there are few sums. Where there are many, sums closer than 1e-6 stand for each
    other: a choice may then be missed, but none is imagined, since each number is the sum of a real choice.
    """
    more = np.add.outer(cost * np.arange(count + 1), sums).ravel()
    digits = 12 if len(more) < _MANY_SUMS else 6
    _, first = np.unique(more.round(digits), return_index=True)
    distinct: FloatArray = more[first]
    return distinct


@lru_cache(maxsize=64)
def _all_sums(counts: tuple[tuple[float, int], ...]) -> FloatArray:
    """All sums of choices among units, given as their distinct costs and how many units have each."""
    sums = np.zeros(1)
    for cost, count in counts:
        sums = _add_units(sums, cost, count)
    return sums


class _Window:
    """Where the sum of the chosen units' costs has to end: (target - cheapest, target] without what is kept anyway."""

    def __init__(self, costs: UnitCosts, kept_for_good: float, target: float) -> None:
        self.high = target - kept_for_good + _ROUNDING
        self.low = self.high - costs.cheapest

    def reached_by(self, sums: FloatArray) -> bool:
        """Whether one of the sums ends in the window."""
        return bool(((sums > self.low) & (sums <= self.high)).any())


def can_settle(undecided: Iterable[float], costs: UnitCosts, kept_for_good: float, target: float) -> bool:
    """Whether some choice among undecided units ends with the kept cost in (target - cheapest unit, target].

    Args:
        undecided: Costs of the units among which is chosen.
        costs: Shares of the dense cost.
        kept_for_good: Share that is kept whatever is chosen.
        target: Share to keep at most.
    """
    counts = tuple(sorted(Counter(undecided).items()))
    return _Window(costs, kept_for_good, target).reached_by(_all_sums(counts))


def settle(order: list[str], costs: UnitCosts, kept_for_good: float, target: float) -> set[str]:
    """Choose the units to keep: the most wanted, as far as the kept cost can then still end where it should.

    Going from the most wanted unit to the least, each is kept if the rest can still be chosen such that the kept cost
    ends in ``(target - cheapest, target]``, else dropped. Where no choice does, the most wanted that fit are kept.

    Args:
        order: Undecided units, the least wanted first.
        costs: Shares of the dense cost.
        kept_for_good: Share that is kept whatever is chosen here.
        target: Share to keep at most.

    Returns:
        Units to keep.
    """
    window = _Window(costs, kept_for_good, target)
    sums_below = {}  # for each unit, the sums of those less wanted
    sums = np.zeros(1)
    for name in order:
        sums_below[name] = sums
        sums = _add_units(sums, costs.units[name])
    possible = window.reached_by(sums)
    chosen: set[str] = set()
    kept = 0.0
    for name in reversed(order):
        with_it = kept + costs.units[name]
        if window.reached_by(sums_below[name] + with_it) if possible else with_it <= window.high:
            chosen.add(name)
            kept = with_it
    return chosen
