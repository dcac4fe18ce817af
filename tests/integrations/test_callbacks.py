"""The callbacks, inside the real Trainers of Lightning and transformers, on handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from greenprune import BudgetConfig, GateConfig, Pruner, RemovalConfig, UserError
from greenprune.gating import gate_parameters
from greenprune.models import CifarResNet

BATCH, BATCHES, EPOCHS = 50, 12, 4


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
    return images[: BATCH * BATCHES], torch.tensor(data.target)[: BATCH * BATCHES]


def prune(model: nn.Module, images: Tensor, units: list[str]) -> Pruner:
    gate, budget = GateConfig(units=units), BudgetConfig(target=0.6)  # type: ignore[arg-type]
    removal = RemovalConfig(decide_by=0.6)
    return Pruner(model, images[:2], total_steps=EPOCHS * BATCHES, gate=gate, budget=budget, removal=removal)


def check_outcome(pruner: Pruner, optimizer: torch.optim.Optimizer, model: nn.Module, images: Tensor) -> None:
    report = pruner.report()
    assert report["gates_left"] == 0
    assert gate_parameters(model) == []
    assert 0.5 < report["kept_cost"] <= 0.6
    assert report["removed_blocks"] or report["removed_channels"]
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(model.parameters())
    assert set(optimizer.state) <= held
    output = model.eval()(images[:3])
    assert getattr(output, "logits", output).shape == (3, 10)


def check_gates_lr(pruner: Pruner, optimizer: torch.optim.Optimizer, accumulate: int) -> None:
    """Steps that are fewer and of more samples: the gates learn faster in each."""
    (gates,) = [group for group in optimizer.param_groups if group.get("name") == "gates"]
    assert gates["lr"] == pruner.gate.lr_of_step(pruner.total_steps / accumulate, 128 * accumulate, adaptive=False)


def lightning_module(pruner: Pruner, look: Callable[[Any], object] = lambda _: None) -> Any:
    """A module of the pruner's network that keeps its losses, and is looked at in every training step."""
    pl = pytest.importorskip("lightning.pytorch")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = pruner.model
            self.losses: list[float] = []

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss = functional.cross_entropy(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            look(self)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(pruner.parameter_groups(), lr=0.05, momentum=0.9)

    return Module()


def lightning_trainer(*callbacks: Any, **options: Any) -> Any:
    pl = pytest.importorskip("lightning.pytorch")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=list(callbacks), **quiet, **options)


@pytest.mark.filterwarnings("ignore")  # Lightning advises on workers and loggers
@pytest.mark.parametrize("accumulate", [1, 3])
def test_lightning_trains_a_smaller_network(digits: tuple[Tensor, Tensor], tmp_path: Path, accumulate: int) -> None:
    pytest.importorskip("lightning.pytorch")
    from greenprune.integrations.lightning import PrunerCallback

    images, labels = digits
    model = CifarResNet(20, 10, channels=1)
    pruner = prune(model, images, ["block", "channel"])

    module = lightning_module(pruner)
    trainer = lightning_trainer(PrunerCallback(pruner), accumulate_grad_batches=accumulate, default_root_dir=tmp_path)
    trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=BATCH, shuffle=True))
    check_outcome(pruner, trainer.optimizers[0], model, images)
    check_gates_lr(pruner, trainer.optimizers[0], accumulate)
    assert sum(module.losses[-5:]) < sum(module.losses[:5])
    (saved,) = tmp_path.rglob("*.ckpt")
    state = torch.load(saved, weights_only=True)["callbacks"]["PrunerCallback"]
    fresh = prune(CifarResNet(20, 10, channels=1), images, ["block", "channel"])
    fresh.load_state_dict(state)
    assert fresh.report() == pruner.report()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("epoch", [0, 1], ids=["before a removal", "after one"])
def test_lightning_goes_on_from_a_checkpoint(digits: tuple[Tensor, Tensor], tmp_path: Path, epoch: int) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from greenprune.integrations.lightning import PrunerCallback

    images, labels = digits

    def fit(ckpt_path: Path | None) -> tuple[Pruner, list[float]]:
        torch.manual_seed(0)
        pruner = prune(CifarResNet(20, 10, channels=1), images, ["block", "channel"])
        module = lightning_module(pruner)
        saving = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = lightning_trainer(PrunerCallback(pruner), saving)
        trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=BATCH), ckpt_path=ckpt_path)
        return pruner, module.losses

    whole, expected = fit(None)
    assert any(operation.step > BATCHES for operation in whole.structure.operations)
    resumed, losses = fit(tmp_path / f"epoch={epoch}.ckpt")
    assert losses == expected[(epoch + 1) * BATCHES :]
    assert resumed.structure == whole.structure
    assert resumed.report() == whole.report()


