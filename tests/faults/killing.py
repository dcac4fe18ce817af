"""Real training processes killed at random instants, which go on and are compared with an untouched run."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from launching import TRAIN, command, environment

from greenprune.checkpoint import list_checkpoints, load_checkpoint
from greenprune.command import run_command
from greenprune.tracking import course_of, read_events
from greenprune.verify import verify_run

CONFIG = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: 5, lr: 0.05}
gate: {warmup: 0.1}
budget: {target: 0.5}
removal: {window: 11, decide_by: 0.6}
tracking: {log_every: 5}
"""
VARIANTS = {
    "blocks, sgd": [],
    "channels, adamw": ["--gate.units", "[channel]", "--optim.name", "adamw", "--optim.lr", "0.002"],
    "both, static, clipped": ["--gate.units", "[block, channel]", "--gate.kind", "static", "--optim.clip_norm", "1"],
    "averaged, in parts": ["--optim.ema", "0.9", "--optim.accumulate", "2"],
}
# What differs between two courses that are otherwise the same: clocks, joules, and when a checkpoint was taken.
_OF_THE_MOMENT = ("time", "time_s", "train/samples_per_s", "train/step_time_s")
_COMPARED = ("train", "window", "removal", "freeze", "epoch")
_SUMMARISED = ("flops_train", "flops_train_dense", "samples", "steps", "accuracy", "loss", "removals", "kept_cost")
_END_S = 240.0


