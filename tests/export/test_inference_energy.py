"""Joules of inference, on a device whose power is known and whose counter moves in steps, by a clock of the test's."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from greenprune.energy import Meter
from greenprune.energy.source import CounterSource, PowerSource, Source
from greenprune.export.inference import Cost, _Contestant, _cost, _no_wait, _take_turn, _warm_up

ONE, MANY = torch.zeros(1, 1), torch.zeros(4, 1)
TRUTH_J_PER_1000 = 1000 * 0.01 * 600 / len(MANY)


class Device:
    """A large batch takes 10 ms at 600 W; one image takes 1 ms and lets the device rest at 100 W."""

    def __init__(self) -> None:
        self.time_us = 37_000
        self.joules = self.shown_j = 0.0

    def run(self, images: Tensor) -> Tensor:
        time_us, watts = (10_000, 600) if len(images) > 1 else (1_000, 100)
        for _ in range(time_us // 1_000):
            self.time_us += 1_000
            self.joules += watts / 1_000
            if self.time_us % 100_000 == 0:  # NVML's counter is brought up to date every 0.1 s
                self.shown_j = self.joules
        return images

    def clock(self) -> float:
        return self.time_us / 1e6

    def counter(self) -> Source:
        return CounterSource("GPU-1", "", lambda: self.shown_j, period_s=0.1, limit_w=700, clock=self.clock)

    def estimate(self) -> Source:
        return PowerSource("cpu", "", "estimate", lambda: 50.0, mean=True, min_span_s=0, clock=self.clock)


def measure(device: Device, sources: list[Source], monkeypatch: pytest.MonkeyPatch) -> tuple[Cost, float]:
    """What inference takes by two turns, and how long the joules were read in each."""
    contestant = _Contestant("network", device.run, None, 0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", device.clock)
        with Meter(sources, interval_s=3600) as meter:
            _warm_up(contestant, ONE, MANY, _no_wait, meter)
            windows = [_take_turn(contestant, ONE, MANY, _no_wait, meter) for _ in range(2)]
    return _cost(contestant, None), windows[-1].seconds


def test_a_counter_that_moves_in_steps_is_read_over_many_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    cost, window_s = measure(device, [device.counter()], monkeypatch)
    assert window_s >= 20 * 0.1
    assert cost.energy_j_per_1000 == pytest.approx(TRUTH_J_PER_1000, rel=0.01)
    bound_j = 1000 * 0.1 * 700 / (window_s / 0.01 * len(MANY))
    assert cost.energy_bound_j_per_1000 == pytest.approx(bound_j)
    assert cost.energy_text() == f"{cost.energy_j_per_1000:,.0f} J ± {bound_j:.1f} J"


def test_an_estimate_leaves_no_bound_but_that_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    cost, _ = measure(device, [device.counter(), device.estimate()], monkeypatch)
    assert cost.energy_bound_j_per_1000 is None
    assert cost.energy_text() == f"{cost.energy_j_per_1000:,.0f} J"
    gpu, cpu = cost.energy_by_device["GPU-1"], cost.energy_by_device["cpu"]
    assert gpu.energy_j_per_1000 == pytest.approx(TRUTH_J_PER_1000, rel=0.01)
    assert gpu.energy_bound_j_per_1000 == pytest.approx(87.5, rel=0.01)
    assert (cpu.energy_j_per_1000, cpu.energy_bound_j_per_1000) == (pytest.approx(125, rel=0.01), None)


def test_without_a_counter_a_turn_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    _, window_s = measure(device, [device.estimate()], monkeypatch)
    assert window_s == pytest.approx(0.3, abs=0.015)


class Queue:
    """A GPU to which the host gives an image's work in 1 ms, and which then computes for 2 ms beside the host."""

    def __init__(self) -> None:
        self.time_s = self.done_s = 0.0

    def run(self, images: Tensor) -> Tensor:
        self.time_s += 0.001
        self.done_s = max(self.done_s, self.time_s) + 0.002
        return images

    def synchronize(self) -> None:
        self.time_s = max(self.time_s, self.done_s)


def test_one_image_by_itself_is_not_computed_while_the_next_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Queue()
    contestant = _Contestant("network", gpu.run, None, 0)
    with Meter([]) as meter:
        monkeypatch.setattr(time, "perf_counter", lambda: gpu.time_s)
        _warm_up(contestant, ONE, MANY, gpu.synchronize, meter)
        _take_turn(contestant, ONE, MANY, gpu.synchronize, meter)
    assert contestant.single_s == [pytest.approx(0.003)]
    assert contestant.image_s == [pytest.approx(0.002 / len(MANY), rel=0.01)]
