"""Energy of CPU packages and their memory from the Linux powercap tree (RAPL).

Reference: https://www.kernel.org/doc/html/latest/power/powercap/powercap.html
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from greenprune.energy.source import CounterSource, MeterUnavailable, Source

POWERCAP = Path("/sys/class/powercap")

# The kernel's counters are brought up to date about every millisecond.
_PERIOD_S = 0.001

# More than any CPU package draws: a step back that would be more as a wrap is a restart (suspend, driver reload).
_MOST_W = 5000.0

# "intel-rapl:0" is a package, "intel-rapl:0:1" a domain of it; "intel-rapl-mmio:0" shows the first again.
_ZONES = "intel-rapl:*"


def open_rapl(root: Path = POWERCAP) -> list[Source]:
    """One source for each CPU package (``cpu:package-0``) and, where told, its memory (``dram:package-0``).

    The domains core and uncore are part of their package and psys contains the packages: none of them is
    read.

    Args:
        root: The powercap tree.

    Raises:
        MeterUnavailable: There is no such tree, or it may not be read.
    """
    zones = {path.name: path for path in sorted(root.glob(_ZONES))}
    if not zones:
        raise MeterUnavailable(
            f"{root} shows no RAPL counters",
            "on bare metal load the kernel module intel_rapl_msr; a virtual machine or container hides them",
        )
    sources: list[Source] = []
    try:
        names = {zone: _text(path / "name") for zone, path in zones.items()}
        for zone, name in names.items():
            package = names.get(zone.rpartition(":")[0], "")
            if zone.count(":") == 1 and name.startswith("package"):
                sources.append(_open_zone(f"cpu:{name}", zones[zone]))
            elif name == "dram" and package.startswith("package"):
                sources.append(_open_zone(f"dram:{package}", zones[zone]))
        if not any(source.device.startswith("cpu:") for source in sources):
            raise MeterUnavailable(f"{root} shows no CPU package", "nothing is known that would help")
    except MeterUnavailable:
        for source in sources:
            source.close()
        raise
    return sources


def _open_zone(device: str, zone: Path) -> Source:
    wraps_at_j = _joules(_text(zone / "max_energy_range_uj"), zone)
    path = zone / "energy_uj"
    try:
        # Kept open: a read costs one system call instead of three.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from error
    release = partial(os.close, descriptor)
    try:
        return CounterSource(
            device,
            "RAPL counter",
            partial(_energy_j, descriptor, path),
            period_s=_PERIOD_S,
            implausible_w=_MOST_W,
            wraps_at_j=wraps_at_j,
            release=release,
        )
    except MeterUnavailable:
        release()
        raise


def _energy_j(descriptor: int, path: Path) -> float:
    try:
        microjoules = os.pread(descriptor, 32, 0)
    except OSError as error:
        raise _unreadable(path, error) from error
    return _joules(microjoules, path)


def _joules(microjoules: str | bytes, path: Path) -> float:
    try:
        return int(microjoules) / 1e6
    except ValueError:
        raise MeterUnavailable(f"{path} holds no number", "a container may mask it; run outside of it") from None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> MeterUnavailable:
    if isinstance(error, PermissionError):
        advice = "only root may read it: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj (until reboot)"
    else:
        advice = "the kernel shows the counter but does not give it; see dmesg"
    return MeterUnavailable(f"{path}: {error.strerror}", advice)