@dataclass
class Case:
    """One run that was killed at least once and then went on to its end.

    Attributes:
        variant: What kind of run.
        processes: How many processes it has.
        kills: What was killed and when: seconds after the start and the last step on record.
        wrong: What differs from the untouched run; empty if nothing does.
    """

    variant: str
    processes: int
    kills: list[dict[str, Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Runs:
    """Runs of one kind below one folder, with the untouched one that all others are compared with.

    Args:
        output: Folder for all of them.
        variant: One of :data:`VARIANTS`.
        processes: How many processes a run has.
        forked: Start processes as forks of this one, which has imported everything, instead of by the command line: a
            run then starts in a fraction of a second. They are processes all the same, and die as such.
    """

    def __init__(self, output: Path, variant: str, processes: int, *, forked: bool = False) -> None:
        self.output, self.variant, self.processes, self._forked = output, variant, processes, forked
        output.mkdir(parents=True, exist_ok=True)
        self._config = output / "config.yaml"
        self._config.write_text(CONFIG)
        self.whole = output / "whole"
        assert self._finish("whole") == 0, self._tail("whole")
        events = read_events(self.whole / "events.jsonl")
        self._setup_s = max(0.5, json.loads((self.whole / "summary.json").read_text())["time_s"] / 2)
        self._course_s = events[-1]["time"] - events[0]["time"]

    def _tail(self, name: str) -> str:
        return (self.output / f"{name}.log").read_text()[-3000:]

    def _start(self, name: str) -> _Group:
        args = ["--config", str(self._config), "--output_dir", str(self.output), "--run_name", name]
        args += ["--resume", "auto", "--device", "cpu", *VARIANTS[self.variant]]
        log = self.output / f"{name}.log"
        return _Forks(args, self.processes, log) if self._forked else _Launched(args, self.processes, log)

    def _finish(self, name: str) -> int | None:
        group = self._start(name)
        code = group.wait(_END_S)
        group.kill()
        return code

    def kill_and_finish(self, name: str, chance: random.Random, most_kills: int = 3) -> Case:
        """Kill a new run at random instants, one to ``most_kills`` times, and let it go on each time to the end."""
        folder = self.output / name
        kill = None
        while kill is None:  # it was done before
            shutil.rmtree(folder, ignore_errors=True)
            kill = self._kill_once(name, chance)
        case = Case(self.variant, self.processes, [kill])
        while len(case.kills) < most_kills and chance.random() < 1 / 3:
            kill = self._kill_once(name, chance)
            if kill is None:
                break
            case.kills.append(kill)
        code = self._finish(name)
        case.wrong = list(differences(self.whole, folder)) if code == 0 else [f"exit code {code}: {self._tail(name)}"]
        if not case.wrong:
            shutil.rmtree(folder)
        return case

    def _kill_once(self, name: str, chance: random.Random) -> dict[str, Any] | None:
        """Start a run and kill it at a random instant of its course or, at times, of its start; None if it was done."""
        events = self.output / name / "events.jsonl"
        before = events.stat().st_size if events.exists() else 0
        group = self._start(name)
        how = chance.choice(["all at once", "all at once", "all, a moment after SIGTERM"])
        if self.processes > 1 and chance.random() < 0.5:
            how = "one rank first"
        starting = chance.random() < 0.2
        after_s = chance.uniform(0, self._setup_s if starting else self._course_s)
        deadline = time.monotonic() + _END_S
        while not starting and time.monotonic() < deadline:
            if group.wait(0.002) is not None or (events.exists() and events.stat().st_size > before):
                break
        code = group.wait(after_s)
        if code is not None:
            group.kill()
            assert code == 0, self._tail(name)
            return None
        if how == "one rank first":
            chance.choice(group.ranks()).kill()
            group.wait(chance.uniform(0, 0.5))
        elif how.endswith("SIGTERM"):
            group.terminate()
            group.wait(chance.uniform(0, 0.2))
        group.kill()
        steps = [event["step"] for event in read_events(events)]
        of = "its start" if starting else "its course"
        return {"after_s": round(after_s, 3), "of": of, "how": how, "last_step": steps[-1] if steps else None}


class _Group(ABC):
    """The processes of one run."""

    @abstractmethod
    def wait(self, timeout_s: float) -> int | None:
        """Exit code once all have ended; None after so many seconds."""

    @abstractmethod
    def ranks(self) -> list[psutil.Process]:
        """The training processes."""

    @abstractmethod
    def terminate(self) -> None:
        """Ask all to stop."""

    @abstractmethod
    def kill(self) -> None:
        """Kill all that is left, at once."""


class _Launched(_Group):
    """Started by the command line, as a user does."""

    def __init__(self, args: list[str], processes: int, log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command(TRAIN, args, processes), env=environment(), stdout=file, stderr=file, start_new_session=True
            )

    def wait(self, timeout_s: float) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=timeout_s)
        return self._process.returncode

    def ranks(self) -> list[psutil.Process]:
        launcher = psutil.Process(self._process.pid)
        return launcher.children() or [launcher]

    def terminate(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class _Forks(_Group):
    """Forks of this process, one for each rank."""

    def __init__(self, args: list[str], processes: int, log: Path) -> None:
        variables = environment()
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            variables |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self._codes: dict[int, int | None] = {}
        for rank in range(processes):
            here = {} if processes == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pid = os.fork()
            if pid == 0:
                _become(args, variables | here, log)
            self._codes[pid] = None

    def wait(self, timeout_s: float) -> int | None:
        deadline = time.monotonic() + timeout_s
        while True:
            for pid in [pid for pid, code in self._codes.items() if code is None]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._codes[pid] = os.waitstatus_to_exitcode(status)
            codes = list(self._codes.values())
            if None not in codes:
                return next((code for code in codes if code), 0)
            if time.monotonic() > deadline:
                return None
            time.sleep(0.001)

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(pid) for pid, code in self._codes.items() if code is None]

    def terminate(self) -> None:
        for pid, code in self._codes.items():
            if code is None:
                os.kill(pid, signal.SIGTERM)

    def kill(self) -> None:
        for pid, code in self._codes.items():
            if code is None:
                os.kill(pid, signal.SIGKILL)
        self.wait(_END_S)


def _become(args: list[str], variables: dict[str, str], log: Path) -> NoReturn:
    """Turn a fork into a training process."""
    code = 99
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.clear()
        os.environ.update(variables)
        code = run_command(args, os.environ, "train.py")
    except BaseException:  # noqa: BLE001 - a fork must not go on as this process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def differences(whole: Path, cut: Path) -> Iterator[str]:
    """What a run that was killed and resumed has otherwise than the untouched one; nothing is to be left out."""
    once, twice = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    for key in _SUMMARISED:
        if once[key] != twice[key]:
            yield f"summary.json: {key} is {twice[key]}, not {once[key]}"
    if (whole / "structure.json").read_text() != (cut / "structure.json").read_text():
        yield "structure.json differs"
    last, same = (load_checkpoint(list_checkpoints(folder / "checkpoints")[-1]) for folder in (whole, cut))
    yield from _unequal(last.model, same.model, "model")
    yield from _unequal(last.training, same.training, "training")
    for key in ("step", "structure", "evaluation", "config"):
        yield from _unequal(last.state[key], same.state[key], f"state.{key}")
    for key in ("flops_train", "flops_train_dense", "samples"):
        yield from _unequal(last.state["ledger"][key], same.state["ledger"][key], f"ledger.{key}")
    yield from _unequal_courses(read_events(whole / "events.jsonl"), read_events(cut / "events.jsonl"))
    yield from _too_little(read_events(cut / "events.jsonl"), twice)
    yield from (str(finding) for finding in verify_run(cut) if finding.good is False)
    left = [str(path) for path in cut.rglob("*.tmp")]
    if left:
        yield f"left behind: {', '.join(left)}"


def _unequal(one: Any, other: Any, where: str) -> Iterator[str]:
    """Paths of nested values at which two are not the same to the bit."""
    if type(one) is not type(other):
        yield f"{where}: {type(other).__name__} instead of {type(one).__name__}"
    elif isinstance(one, torch.Tensor):
        if (one.dtype, one.shape) != (other.dtype, other.shape) or _bits(one) != _bits(other):
            yield f"{where}: other bits"
    elif isinstance(one, dict):
        if list(one) != list(other):
            yield f"{where}: other keys"
        for key in one.keys() & other.keys():
            yield from _unequal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{where}: {len(other)} instead of {len(one)}"
        for index, (left, right) in enumerate(zip(one, other, strict=False)):
            yield from _unequal(left, right, f"{where}[{index}]")
    elif one != other:
        yield f"{where}: {other!r} instead of {one!r}"


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _unequal_courses(whole: list[dict[str, Any]], cut: list[dict[str, Any]]) -> Iterator[str]:
    """Every event of the untouched run once, in order, with the same figures; none that it has not."""
    expected, found = ([_figures(event) for event in course_of(events)] for events in (whole, cut))
    expected = [event for event in expected if event["kind"] in _COMPARED]
    steps = {event["step"] for event in expected if event["kind"] == "train"}
    # A run that is asked to stop tells its loss once more where it stops.
    found = [
        event for event in found if event["kind"] in _COMPARED and (event["kind"] != "train" or event["step"] in steps)
    ]
    for one, other in zip(expected, found, strict=False):
        if one != other:
            unequal = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
            yield f"events: {one['kind']} at step {one['step']} differs in {', '.join(sorted(unequal))}"
    if len(expected) != len(found):
        yield f"events: {len(found)} instead of {len(expected)}"
    saved = [event["step"] for event in course_of(cut) if event["kind"] == "checkpoint"]
    if len(saved) != len(set(saved)):
        yield f"events: a checkpoint is told twice: {saved}"


def _figures(event: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in event.items()
        if key not in _OF_THE_MOMENT and not key.startswith(("energy/", "process/"))
    }


def _too_little(events: list[dict[str, Any]], summary: dict[str, Any]) -> Iterator[str]:
    """Where the books tell less than was done by all attempts together."""
    starts = [event for event in events if event["kind"] == "start"]
    if summary["attempts"] != len(starts):
        yield f"{summary['attempts']} attempts on the books, {len(starts)} started"
    told = [event["energy/total_j"] for event in events if event.get("energy/total_j") is not None]
    if told and told != sorted(told):
        yield "energy/total_j falls"
    if told and summary["energy_j"] < told[-1]:
        yield f"energy_j {summary['energy_j']} is less than {told[-1]}, which was told"
    seconds = [event["time_s"] for event in events if event.get("time_s") is not None]
    if seconds and (seconds != sorted(seconds) or summary["time_s"] < seconds[-1]):
        yield "time_s falls"
    if [event["kind"] for event in events].count("end") != 1:
        yield "not one end"
