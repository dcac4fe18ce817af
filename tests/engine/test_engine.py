"""The engine on one process: what it takes over, and what a rebuild leaves as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from greenprune.config import Config, ConfigError, GateConfig, OptimConfig, UserError
from greenprune.engine import Engine
from greenprune.gating import attach_gates, find_gates, take_decisions
from greenprune.optimization import build_optimizer, build_schedule
from greenprune.surgery import Surgeon, update_optimizer

MakeNetwork = Callable[..., nn.Module]
MakeEngine = Callable[[Config], Engine]
CONFIG = Config(device="cpu", optim=OptimConfig(lr=0.05, warmup=0.0), gate=GateConfig(lr=0.5))
UNITS = ["stages.0.1", "stages.1.0", "stages.1.2", "stages.2.2", "stages.0.0"]


def forget_process_state() -> None:
    """Accelerate keeps precision and device for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    forget_process_state()
    made: list[Engine] = []

    def make(config: Config) -> Engine:
        made.append(Engine(config))
        return made[-1]

    yield make
    for engine in made:
        engine.finish()
    forget_process_state()


def removal_of(*units: str) -> Callable[[nn.Module, Optimizer], None]:
    def operate(model: nn.Module, optimizer: Optimizer) -> None:
        surgeon = Surgeon(model)
        for unit in units:
            surgeon.remove_block(unit)
        update_optimizer(optimizer, surgeon)

    return operate


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)


def train_step(engine: Engine, seed: int) -> float:
    images, labels = batch(seed)
    logits = engine.model(images)
    assert logits.dtype == torch.float32
    loss = functional.cross_entropy(logits, labels)
    gates = list(find_gates(engine.module).values())
    if gates:
        loss = loss + 0.01 * take_decisions(gates)[0].sum()
    engine.backward(loss)
    engine.step()
    return loss.item()


def wrappers_of(forward: object) -> int:
    """How many times a forward method is wrapped."""
    depth = 0
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        depth += 1
    return depth


def nodes_of(tensor: Tensor) -> int:
    """Size of the autograd graph behind a tensor."""
    seen, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return len(seen)


