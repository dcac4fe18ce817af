"""How the C library hands out memory in a process that trains on a CPU.

A step of training frees what the next one asks for again. glibc returns large blocks to the system in between
(``munmap`` above a threshold, the end of the heap by ``brk``), and each page of the next block is a page fault and is
filled with zeros: for a ResNet-20 at batch 128 12,000 to 38,000 faults a step, a tenth to a fifth of its time
(docs/log.md). See mallopt(3).
"""

from __future__ import annotations

import ctypes
from typing import Any

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def _c_library() -> Any:
    """The C library that this process is linked with."""
    return ctypes.CDLL(None)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for what it asks for next.

    Returns:
        Whether the C library can do so; another one than glibc is left as it is.
    """
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Return what is free to the system, where the C library can: after a removal, the smaller network needs less."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)
