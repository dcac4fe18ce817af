"""What ``make bench`` measures: one function a line of its table, each giving rows.

Every comparison goes through :mod:`turns`. A function says what it cannot measure by raising :class:`Unmeasured`,
``PeerUnavailable`` or ``ProcessFailed``, or by a row without a figure; it never leaves a line out silently.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from environments import peer_python, same_version
from memory import kept_by, peak_of_tensors
from process import Process
from torch.nn import functional
from training import Training
from turns import Contestant, Figure, in_turn, median_of, ratio_of, take_turns

from greenprune.accounts import Accounts
from greenprune.config import Config, DataConfig, GateConfig, ModelConfig, TrackingConfig
from greenprune.energy import open_local_meter
from greenprune.mirrors import start_mirrors
from greenprune.models import CifarResNet, residual_blocks
from greenprune.surgery import Operation, Structure
from greenprune.tracking import EventLog, RunFolder

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DIGITS = ROOT / "configs" / "digits.yaml"
PRECISIONS = {"no": "fp32", "bf16": "bf16"}


class Unmeasured(RuntimeError):
    """A line cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Target:
    """What a figure should be: at most or at least a limit."""

    sign: str
    limit: float

    def met(self, value: float) -> bool:
        """Whether a figure is what it should be."""
        return value <= self.limit if self.sign == "<=" else value >= self.limit

    def __str__(self) -> str:
        return f"{'at most' if self.sign == '<=' else 'at least'} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        what: What was measured.
        work: On what: data, network, batch, precision.
        figure: The measurement; None if there is none.
        unit: ``x`` for a ratio, ``s``, ``%``.
        target: What it should be; None where the row only informs.
        note: What else a reader has to know, or why there is no figure.
        more: Further figures behind it, for the JSON file.
    """

    what: str
    work: str
    figure: Figure | None
    unit: str = "x"
    target: Target | None = None
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is no target or no figure."""
        return None if self.target is None or self.figure is None else self.target.met(self.figure.value)


@dataclass(frozen=True)
class Setting:
    """How much is measured, on what, with what.

    Attributes:
        device: ``cpu`` or ``cuda``.
        scratch: Folder for runs, which goes when all is done.
        data_root: Folder of the data sets, if any.
        turns: Turns of each contestant.
        steps: Steps of a turn on CIFAR-10; others follow from it.
        batch_size: Images a step on CIFAR-10.
        imagenet_batch: Images a step of 224 x 224 pixels.
        seeds: Seeds of whole runs. All but the first are repeats, for which there may be no time.
        epochs: Epochs of a whole run on digits.
        cifar_epochs: Epochs of a whole run on CIFAR-10; 0: none.
        blocks: Depths to grow over, in blocks, multiples of three.
        batches: Batch sizes to grow over.
        launches: Starts to time.
        network: The network of the small images.
        peers: Whether peers run in environments of their own ("own") or in this one ("here", to try things out).
        until_s: When all should be done, on the clock of ``time.perf_counter``.
    """

    device: str
    scratch: Path
    data_root: str | None
    turns: int = 6
    steps: int = 12
    batch_size: int = 128
    imagenet_batch: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 24
    cifar_epochs: int = 1
    blocks: tuple[int, ...] = (9, 33, 129, 255)
    batches: tuple[int, ...] = (32, 64, 128, 256)
    launches: int = 3
    network: str = "resnet20"
    peers: str = "own"
    until_s: float = math.inf

    def has_time_for(self, seconds: float) -> bool:
        """Whether something that takes so long would be done in time."""
        return time.perf_counter() + seconds <= self.until_s

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device == "cuda"

    @property
    def digits(self) -> int:
        """Decimals of milliseconds that say something."""
        return 2 if self.on_gpu else 0

    @property
    def data(self) -> str:
        """CIFAR-10 if it is there, else digits."""
        there = self.data_root is not None and (Path(self.data_root) / "cifar-10-batches-py" / "data_batch_1").exists()
        return "cifar10" if there else "digits"

    def target(self, sign: str, cpu: float, gpu: float) -> Target:
        """The target of this device."""
        return Target(sign, gpu if self.on_gpu else cpu)

    def python(self, name: str, *packages: str) -> str:
        """The Python that a peer runs with."""
        return sys.executable if self.peers == "here" else str(peer_python(name, same_version(*packages)))

    def config(self, precision: str = "no", network: str | None = None, batch_size: int | None = None) -> Config:
        """A dense run on random images."""
        return Config(
            device="auto" if self.on_gpu else "cpu",
            precision=precision,  # type: ignore[arg-type]
            model=ModelConfig(name=network or self.network, channels_last=True),
            data=DataConfig(batch_size=batch_size or self.batch_size),
            gate=GateConfig(enabled=False),
        )