def test_one_process_is_the_whole_run(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    assert (engine.rank, engine.world_size, engine.is_main) == (0, 1, True)
    assert engine.device.type == "cpu"
    values = torch.tensor([1.0, 2.0])
    assert engine.mean(values) is values
    assert engine.sum(values) is values
    assert values.tolist() == [1.0, 2.0]
    item = {"a": object()}
    assert engine.gather_objects(item) == [item]
    assert engine.from_main(item) is item
    engine.check_agreement("the structure", "abc")
    engine.wait()
    engine.synchronize()
    assert engine.scaler_state() is None
    engine.load_scaler_state(None)
    with engine.local_main_first():
        pass


def test_half_precision_is_refused_on_a_cpu(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"^precision: 'fp16' is not valid on a CPU; expected no or bf16"):
        make_engine(replace(CONFIG, precision="fp16"))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_through_the_engine_is_plain_training(
    make_network: MakeNetwork, make_engine: MakeEngine, name: str
) -> None:
    config = replace(CONFIG, optim=OptimConfig(name=name, lr=0.05, warmup=0.0))  # type: ignore[arg-type]
    model = make_network()
    plain = copy.deepcopy(model)
    engine = make_engine(config)
    engine.prepare(model, build_optimizer(config, model, 20))
    assert engine.module is model
    optimizer = build_optimizer(config, plain, 20)
    for seed in range(3):
        train_step(engine, seed)
        images, labels = batch(seed)
        optimizer.zero_grad()
        loss = functional.cross_entropy(plain(images), labels)
        rates, _ = take_decisions(list(find_gates(plain).values()))
        (loss + 0.01 * rates.sum()).backward()
        optimizer.step()
    for one, other in zip(engine.module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_leaves_no_gradient(make_network: MakeNetwork, make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    model = make_network()
    engine.prepare(model, build_optimizer(CONFIG, model, 20))
    train_step(engine, 0)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(("clip_norm", "length"), [(1e-3, 1e-3), (1e6, None), (None, None)])
def test_the_whole_gradient_is_clipped(
    make_network: MakeNetwork, make_engine: MakeEngine, clip_norm: float | None, length: float | None
) -> None:
    optim = OptimConfig(lr=1.0, momentum=0.0, weight_decay=0.0, warmup=0.0, clip_norm=clip_norm)
    config = replace(CONFIG, optim=optim, gate=GateConfig(enabled=False))
    model = make_network(kind=None)
    engine = make_engine(config)
    engine.prepare(model, build_optimizer(config, model, 20))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train_step(engine, 0)
    moved = torch.stack(
        [(new - old).norm() for new, old in zip(model.parameters(), before, strict=True)]
    ).norm()  # with a rate of 1, the length of the gradient used
    if length is None:
        assert moved.item() > 0.01
    else:
        assert moved.item() == pytest.approx(length, rel=1e-2)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_rebuilding_keeps_what_must_stay(make_network: MakeNetwork, make_engine: MakeEngine, precision: str) -> None:
    config = replace(CONFIG, precision=precision)  # type: ignore[arg-type]
    model = make_network()
    optimizer = build_optimizer(config, model, 20)
    schedule = build_schedule(config, optimizer, 20)
    engine = make_engine(config)
    engine.prepare(model, optimizer)
    images, _ = batch(0)
    depth = wrappers_of(engine.model.forward)
    assert (depth > 0) == (precision == "bf16")
    for rebuild, unit in enumerate(UNITS):
        train_step(engine, rebuild)
        schedule.step()
        survivors = {p: optimizer.state[p]["momentum_buffer"] for p in model.parameters()}
        engine.rebuild(removal_of(unit))
        assert engine.module is model
        assert engine.optimizer is optimizer
        assert set(optimizer.state) == set(model.parameters())
        assert all(optimizer.state[p]["momentum_buffer"] is survivors[p] for p in model.parameters())
        assert wrappers_of(engine.model.forward) == depth
        assert [engine._accelerator.unwrap_model(m, keep_fp32_wrapper=True) for m in engine._accelerator._models] == [
            model
        ]
        assert len(engine._accelerator._optimizers) == 1
        assert engine.model(images).dtype == torch.float32
        take_decisions(list(find_gates(model).values()))
        assert engine.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
    assert len(find_gates(model)) == 9 - len(UNITS)
    train_step(engine, 9)


def test_a_rebuilt_network_still_computes_in_its_precision(make_network: MakeNetwork, make_engine: MakeEngine) -> None:
    config = replace(CONFIG, precision="bf16")
    model = make_network()
    engine = make_engine(config)
    engine.prepare(model, build_optimizer(config, model, 20))
    seen = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    images, _ = batch(0)
    for unit in UNITS:
        engine.rebuild(removal_of(unit))
        engine.model(images)
        engine.module.eval()(images)  # evaluation calls the module itself
        engine.module.train()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 2 * len(UNITS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_rebuild_that_changes_nothing_changes_nothing(make_network: MakeNetwork, make_engine: MakeEngine) -> None:
    config = replace(CONFIG, precision="bf16")
    engine = make_engine(config)
    model = make_network()
    engine.prepare(model, build_optimizer(config, model, 20))
    for seed in range(2):
        train_step(engine, seed)
    images, _ = batch(7)
    before, size = engine.model(images), nodes_of(engine.model(images))
    for _ in range(5):
        engine.rebuild(removal_of())
    assert torch.equal(engine.model(images), before)
    assert nodes_of(engine.model(images)) == size


def test_a_network_without_gates_trains_on_after_a_rebuild(make_network: MakeNetwork, make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    model = make_network()
    engine.prepare(model, build_optimizer(CONFIG, model, 20))
    train_step(engine, 0)

    def freeze_all(inner: nn.Module, optimizer: Optimizer) -> None:
        surgeon = Surgeon(inner)
        for unit in find_gates(inner):
            surgeon.freeze_block(unit)
        update_optimizer(optimizer, surgeon)

    engine.rebuild(freeze_all)
    losses = [train_step(engine, 1) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_no_gradient_outlives_a_rebuild(make_network: MakeNetwork, make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    model = make_network()
    engine.prepare(model, build_optimizer(CONFIG, model, 20))
    engine.backward(engine.model(batch(0)[0]).sum())
    take_decisions(list(find_gates(model).values()))
    engine.rebuild(removal_of("stages.0.1"))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("prepared", [True, False])
def test_an_engine_can_be_finished_at_any_time(
    make_network: MakeNetwork, make_engine: MakeEngine, prepared: bool
) -> None:
    engine = make_engine(CONFIG)
    if prepared:
        model = make_network()
        engine.prepare(model, build_optimizer(CONFIG, model, 20))
        train_step(engine, 0)
    engine.finish()
    engine.finish()
    assert not hasattr(engine, "model")


def test_another_run_in_the_same_process_has_its_own_precision(make_engine: MakeEngine) -> None:
    make_engine(CONFIG).finish()
    make_engine(replace(CONFIG, precision="bf16"))


def test_parts_of_a_batch_add_up_to_its_gradient(make_network: MakeNetwork, make_engine: MakeEngine) -> None:
    """With BatchNorm held still and no bound reached, two halves of a batch give one step of the whole."""
    config = replace(CONFIG, optim=OptimConfig(lr=0.05, warmup=0.0), gate=GateConfig(kind="static"))
    models = [make_network(kind=None)]
    # From every sample: of a half of four samples the first of every four would be another one than of the whole.
    attach_gates(models[0], replace(config.gate, every=1))
    models.append(copy.deepcopy(models[0]))
    engine = make_engine(config)
    for parts, model in zip((1, 2), models, strict=True):
        engine.prepare(model, build_optimizer(config, model, 20))
        model.eval()
        for gate in find_gates(model).values():
            gate.parts = parts
        images, labels = batch(0)
        for number, (part, targets) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
            with engine.accumulating(last=number + 1 == parts):
                engine.backward(functional.cross_entropy(engine.model(part), targets) / parts)
        engine.step()
        engine.release()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_loss_scale_survives_a_removal(make_network: MakeNetwork, make_engine: MakeEngine) -> None:
    """torch's own scaler on the CPU, where Accelerate makes none: what it has learnt outlives a rebuild."""
    engine = make_engine(CONFIG)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    engine._accelerator.scaler = scaler
    model = make_network()
    optimizer = build_optimizer(CONFIG, model, 20)
    engine.prepare(model, optimizer)
    train_step(engine, 0)
    scale = engine.loss_scale
    assert scale is not None
    assert scale.item() == 1024.0
    for _ in range(2):
        train_step(engine, 1)
    assert scale.item() == 2048.0  # grown after two good steps
    engine.rebuild(removal_of("stages.0.1"))
    train_step(engine, 2)
    assert engine.loss_scale is scale
    assert scaler.state_dict()["_growth_tracker"] == 0
    assert scale.item() == 4096.0  # the steps before the removal count
    before = [parameter.detach().clone() for parameter in model.parameters()]
    engine.backward(engine.model(batch(3)[0]).sum() * float("inf"))
    engine.step()
    assert scale.item() == 2048.0
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    state = engine.scaler_state()
    assert state is not None
    assert state["scale"] == 2048.0


def test_synchronised_batch_norm_needs_gpus(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^model\.sync_batchnorm: True is not valid on CPUs"):
        make_engine(replace(CONFIG, model=replace(CONFIG.model, sync_batchnorm=True)))


def test_sharded_weights_are_refused(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"^the launcher asks for FSDP, which shares out the weights"):
        make_engine(CONFIG)


def test_a_launcher_that_asks_for_the_cpu_gets_it_beside_a_gpu(
    make_engine: MakeEngine, make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a stand-in for a GPU, which must not be touched
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # accelerate launch --cpu
    config = replace(CONFIG, device="auto")
    engine = make_engine(config)
    model = make_network()
    engine.prepare(model, build_optimizer(config, model, 10))
    assert engine.device.type == "cpu"
    assert not engine.records
    engine.recorded(lambda images, labels: images.sum())


def test_a_loss_is_divided_by_what_the_config_says_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ConfigError, match=r"^ACCELERATE_GRADIENT_ACCUMULATION_STEPS: '4' .* in optim.accumulate$"):
        make_engine(CONFIG)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # as accelerate launch hands it on by itself
    make_engine(CONFIG)


def test_synchronised_batch_norm_loses_channels_like_any_other(make_network: MakeNetwork) -> None:
    """On one process it computes what BatchNorm does; surgery finds and cuts it all the same."""
    plain = make_network(kind=None)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    for network in (plain, model):
        surgeon = Surgeon(network)
        surgeon.remove_channels("stages.1.1:hidden", [0, 3, 7])
        surgeon.remove_block("stages.0.1")
        network.eval()
    images, _ = batch(0)
    torch.testing.assert_close(model(images), plain(images))


def test_the_draws_of_a_step_come_again_with_the_states_of_the_generators(make_engine: MakeEngine) -> None:
    engine = make_engine(CONFIG)
    states = engine.random_states()
    drawn = torch.rand(5)
    engine.load_random_states(states)
    assert torch.equal(torch.rand(5), drawn)
    engine.load_random_states([states[0], torch.arange(16, dtype=torch.uint8)])  # of a run that was on a GPU
    assert torch.equal(torch.rand(5), drawn)
