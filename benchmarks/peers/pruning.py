"""Pruning as it is done elsewhere: sparse training, pruning once, fine-tuning; on our data, network and recipe.

    python benchmarks/peers/pruning.py --method slimming --config configs/digits.yaml --target 0.5 --output it.json

``slimming`` is network slimming (Liu et al. 2017, arXiv 1708.06519): an L1 penalty on the batch-norm scales of the
channels inside the branches, then the channels of the smallest scales go, over all layers, until the FLOPs are met.
``polarization`` is the same with the regularizer of Zhuang et al. (NeurIPS 2020), ``t |s|_1 - |s - mean(s)|_1``.
``torch-pruning`` is its GroupNormPruner (DepGraph, Fang et al. 2023, arXiv 2301.12900) with its sparse training, as the
package's own CIFAR example uses it; it may prune the residual stream too. The package is needed for it alone:
``pip install torch-pruning``. It cannot follow shortcuts that pad with zero channels (index out of range in its sparse
training, version 1.6.1), so CIFAR ResNets are trained with projections for it (``model.shortcut`` B).

The epochs of the config are shared out, half to sparse training and half to fine-tuning, each half with the config's
own schedule of the learning rate from the start. No choice is made on the test set, on which the last network is
evaluated.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
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
from greenprune.models import ChannelSet, build_model, find_channels
from greenprune.network import UnitTable
from greenprune.optimization import build_optimizer, build_schedule
from greenprune.provenance import collect_provenance
from greenprune.surgery import Operation, Structure, carry_out
from greenprune.tracking import write_json

POLARIZATION_T = 1.2  # as in the paper's CIFAR experiments
STRENGTH = {"slimming": 1e-4, "polarization": 1e-4, "torch-pruning": 5e-4}
"""Weight of each method's sparsity term: the papers' for CIFAR, and torch-pruning's example's default."""

COUNTING = "counting"

AfterBackward = Callable[[], None]


class Recipe:
    """A config's training of an ungated network: data, precision and optimizer.

    Args:
        config: The run; its gating is left aside.
        data_root: Folder of the data set.
        meter: Reads the joules.
    """

    def __init__(self, config: Config, data_root: str | None, meter: Meter) -> None:
        self.config = config
        self.meter = meter
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
        self.epoch = 0
        self.flops_train = 0
        self.counting_s = 0.0

    def laid_out(self, model: nn.Module) -> nn.Module:
        """The network on the device in the config's layout."""
        layout = torch.channels_last if self.config.model.channels_last else torch.preserve_format
        return model.to(self.device).to(memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def train(self, epochs: int, phase: str, after_backward: AfterBackward | None = None) -> None:
        """Some epochs with a schedule of their own."""
        total = epochs * self.data.steps_per_epoch
        optimizer = build_optimizer(self.config, self.model, total)
        schedule = build_schedule(self.config, optimizer, total)
        flops = count_costs(self.model, self.shape, [""])[""].flops_train
        with self.meter.window(phase):
            for _ in range(epochs):
                self.model.train()
                for images, labels in self.data.train_batches(self.epoch):
                    with self._autocast():
                        logits = self.model(images)
                    smoothing = self.config.optim.label_smoothing
                    functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing).backward()
                    if after_backward is not None:
                        after_backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    schedule.step()
                self.epoch += 1
        self.flops_train += flops * total * self.config.data.batch_size

    def accuracy(self) -> float:
        """Share of the held-out images that the network gets right."""
        right = samples = 0
        self.model.eval()
        with torch.no_grad(), self._autocast(), self.meter.window("eval"):
            for images, labels in self.data.eval_batches():
                right += int((self.model(images).argmax(1) == labels).sum())
                samples += len(labels)
        return right / samples


class BatchNormScales:
    """Sparsity and pruning by the scales of the batch norms of channels inside branches.

    Args:
        recipe: What is trained.
        method: ``slimming`` or ``polarization``.
        strength: Weight of the penalty.
    """

    def __init__(self, recipe: Recipe, method: str, strength: float) -> None:
        self._recipe = recipe
        self._polarized = method == "polarization"
        self._strength = strength
        self._sets = dict(find_channels(recipe.model).sets)
        self._scales = {name: _scale_of(recipe.model, found) for name, found in self._sets.items()}
        if not self._scales:
            raise UserError(f"model.name: {recipe.config.model.name!r} has no batch norms inside its branches")
        self._table = UnitTable.of(recipe.model, recipe.shape, also=self._sets.keys())

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
            scale.grad.add_(gradient, alpha=self._strength)

    def prune(self, target: float) -> None:
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
        with self._recipe.meter.window("pruning"):
            carry_out(structure.operations, self._recipe.model)

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


