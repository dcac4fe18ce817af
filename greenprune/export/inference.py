"""What inference with exported networks takes beside the dense twin's."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from greenprune.config import ModelConfig
from greenprune.energy import Measurement, Meter, open_meter
from greenprune.export.exporting import form_to_write, read_record, weights_bytes
from greenprune.export.formats import ExportError, Loaded, check_format, load_written, read_network, write_network
from greenprune.formatting import UNKNOWN, NamedFigures, format_joules, format_seconds, format_si
from greenprune.models import build_model
from greenprune.provenance import gpu_uuid

_LATENCY_S, _THROUGHPUT_S = 0.05, 0.3  # of work in a turn; estimates of energy read nothing below 0.1 s

# A counter that moves in steps is off by up to one of them: joules are read over this many. The same work goes on
# before they are read, or the first step would hold the little that one image at a time takes.
_COUNTER_PERIODS, _LEAD_PERIODS = 20, 2


@dataclass(frozen=True)
class DeviceEnergy:
    """What a device takes for inference in large batches.

    Attributes:
        energy_j_per_1000: Joules for 1,000 images; None if they could not be read.
        energy_bound_j_per_1000: Most joules by which that is off because a counter moves in steps; None for estimates.
    """

    energy_j_per_1000: float | None
    energy_bound_j_per_1000: float | None


@dataclass
class Cost:
    """What inference with one network takes.

    Attributes:
        network: Its folder, or ``dense twin``.
        latency_s: Median seconds for one image by itself.
        images_per_s: Median images a second in large batches.
        energy_j_per_1000: Joules for 1,000 images in large batches; None if nothing could be read.
        energy_bound_j_per_1000: Most joules by which that is off because counters move in steps; None with an estimate
            in it, which has no bound.
        energy_by_device: The same for each device.
        weights_bytes: Parameters and buffers.
        activations_bytes: Most bytes of tensors alive at once in a large batch, without the weights; None where the
            runtime does not tell.
        against_twin: For latency, throughput and energy how many times better than the twin: medians over the turns,
            each taken in one turn. Empty for the twin itself, and without one.
    """

    network: str
    latency_s: float
    images_per_s: float
    energy_j_per_1000: float | None
    energy_bound_j_per_1000: float | None
    energy_by_device: dict[str, DeviceEnergy]
    weights_bytes: int
    activations_bytes: int | None
    against_twin: dict[str, float | None] = field(default_factory=dict)

    def energy_text(self) -> str:
        """Joules for 1,000 images and their bound, for people."""
        joules, bound_j = self.energy_j_per_1000, self.energy_bound_j_per_1000
        return format_joules(joules) if bound_j is None else f"{format_joules(joules)} ± {format_joules(bound_j)}"


@dataclass
class Comparison:
    """Networks that were measured in turn: the dense twin first, if there is one.

    Attributes:
        engine: What ran them: eager, compiled or onnxruntime, with the version and the device.
        costs: One for each network.
        energy_quality: How much the joules are worth; None if there are none.
        energy_sources: Where they come from, by device.
    """

    engine: str
    costs: list[Cost]
    energy_quality: str | None
    energy_sources: dict[str, str]


@dataclass
class InferenceReport:
    """What inference takes, engine by engine; rich prints it as a table."""

    batch_size: int
    turns: int
    threads: int
    comparisons: list[Comparison]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("network", overflow="fold")
        for name in (
            "latency,\nbatch 1",
            f"images/s,\nbatch {self.batch_size}",
            "J / 1,000\nimages",
            "weights",
            "activations",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        for comparison in self.comparisons:
            table.add_row(Text(comparison.engine, style="bold"))
            for cost in comparison.costs:
                table.add_row(*_cells(cost))
                if cost.against_twin:
                    ratios = (cost.against_twin[key] for key in ("latency", "throughput", "energy"))
                    cells = ("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios)
                    table.add_row("  better than the twin", *cells, style="green")
        sources = {
            f"joules: {device}, {source} ({comparison.energy_quality})"
            for comparison in self.comparisons
            for device, source in comparison.energy_sources.items()
        }
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        notes = [f"{self.turns} turn{'' if self.turns == 1 else 's'}, {threads}", *sorted(sources), *self.notes]
        return Group(NamedFigures(table), *(Text(note, style="dim") for note in notes))


def _cells(cost: Cost) -> list[str]:
    activations = UNKNOWN if cost.activations_bytes is None else format_si(cost.activations_bytes, "B")
    return [
        f"  {cost.network}",
        format_seconds(cost.latency_s),
        f"{cost.images_per_s:,.0f}",
        cost.energy_text(),
        format_si(cost.weights_bytes, "B"),
        activations,
    ]


@dataclass
class _Contestant:
    """One network that takes turns with others."""

    name: str
    run: Callable[[Tensor], Tensor]
    module: nn.Module | None
    weights_bytes: int
    single_s: list[float] = field(default_factory=list)
    image_s: list[float] = field(default_factory=list)
    measured: list[Measurement] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    repeats: tuple[int, int] = (1, 1)
    lead: int = 0


def benchmark_inference(
    paths: Sequence[Path | str],
    *,
    batch_size: int = 256,
    turns: int = 15,
    compiled: bool = False,
    trust: bool = False,
) -> InferenceReport:
    """Measure exported networks beside their dense twins, in turn, on the CPU and on the GPU if there is one.

    Networks of one format and one dense twin are measured together. The twin is the network of the run's config before
    any removal, untrained, in the same format and with batch norms folded if theirs are. PyTorch networks keep the
    layout of tensors that the run had (``model.channels_last``).

    Args:
        paths: Exported folders, or files in them. No code in them is run, unless they are trusted.
        batch_size: Images in a large batch.
        turns: How often each network has its turn.
        compiled: Also measure PyTorch networks compiled by torch.compile.
        trust: Whether files of torch.export, whose loader runs code, may be loaded.

    Raises:
        UserError: There is no such file, or a setting is not valid.
    """
    for name, value, least in (("--batch-size", batch_size, 1), ("--turns", turns, 1)):
        if value < least:
            raise ExportError(f"{name}: {value} is not valid; expected at least {least}")
    groups: dict[str, list[tuple[str, Path, dict[str, Any]]]] = {}
    for path in paths:
        folder, record = read_record(Path(path))
        key = repr([record[name] for name in ("kind", "model", "classes")] + [record["input"]["shape"], _folds(record)])
        groups.setdefault(key, []).append((str(path), folder, record))
    report = InferenceReport(batch_size, turns, torch.get_num_threads(), [], [])
    for group in groups.values():
        _compare_group(group, report, compiled, trust)
    return report


def _folds(record: dict[str, Any]) -> bool:
    return bool(record["batch_norms_folded"])


def _compare_group(
    group: list[tuple[str, Path, dict[str, Any]]], report: InferenceReport, compiled: bool, trust: bool
) -> None:
    record = group[0][2]
    networks = [
        (name, read_network(record["kind"], folder, trust=trust), int(each["weights_bytes"]))
        for name, folder, each in group
    ]
    if record["model"] is None:
        report.notes.append(f"{group[0][0]}: no dense twin, for the network is not of a run")
    else:
        networks.insert(0, _dense_twin(record))
    shape = tuple(record["input"]["shape"])
    if networks[0][1].module is None:
        report.comparisons.append(_compare(networks, shape, report, "", torch.device("cpu"), False))
        return
    channels_last = record["model"] is not None and record["model"]["channels_last"]
    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        for way in ("eager", "compiled") if compiled else ("eager",):
            report.comparisons.append(_compare(networks, shape, report, way, torch.device(device), channels_last))


def _dense_twin(record: dict[str, Any]) -> tuple[str, Loaded, int]:
    """The network before any removal, written and loaded as the exported one was."""
    channels, side, _ = record["input"]["shape"]
    config = ModelConfig(**record["model"])
    dense = build_model(config, classes=record["classes"], channels=channels, image_size=side)
    kind = record["kind"]
    check_format(kind, None)
    network, _ = form_to_write(dense.eval(), kind, _folds(record))
    with tempfile.TemporaryDirectory() as folder:
        opset = record["made_with"].get("opset")
        images = torch.randn(2, *record["input"]["shape"])
        write_network(kind, network, images, Path(folder), about="The dense twin.", opset=opset)
        loaded = load_written(kind, Path(folder))
    return "dense twin", loaded, weights_bytes(network)


def _compare(
    networks: list[tuple[str, Loaded, int]],
    shape: tuple[int, ...],
    report: InferenceReport,
    way: str,
    device: torch.device,
    channels_last: bool,
) -> Comparison:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    one, many = (torch.randn(n, *shape).to(device, memory_format=layout) for n in (1, report.batch_size))
    contestants = []
    for name, loaded, size in networks:
        if loaded.module is not None:
            _move(loaded.module, device, layout)
        run = torch.compile(loaded.module, dynamic=False) if way == "compiled" and loaded.module else loaded.run
        contestants.append(_Contestant(name, run, loaded.module, size))
    synchronize = torch.cuda.synchronize if device.type == "cuda" else _no_wait
    gpus = [uuid for uuid in [gpu_uuid(device)] if uuid is not None]
    with open_meter(gpu_uuids=gpus, host=True, interval_s=0.1, synchronize=synchronize) as meter, torch.no_grad():
        for contestant in contestants:
            _warm_up(contestant, one, many, synchronize, meter)
        for turn in range(report.turns):
            for contestant in contestants if turn % 2 == 0 else contestants[::-1]:  # none is always the first
                _take_turn(contestant, one, many, synchronize, meter)
    peaks = [_activations(contestant, many, way) for contestant in contestants]
    costs = [_cost(contestant, peak) for contestant, peak in zip(contestants, peaks, strict=True)]
    if contestants[0].name == "dense twin":
        for cost, contestant in zip(costs[1:], contestants[1:], strict=True):
            cost.against_twin = _against(contestant, contestants[0])
    measurement = contestants[0].measured[-1]
    readings = [reading for reading in measurement.readings if reading.quality is not None]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    order = "channels last" if channels_last else ""
    engine = ", ".join(part for part in (networks[0][1].engine, way, order, where) if part)
    sources = {reading.device: reading.source for reading in readings}
    return Comparison(engine, costs, measurement.quality, sources)


def _move(module: nn.Module, device: torch.device, layout: torch.memory_format) -> None:
    """Move a network to a device, in place, a program of torch.export too.

    In its calls such a program has the device on which it was traced: of tensors that it makes, and of those that it
    expects.

    Args:
        module: The network.
        device: Where it is to run.
        layout: Memory format of its weights.
    """
    module.to(device, memory_format=layout)  # type: ignore[call-overload]
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))
            part.recompile()


def _no_wait() -> None:
    """A CPU is done when the call returns."""


def _warm_up(contestant: _Contestant, one: Tensor, many: Tensor, synchronize: Callable[[], None], meter: Meter) -> None:
    """Run a few times, and find how many repeats make up a turn."""
    try:
        seconds = [min(_timed(contestant.run, images, synchronize, 1) for _ in range(3)) for images in (one, many)]
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"--compile: {contestant.name} cannot be compiled here: {reason}") from None
    throughput_s, lead_s = _THROUGHPUT_S, _LEAD_PERIODS * meter.counter_period_s
    if lead_s > 0:
        # One after another they take less than each by itself, and the time must be enough for the counter.
        seconds[1] = min(seconds[1], _timed(contestant.run, many, synchronize, math.ceil(lead_s / seconds[1])))
        throughput_s = max(throughput_s, _COUNTER_PERIODS * meter.counter_period_s)
    contestant.lead = math.ceil(lead_s / seconds[1])
    contestant.repeats = math.ceil(_LATENCY_S / seconds[0]), math.ceil(throughput_s / seconds[1])


def _timed(run: Callable[[Tensor], Tensor], images: Tensor, synchronize: Callable[[], None], repeats: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run(images)
    synchronize()
    return (time.perf_counter() - start) / repeats


def _take_turn(
    contestant: _Contestant, one: Tensor, many: Tensor, synchronize: Callable[[], None], meter: Meter
) -> Measurement:
    singles, batches = contestant.repeats

    def run_alone(image: Tensor) -> Tensor:
        out = contestant.run(image)
        synchronize()  # a GPU would compute it while the host starts the next one
        return out

    contestant.single_s.append(_timed(run_alone, one, synchronize, singles))
    for _ in range(contestant.lead):
        contestant.run(many)
    with meter.window(contestant.name) as window:
        contestant.image_s.append(_timed(contestant.run, many, synchronize, batches) / len(many))
    contestant.measured.append(window.measurement)
    contestant.images.append(batches * len(many))
    return window.measurement


def _cost(contestant: _Contestant, activations_bytes: int | None) -> Cost:
    by_device = zip(*(measured.readings for measured in contestant.measured), strict=True)
    whole = _per_1000(contestant.measured, contestant.images)
    return Cost(
        contestant.name,
        statistics.median(contestant.single_s),
        1 / statistics.median(contestant.image_s),
        whole.energy_j_per_1000,
        whole.energy_bound_j_per_1000,
        {
            readings[0].device: _per_1000([Measurement(0.0, (each,)) for each in readings], contestant.images)
            for readings in by_device
        },
        contestant.weights_bytes,
        activations_bytes,
    )


def _per_1000(measured: Sequence[Measurement], images: Sequence[int]) -> DeviceEnergy:
    """Over all turns; None if any of them could not be read whole, or is too short for what is read."""
    joules = [each.energy_j for each in measured if each.complete and not each.too_short]
    bounds_j = [each.bound_j for each in measured]
    energy_j, bound_j = _sum(joules) if len(joules) == len(measured) else None, _sum(bounds_j)
    if energy_j is None:
        return DeviceEnergy(None, None)
    return DeviceEnergy(1000 * energy_j / sum(images), None if bound_j is None else 1000 * bound_j / sum(images))


def _sum(values: Sequence[float | None]) -> float | None:
    """The sum; None if any is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _against(contestant: _Contestant, twin: _Contestant) -> dict[str, float | None]:
    def ratio(theirs: list[float], mine: list[float]) -> float:
        return statistics.median(b / a for a, b in zip(mine, theirs, strict=True))

    mine = _per_1000(contestant.measured, contestant.images).energy_j_per_1000
    theirs = _per_1000(twin.measured, twin.images).energy_j_per_1000
    return {
        "latency": ratio(twin.single_s, contestant.single_s),
        "throughput": ratio(twin.image_s, contestant.image_s),
        "energy": None if not mine or theirs is None else theirs / mine,
    }


def _activations(contestant: _Contestant, images: Tensor, way: str) -> int | None:
    """Most bytes alive at once in one pass, without weights and images; None where it cannot be known."""
    if images.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            contestant.run(images)
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - int(before)
    if contestant.module is None or way == "compiled":
        return None
    given = {tensor.untyped_storage()._cdata for tensor in (*contestant.module.state_dict().values(), images)}
    with torch.no_grad(), _LiveBytes(given) as live:
        contestant.run(images)
    return int(live.peak)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make and that are still referred to.

    Args:
        given: Storages that were there before and do not count.

    Attributes:
        peak: Most bytes at once. What a kernel needs inside is not seen.
    """

    peak: int

    def __init__(self, given: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen = set(given)
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its outputs."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size
