"""What the doctor finds."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from greenprune.data import DATASETS
from greenprune.doctor import Finding, diagnose, is_fit, print_findings

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine_can_train() -> None:
    findings = diagnose({})
    found = by_name(findings)
    assert is_fit(findings)
    assert found["torch"].detail == importlib.metadata.version("torch")
    assert found["digits"].state == "ok"
    assert found["CO2e"].advice is not None
    assert "energy.country" in found["CO2e"].advice
    assert found["runs/"].state == "ok"
    assert not Path("runs").exists()  # looking changes nothing


def test_energy_is_told_with_its_quality_and_why_it_is_no_better() -> None:
    rows = [finding for finding in diagnose({}) if finding.area == "energy" and finding.name != "CO2e"]
    assert rows
    for row in rows:
        assert row.detail.startswith(("counter", "integrated power", "estimate", "not measured"))
        assert row.state == "ok" or row.advice


def test_the_processor_is_described() -> None:
    cpu = next(finding for finding in diagnose({}) if finding.area == "devices" and finding.name == "cpu")
    assert "cores usable" in cpu.detail
    assert "GiB of memory" in cpu.detail


def test_without_a_gpu_the_cpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = next(finding for finding in diagnose({}) if finding.area == "devices" and finding.name == "gpu")
    assert gpu.state == "note"
    assert "runs go to the CPU" in gpu.detail


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Arithmetic that torch emulates does not count: runs in bf16 are refused there."""

    class Properties:
        name = "NVIDIA H100"
        uuid = "11-22"
        total_memory = 80 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    gpu = by_name(diagnose({}))["gpu 0"]
    assert gpu.detail.startswith("NVIDIA H100, GPU-11-22, 80 GiB, CUDA ")
    assert gpu.detail.endswith(", bf16" if native else ", no bf16 (use precision fp16 or no)")


def test_without_a_data_folder_only_the_embedded_set_is_there() -> None:
    found = by_name(diagnose({}))
    assert "cifar10" not in found
    assert "GREENPRUNE_DATA is not set" in found["folder"].detail


def test_data_sets_are_found_by_their_files(tmp_path: Path) -> None:
    for file in ("train", "test", "meta"):
        path = tmp_path / "cifar-100-python" / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = by_name(diagnose({"GREENPRUNE_DATA": str(tmp_path)}))
    assert set(DATASETS) <= set(found)
    assert found["cifar100"].state == "ok"
    assert found["cifar10"].state == "missing"
    assert "data.download" in (found["cifar10"].advice or "")
    assert found["image_folder"].state == "missing"
    assert "data.download" not in (found["image_folder"].advice or "")
    assert not found["cifar10"].needed


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "not logged in"),
        ({"WANDB_API_KEY": SECRET}, ", logged in"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": SECRET}, "offline by WANDB_MODE"),
    ],
)
def test_wandb_is_told_without_the_key(environment: dict[str, str], said: str) -> None:
    findings = diagnose(environment)
    assert said in _tracker(findings).detail
    assert SECRET not in repr(findings)


def _tracker(findings: list[Finding]) -> Finding:
    return next(finding for finding in findings if finding.area == "trackers")


def test_a_key_in_netrc_counts(tmp_path: Path) -> None:
    path = tmp_path / ".netrc"
    path.write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    path.chmod(0o600)
    assert ", logged in" in _tracker(diagnose({"HOME": str(tmp_path)})).detail
    assert ", logged in" in _tracker(diagnose({"NETRC": str(path)})).detail
    other = _tracker(diagnose({"NETRC": str(path), "WANDB_BASE_URL": "https://wandb.example.org"}))
    assert "not logged in" in other.detail


def test_a_missing_package_is_named_and_makes_the_machine_unfit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    findings = diagnose({})
    found = by_name(findings)
    assert found["safetensors"].state == "missing"
    assert found["safetensors"].advice is not None
    assert found["safetensors"].advice.startswith("pip install 'safetensors>=")
    assert not is_fit(findings)
    assert "not done" in found["other checks"].detail


@pytest.mark.parametrize(
    ("version", "state", "detail", "advice"),
    [
        ("0.19.8", "ok", "0.19.8", "launch with a file launch/deepspeed_*.yaml"),
        ("0.9.1", "note", "0.9.1 is older than 0.18.6", "pip install 'greenprune[deepspeed]'"),
        (None, "note", "not installed", "pip install 'greenprune[deepspeed]'"),
    ],
)
def test_deepspeed_is_described_and_not_needed(
    monkeypatch: pytest.MonkeyPatch, version: str | None, state: str, detail: str, advice: str
) -> None:
    real = importlib.metadata.version

    def find(name: str) -> str:
        if name != "deepspeed":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    findings = diagnose({})
    deepspeed = by_name(findings)["deepspeed"]
    assert (deepspeed.state, deepspeed.detail) == (state, detail)
    assert deepspeed.advice is not None
    assert advice in deepspeed.advice
    assert is_fit(findings)


def test_an_old_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.13.1+cu117" if name == "torch" else real(name))
    torch_finding = by_name(diagnose({}))["torch"]
    assert torch_finding.state == "missing"
    assert "1.13.1+cu117 is older than 2." in torch_finding.detail


def test_a_codecarbon_whose_reads_block_training_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pyproject.toml as it is: the metadata is that of the last installation."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (required,) = re.findall(r'"(codecarbon>=[^"]*)"', text)
    requires, version = importlib.metadata.requires, importlib.metadata.version
    lines = [line for line in requires("greenprune") or [] if not line.startswith("codecarbon")]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*lines, required])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.3.1" if name == "codecarbon" else version(name))
    findings = diagnose({})
    codecarbon = by_name(findings)["codecarbon"]
    assert (codecarbon.state, codecarbon.detail) == ("missing", "3.3.1 is older than 3.3.2")
    assert codecarbon.advice == "pip install --upgrade 'codecarbon>=3.3.2'"
    assert not is_fit(findings)


def test_a_torch_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def load(name: str) -> ModuleType:
        if name == "torch":
            raise OSError("libcudart.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", load)
    findings = diagnose({})
    assert "libcudart.so" in by_name(findings)["torch import"].detail
    assert not is_fit(findings)


def test_an_output_folder_that_cannot_be_written_makes_the_machine_unfit() -> None:
    Path("runs").write_text("a file in the way")
    findings = diagnose({})
    assert by_name(findings)["runs/"].state == "missing"
    assert not is_fit(findings)


def test_a_disk_that_is_nearly_full_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 2**20))
    finding = by_name(diagnose({}))["runs/"]
    assert (finding.state, finding.detail) == ("note", "writable, 3 MiB free")
    assert "make room" in finding.advice


def test_findings_are_printed_with_their_advice(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [
        Finding("software", "torch", "ok", "2.14", needed=True),
        Finding("data", "cifar10", "missing", "no files [in] it", "put it there"),
    ]
    print_findings(findings)
    text = capsys.readouterr().out
    assert "missing  cifar10  no files [in] it" in text
    assert "-> put it there" in text
    assert "ready to train" in text
    assert "\x1b" not in text
    print_findings([Finding("software", "torch", "missing", "not installed", needed=True)])
    assert "not ready" in capsys.readouterr().out
