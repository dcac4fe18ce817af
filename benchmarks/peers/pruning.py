"""Pruning as it is done elsewhere: sparse training, pruning once, fine-tuning; on our data, network and recipe.

    python benchmarks/peers/pruning.py --method slimming --config configs/digits.yaml --target 0.5 --output it.json

``slimming`` is network slimming (Liu et al. 2017, arXiv 1708.06519): an L1 penalty on the batch-norm scales of the
channels inside the branches, then the channels of the smallest scales go, over all layers, until the FLOPs are met.
``polarization`` is the same with the regularizer of Zhuang et al. (NeurIPS 2020), ``t |s|_1 - |s - mean(s)|_1``.
``torch-pruning`` is its GroupNormPruner (DepGraph, Fang et al. 2023, arXiv 2301.12900) with its sparse training, as
the package's own CIFAR example uses it; it may prune the residual stream too. Where it is not installed, the package is
fetched from PyPI into a folder of its own (build/torch-pruning) and used with the torch that is here. It cannot follow
shortcuts that pad with zero channels (index out of range in its sparse training, version 1.6.1), so CIFAR ResNets are
trained with projections for it (``model.shortcut`` B).

The epochs of the config are shared out, half to sparse training and half to fine-tuning, each half with the config's
own schedule of the learning rate from the start. No choice is made on the test set, on which the last network is
evaluated.

A sparsity term's weight means something only together with the length of the run, so the strength is given for the
whole of it: how far the term alone, at its weight, would move a batch-norm scale over the sparse training (for
torch-pruning: by what power of e it would shrink a weight), the learning rates and the momentum added up.

With ``--output`` a run that was stopped goes on: its state is kept beside the file after each epoch. It finishes the
epoch and stops on SIGTERM and SIGINT; joules of an epoch cut short by anything harder are lost to its account.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from greenprune.allocation import keep_freed_memory
from greenprune.config import Config, UserError, parse_config
from greenprune.data import ImageData, open_data
from greenprune.energy import Meter, open_local_meter
from greenprune.flops import count_costs
from greenprune.interrupt import InterruptRequest
from greenprune.models import ChannelSet, build_model, find_channels
from greenprune.network import UnitTable
from greenprune.optimization import build_optimizer, build_schedule
from greenprune.provenance import collect_provenance
from greenprune.surgery import Operation, Structure, carry_out
from greenprune.tracking import write_json

ROOT = Path(__file__).parents[2]
TORCH_PRUNING = "torch-pruning==1.6.1"

# github.com/polarizationpruning/PolarizationPruning, cifar: ResNet-56 is trained with --lbd 5e-5 --t 1.4.
POLARIZATION_T = 1.4
STRENGTH = {"slimming": 1.0, "polarization": 2.9, "torch-pruning": 1.2}
"""Strength of each method's sparsity term over the whole sparse training.

Polarization's is what its ResNet-56 script comes to (weight 5e-5, 200 epochs in batches of 64, learning rates of 0.1,
0.02, 0.004 and 0.0008), torch-pruning's what its own comes to (5e-4, 100 epochs in batches of 128 from 0.01);
slimming's is our choice: twice the way from its first value of a scale to 0.
"""

SCALE_AT_FIRST = 0.5  # of batch norms under a penalty, in both of their authors' code

COUNTING = "counting"


class Stopped(Exception):
    """A signal asked to stop; the state is written.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal = signal_number


@dataclass
class Progress:
    """How far a run has come and what it has spent, over all of its attempts.

    Attributes:
        pruned: Whether the network is pruned, and the epochs are those of the fine-tuning.
        epoch: Epochs done since then, or since the beginning.
        flops_train: FLOPs of training.
        time_s: Seconds.
        energy_by_phase_j: Joules by phase; None where nothing could be read.
        attempts: Processes that have worked on it.
        accuracy_before: Accuracy before pruning.
        accuracy_after: Accuracy right after it.
        removed: What was pruned, as its method can do it again.
    """

    pruned: bool = False
    epoch: int = 0
    flops_train: int = 0
    time_s: float = 0.0
    energy_by_phase_j: dict[str, float | None] = field(default_factory=dict)
    attempts: int = 1
    accuracy_before: float = 0.0
    accuracy_after: float = 0.0
    removed: list[Any] = field(default_factory=list)


