"""What gates cost while everything is still on: step time of a gated network over the ungated one's, paired.

    python benchmarks/gate_overhead.py --batch-size 128

For each kind of gate the gated and the ungated network train in turn in one process, a few steps each, on the same
batches of random images in CIFAR's shape (:mod:`turns`, :mod:`training`). A step is the whole of it: forward, loss
with the gates' penalty, backward, optimizer, bounds. Gates stand still, open, so that both do the same work otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from training import Training
from turns import ratio_of, take_turns

from greenprune.config import Config, GateConfig, ModelConfig
from greenprune.provenance import collect_provenance

RESULTS = Path(__file__).parent / "results"
STEPS_A_TURN = 3
WARMUP_TURNS = 1
CONTESTANTS = 6
CASES = [
    ("block, conditional", ["block"], "conditional"),
    ("block, static", ["block"], "static"),
    ("channel, conditional", ["channel"], "conditional"),
    ("channel, static", ["channel"], "static"),
    ("block and channel, conditional", ["block", "channel"], "conditional"),
    ("block and channel, static", ["block", "channel"], "static"),
]


def measure(
    config: Config, image_size: int, turns: int, cases: list[tuple[str, list[str], str]]
) -> list[dict[str, object]]:
    """One row for each kind of gate."""
    ungated = dataclasses.replace(config, gate=GateConfig(enabled=False))
    rows: list[dict[str, object]] = []
    for name, units, kind in cases:
        gate = GateConfig(units=units, kind=kind)  # type: ignore[arg-type]
        seconds: dict[str, list[float]] = {"gated": [], "ungated": []}
        busy: dict[str, list[float]] = {"gated": [], "ungated": []}
        for _ in range(CONTESTANTS):  # where its tensors happen to lie in memory changes a network's speed by percents
            contestants = {
                "gated": Training(dataclasses.replace(config, gate=gate), image_size),
                "ungated": Training(ungated, image_size),
            }
            found = take_turns(contestants, turns=turns, steps=STEPS_A_TURN, warmup=WARMUP_TURNS)
            for which, training in contestants.items():
                seconds[which] += found.seconds[which]
                busy[which] += training.busy_s[WARMUP_TURNS:]
        ratio, cpu_ratio = ratio_of(seconds["gated"], seconds["ungated"]), ratio_of(busy["gated"], busy["ungated"])
        row = {
            "gates": name,
            "precision": config.precision,
            "channels_last": config.model.channels_last,
            "step_s": statistics.median(seconds["gated"]),
            "step_s_ungated": statistics.median(seconds["ungated"]),
            "ratio": ratio.value,
            "ratio_quartiles": [ratio.low, ratio.high],
            "cpu_ratio": cpu_ratio.value,
            "cpu_ratio_quartiles": [cpu_ratio.low, cpu_ratio.high],
            "turns": ratio.n,
        }
        rows.append(row)
        print(f"{name}: {row['ratio']:.3f}, processor time {row['cpu_ratio']:.3f}", flush=True)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next precision starts afresh
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--turns", type=int, default=4, help=f"pairs of turns of a network, each of {STEPS_A_TURN} steps"
    )
    parser.add_argument("--gates", default="", help="only gates whose description begins so, such as 'block, '")
    parser.add_argument("--fp32", action="store_true", help="fp32 only")
    parser.add_argument("--name", default="gate_overhead", help="name of the result files; empty: none")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    base = Config()
    data = dataclasses.replace(base.data, batch_size=args.batch_size)
    cases = [case for case in CASES if case[0].startswith(args.gates)]
    for precision, channels_last in (("no", False), ("bf16", True))[: 1 if args.fp32 else 2]:
        print(f"precision {precision}, channels_last {channels_last}", flush=True)
        model = ModelConfig(name=args.model, channels_last=channels_last)
        config = dataclasses.replace(base, data=data, model=model, precision=precision)  # type: ignore[arg-type]
        rows += measure(config, args.image_size, args.turns, cases)
    provenance = collect_provenance(1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = [
        "| gates, all open | precision | layout | step, ms | ungated, ms | ratio (quartiles) | of processor time |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]  # type: ignore[misc]
        lines.append(
            f"| {row['gates']} | {'fp32' if row['precision'] == 'no' else row['precision']} "
            f"| {'channels last' if row['channels_last'] else 'channels first'} | {1e3 * row['step_s']:.1f} "  # type: ignore[operator]
            f"| {1e3 * row['step_s_ungated']:.1f} | {row['ratio']:.3f} ({low:.3f}-{high:.3f}) "  # type: ignore[operator]
            f"| {row['cpu_ratio']:.3f} |"
        )
    lines += [
        "",
        f"{args.model}, images of {args.image_size} x {args.image_size}, batch {args.batch_size}; median of "
        f"{args.turns} pairs of {STEPS_A_TURN} steps for each of {CONTESTANTS} networks, gated and ungated. "
        f"{provenance['cpu']}, {provenance['threads']} threads, torch "
        f"{provenance['versions']['torch']}.",
    ]
    print("\n".join(lines))
    if args.name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.name}.md").write_text("\n".join(lines) + "\n")
        report = {"provenance": provenance, "arguments": sys.argv[1:], "rows": rows}
        (RESULTS / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
