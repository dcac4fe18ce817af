"""Trains on all ranks, removes units under an engine and trains on; prints what a test can check as JSON."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer

from greenprune.config import Config, DataConfig, GateConfig, ModelConfig, OptimConfig
from greenprune.engine import Engine
from greenprune.gating import attach_gates, find_gates
from greenprune.gating.gates import hold_within_bounds
from greenprune.models import build_model
from greenprune.optimization import build_optimizer
from greenprune.surgery import Surgeon, update_optimizer

BLOCK = "stages.1.1"
CHANNELS = "stages.0.1:hidden"
UNITS = (0, 3, 4, 9, 15)
BATCH = 16
STEPS_BEFORE, STEPS_AFTER = 10, 20


def digest(model: nn.Module) -> str:
    content = b"".join(parameter.detach().contiguous().numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha256(content).hexdigest()


def train_step(engine: Engine, step: int, parts: int) -> float:
    generator = torch.Generator().manual_seed(1000 * step + engine.rank)
    images = torch.randn(BATCH // 2, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (BATCH // 2,), generator=generator)
    total = torch.zeros(())
    for number, (part, targets) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
        with engine.accumulating(last=number + 1 == parts):
            logits = engine.model(part)
            assert logits.dtype == torch.float32
            loss = functional.cross_entropy(logits, targets) / parts
            engine.backward(loss)
            total += loss.detach()
    engine.step()
    hold_within_bounds(list(find_gates(engine.module).values()))
    return engine.mean(total).item()


def remove(surgeon: Surgeon) -> None:
    surgeon.remove_block(BLOCK)
    surgeon.remove_channels(CHANNELS, UNITS)


def operate(model: nn.Module, optimizer: Optimizer) -> None:
    surgeon = Surgeon(model)
    remove(surgeon)
    update_optimizer(optimizer, surgeon)


def switch_off(model: nn.Module) -> None:
    """The units that one run removes are off for all inputs in both, from the start."""
    gates = find_gates(model)
    with torch.no_grad():
        gates[BLOCK].bias.fill_(-1.0)
        gates[CHANNELS].bias[list(UNITS)] = -1.0


def expected_state(engine: Engine, make_optimizer: Callable[[nn.Module], Optimizer]) -> dict[str, Any]:
    """What a plain optimizer with the engine's state keeps after the same removal."""
    model = copy.deepcopy(engine.module)
    model.__dict__.pop("forward", None)
    optimizer = make_optimizer(model)
    optimizer.load_state_dict(engine.optimizer_state())
    operate(model, optimizer)
    return optimizer.state_dict()


def same_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one["state"].keys() != other["state"].keys() or not one["state"]:
        return False
    return all(
        kept.keys() == other["state"][number].keys()
        and all(torch.equal(torch.as_tensor(v), torch.as_tensor(other["state"][number][k])) for k, v in kept.items())
        for number, kept in one["state"].items()
    )


def largest_difference(masked: nn.Module, removed: nn.Module) -> float:
    """Of any weight of the survivors, relative to the largest of its tensor."""
    remove(Surgeon(masked))
    theirs = dict(masked.named_parameters())
    return max(
        ((mine - theirs[name]).abs().max() / theirs[name].abs().max().clamp_min(1e-12)).item()
        for name, mine in removed.named_parameters()
    )


def run(engine: Engine, config: Config, parts: int, change: str) -> tuple[dict[str, Any], nn.Module]:
    """Train on, with a change half way: remove the units, rebuild without a change, or nothing."""
    torch.manual_seed(0)
    model = build_model(config.model, classes=10, channels=1, image_size=8)
    attach_gates(model, config.gate)
    switch_off(model)
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)

    def make_optimizer(model: nn.Module) -> Optimizer:
        return build_optimizer(config, model, total_steps=10**9)  # the gates stand still

    engine.prepare(model, make_optimizer(model))
    engine.model.train()
    optimizer = engine.optimizer
    losses = [train_step(engine, step, parts) for step in range(STEPS_BEFORE)]
    kept = released = True
    if change == "remove":
        expected = expected_state(engine, make_optimizer)
        # On several processes there is a wrapper, and with it buckets and, under ZeRO, parts of everything.
        old = [weakref.ref(engine.model), weakref.ref(engine.module.get_submodule(BLOCK).branch)]
        engine.rebuild(operate)
        released = all(reference() is None for reference in old)
        kept = engine.optimizer is optimizer and same_state(expected, engine.optimizer_state())
    elif change == "rebuild":
        engine.rebuild(lambda model, optimizer: None)
    losses += [train_step(engine, STEPS_BEFORE + step, parts) for step in range(STEPS_AFTER)]
    result = {
        "losses": losses,
        "digests": engine.gather_objects(digest(engine.module)),
        "state_kept": engine.gather_objects(kept),
        "released": engine.gather_objects(released),
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
        "world_size": engine.world_size,
        "engine": engine.name,
    }
    engine.release()
    return result, engine.module


def compare(engine: Engine, config: Config, parts: int) -> dict[str, Any]:
    masked, twin = run(engine, config, parts, "nothing")
    untouched, _ = run(engine, config, parts, "rebuild")
    removed, network = run(engine, config, parts, "remove")
    difference = largest_difference(twin, network)
    return {"masked": masked, "untouched": untouched, "removed": removed, "difference": difference}


def main(precision: str) -> None:
    torch.set_num_threads(1)
    sgd = Config(
        model=ModelConfig(name="resnet20", channels_last=precision == "bf16"),  # as one would have it
        data=DataConfig(batch_size=BATCH),
        gate=GateConfig(kind="static", units=["block", "channel"]),
        optim=OptimConfig(lr=0.01),
        precision=precision,  # type: ignore[arg-type]
    )
    adamw = replace(sgd, optim=OptimConfig(name="adamw", lr=0.001))
    engine = Engine(sgd)
    found = {
        "sgd": compare(engine, sgd, 1),
        "adamw": compare(engine, adamw, 1),
        "sgd in 2 parts": compare(engine, sgd, 2),
    }
    if engine.is_main:
        print(json.dumps(found))
    engine.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