class Account:
    """What this attempt and those before it have spent.

    Args:
        meter: Reads the joules.
        before: What the attempts before have spent.
    """

    def __init__(self, meter: Meter, before: Progress) -> None:
        self.meter = meter
        self.counting_s = 0.0
        self._time_s, self._joules = before.time_s, dict(before.energy_by_phase_j)
        self._started = time.perf_counter()

    def settle(self, progress: Progress) -> None:
        """Write all of it down, without what was spent on counting FLOPs."""
        progress.time_s = self._time_s + time.perf_counter() - self._started - self.counting_s
        progress.energy_by_phase_j = dict(self._joules)
        for phase, joules in self.meter.by_phase_j().items():
            if phase != COUNTING:
                known = [value for value in (self._joules.get(phase), joules) if value is not None]
                progress.energy_by_phase_j[phase] = sum(known) if known else None


class Recipe:
    """A config's training of an ungated network: data, precision and optimizer.

    Args:
        config: The run; its gating is left aside.
        data_root: Folder of the data set.
        account: Where the joules go.
    """

    def __init__(self, config: Config, data_root: str | None, account: Account) -> None:
        if config.optim.accumulate > 1 or config.optim.ema is not None or config.precision == "fp16":
            raise UserError(
                "optim.accumulate, optim.ema, precision fp16: are not done here; expected 1, null, no or bf16"
            )
        self.config = config
        self.account = account
        self.meter = account.meter
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data: ImageData = open_data(config.data, config.data.root or data_root, config.seed).to(
            self.device, config.model.channels_last
        )
        self.shape = (self.data.channels, self.data.image_size, self.data.image_size)
        torch.manual_seed(config.seed)
        model = build_model(
            config.model, classes=self.data.classes, channels=self.data.channels, image_size=self.data.image_size
        )
        self.model = self.laid_out(model)
        self._kept: dict[str, Any] | None = None

    def laid_out(self, model: nn.Module) -> nn.Module:
        """The network on the device in the config's layout."""
        layout = torch.channels_last if self.config.model.channels_last else torch.preserve_format
        return model.to(self.device).to(memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def autocast(self) -> AbstractContextManager[Any]:
        """Within, the network computes in the config's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def go_on_from(self, state: dict[str, Any]) -> None:
        """Take up a network's tensors, and keep those of its optimizer for the epochs to come."""
        self.model.load_state_dict(state["model"])
        self._kept = state if state["optimizer"] is not None else None

    def state(self) -> dict[str, Any]:
        """What :meth:`go_on_from` takes up."""
        optimizer = getattr(self, "_optimizer", None)
        if optimizer is None:
            return {"model": self.model.state_dict(), "optimizer": None}
        step = self._schedule.last_epoch
        return {"model": self.model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}

    def train(
        self,
        phase: str,
        epochs: range,
        total: int,
        done: Callable[[int], None],
        way: BatchNormScales | TorchPruning | None = None,
    ) -> None:
        """The epochs of a phase that are left, with a schedule of the phase's own.

        Args:
            phase: Its name.
            epochs: Which of the whole run's.
            total: How many the phase has in all.
            done: Called after each epoch, with the FLOPs that it took.
            way: Whose sparsity term is added to the gradients.
        """
        steps = self.data.steps_per_epoch
        optimizer = self._optimizer = build_optimizer(self.config, self.model, total * steps)
        schedule = self._schedule = build_schedule(self.config, optimizer, total * steps)
        if self._kept is not None:
            optimizer.load_state_dict(self._kept["optimizer"])  # with the learning rate that is due
            schedule.last_epoch = self._kept["step"]
            self._kept = None
        flops = count_costs(self.model, self.shape, [""])[""].flops_train * steps * self.config.data.batch_size
        clip = self.config.optim.clip_norm
        for epoch in epochs:
            with self.meter.window(phase):
                self.model.train()
                for images, labels in self.data.train_batches(epoch):
                    with self.autocast():
                        logits = self.model(images)
                    smoothing = self.config.optim.label_smoothing
                    functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing).backward()
                    if way is not None:
                        way.penalize()
                    if clip is not None:
                        nn.utils.clip_grad_norm_(self.model.parameters(), clip)
                    optimizer.step()
                    if way is not None:
                        way.after_step()
                    optimizer.zero_grad(set_to_none=True)
                    schedule.step()
            done(flops)
        del self._optimizer, self._schedule

    def way_of_a_scale(self, epochs: int) -> float:
        """How far a gradient of 1 moves a parameter over some epochs: the learning rates and the momentum added up."""
        total = epochs * self.data.steps_per_epoch
        parameter = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([{"params": [parameter], "name": "scale"}], lr=self.config.optim.lr)
        schedule = build_schedule(self.config, optimizer, total)
        rate = schedule.lr_lambdas[0]
        momentum = self.config.optim.momentum if self.config.optim.name == "sgd" else 0.0
        return self.config.optim.lr * sum(rate(step) for step in range(total)) / (1.0 - momentum)

    def accuracy(self) -> float:
        """Share of the held-out images that the network gets right."""
        right = samples = 0
        self.model.eval()
        with torch.no_grad(), self.autocast(), self.meter.window("eval"):
            for images, labels in self.data.eval_batches():
                right += int((self.model(images).argmax(1) == labels).sum())
                samples += len(labels)
        return right / samples