class TorchPruning:
    """The package's GroupNormPruner: groups of coupled channels, sparse training by group norms.

    Args:
        recipe: What is trained.
        strength: Weight of the sparsity term.
    """

    def __init__(self, recipe: Recipe, strength: float) -> None:
        import torch_pruning

        self._recipe = recipe
        self._example = torch.randn(1, *recipe.shape, device=recipe.device)
        self._pruner = torch_pruning.pruner.GroupNormPruner(
            recipe.model,
            self._example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="max"),
            reg=strength,
            global_pruning=True,
            iterative_steps=400,
            pruning_ratio=1.0,
            ignored_layers=[module for module in recipe.model.modules() if isinstance(module, nn.Linear)],
        )
        self._pruner.update_regularizer()

    def penalize(self) -> None:
        """Add the sparsity term's gradient."""
        self._pruner.regularize(self._recipe.model)

    def prune(self, target: float) -> None:
        """Prune step by step until the FLOPs, as greenprune counts them, are met."""
        dense = self._flops()
        while self._flops() > target * dense:
            if self._pruner.current_step == self._pruner.iterative_steps:
                raise UserError(f"--target: {target} is not met by torch-pruning")
            with self._recipe.meter.window("pruning"):
                self._pruner.step()

    def _flops(self) -> int:
        """Counted between the steps in a window of its own: it is not the package that counts so slowly."""
        started = time.perf_counter()
        with self._recipe.meter.window(COUNTING):
            flops = count_costs(self._recipe.model, self._recipe.shape, [""])[""].flops_forward
        self._recipe.counting_s += time.perf_counter() - started
        return flops


def compare(method: str, config: Config, target: float, strength: float, data_root: str | None) -> dict[str, Any]:
    """One whole run of a method.

    Returns:
        Accuracy, FLOPs, seconds and joules of each phase.
    """
    with open_local_meter(os.environ, interval_s=config.energy.interval_s, synchronize=_synchronize) as meter:
        started = time.perf_counter()
        recipe = Recipe(config, data_root, meter)
        dense = count_costs(recipe.model, recipe.shape, [""])[""]
        epochs = config.optim.epochs
        way: BatchNormScales | TorchPruning
        way = TorchPruning(recipe, strength) if method == "torch-pruning" else BatchNormScales(recipe, method, strength)
        recipe.train(epochs // 2, "sparse training", way.penalize)
        before = recipe.accuracy()
        way.prune(target)
        recipe.laid_out(recipe.model)
        pruned = recipe.accuracy()
        recipe.train(epochs - epochs // 2, "fine-tuning")
        accuracy = recipe.accuracy()
        small = count_costs(recipe.model, recipe.shape, [""])[""]
        time_s = time.perf_counter() - started - recipe.counting_s
        energy = meter.total()
        by_phase_j = meter.by_phase_j()
        counting_j = by_phase_j.pop(COUNTING, 0.0)
    return {
        "accuracy": accuracy,
        "accuracy_before_pruning": before,
        "accuracy_after_pruning": pruned,
        "flops_forward": small.flops_forward,
        "flops_forward_dense": dense.flops_forward,
        "flops_train": recipe.flops_train,
        "flops_train_dense": dense.flops_train * epochs * recipe.data.steps_per_epoch * config.data.batch_size,
        "params": small.params,
        "params_dense": dense.params,
        "time_s": time_s,
        "energy_j": None if energy.energy_j is None or not energy.complete else energy.energy_j - (counting_j or 0.0),
        "energy_quality": energy.quality,
        "energy_by_phase_j": by_phase_j,
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=sorted(STRENGTH), required=True)
    parser.add_argument("--config", type=Path, required=True, help="a run of greenprune; its gating is left aside")
    parser.add_argument("--target", type=float, required=True, help="share of the dense FLOPs to keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, help="weight of the sparsity term; by default the method's own")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("flags", nargs="*", help="further fields of the config, after --")
    args = parser.parse_args()
    if not 0 < args.target < 1:
        parser.error(f"--target: {args.target} is not valid; expected a share between 0 and 1")
    keep_freed_memory()  # as a run of ours does
    strength = STRENGTH[args.method] if args.strength is None else args.strength
    flags = ["--config", str(args.config), "--seed", str(args.seed), "--gate.enabled", "false", *args.flags]
    try:
        config = parse_config(flags)
        if args.method == "torch-pruning":
            config = replace(config, model=replace(config.model, shortcut="B"))
        found = compare(args.method, config, args.target, strength, os.environ.get("GREENPRUNE_DATA"))
    except UserError as error:
        print(f"pruning.py: error: {error}", file=sys.stderr)
        return 2
    settings = {"method": args.method, "target": args.target, "strength": strength, "seed": args.seed}
    provenance = collect_provenance(1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result = {**settings, **found, "config": config.to_dict(), "provenance": provenance}
    if args.output is not None:
        write_json(args.output, result)
    print(json.dumps({**settings, **found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
