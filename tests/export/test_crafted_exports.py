"""Exported folders from someone else: whatever their files say, reading them runs nothing."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from greenprune.cli import main
from greenprune.export import export_network

PLANTED = "__import__('pathlib').Path({path!r}).touch()"


class Planted:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network for digits in each format that could hold code."""
    folder = tmp_path_factory.mktemp("exports")
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))
    for kind in ("torch", "safetensors", "torch.export"):
        export_network(model, torch.randn(2, 1, 8, 8), kind, folder / kind)
    return folder


@pytest.fixture
def refused(exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Evaluates a folder that was tampered with; gives the one line that it is refused with."""

    def evaluate(kind: str, tamper: Callable[[Path], None], *flags: str) -> str:
        folder = shutil.copytree(exports / kind, tmp_path / "crafted")
        tamper(folder)
        for command in (["eval", str(folder), "--data", "digits"], ["infer-bench", str(folder), "--turns", "1"]):
            assert main([*command, *flags]) == 2
        assert not (tmp_path / "planted").exists()
        first, second = capsys.readouterr().err.splitlines()
        assert first == second
        return first

    return evaluate


HEADER = "from __future__ import annotations\n"
CASES = {
    "a statement": (lambda text, code: text.replace(HEADER, f"{HEADER}{code}\n"), "is not of an export"),
    "an import": (lambda text, code: text.replace(HEADER, f"{HEADER}import os\n"), "'import os' is not of an export"),
    "a relative import": (lambda text, code: text.replace(HEADER, f"{HEADER}from .torch import nn\n"), "not of an exp"),
    "an argument": (lambda text, code: text.replace("nn.ReLU()", f"nn.ReLU({code})"), "is no layer that an export has"),
    "a layer": (lambda text, code: text.replace("nn.ReLU()", code), "is no layer that an export has"),
    "an attribute": (lambda text, code: text.replace("nn.ReLU()", "nn.functional.os.system('true')"), "is no layer"),
    "another module's layer": (lambda text, code: text.replace("nn.ReLU()", "nn.init.eye_(3)"), "is no layer that"),
    "a method": (
        lambda text, code: text.replace(
            "    def __init__", f"    def forward(self, x):\n        {code}\n\n    def __init__"
        ),
        "class Network has more than a constructor",
    ),
    "the constructor": (
        lambda text, code: text.replace("super().__init__()", f"super().__init__()\n        {code}"),
        "makes no part of the network",
    ),
    "before the constructor": (lambda text, code: text.replace("super()", f"super({code})"), "does not begin with"),
    "a class of its own": (lambda text, code: f"{text}\nclass Other:\n    {code}\n", "its Other is not the one that"),
    "a default": (lambda text, code: f"{text}\ndef other(x={code}):\n    pass\n", "its other is not the one that"),
    "a decorator": (
        lambda text, code: text.replace("class Network", f"@{code}\nclass Network"),
        "is not a plain nn.Seq",
    ),
    "a base": (
        lambda text, code: text.replace("Network(nn.Sequential)", f"Network({code})"),
        "is not a plain nn.Sequential",
    ),
    "no Python": (lambda text, code: text.replace("class", "klass"), "it is not Python (SyntaxError)"),
    "no network": (lambda text, code: text.replace("Network", "Net"), "it has no class Network"),
    "too deep": (
        lambda text, code: text.replace("nn.ReLU()", "nn.Sequential(" * 1500 + "nn.ReLU()" + ")" * 1500),
        "it is not Python",
    ),
    "huge": (
        lambda text, code: text.replace("nn.Conv2d(1, 4", "nn.Conv2d(1, 400000000000"),
        "does not fit model.safetensors, first at part0.0.",
    ),
    "unknown arguments": (lambda text, code: text.replace("nn.ReLU()", "nn.ReLU(1, 2, 3)"), "nn.ReLU refuses ("),
}


@pytest.mark.parametrize("case", CASES)
def test_a_module_file_is_read_and_not_run(case: str, refused: Callable[..., str], tmp_path: Path) -> None:
    change, message = CASES[case]
    code = PLANTED.format(path=str(tmp_path / "planted"))

    def tamper(folder: Path) -> None:
        text = (folder / "network.py").read_text()
        assert change(text, code) != text
        (folder / "network.py").write_text(change(text, code))

    assert message in refused("safetensors", tamper)


def test_a_pickle_for_tensors_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    def tamper(folder: Path) -> None:
        torch.save({"head.weight": Planted(tmp_path / "planted")}, folder / "model.pt")

    assert "model.pt' cannot be loaded: Weights only load failed" in refused("torch", tamper)


def test_a_plain_pickle_for_tensors_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    def tamper(folder: Path) -> None:
        (folder / "model.pt").write_bytes(pickle.dumps(Planted(tmp_path / "planted"), protocol=2))

    assert "model.pt' cannot be loaded" in refused("torch", tamper)


def crafted_graph(path: Path, planted: Path) -> None:
    """A .pt2 file whose first weight is a pickle that writes a file when it is loaded."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("weights_config.json"))
    config = json.loads(members[name])
    payload = next(iter(config["config"].values()))
    payload["use_pickle"] = True
    members[name] = json.dumps(config).encode()
    weights = name.rpartition("/")[0]
    torch.save(Planted(planted), path.with_name("planted.pt"))
    members[f"{weights}/{payload['path_name']}"] = path.with_name("planted.pt").read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def test_a_graph_is_not_loaded_unless_it_is_trusted(refused: Callable[..., str], exports: Path, tmp_path: Path) -> None:
    message = refused("torch.export", lambda folder: crafted_graph(folder / "model.pt2", tmp_path / "planted"))
    assert "model.pt2' may hold code" in message
    assert "expected --trust" in message
    assert main(["eval", str(exports / "torch.export"), "--data", "digits", "--trust"]) == 0


def test_the_crafted_graph_would_run_code(exports: Path, tmp_path: Path) -> None:
    """Why it is refused: PyTorch's own loader runs it."""
    path = Path(shutil.copy(exports / "torch.export" / "model.pt2", tmp_path))
    crafted_graph(path, tmp_path / "planted")
    with pytest.raises(Exception):  # noqa: B017, PT011 -- whatever PyTorch makes of a weight that is none
        torch.export.load(path).module()
    assert (tmp_path / "planted").exists()
