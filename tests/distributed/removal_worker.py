"""Trains on all ranks, removes a unit under data parallelism, trains on; prints what a test can check as JSON."""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from greenprune.config import Config, GateConfig, ModelConfig, OptimConfig
from greenprune.engine import Engine
from greenprune.gating import attach_gates
from greenprune.models import build_model
from greenprune.optimization import build_optimizer
from greenprune.surgery import Surgeon, update_optimizer

UNIT = "stages.1.1"
STEPS_BEFORE, STEPS_AFTER = 10, 20


def digest(model: nn.Module) -> str:
    content = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha256(content).hexdigest()


def train_step(engine: Engine, step: int) -> float:
    generator = torch.Generator().manual_seed(1000 * step + engine.rank)
    images = torch.randn(8, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (8,), generator=generator)
    loss = functional.cross_entropy(engine.model(images), labels)
    engine.backward(loss)
    engine.step()
    return engine.mean(loss.detach()).item()


def state_of(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    return {
        parameter: {key: value.clone() for key, value in state.items() if torch.is_tensor(value)}
        for parameter, state in optimizer.state.items()
    }


def run(optimizer_name: str, remove: bool) -> dict[str, object]:
    config = Config(
        model=ModelConfig(name="resnet20"),
        gate=GateConfig(kind="static"),
        optim=OptimConfig(name=optimizer_name, lr=0.01 if optimizer_name == "adamw" else 0.05),
    )
    torch.manual_seed(0)
    model = build_model(config.model, classes=10, channels=1, image_size=8)
    attach_gates(model, config.gate)
    engine = Engine(config)
    engine.prepare(model, build_optimizer(config, model, total_steps=10**9))  # the gates stand still
    engine.model.train()
    unit = model.get_submodule(UNIT)
    with torch.no_grad():
        unit.gate.bias.fill_(-1.0)  # off for all inputs, from the start in both runs
    losses = [train_step(engine, step) for step in range(STEPS_BEFORE)]
    kept = True
    if remove:
        optimizer = engine.optimizer
        before = state_of(optimizer)

        def operate(inner: nn.Module, raw: Optimizer) -> None:
            Surgeon(inner).remove_block(UNIT)
            update_optimizer(raw, Surgeon(inner))

        engine.rebuild(operate)
        survivors = set(engine.module.parameters())
        kept = engine.optimizer is optimizer and set(optimizer.state) == survivors
        kept = kept and all(
            torch.equal(value, before[parameter][key])
            for parameter in survivors
            for key, value in optimizer.state[parameter].items()
            if torch.is_tensor(value)
        )
    losses += [train_step(engine, STEPS_BEFORE + step) for step in range(STEPS_AFTER)]
    return {
        "losses": losses,
        "digests": engine.gather_objects(digest(engine.module)),
        "state_kept": engine.gather_objects(kept),
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "world_size": engine.world_size,
    }


def main(optimizer_name: str) -> None:
    torch.set_num_threads(1)
    masked = run(optimizer_name, remove=False)
    removed = run(optimizer_name, remove=True)
    engine = Engine(Config())
    if engine.is_main:
        print(json.dumps({"masked": masked, "removed": removed}))
    engine.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
