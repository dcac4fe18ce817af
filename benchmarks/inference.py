"""Inference with exported networks beside their dense twins, paired in one process.

    python benchmarks/inference.py runs/benchmarks/digits/gated-0.5-seed0 runs/benchmarks/digits/channel-0.5-seed0

Each finished run is exported in two formats (a PyTorch module and ONNX), and the exports are measured in turn with
their dense twin: latency of one image, throughput of large batches, joules, memory; eager, compiled, onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from greenprune.export import InferenceReport, benchmark_inference, evaluate_file, export_run
from greenprune.formatting import format_percent, format_seconds, format_si
from greenprune.provenance import collect_provenance

RESULTS = Path(__file__).parent / "results"
FORMATS = ("safetensors", "onnx")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished gated runs")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--eager-only", action="store_true", help="leave out torch.compile")
    parser.add_argument("--name", default="inference", help="name of the result files")
    args = parser.parse_args()
    root = os.environ.get("GREENPRUNE_DATA")
    with tempfile.TemporaryDirectory() as folder:
        exports = [
            export_run(run, kind, Path(folder) / f"{run.name}-{kind}", data_root=root)
            for kind in FORMATS
            for run in args.runs
        ]
        data = exports[0].record["summary"]["data"]
        accuracies = [evaluate_file(exported.path, data, root) for exported in exports]
        report = benchmark_inference(
            [exported.path for exported in exports],
            batch_size=args.batch_size,
            turns=args.turns,
            compiled=not args.eager_only,
        )
        for comparison in report.comparisons:
            for cost in comparison.costs:
                cost.network = Path(cost.network).name
    provenance = collect_provenance(1, torch.device("cpu"))
    lines = ["| export | largest relative logit difference | accuracy, run's | seconds |", "|---|---|---|---|"]
    for exported, found in zip(exports, accuracies, strict=True):
        accuracy = f"{format_percent(found.accuracy, 2)}, {format_percent(found.of_run, 2)}"
        difference = exported.max_relative_logit_difference
        lines.append(f"| {exported.path.name} | {difference:.1e} | {accuracy} | {exported.seconds:.1f} |")
    lines += ["", *table(report), "", f"{provenance['cpu']}, torch {provenance['versions']['torch']}."]
    print("\n".join(lines))
    (RESULTS / f"{args.name}.md").write_text("\n".join(lines) + "\n")
    checks = [exported.record["check"] | {"export": exported.path.name} for exported in exports]
    found = [vars(accuracy) for accuracy in accuracies]
    content = {
        "provenance": provenance,
        "arguments": sys.argv[1:],
        "checks": checks,
        "accuracies": found,
        "report": report.to_dict(),
    }
    (RESULTS / f"{args.name}.json").write_text(json.dumps(content, indent=1) + "\n")


def table(report: InferenceReport) -> list[str]:
    heads = ["engine", "network", "latency, batch 1", f"images/s, batch {report.batch_size}", "J / 1,000 images"]
    heads += ["weights", "activations", "latency, throughput, energy: times better than the twin"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for comparison in report.comparisons:
        for cost in comparison.costs:
            ratios = ", ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in cost.against_twin.values())
            cells = [comparison.engine, cost.network, format_seconds(cost.latency_s), f"{cost.images_per_s:,.0f}"]
            cells += [cost.energy_text(), format_si(cost.weights_bytes, "B")]
            cells += [format_si(cost.activations_bytes, "B"), ratios]
            lines.append(f"| {' | '.join(cells)} |")
    first = report.comparisons[0]
    sources = "; ".join(f"{device}, {source}" for device, source in first.energy_sources.items())
    lines += ["", f"{report.turns} turns, threads: {report.threads}. Joules ({first.energy_quality}): {sources}."]
    return lines


if __name__ == "__main__":
    main()
