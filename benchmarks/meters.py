"""Ours, Zeus and CodeCarbon side by side over the same stand-in for NVML, whose joules are known.

    python benchmarks/meters.py

Every meter measures the same seconds of the same power curves, alone or on two ranks of one node, through the real
pynvml. Zeus is installed from PyPI into an environment of its own (build/zeus). The table is written to
``benchmarks/results/meters.md`` and all figures to the ``.json`` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from greenprune.provenance import collect_provenance

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(ROOT / "tests"))
from nvml_stub import Curve, build_stub  # noqa: E402 - it is where the stand-in is

TOOLS = {
    "ours": "greenprune",
    "zeus": "Zeus",
    "zeus-own": "Zeus, told the rank's GPU",
    "codecarbon": "CodeCarbon",
}
ZEUS = "zeus==0.16.0"
READY_S = 12.0  # until every rank has imported its meter
MEASURED_S = 6.0

# Four GPUs of a node, of which the run uses the third and the first, in this order; the other two are someone else's.
GPUS = [Curve(f"GPU-{i}{i}{i}", 100 + 60 * i, 300 - 40 * i, READY_S + 2.3 + 0.2 * i, 30, 0.7) for i in range(4)]
USED = [2, 0]
MASK = "2,0"


@dataclass(frozen=True)
class Case:
    """One situation that all meters are put into."""

    name: str
    mask: str
    ranks: int = 1
    counter: bool = True
    more: str = ""
    measured_s: float = MEASURED_S
    used: tuple[int, ...] = (2, 0)


CASES = [
    Case("1 process, indices out of order", MASK),
    Case("2 ranks, summed", MASK, ranks=2),
    Case("1 process, UUIDs", "GPU-222,GPU-000"),
    Case("1 process, no counter", MASK, counter=False),
    Case("1 process, a window of 20 ms", MASK, measured_s=0.02),
    Case("1 process, counter restarts in mid-window", MASK, more=f"restart={READY_S + 3}"),
    Case("1 process, a MIG instance", "MIG-000", more="mig=1 instance=MIG-000", used=(0,)),
]


def install_zeus(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--quiet", ZEUS], check=True)
    return python


def run_case(case: Case, tool: str, python: Path, library: Path) -> list[dict]:
    """What each rank's meter says."""
    start_s = time.monotonic()
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library),
        "PATH": f"{library}:{os.environ['PATH']}",
        "NVML_STUB": ";".join(gpu.scenario(counter=case.counter, more=case.more) for gpu in GPUS),
        "NVML_STUB_START": repr(start_s),
        "CUDA_VISIBLE_DEVICES": case.mask,
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(case.ranks):
            options = {
                "rank": rank,
                "ranks": case.ranks,
                "folder": folder,
                "begin_s": start_s + READY_S,
                "end_s": start_s + READY_S + case.measured_s,
            }
            command = [str(python), str(Path(__file__).with_name("meter_rank.py")), tool, json.dumps(options)]
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
                )
            )
        found = []
        for process in processes:
            output, errors = process.communicate(timeout=120)
            if process.returncode == 0:
                found.append(json.loads(output.splitlines()[-1]))
            else:
                found.append({"gpu_j": None, "host_j": None, "says": errors.strip().splitlines()[-1]})
    return found


def truth_j(case: Case) -> float:
    return sum(GPUS[index].energy_j(READY_S, READY_S + case.measured_s) for index in case.used)


def cell(truth: float, ranks: list[dict] | None) -> str:
    if ranks is None:
        return ""
    known = [rank["gpu_j"] for rank in ranks if rank["gpu_j"] is not None]
    says = next((rank["says"] for rank in ranks if rank["says"]), "")
    says = says if len(says) < 90 else says[:87] + "..."
    if not known:
        return f"unknown: {says}"
    text = f"{sum(known):.1f} J, {sum(known) / truth:.3f}x"
    return f"{text}; {says}" if says else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeus", type=Path, default=ROOT / "build" / "zeus", help="folder of Zeus's environment")
    args = parser.parse_args()
    zeus = install_zeus(args.zeus)
    library = ROOT / "build" / "nvml"
    library.mkdir(parents=True, exist_ok=True)
    build_stub(library)
    report = []
    for case in CASES:
        row = {"case": case.name, "mask": case.mask, "ranks": case.ranks, "truth_j": truth_j(case), "meters": {}}
        for tool in TOOLS:
            if tool == "zeus-own" and case.ranks == 1:
                continue
            found = run_case(case, tool, zeus if tool.startswith("zeus") else Path(sys.executable), library)
            row["meters"][tool] = found
            print(case.name, "|", tool, "|", cell(row["truth_j"], found), flush=True)
        report.append(row)
    provenance = collect_provenance(1, torch.device("cpu"))
    result = {"provenance": provenance, "zeus": ZEUS, "arguments": sys.argv[1:], "cases": report}
    text = table(report, provenance)
    print(text)
    (RESULTS / "meters.md").write_text(text)
    (RESULTS / "meters.json").write_text(json.dumps(result, indent=1) + "\n")


def table(report: list[dict], provenance: dict) -> str:
    lines = ["| case | truth | " + " | ".join(TOOLS.values()) + " |", "|---" * (2 + len(TOOLS)) + "|"]
    for row in report:
        cells = [cell(row["truth_j"], row["meters"].get(tool)) for tool in TOOLS]
        lines.append(f"| {row['case']} | {row['truth_j']:.1f} J | " + " | ".join(cells) + " |")
    versions = provenance["versions"]
    lines += [
        "",
        host_line(report),
        "",
        f"GPU joules over {MEASURED_S:g} s (the counter moves every 0.1 s), and their ratio to the truth; summed over "
        f"the ranks as their users would. {ZEUS.replace('==', ' ')}, codecarbon {versions['codecarbon']}, "
        f"nvidia-ml-py {versions['nvidia-ml-py']}; {provenance['cpu']}.",
    ]
    return "\n".join(lines) + "\n"


def host_line(report: list[dict]) -> str:
    """What each of two ranks says that the CPU and the memory of their one node took."""
    meters = next(row["meters"] for row in report if row["ranks"] == 2)
    said = [f"{TOOLS[tool]}'s say {_each(meters[tool])}" for tool in ("ours", "codecarbon")]
    return (
        f"CPU and memory of the node (estimated by its load), told by two ranks: {'; '.join(said)}. Zeus reads them "
        "through RAPL only, which is not here."
    )


def _each(ranks: list[dict]) -> str:
    return " and ".join(f"{rank['host_j']:.0f} J" for rank in ranks)


if __name__ == "__main__":
    main()
