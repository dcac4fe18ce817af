"""Try to break a run in full count: kills, corruptions, generated input, removals without end, pauses.

    python benchmarks/faults.py kills --cases 100 --processes 1 2

The default suite runs a handful of each; results of the full counts are kept in docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
import corrupting
import generating
import killing
import pausing
import soaking
from hypothesis import HealthCheck, given, seed, settings

import greenprune.run  # noqa: F401 - what a run needs is there before it is forked
from greenprune.provenance import collect_provenance

_SHARES = {"configs": 0.05, "command lines": 0.05}  # of the generated inputs; these take 20 to 80 ms each
RESULTS = Path(__file__).parent / "results"


def kills(arguments: argparse.Namespace) -> dict[str, Any]:
    """SIGKILL at random instants, resume until done, compare to the bit."""
    chance = random.Random(arguments.seed)
    cases: list[killing.Case] = []
    for processes in arguments.processes:
        for variant in killing.VARIANTS:
            share = len(range(list(killing.VARIANTS).index(variant), arguments.cases, len(killing.VARIANTS)))
            folder = Path(tempfile.mkdtemp(prefix="kills-"))
            runs = killing.Runs(folder, variant, processes, forked=True)
            for number in range(share):
                case = runs.kill_and_finish(f"run{number}", chance)
                cases.append(case)
                print(len(cases), variant, processes, case.kills, case.wrong or "exact", flush=True)
            if not any(case.wrong for case in cases):
                shutil.rmtree(folder)
    by_processes = {
        str(processes): {
            "cases": len(chosen := [case for case in cases if case.processes == processes]),
            "exact": sum(not case.wrong for case in chosen),
            "kills": sum(len(case.kills) for case in chosen),
            "killed_before_the_first_step": sum(kill["last_step"] is None for case in chosen for kill in case.kills),
        }
        for processes in arguments.processes
    }
    return {"by_processes": by_processes, "cases": [vars(case) for case in cases]}


def corruptions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Damages of every class of bytes of a checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        tally = corrupting.corrupt(Path(scratch), arguments.count, random.Random(arguments.seed))
    totals = {key: sum(count[key] for count in tally.values()) for key in ("damages", "accepted", "lost")}
    return {**totals, "by_place": tally}


def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Removals without end in one process."""
    levels = soaking.soak(arguments.removals, arguments.warm_up, 9)
    first, last = levels[0], levels[-1]
    growth = {key: getattr(last, key) - getattr(first, key) for key in vars(first)}
    return {"growth": growth, "levels": [vars(level) for level in levels]}


def pause(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint takes from training: on a thread, in line, and by PyTorch's own distributed checkpoints."""
    return {"networks": [pausing.measure(name, arguments.turns) for name in ("resnet38", "resnet56")]}


def _recorded(takes: Callable[[Any], bool], taken: list[bool]) -> Callable[..., None]:
    def all_of_it(value: Any) -> None:
        taken.append(takes(value))

    return all_of_it


def inputs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Generated input for every reader and parser."""
    counts: dict[str, dict[str, int]] = {}
    for kind, (strategy, takes) in generating.KINDS.items():
        taken: list[bool] = []
        profile = settings(
            max_examples=math.ceil(arguments.examples * _SHARES.get(kind, 0.15)),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        seed(arguments.seed)(profile(given(value=strategy)(_recorded(takes, taken))))()
        counts[kind] = {"generated": len(taken), "taken": sum(taken), "refused": len(taken) - sum(taken)}
        print(kind, counts[kind], flush=True)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    total = sum(count["generated"] for count in counts.values())
    return {"generated": total, "by_kind": counts, "peak_resident_mib": round(peak_mib)}


def main() -> int:
    """Carry out one of the trials and keep its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trials = parser.add_subparsers(dest="trial", required=True)
    killed = trials.add_parser("kills", help="SIGKILL at random instants of digits runs")
    killed.add_argument("--cases", type=int, default=100, metavar="N", help="runs killed, for each number of processes")
    killed.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N")
    generated = trials.add_parser("inputs", help="generated configs, command lines, structures, logs and data files")
    generated.add_argument("--examples", type=int, default=10000, metavar="N")
    corrupted = trials.add_parser("corruptions", help="damages of checkpoints")
    corrupted.add_argument("--count", type=int, default=2000, metavar="N")
    soaked = trials.add_parser("soak", help="removals and rebuilds in one process")
    soaked.add_argument("--removals", type=int, default=500, metavar="N")
    soaked.add_argument("--warm-up", type=int, default=99, metavar="N", help="removals before the first level")
    paused = trials.add_parser("pause", help="what a checkpoint takes from training")
    paused.add_argument("--turns", type=int, default=15, metavar="N", help="checkpoints of each kind")
    for trial in (killed, generated, corrupted, soaked, paused):
        trial.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    started = time.monotonic()
    found = {"kills": kills, "inputs": inputs, "corruptions": corruptions, "soak": soak, "pause": pause}[
        arguments.trial
    ](arguments)
    record = {
        "arguments": {key: value for key, value in vars(arguments).items() if key != "trial"},
        "seconds": round(time.monotonic() - started, 1),
        **found,
    }
    print(json.dumps({key: value for key, value in record.items() if key != "cases"}, indent=2))
    import torch

    record["provenance"] = collect_provenance(1, torch.device("cpu"))
    (RESULTS / f"faults_{arguments.trial}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
