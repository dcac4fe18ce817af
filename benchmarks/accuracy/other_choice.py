"""The schedule of another run, its units chosen otherwise: as much of the cost, at the same steps.

What differs from that run is which units go. Its gates are there and stay open, and everything else is as in the
config, which is to be that of the run.
"""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

import greenprune.run
from greenprune.command import run_command
from greenprune.config import load_config, parse_config
from greenprune.gating import GatePolicy, UnitWindow, Verdict, channel_unit, split_unit
from greenprune.surgery import Structure
from greenprune.trainer import Trainer

STILL = "1e-12"
"""Learning rate of gates that do not move."""


class OtherChoice(GatePolicy, ABC):
    """Removes units of its own choice when another run has removed its own.

    Attributes:
        schedule: The other run's structure.
        seed: Where chance comes from.
        model: The network with its gates.
    """

    schedule: Structure
    seed: int
    model: nn.Module

    @abstractmethod
    def order(self) -> Iterable[tuple[str, int]]:
        """Channels, each with the name of its set and its index in the dense network, those first that go first."""

    @abstractmethod
    def blocks(self, left: list[str], steps_done: int) -> list[Verdict]:
        """Blocks of those left that go at a step, in a run without gates of channels."""

    def penalty_of_pass(self, *args: Any, **kwargs: Any) -> None:
        """No penalty; decisions are counted as ever."""
        super().penalty_of_pass(*args, **kwargs)

    def _decide(self, window: dict[str, UnitWindow], steps_done: int, *, final: bool) -> list[Verdict]:
        verdicts = self._channels(steps_done) if self.costs.channels else self.blocks(sorted(window), steps_done)
        if final:
            gone = {verdict.unit for verdict in verdicts if verdict.channels is None}
            owners = dict.fromkeys(split_unit(unit)[0] for unit in window)
            verdicts += [Verdict(owner, "freeze", "settled") for owner in owners if owner not in gone]
        return verdicts

    def _channels(self, steps_done: int) -> list[Verdict]:
        """The next channels in order, down to the other run's cost at this step."""
        gone: set[str] = set()
        for removal in self.schedule.removed():
            if removal.step <= steps_done:
                blocks = [name for name in self.costs.everything() if name.startswith(f"{removal.unit}:")]
                of_set = [channel_unit(removal.unit, index) for index in removal.channels or ()]
                gone.update(of_set or [removal.unit, *blocks])
        goal = self.costs.kept(self.costs.everything() - gone)
        present, going = set(self.present), dict[str, list[int]]()
        for name, index in self.order():
            if self.costs.kept(present) <= goal + 1e-9:
                break
            if channel_unit(name, index) in present:
                present.remove(channel_unit(name, index))
                going.setdefault(name, []).append(index)
        return [Verdict(name, "remove", "settled", tuple(sorted(indices))) for name, indices in going.items()]


def train_with(choice: type[OtherChoice], prog: str) -> int:
    """Do the run of a command line: another run's folder or its ``structure.json``, then flags of a run.

    Args:
        choice: The policy that takes the place of the gates' own.
        prog: Name of the command, for messages.

    Returns:
        The command's exit status.
    """
    path, flags = Path(sys.argv[1]), sys.argv[2:]
    file = greenprune.run.RunFolder(path).structure if path.is_dir() else path
    structure = Structure.from_dict(json.loads(file.read_text()))
    if path.is_dir() and len(units := load_config(greenprune.run.RunFolder(path).config).gate.units) != 1:
        sys.exit(f"{path}: gate.units {list(units)} cannot be exchanged; expected a run of one kind")
    # A block of whose channels none is left goes as a whole, in a run of channels too.
    unit = "block" if all(removal.channels is None for removal in structure.removed()) else "channel"
    seed = parse_config(flags).seed

    class OtherTrainer(Trainer):
        """A trainer whose policy chooses otherwise."""

        def _new_policy(self) -> GatePolicy:
            policy = super()._new_policy()
            policy.__class__ = choice
            assert isinstance(policy, choice)
            policy.schedule, policy.seed, policy.model = structure, seed, self.engine.module
            return policy

    greenprune.run.Trainer = OtherTrainer  # type: ignore[misc]
    flags += ["--gate.units", f"[{unit}]", "--gate.kind", "static", "--gate.lr", STILL]
    return run_command(flags, os.environ, prog=prog)
