"""The GPU's fused kernels, run by Triton's interpreter: tests/gpu runs them where they belong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="comes with PyTorch's builds for GPUs alone")

SCRIPT = Path(__file__).parent / "fused_like_operators.py"


def test_fused_kernels_do_what_the_operators_do() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "cpu"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "cases alike" in done.stdout