class BatchNormScales:
    """Sparsity and pruning by the scales of the batch norms of channels inside branches.

    Args:
        recipe: What is trained.
        method: ``slimming`` or ``polarization``.
        weight: Weight of the penalty.
    """

    decays = True

    def __init__(self, recipe: Recipe, method: str, weight: float) -> None:
        self._recipe = recipe
        self._polarized = method == "polarization"
        self._weight = weight
        self._sets = dict(find_channels(recipe.model).sets)
        self._scales = {name: _scale_of(recipe.model, found) for name, found in self._sets.items()}
        if not self._scales:
            raise UserError(f"model.name: {recipe.config.model.name!r} has no batch norms inside its branches")
        self._table = UnitTable.of(recipe.model, recipe.shape, also=self._sets.keys())
        with torch.no_grad():
            for scale in self._scales.values():
                scale.fill_(SCALE_AT_FIRST)

    def penalize(self) -> None:
        """Add the penalty's gradient to the scales'."""
        scales = [scale for scale in self._scales.values() if scale.grad is not None]
        values = torch.cat([scale.detach() for scale in scales])
        towards = values.sign()
        if self._polarized:
            apart = (values - values.mean()).sign()
            towards = POLARIZATION_T * towards - (apart - apart.mean())
        for scale, gradient in zip(scales, towards.split([len(scale) for scale in scales]), strict=True):
            assert scale.grad is not None
            scale.grad.add_(gradient, alpha=self._weight)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep polarized scales in [0, 1]: the regularizer is one for scales of a bounded range."""
        if self._polarized:
            for scale in self._scales.values():
                scale.clamp_(0.0, 1.0)

    def prune(self, target: float) -> list[Any]:
        """Take out the channels of the smallest scales, one of each set at least stays, until the FLOPs are met."""
        order = sorted(
            (float(scale), name, index)
            for name, values in self._scales.items()
            for index, scale in enumerate(values.detach().abs())
        )
        low, high = 0, len(order)
        while low < high:  # the least number that is enough
            middle = (low + high) // 2
            if self._share(self._chosen(order[:middle])) <= target:
                high = middle
            else:
                low = middle + 1
        structure = self._chosen(order[:low])
        if self._share(structure) > target:
            raise UserError(f"--target: {target} cannot be met by channels inside the branches alone")
        removed = [operation.to_dict() for operation in structure.operations]
        with self._recipe.meter.window("pruning"):
            self.prune_again(removed)
        return removed

    def prune_again(self, removed: list[Any]) -> None:
        """Take out what an earlier attempt has taken out."""
        carry_out([Operation.from_dict(operation) for operation in removed], self._recipe.model)

    def _chosen(self, smallest: list[tuple[float, str, int]]) -> Structure:
        channels: dict[str, list[int]] = {}
        for _, name, index in smallest:
            if len(channels.setdefault(name, [])) < self._sets[name].units - 1:
                channels[name].append(index)
        return Structure(
            [
                Operation("remove", name, 0, 0.0, "settled", tuple(sorted(gone)))
                for name, gone in channels.items()
                if gone
            ]
        )

    def _share(self, structure: Structure) -> float:
        return self._table.cost_of(structure).flops_forward / self._table.dense.flops_forward


def _scale_of(model: nn.Module, found: ChannelSet) -> nn.Parameter:
    """The scale of the last batch norm that holds a set of channels."""
    norms = (model.get_submodule(piece.module) for piece in found.slices if piece.tensor == "weight")
    scales = [norm.weight for norm in norms if isinstance(norm, nn.BatchNorm2d)]
    if not scales or len(scales[-1]) != found.units:
        raise UserError(f"{found.name}: its channels have no batch norm of their own")
    return scales[-1]


def torch_pruning() -> Any:
    """The package: the one that is installed, else one in a folder of its own, fetched if it is not there."""
    if importlib.util.find_spec("torch_pruning") is not None:
        return importlib.import_module("torch_pruning")
    folder = ROOT / "build" / "torch-pruning"
    if not (folder / "torch_pruning").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, TORCH_PRUNING], check=True)
    sys.path.insert(0, str(folder))
    return importlib.import_module("torch_pruning")


class TorchPruning:
    """The package's GroupNormPruner: groups of coupled channels, sparse training by group norms.

    Args:
        recipe: What is trained.
        weight: Weight of the sparsity term.
    """

    decays = False  # its example trains sparsely without weight decay

    def __init__(self, recipe: Recipe, weight: float) -> None:
        package = self._package = torch_pruning()
        self._recipe = recipe
        self._example = torch.randn(1, *recipe.shape, device=recipe.device)
        self._pruner = package.pruner.GroupNormPruner(
            recipe.model,
            self._example,
            importance=package.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
            reg=weight,
            global_pruning=True,
            iterative_steps=400,
            pruning_ratio=1.0,
            ignored_layers=[module for module in recipe.model.modules() if isinstance(module, nn.Linear)],
        )
        self._pruner.update_regularizer()

    def penalize(self) -> None:
        """Add the sparsity term's gradient."""
        self._pruner.regularize(self._recipe.model)

    def after_step(self) -> None:
        """Nothing is to be done."""

    def prune(self, target: float) -> list[Any]:
        """Prune step by step until the FLOPs, as greenprune counts them, are met."""
        dense, dense_operations = self._flops(), self._operations()
        # The package's own count, which is quick and nearly the same, says when it is worth to count.
        while self._operations() > 1.1 * target * dense_operations or self._flops() > target * dense:
            if self._pruner.current_step == self._pruner.iterative_steps:
                raise UserError(f"--target: {target} is not met by torch-pruning")
            with self._recipe.meter.window("pruning"):
                self._pruner.step()
        return [[name, out, list(map(int, units))] for name, out, units in self._pruner.pruning_history()]

    def prune_again(self, removed: list[Any]) -> None:
        """Prune what an earlier attempt has pruned."""
        self._pruner.load_pruning_history(removed)

    def _operations(self) -> float:
        """Multiply-adds as the package counts them."""
        with self._recipe.meter.window("pruning"):
            operations, _ = self._package.utils.count_ops_and_params(self._recipe.model, self._example)
        return float(operations)

    def _flops(self) -> int:
        """Counted between the steps in a window of its own: it is not the package that counts so slowly."""
        started = time.perf_counter()
        with self._recipe.meter.window(COUNTING):
            flops = count_costs(self._recipe.model, self._recipe.shape, [""])[""].flops_forward
        self._recipe.account.counting_s += time.perf_counter() - started
        return flops


