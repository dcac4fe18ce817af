"""Every family that can be gated, in every format, after removals: the same logits without greenprune's modules."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from families import BATCH, EVERY_ORDER, FAMILIES, FOLLOWED, ONE_ACTIVATION, Logits, build, patterns, sharing

from greenprune import UserError
from greenprune.export import export_network
from greenprune.export.formats import read_network
from greenprune.export.inference import _move
from greenprune.surgery import carry_out

TRACED = ("torch.export", "onnx")
NO_PLAIN_FORM = "transformers-dinov2"
OF_TRANSFORMERS = [name for name in FAMILIES if name.startswith("transformers-") and name != NO_PLAIN_FORM]
OTHERS = [name for name in FAMILIES if not name.startswith("transformers-")]
QUICK = {  # the other pairs are among the slow tests
    *((name, "safetensors") for name in OTHERS),
    *((name, kind) for name in ("cifar-b", "vit") for kind in ("torch", "hf", *TRACED)),
    *((name, "onnx") for name in ("mobilenet-v3-small", "convnext", "swin-v2", *FOLLOWED)),
}
CASES = [
    pytest.param(name, kind, marks=() if (name, kind) in QUICK else pytest.mark.slow)
    for name in OTHERS
    for kind in (*(() if name in FOLLOWED else ("torch", "safetensors", "hf")), *TRACED)
]
CONVOLUTIONAL = [name for name in OTHERS if not any(kind in name for kind in ("vit", "swin")) and name not in FOLLOWED]


def pruned(name: str, pattern: str = "mixed-1") -> nn.Module:
    model = build(name)
    carry_out(patterns(model)[pattern].operations(model), model)
    return model.eval()


def unwrapped(model: nn.Module) -> nn.Module:
    """A network of transformers as its library gives it, any other as it is."""
    return model.get_submodule("network") if isinstance(model, Logits) else model


def logits(kind: str, folder: Path, images: Tensor) -> Tensor:
    """What an exported network computes, loaded as its card says."""
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": images.numpy()})
        assert isinstance(found, np.ndarray)
        return torch.from_numpy(found)
    if kind == "torch.export":
        return torch.export.load(folder / "model.pt2").module()(images)
    spec = importlib.util.spec_from_file_location("network", folder / "network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_network(str(folder / ("model.pt" if kind == "torch" else "model.safetensors")))(images)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_exported_network_has_the_logits_of_the_trained_one(name: str, kind: str, tmp_path: Path) -> None:
    model = pruned(name)
    images = FAMILIES[name].images()
    exported = export_network(model, images, kind, tmp_path / "out")
    assert exported.max_relative_logit_difference <= 1e-5
    others = FAMILIES[name].images(7)  # not those that the export was checked on, and other numbers of them
    with torch.no_grad():
        for count in (1, 4):
            expected = model(others[:count])
            found = logits(kind, tmp_path / "out", others[:count])
            assert relative_difference(found, expected) <= 1e-5
            again = read_network(kind, tmp_path / "out", trust=True).run(others[:count])
            assert relative_difference(again, found) <= 1e-6


@pytest.mark.parametrize("pattern", ["all-on", "all-off", "one-left", "whole-sets-off"])
@pytest.mark.parametrize("name", ["cifar-a", "regnet-y", "mobilenet-v2", "swin", "timm-vit"])
def test_whatever_was_removed(name: str, pattern: str, tmp_path: Path) -> None:
    model = pruned(name, pattern)
    exported = export_network(model, FAMILIES[name].images(), "safetensors", tmp_path / "out")
    assert exported.max_relative_logit_difference <= 1e-5


@ONE_ACTIVATION
@EVERY_ORDER
@pytest.mark.parametrize("fold", [True, False], ids=["folded", "as it is"])
def test_an_activation_that_a_branch_uses_twice_is_written_twice(
    act: Callable[[], nn.Module], order: str, fold: bool, tmp_path: Path
) -> None:
    shared = act()
    model = sharing(shared, order).append(shared)  # and a third time at the end
    carry_out(patterns(model)["one-left"].operations(model), model)
    images = torch.randn(BATCH, 3, 8, 8)
    export_network(model, images, "torch", tmp_path / "out", fold_batch_norm=fold)
    with torch.no_grad():
        assert relative_difference(logits("torch", tmp_path / "out", images), model.eval()(images)) <= 1e-5


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "safetensors") for name in OF_TRANSFORMERS),
        ("transformers-vit", "torch.export"),
    ],
)
def test_a_network_of_transformers_is_exported_with_its_logits_alone(name: str, kind: str, tmp_path: Path) -> None:
    model = unwrapped(pruned(name))
    exported = export_network(model, FAMILIES[name].images(), kind, tmp_path / "out")
    assert exported.max_relative_logit_difference <= 1e-5
    others = FAMILIES[name].images(7)
    with torch.no_grad():
        expected = model(others).logits
        assert relative_difference(logits(kind, tmp_path / "out", others), expected) <= 1e-5
        again = read_network(kind, tmp_path / "out", trust=kind == "torch.export")
        assert relative_difference(again.run(others), expected) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("safetensors", r"the network \(Dinov2ForImageClassification\) has a forward of its own"),
        ("torch.export", r"the network gives a ImageClassifierOutput; expected one tensor of logits"),
    ],
)
def test_a_network_of_transformers_without_a_plain_form_is_refused(kind: str, complaint: str, tmp_path: Path) -> None:
    model = unwrapped(pruned(NO_PLAIN_FORM))
    with pytest.raises(UserError, match=complaint):
        export_network(model, FAMILIES[NO_PLAIN_FORM].images(), kind, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_batch_norm_is_folded_on_request(name: str, tmp_path: Path) -> None:
    model = pruned(name)
    exported = export_network(model, FAMILIES[name].images(), "safetensors", tmp_path / "out", fold_batch_norm=True)
    assert exported.max_relative_logit_difference <= 1e-5
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert exported.record["batch_norms_folded"] == norms
    assert "BatchNorm" not in (tmp_path / "out" / "network.py").read_text()


def chain_with(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), *extra, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize(
    "extra",
    [
        [nn.Hardtanh(-1.0, 2.0)],
        [nn.LayerNorm([8, 8, 8])],
        [nn.RMSNorm([8, 8, 8])],
        [nn.Unflatten(1, (2, 2, 2)), nn.Flatten(1, 3)],
        [nn.BatchNorm2d(8, track_running_stats=False)],
    ],
    ids=lambda extra: type(extra[0]).__name__,
)
def test_layers_are_written_with_all_that_makes_them(extra: list[nn.Module], tmp_path: Path) -> None:
    model, images = chain_with(*extra), torch.randn(4, 3, 8, 8)
    exported = export_network(model, images, "safetensors", tmp_path / "out", fold_batch_norm=True)
    assert exported.max_relative_logit_difference <= 1e-5
    assert exported.record["batch_norms_folded"] == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_whose_weight_a_hook_derives_has_no_plain_form(tmp_path: Path) -> None:
    model = chain_with(nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)))  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match=r"part1 is a torch\.Conv2d, which has no plain form"):
        export_network(model, torch.randn(4, 3, 8, 8), "safetensors", tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "torch.export"])
def test_a_network_in_another_precision_is_exported_in_fp32(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    model = chain_with(nn.BatchNorm2d(8)).to(dtype)
    images = torch.randn(4, 3, 8, 8)
    exported = export_network(model, images.to(dtype), kind, tmp_path / "out")
    assert exported.max_relative_logit_difference <= 1e-5
    assert all(tensor.dtype == dtype for tensor in model.parameters())
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    with torch.no_grad():
        expected = model(images.to(dtype)).float()
        assert relative_difference(logits(kind, tmp_path / "out", images), expected) <= tolerance


class Positions(nn.Module):
    """Makes a tensor where its input is, as attention in windows does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * (torch.arange(x.shape[1], device=x.device) > 1).to(x.dtype)


