"""Accuracy against FLOPs and joules: ours, its dense twin, what others do, and what a pruning method has to beat.

    python benchmarks/accuracy/study.py benchmarks/accuracy/digits.yaml --seeds 0 1 2 --jobs 2

Every cell is trained for the same number of epochs on the same data with the same augmentation, each seed in a process
of its own; only ``variants``, ours with other settings, and ``dense_variants`` may be trained for longer, which tells
what the saving buys when it is spent on training. A cell's result is a file
(``results/accuracy/<study>/<cell>-seed<n>.json``) with its config, its command, versions and hardware; what is there is
not done again, and a run that was stopped goes on: Ctrl-C, SIGTERM or ``--minutes`` stop it in good order. The last
networks are evaluated on the test set; nothing is chosen on it.

What the peers' papers leave open for a run of another length, the strength of their sparsity term and the learning rate
of their fine-tuning, is chosen for them on a part of the training set that is held out, or taken over from the study
named by ``chosen_in``; without either they have the defaults of ``benchmarks/peers/pruning.py``. Ours runs with its
defaults. Then the table (``<study>.md``) and, where plotly is installed, the curves (``<study>.png``, or ``.html``
where there is no browser to draw with) are written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from greenprune.tracking import read_attempts, write_json

ROOT = Path(__file__).parents[2]
RUNS = Path("runs/accuracy")
RESULTS = ROOT / "benchmarks" / "results" / "accuracy"
UNITS = {"block": "[block]", "channel": "[channel]", "both": "[block, channel]"}
OTHER_CHOICES = [
    ("random", "random blocks, same schedule", "block", "random"),
    ("random-channel", "random channels, all layers alike, same schedule", "channel", "random"),
    ("norm-channel", "channels of the smallest norm, same schedule", "channel", "norm"),
]
"""Cells whose units are chosen otherwise: name, label, the cell whose schedule they follow, and how they are chosen."""

PEERS = {
    "slimming": "network slimming",
    "polarization": "polarized batch-norm scales",
    "torch-pruning": "torch-pruning, group norm",
}


_OPTIONAL = (
    "peer_targets, variants, variant_targets, dense_variants, choices, chosen_in, ablations, shared, note and flags"
)
FINETUNE_LRS = (1.0, 0.3)
"""Shares of the config's learning rate that the peers' fine-tuning chooses from."""

CHOICE_SEEDS = (1000, 1001)
HELD_OUT = 0.2
"""Share of the training set that choices are made on."""


@dataclass(frozen=True)
class Study:
    """What is trained.

    Attributes:
        name: Name of its results.
        config: The run that all cells vary.
        seeds: Seeds of each cell.
        targets: Shares of the FLOPs to keep.
        peer_targets: Those for which the peers are trained too.
        variants: Further fields of ours, by what they are called.
        variant_targets: Those of the targets that variants are trained for; none: all of them.
        dense_variants: Further fields of the dense twin, by what they are called.
        choices: By peer, the strengths of its sparsity term to choose from, on held-out training samples.
        chosen_in: Another study whose choices are taken over; None: this one makes its own.
        ablations: Target at which the parts of the method are exchanged one by one; None: they are not.
        shared: Whether runs had other work beside them: then seconds and joules tell nothing, and are not shown.
        note: What a reader of the table has to know besides, such as what else ran on the machine.
        flags: Further fields of all runs.
    """

    name: str
    config: Path
    seeds: list[int]
    targets: list[float] = field(default_factory=list)
    peer_targets: list[float] = field(default_factory=list)
    variants: dict[str, list[str]] = field(default_factory=dict)
    variant_targets: list[float] = field(default_factory=list)
    dense_variants: dict[str, list[str]] = field(default_factory=dict)
    choices: dict[str, list[float]] = field(default_factory=dict)
    chosen_in: str | None = None
    ablations: float | None = None
    shared: bool = False
    note: str = ""
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
            raise SystemExit(f"{path}: {error}; expected config, seeds, targets, {_OPTIONAL}") from None


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
        choice: How units are chosen, random or norm, that go when those of ``after`` went; None: as gates learn to.
        ablated: Flags of ``benchmarks/accuracy/ablated.py``, if it trains the cell.
        varied: Whether it may be trained for other epochs than the rest.
    """

    name: str
    label: str
    target: float | None = None
    flags: tuple[str, ...] = ()
    after: str | None = None
    peer: str | None = None
    choice: str | None = None
    ablated: tuple[str, ...] = ()
    varied: bool = False

    @property
    def title(self) -> str:
        """What it is and how much it keeps."""
        return self.label if self.target is None else f"{self.label}, {self.target:g}"


