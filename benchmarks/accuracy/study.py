"""Accuracy against FLOPs and joules: ours, its dense twin, what others do, and what a pruning method has to beat.

    python benchmarks/accuracy/study.py benchmarks/accuracy/digits.yaml --seeds 0 1 2 --jobs 2

Every cell is trained for the same number of epochs on the same data with the same augmentation, each seed in a process
of its own. A cell's result is a file (``results/accuracy/<study>/<cell>-seed<n>.json``) with its config, its command,
versions and hardware; what is there is not done again, and a run that was stopped goes on. The last networks are
evaluated on the test set; nothing is chosen on it. Then the table and the curves are written.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from greenprune.tracking import read_attempts, write_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
UNITS = {"block": "[block]", "channel": "[channel]", "both": "[block, channel]"}
PEERS = {
    "slimming": "network slimming",
    "polarization": "polarized batch-norm scales",
    "torch-pruning": "torch-pruning, group norm",
}


@dataclass(frozen=True)
class Study:
    """What is trained.

    Attributes:
        name: Name of its results.
        config: The run that all cells vary.
        seeds: Seeds of each cell.
        targets: Shares of the FLOPs to keep.
        peer_targets: Those for which the peers are trained too.
        flags: Further fields of all runs.
    """

    name: str
    config: Path
    seeds: list[int]
    targets: list[float]
    peer_targets: list[float] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Study:
        """A study from its file.

        Raises:
            SystemExit: A key is unknown or missing.
        """
        values = yaml.safe_load(path.read_text())
        try:
            return cls(path.stem, **{**values, "config": ROOT / values["config"]})
        except (TypeError, KeyError) as error:
            raise SystemExit(f"{path}: {error}; expected config, seeds, targets, peer_targets and flags") from None


@dataclass(frozen=True)
class Cell:
    """One way to train, at one target.

    Attributes:
        name: Short name, for files.
        label: What it is, for people.
        target: Share of the FLOPs to keep; None for dense runs.
        flags: Fields of the run that differ.
        after: Cell whose run has to be there first.
        peer: Method of ``benchmarks/peers/pruning.py``; None for our own runs.
        random: Whether blocks go at random, when those of ``after`` went.
    """

    name: str
    label: str
    target: float | None = None
    flags: tuple[str, ...] = ()
    after: str | None = None
    peer: str | None = None
    random: bool = False


def cells_of(study: Study) -> list[Cell]:
    """All cells of a study, each after those that it needs."""
    dense = ("--gate.enabled", "false")
    cells = [Cell("dense", "dense twin", flags=dense)]
    for target in study.targets:
        at = f"{target:g}"
        for name, units in UNITS.items():
            flags = ("--gate.units", units, "--budget.target", at)
            cells.append(
                Cell(f"{name}-{at}", f"ours, {name if name != 'both' else 'block and channel'}", target, flags)
            )
        cells += [
            Cell(f"scratch-{name}-{at}", f"{name}'s structure from scratch", target, dense, after=f"{name}-{at}")
            for name in UNITS
        ]
        cells.append(
            Cell(
                f"random-{at}",
                "random blocks, same schedule",
                target,
                ("--budget.target", at),
                f"block-{at}",
                random=True,
            )
        )
    for target in study.peer_targets:
        cells += [Cell(f"{peer}-{target:g}", label, target, peer=peer) for peer, label in PEERS.items()]
    if study.peer_targets:
        cells.append(Cell("dense-b", "dense, with projections", flags=(*dense, "--model.shortcut", "B")))
    return cells


class Runner:
    """Trains the cells of a study.

    Args:
        study: The study.
        runs: Where the runs are kept.
    """

    def __init__(self, study: Study, runs: Path) -> None:
        self.study = study
        self.folder = runs / study.name
        self.results = RESULTS / study.name

    def result(self, cell: Cell, seed: int) -> Path:
        """The file of a cell's result."""
        return self.results / f"{cell.name}-seed{seed}.json"

    def command(self, cell: Cell, seed: int) -> list[str]:
        """What trains a cell, from the root of the project."""
        study, config = self.study, str(self.study.config.relative_to(ROOT))
        if cell.peer is not None:
            flags = ["--method", cell.peer, "--target", f"{cell.target:g}", "--seed", str(seed)]
            output = ["--output", str(self.folder / f"{cell.name}-seed{seed}.json")]
            more = ["--", *study.flags] if study.flags else []
            return ["python", "benchmarks/peers/pruning.py", "--config", config, *flags, *output, *more]
        place = ["--output_dir", str(self.folder), "--run_name", f"{cell.name}-seed{seed}", "--resume", "auto"]
        flags = ["--config", config, *study.flags, *cell.flags, *place]
        before = None if cell.after is None else str(self.folder / f"{cell.after}-seed{seed}")
        if cell.random:
            return ["python", "benchmarks/accuracy/random_removal.py", str(before), *flags]
        structure = [] if before is None else ["--model.structure", before]
        return ["python", "-m", "greenprune.train", *flags, *structure, "--seed", str(seed)]

    def train(self, cell: Cell, seed: int) -> None:
        """Train a cell, unless its result is there.

        Raises:
            RuntimeError: The run failed; the message is its last line.
        """
        result = self.result(cell, seed)
        if result.exists():
            return
        command = self.command(cell, seed)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no word"]
            raise RuntimeError(f"{cell.name}, seed {seed}: {said[-1]} ({shlex.join(command)})")
        self.results.mkdir(parents=True, exist_ok=True)
        write_json(result, self._found(cell, seed) | {"cell": cell.name, "command": shlex.join(command)})

    def _found(self, cell: Cell, seed: int) -> dict[str, Any]:
        name = f"{cell.name}-seed{seed}"
        if cell.peer is not None:
            return json.loads((self.folder / f"{name}.json").read_text())  # type: ignore[no-any-return]
        run = self.folder / name
        provenance = read_attempts(run / "provenance.jsonl")[-1]
        config = yaml.safe_load((run / "config.yaml").read_text())
        return json.loads((run / "summary.json").read_text()) | {"config": config, "provenance": provenance}


