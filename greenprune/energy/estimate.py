"""CodeCarbon's estimates of the power of CPU and memory, for machines whose counters cannot be read.

Only its model of the hardware is used, not its tracker: no file, no lock, no network, no thread of its own.
Reference: https://docs.codecarbon.io/latest/explanation/methodology/
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from greenprune.energy.slurm import slurm_memory_gib
from greenprune.energy.source import MeterUnavailable, PowerSource, Source

# The kernel counts CPU time in ticks of 10 ms; below ten of them the load of two cores is mostly chance.
_MIN_SPAN_S = 0.1

_GIB = 2**30


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep CodeCarbon's words off the screen: what they say is in the source's name and in the notes.

    Its imports may print (amdsmi does, on a machine without AMD's library), where a measured command's output belongs.
    """
    logger = logging.getLogger("codecarbon")
    before, logger.disabled = logger.disabled, True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _outside_slurm() -> Iterator[None]:
    """Keep CodeCarbon from running scontrol, which may hang, be missing, or tell of all tasks of an array.

    It asks for a job's processors to follow one process; here it follows the machine.
    """
    from codecarbon.core import util

    job, util.SLURM_JOB_ID = util.SLURM_JOB_ID, None
    try:
        yield
    finally:
        util.SLURM_JOB_ID = job


def open_cpu_estimate(model: str | None = None) -> Source:
    """The CPU power of the whole machine by CodeCarbon's load model, as device ``cpu``.

    Full power times (0.1 + 0.9 load^3), where the load is that of all processes on the machine since the
    previous sample. Full power is the CPU's thermal design power in CodeCarbon's table, once for each socket;
    for a CPU that the table does not have it is 4 W for each hardware thread.

    Args:
        model: The CPU as its maker calls it; None: as the system names it.
    """
    with _quiet():
        from codecarbon.core.util import count_physical_cpus, detect_cpu_model
        from codecarbon.external.hardware import CPU, MODE_CPU_LOAD

        # CodeCarbon's own detection (py-cpuinfo) takes a second; here it serves machines without /proc.
        model = model or _linux_cpu_model() or str(detect_cpu_model() or "CPU of unknown model")
        full_w = tabulated_power_w(model)
        if full_w is not None:
            full_w *= count_physical_cpus()
            name = f"CodeCarbon: load of {full_w:g} W ({model})"
        else:
            full_w = _default_power_w()
            name = f"CodeCarbon: load of {full_w:g} W (guessed: {model} is not in its table)"
        with _outside_slurm():
            cpu = CPU(output_dir="", mode=MODE_CPU_LOAD, model=model, tdp=full_w, tracking_mode="machine")
        cpu.start()

    def power_w() -> float:
        try:
            return float(cpu.total_power().W)
        except OSError as error:
            reason = f"{error.filename or 'the load'}: {error.strerror or error}"
            raise MeterUnavailable(reason, "it may be readable again in a moment") from error

    return PowerSource("cpu", name, "estimate", power_w, mean=True, min_span_s=_MIN_SPAN_S)


def open_ram_estimate(environment: Mapping[str, str]) -> Source:
    """The power of the machine's memory by CodeCarbon's count of modules, a constant, as device ``dram``.

    Within a Slurm job it is that of the memory which the job has on this machine. Its nodes then add up to the job,
    where CodeCarbon's own figure is that of all nodes, on each of them.

    Args:
        environment: The process's environment, in which Slurm tells what the job has.
    """
    size_gib = psutil.virtual_memory().total / _GIB
    of_job_gib = slurm_memory_gib(environment)
    if of_job_gib is not None:
        size_gib = min(size_gib, of_job_gib)
    with _quiet():
        from codecarbon.external.ram import RAM

        power_w = float(RAM(tracking_mode="machine")._calculate_ram_power(size_gib))
    name = f"CodeCarbon: constant {power_w:g} W"
    return PowerSource("dram", name, "estimate", lambda: power_w, mean=True, min_span_s=_MIN_SPAN_S)


def tabulated_power_w(model: str) -> float | None:
    """The thermal design power of one CPU in CodeCarbon's table, in watts; None if it is not there."""
    from codecarbon.core.cpu import TDP
    from codecarbon.input import DataSource

    with Path(DataSource().cpu_power_path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # The matching alone, on an object that was not set up: setting it up takes 1.5 s (py-cpuinfo, pandas).
    match = TDP._get_matching_cpu(TDP.__new__(TDP), model, {"Name": [row["Name"] for row in rows]})
    tdp = next((row["TDP"] for row in rows if row["Name"] == match), "")
    try:
        return float(tdp)
    except ValueError:  # Not in the table, or one of the few cells in it that hold no number.
        return None


def _default_power_w() -> float:
    from codecarbon.core.cpu import DEFAULT_POWER_PER_CORE

    # All threads of the machine, for its load is what the estimate scales with.
    return float(DEFAULT_POWER_PER_CORE * (psutil.cpu_count() or 1))


def _linux_cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
