"""What a removal costs and saves under each engine: its pause, step time, memory and communication, on two processes.

    python benchmarks/engines.py

Each engine of launch/*_cpu_2.yaml trains a gated ResNet-56 with AdamW over gloo, loses half of its blocks and half of
the channels of the others, and trains on. The pause is the whole of ``Engine.rebuild``: unwrap, operate, wrap again;
the first step after it is given beside the later ones, because what is built lazily is built there. Bytes are those
that one rank hands to collectives in a step, counted by torch's profiler. Peak memory is the process's resident set
(``/proc/self/status``, VmHWM reset before each phase) over the steps; what all tensors hold between steps is counted
beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from greenprune.config import Config, DataConfig, GateConfig, ModelConfig, OptimConfig
from greenprune.engine import Engine
from greenprune.gating import attach_gates, find_gates, global_rates, take_decisions
from greenprune.models import build_model, find_channels, residual_blocks
from greenprune.optimization import build_optimizer
from greenprune.provenance import collect_provenance
from greenprune.surgery import Surgeon, update_optimizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
ENGINES = ["cpu_2", "deepspeed_zero0_cpu_2", "deepspeed_zero1_cpu_2", "deepspeed_zero2_cpu_2"]
MIB = 2**20


def halve(model: nn.Module, optimizer: Optimizer) -> None:
    """Take out every second block that keeps its shape, and every second channel of the others."""
    surgeon = Surgeon(model)
    for name in list(residual_blocks(model))[1::2]:
        surgeon.remove_block(name)
    for name, found in find_channels(model).sets.items():
        surgeon.remove_channels(name, range(0, found.units, 2))
    update_optimizer(optimizer, surgeon)


def step(engine: Engine, images: torch.Tensor, labels: torch.Tensor) -> None:
    loss = functional.cross_entropy(engine.model(images), labels)
    gates = list(find_gates(engine.module).values())
    if gates:
        local, openness = take_decisions(gates)
        shared = engine.mean(torch.stack([local.detach(), openness]))
        loss = loss + 1e-6 * global_rates(local, shared[0]).sum()
    engine.backward(loss)
    engine.step()


def collectives(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, dict[str, int]]:
    """Calls and bytes of each kind of collective in one step."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step(engine, *batch)
    found: dict[str, dict[str, int]] = {}
    for event in profiler.events():
        if not event.name.startswith("gloo:"):
            continue
        numbers = sum(torch.Size(shape).numel() for shape in event.input_shapes if shape and isinstance(shape[0], int))
        numbers += sum(torch.Size(s).numel() for shape in event.input_shapes for s in shape if isinstance(s, list))
        entry = found.setdefault(event.name.removeprefix("gloo:"), {"calls": 0, "bytes": 0})
        entry["calls"] += 1
        entry["bytes"] += 4 * numbers
    return found


