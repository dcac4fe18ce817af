"""Removal: exactly what the masked network computed, and nothing left of the unit, in the optimizer neither."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import distribute_module
from torch.nn import functional
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from greenprune.config import Config, GateConfig, OptimConfig
from greenprune.gating import find_gates, gate_parameters, take_decisions
from greenprune.models import ResidualBlock, residual_blocks
from greenprune.optimization import build_optimizer, build_schedule
from greenprune.surgery import Surgeon, refuse_wrapped, update_optimizer

MakeNetwork = Callable[..., nn.Module]
Record = dict[nn.Parameter, Any]

NETWORKS = [  # name, shortcut, stem, image size, blocks
    pytest.param("resnet20", "A", "auto", 8, 9, id="resnet20-A"),
    pytest.param("resnet20", "B", "auto", 8, 9, id="resnet20-B"),
    pytest.param("resnet18", "A", "small", 16, 8, id="resnet18-small-stem"),
    pytest.param("resnet50", "A", "imagenet", 32, 16, id="resnet50"),
]
BATCH = 4


def batch_of(image_size: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 3, image_size, image_size, generator=generator), torch.arange(BATCH)


def remove_block(model: nn.Module, name: str) -> None:
    Surgeon(model).remove_block(name)


def freeze_block(model: nn.Module, name: str) -> None:
    Surgeon(model).freeze_block(name)


def mask_unit(model: nn.Module, name: str) -> None:
    gate = model.get_submodule(name).gate
    if gate.weight is not None:
        nn.init.zeros_(gate.weight)
    nn.init.constant_(gate.bias, -100.0)


def spread_gates(model: nn.Module) -> None:
    """Gates that look at their input, and norms with a history: nothing is at its initial value."""
    for parameter in gate_parameters(model):
        if parameter.ndim > 1:
            nn.init.normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(images)
    loss = functional.cross_entropy(logits, labels)
    gates = list(find_gates(model).values())
    if gates and model.training:
        rates, _ = take_decisions(gates)
        loss = loss + 0.02 * rates.sum()
    return logits.detach(), loss


def passes(model: nn.Module, images: Tensor, labels: Tensor, *, train_first: bool) -> tuple[Tensor, Tensor, Record]:
    """Logits in training and evaluation, and the gradients of the task in training."""

    def training() -> tuple[Tensor, Record]:
        model.train().zero_grad()
        logits = model(images)
        functional.cross_entropy(logits, labels).backward()
        return logits.detach(), {parameter: parameter.grad.clone() for parameter in model.parameters()}

    def evaluation() -> Tensor:
        with torch.no_grad():
            return model.eval()(images)

    if train_first:
        (trained, gradients), evaluated = training(), evaluation()
    else:
        evaluated, (trained, gradients) = evaluation(), training()
    return trained, evaluated, gradients


def relative_difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / one.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize(("name", "shortcut", "stem", "size", "blocks"), NETWORKS)
def test_a_network_without_a_unit_computes_what_it_computed_with_the_unit_off(
    make_network: MakeNetwork, name: str, shortcut: str, stem: str, size: int, blocks: int
) -> None:
    dense = make_network(name, shortcut=shortcut, stem=stem, image_size=size)
    spread_gates(dense)
    images, labels = batch_of(size)
    whole = dense.eval()(images).detach()
    units = list(residual_blocks(dense))
    assert len(units) == blocks
    for unit in units:
        model = copy.deepcopy(dense)
        mask_unit(model, unit)
        # The training pass moves the norms' statistics, so the evaluations lie on the same side of it.
        trained, evaluated, gradients = passes(model, images, labels, train_first=True)
        assert relative_difference(evaluated, whole) > 1e-4  # the unit mattered
        gone = set(model.get_submodule(unit).branch.parameters()) | set(model.get_submodule(unit).gate.parameters())
        remove_block(model, unit)
        trained_without, evaluated_without, gradients_without = passes(model, images, labels, train_first=False)
        assert relative_difference(trained, trained_without) <= 1e-6, unit
        assert relative_difference(evaluated, evaluated_without) <= 1e-6, unit
        assert gradients.keys() - gradients_without.keys() == gone, unit
        for parameter, gradient in gradients_without.items():
            assert relative_difference(gradients[parameter], gradient) <= 1e-5, unit


@pytest.mark.parametrize("training", [True, False])
def test_what_is_left_of_a_unit_is_in_the_networks_mode(make_network: MakeNetwork, training: bool) -> None:
    model = make_network(shortcut="B").train(training)
    for unit in list(residual_blocks(model)):
        remove_block(model, unit)
    assert {module.training for module in model.modules()} == {training}


def test_a_frozen_norm_of_a_shortcut_stays_frozen(make_network: MakeNetwork) -> None:
    model = make_network(shortcut="B").train()
    frozen = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name in frozen:
        model.get_submodule(name).eval()
    block = next(name for name, found in residual_blocks(model).items() if not isinstance(found.shortcut, nn.Identity))
    Surgeon(model).remove_block(block)
    rest = model.get_submodule(block)
    assert rest.training
    norms = [module for module in rest.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_a_unit_with_an_identity_shortcut_leaves_nothing(make_network: MakeNetwork) -> None:
    model = make_network()
    remove_block(model, "stages.0.1")
    x = torch.randn(2, 16, 8, 8)
    left = model.get_submodule("stages.0.1")
    assert left(x) is x
    assert list(left.parameters()) == list(left.buffers()) == []


def test_a_unit_whose_input_is_not_activated_leaves_its_activation() -> None:
    block = ResidualBlock(nn.Conv2d(2, 2, 1), nn.Identity(), nn.ReLU(), input_activated=False)
    model = nn.Sequential(block)
    remove_block(model, "0")
    x = torch.randn(2, 2, 3, 3)
    assert torch.equal(model(x), x.relu())


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_whole_stage_and_a_whole_network_can_be_removed(make_network: MakeNetwork, shortcut: str) -> None:
    model = make_network(shortcut=shortcut)
    images, _ = batch_of(8)
    for stage in ("stages.1", "stages.0", "stages.2"):
        units = [unit for unit in residual_blocks(model) if unit.startswith(stage)]
        assert len(units) == 3
        for unit in units:
            mask_unit(model, unit)
        masked = model.eval()(images)
        for unit in units:
            remove_block(model, unit)
        assert relative_difference(masked, model.eval()(images)) <= 1e-6
    assert residual_blocks(model) == find_gates(model) == {}
    model.train()(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_order_of_removals_does_not_matter(make_network: MakeNetwork) -> None:
    one = make_network(shortcut="B")
    other = copy.deepcopy(one)
    units = ["stages.0.0", "stages.1.0", "stages.2.1"]
    for model, order in ((one, units), (other, units[::-1])):
        for unit in order:
            remove_block(model, unit)
    assert list(one.state_dict()) == list(other.state_dict())


# What is refused.


@pytest.mark.parametrize("name", ["stages.0.7", "nothing", "", "stages", "stages.0.1.branch", "head"])
@pytest.mark.parametrize("operate", [remove_block, freeze_block])
def test_an_unknown_unit_is_refused_and_nothing_changed(
    make_network: MakeNetwork, operate: Callable[[nn.Module, str], None], name: str
) -> None:
    model = make_network()
    before = list(model.state_dict())
    with pytest.raises(KeyError, match="no unit"):
        operate(model, name)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("unit", ["stages.0.1", "stages.1.0"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_a_unit_is_removed_once(make_network: MakeNetwork, unit: str, shortcut: str) -> None:
    model = make_network(shortcut=shortcut)
    remove_block(model, unit)
    for operate in (remove_block, freeze_block):
        with pytest.raises(KeyError, match=unit):
            operate(model, unit)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, DataParallel, torch.compile], ids=["ddp", "dp", "compile"])
def test_a_wrapped_network_is_refused(make_network: MakeNetwork, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = make_network()
    wrapped = wrap(model)
    prefix = next(name for name, _ in wrapped.named_children())
    for operate in (remove_block, freeze_block):
        for unit in ("stages.0.1", f"{prefix}.stages.0.1"):
            with pytest.raises(TypeError, match=f"unwrapped network, not {type(wrapped).__name__}"):
                operate(wrapped, unit)
    with pytest.raises(TypeError):
        refuse_wrapped(wrapped)
    assert len(find_gates(model)) == 9


@pytest.mark.usefixtures("process_group")
def test_a_sharded_network_is_refused(make_network: MakeNetwork) -> None:
    model = make_network()
    distribute_module(model, init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"whole parameters, and 'stem\.0\.weight' is sharded"):
        remove_block(model, "stages.0.1")


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP")  # one process has nothing to share
@pytest.mark.parametrize("own", [True, False], ids=["parameters of their own", "one flat parameter"])
def test_a_network_inside_of_a_sharding_wrapper_is_refused(make_network: MakeNetwork, own: bool) -> None:
    """Its blocks are there as they were, but their parameters are pieces of the wrapper's."""
    model = make_network()
    FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=own)
    with pytest.raises(TypeError, match=r"whole parameters, and '.*' is sharded \(by FullyShardedDataParallel\)"):
        remove_block(model, "stages.0.1")


