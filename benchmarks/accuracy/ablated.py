"""A run of greenprune with one part of the method exchanged, where no field of the config does it.

    python benchmarks/accuracy/ablated.py --fixed-price 1 -- --config configs/digits.yaml --run_name fixed
    python benchmarks/accuracy/ablated.py --mask -- --config configs/digits.yaml --run_name masked
    python benchmarks/accuracy/ablated.py --first-order -- --config configs/digits.yaml --run_name first

``--fixed-price P`` puts the loss ``P * rho`` on the kept cost in place of the controlled price. The deadline settles
what is left against the budget all the same. ``--mask`` keeps a removed block in the network with its decision at 0 for
every sample, so that all of it goes on being computed and nothing of it counts; FLOPs are then those of the whole
network. ``--first-order`` takes the task's gradient of a decision as it is, without its curvature. Everything after
``--`` goes to ``greenprune train``.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor, nn

import greenprune.gating.gates
import greenprune.gating.policy
from greenprune.command import run_command
from greenprune.flops import Cost
from greenprune.gating.budget import BudgetController
from greenprune.network import UnitTable
from greenprune.surgery import Structure, Surgeon


def fix_price(price: float) -> None:
    """Have every run pay the same price for kept cost at every step after the warm-up."""

    class FixedPrice(BudgetController):
        """A price that does not move."""

        def penalty(self, kept: Tensor, kept_by_all: Tensor) -> Tensor:
            """``price * rho``."""
            del kept_by_all
            self.price = torch.full_like(self.price, price)
            return self.price * kept

    greenprune.gating.policy.BudgetController = FixedPrice  # type: ignore[misc]


def first_order() -> None:
    """Have gates learn from the task's gradient as it is."""
    greenprune.gating.gates._curvature = lambda samples, parts: 0.0


class Closed(nn.Module):
    """A gate that is off for every sample."""

    def forward(self, x: Tensor) -> Tensor:
        """Decisions [B] for an input [B, ...]."""
        return torch.zeros(len(x), device=x.device)


def mask() -> None:
    """Have removals of blocks leave all that they would take out."""

    def close(surgeon: Surgeon, name: str) -> None:
        surgeon._block(name).gate = Closed()

    def whole(table: UnitTable, _: Structure) -> Cost:
        return table.dense

    Surgeon.remove_block = close  # type: ignore[method-assign]
    UnitTable.cost_of = whole  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fixed-price", type=float)
    what.add_argument("--mask", action="store_true")
    what.add_argument("--first-order", action="store_true")
    parser.add_argument("flags", nargs="+", help="flags of greenprune train, after --")
    args = parser.parse_args()
    if args.fixed_price is not None:
        fix_price(args.fixed_price)
    elif args.first_order:
        first_order()
    else:
        mask()
    return run_command(args.flags, os.environ, prog="ablated.py")


if __name__ == "__main__":
    sys.exit(main())
