"""The optimizer of the weights and the gates, and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from greenprune.config import Config
from greenprune.gating import gate_parameters


def build_optimizer(config: Config, model: nn.Module, total_steps: int) -> torch.optim.Optimizer:
    """One optimizer with three groups: decayed weights, undecayed biases and norms, and gates.

    A step of the gates uses ``gate.lr / total_steps``: gates then travel as far in a short run as in a long one.

    Args:
        config: The run.
        model: The unwrapped network, with its gates.
        total_steps: Steps of the whole run.

    Returns:
        SGD with Nesterov momentum or AdamW; the groups carry their ``name``.
    """
    gates = gate_parameters(model)
    of_gates = set(gates)
    weights = [parameter for parameter in model.parameters() if parameter not in of_gates]
    optim = config.optim
    groups = [
        {"name": "decayed", "params": [p for p in weights if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"name": "undecayed", "params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        {"name": "gates", "params": gates, "weight_decay": 0.0, "lr": config.gate.lr / total_steps},
    ]
    # The fused kernels update all tensors in one pass, on the CPU too, where the default loops over parameters.
    if optim.name == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, fused=True)
    nesterov = optim.momentum > 0
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=nesterov, fused=True)


def build_schedule(config: Config, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """The learning rate over the run: linear warm-up, then cosine to zero or constant; gates stay constant.

    The rate depends on the step alone, so a change of structure leaves it as it is.
    """
    warmup = config.optim.warmup * total_steps

    def weights(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.optim.schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))

    def gates(step: int) -> float:
        return 1.0

    return LambdaLR(optimizer, [gates if group["name"] == "gates" else weights for group in optimizer.param_groups])