# Freezing.


def test_a_frozen_unit_stays_and_loses_its_gate(make_network: MakeNetwork) -> None:
    model = make_network()
    images, _ = batch_of(8)
    open_everywhere = model.eval()(images)
    freeze_block(model, "stages.1.1")
    freeze_block(model, "stages.1.1")  # nothing happens
    assert "stages.1.1" in residual_blocks(model)
    assert "stages.1.1" not in find_gates(model)
    assert not any(key.startswith("stages.1.1.gate") for key in model.state_dict())
    assert relative_difference(open_everywhere, model(images)) <= 1e-6


def test_a_frozen_unit_can_be_removed(make_network: MakeNetwork) -> None:
    model = make_network()
    freeze_block(model, "stages.1.1")
    remove_block(model, "stages.1.1")
    assert len(residual_blocks(model)) == 8


# The optimizer.

STEPS = 20


def config_of(name: str) -> Config:
    return Config(optim=OptimConfig(name=name, lr=0.05, warmup=0.1), gate=GateConfig(lr=0.5))  # type: ignore[arg-type]


def train_steps(model: nn.Module, optimizer: Optimizer, steps: range, schedule: Any = None) -> None:
    for seed in steps:
        optimizer.zero_grad()
        loss_of(model.train(), *batch_of(8, seed))[1].backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


