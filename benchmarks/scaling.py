"""How a step's time goes with the number of ranks: measured on one and two processes, modelled, and forecast for more.

    python benchmarks/scaling.py            # measures, fits, validates and forecasts (5 minutes)
    python benchmarks/scaling.py --forecast # the forecast alone
    python benchmarks/scaling.py --refit    # fits and validates again, from the steps that are recorded

The model of a step of one rank (seconds)::

    compute  = host x kept blocks + sample x images a rank x kept FLOPs        one after the other (CPU)
             = max of the two                                                  side by side (GPU: launches and kernels)
    gradient = 2 (N - 1) / N x bytes of kept parameters / bandwidth + buckets x latency
    gates    = latency, while there are gates: their rates are needed before the backward pass begins
    step     = compute + what of the gradients' exchange does not hide behind the backward pass + gates + wait
    removals = their number x the pause / steps of the run

Its numbers for this machine are fitted on one process and on bare collectives, never on what is then predicted: whole
steps of two processes. ``wait``, what a step of several processes takes besides, is taken from one such case, the
smallest, which is left out of the validation. Those of the forecast are published figures or assumptions, each named
with its source.
The tables are written to ``benchmarks/results/scaling.md``, all figures to the ``.json`` beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from greenprune.engine.peers import WATCHED, beat_s

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
MIB = 2**20
FIRST_BUCKET, BUCKET = 1 * MIB, 25 * MIB  # torch's DistributedDataParallel
SIZES = [4, 2**12, 2**16, 2**20, 2**22, 2**24]  # numbers of a collective that is timed


@dataclass(frozen=True)
class Network:
    """What of a network matters to the model.

    Attributes:
        host_s: Seconds a step takes whatever its images: launches, optimizer, Python.
        sample_s: Seconds that one image takes, forward and backward.
        gradient_bytes: Bytes of the gradients of all parameters.
    """

    host_s: float
    sample_s: float
    gradient_bytes: float


@dataclass(frozen=True)
class Fabric:
    """What carries collectives.

    Attributes:
        bandwidth: Bytes a second that each rank sends in a ring.
        latency_s: Seconds of the smallest collective between two ranks or the ranks of one node.
        hop_s: Seconds more for each doubling of the number of nodes.
        node: Ranks of a node; more ranks than that use ``across``.
        across: Bytes a second of each rank between nodes.
        overlap: Share of compute behind which the exchange of gradients can hide.
        parallel: Whether launching and computing go on side by side.
        wait_s: Seconds of a step of several ranks besides: hooks, copies into buckets, one waiting for the other.
    """

    bandwidth: float
    latency_s: float
    hop_s: float = 0.0
    node: int = 2
    across: float = 0.0
    overlap: float = 0.0
    parallel: bool = False
    wait_s: float = 0.0

    def latency(self, ranks: int) -> float:
        """Seconds of the smallest collective over some ranks."""
        return 0.0 if ranks == 1 else self.latency_s + self.hop_s * math.log2(max(1.0, ranks / self.node))

    def all_reduce_s(self, size: float, ranks: int) -> float:
        """Seconds to sum so many bytes over some ranks."""
        if ranks == 1:
            return 0.0
        bandwidth = self.bandwidth if ranks <= self.node else self.across
        return self.latency(ranks) + 2 * (ranks - 1) / ranks * size / bandwidth


@dataclass(frozen=True)
class Kept:
    """What is left of a network, as shares of it, and whether there are still gates."""

    blocks: float = 1.0
    flops: float = 1.0
    params: float = 1.0
    gates: bool = True


def step_s(network: Network, fabric: Fabric, ranks: int, images: float, kept: Kept) -> float:
    """Seconds of a step.

    Args:
        network: The dense network.
        fabric: What carries collectives.
        ranks: Number of processes.
        images: Images of each of them.
        kept: What is left of the network.
    """
    host, samples = network.host_s * kept.blocks, network.sample_s * images * kept.flops
    compute = max(host, samples) if fabric.parallel else host + samples
    size = network.gradient_bytes * kept.params
    buckets = 1 + math.ceil(max(0.0, size - FIRST_BUCKET) / BUCKET)
    exchange = fabric.all_reduce_s(size, ranks) + (buckets - 1) * fabric.latency(ranks)
    gates = fabric.latency(ranks) if kept.gates else 0.0
    wait = fabric.wait_s if ranks > 1 else 0.0
    return compute + max(0.0, exchange - fabric.overlap * compute) + gates + wait


# Measuring: a worker, launched alone, twice side by side, or as two ranks of one run.

CASES = [("resnet38", 8, 1, (8, 32, 128)), ("resnet18", 32, 3, (2, 4, 8))]


def worker(turns: int) -> None:
    import torch
    import torch.distributed as dist
    from measurements import Setting, half_of
    from training import Training

    from greenprune.config import GateConfig
    from greenprune.engine import Engine
    from greenprune.surgery import Structure

    setting = Setting("cpu", Path(), None)
    rows: list[dict[str, Any]] = []
    engine: Engine | None = None
    for name, size, channels, batches in CASES:
        whole: Training | None = None
        for halved in (False, True):
            for batch in batches:
                config = setting.config(network=name, batch_size=batch)
                config = type(config)(**{**vars(config), "gate": GateConfig()})
                structure = half_of(whole.engine.module) if halved and whole else Structure()
                training = Training(config, size, channels=channels, structure=structure)
                if not halved:
                    whole = training
                engine = training.engine
                steps = 8 if size == 8 else 3
                seconds = [training.turn(steps) for _ in range(turns + 1)][1:]
                rows.append(
                    {
                        "network": name,
                        "halved": halved,
                        "images": batch,
                        "step_s": statistics.median(seconds),
                        "flops": training.cost.flops_train,
                        "params": training.cost.params,
                    }
                )
    assert engine is not None
    collectives = {}
    if engine.world_size > 1:
        for count in SIZES:
            values, taken = torch.zeros(count), []
            for _ in range(12):
                started_s = time.perf_counter()
                dist.all_reduce(values)
                taken.append(time.perf_counter() - started_s)
            collectives[4 * count] = statistics.median(taken[2:])
    if engine.is_main:
        print("RESULT " + json.dumps({"rows": rows, "collectives": collectives}), flush=True)
    engine.finish()


def launch(way: str, turns: int) -> dict[str, Any]:
    """One measurement: "alone" and "beside" (two at once) as one process, "two" as two ranks."""
    config = ROOT / "launch" / ("cpu_2.yaml" if way == "two" else "cpu.yaml")
    line = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file", str(config)]
    line += [__file__, "--worker", "--turns", str(turns)]
    paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    running = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2 if way == "beside" else 1)
    ]
    answers = [process.communicate() for process in running]
    found = [text for text in answers[0][0].splitlines() if text.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"scaling.py: {way} failed: {answers[0][1].strip().splitlines()[-1:]}")
    result: dict[str, Any] = json.loads(found[0].removeprefix("RESULT "))
    return result


WAYS = ("alone", "beside", "two")


def measure(repeats: int, turns: int) -> dict[str, list[dict[str, Any]]]:
    """What each way to launch measured, several times."""
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for repeat in range(repeats):  # in turn, so that a slow minute hits all of them
        for way in WAYS if repeat % 2 == 0 else reversed(WAYS):
            runs[way].append(launch(way, turns))
            print(f"{way}, {repeat + 1} of {repeats}", flush=True)
    return runs


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One run of the medians of several."""
    rows = [
        {**same[0], "step_s": statistics.median(row["step_s"] for row in same)}
        for same in zip(*(run["rows"] for run in runs), strict=True)
    ]
    sizes = runs[0]["collectives"]
    collectives = {int(size): statistics.median(run["collectives"][size] for run in runs) for size in sizes}
    return {"rows": rows, "collectives": collectives}


