"""The code in the documentation runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from greenprune.gating import find_gates, gate_parameters

DOCS = Path(__file__).parent.parent / "docs"


def run_block(name: str, number: int) -> dict[str, Any]:
    """Run a page's Python block and give its names."""
    block = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)[number]
    names: dict[str, Any] = {}
    exec(block, names)
    return names


def test_the_example_of_the_library_page(capsys: pytest.CaptureFixture[str]) -> None:
    names = run_block("library.md", 0)
    report = names["pruner"].report()
    assert report["gates_left"] == 0
    assert 0.49 < report["kept_cost"] <= 0.5
    assert report["params"] == sum(parameter.numel() for parameter in names["model"].parameters())
    assert gate_parameters(names["model"]) == []
    # It has learnt: on all images, as the last batch has five of them.
    with torch.no_grad():
        right = names["model"].eval()(names["images"]).argmax(1) == torch.tensor(names["digits"].target)
    assert right.float().mean() > 0.9
    assert "remove" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_the_example_of_an_own_block() -> None:
    names = run_block("networks.md", 0)
    assert sorted(find_gates(names["model"])) == ["2", "3"]
    model = names["model"]
    assert isinstance(model, nn.Sequential)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
