"""What each block takes of a training step on this device, measured: the cost that ``budget.unit`` counts in.

In seconds (``time``) or in joules (``energy``).
"""

from __future__ import annotations

import copy
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from greenprune.config import ConfigError
from greenprune.energy import POWERCAP, MeterUnavailable, Source, open_counters
from greenprune.flops import go_back_from
from greenprune.models import ResidualBlock, residual_blocks
from greenprune.models.attention import SelfAttention, SeparateSelfAttention, WindowAttention
from greenprune.provenance import gpu_uuid

MeasuredUnit = Literal["time", "energy"]
MEASURED: tuple[MeasuredUnit, ...] = get_args(MeasuredUnit)
"""Units of a budget that are measured and not counted."""

_WARM_UP, _TURNS = 2, 15
# Seconds of a turn on a GPU (our choice): to give it the first pass and to hear of the last takes some microseconds, of
# which a small block would have as many as the whole network.
_TURN_S = 0.003
_WHOLE, _REST = "whole", "rest of "

# The libraries' stochastic depth as they print themselves, with the rate, which differs from block to block.
_SKIPPED = re.compile(r"(StochasticDepth|DropPath)\([^()]*\)")

# Energy (our choices): turns of each part; its least span, in periods of the counter, and in what is not known of its
# edges; how long the passes between two looks at the counter take; and after how long one that does not move is broken.
_ENERGY_TURNS = 3
_SPAN_S, _SPAN_PERIODS, _SPAN_EDGES = 0.3, 5, 20
_LOOK_S = 0.01
_STILL_S = 5.0


@dataclass(frozen=True)
class UnitCost:
    """What forward and backward pass of one batch cost, in seconds or joules.

    Attributes:
        whole: The whole network.
        blocks: What goes with each block, by its name: blocks of the same shape cost the same.
    """

    whole: float
    blocks: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as events and checkpoints hold them."""
        return asdict(self)

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> UnitCost:
        """What a checkpoint's state holds."""
        # The older name is from when only seconds were measured.
        return cls(**(state["unit_cost"] if "unit_cost" in state else state["unit_time"]))


Autocast = Callable[[], AbstractContextManager[Any]]
Passes = dict[str, Callable[[], None]]


def measure_unit_cost(
    unit: MeasuredUnit,
    model: nn.Module,
    example: Tensor,
    *,
    autocast: Autocast = nullcontext,
    channels_last: bool = False,
    recorded: bool = False,
    powercap: Path = POWERCAP,
) -> UnitCost:
    """Measure a network and each of its blocks, forward and backward, on the device of an example.

    A block is measured by itself, on activations of the shape that it sees; what stays when it is removed (a shortcut
    that changes the shape) is taken off. Turns go round over all that is measured, so that each has a chance of a quiet
    moment. The network and the random state stay as they are.

    Of seconds the least of the turns counts, for what disturbs only adds. On a CPU it is the processor time of one
    thread, which other work on the same cores changes little where seconds on the clock change by threefold
    (docs/log.md). Energy is that
    of the GPU, or of all CPUs of the machine and their memory, by the hardware's counter from one of its updates to
    another, which takes seconds for each kind of block; the median of the turns counts. What the device draws when
    idle is in it: a block that goes saves that too, for as long as it ran.

    Args:
        unit: What is measured.
        model: The dense network; its gates, if it has any, are left out.
        example: A batch of its input as it is trained on, in size and on the device.
        autocast: Context of the run's precision.
        channels_last: Whether weights and images are laid out so.
        recorded: Whether the run's steps are recorded as CUDA graphs (``model.cuda_graph``): then the passes are too.
            Launched one by one, small kernels would cost what the host takes to start them, and all blocks alike.
        powercap: Where the kernel shows the counters of the CPU.

    Raises:
        ConfigError: The device has no counter of joules, or it does not count.
    """
    network = copy.deepcopy(model).to(example.device).train()
    if channels_last:
        network.to(memory_format=torch.channels_last)
        example = example.contiguous(memory_format=torch.channels_last)
    if example.device.type == "cuda":
        _wake(example.device)
    blocks = residual_blocks(network)
    for block in blocks.values():
        block.gate = None
    devices = [example.device] if example.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _meter(unit, example.device, powercap) as measure:
        kinds, inputs = _inputs_of(blocks, network, example, autocast)
        first = {kind: blocks[name] for name, kind in reversed(kinds.items())}
        passes = {_WHOLE: _pass_of(network, example, autocast)}
        for kind, block in first.items():
            x = inputs[kind].requires_grad_()
            passes[kind] = _pass_of(block, x, autocast)
            rest = block.without_branch()
            if not isinstance(rest, nn.Identity):
                passes[_REST + kind] = _pass_of(rest, x, autocast)
        costs = measure(_recorded(passes, example.device) if recorded else passes)
    each = {kind: max(0.0, costs[kind] - costs.get(_REST + kind, 0.0)) for kind in first}
    of_blocks = {name: each[kind] for name, kind in kinds.items()}
    # Alone in the cache, blocks may be cheaper than in the network, or dearer than all of it together.
    return UnitCost(max(costs[_WHOLE], sum(of_blocks.values())), of_blocks)