def ablations(target: float) -> list[Cell]:
    """The method with one part of it exchanged at a time, at one target."""
    at = ("--budget.target", f"{target:g}")

    def cell(name: str, label: str, *flags: str, ablated: tuple[str, ...] = ()) -> Cell:
        return Cell(f"{name}-{target:g}", label, target, (*flags, *at), ablated=ablated)

    return [
        Cell("dense", "dense twin", flags=("--gate.enabled", "false")),
        cell("default", "the defaults"),
        cell("no-polarization", "no polarization", "--gate.polarization", "0"),
        cell("more-polarization", "polarization 1", "--gate.polarization", "1"),
        cell("first-order", "the task's gradient to first order", ablated=("--first-order",)),
        *(
            cell(f"lr-{lr:g}", f"gates' learning rate {lr:g}, not by the noise", "--gate.lr", f"{lr:g}")
            for lr in (30, 300)
        ),
        *(
            cell(f"fixed-{price:g}", f"fixed price {price:g}", ablated=("--fixed-price", f"{price:g}"))
            for price in (0.1, 1.0, 10.0)
        ),
        cell("static", "static gates", "--gate.kind", "static"),
        *(
            cell(f"every-{every}", f"gates learn from one sample in {every}", "--gate.every", f"{every}")
            for every in (1, 2, 4)
        ),
        *(
            cell(f"decide-{share:g}", f"decided by {share:g}", "--removal.decide_by", f"{share:g}")
            for share in (0.3, 0.5, 0.8)
        ),
        cell("no-warmup", "no warm-up", "--gate.warmup", "0"),
        cell("warmup-0.15", "warm-up 0.15", "--gate.warmup", "0.15"),
        cell("time", "budget in measured time", "--budget.unit", "time"),
        cell("masked", "masked, not removed", ablated=("--mask",)),
        cell("channel", "channels", "--gate.units", "[channel]"),
        cell(
            "channel-no-polarization",
            "channels, no polarization",
            "--gate.units",
            "[channel]",
            "--gate.polarization",
            "0",
        ),
        cell("channel-static", "channels, static gates", "--gate.units", "[channel]", "--gate.kind", "static"),
    ]


def cells_of(study: Study) -> list[Cell]:
    """All cells of a study, each after those that it needs."""
    if study.ablations is not None:
        return ablations(study.ablations)
    dense = ("--gate.enabled", "false")
    cells = [Cell("dense", "dense twin", flags=dense)]
    cells += [
        Cell(_file_name(name), name, flags=(*flags, *dense), varied=True)
        for name, flags in study.dense_variants.items()
    ]
    for target in study.targets:
        at = f"{target:g}"
        for name, units in UNITS.items():
            flags = ("--gate.units", units, "--budget.target", at)
            cells.append(Cell(f"{name}-{at}", f"ours, {_words(name)}", target, flags))
        cells += [
            Cell(f"scratch-{name}-{at}", f"{name}'s structure from scratch", target, dense, after=f"{name}-{at}")
            for name in UNITS
        ]
        for name, label, after, choice in OTHER_CHOICES:
            to_target = ("--budget.target", at)
            cells.append(Cell(f"{name}-{at}", label, target, to_target, f"{after}-{at}", choice=choice))
        if target in (study.variant_targets or study.targets):
            cells += [_variant(name, target, flags) for name, flags in study.variants.items()]
    for target in study.peer_targets:
        cells += [Cell(f"{peer}-{target:g}", label, target, peer=peer) for peer, label in PEERS.items()]
    if study.peer_targets:
        cells.append(Cell("dense-b", "dense, with projections", flags=(*dense, "--model.shortcut", "B")))
    return cells


def _variant(name: str, target: float, flags: list[str]) -> Cell:
    at = f"{target:g}"
    return Cell(f"{_file_name(name)}-{at}", f"ours, {name}", target, (*flags, "--budget.target", at), varied=True)


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def _words(name: str) -> str:
    return name if name != "both" else "block and channel"


