"""Readers and parsers given generated input: some of it right, most of it not; benchmarks/faults.py does thousands."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

sys.path.insert(0, str(Path(__file__).parent))
import generating

EXAMPLES = {"configs": 40, "command lines": 40}


@pytest.mark.parametrize("kind", generating.KINDS)
def test_input_is_taken_or_refused_in_one_line(kind: str) -> None:
    strategy, takes = generating.KINDS[kind]
    taken: list[bool] = []

    @settings(
        max_examples=EXAMPLES.get(kind, 150),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def all_of_it(value: Any) -> None:
        taken.append(takes(value))

    all_of_it()
    assert set(taken) == {True, False}, "the generator makes only right or only wrong input"


def test_what_is_said_to_be_huge_takes_no_memory() -> None:
    huge = [(generating.takes_image, content) for content in generating.HUGE.values()]
    header = bytes([0, 0, 8, 3, *b"\xff\xff\xff\xff", 0, 0, 0, 28, 0, 0, 0, 28])
    huge.append((generating.takes_idx, (header + bytes(784), bytes([0, 0, 8, 1, 255, 255, 255, 255, 0]))))
    tracemalloc.start()
    for takes, content in huge:
        assert not takes(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_a_file_of_postscript_is_no_image(tmp_path: Path) -> None:
    """Pillow would have another program run it."""
    assert not generating.takes_image(generating.HUGE["EPS"])
