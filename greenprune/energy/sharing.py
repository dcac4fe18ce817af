"""Who reads what among the processes of a run: each GPU once, and each machine's CPU and memory once."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Written by the kernel at boot: the same in all containers of a machine, and on no two machines.
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Share:
    """What one process reads."""

    gpu_uuids: tuple[str, ...]
    """GPUs, by UUID."""
    host: bool
    """Whether it reads the CPU and the memory of its machine."""


def node_id() -> str:
    """What tells this machine from others, in whatever container the process runs."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


def share_devices(rank: int, claims: Sequence[tuple[str, Sequence[str]]]) -> Share:
    """What a process reads, so that all together read everything once: the first that sees a device reads it.

    Args:
        rank: The process, as an index into ``claims``.
        claims: For every process of the run its machine (:func:`node_id`) and the GPUs it uses, by UUID.
    """
    node, mine = claims[rank]
    earlier = claims[:rank]
    taken = {uuid for _, uuids in earlier for uuid in uuids}
    gpu_uuids = tuple(uuid for uuid in dict.fromkeys(mine) if uuid not in taken)
    return Share(gpu_uuids, host=node not in [other for other, _ in earlier])
