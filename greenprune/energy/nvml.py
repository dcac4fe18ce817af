"""Energy of NVIDIA GPUs through NVML (pynvml): the driver's energy counter, or power samples.

GPUs are known by their UUID. NVML lists all GPUs of the machine in PCI order, whatever
``CUDA_VISIBLE_DEVICES`` says.
Reference: https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pynvml

from greenprune.energy.source import CounterSource, MeterUnavailable, PowerSource, Source

# Reads that follow each other faster than this go on with the last power sample.
_MIN_SPAN_S = 0.02

_ADVICE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "install the NVIDIA driver, or give the container its utility "
    "capability (NVIDIA_DRIVER_CAPABILITIES=compute,utility)",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "load the NVIDIA driver; nvidia-smi must work on this machine",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was updated while loaded; reboot, or reload it",
    pynvml.NVML_ERROR_NO_PERMISSION: "ask the administrator for read access to the GPU's NVML interface",
    pynvml.NVML_ERROR_NOT_FOUND: "nvidia-smi -L lists the UUIDs of this machine's GPUs",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU fell off the bus; see dmesg, and reboot",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "this GPU, or its virtualisation, shows no power sensor",
}


class _NotSupported(MeterUnavailable):
    """The GPU lacks the function; another may do."""


@contextlib.contextmanager
def _translated(call: str) -> Iterator[None]:
    """Turn NVML's errors into :class:`MeterUnavailable`: the one place where they are known."""
    try:
        yield
    except pynvml.NVMLError as error:
        lacks = error.value in (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        kind = _NotSupported if lacks else MeterUnavailable
        advice = _ADVICE.get(error.value, "see what nvidia-smi says on this machine")
        raise kind(f"{call}: {error}", advice) from error


@contextlib.contextmanager
def _session() -> Iterator[None]:
    """NVML initialized for the time of a block; NVML counts the users itself."""
    _initialize()
    try:
        yield
    finally:
        _shutdown()


def _initialize() -> None:
    with _translated("nvmlInit"):
        pynvml.nvmlInit()


def _shutdown() -> None:
    with contextlib.suppress(MeterUnavailable), _translated("nvmlShutdown"):
        pynvml.nvmlShutdown()


def gpu_uuids() -> list[str]:
    """UUIDs of all GPUs that NVML lists, in PCI order.

    Raises:
        MeterUnavailable: NVML cannot be used here.
    """
    with _session(), _translated("nvmlDeviceGetUUID"):
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]


def visible_gpu_uuids(visible: str | None) -> list[str]:
    """UUIDs of the physical GPUs that a ``CUDA_VISIBLE_DEVICES`` string leaves visible, in its order.

    The string is read as CUDA reads it: entries are indices, UUIDs or unique beginnings of UUIDs; the first
    invalid entry (-1 among them) ends the list; a GPU named twice empties it. A MIG instance stands for the
    GPU it is part of, once however many instances are named: its energy cannot be told from the GPU's.

    Indices count GPUs in PCI order, which is CUDA's order on a machine with GPUs of one model or with
    ``CUDA_DEVICE_ORDER=PCI_BUS_ID``; elsewhere name the GPUs by UUID.

    Args:
        visible: The variable's value; None if it is not set, and all GPUs are visible.

    Raises:
        MeterUnavailable: NVML cannot be used here, so that nothing is known about the GPUs.
    """
    if visible is not None and not visible.strip():
        return []
    known = gpu_uuids()
    if visible is None:
        return known
    chosen: list[str] = []
    for entry in (part.strip() for part in visible.split(",")):
        is_mig = entry.startswith("MIG-")
        uuid = _mig_parent(entry, known) if is_mig else _whole_gpu(entry, known)
        if uuid is None:
            break
        if uuid not in chosen:
            chosen.append(uuid)
        elif not is_mig:
            return []
    return chosen


def _whole_gpu(entry: str, known: list[str]) -> str | None:
    if entry.isdecimal():
        return known[int(entry)] if int(entry) < len(known) else None
    matches = [uuid for uuid in known if entry.startswith("GPU-") and uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def _mig_parent(entry: str, known: list[str]) -> str | None:
    """The GPU of ``MIG-<uuid>``, or of the form before driver 470, ``MIG-GPU-<uuid>/<gi>/<ci>``."""
    if entry.startswith("MIG-GPU-"):
        return _whole_gpu(entry.removeprefix("MIG-").split("/")[0], known)
    try:
        with _session(), _translated("nvmlDeviceGetDeviceHandleFromMigDeviceHandle"):
            instance = pynvml.nvmlDeviceGetHandleByUUID(entry)
            parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
            return str(pynvml.nvmlDeviceGetUUID(parent))
    except MeterUnavailable:
        return None


def open_gpu(uuid: str) -> Source:
    """The energy of one physical GPU, from its counter or, where that is not supported, from power samples.

    The counter is ``nvmlDeviceGetTotalEnergyConsumption`` (millijoules since the driver was loaded), the
    power ``nvmlDeviceGetPowerUsage`` (milliwatts). NVML stays initialized until the source is closed.

    Args:
        uuid: The GPU's UUID, with or without the leading ``GPU-``.

    Raises:
        MeterUnavailable: NVML cannot be used, knows no such GPU, cannot read it, or the GPU is divided by
            MIG.
    """
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    _initialize()
    with contextlib.ExitStack() as stack:
        stack.callback(_shutdown)
        with _translated(f"nvmlDeviceGetHandleByUUID({uuid})"):
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        if _is_divided(handle):
            raise MeterUnavailable(
                "MIG is on, and the GPU's energy cannot be divided among its instances",
                "train on a whole GPU to have its energy measured",
            )
        source = _open_counter_or_power(uuid, handle)
        stack.pop_all()  # The source keeps NVML initialized, and shuts it down when it is closed.
    return source


def _open_counter_or_power(uuid: str, handle: Any) -> Source:
    def energy_j() -> float:
        with _translated("nvmlDeviceGetTotalEnergyConsumption"):
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

    def power_w() -> float:
        with _translated("nvmlDeviceGetPowerUsage"):
            return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1000

    try:
        return CounterSource(uuid, "NVML energy counter", energy_j, release=_shutdown)
    except _NotSupported:
        return PowerSource(
            uuid,
            "NVML power samples",
            "integrated power",
            power_w,
            mean=False,
            min_span_s=_MIN_SPAN_S,
            release=_shutdown,
        )


def _is_divided(handle: Any) -> bool:
    try:
        with _translated("nvmlDeviceGetMigMode"):
            return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except _NotSupported:
        return False