def train_all(runner: Runner, cells: list[Cell], seeds: Iterable[int], jobs: int) -> list[str]:
    """Train all cells, seed by seed so that a table of all cells is there early.

    Returns:
        What failed, one line each.
    """
    failed: list[str] = []
    for seed in seeds:
        # Twice: first what needs nothing, then what needs one of those.
        for wave in (
            [cell for cell in cells if cell.after is None],
            [cell for cell in cells if cell.after is not None],
        ):
            with ThreadPoolExecutor(jobs) as pool:
                going = {pool.submit(runner.train, cell, seed): cell for cell in wave}
                for done in as_completed(going):
                    error = done.exception()
                    print(f"seed {seed}, {going[done].name}: {'done' if error is None else error}", flush=True)
                    failed += [] if error is None else [str(error)]
    return failed


# The table.


def gather(runner: Runner, cells: list[Cell]) -> dict[str, dict[int, dict[str, Any]]]:
    """Results that are there: by cell and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        results = {seed: runner.result(cell, seed) for seed in runner.study.seeds}
        found[cell.name] = {seed: json.loads(path.read_text()) for seed, path in results.items() if path.exists()}
    return found


def _spread(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values) or "-"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


HEADER = (
    "cell",
    "seeds",
    "accuracy %",
    "points over the dense twin",
    "FLOPs kept",
    "parameters kept",
    "training FLOPs / dense",
    "joules / dense twin",
    "time / dense twin",
)


def table(cells: list[Cell], found: dict[str, dict[int, dict[str, Any]]]) -> list[str]:
    """The rows of the table, in Markdown; ratios and differences seed by seed."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for cell in cells:
        runs = found[cell.name]
        twins = found["dense-b" if cell.peer == "torch-pruning" and found.get("dense-b") else "dense"]
        both = sorted(runs.keys() & twins.keys())

        def ratio(over: Callable[[int], tuple[float | None, float | None]], seeds: list[int], digits: int) -> str:
            pairs = [over(seed) for seed in seeds]
            return _spread([mine / theirs for mine, theirs in pairs if mine is not None and theirs], digits)

        name = cell.label if cell.target is None else f"{cell.label}, {cell.target:g}"
        cells_of_row = [
            name,
            str(len(runs)),
            _spread([100 * run["accuracy"] for run in runs.values()], 2),
            _spread([100 * (runs[seed]["accuracy"] - twins[seed]["accuracy"]) for seed in both], 2),
            ratio(lambda seed: (runs[seed]["flops_forward"], runs[seed]["flops_forward_dense"]), sorted(runs), 3),  # noqa: B023
            ratio(lambda seed: (runs[seed]["params"], runs[seed]["params_dense"]), sorted(runs), 3),  # noqa: B023
            ratio(lambda seed: (runs[seed]["flops_train"], runs[seed]["flops_train_dense"]), sorted(runs), 3),  # noqa: B023
            ratio(lambda seed: (runs[seed]["energy_j"], twins[seed]["energy_j"]), both, 2),  # noqa: B023
            ratio(lambda seed: (runs[seed]["time_s"], twins[seed]["time_s"]), both, 2),  # noqa: B023
        ]
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the study's")
    parser.add_argument("--cells", nargs="+", help="only cells whose names begin so")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; joules and seconds are fair with 1 only")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="where the runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, write the table of what is there")
    args = parser.parse_args()
    study = Study.read(args.study)
    runner = Runner(study, args.runs)
    cells = cells_of(study)
    chosen = [cell for cell in cells if args.cells is None or cell.name.startswith(tuple(args.cells))]
    failed = [] if args.table else train_all(runner, chosen, args.seeds or study.seeds, args.jobs)
    found = gather(runner, cells)
    text = "\n".join(table(cells, found))
    some = next((run for runs in found.values() for run in runs.values()), None)
    if some is not None:
        provenance = some["provenance"]
        text += (
            f"\n\n`{shlex.join(['python', 'benchmarks/accuracy/study.py', str(args.study)])}`: mean ± sample standard "
            f"deviation over seeds; differences and ratios seed by seed. {provenance['cpu']}, torch "
            f"{provenance['versions']['torch']}."
        )
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{study.name}.md").write_text(text + "\n")
    print(text)
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