@pytest.mark.filterwarnings("ignore")
def test_a_fit_that_did_not_start_leaves_nothing_to_the_next(digits: tuple[Tensor, Tensor]) -> None:
    """A checkpoint's structure is taken up once: a second time nothing would be left to remove."""
    pytest.importorskip("lightning.pytorch")
    from greenprune.integrations.lightning import PrunerCallback

    done, fresh = (prune(CifarResNet(20, 10, channels=1), digits[0], ["block"]) for _ in range(2))
    assert done.finalize()
    callback, module, trainer = PrunerCallback(fresh), lightning_module(fresh), lightning_trainer()
    for _ in range(2):
        callback.setup(trainer, module, "fit")
    module.on_load_checkpoint({"callbacks": {callback.state_key: done.state_dict()}})
    assert fresh.report() == done.report()


class Mishap(Exception):
    """What goes wrong in the middle of a training."""


@pytest.mark.filterwarnings("ignore")
def test_lightning_can_fit_again_after_a_fit_that_failed(digits: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("lightning.pytorch")
    from greenprune.integrations.lightning import PrunerCallback

    images, labels = digits
    model = CifarResNet(20, 10, channels=1)
    pruner = prune(model, images, ["block"])
    callback, loader = PrunerCallback(pruner), DataLoader(TensorDataset(images, labels), batch_size=BATCH)
    failing = iter(range(3))

    def fail(_: object) -> None:
        if next(failing, None) is None:
            raise Mishap

    with pytest.raises(Mishap):
        lightning_trainer(callback, enable_checkpointing=False).fit(lightning_module(pruner, fail), loader)
    model.train()(images[:2])  # no part of a fit, and adds nothing
    trainer = lightning_trainer(callback, enable_checkpointing=False)
    before, module = pruner.batches, lightning_module(pruner)
    trainer.fit(module, loader)
    assert before == 4
    assert len(module.losses) == EPOCHS * BATCHES
    check_outcome(pruner, trainer.optimizers[0], model, images)


@pytest.mark.filterwarnings("ignore")
def test_lightning_may_accumulate_more_from_some_epoch_on(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from greenprune.integrations.lightning import PrunerCallback

    images, labels = digits
    pruner = prune(CifarResNet(20, 10, channels=1), images, ["block"])
    seen: list[tuple[int, int, int]] = []

    def look(module: Any) -> None:
        seen.append((module.current_epoch, pruner.accumulate, len(pruner.model._forward_hooks)))

    more_later = pl.callbacks.GradientAccumulationScheduler({2: 3})
    trainer = lightning_trainer(PrunerCallback(pruner), more_later, enable_checkpointing=False)
    loader = DataLoader(TensorDataset(images, labels), batch_size=BATCH)
    trainer.fit(lightning_module(pruner, look), loader)
    expected = {(epoch, 1 if epoch < 2 else 3, 1) for epoch in range(EPOCHS)}
    assert set(seen) == expected
    assert len(seen) == EPOCHS * BATCHES
    assert pruner.report()["gates_left"] == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
def test_lightning_with_averages_of_weights_is_refused(digits: tuple[Tensor, Tensor], name: str) -> None:
    """Their copies of the network keep what is removed, and would fail in the middle of the fit or at its end."""
    pl = pytest.importorskip("lightning.pytorch")
    from greenprune.integrations.lightning import PrunerCallback

    if not hasattr(pl.callbacks, name):
        pytest.skip(f"this Lightning has no {name}")
    images, labels = digits
    pruner = prune(CifarResNet(20, 10, channels=1), images, ["block"])
    averaging = getattr(pl.callbacks, name)(*([0.01] if name.startswith("Stochastic") else []))
    trainer = lightning_trainer(PrunerCallback(pruner), averaging, enable_checkpointing=False)
    with pytest.raises(UserError, match=f"callbacks: {name} is not valid with PrunerCallback"):
        trainer.fit(lightning_module(pruner), DataLoader(TensorDataset(images, labels), batch_size=BATCH))
    assert pruner.batches == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "bf16-true", "64-true"])
