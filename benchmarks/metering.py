"""What metering costs a training step, paired in one process, and what CodeCarbon's default tracker costs beside it.

    python benchmarks/metering.py

Turns without a meter and turns with one alternate on the same network and batches. A metered turn is what the trainer
does: a window around it, a sampling thread, and the books read every ten steps. The meter reads two GPUs of the
stand-in for NVML (one by its counter, one by power samples) and the CPU and memory by their estimates; it samples five
times as often as by default, so that every short turn has its share. A few steps before each turn are not timed, for
opening a meter leaves the caches cold. Opening and closing is timed apart. CodeCarbon's
tracker runs with its defaults and measures every 15 s: turns of 16 s on a shared machine say nothing about its cost,
so that it is not paired. Because a shared machine's steps vary by more
than any of this, the CPU time that each meter takes by itself, while nothing else is done, is measured too. The table
is written to ``benchmarks/results/metering.md``, all figures to the ``.json`` beside it.
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
from contextlib import AbstractContextManager, contextmanager
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
sys.path.insert(0, str(ROOT / "tests"))
from nvml_stub import build_stub  # noqa: E402 - it is where the stand-in is

SCENARIO = "uuid=GPU-000 watts=200 limit=300 period=0.1;uuid=GPU-111 watts=200 limit=300 counter=0"
LOG_EVERY = 10
WARM_UP_STEPS = 5

AfterSteps = Callable[[], object]
Metered = Callable[[Engine], AbstractContextManager[AfterSteps]]


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

    def step(self, number: int) -> None:
        images, labels = self.batches[number % len(self.batches)]
        self.engine.backward(functional.cross_entropy(self.engine.model(images), labels))
        self.engine.step()

    def turn(self, seconds: float, every_ten: AfterSteps) -> list[float]:
        """Wall-clock seconds of each step."""
        for number in range(WARM_UP_STEPS):
            self.step(number)
        times: list[float] = []
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < seconds:
            step_s = time.perf_counter()
            self.step(len(times))
            if len(times) % LOG_EVERY == LOG_EVERY - 1:
                every_ten()
            times.append(time.perf_counter() - step_s)
        return times


def nothing() -> None:
    pass


@contextmanager
def bare(engine: Engine) -> Iterator[AfterSteps]:
    yield nothing


@contextmanager
def ours(engine: Engine, interval_s: float = 0.2) -> Iterator[AfterSteps]:
    with open_meter(
        gpu_uuids=["GPU-000", "GPU-111"], host=True, interval_s=interval_s, synchronize=engine.synchronize
    ) as meter:
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


def paired(training: Training, metered: Metered, seconds: float, pairs: int) -> dict[str, object]:
    """Ratios of metered turns to bare ones, taken pair by pair, with the order swapped each time."""
    median, mean, opened = [], [], []
    for number in range(pairs):
        results = {}
        for kind in ("bare", "metered") if number % 2 else ("metered", "bare"):
            began_s = time.perf_counter()
            with (bare if kind == "bare" else metered)(training.engine) as every_ten:
                opened_s = time.perf_counter() - began_s
                results[kind] = training.turn(seconds, every_ten)
            if kind == "metered":
                opened.append(opened_s)
        median.append(statistics.median(results["metered"]) / statistics.median(results["bare"]))
        mean.append(statistics.mean(results["metered"]) / statistics.mean(results["bare"]))
    return {
        "pairs": pairs,
        "turn_s": seconds,
        "bare_step_s": statistics.median(results["bare"]),
        "median_step_ratio": statistics.median(median),
        "median_step_ratio_quartiles": statistics.quantiles(median, n=4),
        "mean_step_ratio": statistics.median(mean),
        "mean_step_ratio_quartiles": statistics.quantiles(mean, n=4),
        "first_open_s": opened[0],
    }


def first_opening(training: Training, metered: Metered) -> dict[str, object]:
    began_s = time.perf_counter()
    with metered(training.engine):
        return {"first_open_s": time.perf_counter() - began_s}


def cpu_share(metered: Metered, engine: Engine, seconds: float, step_s: float) -> float:
    """Share of one core that a meter takes, all its threads together, while the process only sleeps."""
    with metered(engine) as every_ten:
        time.sleep(1.0)  # what opening leaves behind
        began_s, cpu_s = time.perf_counter(), time.process_time()
        while time.perf_counter() - began_s < seconds:
            time.sleep(LOG_EVERY * step_s)
            every_ten()
        return (time.process_time() - cpu_s) / (time.perf_counter() - began_s)


def percent(found: dict, key: str) -> str:
    low, _, high = found[f"{key}_quartiles"]
    return f"{100 * (found[key] - 1):+.2f} % ({100 * (low - 1):+.2f} to {100 * (high - 1):+.2f})"


def main() -> None:
    if os.environ.get("NVML_STUB") != SCENARIO:
        with_stub()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=180, help="pairs of turns with and without our meter")
    parser.add_argument("--seconds", type=float, default=0.4, help="length of such a turn")
    parser.add_argument(
        "--peer-pairs", type=int, default=2, help="pairs of turns with and without CodeCarbon's tracker"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    training = Training(args.batch_size)
    training.turn(5.0, nothing)
    found = {
        "none": paired(training, bare, args.seconds, args.pairs // 3),
        "greenprune": paired(training, ours, args.seconds, args.pairs),
        "CodeCarbon's tracker": first_opening(training, codecarbon),
    }
    step_s = found["greenprune"]["bare_step_s"]
    for name, metered, seconds in (
        ("none", bare, 10.0),
        ("greenprune", lambda engine: ours(engine, interval_s=1.0), 10.0),
        ("CodeCarbon's tracker", codecarbon, 31.0),
    ):
        found[name]["cpu_share"] = cpu_share(metered, training.engine, seconds, step_s)
    provenance = collect_provenance(1, torch.device("cpu"))
    text = table(found, provenance, args.batch_size)
    print(text)
    (RESULTS / "metering.md").write_text(text)
    result = {"provenance": provenance, "arguments": sys.argv[1:], "meters": found}
    (RESULTS / "metering.json").write_text(json.dumps(result, indent=1) + "\n")
    training.engine.finish()


def table(found: dict, provenance: dict, batch_size: int) -> str:
    lines = [
        "| meter | median step | mean step | pairs | CPU time of its own | first opening |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in found.items():
        cells = ["not paired", "", ""]
        if "pairs" in result:
            cells = [percent(result, "median_step_ratio"), percent(result, "mean_step_ratio")]
            cells.append(f"{result['pairs']} of {result['turn_s']:g} s")
        cells.append(f"{100 * result['cpu_share']:.2f} % of a core")
        cells.append(f"{1e3 * result['first_open_s']:.0f} ms")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Change against turns without a meter, median over pairs (quartiles). ResNet-20 on digits, batch "
        f"{batch_size}, a step of {1e3 * found['greenprune']['bare_step_s']:.1f} ms, 1 thread; {provenance['cpu']}, "
        f"codecarbon {provenance['versions']['codecarbon']}. The first row compares turns without a meter "
        "with each other: it is what the method itself is off by.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
