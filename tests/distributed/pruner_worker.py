"""One process of a data-parallel loop of one's own around a Pruner, as docs/library.md tells it; prints the outcome."""

from __future__ import annotations

import hashlib
import json
import sys

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import greenprune.pruner
import greenprune.unit_cost
from greenprune import BudgetConfig, GateConfig, Pruner, RemovalConfig
from greenprune.energy import MeterUnavailable
from greenprune.models import CifarResNet

STEPS = 48


def only_rank_0_measures(*, fails: bool) -> None:
    def measure(*_: object) -> None:
        raise MemoryError("no room to measure") if fails else AssertionError("a rank of its own mind")

    if fails or dist.get_rank() != 0:
        greenprune.pruner.measure_unit_cost = measure  # type: ignore[assignment]


def no_counter(*_: object, **__: object) -> None:
    raise MeterUnavailable("nothing counts here", "nothing would help")


def main(unit: str, target: float, outcome: str = "succeeds") -> None:
    dist.init_process_group("gloo")
    only_rank_0_measures(fails=outcome == "fails")
    greenprune.unit_cost.open_counters = no_counter  # type: ignore[assignment]
    torch.manual_seed(0)
    model = CifarResNet(20, 10, channels=1)
    pruner = Pruner(
        model,
        torch.randn(8, 1, 8, 8),
        total_steps=STEPS,
        gate=GateConfig(units=["block", "channel"] if unit == "flops" else ["block"]),
        budget=BudgetConfig(target, unit),  # type: ignore[arg-type]
        removal=RemovalConfig(window=4, decide_by=0.8),
    )
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.05, momentum=0.9)
    wrapped = DistributedDataParallel(model)
    for step in range(STEPS):
        # Last batches are not the same for all: with this task, ranks that count each by its own come to differ.
        size = 5 if step % 4 == 3 and dist.get_rank() == 1 else 16
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        labels = torch.randint(0, 10, (size,), generator=generator)
        images = torch.randn(size, 1, 8, 8, generator=generator)
        images[:, 0, 0, 0] = labels.float()
        loss = functional.cross_entropy(wrapped(images), labels) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if pruner.step(optimizer):
            wrapped = DistributedDataParallel(model)
    pruner.finalize(optimizer)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    mine = {"weights": hashlib.sha256(weights).hexdigest(), **pruner.report()}
    found: list[object] = [None, None]
    dist.all_gather_object(found, mine)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    # Before the group, or the wrapper is the last to hold it, and PyTorch waits for the group's threads with the
    # interpreter's lock, for which one that lets go of a tensor may be waiting (seen with 2.11).
    del wrapped
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