def test_lightning_in_another_precision_is_refused(digits: tuple[Tensor, Tensor], precision: str) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    from greenprune.integrations.lightning import PrunerCallback

    callback = PrunerCallback(prune(CifarResNet(20, 10, channels=1), digits[0], ["block"]))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.precision_plugin.precision = precision
    with pytest.raises(UserError, match=f"^precision: '{precision}' is not valid .* expected 32-true or bf16-mixed$"):
        callback.on_fit_start(trainer, pl.LightningModule())


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """A network in the form that transformers' Trainer expects."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 3])
def test_transformers_trains_a_smaller_network(digits: tuple[Tensor, Tensor], tmp_path: Path, accumulate: int) -> None:
    transformers = pytest.importorskip("transformers")
    from greenprune.integrations.transformers import PrunerCallback

    images, labels = digits
    network = CifarResNet(20, 10, channels=1)
    pruner = prune(network, images, ["block", "channel"])
    pruner.losses_are_divided_by(accumulate)
    optimizer = torch.optim.AdamW(pruner.parameter_groups(weight_decay=0.01, adaptive=True), lr=3e-3)
    trainer = transformers.Trainer(
        model=Classifier(network),
        args=arguments(transformers, tmp_path, gradient_accumulation_steps=accumulate),
        train_dataset=Samples(images, labels),
        optimizers=(optimizer, None),
        callbacks=[PrunerCallback(pruner)],
    )
    trainer.train()
    check_outcome(pruner, optimizer, network, images)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def own_network(transformers: Any, name: str) -> Any:
    """A small image classifier of transformers."""
    images = {"num_channels": 1, "num_labels": 10}
    if name == "ResNet":
        config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], **images)
        return transformers.ResNetForImageClassification(config)
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=8, patch_size=2, **size, **images)
    return transformers.ViTForImageClassification(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ViT", "ResNet"])
def test_transformers_trains_a_smaller_network_of_its_own(
    digits: tuple[Tensor, Tensor], tmp_path: Path, name: str
) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.24")  # layers of older ones may be made otherwise
    from greenprune.integrations.transformers import PrunerCallback

    torch.manual_seed(0)
    images, labels = digits
    model = own_network(transformers, name)
    pruner = prune(model, images, ["block", "channel"])
    optimizer = torch.optim.AdamW(pruner.parameter_groups(weight_decay=0.01, adaptive=True), lr=3e-3)
    trainer = transformers.Trainer(
        model=model,
        args=arguments(transformers, tmp_path),
        train_dataset=Samples(images, labels),
        eval_dataset=Samples(images[:10], labels[:10]),
        optimizers=(optimizer, None),
        callbacks=[PrunerCallback(pruner)],
    )
    trainer.train()
    check_outcome(pruner, optimizer, model, images)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]

    torch.save({"network": model.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "pruned.pt")
    saved = torch.load(tmp_path / "pruned.pt", weights_only=True)
    again = type(model)(model.config)
    prune(again, images, ["block", "channel"]).load_state_dict(saved["pruner"])
    again.load_state_dict(saved["network"])
    assert torch.equal(again.eval()(images[:3]).logits, model.eval()(images[:3]).logits)


def arguments(transformers: Any, folder: Path, **changed: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to=[],
        logging_steps=4,
        disable_tqdm=True,
        **{"save_strategy": "no", **changed},
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("fp16", True, "^fp16: True is not valid .* bf16"),
        ("_n_gpu", 2, "^2 GPUs are not valid .* CUDA_VISIBLE_DEVICES"),
        ("load_best_model_at_end", True, "^load_best_model_at_end: True is not valid .* expected False$"),
    ],
)
def test_transformers_settings_that_cannot_work_are_refused(
    digits: tuple[Tensor, Tensor], tmp_path: Path, setting: str, value: object, message: str
) -> None:
    transformers = pytest.importorskip("transformers")
    from greenprune.integrations.transformers import PrunerCallback

    callback = PrunerCallback(prune(CifarResNet(20, 10, channels=1), digits[0], ["block"]))
    settings = arguments(transformers, tmp_path)
    assert settings.n_gpu <= 1
    setattr(settings, setting, value)
    with pytest.raises(UserError, match=message):
        callback.on_train_begin(settings, transformers.TrainerState(), transformers.TrainerControl())


@pytest.mark.filterwarnings("ignore")
def test_transformers_that_go_on_from_a_checkpoint_are_refused(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from greenprune.integrations.transformers import PrunerCallback

    images, labels = digits

    def make_trainer() -> Any:
        network = CifarResNet(20, 10, channels=1)
        pruner = prune(network, images, ["block"])
        optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.05)
        return transformers.Trainer(
            model=Classifier(network),
            args=arguments(transformers, tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
            train_dataset=Samples(images, labels),
            optimizers=(optimizer, None),
            callbacks=[PrunerCallback(pruner)],
        )

    make_trainer().train()
    with pytest.raises(UserError, match=r"^resume_from_checkpoint: going on after 1 steps is not valid"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.filterwarnings("ignore")
def test_transformers_can_train_again_after_a_training_that_failed(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    from greenprune.integrations.transformers import PrunerCallback

    class Failing(Samples):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            raise Mishap

    images, labels = digits
    network = CifarResNet(20, 10, channels=1)
    pruner = prune(network, images, ["block"])
    callback = PrunerCallback(pruner)

    def train(samples: Dataset[dict[str, Tensor]]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.05)
        trainer = transformers.Trainer(
            model=Classifier(network),
            args=arguments(transformers, tmp_path),
            train_dataset=samples,
            optimizers=(optimizer, None),
            callbacks=[callback],
        )
        trainer.train()
        return optimizer

    with pytest.raises(Mishap):
        train(Failing(images, labels))
    check_outcome(pruner, train(Samples(images, labels)), network, images)


@pytest.mark.filterwarnings("ignore")
def test_transformers_with_gradients_added_up_untold_are_refused(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from greenprune.integrations.transformers import PrunerCallback

    callback = PrunerCallback(prune(CifarResNet(20, 10, channels=1), digits[0], ["block"]))
    settings = arguments(transformers, tmp_path, gradient_accumulation_steps=3)
    with pytest.raises(
        UserError, match=r"^gradient_accumulation_steps: 3 .* pruner\.losses_are_divided_by\(3\) before"
    ):
        callback.on_train_begin(settings, transformers.TrainerState(), transformers.TrainerControl())