def operate(model: nn.Module, optimizer: Optimizer, units: list[str], freeze: list[str]) -> None:
    surgeon = Surgeon(model)
    for unit in units:
        surgeon.remove_block(unit)
    for unit in freeze:
        surgeon.freeze_block(unit)
    update_optimizer(optimizer, surgeon)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_survivors_optimizer_state_is_untouched_and_the_rest_forgotten(
    make_network: MakeNetwork, name: str
) -> None:
    model = make_network(shortcut="B")
    optimizer = build_optimizer(config_of(name), model, STEPS)
    train_steps(model, optimizer, range(3))
    groups = [list(group["params"]) for group in optimizer.param_groups]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    tensors = {p: dict(optimizer.state[p]) for group in groups for p in group}
    values = copy.deepcopy({id(p): state for p, state in tensors.items()})
    table = optimizer.state

    operate(model, optimizer, ["stages.0.1", "stages.1.0"], ["stages.2.2"])

    alive = list(model.parameters())
    assert optimizer.state is table
    assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == options
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        expected = [parameter for parameter in before if any(parameter is p for p in alive)]
        assert [id(p) for p in group["params"]] == [id(p) for p in expected]
    assert {id(p) for p in optimizer.state} == {id(p) for p in alive}
    for parameter in alive:
        assert optimizer.state[parameter].keys() == tensors[parameter].keys()
        for key, tensor in optimizer.state[parameter].items():
            assert tensor is tensors[parameter][key]
            if tensor is not None:
                assert torch.equal(tensor, values[id(parameter)][key])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("steps_after", [1, 3])
def test_training_goes_on_as_that_of_the_masked_network(make_network: MakeNetwork, name: str, steps_after: int) -> None:
    units = ["stages.0.2", "stages.2.0"]
    # A conditional gate sends a straight-through gradient to its input, even while it is off.
    masked = make_network(shortcut="B", kind="static")
    for unit in units:
        mask_unit(masked, unit)
    optimizer = build_optimizer(config_of(name), masked, STEPS)
    train_steps(masked, optimizer, range(3))
    pruned, pruned_optimizer = copy.deepcopy((masked, optimizer))
    names = {parameter: key for key, parameter in pruned.named_parameters()}
    operate(pruned, pruned_optimizer, units, [])
    train_steps(masked, optimizer, range(3, 3 + steps_after))
    train_steps(pruned, pruned_optimizer, range(3, 3 + steps_after))
    expected = dict(masked.named_parameters())
    survivors = list(pruned.parameters())
    assert len(survivors) == len(expected) - 2 * (6 + 1)
    for parameter in survivors:
        torch.testing.assert_close(parameter, expected[names[parameter]], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_optimizer_steps_on_when_no_gate_is_left(make_network: MakeNetwork, name: str) -> None:
    model = make_network()
    optimizer = build_optimizer(config_of(name), model, STEPS)
    schedule = build_schedule(config_of(name), optimizer, STEPS)
    train_steps(model, optimizer, range(3), schedule)
    operate(model, optimizer, ["stages.0.1"], [unit for unit in find_gates(model) if unit != "stages.0.1"])
    assert [len(group["params"]) for group in optimizer.param_groups][2] == 0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_steps(model, optimizer, range(3, 5), schedule)
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(moved)


def test_the_learning_rate_goes_on_through_a_removal(make_network: MakeNetwork) -> None:
    model = make_network()
    optimizer = build_optimizer(config_of("sgd"), model, STEPS)
    schedule = build_schedule(config_of("sgd"), optimizer, STEPS)
    untouched = build_optimizer(config_of("sgd"), make_network(), STEPS)
    reference = build_schedule(config_of("sgd"), untouched, STEPS)
    for step in range(6):
        train_steps(model, optimizer, range(step, step + 1), schedule)
        untouched.step()
        reference.step()
        if step == 2:
            operate(model, optimizer, ["stages.0.1"], ["stages.0.2"])
        assert [group["lr"] for group in optimizer.param_groups] == reference.get_last_lr()


def test_an_optimizer_that_never_stepped_forgets_too(make_network: MakeNetwork) -> None:
    model = make_network()
    optimizer = build_optimizer(config_of("sgd"), model, STEPS)
    operate(model, optimizer, ["stages.0.1"], [])
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(model.parameters())
    train_steps(model, optimizer, range(1))
    assert len(optimizer.state) == len(list(model.parameters()))
