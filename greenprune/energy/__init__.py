"""Energy: what training takes, in joules by device, source and phase, and in grams of CO2.

Nothing here imports torch, and importing this package touches no hardware.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from greenprune.config import EnergyConfig
from greenprune.energy.carbon import CO2_IS_UNKNOWN, CarbonIntensity, carbon_intensity, co2_g, format_intensity
from greenprune.energy.estimate import open_cpu_estimate, open_ram_estimate
from greenprune.energy.meter import IDLE, Measurement, Meter, Reading, Window
from greenprune.energy.nvml import doubtful_order, nvml_session, open_gpu, visible_gpu_names, visible_gpu_uuids
from greenprune.energy.nvml import gpu_uuids as all_gpu_uuids
from greenprune.energy.rapl import POWERCAP, open_rapl
from greenprune.energy.sharing import Share, node_id, share_devices
from greenprune.energy.slurm import SlurmEnergy, slurm_energy, slurm_job
from greenprune.energy.source import MeterUnavailable, Quality, Source, UnreadableSource

__all__ = [
    "CO2_IS_UNKNOWN",
    "IDLE",
    "POWERCAP",
    "CarbonIntensity",
    "Measurement",
    "Meter",
    "MeterUnavailable",
    "Quality",
    "Reading",
    "Share",
    "SlurmEnergy",
    "Source",
    "SourceRow",
    "Window",
    "carbon_intensity",
    "co2_g",
    "describe_sources",
    "format_intensity",
    "node_id",
    "open_counters",
    "open_local_meter",
    "open_meter",
    "share_devices",
    "slurm_energy",
    "slurm_job",
    "visible_gpu_names",
    "visible_gpu_uuids",
]

# The driver's own device: where it is, there is a GPU, also if its library cannot be found.
_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class SourceRow:
    """What can be read of one device on this machine."""

    device: str
    """The device's name: a GPU's UUID, ``cpu:package-0``, ``dram``; ``gpu`` where no GPU can be asked."""
    source: str | None
    """How its energy is read; None if it cannot be."""
    quality: Quality | None
    """How much the figure is worth; None if there is none."""
    why_not: str | None
    """Why there is no source, or no better one; None for a counter."""
    advice: str | None
    """What would help; None for a counter."""
    model: str | None = None
    """What the device is sold as; None if that is not told."""


@dataclass(frozen=True)
class _Choice:
    """The best source of a device, and why it is not a better one."""

    source: Source
    why_not: MeterUnavailable | None = None

    @property
    def row(self) -> SourceRow:
        name = None if self.source.quality is None else self.source.name
        reason = None if self.why_not is None else self.why_not.reason
        advice = None if self.why_not is None else self.why_not.advice
        return SourceRow(self.source.device, name, self.source.quality, reason, advice, self.source.model)

    @property
    def note(self) -> str | None:
        row = self.row
        if row.why_not is None:
            return None
        what = "not measured" if row.source is None else f"{row.quality} by {row.source}"
        return f"{row.device}: {what}, because {row.why_not}; {row.advice}"


def open_meter(
    *,
    gpu_uuids: Sequence[str],
    host: bool,
    interval_s: float = 1.0,
    synchronize: Callable[[], None] | None = None,
    powercap: Path = POWERCAP,
    environment: Mapping[str, str] = os.environ,
) -> Meter:
    """Open a meter with the best source for each device; one that has none is metered as unknown.

    Args:
        gpu_uuids: Physical GPUs to read, each once however often it is named; see :func:`visible_gpu_uuids`.
            Across processes of a node the caller gives each GPU to one of them; see :func:`share_devices`.
        host: Whether to read the CPU and memory of this machine; true in one process of a node.
        interval_s: Seconds between two samples of sources that have no counter.
        synchronize: Waits for the work queued on the device; called at the edges of windows.
        powercap: Where the kernel shows the counters of the CPU.
        environment: The process's environment: what memory a Slurm job has here.

    Raises:
        UserError: The interval is not valid.
    """
    EnergyConfig(interval_s=interval_s)
    choices = [_choose_gpu(uuid, interval_s) for uuid in dict.fromkeys(gpu_uuids)]
    if host:
        choices += _choose_host(powercap, environment)
    return _meter(choices, [], interval_s, synchronize)


def open_local_meter(
    environment: Mapping[str, str],
    *,
    interval_s: float = 1.0,
    synchronize: Callable[[], None] | None = None,
    powercap: Path = POWERCAP,
) -> Meter:
    """Open a meter of all that a process sees: its visible GPUs, and the CPU and memory of the machine.

    Args:
        environment: The process's environment: CUDA_VISIBLE_DEVICES and the order that it is in, and what memory a
            Slurm job has here.
        interval_s: Seconds between two samples of sources that have no counter.
        synchronize: Waits for the work queued on the device; called at the edges of windows.
        powercap: Where the kernel shows the counters of the CPU.

    Raises:
        UserError: The interval is not valid.
    """
    EnergyConfig(interval_s=interval_s)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    choices: list[_Choice] = []
    notes: list[str] = []
    with contextlib.ExitStack() as stack:
        if visible is None or visible.strip():
            try:
                stack.enter_context(nvml_session())
                choices = [_choose_gpu(uuid, interval_s) for uuid in visible_gpu_uuids(visible)]
                doubt = doubtful_order(visible, environment.get("CUDA_DEVICE_ORDER"))
                notes = [] if doubt is None else [doubt]
                if not choices:
                    notes = [f"gpu: none, for CUDA_VISIBLE_DEVICES={visible!r} names none of this machine"]
            except MeterUnavailable as error:
                if visible is not None or _DRIVER.exists():
                    choices = [_Choice(UnreadableSource("gpu", error), error)]
                else:
                    notes = [f"gpu: none found, because {error}"]
        return _meter([*choices, *_choose_host(powercap, environment)], notes, interval_s, synchronize)


def open_counters(gpu_uuid: str | None, *, powercap: Path = POWERCAP) -> list[Source]:
    """The hardware's own counters of the joules of what computes: of a GPU, or of the CPUs and their memory.

    Args:
        gpu_uuid: The GPU; None for the CPUs, whose memory is left out where it is not counted.
        powercap: Where the kernel shows the counters of the CPU.

    Returns:
        The sources, which the caller closes.

    Raises:
        MeterUnavailable: There is none, and no figure from anywhere else would tell what part of a step took how much.
    """
    if gpu_uuid is None:
        return open_rapl(powercap)
    source, why_not = open_gpu(gpu_uuid)
    if why_not is not None:
        source.close()
        raise why_not
    return [source]


def _meter(
    choices: Sequence[_Choice], notes: Sequence[str], interval_s: float, synchronize: Callable[[], None] | None
) -> Meter:
    own_notes = [choice.note for choice in choices if choice.note is not None]
    sources = [choice.source for choice in choices]
    return Meter(sources, interval_s=interval_s, synchronize=synchronize, notes=[*notes, *own_notes])


def describe_sources(powercap: Path = POWERCAP, environment: Mapping[str, str] = os.environ) -> list[SourceRow]:
    """What can be read on this machine: each GPU that NVML lists, the CPU and the memory.

    Args:
        powercap: Where the kernel shows the counters of the CPU.
        environment: The process's environment: what memory a Slurm job has here.
    """
    choices: list[_Choice] = []
    try:
        choices += [_choose_gpu(uuid, 1.0) for uuid in all_gpu_uuids()]
    except MeterUnavailable as error:
        choices.append(_Choice(UnreadableSource("gpu", error), error))
    choices += _choose_host(powercap, environment)
    for choice in choices:
        choice.source.close()
    return [choice.row for choice in choices]


def _choose_gpu(uuid: str, interval_s: float) -> _Choice:
    try:
        return _Choice(*open_gpu(uuid, interval_s))
    except MeterUnavailable as error:
        return _Choice(UnreadableSource(uuid, error), error)


def _choose_host(powercap: Path, environment: Mapping[str, str]) -> list[_Choice]:
    """RAPL where it can be read, CodeCarbon's estimate for what RAPL does not tell."""
    of_memory = partial(open_ram_estimate, environment)
    try:
        counters = open_rapl(powercap)
    except MeterUnavailable as error:
        return [_estimated("cpu", open_cpu_estimate, error), _estimated("dram", of_memory, error)]
    choices = [_Choice(source) for source in counters]
    if not any(source.device.startswith("dram") for source in counters):
        missing = MeterUnavailable("RAPL of this CPU does not tell the memory's energy", "mostly server CPUs tell it")
        choices.append(_estimated("dram", of_memory, missing))
    return choices


def _estimated(device: str, open_estimate: Callable[[], Source], instead_of: MeterUnavailable) -> _Choice:
    """An estimate in place of a counter; where CodeCarbon fails, whose insides other versions may change, none."""
    try:
        return _Choice(open_estimate(), instead_of)
    except (AttributeError, ImportError, LookupError, OSError, TypeError, ValueError) as error:
        failed = MeterUnavailable(f"CodeCarbon's estimate failed ({error!r})", "another version of codecarbon may do")
        return _Choice(UnreadableSource(device, failed), failed)
