"""A stand-in for NVML, for hardware that is absent, and a stand-in for the powercap tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_powercap import Powercap
from nvml_stub import build_stub


@pytest.fixture(scope="session")
def nvml_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a libnvidia-ml.so.1 compiled from nvml_stub.c, and an nvidia-smi that does nothing."""
    folder = tmp_path_factory.mktemp("nvml")
    build_stub(folder)
    return folder


@pytest.fixture(scope="session")
def run_python() -> Callable[[str, dict[str, str]], Any]:
    """Run Python code in a process of its own and return what it assigns to ``result``."""
    return _run_python


@pytest.fixture
def with_nvml(nvml_stub: Path) -> Callable[[str, str], Any]:
    """Run Python code in a process whose NVML is the stand-in, and return what it assigns to ``result``."""

    def run(scenario: str, code: str) -> Any:
        path = f"{nvml_stub}:{os.environ['PATH']}"
        return _run_python(code, {"LD_LIBRARY_PATH": str(nvml_stub), "NVML_STUB": scenario, "PATH": path})

    return run


def _run_python(code: str, environment: dict[str, str]) -> Any:
    program = f"import json, time\n{code}\nprint(json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the meter must not write to the terminal"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")
