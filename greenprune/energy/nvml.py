"""Energy of NVIDIA GPUs through NVML (pynvml): the driver's energy counter, or power samples.

GPUs are known by their UUID. NVML lists all GPUs of the machine in PCI order, whatever
``CUDA_VISIBLE_DEVICES`` says.
Reference: https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pynvml

from greenprune.energy.source import CounterSource, MeterUnavailable, PowerSource, Source

# Reads that follow each other faster than this go on with the last power sample.
_MIN_SPAN_S = 0.02

# NVIDIA does not say how often the counter is brought up to date; 20 to 100 ms were seen by others.
_COUNTER_PERIOD_S = 0.1

# A counter at 0 is one that counts nothing, unless the driver was loaded just now: then it moves within its period.
_ZERO_PERIODS = 3

# nvmlDeviceGetPowerUsage: "On Ampere (except GA100) or newer GPUs, the API returns power averaged over 1 sec".
_POWER_AVERAGE_S = 1.0

# More than any GPU draws, for those that tell no limit.
_MOST_W = 5000.0

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


_NO_COUNTER = "the GPU has no energy counter", "GPUs from the Volta generation on have a counter"


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


class _Users:
    """Counts who uses NVML in this process, so that it is initialized once and shut down after the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._pid = os.getpid()

    def enter(self) -> None:
        """Initialize NVML for the first user.

        Raises:
            MeterUnavailable: NVML cannot be used here.
        """
        if self._pid != os.getpid():
            # A fork inherits the count but not NVML's session, and perhaps a lock that nobody will release.
            self._lock, self._count, self._pid = threading.Lock(), 0, os.getpid()
        with self._lock:
            if self._count == 0:
                with _translated("nvmlInit"):
                    pynvml.nvmlInit()
            self._count += 1

    def leave(self) -> None:
        """Shut NVML down after the last user."""
        if self._pid != os.getpid():
            return  # what the parent opened is the parent's to close
        with self._lock:
            self._count -= 1
            if self._count == 0:
                with contextlib.suppress(MeterUnavailable), _translated("nvmlShutdown"):
                    pynvml.nvmlShutdown()


_users = _Users()


@contextlib.contextmanager
def nvml_session() -> Iterator[None]:
    """NVML initialized for the time of a block; what is opened in it keeps it so for longer.

    Raises:
        MeterUnavailable: NVML cannot be used here.
    """
    _users.enter()
    try:
        yield
    finally:
        _users.leave()


def gpu_uuids() -> list[str]:
    """UUIDs of all GPUs that this process may use, in PCI order.

    NVML counts those too that a control group (of Slurm, of a container) withholds; CUDA does not.

    Raises:
        MeterUnavailable: NVML cannot be used here.
    """
    uuids: list[str] = []
    with nvml_session(), _translated("nvmlDeviceGetUUID"):
        for index in range(pynvml.nvmlDeviceGetCount()):
            with contextlib.suppress(pynvml.NVMLError_NoPermission):
                uuids.append(str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index))))
    return uuids


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
    return list(dict.fromkeys(uuid for _, uuid in _visible(visible)))


def visible_gpu_names(visible: str | None) -> list[str]:
    """What names each of the GPUs, or MIG instances, that a ``CUDA_VISIBLE_DEVICES`` string leaves visible.

    A process with some of these names as its own ``CUDA_VISIBLE_DEVICES`` sees that part of them.

    Args:
        visible: The variable's value; None if it is not set: indices, in PCI order.

    Raises:
        MeterUnavailable: NVML cannot be used here.
    """
    return [name for name, _ in _visible(visible)]


def _visible(visible: str | None) -> list[tuple[str, str]]:
    """Name and GPU's UUID of each visible device, as CUDA reads the string."""
    if visible is not None and not visible.strip():
        return []
    known = gpu_uuids()
    if visible is None:
        return [(str(index), uuid) for index, uuid in enumerate(known)]
    chosen: list[tuple[str, str]] = []
    for entry in (part.strip() for part in visible.split(",")):
        is_mig = entry.startswith("MIG-")
        uuid = _mig_parent(entry, known) if is_mig else _whole_gpu(entry, known)
        if uuid is None:
            break
        if not is_mig and any(uuid == other for _, other in chosen):
            return []
        if not any(entry == name for name, _ in chosen):
            chosen.append((entry, uuid))
    return chosen


def doubtful_order(visible: str | None, device_order: str | None) -> str | None:
    """Why a ``CUDA_VISIBLE_DEVICES`` string may mean other GPUs to CUDA than to :func:`visible_gpu_uuids`.

    CUDA numbers the fastest GPU first if it is not told to count in PCI order, and does not say what is fast.

    Args:
        visible: The variable's value; None if it is not set.
        device_order: The value of ``CUDA_DEVICE_ORDER``; None if it is not set.

    Returns:
        One line for people; None if both mean the same.

    Raises:
        MeterUnavailable: NVML cannot be used here.
    """
    if visible is None or device_order == "PCI_BUS_ID":
        return None
    if not any(entry.strip().isdecimal() for entry in visible.split(",")):
        return None
    known = gpu_uuids()
    models = {_model(uuid) for uuid in known}
    if len(models) < 2 or set(visible_gpu_uuids(visible)) == set(known):
        return None
    return (
        f"gpu: CUDA_VISIBLE_DEVICES={visible!r} is read in PCI order, and CUDA may count GPUs of several models "
        f"({', '.join(sorted(models))}) in another; set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID, to have "
        "those metered that are used"
    )


