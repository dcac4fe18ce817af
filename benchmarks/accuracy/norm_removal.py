"""Channels of the smallest norm removed at the schedule of a run of channels: as much of the cost, at the same steps.

    python benchmarks/accuracy/norm_removal.py runs/NAME --config configs/digits.yaml --run_name norm

NAME's folder, or its ``structure.json`` alone, says how much went when. Everything else is as in the config, which is
to be that of the run: the gates are there and stay open, so that what differs is which channels go, and nothing is
learnt for it. It is what a gate has to be better than to be worth its cost.

A channel's norm is that of all weights that would go with it, its filter, its scale and shift and what the next layer
takes from it, over the mean of its layer: as DepGraph (Fang et al. 2023, arXiv 2301.12900) compares the groups of all
layers. The last channel of a layer stays.
"""

from __future__ import annotations

import sys

import torch
from other_choice import OtherChoice, train_with
from torch import Tensor, nn

from greenprune.gating import Verdict, split_unit
from greenprune.models import ChannelSet, find_channels


def group_norms(model: nn.Module, found: ChannelSet) -> Tensor:
    """Norms [U] of all weights that go with each unit of a set."""
    squares = torch.zeros(found.units, dtype=torch.float64)
    for piece in found.slices:
        tensor = getattr(model.get_submodule(piece.module), piece.tensor)
        if isinstance(tensor, nn.Parameter):
            entries = tensor.detach().double().movedim(piece.dim, 0)
            squares += entries.reshape(piece.repeats, found.units, -1).square().sum((0, 2)).cpu()
    return squares.sqrt()


class ByNorm(OtherChoice):
    """The smallest norms go, over all layers."""

    def blocks(self, left: list[str], steps_done: int) -> list[Verdict]:
        """None: blocks have no norm to be told apart by."""
        raise SystemExit("norm_removal.py: a run of blocks cannot be followed; expected one of channels")

    def order(self) -> list[tuple[str, int]]:
        """Channels that are left but the last of each set, by how small their norm is in their layer."""
        indices: dict[str, list[int]] = {}
        for unit in self._units:
            name, index = split_unit(unit)
            assert index is not None
            indices.setdefault(name, []).append(index)
        ranked: list[tuple[float, str, int]] = []
        sets = find_channels(self.model).sets
        for name, of_set in indices.items():
            norms = group_norms(self.model, sets[name])
            by_size = sorted(zip((norms / norms.mean()).tolist(), of_set, strict=True))
            ranked += [(norm, name, index) for norm, index in by_size[:-1]]
        return [(name, index) for _, name, index in sorted(ranked)]


if __name__ == "__main__":
    sys.exit(train_with(ByNorm, "norm_removal.py"))
