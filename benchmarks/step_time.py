"""Step time of a found sub-network against its dense twin's, paired in one process.

    python benchmarks/step_time.py runs/benchmarks/digits/gated-0.5-seed*  --batch-size 256

For each finished run, the dense network and the sub-network (the run's structure replayed on a fresh network) train in
turn (:mod:`turns`), a few steps each, on the same batches. The ratio of their times over that of their FLOPs says how
much of the saving in FLOPs is a saving in time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

import torch
from training import Training
from turns import take_turns

from greenprune.config import GateConfig, load_config
from greenprune.data import open_data
from greenprune.engine import Engine
from greenprune.provenance import collect_provenance
from greenprune.surgery import Structure

RESULTS = Path(__file__).parent / "results"
STEPS_A_TURN = 5
WARMUP_TURNS = 3


def measure(folder: Path, batch_size: int, turns: int) -> dict[str, object]:
    config = load_config(folder / "config.yaml")
    data_config = dataclasses.replace(config.data, batch_size=batch_size)
    config = dataclasses.replace(config, data=data_config, gate=GateConfig(enabled=False))
    structure = Structure.from_dict(json.loads((folder / "structure.json").read_text()))
    data = open_data(config.data, config.data.root or os.environ.get("GREENPRUNE_DATA"), config.seed)
    engine = Engine(config)
    data.to(engine.device, config.model.channels_last)
    epochs = itertools.chain.from_iterable(data.train_batches(epoch) for epoch in range(STEPS_A_TURN))
    batches = list(itertools.islice(epochs, STEPS_A_TURN))
    small, dense = (
        Training(
            config,
            data.image_size,
            channels=data.channels,
            classes=data.classes,
            structure=removed,
            batches=batches,
        )
        for removed in (structure, Structure())
    )
    found = take_turns({"small": small, "dense": dense}, turns=turns, steps=STEPS_A_TURN, warmup=WARMUP_TURNS)
    ratio = found.ratio("small", "dense")
    flops = small.cost.flops_train / dense.cost.flops_train
    return {
        "run": folder.name,
        "turns": turns,
        "step_s": found.median("small").value,
        "step_s_dense": found.median("dense").value,
        "time_ratio": ratio.value,
        "time_ratio_quartiles": [ratio.low, ratio.high],
        "flops_ratio": flops,
        "time_over_flops": ratio.value / flops,
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
