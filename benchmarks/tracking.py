"""What trackers cost a training step, paired in one process: turns with W&B (offline) and TensorBoard, turns without.

    python benchmarks/tracking.py

Turns alternate on the same network and batches: digits, batch 64, ResNet-38. Both record what the trainer records, a
train event every ten steps, a window and an epoch event every 22, to events.jsonl; one of them mirrors it. Given are
the median step, which most steps have nothing to do with, and the mean over whole turns, which bears all of the cost.
The table is written to ``benchmarks/results/tracking_<trackers>.md``, all figures to the ``.json`` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from greenprune.config import Config, DataConfig, ModelConfig, TrackingConfig
from greenprune.data import open_data
from greenprune.engine import Engine
from greenprune.mirrors import start_mirrors
from greenprune.models import build_model
from greenprune.optimization import build_optimizer
from greenprune.provenance import collect_provenance
from greenprune.tracking import EventLog, RunFolder

RESULTS = Path(__file__).parent / "results"
LOG_EVERY, STEPS_PER_EPOCH = 10, 22
UNITS = {f"stages.{index // 6}.{index % 6}": {"rate": 0.5, "openness": 0.5} for index in range(18)}
FIGURES: dict[str, Any] = {
    **{f"train__{key}": 0.5 for key in ("loss", "accuracy", "lr", "samples_per_s", "step_time_s")},
    **{f"structure__{key}": 9 for key in ("blocks", "gates", "channels", "params", "kept_cost")},
    **{f"energy__{key}": 12.5 for key in ("total_j", "power_w", "co2_g")},
    **{f"flops__{key}": 10**9 for key in ("forward", "train", "train_dense")},
}


class Training:
    """A network that is trained a turn at a time."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        data = open_data(config.data, None, config.seed)
        model = build_model(config.model, classes=data.classes, channels=data.channels, image_size=data.image_size)
        self.engine = Engine(config)
        self.engine.prepare(model, build_optimizer(config, model, total_steps=100_000))
        self.engine.model.train()
        self.batches = list(data.train_batches(0))
        self.step = 0

    def turn(self, seconds: float, events: EventLog) -> tuple[list[float], float]:
        """Seconds of each step, and seconds a step over the whole turn."""
        times: list[float] = []
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < seconds:
            step_s = time.perf_counter()
            images, labels = self.batches[self.step % len(self.batches)]
            self.engine.backward(functional.cross_entropy(self.engine.model(images), labels))
            self.engine.step()
            self.step += 1
            self.record(events)
            times.append(time.perf_counter() - step_s)
        return times, (time.perf_counter() - began_s) / len(times)

    def record(self, events: EventLog) -> None:
        """What the trainer records after a step."""
        if self.step % LOG_EVERY == 0:
            events.record("train", self.step, **FIGURES)
        if self.step % STEPS_PER_EPOCH == 0:
            events.record("window", self.step, gate__price=0.5, units=UNITS)
            events.record("epoch", self.step, eval__accuracy=0.5, eval__loss=1.0, **FIGURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--trackers", nargs="+", default=["wandb", "tensorboard"])
    args = parser.parse_args()
    config = Config(
        model=ModelConfig(name="resnet38"),
        data=DataConfig(batch_size=64),
        device="cpu",
        tracking=TrackingConfig(trackers=args.trackers, mode="offline"),
    )
    training = Training(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch))
        mirrors, notes = start_mirrors(training.engine, config, folder, os.environ, lambda *_: [], online=False)
        assert len(mirrors) == len(args.trackers), notes
        logs = {"without": EventLog(folder.path / "without.jsonl", []), "with": EventLog(folder.events, [*mirrors])}
        training.turn(args.seconds, logs["with"])  # warm-up
        turns: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
        for pair in range(args.pairs):
            for name in ("without", "with") if pair % 2 == 0 else ("with", "without"):
                times, mean_s = training.turn(args.seconds, logs[name])
                turns[name].append((statistics.median(times), mean_s))
        for log in logs.values():
            log.close()
        for mirror in mirrors:
            mirror.close()
        training.engine.finish()
    ratios = {
        what: [mine[index] / theirs[index] - 1 for mine, theirs in zip(turns["with"], turns["without"], strict=True)]
        for index, what in enumerate(("median step", "whole turn"))
    }
    write(args, turns, ratios)


def name_of(args: argparse.Namespace) -> str:
    """What the results are called."""
    return f"tracking_{'_'.join(args.trackers)}"


def write(
    args: argparse.Namespace, turns: dict[str, list[tuple[float, float]]], ratios: dict[str, list[float]]
) -> None:
    lines = [
        f"# What trackers cost: {args.pairs} pairs of turns of {args.seconds:g} s, digits, batch 64, ResNet-38",
        "",
        f"| | without, ms a step | with {' and '.join(args.trackers)}, offline | cost, median (quartiles) of pairs |",
        "| --- | --- | --- | --- |",
    ]
    for index, (what, costs) in enumerate(ratios.items()):
        without, mirrored = (
            1e3 * statistics.median(turn[index] for turn in turns[name]) for name in ("without", "with")
        )
        low, middle, high = statistics.quantiles(costs, n=4)
        cost = f"{100 * middle:+.2f} % ({100 * low:+.2f} to {100 * high:+.2f})"
        lines.append(f"| {what} | {without:.2f} | {mirrored:.2f} | {cost} |")
    text = "\n".join([*lines, "", f"    python benchmarks/tracking.py --trackers {' '.join(args.trackers)}", ""])
    print(text)
    RESULTS.joinpath(f"{name_of(args)}.md").write_text(text)
    provenance = collect_provenance(1, torch.device("cpu"))
    values = {
        "pairs": args.pairs,
        "seconds": args.seconds,
        "trackers": args.trackers,
        "turns": turns,
        "ratios": ratios,
        "made_by": provenance,
    }
    RESULTS.joinpath(f"{name_of(args)}.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
