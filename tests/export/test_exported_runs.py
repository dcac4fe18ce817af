"""Runs that are taken away: exported by the command, used without greenprune, evaluated, measured, or refused."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from in_process import train_on_images
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from greenprune.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from greenprune.cli import main
from greenprune.config import parse_config
from greenprune.export import ExportError, benchmark_inference, evaluate_file, export_network
from greenprune.export.exporting import open_run
from greenprune.export.formats import FILES, read_network
from greenprune.export.inference import _LiveBytes
from greenprune.models import ResidualBlock

FORMATS = ("torch", "torch.export", "onnx", "safetensors", "hf")

CONFIG = """
model: {name: resnet20}
data: {name: digits, batch_size: 64}
optim: {epochs: 4, lr: 0.05}
gate: {warmup: 0.1, units: [block, channel]}
budget: {target: 0.5}
removal: {window: 11, decide_by: 0.6}
energy: {country: FRA}
output_dir: runs
run_name: small
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small finished run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(CONFIG)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "greenprune.cli", "train", "--config", "config.yaml"]
    done = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs" / "small"


@pytest.fixture(scope="module")
def exports(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in every format, each in a folder of its name."""
    folder = tmp_path_factory.mktemp("exports")
    for kind in FORMATS:
        assert main(["export", str(run), "--format", kind, "-o", str(folder / kind)]) == 0
    return folder


def read(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    assert isinstance(values, dict)
    return values


@pytest.mark.parametrize("kind", FORMATS)
def test_the_accuracy_of_a_file_is_that_of_the_run(exports: Path, run: Path, kind: str) -> None:
    found = evaluate_file(exports / kind, "digits", trust=kind == "torch.export")
    assert found.accuracy == found.of_run == read(run / "summary.json")["accuracy"]
    assert found.samples == 359


def test_the_check_is_recorded_and_printed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), "--format", "safetensors", "-o", str(tmp_path / "out"), "--fold-batch-norm"]) == 0
    record = read(tmp_path / "out" / "export.json")
    difference = record["check"]["max_relative_logit_difference"]
    assert 0 < difference <= 1e-5  # folding rounds
    printed = capsys.readouterr().out
    assert f"largest relative logit difference {difference:.1e}" in printed
    assert "batch norms folded:" in printed
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


WITHOUT_GREENPRUNE = """
import sys
from pathlib import Path
sys.modules["greenprune"] = sys.modules["timm"] = None  # any import of them fails
import importlib, numpy, torch
root, images = Path(sys.argv[1]), torch.from_numpy(numpy.load("images.npy"))

def logits_of(kind):
    folder = root / kind
    if kind == "onnx":
        import onnxruntime
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        return session.run(None, {"images": images.numpy()})[0]
    if kind == "torch.export":
        return torch.export.load(folder / "model.pt2").module()(images).detach().numpy()
    if kind == "hf":
        from transformers import AutoModelForImageClassification
        network = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
        return network(images).logits.detach().numpy()
    sys.path.insert(0, str(folder))
    network = importlib.import_module("network")
    del sys.path[0], sys.modules["network"]
    return network.load_network(str(next(folder.glob("model.*"))))(images).detach().numpy()

for kind in sys.argv[2:]:
    numpy.save(f"{kind}.npy", logits_of(kind))
try:
    import greenprune
except ImportError:
    print("greenprune is not here")
"""


@pytest.fixture(scope="module")
def elsewhere(exports: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """Where a process that cannot import greenprune left each format's logits, and those of the trained network."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("elsewhere")
    trained = open_run(run, None)
    images = torch.cat([images for images, _ in trained.data.eval_batches()])
    np.save(folder / "images.npy", images.numpy())
    # -I: neither the present folder nor PYTHONPATH lead to greenprune.
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_GREENPRUNE, str(exports), *FORMATS],
        check=False,
        cwd=folder,
        env=os.environ | {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "greenprune is not here" in done.stdout
    with torch.no_grad():
        return folder, trained.model(images)


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_runs_where_greenprune_is_not(elsewhere: tuple[Path, Tensor], kind: str) -> None:
    folder, expected = elsewhere
    logits = torch.from_numpy(np.load(folder / f"{kind}.npy"))
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 1e-5
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def test_no_file_holds_code_that_is_run_on_loading_tensors(exports: Path) -> None:
    tensors = torch.load(exports / "torch" / "model.pt", weights_only=True)
    same = load_file(exports / "safetensors" / "model.safetensors")
    assert tensors.keys() == same.keys()
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
    assert not any("gate" in name for name in tensors)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_model_card_states_what_the_run_did(exports: Path, run: Path, kind: str) -> None:
    text = (exports / kind / "README.md").read_text()
    summary = read(run / "summary.json")
    _, front, body = text.split("---\n", 2)
    values = yaml.safe_load(front)
    emissions = values["co2_eq_emissions"]
    assert emissions["emissions"] == pytest.approx(summary["co2_g"])
    assert emissions["training_type"] == "pre-training"
    assert emissions["geographical_location"] == "FRA"
    assert sum(line.startswith("co2_eq_emissions") for line in front.splitlines()) == 1
    result = values["model-index"][0]["results"][0]
    assert result["metrics"] == [{"type": "accuracy", "value": summary["accuracy"]}]
    assert "license" not in values  # the user's to choose
    for stated in ("resnet20 trained on digits", f"{100 * summary['accuracy']:.2f} %", summary["energy_quality"]):
        assert stated in body
    assert f"{summary['blocks']} of {summary['blocks_dense']} blocks are left" in body


def test_the_hub_can_read_the_card(exports: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(exports / "hf" / "README.md")
    assert card.data.eval_results[0].metric_type == "accuracy"
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] > 0


def test_an_unknown_emission_is_left_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    summary = read(run / "summary.json") | {"co2_g": None, "energy_j": None, "energy_by_device_j": {}}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert main(["export", str(tmp_path / "run"), "--format", "torch"]) == 0
    text = (tmp_path / "run" / "export" / "torch" / "README.md").read_text()
    assert "co2_eq_emissions" not in text
    assert "| energy of training | unknown |" in text
    assert "| CO2e of training | unknown" in text


def test_another_precision_of_the_run_is_told(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    summary = read(run / "summary.json") | {"precision": "bf16"}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert main(["export", str(tmp_path / "run"), "--format", "torch", "-o", str(tmp_path / "out")]) == 0
    assert "test set, in bf16 (this file is fp32)" in (tmp_path / "out" / "README.md").read_text()
    assert str(evaluate_file(tmp_path / "out", "digits")).endswith(", in bf16")


# Measuring.


def test_inference_is_measured_beside_the_dense_twin(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(exports / "safetensors"), str(exports / "hf" / "model.safetensors"), str(exports / "onnx")]
    assert main(["infer-bench", *files, "--turns", "1", "--batch-size", "8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    engines = [comparison["engine"] for comparison in report["comparisons"]]
    assert ["eager" in engine for engine in engines] == [True, True, False]
    assert "onnxruntime" in engines[2]
    for comparison in report["comparisons"]:
        twin, small = comparison["costs"]
        assert (twin["network"], twin["against_twin"]) == ("dense twin", {})
        assert small["weights_bytes"] < twin["weights_bytes"]
        assert small["against_twin"]["latency"] == pytest.approx(twin["latency_s"] / small["latency_s"])
        assert small["against_twin"]["throughput"] == pytest.approx(small["images_per_s"] / twin["images_per_s"])
        assert comparison["energy_quality"] in ("counter", "integrated power", "estimate", None)
        assert (small["energy_j_per_1000"] is None) == (comparison["energy_quality"] is None)
        joules = [device["energy_j_per_1000"] for device in small["energy_by_device"].values()]
        assert small["energy_j_per_1000"] == pytest.approx(sum(joules))
        assert small["energy_by_device"].keys() == comparison["energy_sources"].keys()
        assert (small["activations_bytes"] is None) == ("onnxruntime" in comparison["engine"])
    tensors = load_file(exports / "safetensors" / "model.safetensors")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert report["comparisons"][0]["costs"][1]["weights_bytes"] == weights


def test_networks_of_one_twin_take_turns_together(exports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(exports / "torch", exports / "again")
    files = [str(exports / "torch"), str(exports / "again")]
    assert main(["infer-bench", *files, "--turns", "2", "--batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("dense twin") == 1
    assert printed.count("better than the twin") == 2
    assert "2 turns" in printed


def test_live_bytes_are_those_of_the_tensors_alive_at_once() -> None:
    x = torch.zeros(1000)
    with torch.no_grad(), _LiveBytes({x.untyped_storage()._cdata}) as live:
        one = x + 1  # 4,000 bytes
        two = one.view(10, 100) * 2  # and 4,000 more: the view takes none
        del one
        three = two + 1  # in place of the first
        del two, three
    assert live.peak == 8000


# Bad input.


def broken(run: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(run, folder)
    change(folder)
    return folder


def truncate_the_tensors(run: Path) -> None:
    path = list_checkpoints(run / "checkpoints")[-1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def leave_gates(run: Path) -> None:
    """As a run that was never decided leaves it."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    checkpoint = load_checkpoint(newest)
    tensors: dict[str, Tensor] = {**checkpoint.model, "stages.0.0.gate.bias": torch.zeros(1)}
    undecided = Checkpoint(tensors, checkpoint.training, checkpoint.state)
    save_checkpoint(run / "checkpoints", checkpoint.state["step"], undecided, keep_last=1)


def change_the_structure(run: Path) -> None:
    structure = read(run / "structure.json")
    structure["operations"].pop()
    (run / "structure.json").write_text(json.dumps(structure))


def lose_the_last_checkpoint(run: Path) -> None:
    shutil.rmtree(list_checkpoints(run / "checkpoints")[-1])


def lose_a_figure(run: Path) -> None:
    summary = read(run / "summary.json")
    del summary["accuracy"]
    (run / "summary.json").write_text(json.dumps(summary))


BAD_RUNS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "no run": (lambda run: (run / "config.yaml").unlink(), 2, "is not the folder of a run; expected"),
    "unfinished": (lambda run: (run / "summary.json").unlink(), 2, "is not finished (step-000000088 is its newest"),
    "undecided": (leave_gates, 2, "is undecided (gates left in step-000000088: 1); expected a finished run"),
    "without checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), 2, "has no checkpoint"),
    "damaged checkpoint": (truncate_the_tensors, 1, "model.safetensors: size or checksum differs"),
    "damaged structure": (change_the_structure, 1, "structure.json: not the structure of step-000000088"),
    "lost structure": (
        lambda run: (run / "structure.json").unlink(),
        1,
        "structure.json: cannot be read (No such file or directory)",
    ),
    "damaged summary": (lose_a_figure, 1, "summary.json: lacks accuracy"),
    "earlier checkpoint": (lose_the_last_checkpoint, 1, "not the end of the run, which took 88 steps"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_bad_run_is_refused(case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, code, message = BAD_RUNS[case]
    folder = broken(run, tmp_path / "run", change)
    assert main(["export", str(folder), "--format", "safetensors", "-o", str(tmp_path / "out")]) == code
    error = capsys.readouterr().err
    assert error.startswith("greenprune: error: ")
    assert error.count("\n") == 1
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["moved", "a copy", "."])
def test_the_command_that_goes_on_with_an_unfinished_run_can_be_given(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken(run, tmp_path / ("it" if name == "." else name), lambda run: (run / "summary.json").unlink())
    monkeypatch.chdir(folder if name == "." else tmp_path)
    assert main(["export", name, "--format", "safetensors"]) == 2
    command = shlex.split(capsys.readouterr().err.split("go on with greenprune train ")[1])
    config = parse_config(command)
    assert config.resume == "auto" or Path(config.resume).resolve() == list_checkpoints(folder / "checkpoints")[-1]
    assert config.resume != "auto" or Path(config.output_dir, str(config.run_name)).resolve() == folder


BAD_FLAGS = {
    "unknown format": (["--format", "tflite"], "--format: 'tflite' is not valid; expected one of torch, torch.export"),
    "old opset": (["--format", "onnx", "--opset", "9"], "--opset: 9 is not valid; expected 18 to "),
    "opset of another format": (["--format", "torch", "--opset", "20"], "expected --format onnx"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused(case: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, message = BAD_FLAGS[case]
    assert main(["export", str(run), "-o", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["folder", "empty folder", "file"])
def test_an_existing_target_is_not_overwritten(
    what: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    if what == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        if what == "folder":
            (target / "model.pt").write_text("mine")
    assert main(["export", str(run), "--format", "torch", "-o", str(target)]) == 2
    assert "is there already and is not overwritten; expected a new folder" in capsys.readouterr().err
    if what != "empty folder":
        assert (target if what == "file" else target / "model.pt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Singular(nn.Module):
    """What ONNX has no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linalg.svdvals(x.flatten(2)).sum(1).view(-1, 1, 1, 1)


class Choosy(nn.Module):
    """What depends on values cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.sum()) > 0 else -x


class Named(nn.Module):
    """What segmentation networks give."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": x}


class SEModule(nn.Module):
    """Computes something else than the module of timm whose name it bears."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = self.fc2 = nn.Conv2d(4, 4, 1)
        self.bn = self.act = self.gate = nn.Identity()
        self.add_maxpool = False

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc1(x)


SEModule.__module__ = "timm.layers"


def small_network(extra: nn.Module) -> nn.Module:
    block = ResidualBlock(nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), nn.ReLU(), input_activated=False)
    return nn.Sequential(nn.Conv2d(3, 4, 3), block, extra, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_that_does_not_fit_is_one_line_and_leaves_nothing(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files_of_at_most: Any
) -> None:
    target = tmp_path / "export" / kind
    with files_of_at_most(1000):
        assert main(["export", str(run), "--format", kind, "-o", str(target)]) == 2
    assert capsys.readouterr().err == (
        f"greenprune: error: -o: cannot write {str(target / FILES[kind])!r} (File too large); expected room for it\n"
    )
    assert os.listdir(tmp_path) == []


def test_each_file_of_an_export_that_does_not_fit_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["model.safetensors", "network.py", "modeling_network.py", "config.json", "export.json", "README.md"]
    for written, name in enumerate(files):
        answers = iter([False] * written + [True])

        def flush(_: int, answers: Iterator[bool] = answers) -> None:
            if next(answers):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", flush)
        assert main(["export", str(run), "--format", "hf", "-o", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert f"-o: cannot write {str(tmp_path / 'out' / name)!r} (No space left on device)" in error
        assert error.count("\n") == 1
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("extra", "kind", "message"),
    [
        (Singular(), "onnx", "cannot be written as ONNX"),
        (Choosy(), "torch.export", "cannot be traced by torch.export"),
        (Choosy(), "safetensors", "Choosy, which has no plain form; torch.export and onnx need no plain form"),
        (SEModule(), "safetensors", "computes other logits than the trained network"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(extra: nn.Module, kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as refused:
        export_network(small_network(extra), torch.randn(4, 3, 8, 8), kind, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_has_no_plain_form_is_still_traced(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = small_network(nn.Identity())

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inside(x)

    exported = export_network(Own(), torch.randn(4, 3, 8, 8), "torch.export", tmp_path / "out")
    assert exported.max_relative_logit_difference <= 1e-5
    report = benchmark_inference([exported.path], batch_size=2, turns=1, trust=True)
    assert len(report.comparisons[0].costs) == 1  # nothing tells its twin
    assert "no dense twin" in report.notes[0]


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (Named(), r"^the network gives a dict; expected one tensor of logits \[B, classes\]$"),
        (nn.Flatten(0), r"^the network gives a tensor of shape \(8,\); expected logits \[B, classes\]$"),
    ],
    ids=["a dict", "one dimension"],
)
def test_a_network_that_gives_no_logits_is_refused(end: nn.Module, message: str, tmp_path: Path) -> None:
    network = nn.Sequential(small_network(nn.Identity()), end)
    with pytest.raises(ExportError, match=message):
        export_network(network, torch.randn(4, 3, 8, 8), "torch.export", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["data parallel", "compiled"])
def test_a_wrapped_network_is_refused(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    network = wrap(small_network(nn.Identity()))
    with pytest.raises(ExportError, match=rf"^the network is wrapped \(.*{type(network).__name__}\); expected the net"):
        export_network(network, torch.randn(4, 3, 8, 8), "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_no_tensor_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^images: a list is not valid; expected a tensor"):
        export_network(small_network(nn.Identity()), [torch.randn(3, 8, 8)], "torch", tmp_path / "out")  # type: ignore[arg-type]


def test_logits_that_are_all_zero_are_the_same(tmp_path: Path) -> None:
    """Of a head that starts at zero and has not been trained, as torchvision's vision transformer has."""
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))
    nn.init.zeros_(network[2].weight)
    nn.init.zeros_(network[2].bias)
    exported = export_network(network, torch.randn(2, 3, 8, 8), "torch", tmp_path / "out")
    assert exported.max_relative_logit_difference == 0


def test_gates_are_refused_in_a_network_at_hand(make_network: Callable[..., nn.Module], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"undecided \(gates left: 9\)"):
        export_network(make_network(), torch.randn(2, 3, 8, 8), "torch", tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "nowhere", "--data", "digits"], "FILE: 'nowhere' does not exist; expected a folder that"),
        (["infer-bench", "EMPTY"], "FILE: there is no export.json beside"),
        (["infer-bench", "DAMAGED"], "does not tell of an exported network; expected a folder"),
        (["eval", "torch", "--data", "digit"], "--data: 'digit' is not valid; did you mean digits"),
        (
            ["eval", "torch", "--data", "cifar10"],
            "set --root or the environment variable GREENPRUNE_DATA to their folder",
        ),
        (["infer-bench", "torch", "--turns", "0"], "--turns: 0 is not valid; expected at least 1"),
    ],
)
def test_bad_files_and_settings_are_named(
    command: list[str],
    message: str,
    exports: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GREENPRUNE_DATA", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "export.json").write_text('{"kind": "torch"}')
    places = {name.upper(): str(tmp_path / name) for name in ("empty", "damaged")} | {"torch": str(exports / "torch")}
    assert main([places.get(word, word) for word in command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_data_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))
    export_network(model, torch.randn(2, 3, 8, 8), "torch", tmp_path / "out")
    with pytest.raises(ExportError) as refused:
        evaluate_file(tmp_path / "out", "digits")
    assert str(refused.value) == (
        "--data: 'digits' has images of 1 channels and 8 x 8 pixels in 10 classes; "
        "expected 3 channels and 8 x 8 pixels in 2 classes"
    )


def of_images(root: Path, names: str, seed: int) -> Path:
    """Two classes of few small images."""
    random = np.random.RandomState(seed)
    for part, count in (("train", 6), ("val", 3)):
        for label in names:
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
    return root


def test_an_export_looks_at_the_images_of_its_run_and_at_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, others = of_images(tmp_path / "mine", "ab", 0), of_images(tmp_path / "others", "xy", 1)
    train_on_images(mine, tmp_path, epochs=1)
    capsys.readouterr()
    monkeypatch.setenv("GREENPRUNE_DATA", str(others))
    export = ["export", str(tmp_path / "it"), "--format", "torch"]
    assert main(export) == 0
    monkeypatch.setenv("GREENPRUNE_DATA", str(mine))
    assert main([*export, "-o", str(tmp_path / "o"), "--root", str(others)]) == 2
    assert "holds another image_folder than the one that the run was trained on" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    evaluated = evaluate_file(tmp_path / "it" / "export" / "torch", "image_folder", str(mine))
    assert (evaluated.samples, evaluated.accuracy) == (6, evaluated.of_run)


def test_a_truncated_file_is_named(exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, name in (("torch", "model.pt"), ("onnx", "model.onnx"), ("torch.export", "model.pt2")):
        shutil.copytree(exports / kind, tmp_path / kind)
        path = tmp_path / kind / name
        path.write_bytes(path.read_bytes()[:1000])
        assert main(["eval", str(path), "--data", "digits", "--trust"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert f"{name}' cannot be loaded" in error
        assert error.count("cannot be loaded") == 1


def test_a_missing_runtime_is_all_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenprune.export.formats.importlib.util.find_spec", lambda _: None)
    with pytest.raises(ExportError, match=r"^FILE: '[^']*model\.onnx' needs onnxruntime, which is not installed"):
        read_network("onnx", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_a_resnet50_is_exported_in_20_seconds(
    make_network: Callable[..., nn.Module], kind: str, tmp_path: Path
) -> None:
    model = make_network("resnet50", kind=None, classes=1000, image_size=224)
    exported = export_network(model, torch.randn(16, 3, 224, 224), kind, tmp_path / "out")
    assert exported.seconds <= 20
