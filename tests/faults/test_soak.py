"""A hundred removals in one process leave nothing behind; benchmarks/faults.py does five hundred and more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from soaking import soak
first, *_, last = soak(99, warm_up=36, every=9)  # levels at the same stage of a network, which has nine blocks
print(last.handles - first.handles, last.threads - first.threads, last.hooks - first.hooks,
      last.objects - first.objects, last.bytes - first.bytes)
"""


def test_removals_leave_nothing_behind() -> None:
    """In a process of its own, whose memory nothing else changes."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(Path(__file__).parent)], capture_output=True, text=True, check=True
    )
    handles, threads, hooks, objects, size = map(int, done.stdout.split()[-5:])
    assert (handles, threads) == (0, 0)
    assert hooks <= 0
    assert objects <= 0
    assert size < 2**20