class Run:
    """One whole run of a method, which may be stopped after any epoch.

    Args:
        method: One of :data:`STRENGTH`.
        config: The run.
        strength: Strength of the sparsity term over the whole sparse training.
        finetune_lr: Peak learning rate of the fine-tuning, as a share of the config's.
        data_root: Folder of the data set.
        meter: Reads the joules.
        state: File that keeps the state; None: none is kept.
    """

    def __init__(
        self,
        method: str,
        config: Config,
        strength: float,
        finetune_lr: float,
        data_root: str | None,
        meter: Meter,
        state: Path | None,
    ) -> None:
        self._state = state
        settings = {"method": method, "strength": strength, "finetune_lr": finetune_lr, "config": config.to_dict()}
        self._settings = json.dumps(settings, sort_keys=True)
        found = self._load()
        self.progress = Progress(**found["progress"]) if found else Progress()
        self._account = Account(meter, self.progress)
        self._recipe = Recipe(config, data_root, self._account)
        self._finetune_lr = finetune_lr
        self._sparse_epochs = config.optim.epochs // 2
        self.dense = count_costs(self._recipe.model, self._recipe.shape, [""])[""]
        weight = strength / self._recipe.way_of_a_scale(self._sparse_epochs)
        self._way: BatchNormScales | TorchPruning
        if method == "torch-pruning":
            self._way = TorchPruning(self._recipe, weight)
        else:
            self._way = BatchNormScales(self._recipe, method, weight)
        if found:
            self.progress.attempts += 1
            if self.progress.pruned:
                self._way.prune_again(self.progress.removed)
                self._recipe.laid_out(self._recipe.model)
            self._recipe.go_on_from(found["recipe"])

    def _load(self) -> dict[str, Any] | None:
        if self._state is None or not self._state.exists():
            return None
        found: dict[str, Any] = torch.load(self._state, map_location="cpu", weights_only=True)
        if found["settings"] != self._settings:
            raise UserError(f"--output: {str(self._state)!r} is of a run with other settings; expected another file")
        return found

    def _save(self) -> None:
        self._account.settle(self.progress)
        if self._state is None:
            return
        values = {"settings": self._settings, "progress": asdict(self.progress), "recipe": self._recipe.state()}
        temporary = self._state.with_name(f".{self._state.name}.tmp")
        torch.save(values, temporary)
        temporary.replace(self._state)

    def finish(self, target: float, request: InterruptRequest) -> dict[str, Any]:
        """What is left of the run.

        Args:
            target: Share of the dense FLOPs to keep.
            request: A signal that asks to stop.

        Returns:
            Accuracy, FLOPs, seconds and joules of each phase.

        Raises:
            Stopped: There was one.
        """
        recipe, progress = self._recipe, self.progress

        def epoch_done(flops: int) -> None:
            progress.epoch += 1
            progress.flops_train += flops
            self._save()
            if request.signal:
                raise Stopped(request.signal)

        sparse, total = self._sparse_epochs, recipe.config.optim.epochs
        if not progress.pruned:
            config = recipe.config
            if not self._way.decays:
                recipe.config = replace(config, optim=replace(config.optim, weight_decay=0.0))
            recipe.train("sparse training", range(progress.epoch, sparse), sparse, epoch_done, self._way)
            recipe.config = config
            progress.accuracy_before = recipe.accuracy()
            progress.removed = self._way.prune(target)
            recipe.laid_out(recipe.model)
            progress.accuracy_after = recipe.accuracy()
            progress.pruned, progress.epoch = True, 0
            self._save()
        optim = recipe.config.optim
        recipe.config = replace(recipe.config, optim=replace(optim, lr=optim.lr * self._finetune_lr))
        recipe.train("fine-tuning", range(sparse + progress.epoch, total), total - sparse, epoch_done)
        accuracy = recipe.accuracy()
        self._account.settle(progress)
        return self._result(accuracy)

    def _result(self, accuracy: float) -> dict[str, Any]:
        recipe, progress, dense = self._recipe, self.progress, self.dense
        small = count_costs(recipe.model, recipe.shape, [""])[""]
        images = recipe.config.optim.epochs * recipe.data.steps_per_epoch * recipe.config.data.batch_size
        joules = [value for value in progress.energy_by_phase_j.values() if value is not None]
        total = recipe.meter.total()
        return {
            "accuracy": accuracy,
            "accuracy_kind": recipe.data.accuracy_kind,
            "accuracy_before_pruning": progress.accuracy_before,
            "accuracy_after_pruning": progress.accuracy_after,
            "flops_forward": small.flops_forward,
            "flops_forward_dense": dense.flops_forward,
            "flops_train": progress.flops_train,
            "flops_train_dense": dense.flops_train * images,
            "params": small.params,
            "params_dense": dense.params,
            "time_s": progress.time_s,
            "energy_j": sum(joules) if joules and total.complete else None,
            "energy_quality": total.quality,
            "energy_by_phase_j": progress.energy_by_phase_j,
            "attempts": progress.attempts,
        }


