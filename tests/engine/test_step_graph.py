"""When a step is recorded, replayed and recorded again. Stand-ins take the GPU's place: what is to be recorded is
computed at once, and a replay does nothing; tests/gpu compares real records with the steps as they are."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from greenprune.config import ConfigError
from greenprune.engine.step_graph import WARM_UP, StepGraph

BATCH = torch.ones(2, 3), torch.zeros(2)


class Stream:
    def wait_stream(self, other: Stream) -> None:
        """Nothing runs beside anything here."""


class Graph:
    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


@contextmanager
def record(*_: object, **__: object) -> Iterator[None]:
    yield


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.replays = 0
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)


class Step:
    """A step of one linear layer; counts how often Python goes through its passes."""

    def __init__(self, also: Callable[[], object] = lambda: None) -> None:
        self.model = nn.Linear(3, 1)
        self.also = also
        self.passes = 0
        self.graph = StepGraph(self._pass, self.model.parameters, torch.device("cpu"))

    def _pass(self, images: Tensor, labels: Tensor) -> Tensor:
        self.passes += 1
        self.also()
        loss = self.model(images).sum()
        loss.backward()
        return loss.detach()

    def take(self, steps: int = 1, batch: tuple[Tensor, Tensor] = BATCH, phase: object = None) -> None:
        for _ in range(steps):
            self.graph(*batch, phase)
            if not self.graph.keeps_gradients:
                self.model.zero_grad()


def test_a_step_is_recorded_once_and_then_replayed() -> None:
    step = Step()
    step.take(WARM_UP)
    assert (step.passes, Graph.replays) == (WARM_UP, 0)
    assert not step.graph.keeps_gradients
    step.take(5)
    assert (step.passes, Graph.replays) == (WARM_UP + 1, 5)
    assert step.graph.keeps_gradients


@pytest.mark.parametrize("change", ["phase", "shape", "layout", "structure"])
def test_what_changes_is_recorded_anew_and_leaves_no_gradients(change: str) -> None:
    step = Step()
    step.take(WARM_UP + 2)
    batch, phase = BATCH, None
    if change == "phase":
        phase = "ramp"
    elif change == "shape":
        batch = torch.ones(4, 3), torch.zeros(4)
    elif change == "layout":
        batch = torch.ones(3, 2).t(), torch.zeros(2)
    else:
        step.graph.forget()
        assert all(parameter.grad is None for parameter in step.model.parameters())
    step.take(WARM_UP, batch, phase)
    assert step.passes == 2 * WARM_UP + 1
    assert not step.graph.keeps_gradients
    step.take(1, batch, phase)
    assert step.passes == 2 * WARM_UP + 2
    assert step.graph.keeps_gradients


def test_gradients_that_were_freed_come_back() -> None:
    step = Step()
    step.take(WARM_UP + 1)
    gradients = [parameter.grad for parameter in step.model.parameters()]
    step.model.zero_grad()
    step.take()
    assert all(parameter.grad is old for parameter, old in zip(step.model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(1)], ids=["random", "torch"])
def test_passes_that_draw_on_the_host_are_refused(draw: Callable[[], object]) -> None:
    step = Step(draw)
    step.take(WARM_UP)
    with pytest.raises(ConfigError, match=r"model\.cuda_graph: True is not valid .* random numbers .* expected false"):
        step.take()


def test_a_number_drawn_beside_the_passes_does_not_matter() -> None:
    """Another thread's, in the moment of the first recording."""
    step = Step()
    step.also = lambda: random.random() if step.passes == WARM_UP + 1 else None
    step.take(WARM_UP + 2)
    assert step.graph.keeps_gradients
    assert step.passes == WARM_UP + 2


def test_the_first_cause_is_told_and_a_full_gpu_is_no_invalid_network() -> None:
    def look() -> None:
        if step.passes > WARM_UP:
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            except RuntimeError:
                raise RuntimeError("capture was invalidated")  # noqa: B904 - as PyTorch does

    def fill() -> None:
        if full.passes > WARM_UP:
            raise torch.OutOfMemoryError("CUDA out of memory")

    step, full = Step(look), Step(fill)
    step.take(WARM_UP)
    with pytest.raises(ConfigError, match="operation not permitted"):
        step.take()
    full.take(WARM_UP)
    with pytest.raises(torch.OutOfMemoryError):
        full.take()
