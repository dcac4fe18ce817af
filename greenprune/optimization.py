"""The optimizer of the weights and the gates, its learning-rate schedule, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from greenprune.config import Config
from greenprune.gating import gate_parameters


def build_optimizer(config: Config, model: nn.Module, total_steps: int) -> torch.optim.Optimizer:
    """One optimizer with three groups: decayed weights, undecayed biases and norms, and gates.

    A step of the gates uses ``gate.lr`` divided by the run's steps: gates then travel as far in a short run as in a
    long one.

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
    of_step = config.gate.lr_of_step(total_steps, config.data.batch_size, adaptive=optim.name == "adamw")
    groups = [
        {"name": "decayed", "params": [p for p in weights if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"name": "undecayed", "params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        {"name": "gates", "params": gates, "weight_decay": 0.0, "lr": of_step},
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


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take up a state saved by ``state_dict``, laid out in memory as the parameters are.

    A run under DeepSpeed saves it row by row, and the fused kernels go through parameter and state in the order in
    which both lie in memory.
    """
    optimizer.load_state_dict(state)
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                kept[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


class WeightAverage:
    """Exponential moving average of a network's weights, in a network of its own.

    The n-th update keeps ``min(decay, (1 + n) / (10 + n))`` of the average, so that it forgets the untrained weights it
    started with (TensorFlow's ExponentialMovingAverage with num_updates). Running statistics are averaged alike.

    Args:
        model: The unwrapped network, not yet prepared for training.
        decay: Share of the average that an update keeps, in (0, 1).

    Attributes:
        module: The network of the averages; operations on the structure are to be carried out on it too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay

    def link(self, model: nn.Module) -> None:
        """Find the tensors to average; after each change of the structure, which both networks have gone through."""
        pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self._averages = [mine for mine, _ in pairs if mine.is_floating_point()]
        self._values = [theirs for mine, theirs in pairs if mine.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int, skipped: torch.Tensor | None = None) -> None:
        """Take in the weights after an optimizer step.

        Args:
            step: Number of the step in the run, from 0.
            skipped: 1 if the step was left out, else 0, a scalar on the device; None if steps are not left out.
        """
        kept = min(self.decay, (1 + step) / (10 + step))
        if skipped is None:
            torch._foreach_lerp_(self._averages, self._values, 1.0 - kept)
            return
        share = (1.0 - kept) * (1.0 - skipped)
        for average, value in zip(self._averages, self._values, strict=True):
            average.lerp_(value, share.to(average.dtype))


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]