def tensor_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, nn.Parameter) and item.device.type == "cpu":  # no stand-ins of compilation
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_of(steps: Any) -> int:
    """Largest resident set while something is done, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    steps()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor], count: int) -> dict[str, Any]:
    times: list[float] = []

    def steps() -> None:
        for _ in range(count):
            started = time.perf_counter()
            step(engine, *batch)
            times.append(time.perf_counter() - started)

    peak = peak_of(steps)
    return {
        "first_step_s": times[0],
        "step_s": statistics.median(times[2:]),
        "peak_rss": peak,
        "tensor_bytes": tensor_bytes(),
        "parameters": sum(parameter.numel() for parameter in engine.module.parameters()),
    }


def worker(compiled: bool, count: int) -> None:
    torch.set_num_threads(1)
    config = Config(
        model=ModelConfig(name="resnet56", compile=compiled),
        data=DataConfig(batch_size=64),
        gate=GateConfig(units=["block", "channel"]),
        optim=OptimConfig(name="adamw", lr=1e-3),
    )
    torch.manual_seed(0)
    engine = Engine(config)
    model = build_model(config.model, classes=10, channels=3, image_size=32)
    attach_gates(model, config.gate)
    engine.prepare(model, build_optimizer(config, model, total_steps=10**9))
    del model
    engine.model.train()
    batch = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    for _ in range(3):  # DDP orders its buckets in the second
        step(engine, *batch)
    sent = collectives(engine, batch)  # first, so that what the profiler keeps is in the memory of both phases
    before = measure(engine, batch, count) | {"collectives": sent}
    engine.wait()
    started = time.perf_counter()
    engine.rebuild(halve)
    engine.wait()
    pause_s = time.perf_counter() - started
    after = measure(engine, batch, count)
    after["collectives"] = collectives(engine, batch)
    if engine.is_main:
        print("RESULT " + json.dumps({"engine": engine.name, "pause_s": pause_s, "before": before, "after": after}))
    engine.finish()


def launch(name: str, compiled: bool, count: int) -> dict[str, Any]:
    line = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--config_file"]
    line += [str(ROOT / "launch" / f"{name}.yaml"), __file__, "--worker", "--steps", str(count)]
    done = subprocess.run(
        line + ["--compile"] * compiled,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    found = [text for text in done.stdout.splitlines() if text.startswith("RESULT ")]
    if not found:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(found[0].removeprefix("RESULT "))


def traffic(phase: dict[str, Any]) -> str:
    total = sum(entry["bytes"] for entry in phase["collectives"].values())
    calls = sum(entry["calls"] for entry in phase["collectives"].values())
    return f"{total / MIB:.2f} MiB in {calls}"


def row(label: str, runs: list[dict[str, Any]]) -> str:
    def middle(get: Any) -> float:
        return statistics.median(get(run) for run in runs)

    first = runs[0]
    pauses = [run["pause_s"] for run in runs]
    cells = [
        label,
        f"{statistics.median(pauses):.3f} ({min(pauses):.3f}-{max(pauses):.3f})",
        f"{middle(lambda r: r['after']['first_step_s'] / r['after']['step_s']):.1f}",
        f"{middle(lambda r: r['after']['step_s'] / r['before']['step_s']):.2f}",
        traffic(first["before"]),
        traffic(first["after"]),
        *(
            " / ".join(f"{middle(lambda r, p=phase, w=what: r[p][w]) / MIB:.1f}" for phase in ("before", "after"))
            for what in ("tensor_bytes", "peak_rss")
        ),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help="also DDP with compiled blocks (minutes)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.worker:
        worker(args.compile, args.steps)
        return
    results: dict[str, list[dict[str, Any]]] = {}
    cases = [(name, False) for name in ENGINES] + [("cpu_2", True)] * args.compile
    for repeat in range(args.repeats):  # in turn, so that a slow minute hits all of them
        for name, compiled in cases:
            if compiled and repeat > 0:
                continue
            found = launch(name, compiled, args.steps)
            label = found["engine"] + (", compiled" if compiled else "")
            results.setdefault(label, []).append(found)
            print(f"{label}: pause {found['pause_s']:.3f} s", flush=True)
    provenance = collect_provenance(2, torch.device("cpu"))
    some = next(iter(results.values()))[0]
    lines = [
        "| engine | pause, s (range) | first step after / later ones | step after / before | a rank sends a step, "
        "before | after | tensors before / after, MiB | peak memory before / after, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(label, runs) for label, runs in results.items()),
        "",
        f"ResNet-56 with conditional gates on blocks and channels, AdamW, fp32, global batch 64 of 32x32 images, two "
        f"processes over gloo with a thread each; {some['before']['parameters']:,} parameters before, "
        f"{some['after']['parameters']:,} after. Median of {args.repeats} launches (compiled: one). "
        f"{provenance['cpu']}, torch {provenance['versions']['torch']}.",
    ]
    print("\n".join(lines))
    (RESULTS / "engines.md").write_text("\n".join(lines) + "\n")
    report = {"provenance": provenance, "arguments": sys.argv[1:], "runs": results}
    (RESULTS / "engines.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
