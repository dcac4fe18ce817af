"""A training process in which a loss, image, gradient, gate or weight of one rank goes wrong at a given step.

    python nonfinite_worker.py FAULT:VALUE:RANK:STEP[,...] [flags of a run]

FAULT is loss, image, gradient, gate or weight: an image of which the loss is not finite, or one that it is finite of.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

from greenprune.command import run_command
from greenprune.gating import find_gates
from greenprune.trainer import Trainer

FAULTS = [fault.split(":") for fault in sys.argv[1].split(",")]
train_step = Trainer._train_step


def broken_step(self: Trainer, images: Tensor, labels: Tensor) -> None:
    here = [
        (kind, float(value))
        for kind, value, rank, step in FAULTS
        if (int(rank), int(step)) == (self.engine.rank, self.step)
    ]
    if not here:
        return train_step(self, images, labels)
    ((kind, value),) = here
    module = self.engine.module
    hooks = []
    if kind in ("loss", "image"):
        images = images.clone()
        images[0] = value
    elif kind == "gradient":
        hooks.append(next(module.parameters()).register_hook(lambda gradient: torch.full_like(gradient, value)))
    elif kind == "gate":

        def break_gate(gate: Any, inputs: Any, decisions: Tensor) -> Tensor:
            gate.logit = torch.full_like(gate.logit, value)
            return decisions * value

        hooks.append(next(iter(find_gates(module).values())).register_forward_hook(break_gate))
    else:
        with torch.no_grad():
            next(module.parameters()).view(-1)[0] = value
    train_step(self, images, labels)
    for hook in hooks:
        hook.remove()
    return None


Trainer._train_step = broken_step  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(run_command(sys.argv[2:], os.environ, "train.py"))
