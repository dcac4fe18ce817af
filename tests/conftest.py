"""What the tests of several rooms share: a fixed seed, and small networks."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import torch
from torch import nn

from greenprune.config import GateConfig, ModelConfig
from greenprune.gating import attach_gates
from greenprune.models import build_model

MakeNetwork = Callable[..., nn.Module]


def pytest_configure() -> None:
    """Let runs be interrupted that tests start: a shell's background jobs are started with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


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
