"""The whole set of benchmarks as one command and one table: ``make bench`` on the CPU, ``make bench-gpu`` on one GPU.

    python benchmarks/bench.py
    python benchmarks/bench.py --only dense_loop gates

Each line of :mod:`measurements` is measured, paired in turns, with progress on the terminal; on a slow machine whole
runs are repeated with fewer seeds, so that all is done in time (``--minutes``). The table is written to
``benchmarks/results/bench_cpu.md`` (``bench_gpu.md``), all figures with their provenance to the ``.json`` beside it.
What cannot be measured here (a data set, a peer that is missing) is a row that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from environments import PeerUnavailable
from measurements import MEASUREMENTS, Row, Setting, Unmeasured
from process import ProcessFailed

from greenprune.config import UserError
from greenprune.provenance import collect_provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
MINUTES = {"cpu": 20.0, "gpu": 8.0}
TINY: dict[str, Any] = {
    "turns": 2,
    "steps": 1,
    "batch_size": 8,
    "imagenet_batch": 2,
    "seeds": (0,),
    "epochs": 2,
    "cifar_epochs": 0,
    "blocks": (3, 6),
    "batches": (4, 8),
    "launches": 1,
}
GPU: dict[str, Any] = {
    "turns": 5,
    "steps": 24,
    "batch_size": 512,
    "imagenet_batch": 128,
    "seeds": (0,),
    "batches": (128, 256, 512, 1024),
    "launches": 2,
}


def measure(names: list[str], setting: Setting) -> Iterator[tuple[str, list[Row], float]]:
    """Measure lines one after another: the name of each, its rows, and the seconds that it took."""
    began_s = time.perf_counter()
    for number, name in enumerate(names, start=1):
        print(f"[{number}/{len(names)}, {time.perf_counter() - began_s:.0f} s] {name}", flush=True)
        started_s = time.perf_counter()
        try:
            rows = MEASUREMENTS[name](setting)
        except (Unmeasured, PeerUnavailable, ProcessFailed, UserError, subprocess.SubprocessError) as error:
            rows = [Row((MEASUREMENTS[name].__doc__ or name).rstrip("."), "", None, note=str(error))]
        for row in rows:
            print("  " + " | ".join(cells(row)), flush=True)
        yield name, rows, time.perf_counter() - started_s


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    figure = row.figure
    value = spread = count = "-"
    if figure is not None:
        digits = 2 if row.unit in ("%", "s") else 3
        value = f"{figure.value:.{digits}f}" + ("" if row.unit in ("x", "power") else f" {row.unit}")
        count = str(figure.n)
        spread = f"{figure.low:.3f} to {figure.high:.3f}"
    target = "-" if row.target is None else str(row.target)
    met = {True: "met", False: "**missed**", None: "not measured" if figure is None else "-"}[row.met]
    return [row.what, row.work or "-", value, spread, count, target, met, row.note or "-"]


HEADS = ["what", "work", "median", "quartiles", "n", "target", "", "note"]


def table(rows: list[Row], provenance: dict[str, Any], seconds: dict[str, float]) -> str:
    """The whole table with its provenance, in Markdown."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    git = provenance["git"] or {"revision": "unknown", "changed": False}
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items() if version)
    hardware = ", ".join(provenance["gpus"]) or provenance["cpu"]
    lines += [
        "",
        "A ratio is that of two medians, measured in turns (A B, B A, ...) in one run; beside it the quartiles of the "
        "ratios taken pair by pair, and the number of pairs.",
        "",
        f"{hardware}, {provenance['cpu_cores_usable']} cores, {provenance['threads']} threads; revision "
        f"{git['revision'][:12]}{' with changes' if git['changed'] else ''}; {versions}. "
        f"{sum(seconds.values()) / 60:.1f} minutes.",
    ]
    return "\n".join(lines) + "\n"


def to_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as JSON: those of the table with what is behind them."""
    return [
        {**dataclasses.asdict(row), "target": None if row.target is None else str(row.target), "met": row.met}
        for row in rows
    ]


def write(file: Path, rows: list[Row], provenance: dict[str, Any], seconds: dict[str, float]) -> None:
    """Write the table and, beside it, all that is behind it; paths are told from the root of the project."""
    content = {"provenance": provenance, "arguments": sys.argv[1:], "seconds": seconds, "rows": to_json(rows)}
    file.with_suffix(".md").write_text(table(rows, provenance, seconds))
    file.with_suffix(".json").write_text(json.dumps(content, indent=1).replace(f"{ROOT}{os.sep}", "") + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS), help="only these lines")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see that it works")
    parser.add_argument(
        "--peers",
        choices=("own", "here"),
        default="own",
        help="peers run in environments of their own, installed from PyPI, or in this one, where there is no network",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="how long all may take (20 on a CPU, 8 on a GPU): whole runs are repeated with other seeds while it lasts",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(argv)
    if args.device == "gpu" and not args.tiny and not torch.cuda.is_available():
        parser.error("--device: gpu is not valid here, where torch finds no GPU; expected cpu")
    on_gpu = args.device == "gpu" and torch.cuda.is_available()
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(RESULTS.parents[1]), os.environ.get("PYTHONPATH")]))
    sizes = (GPU if args.device == "gpu" else {}) | (TINY if args.tiny else {})
    sizes["peers"] = "here" if args.tiny else args.peers
    sizes["until_s"] = time.perf_counter() + 60 * (MINUTES[args.device] if args.minutes is None else args.minutes)
    scratch = Path(tempfile.mkdtemp(prefix="bench-"))
    setting = Setting("cuda" if on_gpu else "cpu", scratch, os.environ.get("GREENPRUNE_DATA"), **sizes)
    provenance = collect_provenance(1, torch.device(setting.device))
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    try:
        for name, found, took_s in measure(args.only or list(MEASUREMENTS), setting):
            rows += found
            seconds[name] = took_s
            # Line by line: what is measured stays when a later line is interrupted.
            write(args.output / f"bench_{args.device}", rows, provenance, seconds)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(table(rows, provenance, seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
