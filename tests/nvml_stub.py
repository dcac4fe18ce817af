"""Builds the stand-in for NVML, and the power curves that it can follow."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


def build_stub(folder: Path) -> None:
    """Put a libnvidia-ml.so.1 compiled from nvml_stub.c into a folder, and an nvidia-smi that does nothing.

    Raises:
        FileNotFoundError: There is no gcc.
    """
    if shutil.which("gcc") is None:
        raise FileNotFoundError("gcc is missing: a stand-in for libnvidia-ml.so.1 is compiled; install gcc")
    source = Path(__file__).with_name("nvml_stub.c")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-Wall", "-O1", "-shared", "-fPIC", "-o", target, source, "-lm"], check=True)
    program = folder / "nvidia-smi"  # CodeCarbon looks for GPUs only where there is one
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)


@dataclass(frozen=True)
class Curve:
    """A GPU's power: a step and a sine, from the start of the stand-in's clock on."""

    uuid: str
    watts: float
    to: float
    at_s: float
    wave: float
    cycle_s: float

    def energy_j(self, begin_s: float, end_s: float) -> float:
        """Joules between two times, in closed form."""
        return self._until(end_s) - self._until(begin_s)

    def _until(self, time_s: float) -> float:
        sine_j = self.wave * self.cycle_s / (2 * math.pi) * (1 - math.cos(2 * math.pi * time_s / self.cycle_s))
        return self.watts * time_s + (self.to - self.watts) * max(0.0, time_s - self.at_s) + sine_j

    @property
    def peak_w(self) -> float:
        return max(self.watts, self.to) + self.wave

    def scenario(self, *, counter: bool = True, period_s: float = 0.1, more: str = "") -> str:
        """The GPU as NVML_STUB describes it."""
        return (
            f"uuid={self.uuid} watts={self.watts} to={self.to} at={self.at_s} wave={self.wave} cycle={self.cycle_s} "
            f"limit={self.peak_w} counter={int(counter)} period={period_s} sampled=0.02 {more}"
        )