def test_a_program_goes_to_another_device_with_the_tensors_that_it_makes(tmp_path: Path) -> None:
    """To the meta device, which stands for a GPU: shapes alone are computed there."""
    model, images = nn.Sequential(nn.Conv2d(3, 5, 1), Positions()), torch.randn(4, 3, 8, 8)
    export_network(model, images, "torch.export", tmp_path / "out")
    loaded = read_network("torch.export", tmp_path / "out", trust=True)
    assert loaded.module is not None
    with torch.no_grad():
        _move(loaded.module, torch.device("cpu"), torch.channels_last)
        assert relative_difference(loaded.run(images), model(images)) <= 1e-5
        _move(loaded.module, torch.device("meta"), torch.contiguous_format)
        assert loaded.run(images.to("meta")).is_meta


def test_the_module_files_are_tidy(tmp_path: Path) -> None:
    for name in sorted({*OTHERS, *OF_TRANSFORMERS} - {*FOLLOWED}):
        model, folder = unwrapped(pruned(name)), tmp_path / name.replace("-", "_")
        export_network(model, FAMILIES[name].images(), "safetensors", folder)
        text = (tmp_path / name.replace("-", "_") / "network.py").read_text()
        imports = {line for line in text.splitlines() if line.startswith(("import ", "from "))}
        assert imports <= {
            "from __future__ import annotations",
            "import math",
            "import torch",
            "from safetensors.torch import load_file",
            "from torch import Tensor, nn",
            "from torch import nn",
            "from torch.nn import functional",
        }
        assert "gate" not in text.replace("the place for a gate", "").replace("aggregate", "")
    ruff = [sys.executable, "-m", "ruff"]
    options = ["--isolated", "--line-length", "120", str(tmp_path)]
    formatted = subprocess.run([*ruff, "format", "--check", *options], check=False, capture_output=True, text=True)
    assert formatted.returncode == 0, formatted.stdout
    checked = subprocess.run(
        [*ruff, "check", "--select", "E,F,I,W", *options], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_the_trained_network_is_left_as_it_is(tmp_path: Path) -> None:
    model = pruned("resnet-basic").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_network(model, FAMILIES["resnet-basic"].images(), "torch", tmp_path / "out", fold_batch_norm=True)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 2))
    with pytest.raises(UserError, match=r"^images: a tensor of shape \(4, 3, 5\) is not valid; expected images \[B, C"):
        export_network(model, torch.randn(4, 3, 5), "torch", tmp_path / "out")
    assert not (tmp_path / "out").exists()
