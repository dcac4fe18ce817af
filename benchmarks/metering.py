"""What metering costs a training step, paired in one process, and what CodeCarbon's default tracker costs beside it.

    python benchmarks/metering.py

Turns without a meter and turns with one alternate on the same network and batches. A metered turn is what the trainer
does: a window around it, the sampling thread at its default interval, and the books read every ten steps. The meter
reads two GPUs of the stand-in for NVML (one by its counter, one by power samples) and the CPU and memory by their
estimates. CodeCarbon's tracker runs with its defaults, in longer turns: it measures every 15 s. Opening and closing
is timed apart. The table is written to ``benchmarks/results/metering.md``, all figures to the ``.json`` beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.nn import functional

from greenprune.accounts import Accounts
from greenprune.config import Config, DataConfig, ModelConfig
from greenprune.data import open_data
from greenprune.energy import open_meter
from greenprune.engine import Engine
from greenprune.models import build_model
from greenprune.optimization import build_optimizer
from greenprune.provenance import collect_provenance

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT / "tests" / "energy"))
from stub import build_stub  # noqa: E402 - it is where the stand-in is

SCENARIO = "uuid=GPU-000 watts=200 limit=300 period=0.1;uuid=GPU-111 watts=200 limit=300 counter=0"
LOG_EVERY = 10

AfterSteps = Callable[[], object]


def with_stub() -> None:
    """Start this program again with the stand-in where the loader looks for NVML."""
    library = ROOT / "build" / "nvml"
    library.mkdir(parents=True, exist_ok=True)
    build_stub(library)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library),
        "PATH": f"{library}:{os.environ['PATH']}",
        "NVML_STUB": SCENARIO,
        "OMP_NUM_THREADS": "1",
    }
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


class Training:
    """A network that is trained a turn at a time."""

    def __init__(self, batch_size: int) -> None:
        config = Config(model=ModelConfig(name="resnet20"), data=DataConfig(batch_size=batch_size), device="cpu")
        torch.manual_seed(0)
        data = open_data(config.data, None, config.seed)
        model = build_model(config.model, classes=data.classes, channels=data.channels, image_size=data.image_size)
        self.engine = Engine(config)
        self.engine.prepare(model, build_optimizer(config, model, total_steps=100_000))
        self.engine.model.train()
        self.batches = list(data.train_batches(0))

    def turn(self, seconds: float, every_ten: AfterSteps) -> tuple[list[float], float]:
        """Wall-clock seconds of each step, and the process's CPU seconds a step, of all its threads."""
        times = []
        began_s, cpu_s = time.perf_counter(), time.process_time()
        while time.perf_counter() - began_s < seconds:
            images, labels = self.batches[len(times) % len(self.batches)]
            step_s = time.perf_counter()
            self.engine.backward(functional.cross_entropy(self.engine.model(images), labels))
            self.engine.step()
            if len(times) % LOG_EVERY == LOG_EVERY - 1:
                every_ten()
            times.append(time.perf_counter() - step_s)
        return times, (time.process_time() - cpu_s) / len(times)


def nothing() -> None:
    pass


@contextmanager
def ours(engine: Engine) -> Iterator[AfterSteps]:
    with open_meter(gpu_uuids=["GPU-000", "GPU-111"], host=True, synchronize=engine.synchronize) as meter:
        accounts = Accounts(engine, meter, None)
        with meter.window("train"):
            yield accounts.numbers


@contextmanager
def codecarbon(engine: Engine) -> Iterator[AfterSteps]:
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code="FRA", output_methods=[], allow_multiple_runs=True, log_level="critical"
    )
    tracker.start()
    yield nothing
    tracker.stop()


def paired(training: Training, metered: Callable[[Engine], object], seconds: float, pairs: int) -> dict[str, object]:
    """Ratios of metered turns to bare ones, taken pair by pair, with the order swapped each time."""
    wall, mean, cpu, opened = [], [], [], []
    steps = 0
    for number in range(pairs):
        results = {}
        for kind in ("bare", "metered") if number % 2 else ("metered", "bare"):
            began_s = time.perf_counter()
            context = nullcontext(nothing) if kind == "bare" else metered(training.engine)
            with context as every_ten:
                opened_s = time.perf_counter() - began_s
                results[kind] = training.turn(seconds, every_ten)
            if kind == "metered":
                opened.append(opened_s)
        (bare_s, bare_cpu_s), (metered_s, metered_cpu_s) = results["bare"], results["metered"]
        steps += len(metered_s)
        wall.append(statistics.median(metered_s) / statistics.median(bare_s))
        mean.append(statistics.mean(metered_s) / statistics.mean(bare_s))
        cpu.append(metered_cpu_s / bare_cpu_s)
    return {
        "pairs": pairs,
        "turn_s": seconds,
        "metered_steps": steps,
        "bare_step_s": statistics.median(bare_s),
        "median_step_ratio": statistics.median(wall),
        "median_step_ratio_quartiles": statistics.quantiles(wall, n=4),
        "mean_step_ratio": statistics.median(mean),
        "mean_step_ratio_quartiles": statistics.quantiles(mean, n=4),
        "cpu_time_ratio": statistics.median(cpu),
        "cpu_time_ratio_quartiles": statistics.quantiles(cpu, n=4),
        "open_s": statistics.median(opened),
    }


def percent(found: dict, key: str) -> str:
    low, _, high = found[f"{key}_quartiles"]
    return f"{100 * (found[key] - 1):+.2f} % ({100 * (low - 1):+.2f} to {100 * (high - 1):+.2f})"


def main() -> None:
    if os.environ.get("NVML_STUB") != SCENARIO:
        with_stub()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=120, help="pairs of turns with and without our meter")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of such a turn")
    parser.add_argument(
        "--peer-pairs", type=int, default=8, help="pairs of turns with and without CodeCarbon's tracker"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    training = Training(args.batch_size)
    training.turn(5.0, nothing)
    found = {
        "no meter at all": paired(training, lambda engine: nullcontext(nothing), args.seconds, args.pairs // 2),
        "greenprune": paired(training, ours, args.seconds, args.pairs),
        "CodeCarbon's tracker": paired(training, codecarbon, 16.0, args.peer_pairs),
    }
    lines = [
        "| meter | median step | mean step | CPU time | to open | pairs |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in found.items():
        lines.append(
            f"| {name} | {percent(result, 'median_step_ratio')} | {percent(result, 'mean_step_ratio')} "
            f"| {percent(result, 'cpu_time_ratio')} | {1e3 * result['open_s']:.0f} ms "
            f"| {result['pairs']} of {result['turn_s']:g} s |"
        )
    provenance = collect_provenance(1, torch.device("cpu"))
    lines += [
        "",
        f"Change against turns without a meter, median over pairs (quartiles). ResNet-20 on digits, batch "
        f"{args.batch_size}, a step of {1e3 * found['greenprune']['bare_step_s']:.1f} ms, 1 thread; "
        f"{provenance['cpu']}, codecarbon {provenance['versions']['codecarbon']}. The first row compares turns without "
        "a meter with each other: it is what the method itself is off by.",
    ]
    print("\n".join(lines))
    (RESULTS / "metering.md").write_text("\n".join(lines) + "\n")
    result = {"provenance": provenance, "arguments": sys.argv[1:], "meters": found}
    (RESULTS / "metering.json").write_text(json.dumps(result, indent=1) + "\n")
    training.engine.finish()


if __name__ == "__main__":
    main()