def compare(  # the dimensions of a run
    method: str,
    config: Config,
    target: float,
    strength: float,
    data_root: str | None,
    *,
    finetune_lr: float = 1.0,
    state: Path | None = None,
) -> dict[str, Any]:
    """One whole run of a method, or what is left of it; see :class:`Run`.

    Raises:
        Stopped: A signal asked to stop.
    """
    request = InterruptRequest()
    meter = open_local_meter(os.environ, interval_s=config.energy.interval_s, synchronize=_synchronize)
    with meter, request:
        return Run(method, config, strength, finetune_lr, data_root, meter, state).finish(target, request)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(STRENGTH), required=True)
    parser.add_argument("--config", type=Path, required=True, help="a run of greenprune; its gating is left aside")
    parser.add_argument("--target", type=float, required=True, help="share of the dense FLOPs to keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, help=f"of the sparsity term over the run; by default {STRENGTH}")
    parser.add_argument("--finetune-lr", type=float, default=1.0, help="peak of the fine-tuning, as share of optim.lr")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("flags", nargs="*", help="further fields of the config, after --")
    args = parser.parse_args()
    if not 0 < args.target < 1:
        parser.error(f"--target: {args.target} is not valid; expected a share between 0 and 1")
    keep_freed_memory()  # as a run of ours does
    strength = STRENGTH[args.method] if args.strength is None else args.strength
    flags = ["--config", str(args.config), "--seed", str(args.seed), "--gate.enabled", "false", *args.flags]
    state = None if args.output is None else args.output.with_suffix(".state")
    try:
        config = parse_config(flags)
        if args.method == "torch-pruning":
            config = replace(config, model=replace(config.model, shortcut="B"))
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
        root = os.environ.get("GREENPRUNE_DATA")
        found = compare(args.method, config, args.target, strength, root, finetune_lr=args.finetune_lr, state=state)
    except Stopped as stop:
        print("pruning.py: stopped; the same command goes on", file=sys.stderr)
        return 128 + stop.signal
    except UserError as error:
        print(f"pruning.py: error: {error}", file=sys.stderr)
        return 2
    settings = {"method": args.method, "target": args.target, "strength": strength, "finetune_lr": args.finetune_lr}
    settings["seed"] = args.seed
    provenance = collect_provenance(1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result = {**settings, **found, "config": config.to_dict(), "provenance": provenance}
    if args.method == "torch-pruning":
        provenance["versions"]["torch-pruning"] = importlib.metadata.version("torch-pruning")
    if args.output is not None:
        write_json(args.output, result)
        state.unlink(missing_ok=True)
    print(json.dumps({**settings, **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
