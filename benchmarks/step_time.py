"""Step time of a found sub-network against its dense twin's, paired in one process.

    python benchmarks/step_time.py runs/benchmarks/digits/gated-0.5-seed*  --batch-size 256

For each finished run, the dense network and the sub-network (the run's structure replayed on a fresh network) train in
turn, a few steps each, on the same batches; the ratio is taken pair by pair, so that a drift of the machine's speed
meets both alike. The ratio over that of the FLOPs says how much of the saving in FLOPs is a saving in time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from greenprune.config import Config, load_config
from greenprune.data import ImageData, open_data
from greenprune.engine import Engine
from greenprune.flops import count_costs
from greenprune.models import build_model
from greenprune.optimization import build_optimizer
from greenprune.provenance import collect_provenance
from greenprune.surgery import Structure, replay

RESULTS = Path(__file__).parent / "results"
STEPS_A_TURN = 5
WARMUP_TURNS = 3


class Contestant:
    """One network with its engine and optimizer, trained a few steps at a time."""

    def __init__(self, config: Config, data: ImageData, structure: Structure) -> None:
        torch.manual_seed(config.seed)
        model = build_model(config.model, classes=data.classes, channels=data.channels, image_size=data.image_size)
        replay(structure, model)
        self.cost = count_costs(model, (data.channels, data.image_size, data.image_size))[""]
        if config.model.channels_last:
            model.to(memory_format=torch.channels_last)
        self.engine = Engine(config)
        self.engine.prepare(model, build_optimizer(config, model, total_steps=1000))
        self.engine.model.train()

    def turn(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Seconds a step over one turn."""
        self.engine.synchronize()
        start = time.perf_counter()
        for images, labels in batches:
            self.engine.backward(functional.cross_entropy(self.engine.model(images), labels))
            self.engine.step()
        self.engine.synchronize()
        return (time.perf_counter() - start) / len(batches)


def measure(folder: Path, batch_size: int, turns: int) -> dict[str, object]:
    config = load_config(folder / "config.yaml")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=batch_size))
    structure = Structure.from_dict(json.loads((folder / "structure.json").read_text()))
    data = open_data(config.data, config.data.root or os.environ.get("GREENPRUNE_DATA"), config.seed)
    small, dense = Contestant(config, data, structure), Contestant(config, data, Structure())
    data.to(small.engine.device, config.model.channels_last)
    batches = []
    for epoch in range(STEPS_A_TURN):
        batches += list(data.train_batches(epoch))
        if len(batches) >= STEPS_A_TURN:
            break
    batches = batches[:STEPS_A_TURN]
    pairs = [(small.turn(batches), dense.turn(batches)) for _ in range(WARMUP_TURNS + turns)][WARMUP_TURNS:]
    ratio = statistics.median(a / b for a, b in pairs)
    flops = small.cost.flops_train / dense.cost.flops_train
    return {
        "run": folder.name,
        "turns": turns,
        "step_s": statistics.median(a for a, _ in pairs),
        "step_s_dense": statistics.median(b for _, b in pairs),
        "time_ratio": ratio,
        "time_ratio_quartiles": statistics.quantiles([a / b for a, b in pairs], n=4),
        "flops_ratio": flops,
        "time_over_flops": ratio / flops,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished gated runs")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=20, help="pairs of turns, each of five steps")
    parser.add_argument("--name", default="step_time", help="name of the result files")
    args = parser.parse_args()
    found = [measure(folder, args.batch_size, args.turns) for folder in args.runs]
    lines = [
        "| run | step, ms | dense step, ms | time ratio | FLOPs ratio | time over FLOPs |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row['run']} | {row['step_s'] * 1e3:.1f} | {row['step_s_dense'] * 1e3:.1f} | {row['time_ratio']:.3f} "
            f"| {row['flops_ratio']:.3f} | {row['time_over_flops']:.3f} |"
        )
    middle = statistics.median(row["time_over_flops"] for row in found)
    provenance = collect_provenance(1, torch.device("cpu"))
    lines += [
        "",
        f"Median of time over FLOPs: {middle:.3f} (n = {len(found)} runs, {args.turns} pairs of {STEPS_A_TURN} steps "
        f"each, batch {args.batch_size}). {provenance['cpu']}, {provenance['threads']} threads, torch "
        f"{provenance['versions']['torch']}.",
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.md").write_text("\n".join(lines) + "\n")
    report = {"provenance": provenance, "arguments": sys.argv[1:], "runs": found}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