class Stopped(RuntimeError):
    """The study was asked to stop; what is going on goes on from there with the next command."""


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
        self._taken_over = {cell.after for cell in cells_of(study)}
        self._going: set[subprocess.Popen[str]] = set()
        self._stopping = threading.Event()
        self._chosen: dict[str, dict[str, float]] = {}

    def stop(self) -> None:
        """Have all runs write their state and end."""
        self._stopping.set()
        for process in list(self._going):
            process.send_signal(signal.SIGTERM)

    def choose(self, peer: str) -> None:
        """Choose a peer's strength and learning rate on held-out training samples, unless that is done.

        Raises:
            RuntimeError: A run failed.
            Stopped: The study was asked to stop.
        """
        study = self.study
        home = RESULTS / (study.chosen_in or study.name)
        file = home / f"chosen-{peer}.json"
        if not file.exists():
            if study.chosen_in is not None or not study.choices.get(peer):
                return
            target = statistics.median_low(study.peer_targets)
            tried = [self._try(peer, target, strength, lr) for strength in study.choices[peer] for lr in FINETUNE_LRS]
            best = max(tried, key=lambda found: found["accuracy"])
            home.mkdir(parents=True, exist_ok=True)
            about = {"target": target, "held_out": HELD_OUT, "seeds": CHOICE_SEEDS}
            write_json(
                file, {"chosen": {key: best[key] for key in ("strength", "finetune_lr")}, **about, "tried": tried}
            )
        self._chosen[peer] = json.loads(file.read_text())["chosen"]

    def _try(self, peer: str, target: float, strength: float, finetune_lr: float) -> dict[str, Any]:
        """Mean accuracy on held-out training samples."""
        accuracies = []
        for seed in CHOICE_SEEDS:
            output = self.folder / f"choice-{peer}-{strength:g}-{finetune_lr:g}-seed{seed}.json"
            settings = ["--strength", f"{strength:g}", "--finetune-lr", f"{finetune_lr:g}"]
            if not output.exists():
                command = [*self._peer_command(peer, target, seed, output), *settings, "--", *self.study.flags]
                self._run([*command, "--data.validation", str(HELD_OUT)], output.stem)
            found = json.loads(output.read_text())
            assert found["accuracy_kind"] == "validation"
            accuracies.append(found["accuracy"])
        return {"strength": strength, "finetune_lr": finetune_lr, "accuracy": statistics.mean(accuracies)}

    def _peer_command(self, peer: str, target: float, seed: int, output: Path) -> list[str]:
        config = ["--config", str(self.study.config.relative_to(ROOT))]
        flags = ["--method", peer, "--target", f"{target:g}", "--seed", str(seed), "--output", str(output)]
        return ["python", "benchmarks/peers/pruning.py", *config, *flags]

    def result(self, cell: Cell, seed: int) -> Path:
        """The file of a cell's result."""
        return self.results / f"{cell.name}-seed{seed}.json"

    def command(self, cell: Cell, seed: int) -> list[str]:
        """What trains a cell, from the root of the project."""
        study, config = self.study, str(self.study.config.relative_to(ROOT))
        if cell.peer is not None:
            assert cell.target is not None
            output = self.folder / f"{cell.name}-seed{seed}.json"
            chosen = self._chosen.get(cell.peer, {})
            settings = [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", f"{value:g}")]
            more = ["--", *study.flags] if study.flags else []
            return [*self._peer_command(cell.peer, cell.target, seed, output), *settings, *more]
        place = ["--output_dir", str(self.folder), "--run_name", f"{cell.name}-seed{seed}", "--resume", "auto"]
        flags = ["--config", config, *study.flags, *cell.flags, *place]
        before = None if cell.after is None else self._structure_of(cell.after, seed)
        if cell.choice is not None:
            script = f"benchmarks/accuracy/{cell.choice}_removal.py"
            return ["python", script, str(before), *flags, "--seed", str(seed)]
        if cell.ablated:
            script = ["python", "benchmarks/accuracy/ablated.py", *cell.ablated, "--"]
            return [*script, *flags, "--seed", str(seed)]
        structure = [] if before is None else ["--model.structure", before]
        return ["python", "-m", "greenprune.train", *flags, *structure, "--seed", str(seed)]

    def train(self, cell: Cell, seed: int) -> None:
        """Train a cell, unless its result is there.

        Raises:
            RuntimeError: The run failed; the message is its last line.
            Stopped: The study was asked to stop.
        """
        result = self.result(cell, seed)
        if result.exists():
            return
        command = self.command(cell, seed)
        self._run(command, f"{cell.name}, seed {seed}")
        self.results.mkdir(parents=True, exist_ok=True)
        if cell.name in self._taken_over:
            self._kept_structure(cell.name, seed).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / result.stem / "structure.json", self._kept_structure(cell.name, seed))
        write_json(result, self._found(cell, seed) | {"cell": cell.name, "command": self._told(command)})

    def _kept_structure(self, name: str, seed: int) -> Path:
        return self.results / "structures" / f"{name}-seed{seed}.json"

    def _structure_of(self, name: str, seed: int) -> str:
        """What another cell left of the network, as it is kept beside the results; else the folder of its run."""
        kept = self._kept_structure(name, seed)
        return str(kept.relative_to(ROOT) if kept.exists() else self.folder / f"{name}-seed{seed}")

    def _told(self, command: list[str]) -> str:
        """A command for others: with the folder that a study's runs have by default."""
        return shlex.join(word.replace(str(self.folder), str(RUNS / self.study.name)) for word in command)

    def _run(self, command: list[str], name: str) -> None:
        if self._stopping.is_set():
            raise Stopped(f"{name}: not begun")
        print(shlex.join(command), flush=True)
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._going.add(process)
        if self._stopping.is_set():  # between the question above and here
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
        self._going.discard(process)
        if process.returncode and self._stopping.is_set():
            raise Stopped(f"{name}: stopped, goes on with the next command")
        if process.returncode:
            words = said.strip().splitlines() or ["no word"]
            raise RuntimeError(f"{name}: {words[-1]} ({shlex.join(command)})")

    def _found(self, cell: Cell, seed: int) -> dict[str, Any]:
        name = f"{cell.name}-seed{seed}"
        if cell.peer is not None:
            found = json.loads((self.folder / f"{name}.json").read_text())
        else:
            run = self.folder / name
            provenance = read_attempts(run / "provenance.jsonl")[-1]
            config = yaml.safe_load((run / "config.yaml").read_text())
            found = json.loads((run / "summary.json").read_text()) | {"config": config, "provenance": provenance}
        found["config"]["output_dir"] = str(RUNS / self.study.name)
        del found["provenance"]["command"]  # the cell's own is told, from where the project is
        return found  # type: ignore[no-any-return]