def _gated(config: Config) -> Config:
    return dataclasses.replace(config, gate=GateConfig())


def _fresh() -> None:
    """Let the next networks have another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


def _ours(setting: Setting, precision: str, *flags: str, network: str | None = None) -> list[str]:
    command = [sys.executable, str(HERE / "our_loop.py"), "--output_dir", str(setting.scratch / "loops")]
    command += ["--data.name", setting.data, "--data.batch_size", str(setting.batch_size)]
    command += ["--model.name", network or setting.network, "--model.channels_last", "true", "--precision", precision]
    command += ["--optim.epochs", "1000", "--device", "auto" if setting.on_gpu else "cpu"]
    return command + (["--data.root", setting.data_root] if setting.data_root else []) + list(flags)


def _work(setting: Setting, precision: str, network: str | None = None) -> str:
    return f"{setting.data}, {network or setting.network}, batch {setting.batch_size}, {PRECISIONS[precision]}"


def dense_loop(setting: Setting) -> list[Row]:
    """Our dense loop against Accelerate's own example, and against its forward and backward passes alone."""
    packages = ("torch", "torchvision", "accelerate", "scikit-learn")
    python = setting.python("accelerate", *packages)
    rows = []
    for precision in PRECISIONS:
        peer = [python, str(HERE / "peers" / "accelerate_loop.py"), "--data", setting.data]
        peer += ["--root", setting.data_root or "", "--mixed-precision", precision]
        peer += ["--batch-size", str(setting.batch_size), "--depth", setting.network.removeprefix("resnet")]
        peer += [] if setting.on_gpu else ["--cpu"]
        with ExitStack() as stack:
            ours = stack.enter_context(Process(_ours(setting, precision, "--gate.enabled", "false")))
            theirs = stack.enter_context(Process(peer))
            if ours.about["params"] != theirs.about["params"]:
                raise Unmeasured(f"the peer's network has {theirs.about['params']} parameters, ours {ours.about}")
            kernels = _Asked(ours, "kernels")
            turns = take_turns(
                {"ours": ours, "theirs": theirs, "kernels": kernels},
                turns=setting.turns,
                steps=setting.steps,
            )
        images = {name: setting.batch_size / turns.median(name).value for name in ("ours", "theirs")}
        rows.append(
            Row(
                "our dense loop against a plain Accelerate loop, images/s",
                _work(setting, precision),
                turns.ratio("theirs", "ours"),
                target=setting.target(">=", 1.3, 3.0),
                note=f"{images['ours']:,.0f} against {images['theirs']:,.0f} images/s"
                + _of_processor(setting, theirs.busy_s, ours.busy_s),
                more={"step_s": turns.seconds, "busy_s": [ours.busy_s, theirs.busy_s], "peer": theirs.about},
            )
        )
        rows.append(
            Row(
                "step over its forward and backward passes alone",
                _work(setting, precision),
                turns.ratio("ours", "kernels"),
                target=Target("<=", 1.10),
                note=f"{1e3 * turns.median('ours').value:.{setting.digits}f} against "
                f"{1e3 * turns.median('kernels').value:.{setting.digits}f} ms"
                + _of_processor(setting, ours.busy_s, kernels.busy_s),
                more={"step_s": turns.seconds},
            )
        )
    return rows


def _of_processor(setting: Setting, first_s: list[float], second_s: list[float], over: float = 1.0) -> str:
    """The same ratio in processor time, which says something where the processor does the work."""
    if setting.on_gpu:
        return ""
    return f"; of processor time {ratio_of(first_s[1:], second_s[1:]).value / over:.3f}"


@dataclass(frozen=True)
class _Asked:
    """Something else than steps that a process does in its turn."""

    process: Process
    what: str
    busy_s: list[float] = field(default_factory=list)

    def turn(self, steps: int) -> float:
        answer = self.process.ask(self.what, steps)
        self.busy_s.append(answer["busy_s"])
        return float(answer["step_s"])


