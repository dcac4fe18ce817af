"""How much memory a step needs: of tensors, to the byte, and of the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_rss(work: Callable[[], object]) -> int | None:
    """Largest resident set of this process while something is done, in bytes; None where Linux does not tell it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    work()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_of_tensors(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that were allocated at once during a step and not before it.

    On a CPU from the allocations that torch's profiler records. On a GPU from its allocator's own count over the first
    steps, the recording of the step among them.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(5):
            step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        now += change.nbytes()
        peak = max(peak, now)
    return peak


def kept_by(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of what stays from step to step: parameters, buffers and the optimizer's state."""
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *state])
