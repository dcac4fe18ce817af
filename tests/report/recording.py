"""Writes what a run leaves behind, without training: events that follow simple rules, and the files beside them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

STEPS = 10
BATCH = 64
FORWARD = 1_000_000
SOURCES = [["cpu", "RAPL counter", "counter"], ["dram", "CodeCarbon: constant 20 W", "estimate"]]


def config(seed: int, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "seed": seed,
        "output_dir": "runs",
        "run_name": f"run-{seed}",
        "resume": "auto",
        "precision": "no",
        "model": {"name": "resnet38"},
        "data": {"name": "digits", "batch_size": BATCH},
        "optim": {"name": "sgd", "lr": 0.05, "epochs": 4},
        "gate": {"enabled": True, "units": ["block", "channel"]},
        "budget": {"target": 0.5, "unit": "flops"},
        "tracking": {"trackers": []},
    }
    for key, value in changes.items():
        owner, _, name = key.partition("__")
        if name:
            values[owner][name] = value
        else:
            values[owner] = value
    return values


def record_run(
    folder: Path, *, seed: int = 0, gated: bool = True, epochs: int = 4, blocks: int = 6, data: str = "digits"
) -> list[dict[str, Any]]:
    """A run whose last two blocks go: one at the end of epoch 2, one of epoch 3, and half the channels of the first."""
    numbers = random.Random(f"{seed} {gated}")
    names = [f"stages.{index // 3}.{index % 3}" for index in range(blocks)]
    sets = {f"{name}:hidden": 8 for name in names} if gated else {}
    events: list[dict[str, Any]] = []
    energy_j, flops, dense, left, share = 0.5, 0, 0, list(names), 1.0
    channels = 8 * blocks if gated else 0
    gates = 2 * blocks if gated else 0

    def structure() -> dict[str, Any]:
        return {
            "structure/blocks": len(left),
            "structure/gates": gates,
            "structure/channels": channels,
            "structure/params": round(500_000 * share),
            "structure/kept_cost": share,
            "flops/forward": round(FORWARD * share),
        }

    def spent(step: int) -> dict[str, Any]:
        return {
            "flops/train": flops,
            "flops/train_dense": dense,
            "energy/total_j": energy_j,
            "energy/power_w": 30.0,
            "energy/co2_g": None,
            "time_s": step * 0.1,
        }

    def add(kind: str, step: int, **values: Any) -> None:
        events.append({"time": 1_790_000_000.0 + step, "step": step, "kind": kind, **values})

    add(
        "start",
        0,
        run=folder.name,
        attempt=1,
        resumed_from=None,
        model="resnet38",
        data=data,
        seed=seed,
        gated=gated,
        budget_target=0.5 if gated else None,
        budget_unit="flops",
        precision="no",
        device="cpu",
        world_size=1,
        batch_size=BATCH,
        train_samples=STEPS * BATCH,
        eval_samples=359,
        accuracy_kind="test",
        epochs=epochs,
        steps_per_epoch=STEPS,
        units=names,
        channels=sets,
        energy_sources=SOURCES,
        notes=["a note of the meter"],
        **structure(),
        **spent(0),
        **{"flops/forward_dense": FORWARD, "structure/params_dense": 500_000},
    )
    step_times, removals = [], []
    accuracy = 0.0
    for epoch in range(1, epochs + 1):
        step = epoch * STEPS
        before_j = energy_j
        energy_j += numbers.uniform(8, 12) * share
        flops += round(3 * FORWARD * share) * STEPS * BATCH
        dense += 3 * FORWARD * STEPS * BATCH
        step_times.append(round(0.1 * share, 4))
        add(
            "train",
            step,
            epoch=float(epoch),
            **{"train/loss": 1 / epoch, "train/accuracy": 0.5, "train/lr": 0.1, "train/samples_per_s": 640.0},
            **{"train/step_time_s": step_times[-1], "gate/price": 0.1 if gated else None},
            **structure(),
            **spent(step),
        )
        if gated and epoch <= 3:
            units: dict[str, Any] = {name: {"rate": 0.75, "openness": 0.7} for name in left}
            for name in left:
                units[f"{name}:hidden"] = {"unit": list(range(8)), "rate": [1.0] * 6 + [0.5] * 2, "openness": [0.9] * 8}
            add("window", step, **{"gate/price": 0.1, "gate/target": 0.5, "structure/kept_cost": share}, units=units)
            if epoch >= 2:
                went = [(left.pop(), None)]
                if epoch == 2:
                    went.append((f"{names[0]}:hidden", [1, 3, 4, 7]))
                share -= 0.2
                gates -= 2
                channels -= 8 + (4 if epoch == 2 else 0)
                for unit, gone in went:
                    add("removal", step, epoch=float(epoch), unit=unit, reason="off", channels=gone, **structure())
                    removals.append({"unit": unit, "step": step, "epoch": float(epoch), "reason": "off", "channels": 4})
                add("surgery", step, pause_s=0.01)
        accuracy = 0.9 + 0.02 * epoch / epochs + numbers.uniform(0, 0.01)
        add(
            "epoch",
            step,
            epoch=epoch,
            **{"train/loss": 1 / epoch, "train/accuracy": 0.5, "eval/loss": 0.3, "eval/accuracy": accuracy},
            **structure(),
            **spent(step),
            **{"energy/epoch_j": energy_j - before_j},
        )
        add("checkpoint", step, path="checkpoints/x", pause_s=0.01, **spent(step))
    energy_j += 0.25
    summary = {
        "run": folder.name,
        "model": "resnet38",
        "data": data,
        "seed": seed,
        "gated": gated,
        "accuracy": accuracy,
        "accuracy_kind": "test",
        "loss": 0.3,
        "params": round(500_000 * share),
        "params_dense": 500_000,
        "flops_forward": round(FORWARD * share),
        "flops_forward_dense": FORWARD,
        "flops_train": flops,
        "flops_train_dense": dense,
        "kept_cost": share,
        "budget_target": 0.5 if gated else None,
        "budget_unit": "flops",
        "gates_left": 0,
        "blocks": len(left),
        "blocks_dense": blocks,
        "channels": channels,
        "channels_dense": 8 * blocks if gated else 0,
        "removals": removals,
        "energy_j": energy_j,
        "energy_quality": "estimate",
        "energy_complete": True,
        "energy_bound_j": None,
        "energy_lost_j": 0.0,
        "energy_by_phase_j": {"train": 0.9 * energy_j, "eval": 0.1 * energy_j},
        "energy_by_device_j": {
            "cpu (counter: RAPL counter)": 0.6 * energy_j,
            "dram (estimate: CodeCarbon: constant 20 W)": 0.4 * energy_j,
        },
        "co2_g": None,
        "carbon_intensity_g_per_kwh": None,
        "time_s": epochs * STEPS * 0.1,
        "step_time_s": {"before": 0.1, "after": step_times[-1] if gated else None},
        "attempts": 1,
        "samples": epochs * STEPS * BATCH,
        "epochs": epochs,
        "batch_size": BATCH,
        "precision": "no",
        "device": "cpu",
        "world_size": 1,
    }
    add("end", epochs * STEPS, summary=summary)
    folder.mkdir(parents=True)
    write_events(folder, events)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(json.dumps(config(seed, gate__enabled=gated, data__name=data)))  # also YAML
    provenance = {"cpu": "a CPU", "gpus": [], "git": {"revision": "abc"}, "versions": {"torch": "2.14"}, "processes": 1}
    (folder / "provenance.jsonl").write_text(json.dumps(provenance) + "\n")
    return events


def write_events(folder: Path, events: list[dict[str, Any]], rest: str = "") -> None:
    """The events, and after them whatever a killed process left."""
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + rest)


def damage_line(folder: Path, number: int, line: bytes = b'{"time": 17') -> None:
    """Put what is no event in place of a line of the log, counted from 1, as a bad disk may."""
    path = folder / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = line + b"\n"
    path.write_bytes(b"".join(lines))


def stop_before(folder: Path, events: list[dict[str, Any]], step: int, rest: str = "") -> None:
    """Make a finished run one that was killed, or still goes on, after a step."""
    (folder / "summary.json").unlink()
    write_events(folder, [event for event in events if event["step"] <= step and event["kind"] != "end"], rest)
