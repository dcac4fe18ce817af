"""What the tests of several rooms share: a fixed seed, and small networks."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import nn

from greenprune.config import GateConfig, ModelConfig
from greenprune.gating import attach_gates
from greenprune.models import build_model

MakeNetwork = Callable[..., nn.Module]
LimitFiles = Callable[[int], AbstractContextManager[None]]


def pytest_configure() -> None:
    """Let runs be interrupted that tests start: a shell's background jobs are started with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def files_of_at_most() -> LimitFiles:
    """Makes writes beyond so many bytes of a file fail, here and in processes that are started, as on a full disk."""

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)

    return limit


@pytest.fixture
def make_network() -> MakeNetwork:
    """Builds a network by name, gated unless ``kind`` is None."""

    def make(  # each is a dimension that tests vary
        name: str = "resnet20",
        *,
        shortcut: str = "A",
        stem: str = "auto",
        kind: str | None = "conditional",
        classes: int = 10,
        channels: int = 3,
        image_size: int = 8,
    ) -> nn.Module:
        config = ModelConfig(name=name, shortcut=shortcut, stem=stem)  # type: ignore[arg-type]
        model = build_model(config, classes=classes, channels=channels, image_size=image_size)
        if kind is not None:
            attach_gates(model, GateConfig(kind=kind))  # type: ignore[arg-type]
        return model

    return make