# Fitting and validating.


def fit_fabric(collectives: dict[int, float]) -> Fabric:
    """Latency and bandwidth of all-reduces between two ranks."""
    latency = min(collectives.values())
    largest = max(collectives)
    return Fabric(bandwidth=largest / (collectives[largest] - latency), latency_s=latency)


def fit_network(rows: list[dict[str, Any]]) -> Network:
    """Host time and time an image of a dense network on one process: a line through the step times."""
    images, seconds = [row["images"] for row in rows], [row["step_s"] for row in rows]
    line = statistics.linear_regression(images, seconds)
    return Network(max(0.0, line.intercept), line.slope, 4.0 * rows[0]["params"])


def fit_wait(fabric: Fabric, one: dict[str, Any], two: dict[str, Any]) -> Fabric:
    """With what the first case on two ranks took beyond the model."""
    first = two["rows"][0]
    dense = [row for row in one["rows"] if row["network"] == first["network"] and not row["halved"]]
    predicted = step_s(fit_network(dense), fabric, 2, first["images"], Kept())
    return replace(fabric, wait_s=max(0.0, first["step_s"] - predicted))


def validate(fabric: Fabric, one: dict[str, Any], two: dict[str, Any]) -> list[dict[str, Any]]:
    """Predicted and measured steps of two ranks, but for the one that was fitted on, and of halved networks on one."""
    found = []
    for name, *_ in CASES:
        dense = [row for row in one["rows"] if row["network"] == name and not row["halved"]]
        network = fit_network(dense)
        for ranks, rows in ((1, one["rows"]), (2, two["rows"][1:])):
            for row in rows:
                if row["network"] != name or (ranks == 1 and not row["halved"]):
                    continue
                share = row["flops"] / dense[0]["flops"]
                kept = Kept(0.5 if row["halved"] else 1.0, share, row["params"] / dense[0]["params"])
                predicted = step_s(network, fabric, ranks, row["images"], kept)
                found.append({**row, "ranks": ranks, "predicted_s": predicted, "error": predicted / row["step_s"] - 1})
    return found


