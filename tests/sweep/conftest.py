"""A small sweep to begin with: one gated run and its twin."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def sweep_of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, in which two.yaml is; no program is found but those that a test names."""
    (tmp_path / "base.yaml").write_text("model: {name: resnet20}\ndata: {name: digits}\noptim: {epochs: 2, ema: 0.9}\n")
    (tmp_path / "two.yaml").write_text("base: base.yaml\ntargets: [0.5]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path