def select(cells: list[Cell], asked: list[str] | None) -> list[Cell]:
    """The cells asked for: a cell's name means it alone, anything else all cells whose names begin so.

    Raises:
        SystemExit: Nothing is called so.
    """
    if asked is None:
        return cells
    names = {cell.name for cell in cells}
    taken: set[str] = set()
    for word in asked:
        meant = {word} if word in names else {name for name in names if name.startswith(word)}
        if not meant:
            raise SystemExit(f"--cells {word}: no such cell; expected one of {', '.join(sorted(names))}")
        taken |= meant
    return [cell for cell in cells if cell.name in taken]


def train_all(runner: Runner, cells: list[Cell], seeds: Iterable[int], jobs: int) -> list[str]:
    """Train all cells, seed by seed so that a table of all cells is there early; no job waits while there is a run.

    Returns:
        What failed, one line each.
    """
    failed: list[str] = []
    for peer in dict.fromkeys(cell.peer for cell in cells if cell.peer is not None):
        try:
            runner.choose(peer)
        except RuntimeError as error:
            # Without its choice it is not trained: what is reported is with it.
            failed.append(str(error))
            cells = [cell for cell in cells if cell.peer != peer]
    waiting = [(cell, seed) for seed in seeds for cell in cells]
    going: dict[Future[None], tuple[Cell, int]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or going:
            for cell, seed in startable(waiting, going.values())[: jobs - len(going)]:
                waiting.remove((cell, seed))
                going[pool.submit(runner.train, cell, seed)] = cell, seed
            for done in wait(going, return_when=FIRST_COMPLETED).done:
                cell, seed = going.pop(done)
                error = done.exception()
                if error is not None and not isinstance(error, RuntimeError):
                    raise error
                print(f"seed {seed}, {cell.name}: {'done' if error is None else error}", flush=True)
                failed += [] if error is None else [str(error)]
    return failed


def startable(waiting: Sequence[tuple[Cell, int]], going: Iterable[tuple[Cell, int]]) -> list[tuple[Cell, int]]:
    """Runs that need nothing, or only what is not to be trained any more; in their order."""
    missing = {(cell.name, seed) for cell, seed in (*waiting, *going)}
    return [(cell, seed) for cell, seed in waiting if (cell.after, seed) not in missing]


# The table.


Found = dict[str, dict[int, dict[str, Any]]]


def gather(runner: Runner, cells: list[Cell]) -> Found:
    """Results that are there: by cell and seed."""
    found: Found = {}
    for cell in cells:
        results = {seed: runner.result(cell, seed) for seed in runner.study.seeds}
        found[cell.name] = {seed: json.loads(path.read_text()) for seed, path in results.items() if path.exists()}
    return found


def twins_of(cell: Cell, found: Found) -> dict[int, dict[str, Any]]:
    """The dense runs that a cell is compared with, by seed: of the same network."""
    return found["dense-b" if cell.peer == "torch-pruning" and found.get("dense-b") else "dense"]


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
)
METERED = ("joules / dense twin", "time / dense twin")
SETTLED = "removals settled"


