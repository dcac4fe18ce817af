"""Seconds to take half of the channels out of a ResNet-50, beside torch-pruning on the same channels.

    pip install torch-pruning==1.6.1
    python benchmarks/removal_time.py

Ours finds the channels, cuts every tensor, and makes the optimizer with its momentum follow. torch-pruning has no part
for the optimizer; its tracing of the dependencies is timed apart, since it can be done once. Both start from the same
dense network, lose the same channels, and have to end with the same number of parameters and the same logits.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch import nn

from greenprune.models import convert_blocks, find_channels
from greenprune.provenance import collect_provenance
from greenprune.surgery import Operation, carry_out, update_optimizer

RESULTS = Path(__file__).parent / "results"


def dense_network() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A ResNet-50 with an optimizer that has made a step."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def halves(model: nn.Module) -> dict[str, list[int]]:
    """Every second channel of each set, by the set's name."""
    return {name: list(range(0, found.units, 2)) for name, found in find_channels(model).sets.items()}


def ours() -> tuple[float, float, nn.Module]:
    """Seconds of our removal, of the optimizer's following, and what is left."""
    model, optimizer = dense_network()
    convert_blocks(model)
    operations = [
        Operation("remove", name, 1, 0.1, "settled", tuple(channels)) for name, channels in halves(model).items()
    ]
    start = time.perf_counter()
    surgeon = carry_out(operations, model)
    removed = time.perf_counter()
    update_optimizer(optimizer, surgeon)
    return removed - start, time.perf_counter() - removed, model


def theirs() -> tuple[float, float, nn.Module]:
    """Seconds of torch-pruning's tracing and of its removal, and what is left."""
    import torch_pruning as tp

    model, _ = dense_network()
    converted = copy.deepcopy(model)
    convert_blocks(converted)
    chosen = halves(converted)
    start = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.randn(1, 3, 64, 64))
    traced = time.perf_counter()
    for name, channels in chosen.items():
        block, _, label = name.rpartition(":")
        layer = model.get_submodule(block).get_submodule(f"conv{label.removeprefix('hidden')}")
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=channels).prune()
    return traced - start, time.perf_counter() - traced, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    mine, followed, traced, removed = [], [], [], []
    for _ in range(args.repeats + 1):  # the first warms up
        seconds, following, small = ours()
        tracing, removing, other = theirs()
        mine.append(seconds)
        followed.append(following)
        traced.append(tracing)
        removed.append(removing)
    images = torch.randn(2, 3, 64, 64)
    difference = (small.eval()(images) - other.eval()(images)).abs().max().item()
    parameters = [sum(p.numel() for p in model.parameters()) for model in (dense_network()[0], small, other)]
    provenance = collect_provenance(1, torch.device("cpu"))
    rows = {
        "greenprune, finding the channels and removal": mine[1:],
        "greenprune, the optimizer with its momentum": followed[1:],
        "torch-pruning, removal alone": removed[1:],
        "torch-pruning, tracing alone": traced[1:],
    }
    lines = ["| what | median, s | range, s |", "|---|---|---|"]
    lines += [f"| {name} | {statistics.median(v):.3f} | {min(v):.3f}-{max(v):.3f} |" for name, v in rows.items()]
    ratio = statistics.median(theirs_ / ours_ for theirs_, ours_ in zip(removed[1:], mine[1:], strict=True))
    lines += [
        "",
        f"torch-pruning's removal over ours, pair by pair: {ratio:.1f} (median of {args.repeats}). ResNet-50, "
        f"{parameters[0]:,} parameters; {parameters[1]:,} left by ours, {parameters[2]:,} by torch-pruning; largest "
        f"difference of logits {difference:.1e}. 1 thread, {provenance['cpu']}, "
        f"torch {provenance['versions']['torch']}.",
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "removal_time.md").write_text("\n".join(lines) + "\n")
    report = {"provenance": provenance, "arguments": sys.argv[1:], "seconds": rows, "parameters": parameters}
    (RESULTS / "removal_time.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