@contextmanager
def _meter(unit: MeasuredUnit, device: torch.device, powercap: Path) -> Iterator[Callable[[Passes], dict[str, float]]]:
    """What measures passes in a unit.

    Raises:
        ConfigError: It cannot be measured on this device.
    """
    if unit == "time":
        yield lambda passes: _least_seconds(passes, device)
        return
    with ExitStack() as stack:
        try:
            counters = open_counters(gpu_uuid(device), powercap=powercap)
            for counter in counters:
                stack.callback(counter.close)
            yield lambda passes: _usual_joules(passes, counters, device)
        except MeterUnavailable as error:
            raise ConfigError(
                f"budget.unit: 'energy' is not valid here: {error.reason}; expected flops, params, blocks or time, or "
                f"a device whose joules are counted ({error.advice})"
            ) from None


def _kind(block: ResidualBlock, x: Tensor) -> str:
    """Text that is equal for blocks that compute alike; how often one of them is skipped at random is not in it."""
    # These do not print what they are made for: their source is part of exported files, and has to stay as it is there.
    attention = [
        (module.heads, module.dropout, *((module.window, module.shift) if isinstance(module, WindowAttention) else ()))
        for module in block.modules()
        if isinstance(module, SelfAttention | SeparateSelfAttention | WindowAttention)
    ]
    shown = _SKIPPED.sub(r"\1", str(block))
    return f"{shown} with {attention} of {tuple(x.shape)}"