def table(cells: list[Cell], found: Found, *, settled: bool = False, metered: bool = True) -> list[str]:
    """The rows of the table, in Markdown, of what was trained; ratios and differences seed by seed.

    Args:
        cells: What was trained.
        found: What came of it.
        settled: Also tell how many of the removals were settled and not a gate's own.
        metered: Also tell joules and seconds.
    """
    header = [*HEADER, *(METERED if metered else ()), *([SETTLED] if settled else [])]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for cell in cells:
        runs = found[cell.name]
        if not runs:
            continue
        twins = twins_of(cell, found)
        both = sorted(runs.keys() & twins.keys())

        def ratio(over: Callable[[int], tuple[float | None, float | None]], seeds: list[int], digits: int) -> str:
            pairs = [over(seed) for seed in seeds]
            return _spread([mine / theirs for mine, theirs in pairs if mine is not None and theirs], digits)

        cells_of_row = [
            cell.title,
            str(len(runs)),
            _spread([100 * run["accuracy"] for run in runs.values()], 2),
            _spread([100 * (runs[seed]["accuracy"] - twins[seed]["accuracy"]) for seed in both], 2),
            ratio(lambda seed: (runs[seed]["flops_forward"], runs[seed]["flops_forward_dense"]), sorted(runs), 3),  # noqa: B023
            ratio(lambda seed: (runs[seed]["params"], runs[seed]["params_dense"]), sorted(runs), 3),  # noqa: B023
            ratio(lambda seed: (runs[seed]["flops_train"], _dense_training(cell, runs, twins, seed)), sorted(runs), 3),  # noqa: B023
        ]
        if metered:
            cells_of_row += [
                ratio(lambda seed: (runs[seed]["energy_j"], twins[seed]["energy_j"]), both, 2),  # noqa: B023
                ratio(lambda seed: (runs[seed]["time_s"], twins[seed]["time_s"]), both, 2),  # noqa: B023
            ]
        if settled:
            cells_of_row.append(_settled(list(runs.values())))
        lines.append("| " + " | ".join(cells_of_row) + " |")
    return lines


def _dense_training(cell: Cell, runs: dict[int, Any], twins: dict[int, Any], seed: int) -> int | None:
    """Training FLOPs of the dense network in the epochs of the study."""
    if not cell.varied:
        return int(runs[seed]["flops_train_dense"])
    return int(twins[seed]["flops_train"]) if seed in twins else None


def _settled(runs: list[dict[str, Any]]) -> str:
    """How many of the units that went were settled, as a mean over runs; a channel counts as one."""
    shares = []
    for run in runs:
        units = [(removal["reason"], removal["channels"] or 1) for removal in run.get("removals", [])]
        if units:
            shares.append(sum(n for reason, n in units if reason == "settled") / sum(n for _, n in units))
    return f"{statistics.mean(shares):.0%}" if shares else "-"


