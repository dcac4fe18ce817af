"""Memory that is freed and asked for again, as steps of training do, in processes of their own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")

PROGRAM = """
import resource, psutil, torch
from greenprune.allocation import give_back_freed_memory, keep_freed_memory

{keep}

def step():
    activations = [torch.ones(size * 2**18) for size in (40, 8, 2, 64)]  # MiB
    activations[0].add_(activations[0])

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(15):  # until all that is asked for has its place
    step()
before = faults()
for _ in range(10):
    step()
print((faults() - before) // 10)
full = psutil.Process().memory_info().rss
give_back_freed_memory()
print((full - psutil.Process().memory_info().rss) >> 20)
"""


def faults_and_given_back(keep: str) -> tuple[int, int]:
    """Page faults of a step that needs 114 MiB, and MiB given back at the end."""
    program = [sys.executable, "-c", PROGRAM.format(keep=keep)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    faults, given_back = map(int, done.stdout.split())
    return faults, given_back


def test_kept_memory_is_not_faulted_in_again_and_can_be_given_back() -> None:
    usual, _ = faults_and_given_back("")
    faults, given_back = faults_and_given_back("assert keep_freed_memory()")
    assert usual > 10000
    assert faults < 100
    assert given_back > 90