# The forecast.

A100 = Fabric(bandwidth=235e9, latency_s=20e-6, hop_s=10e-6, node=8, across=20e9, overlap=0.5, parallel=True)
RESNET50 = Network(host_s=40e-3, sample_s=1 / 2470, gradient_bytes=4 * 25.6e6)
HALF = Kept(blocks=0.5, flops=0.5, params=0.5, gates=False)
SOURCES = [
    "ResNet-50, 224 x 224, mixed precision on one A100: 2,470 images/s (NVIDIA DeepLearningExamples, resnet50v1.5 "
    "README, DGX A100 80GB)",
    "host time of a step 40 ms: three times the 13 ms of an inference step of one image, which does not fall with the "
    "batch (the same README, eager, V100); assumed to be shared out over the blocks",
    "gradients fp32, 25.6 million parameters",
    "235 GB/s a rank within a node of 8 (bus bandwidth of nccl-tests on 8 x A100 SXM4: 230 to 250, a vendor's blog)",
    "between nodes 20 GB/s a rank (a 200 Gbit/s adapter for each GPU, as in a DGX A100, at 80 %): assumed",
    "latency 20 us within a node and 10 us more for each doubling of nodes: assumed",
    "half of the exchange's time can hide behind compute, and ranks do not wait for each other: assumed",
    "a removal pauses all ranks for 0.3 s (ZeRO-2 on this CPU's worst; DDP 0.03), 10 of them in a run: assumed not to "
    "grow with ranks",
]


def forecast() -> list[dict[str, Any]]:
    """Steps of ResNet-50 on 8, 64 and 4,096 GPUs: weak (256 images each), strong (16,384 in all, at most 256 each)."""
    rows = []
    for scaling in ("weak", "strong"):
        for ranks in (8, 64, 4096):
            images = 256.0 if scaling == "weak" else min(256.0, 16384 / ranks)
            dense = step_s(RESNET50, A100, ranks, images, Kept(gates=False))
            gated = step_s(RESNET50, A100, ranks, images, Kept())
            half = step_s(RESNET50, A100, ranks, images, HALF)
            alone = 256 / step_s(RESNET50, A100, 1, 256, Kept(gates=False))
            epoch_steps = 1_281_167 / (images * ranks)
            pauses_s = 10 * 0.3 / (90 * epoch_steps)
            rows.append(
                {
                    "scaling": scaling,
                    "ranks": ranks,
                    "images": images,
                    "dense_s": dense,
                    "gates_s": gated - dense,
                    "half_s": half,
                    "half_over_dense": half / dense,
                    "efficiency": images / dense / alone,
                    "removals_s": pauses_s,
                    "bound_by": bound_by(ranks, images),
                    "watch_requests_per_s": watch_requests_per_s(ranks),
                }
            )
    return rows


def bound_by(ranks: int, images: float) -> str:
    """What the dense step waits for most."""
    samples = RESNET50.sample_s * images
    compute = max(samples, RESNET50.host_s)
    exchange = A100.all_reduce_s(RESNET50.gradient_bytes, ranks)
    if exchange - A100.overlap * compute > compute:
        return "exchange"
    return "kernels" if samples >= RESNET50.host_s else "host"


def watch_requests_per_s(ranks: int) -> float:
    """Requests that all ranks together send to the key-value store to watch each other (greenprune/engine/peers.py).

    At every beat each rank tells of itself, asks whether any has failed, and asks two things of those it watches.
    """
    return ranks * (2 + 2 * min(WATCHED, ranks - 1)) / beat_s(ranks) if ranks > 1 else 0.0


