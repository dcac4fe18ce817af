"""A handful of kills at random instants; benchmarks/faults.py does a hundred."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from killing import Runs

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("processes", "variant", "cases"), [(1, "blocks, sgd", 2), (1, "channels, adamw", 1), (2, "blocks, sgd", 1)]
)
def test_a_killed_run_ends_as_the_untouched_one(processes: int, variant: str, cases: int, tmp_path: Path) -> None:
    runs = Runs(tmp_path, variant, processes)
    chance = random.Random(7)
    for number in range(cases):
        case = runs.kill_and_finish(f"run{number}", chance, most_kills=2)
        assert case.wrong == [], case