def points(cells: list[Cell], found: Found) -> list[dict[str, Any]]:
    """What the curves show: for each cell its means over seeds; joules over the dense twin's where both are known."""
    shown = []
    for cell in cells:
        runs, twins = found[cell.name], twins_of(cell, found)
        if not runs:
            continue
        joules = [
            run["energy_j"] / twins[seed]["energy_j"]
            for seed, run in runs.items()
            if run["energy_j"] and seed in twins and twins[seed]["energy_j"]
        ]
        training = [(run["flops_train"], _dense_training(cell, runs, twins, seed)) for seed, run in runs.items()]
        shares = [spent / dense for spent, dense in training if dense]
        accuracies = [100 * run["accuracy"] for run in runs.values()]
        shown.append(
            {
                "series": cell.label,
                "seeds": len(runs),
                "accuracy": statistics.mean(accuracies),
                "deviation": statistics.stdev(accuracies) if len(runs) > 1 else None,
                "flops": statistics.mean(run["flops_forward"] / run["flops_forward_dense"] for run in runs.values()),
                "training": statistics.mean(shares) if shares else None,
                "joules": statistics.mean(joules) if joules else None,
            }
        )
    return shown


def report(study: Study, cells: list[Cell], found: Found, file: Path) -> str:
    """Write the table and the curves of what is there; the table."""
    text = "\n".join(table(cells, found, settled=study.ablations is not None, metered=not study.shared))
    some = next((run for cell in cells if not cell.varied for run in found[cell.name].values()), None)
    if some is None:
        return text
    provenance = some["provenance"]
    where = ", ".join(provenance["gpus"]) or provenance["cpu"]
    chosen = ""
    if study.peer_targets:
        home = study.chosen_in or (study.name if study.choices else None)
        chosen = " The peers' settings are those of `benchmarks/peers/pruning.py`."
        if home is not None:
            chosen = f" The peers' settings were chosen on held-out training samples (`{home}/chosen-*.json`)."
    joules = f"Joules: {some['energy_quality']}."
    if study.shared:
        joules = "These runs had other work beside them: their seconds and joules tell nothing and are not shown."
    text += (
        f"\n\n`{shlex.join(['python', 'benchmarks/accuracy/study.py', str(file)])}`: mean ± sample standard "
        f"deviation over seeds; differences and ratios seed by seed. {some['config']['optim']['epochs']} epochs in all "
        f"for every cell that does not say otherwise, evaluated on the {some['accuracy_kind']} set after the last "
        f"one.{chosen} {where}, torch "
        f"{provenance['versions']['torch']}. {joules}{f' {study.note}' if study.note else ''} "
        "Each cell's command is in its file."
    )
    missing = [cell.title for cell in cells if not found[cell.name]]
    if missing:
        text += f" Not trained so far: {'; '.join(missing)}."
    RESULTS.mkdir(parents=True, exist_ok=True)
    drawn = ""
    if importlib.util.find_spec("plotly") is not None:
        sys.path.insert(0, str(Path(__file__).parent))
        from curves import write_curves  # it lies beside this file

        axes = ("flops", "training" if study.shared else "joules")
        picture = write_curves(points(cells, found), study.name, RESULTS / study.name, axes)
        drawn = f"\n![curves]({picture.name})\n"
    (RESULTS / f"{study.name}.md").write_text(f"{text}\n{drawn}")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the study's")
    parser.add_argument("--cells", nargs="+", help="only these cells, or those whose names begin so")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; joules and seconds are fair with 1 only")
    parser.add_argument("--minutes", type=float, help="stop in good order after so long; the same command goes on")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where the runs are kept")
    parser.add_argument("--table", action="store_true", help="train nothing, write the table of what is there")
    args = parser.parse_args()
    study = Study.read(args.study)
    runner = Runner(study, args.runs)
    cells = cells_of(study)
    chosen = select(cells, args.cells)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    if args.minutes is not None:
        clock = threading.Timer(60 * args.minutes, runner.stop)
        clock.daemon = True
        clock.start()
    failed = [] if args.table else train_all(runner, chosen, args.seeds or study.seeds, args.jobs)
    print(report(study, cells, gather(runner, cells), args.study))
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