def _inputs_of(
    blocks: dict[str, ResidualBlock],
    network: nn.Module,
    example: Tensor,
    autocast: Autocast,
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The kind of each block, and for each kind activations of the shape, precision and memory format that it sees."""
    kinds: dict[str, str] = {}
    seen: dict[str, Tensor] = {}

    def remember(name: str, block: ResidualBlock) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kind = kinds[name] = _kind(block, inputs[0])
            if kind not in seen:
                seen[kind] = torch.randn_like(inputs[0])

        return look

    hooks = [block.register_forward_pre_hook(remember(name, block)) for name, block in blocks.items()]
    with torch.no_grad(), autocast():
        network(example)
    for hook in hooks:
        hook.remove()
    return kinds, seen


def _pass_of(module: nn.Module, x: Tensor, autocast: Autocast) -> Callable[[], None]:
    """Forward and backward of a module, back into its input if that has a gradient."""

    def once() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        with autocast():
            out = module(x.clone() if x.requires_grad else x)  # layers in place would change a leaf
        go_back_from(out)

    return once


def _wake(device: torch.device) -> None:
    """Let the thread of backward passes meet the GPU: where its first kernel there is of cuBLAS, PyTorch warns."""
    torch.ones(1, device=device, requires_grad=True).square().sum().backward()  # type: ignore[no-untyped-call]


def _recorded(passes: Passes, device: torch.device) -> Passes:
    """Passes as CUDA graphs to replay; all as they are where one of them cannot be recorded, or has no room.

    A few of them launched one by one among others that are replayed would look dearer by what the host takes.
    """
    here, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # One after the other they may write to the same memory: each makes all that it reads anew, but for weights and
    # inputs, which lie outside. With memory of its own each, blocks would take as much as the network once more.
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    try:
        for name, once in passes.items():
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    once()
            here.wait_stream(stream)
            graphs[name] = torch.cuda.CUDAGraph()
            # The mode as of the run's own.
            with torch.cuda.graph(graphs[name], pool=pool, stream=stream, capture_error_mode="thread_local"):
                once()
    except RuntimeError:
        torch.cuda.set_stream(here)  # PyTorch leaves its own where a recording fails
        return passes
    return {name: graph.replay for name, graph in graphs.items()}


def _least_seconds(passes: Passes, device: torch.device, turns: int = _TURNS) -> dict[str, float]:
    """Seconds of each pass: on a GPU of several one behind the other, as the passes of steps are."""
    least, repeats = dict.fromkeys(passes, math.inf), dict.fromkeys(passes, 1)
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    with _one_thread() if on_cpu else nullcontext():
        for turn in range(_WARM_UP + turns):
            for name, once in passes.items():
                _wait_for(device)
                started = clock()
                for _ in range(repeats[name]):
                    once()
                _wait_for(device)
                each = (clock() - started) / repeats[name]
                if turn >= _WARM_UP:
                    least[name] = min(least[name], each)
                elif not on_cpu:
                    repeats[name] = max(1, int(_TURN_S / max(each, 1e-9)))
    return least


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within, operators take one thread: several that wait for each other take processor time too, while one lacks a
    core, and then a whole network looks dearer than all of its blocks.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _usual_joules(passes: Passes, counters: Sequence[Source], device: torch.device) -> dict[str, float]:
    """Joules of each pass.

    Raises:
        MeterUnavailable: A counter cannot be read, stands still, or lost count.
    """
    period_s = max(counter.period_s or 0.0 for counter in counters)
    seconds = _least_seconds(passes, device, turns=1)
    turns: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(_ENERGY_TURNS):
        for name, once in passes.items():
            number = max(1, int(_LOOK_S / max(seconds[name], 1e-9)))
            # An update is seen at the next look. How long before it was, up to a period, is all that is not known.
            edge_s = min(period_s, number * seconds[name])
            span_s = max(_SPAN_S, _SPAN_PERIODS * period_s, _SPAN_EDGES * edge_s)
            turns[name].append(_joules_of_one(once, number, counters, span_s, device))
    return {name: statistics.median(found) for name, found in turns.items()}


def _joules_of_one(
    once: Callable[[], None], number: int, counters: Sequence[Source], span_s: float, device: torch.device
) -> float:
    """Joules of a pass, from one update of the counters to another.

    Args:
        once: The pass.
        number: Passes between two looks at the counters.
        counters: What is read.
        span_s: Least seconds between the two updates.
        device: Where the passes are done.
    """

    def until_an_update(last_j: float) -> tuple[float, int]:
        done, still_until_s = 0, time.perf_counter() + _STILL_S
        while time.perf_counter() < still_until_s:
            for _ in range(number):
                once()
            _wait_for(device)
            done += number
            if (now_j := _read_j(counters)) != last_j:
                return now_j, done
        raise MeterUnavailable(
            f"its counter has not moved for {_STILL_S:g} s of work", "see what greenprune doctor says of it"
        )

    gaps = sum(counter.gaps for counter in counters)
    started_j, _ = until_an_update(_read_j(counters))
    started_s, now_j, done = time.perf_counter(), started_j, 0
    while time.perf_counter() - started_s < span_s:
        now_j, more = until_an_update(now_j)
        done += more
    if sum(counter.gaps for counter in counters) != gaps:
        raise MeterUnavailable(
            "its counter lost count while it was read", "start again; see what greenprune doctor says"
        )
    return (now_j - started_j) / done


def _read_j(counters: Sequence[Source]) -> float:
    return sum(counter.read_j() for counter in counters)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