def store_capacity(seconds: float = 2.0) -> float:
    """Requests a second that one process gets answered by torch's key-value store on this machine."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=20))
    store.set("key", "value" * 20)
    count, ends_s = 0, time.perf_counter() + seconds
    while time.perf_counter() < ends_s:
        store.get("key")
        count += 1
    return count / seconds


def forecast_table(rows: list[dict[str, Any]]) -> list[str]:
    heads = ["scaling", "GPUs", "images each", "dense step, ms", "gates' collective, ms", "half of it left, ms"]
    heads += [
        "half / dense",
        "images/s of a GPU over one alone",
        "removals, ms a step",
        "bound by",
        "watching, requests/s",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        times = [f"{1e3 * row[key]:.{digits}f}" for key, digits in (("dense_s", 1), ("gates_s", 2), ("half_s", 1))]
        cells = [row["scaling"], f"{row['ranks']:,}", f"{row['images']:.0f}", *times, f"{row['half_over_dense']:.2f}"]
        cells += [f"{row['efficiency']:.2f}", f"{1e3 * row['removals_s']:.2f}", row["bound_by"]]
        cells.append(f"{row['watch_requests_per_s']:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measured_table(alone: dict, beside: dict, two: dict) -> list[str]:
    """Weak scaling (the same images a rank) and strong scaling (the same images in all), where both were measured."""
    lines = [
        "| network | images a rank | alone, ms | beside another, ms | two ranks, ms | weak: two / alone | "
        "two / beside another | strong: two with half the images each / alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ranked = {(row["network"], row["halved"], row["images"]): row["step_s"] for row in two["rows"]}
    for one, other in zip(alone["rows"], beside["rows"], strict=True):
        key = (one["network"], one["halved"], one["images"])
        both = ranked[key]
        split = ranked.get((*key[:2], key[2] // 2))
        name = f"{one['network']}{', half of its blocks' if one['halved'] else ''}"
        times = [f"{1e3 * value:.1f}" for value in (one["step_s"], other["step_s"], both)]
        ratios = [f"{both / one['step_s']:.2f}", f"{both / other['step_s']:.2f}"]
        strong = "-" if split is None else f"{split / one['step_s']:.2f}"
        lines.append(f"| {' | '.join([name, str(one['images']), *times, *ratios, strong])} |")
    return lines


def validation_table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| network | ranks | images a rank | predicted, ms | measured, ms | error |", "|---|---|---|---|---|---|"]
    for row in found:
        name = f"{row['network']}{', half of its blocks' if row['halved'] else ''}"
        cells = [name, str(row["ranks"]), str(row["images"])]
        cells += [f"{1e3 * row['predicted_s']:.1f}", f"{1e3 * row['step_s']:.1f}", f"{100 * row['error']:+.0f} %"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forecast", action="store_true", help="only print the forecast")
    parser.add_argument("--refit", action="store_true", help="measure nothing, fit what is recorded")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.turns)
        return
    ahead = forecast()
    lines = [*forecast_table(ahead), "", "Assumed:", "", *(f"- {source}" for source in SOURCES)]
    if args.forecast:
        print("\n".join(lines))
        return
    import torch

    from greenprune.provenance import collect_provenance

    recorded = json.loads((RESULTS / "scaling.json").read_text()) if args.refit else {}
    provenance = recorded.get("provenance") or collect_provenance(2, torch.device("cpu"))
    runs: dict[str, list[dict[str, Any]]] = recorded.get("runs") or measure(args.repeats, args.turns)
    alone, beside, two = (medians(runs[way]) for way in WAYS)
    fabric = fit_wait(fit_fabric(two["collectives"]), beside, two)
    found = validate(fabric, beside, two)
    across = [abs(row["error"]) for row in found if row["ranks"] == 2]
    capacity = recorded.get("store_requests_per_s") or store_capacity()
    lines = [
        *measured_table(alone, beside, two),
        "",
        f"Gloo between two ranks: latency {1e6 * fabric.latency_s:.0f} us, {fabric.bandwidth / 1e9:.2f} GB/s. "
        f"Two ranks wait {1e3 * fabric.wait_s:.1f} ms a step besides (from the first case, which is not in the table).",
        "",
        *validation_table(found),
        "",
        f"Error of the predicted steps of two ranks: median {100 * statistics.median(across):.0f} %, largest "
        f"{100 * max(across):.0f} %. torch's key-value store answers {capacity:,.0f} requests/s to one process.",
        "",
        *lines,
        "",
        f"{provenance['cpu']}, {provenance['cpu_cores_usable']} cores, 1 thread a process, torch "
        f"{provenance['versions']['torch']}; medians of {len(runs['two'])} launches.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "scaling.md").write_text(text)
    content = {"provenance": provenance, "runs": runs, "fabric": asdict(fabric), "validation": found}
    content |= {"store_requests_per_s": capacity, "forecast": ahead, "sources": SOURCES}
    (RESULTS / "scaling.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
