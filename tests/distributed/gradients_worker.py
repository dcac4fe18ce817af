"""One process's part of a gated run that records every gate gradient; batch-norm in eval, so batches do not matter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from greenprune.accounts import Records
from greenprune.config import Config, load_config
from greenprune.data import open_data
from greenprune.energy import open_meter
from greenprune.engine import Engine
from greenprune.gating import find_gates
from greenprune.network import prepare_network
from greenprune.tracking import RunFolder
from greenprune.trainer import Trainer


class RecordingEngine(Engine):
    """An engine that keeps the averaged gate gradients of every step."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.gradients: list[dict[str, list[float]]] = []

    def step(self) -> None:
        self.gradients.append(
            {
                f"{name}.{key}": parameter.grad.flatten().tolist()
                for name, gate in find_gates(self.module).items()
                for key, parameter in gate.named_parameters()
            }
        )
        super().step()


def hold_in_eval(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module


def mix_decisions(model: nn.Module) -> None:
    """Give every gate its own opinion of every sample, so that the ranks' rates differ from the first step on."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for gate in find_gates(model).values():
            gate.weight.normal_(0, 2, generator=generator)
            gate.bias.fill_(0.3)


def main(config_path: str, output: str) -> None:
    config = load_config(Path(config_path))
    engine = RecordingEngine(config)
    data = open_data(config.data, None, config.seed).to(engine.device)
    network = prepare_network(config, data)
    hold_in_eval(network.model)
    mix_decisions(network.model)
    folder = RunFolder(Path(output) / f"world-{engine.world_size}")
    if engine.is_main:
        folder.create(config)
    engine.wait()
    with open_meter(gpu_uuids=[], host=False) as meter:
        trainer = Trainer(config, data, engine, network, Records(folder, meter, None, [], []), None)
        trainer.fit()
    if engine.is_main:
        (folder.path / "gradients.json").write_text(json.dumps(engine.gradients))
    engine.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