class _Passes:
    """Forward and backward of a network in this process, without anything else of a step."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def turn(self, steps: int) -> float:
        engine, (images, labels) = self._training.engine, self._training.batches[0]
        if engine.device.type == "cuda":
            return self._training.kernels_s(steps)
        engine.synchronize()
        started_s = time.perf_counter()
        for _ in range(steps):
            engine.backward(functional.cross_entropy(engine.model(images), labels))
            engine.optimizer.zero_grad()
        engine.synchronize()
        return (time.perf_counter() - started_s) / steps


def half_of(network: torch.nn.Module) -> Structure:
    """The structure without every second block that can go."""
    names = list(residual_blocks(network))[1::2]
    return Structure([Operation("remove", name, 1, 0.1, "settled") for name in names])


def after_removal(setting: Setting) -> list[Row]:
    """Step time of the network with half of its blocks over the dense one's, divided by the ratio of FLOPs."""
    cases = [("resnet56", 32, setting.batch_size, "no"), ("resnet56", 32, setting.batch_size, "bf16")]
    cases += [("resnet50", 224, setting.imagenet_batch, "bf16")]
    rows = []
    for network, size, batch, precision in cases:
        _fresh()
        config = setting.config(precision, network, batch)
        dense = Training(config, size)
        small = Training(config, size, structure=half_of(dense.engine.module))
        contestants: dict[str, Contestant] = {"dense": dense, "small": small}
        if size == 224:
            contestants["passes"] = _Passes(dense)
        steps = max(1, setting.steps // 4)
        turns = take_turns(contestants, turns=setting.turns, steps=steps)
        dense_s = turns.median("dense").value
        time_ratio, flops = turns.ratio("small", "dense"), small.cost.flops_train / dense.cost.flops_train
        work = f"random {size} x {size} images, {network}, batch {batch}, {PRECISIONS[precision]}"
        figure = Figure(time_ratio.value / flops, time_ratio.low / flops, time_ratio.high / flops, time_ratio.n)
        rows.append(
            Row(
                "after removal of every second block: step time over dense, over the FLOPs ratio",
                work,
                figure,
                target=setting.target("<=", 1.08, 1.15),
                note=f"time {time_ratio.value:.3f}, FLOPs {flops:.3f}; dense {1e3 * dense_s:.{setting.digits}f} ms"
                + _of_processor(setting, small.busy_s, dense.busy_s, flops),
                more={"step_s": turns.seconds, "flops_ratio": flops},
            )
        )
        if size == 224:
            what = "step over its forward and backward passes alone"
            rows.append(Row(what, work, turns.ratio("dense", "passes"), target=Target("<=", 1.10)))
    return rows


def gates(setting: Setting) -> list[Row]:
    """What gates on blocks cost while nothing is removed yet."""
    rows = []
    for precision, said in PRECISIONS.items():
        _fresh()
        config = setting.config(precision)
        pairs: dict[str, list[float]] = {"gated": [], "dense": []}
        busy: dict[str, list[float]] = {"gated": [], "dense": []}
        # Where its tensors happen to lie in a CPU's memory changes a network's speed by percents.
        for _ in range(1 if setting.on_gpu else 3):
            contestants = {"gated": Training(_gated(config), 32), "dense": Training(config, 32)}
            found = take_turns(contestants, turns=setting.turns, steps=max(1, setting.steps // 3))
            for name, training in contestants.items():
                pairs[name] += found.seconds[name]
                busy[name] += training.busy_s[1:]
        rows.append(
            Row(
                "gates on, nothing removed yet, against dense",
                f"random 32 x 32 images, {setting.network}, batch {setting.batch_size}, {said}, "
                "conditional gates on blocks",
                ratio_of(pairs["gated"], pairs["dense"]),
                target=setting.target("<=", 1.03, 1.05),
                note=" and ".join(f"{1e3 * statistics.median(pairs[name]):.1f}" for name in pairs)
                + " ms"
                + _of_processor(setting, busy["gated"], busy["dense"]),
                more={"step_s": pairs, "busy_s": busy},
            )
        )
    return rows


def _run(setting: Setting, config: Path, name: str, *flags: str) -> dict[str, Any]:
    """A whole run in a process of its own; its summary."""
    command = [sys.executable, "-m", "greenprune.train", "--config", str(config), "--output_dir"]
    command += [str(setting.scratch / config.stem), "--run_name", name]
    command += ["--device", "auto" if setting.on_gpu else "cpu", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise Unmeasured(f"the run {name} failed: {said[-1]}")
    summary: dict[str, Any] = json.loads((setting.scratch / config.stem / name / "summary.json").read_text())
    return summary


@dataclass
class _Runs:
    """Whole runs of each kind, by seed, and the seconds that each took with its start."""

    setting: Setting
    config: Path
    epochs: int
    found: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)

    def make(self, kind: str, seed: int) -> None:
        """Make one run; a kind that failed once is not tried again."""
        if kind in self.failed:
            return
        began_s = time.perf_counter()
        try:
            run = self._pruned(kind, seed) if kind in PEERS else self._ours(kind, seed)
        except Unmeasured as error:
            if kind not in PEERS:
                raise
            self.failed[kind] = str(error)
            return
        took_s = time.perf_counter() - began_s
        print(f"  {self.config.stem}, {kind}, seed {seed}: {took_s:.0f} s", flush=True)
        self.found.setdefault(kind, {})[seed] = run
        self.took_s.setdefault(kind, took_s)

    def make_in_time(self, kinds: list[str], seed: int) -> bool:
        """Make runs that repeat what another seed had, all of them if there is time, else none; whether there was."""
        if not self.setting.has_time_for(sum(self.took_s.get(kind, 0.0) for kind in kinds)):
            return False
        for kind in kinds:
            self.make(kind, seed)
        return True

    def of(self, kind: str, seeds: Iterable[int] | None = None) -> list[dict[str, Any]]:
        """The runs of a kind, of all seeds that it has or of these."""
        runs = self.found.get(kind, {})
        return [runs[seed] for seed in (sorted(runs) if seeds is None else seeds)]

    def _ours(self, kind: str, seed: int) -> dict[str, Any]:
        flags = ["--seed", str(seed), "--optim.epochs", str(self.epochs)]
        flags += ["--budget.target", "0.5"] if kind == "gated" else ["--gate.enabled", "false"]
        return _run(self.setting, self.config, f"{kind}-{seed}", *flags)

    def _pruned(self, kind: str, seed: int) -> dict[str, Any]:
        method, factor = PEERS[kind]
        output = self.setting.scratch / f"{method}-{factor}-{seed}.json"
        (ours,) = self.of("gated", [seed])
        target = ours["flops_forward"] / ours["flops_forward_dense"]
        command = [sys.executable, str(HERE / "peers" / "pruning.py"), "--method", method]
        command += ["--config", str(self.config), "--target", str(target), "--seed", str(seed)]
        command += ["--output", str(output), "--", "--optim.epochs", str(factor * self.epochs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise Unmeasured(f"it failed: {said[-1]}")
        pruned: dict[str, Any] = json.loads(output.read_text())
        return pruned


TWINS = ["gated", "dense"]
# A peer's method, and how many of our epochs its two phases have together.
PEERS = {
    "slimming, both phases in our epochs": ("slimming", 1),
    "slimming, each phase as many epochs as ours": ("slimming", 2),
    "torch-pruning, both phases in our epochs": ("torch-pruning", 1),
    "torch-pruning, each phase as many epochs as ours": ("torch-pruning", 2),
}


def whole_runs(setting: Setting) -> list[Row]:
    """Whole runs at target 0.5 beside their dense twins, and the peers that end at the same FLOPs."""
    rows = []
    first, *others = setting.seeds
    runs = _Runs(setting, DIGITS, setting.epochs)
    for kind in [*TWINS, *PEERS]:
        runs.make(kind, first)
    if setting.cifar_epochs and setting.data == "cifar10":
        photographs = _Runs(setting, ROOT / "configs" / "cifar10_resnet20.yaml", setting.cifar_epochs)
        for kind in TWINS:
            photographs.make(kind, first)
        rows = _twins(photographs)
    elif setting.cifar_epochs:
        rows = [Row("whole run at target 0.5", "cifar10", None, note="CIFAR-10 is not in GREENPRUNE_DATA")]
    short = [kind for kind, (_, factor) in PEERS.items() if factor == 1]
    for number, seed in enumerate(others):
        twins = TWINS if number % 2 else TWINS[::-1]
        if not runs.make_in_time([*twins, *short] if number == 0 else twins, seed):
            break
    return _twins(runs) + _pruned(runs) + rows


def _twins(runs: _Runs) -> list[Row]:
    gated, dense = (runs.of(kind) for kind in TWINS)
    first = gated[0]
    work = f"{first['data']}, {first['model']}, batch {first['batch_size']}, {runs.epochs} epochs"
    kept = statistics.mean(run["flops_forward"] / run["flops_forward_dense"] for run in gated)
    accuracy = [statistics.mean(run["accuracy"] for run in found) for found in (gated, dense)]
    note = f"FLOPs kept {kept:.2f}; accuracy {100 * accuracy[0]:.1f} %, twin {100 * accuracy[1]:.1f} %"
    target = Target("<=", 0.75)
    more = {"gated": gated, "dense": dense}
    rows = []
    for what, key in (("time", "time_s"), ("joules", "energy_j")):
        name = f"whole run at target 0.5: {what} over the dense twin's"
        values = [[run[key] for run in found] for found in (gated, dense)]
        if None in values[0] + values[1]:
            rows.append(Row(name, work, None, target=target, note="the joules are unknown on this machine"))
            continue
        said = note if key == "time_s" else f"joules: {first['energy_quality']}"
        rows.append(Row(name, work, ratio_of(*values), target=target, note=said, more=more if key == "time_s" else {}))
    return rows


def _pruned(runs: _Runs) -> list[Row]:
    """Two-phase pruning to the same FLOPs: with our epochs for both phases together, and for each of them."""
    rows = []
    for kind, (method, factor) in PEERS.items():
        name, work = f"{method} to the same FLOPs, over our whole run", f"digits, resnet38{kind.removeprefix(method)}"
        if kind in runs.failed:
            rows.append(Row(name, work, None, target=Target(">=", 1.5), note=runs.failed[kind]))
            continue
        found = runs.of(kind)
        ours = runs.of("gated", sorted(runs.found[kind]))
        times = [[run["time_s"] for run in side] for side in (found, ours)]
        accuracy = [100 * statistics.mean(run["accuracy"] for run in side) for side in (found, ours)]
        note = f"accuracy {accuracy[0]:.1f} %, ours {accuracy[1]:.1f} %"
        if factor == 2:
            note += "; as in its paper, where fine-tuning takes as long as training"
        rows.append(Row(name, work, ratio_of(*times), target=Target(">=", 1.5), note=note, more={"runs": found}))
    return rows


class _Told:
    """Turns of one network: plain, or metered, with its events recorded and mirrored as the trainer does."""

    def __init__(self, training: Training, every: int, record: Callable[[int], None] | None) -> None:
        self._training, self._every, self._record = training, every, record

    def turn(self, steps: int) -> float:
        self._training.engine.synchronize()
        started_s = time.perf_counter()
        for number in range(1, steps + 1):
            self._training.step()
            if self._record is not None and number % self._every == 0:
                self._record(number)
        self._training.engine.synchronize()
        return (time.perf_counter() - started_s) / steps


def telling(setting: Setting) -> list[Row]:
    """What metering, events and tracking cost a step together."""
    _fresh()
    config = dataclasses.replace(
        setting.config(network="resnet38", batch_size=64),
        tracking=TrackingConfig(trackers=["wandb"], mode="offline"),
    )
    training = Training(config, 8, channels=1)
    engine = training.engine
    folder = RunFolder(setting.scratch / "told")
    folder.path.mkdir(parents=True)
    mirrors, notes = start_mirrors(engine, config, folder, os.environ, lambda *_: [], online=False)
    if not mirrors:
        raise Unmeasured(f"no tracker: {' '.join(notes)}")
    log = EventLog(folder.events, [*mirrors])
    taken: list[float] = []
    training.turn(10)
    every = max(10, int(1.0 / training.turn(20)))  # as the trainer does: ten steps, or a second
    numbers = {f"train__{key}": 0.5 for key in ("loss", "accuracy", "lr", "samples_per_s", "step_time_s")}
    with ExitStack() as stack:
        meter = stack.enter_context(
            open_local_meter(os.environ, interval_s=config.energy.interval_s, synchronize=engine.synchronize)
        )
        accounts = Accounts(engine, meter, None)

        def record(step: int) -> None:
            started_s = time.perf_counter()
            log.record("train", step, **numbers, **accounts.numbers())
            taken.append(time.perf_counter() - started_s)

        class Metered(_Told):
            def turn(self, steps: int) -> float:
                with meter.window("train"):
                    return super().turn(steps)

        contestants = {"plain": _Told(training, every, None), "told": Metered(training, every, record)}
        turns = take_turns(contestants, turns=4 * setting.turns, steps=max(every, 3 * setting.steps), warmup=2)
    log.close()
    for mirror in mirrors:
        mirror.close()
    ratio = turns.ratio("told", "plain")
    cost = Figure(*(100 * (value - 1) for value in (ratio.value, ratio.low, ratio.high)), n=ratio.n)
    direct = 100 * statistics.median(taken) / every / turns.median("plain").value
    return [
        Row(
            "metering, events and tracking (W&B offline) together, of a step",
            "digits' shape, resnet38, batch 64, fp32",
            cost,
            "%",
            Target("<=", 1.0),
            f"on the training thread alone {direct:.2f} %: {1e3 * statistics.median(taken):.2f} ms every {every} steps",
            {"step_s": turns.seconds, "record_s": taken},
        )
    ]


def start_up(setting: Setting) -> list[Row]:
    """Seconds from the command to the end of its first step, by both ways to start a run."""
    launched = ["--quiet", "--config_file", str(ROOT / "launch" / ("gpu.yaml" if setting.on_gpu else "cpu.yaml"))]
    launched.append("greenprune/train.py")
    ways = {
        "greenprune train": [sys.executable, "-m", "greenprune.cli", "train"],
        "python -m accelerate.commands.launch (make train)": [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *launched,
        ],
        "accelerate launch": [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launched],
    }
    imports = {"torch": "import torch", "all": "import greenprune.run"}
    imported = {
        name: [_seconds([sys.executable, "-c", line]) for _ in range(setting.launches)]
        for name, line in imports.items()
    }
    said = ", ".join(f"{name} {statistics.median(values):.1f} s" for name, values in imported.items())
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number, way in enumerate(in_turn(list(ways), setting.launches)):
        found[way].append(_first_step_s(setting, ways[way], f"run-{number}"))
    rows = []
    for way, seconds in found.items():
        target = setting.target("<=", 8.0, 15.0)
        note = f"Python with its imports alone: {said}"
        rows.append(Row(f"{way}: command to first step", "digits, resnet38", median_of(seconds), "s", target, note))
    return rows


def _seconds(command: list[str]) -> float:
    started_s = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT)
    return time.perf_counter() - started_s


def _first_step_s(setting: Setting, command: list[str], name: str) -> float:
    folder = setting.scratch / "started"
    flags = ["--config", str(DIGITS), "--output_dir", str(folder), "--run_name", name]
    flags += ["--optim.epochs", "1", "--tracking.log_every", "1"]
    began_s = time.time()  # events carry the time of day
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise Unmeasured(f"the run {name} failed: {done.stderr.strip().splitlines()[-1:]}")
    events = (folder / name / "events.jsonl").read_text().splitlines()
    first = next(event for event in map(json.loads, events) if event["kind"] == "train")
    return float(first["time"]) - began_s


def memory(setting: Setting) -> list[Row]:
    """Peak memory of a step, gated over dense, and as blocks go."""
    with ExitStack() as stack:
        kinds = {"gated": [], "dense": ["--gate.enabled", "false"]}
        found = {
            kind: stack.enter_context(Process(_ours(setting, "no", *flags))).ask("memory", 3)
            for kind, flags in kinds.items()
        }
    rows = []
    for what, key in (("tensors of a step", "tensors"), ("the process, resident", "rss")):
        work = f"{_work(setting, 'no')}; {what}"
        name = "peak memory before any removal, over the dense loop's"
        if found["gated"][key] is None:
            rows.append(Row(name, work, None, target=Target("<=", 1.05), note="not told by this system"))
            continue
        ratio = found["gated"][key] / found["dense"][key]
        rows.append(Row(name, work, Figure(ratio, ratio, ratio, 1), target=Target("<=", 1.05), more=found))
    _fresh()
    config = _gated(setting.config())
    peaks = []
    gone: list[Operation] = []
    operations = half_of(Training(config, 32).engine.module).operations
    for number in range(len(operations) + 1):
        gone = operations[:number]
        training = Training(config, 32, structure=Structure(list(gone)))
        training.step()
        peak = peak_of_tensors(training.step, training.engine.device)
        peaks.append(peak + kept_by(training.engine.module, training.engine.optimizer))
    largest = max(later / earlier for earlier, later in itertools.pairwise(peaks))
    rows.append(
        Row(
            "peak memory after a removal over that before it, the largest of all removals",
            f"random 32 x 32 images, {setting.network}, batch {setting.batch_size}, fp32; tensors of a step",
            Figure(largest, largest, largest, len(peaks) - 1),
            target=Target("<=", 0.9999),
            note=", ".join(f"{peak / 2**20:.0f}" for peak in peaks) + f" MiB with 0 to {len(gone)} blocks removed",
            more={"bytes": peaks},
        )
    )
    return rows


def growth(setting: Setting) -> list[Row]:
    """How time grows with images and with FLOPs, and what gates cost in small and in large networks."""
    _fresh()
    steps = max(1, setting.steps // 6)
    by_images = {str(batch): Training(setting.config(batch_size=batch), 16) for batch in setting.batches}
    turns = take_turns(by_images, turns=setting.turns, steps=steps)
    seconds = {batch: turns.median(str(batch)).value for batch in setting.batches}
    name = "power with which step time grows"
    network = f"random 16 x 16 images, {setting.network}, fp32"
    span = f"{setting.batches[0]} to {setting.batches[-1]}"
    rows = [_exponent(f"{name} with images", f"{network}, batch {span}", seconds)]
    batch = setting.batch_size // 4
    found: dict[int, dict[str, list[float]]] = {}
    flops: dict[int, float] = {}
    for blocks in setting.blocks:
        config = setting.config(batch_size=batch)

        def build(blocks: int = blocks) -> torch.nn.Module:
            return CifarResNet(2 * blocks + 2, 10, 3, "A")

        pair = {"gated": Training(_gated(config), 16, build=build), "dense": Training(config, 16, build=build)}
        found[blocks] = take_turns(
            pair, turns=setting.turns, steps=max(4 if setting.on_gpu else 1, 2 * steps * 9 // blocks)
        ).seconds
        flops[blocks] = pair["dense"].cost.flops_train
    dense = {flops[blocks]: statistics.median(found[blocks]["dense"]) for blocks in setting.blocks}
    span = f"{setting.blocks[0]} to {setting.blocks[-1]} blocks"
    work = f"random 16 x 16 images, CIFAR ResNets of {span}, batch {batch}, fp32"
    rows.append(_exponent(f"{name} with FLOPs", work, dense))
    shares = {blocks: ratio_of(found[blocks]["gated"], found[blocks]["dense"]) for blocks in setting.blocks}
    first, last = (shares[setting.blocks[index]] for index in (0, -1))
    said = ", ".join(f"{100 * (share.value - 1):+.1f} % at {blocks}" for blocks, share in shares.items())
    rows.append(
        Row(
            "gates' share of a step in the deepest network, less that in the shallowest",
            work,
            Figure(*(100 * (value - first.value) for value in (last.value, last.low, last.high)), n=last.n),
            "%",
            Target("<=", 1.0),
            said,
            {"step_s": {str(blocks): seconds for blocks, seconds in found.items()}},
        )
    )
    return rows


def _exponent(what: str, work: str, seconds: dict[Any, float]) -> Row:
    """The slope of log(time) over log(size): 1 is linear, less has a part that does not grow."""
    xs, ys = [math.log(float(size)) for size in seconds], [math.log(value) for value in seconds.values()]
    slope = statistics.linear_regression(xs, ys).slope
    said = ", ".join(f"{1e3 * value:.0f}" for value in seconds.values()) + " ms"
    more = {"size": [float(size) for size in seconds], "step_s": list(seconds.values())}
    return Row(what, work, Figure(slope, slope, slope, len(xs)), "power", Target("<=", 1.05), said, more)


MEASUREMENTS: dict[str, Callable[[Setting], list[Row]]] = {
    "dense_loop": dense_loop,
    "gates": gates,
    "after_removal": after_removal,
    "telling": telling,
    "memory": memory,
    "growth": growth,
    "start_up": start_up,
    "whole_runs": whole_runs,
}
"""By name, in the order in which they are measured."""
