"""Gated runs beside their dense twins: accuracy, FLOPs, joules and seconds over several seeds.

    python benchmarks/twins.py configs/digits.yaml --targets 0.5 0.3 --seeds 0 1 2 3 4
    python benchmarks/twins.py configs/digits.yaml --units block channel block,channel --seeds 0 1 2 --name digits_units

Every run is a process of its own, one after another, dense and gated in turn, so that a drift of the machine's speed
meets all alike. Finished runs are kept: the command goes on where it was stopped. The table is written to
``benchmarks/results/<config>.md`` and all figures to the ``.json`` beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from greenprune.provenance import collect_provenance

RESULTS = Path(__file__).parent / "results"


def do_run(config: Path, folder: Path, name: str, flags: list[str]) -> dict:
    """A run's summary. One that has ended is not done again; one of another config in its folder is an error."""
    command = [sys.executable, "-m", "greenprune.train", "--config", str(config), "--resume", "auto"]
    command += ["--output_dir", str(folder), "--run_name", name, *flags]
    print(" ".join(command[3:]), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / name / "summary.json").read_text())


def spread(values: list[float], digits: int, scale: float = 1.0) -> str:
    middle = statistics.mean(values) * scale
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ± {statistics.stdev(values) * scale:.{digits}f}"


def rows(runs: dict[str, list[dict]]) -> list[list[str]]:
    dense = runs["dense"]
    table = []
    for name, found in runs.items():
        pairs = list(zip(found, dense, strict=True))
        blocks_off = [reason for run in found for reason in (r["reason"] for r in run["removals"])]
        settled = blocks_off.count("settled") / len(found)
        row = [
            name,
            spread([run["accuracy"] for run in found], 2, 100),
            spread([run["accuracy"] - twin["accuracy"] for run, twin in pairs], 2, 100),
            spread([run["flops_forward"] / run["flops_forward_dense"] for run in found], 3),
            spread([run["params"] / run["params_dense"] for run in found], 3),
            spread([run["flops_train"] / run["flops_train_dense"] for run in found], 3),
            spread([run["time_s"] / twin["time_s"] for run, twin in pairs], 2),
            spread([run["energy_j"] / twin["energy_j"] for run, twin in pairs], 2)
            if found[0]["energy_j"]
            else "unknown",
            f"{statistics.median(run['time_s'] for run in found):.0f}",
            f"{statistics.median(run['energy_j'] for run in found):.0f}" if found[0]["energy_j"] else "unknown",
            f"{statistics.mean(run['blocks'] for run in found):.1f} of {found[0]['blocks_dense']}",
            f"{statistics.mean(run['channels'] for run in found):.0f} of {found[0]['channels_dense']}"
            if found[0].get("channels_dense")
            else "-",
            f"{settled:.1f} of {len(blocks_off) / len(found):.1f}" if blocks_off else "-",
            str(max(run["gates_left"] for run in found)),
        ]
        table.append(row)
    return table


HEADER = [
    "run",
    "accuracy %",
    "points over twin",
    "FLOPs kept",
    "parameters kept",
    "training FLOPs / twin",
    "time / twin",
    "joules / twin",
    "time s",
    "joules",
    "blocks",
    "channels",
    "removals settled",
    "gates left",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.5])
    parser.add_argument("--units", nargs="+", default=["block"], help="gate.units of each row, with commas")
    parser.add_argument("--name", help="name of the result files; by default the config's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"), help="where the runs are kept")
    parser.add_argument("flags", nargs="*", help="further flags of each run, after --")
    args = parser.parse_args()
    folder = args.runs / args.config.stem
    cells = [(units, target) for units in args.units for target in args.targets]
    runs: dict[str, list[dict]] = {"dense": [], **{f"{units}, target {target:g}": [] for units, target in cells}}
    for seed in args.seeds:
        common = ["--seed", str(seed), *args.flags]
        runs["dense"].append(do_run(args.config, folder, f"dense-seed{seed}", ["--gate.enabled", "false", *common]))
        for units, target in cells:
            flags = ["--gate.units", f"[{units}]", "--budget.target", str(target), *common]
            prefix = "gated" if units == "block" else units.replace(",", "-")
            found = do_run(args.config, folder, f"{prefix}-{target:g}-seed{seed}", flags)
            runs[f"{units}, target {target:g}"].append(found)
    table = [HEADER, ["---"] * len(HEADER), *rows(runs)]
    sources = ", ".join(runs["dense"][0]["energy_by_device_j"]) or "none"
    quality = runs["dense"][0]["energy_quality"]
    provenance = collect_provenance(runs["dense"][0]["world_size"], torch.device(runs["dense"][0]["device"]))
    text = "\n".join("| " + " | ".join(row) + " |" for row in table)
    about = (
        f"`python benchmarks/twins.py {' '.join(sys.argv[1:])}`: {len(args.seeds)} seeds, mean ± standard deviation "
        f"(seconds and joules by themselves: median). {provenance['cpu']}, {provenance['threads']} of "
        f"{provenance['cpu_cores_usable']} "
        "cores, torch "
        f"{provenance['versions']['torch']}. Joules: {quality} ({sources})."
    )
    RESULTS.mkdir(exist_ok=True)
    name = args.name or args.config.stem
    (RESULTS / f"{name}.md").write_text(f"{text}\n\n{about}\n")
    report = {"provenance": provenance, "arguments": sys.argv[1:], "runs": runs}
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(text, about, sep="\n\n")


if __name__ == "__main__":
    main()