def _model(uuid: str) -> str:
    with nvml_session(), _translated(f"nvmlDeviceGetHandleByUUID({uuid})"):
        return _name(pynvml.nvmlDeviceGetHandleByUUID(uuid)) or "unknown"


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
        with nvml_session(), _translated("nvmlDeviceGetDeviceHandleFromMigDeviceHandle"):
            instance = pynvml.nvmlDeviceGetHandleByUUID(entry)
            parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
            return str(pynvml.nvmlDeviceGetUUID(parent))
    except MeterUnavailable:
        return None


def open_gpu(uuid: str, interval_s: float = 1.0) -> tuple[Source, MeterUnavailable | None]:
    """The energy of one physical GPU, from its counter or, where that is of no use, from power samples.

    The counter is ``nvmlDeviceGetTotalEnergyConsumption`` (millijoules since the driver was loaded), the
    power ``nvmlDeviceGetPowerUsage`` (milliwatts). NVML stays initialized until the source is closed.

    Args:
        uuid: The GPU's UUID, with or without the leading ``GPU-``.
        interval_s: Seconds between two power samples.

    Returns:
        The source, and why it is not the counter; None if it is.

    Raises:
        MeterUnavailable: NVML cannot be used, knows no such GPU, cannot read it, or the GPU is divided by
            MIG.
    """
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    _users.enter()
    with contextlib.ExitStack() as stack:
        stack.callback(_users.leave)
        with _translated(f"nvmlDeviceGetHandleByUUID({uuid})"):
            try:
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            except pynvml.NVMLError_NotFound:
                # CUDA gives the UUID of a MIG instance without the word that says so.
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.replace("GPU-", "MIG-", 1))
                raise _divided() from None
        if _is_divided(handle):
            raise _divided()
        opened = _open_counter_or_power(uuid, handle, interval_s)
        stack.pop_all()  # The source keeps NVML initialized, and shuts it down when it is closed.
    return opened


def _divided() -> MeterUnavailable:
    return MeterUnavailable(
        "MIG is on, and the GPU's energy cannot be divided among its instances",
        "train on a whole GPU to have its energy measured",
    )


def _open_counter_or_power(uuid: str, handle: Any, interval_s: float) -> tuple[Source, MeterUnavailable | None]:
    def energy_j() -> float:
        with _translated("nvmlDeviceGetTotalEnergyConsumption"):
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

    def power_w() -> float:
        with _translated("nvmlDeviceGetPowerUsage"):
            return float(pynvml.nvmlDeviceGetPowerUsage(handle)) / 1000

    model, limit_w = _name(handle), _limit_w(handle)
    try:
        _check_counts(energy_j)
        counter = CounterSource(
            uuid,
            "NVML energy counter",
            energy_j,
            model=model,
            period_s=_COUNTER_PERIOD_S,
            limit_w=limit_w,
            implausible_w=_implausible_w(handle, limit_w),
            release=_users.leave,
        )
        return counter, None
    except MeterUnavailable as error:
        why_not = MeterUnavailable(*_NO_COUNTER) if isinstance(error, _NotSupported) else error
    power = PowerSource(
        uuid,
        "NVML power samples",
        "integrated power",
        power_w,
        model=model,
        period_s=max(interval_s, _POWER_AVERAGE_S),
        limit_w=limit_w,
        mean=False,
        min_span_s=_MIN_SPAN_S,
        release=_users.leave,
    )
    return power, why_not


def _check_counts(energy_j: Callable[[], float]) -> None:
    """Wait until a counter at 0 moves.

    Raises:
        MeterUnavailable: It does not within a few periods, or cannot be read.
    """
    for _ in range(_ZERO_PERIODS):
        if energy_j() > 0:
            return
        time.sleep(_COUNTER_PERIOD_S)
    if energy_j() <= 0:
        raise MeterUnavailable(
            "the energy counter stands at 0", "another driver may count; nvidia-smi tells the version of this one"
        )


def _name(handle: Any) -> str | None:
    try:
        with _translated("nvmlDeviceGetName"):
            return str(pynvml.nvmlDeviceGetName(handle))
    except MeterUnavailable:
        return None  # the UUID tells which GPU it is


def _limit_w(handle: Any) -> float | None:
    try:
        with _translated("nvmlDeviceGetEnforcedPowerLimit"):
            return float(pynvml.nvmlDeviceGetEnforcedPowerLimit(handle)) / 1000 or None
    except MeterUnavailable:
        return None  # then the highest power that was seen stands in for it


def _implausible_w(handle: Any, limit_w: float | None) -> float:
    """Power that the GPU cannot take: twice the highest limit that it may be given while it is metered."""
    try:
        with _translated("nvmlDeviceGetPowerManagementLimitConstraints"):
            highest_w = float(pynvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)[1]) / 1000
    except MeterUnavailable:
        highest_w = 0.0
    # Twice, because capping is slow: short peaks above the limit are real.
    return 2 * max(highest_w, limit_w or 0.0) or _MOST_W


def _is_divided(handle: Any) -> bool:
    try:
        with _translated("nvmlDeviceGetMigMode"):
            return bool(pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
    except MeterUnavailable:
        return False  # GPUs that know no MIG give various errors, and one that is lost is told when it is read
