"""What only a GPU can show of the library and of exported networks: python -m pytest -m gpu tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import BATCH, CLASSES, FAMILIES
from torch.nn import functional

from greenprune import BudgetConfig, GateConfig, Pruner, RemovalConfig
from greenprune.export import benchmark_inference, export_network

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """What products of fp32 matrices are made of: "high" is TF32 on a GPU that has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_transformers_are_pruned_with_either_precision_of_products(name: str, precision: str) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    model, images = family.build().cuda(), family.images().cuda()
    labels = torch.arange(BATCH, device="cuda") % CLASSES
    pruner = Pruner(
        model,
        images,
        total_steps=20,
        gate=GateConfig(units=["block"]),
        budget=BudgetConfig(target=0.6),
        removal=RemovalConfig(window=2),
    )
    optimizer = torch.optim.AdamW(pruner.parameter_groups(batch_size=BATCH), lr=0.001)
    for _ in range(20):
        loss = functional.cross_entropy(model(images), labels) + pruner.penalty()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        pruner.step(optimizer)
    pruner.finalize(optimizer)
    assert pruner.report()["kept_cost"] <= 0.6
    assert torch.get_float32_matmul_precision() == precision
    assert loss.isfinite()


@pytest.mark.parametrize(("name", "kind"), [("swin", "torch.export"), ("cifar-a", "safetensors")])
def test_exported_networks_are_measured_on_the_cpu_and_on_the_gpu(name: str, kind: str, tmp_path: Path) -> None:
    """A program of torch.export holds the device it was traced on; swin makes tensors of its own there."""
    family = FAMILIES[name]
    exported = export_network(family.build().eval(), family.images(), kind, tmp_path / "out")
    report = benchmark_inference([exported.path], batch_size=64, turns=3, trust=True)
    on_cpu, on_gpu = report.comparisons
    assert torch.cuda.get_device_name(0) in on_gpu.engine
    for (cost,) in (on_cpu.costs, on_gpu.costs):
        assert 0 < 1 / cost.images_per_s < cost.latency_s
    gpu = [name for name in on_gpu.costs[0].energy_by_device if name.startswith("GPU-")]
    assert len(gpu) == 1
    joules = on_gpu.costs[0].energy_by_device[gpu[0]].energy_j_per_1000
    assert joules is not None
    # Tens to hundreds of watts, for as long as 1,000 images take.
    assert 20 < joules / (1000 / on_gpu.costs[0].images_per_s) < 1000
