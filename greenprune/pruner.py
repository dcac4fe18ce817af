"""Gated training as a library: for people who have a training loop of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from greenprune.config import (
    BudgetConfig,
    ConfigError,
    GateConfig,
    RemovalConfig,
    SurgeryConfig,
    UserError,
)
from greenprune.gating import WINDOWS, GatePolicy, Verdict, attach_gates, find_gates, gate_parameters, gated_units
from greenprune.models import convert_blocks, put_back_on_failure
from greenprune.network import UnitTable, gating_notes, round_to_on, unit_costs, units_present
from greenprune.output_penalty import with_penalty
from greenprune.pruner_checks import (
    all_of,
    check_count,
    check_gates,
    check_has_values,
    check_holds_gates,
    check_settings,
)
from greenprune.surgery import (
    Operation,
    Structure,
    carry_out,
    refuse_uncuttable,
    refuse_wrapped,
    replay,
    update_optimizer,
)
from greenprune.unit_cost import MEASURED, MeasuredUnit, UnitCost, measure_unit_cost


class Pruner:
    """Gates a network, steers the gates towards a budget, and removes units while the network is trained.

    ::

        pruner = Pruner(model, images[:2], total_steps=epochs * len(loader))
        optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.1, momentum=0.9)
        for images, labels in batches:
            loss = cross_entropy(model(images), labels) + pruner.penalty()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step(optimizer)
        pruner.finalize(optimizer)

    The network is changed in place: its blocks are taken apart into branch and shortcut (its parameters stay the same
    objects), and at the end it is a smaller network without gates. A pruner that cannot be made leaves it as it was.

    Args:
        model: The unwrapped network, with residual blocks that greenprune knows, finds by what their forward does, or
            is told of (:func:`greenprune.register_block`).
        example: A small batch of its input, on its device: blocks are checked and costs are counted with it. For
            budget.unit time and energy one of the training's size: blocks are measured with it (in fp32).
        total_steps: Training batches of the whole run; where several passes of one have a penalty each, these passes.
        gate: What is gated, and how.
        budget: How much of the network's cost is kept.
        removal: When units leave. A window that is not set is a 25th of the run.
        surgery: How channels are taken out.

    Attributes:
        structure: What was done so far.
        notes: One line for each part of the network that is not gated though it might have been expected to be.

    Raises:
        UserError: A setting is not valid, there is nothing to gate, a block cannot be taken apart, a forward pass
            depends on values so that its cost cannot be counted, or the budget cannot be met.
        TypeError: The network is wrapped.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        total_steps: int,
        gate: GateConfig | None = None,
        budget: BudgetConfig | None = None,
        removal: RemovalConfig | None = None,
        surgery: SurgeryConfig | None = None,
    ) -> None:
        refuse_wrapped(model)
        check_settings(total_steps, gate, budget, removal, surgery)
        check_has_values(model, example)
        self.model = model
        self.total_steps = total_steps
        self.gate = gate or GateConfig()
        self.budget = budget or BudgetConfig()
        self.removal = removal or RemovalConfig()
        self.structure = Structure()
        self._surgery = surgery or SurgeryConfig()
        self._device = example.device
        self._accumulate = 1
        self._loss_scale: Tensor | None = None  # one tensor for good: a backward pass reads what it holds then
        with put_back_on_failure(model), torch.enable_grad():
            convert_blocks(model, example)
            attach_gates(model, self.gate, example)
            self.notes = gating_notes(model, self.gate)
            self._table = _count(model, example)
            unit = self.budget.unit
            self._measured = _measured_for_all(unit, model, example) if unit in MEASURED else None
            self._rounding = self._table.rounding(round_to_on(self._surgery, self._device))
            self._costs = unit_costs(self._table, self.budget, self._measured, rounding=self._rounding)
            self._policy = self._new_policy()
        self._batch: tuple[int, Tensor] | None = None  # samples of the last one, also on the device
        self._beside_output: RemovableHandle | None = None
        self._batches = 0  # for which a penalty was given
        self._looked = 0  # of these, how many had been when a boundary was last looked for
        self._stepped = False

    def _new_policy(self) -> GatePolicy:
        policy = GatePolicy(
            self,
            self.model,
            self._costs,
            units_present(self._costs, self.structure),
            rounding=self._rounding,
            total_steps=self.total_steps,
            window=self.removal.window or max(1, self.total_steps // WINDOWS),
        )
        policy.losses_are_divided_by(self._accumulate)
        policy.scale_losses_by(self._loss_scale)
        return policy

    # The run.

    def parameter_groups(
        self, weight_decay: float = 0.0, *, batch_size: int = 128, adaptive: bool = False
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: the network's weights, and the gates at their own learning rate.

        Args:
            weight_decay: Decay of the weights; biases, norms and gates are not decayed.
            batch_size: Samples of a batch, over all processes: gates may learn faster from larger ones. Over how many
                batches gradients are added up is to be said before (:meth:`losses_are_divided_by`).
            adaptive: Whether the optimizer divides a gradient by its size, as Adam and AdamW do: the gates' learning
                rate is then another.

        Raises:
            ConfigError: The batch size is none.
        """
        check_count("batch_size", batch_size)
        gates = gate_parameters(self.model)
        of_gates = set(gates)
        weights = [parameter for parameter in self.model.parameters() if parameter not in of_gates]
        steps, samples = self.total_steps / self._accumulate, batch_size * self._accumulate
        lr = self.gate.lr_of_step(steps, samples, adaptive=adaptive)
        return [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
            {"params": gates, "weight_decay": 0.0, "lr": lr, "name": "gates"},
        ]

    def penalty(self, loss_scale: Tensor | float | None = None) -> Tensor:
        """What the gates add to the loss of the batch that has just passed through the network (scalar, fp32).

        Call once after each forward pass in training. With several processes it is a collective; their batches may be
        of different sizes. A batch without samples does not count.

        Args:
            loss_scale: Factor by which a GradScaler will scale the loss, if it does. Told for the first time after a
                forward pass, it comes too late for that pass, which teaches the gates nothing.

        Raises:
            RuntimeError: Nothing has passed through the network in training since the last call, or two passes have of
                which a loss is made or whose gradients are added up, or :meth:`penalize_output` has taken it.
        """
        return self._penalty(loss_scale)

    def _penalty(self, loss_scale: Tensor | float | None = None, *, beside_output: bool = False) -> Tensor:
        self._follow_device()
        nothing = torch.zeros((), dtype=torch.float32, device=self._device)
        if not self._policy.active:
            return nothing
        if loss_scale is not None:
            self._scale_losses_by(torch.as_tensor(loss_scale, dtype=torch.float32, device=self._device))
        gates = find_gates(self.model).values()
        decision = next(iter(gates)).decision
        if decision is None and not beside_output and self._is_beside_output:
            raise RuntimeError(
                "the penalty of this pass is in the network's output already (Pruner.penalize_output); expected either "
                "that or penalty() after each forward pass, not both (its handle's remove() takes it off)"
            )
        local = 0 if decision is None else len(decision)
        if decision is not None and not local and _world_size() == 1:  # an empty batch is none
            for gate in gates:
                gate.forget()
            return nothing
        step, self._batches = self._batches, self._batches + 1
        samples, mean_over_ranks = self._over_ranks(local)
        penalty = self._policy.penalty(step, samples, mean_over_ranks)
        return nothing if penalty is None else penalty

    def _over_ranks(self, local: int) -> tuple[int | Tensor, Callable[[Tensor], Tensor]]:
        """Samples of all processes, on the device if there are several, and what averages a tensor over them all.

        Args:
            local: Samples of this process; others may have had more or fewer in their last batch.
        """
        if _world_size() == 1:
            return local, lambda values: values
        if self._batch is None or self._batch[0] != local:  # nothing goes to the device while batches stay alike
            self._batch = local, torch.tensor(local, device=self._device)
        samples = self._batch[1].clone()
        dist.all_reduce(samples)
        share = self._batch[1] / samples.clamp(min=1)

        def mean_over_ranks(values: Tensor) -> Tensor:
            weighted = values * share
            dist.all_reduce(weighted)
            return weighted

        return samples, mean_over_ranks

    def _scale_losses_by(self, loss_scale: Tensor) -> None:
        if self._loss_scale is None:
            self._loss_scale = loss_scale.clone()
            self._policy.scale_losses_by(self._loss_scale)
        else:
            self._loss_scale.copy_(loss_scale)

    def _follow_device(self) -> None:
        """Move along with a network that was moved after the pruner was made."""
        device = next(self.model.parameters()).device
        if device != self._device:
            state = self._policy.state_dict()
            self._device = device
            self._batch = None
            self._loss_scale = None if self._loss_scale is None else self._loss_scale.to(device)
            self._rounding = self._table.rounding(round_to_on(self._surgery, device))
            self._costs = unit_costs(self._table, self.budget, self._measured, rounding=self._rounding)
            self._policy = self._new_policy()
            self._policy.load_state_dict(state)

    def step(self, optimizer: Optimizer | Sequence[Optimizer]) -> list[Operation]:
        """Follow a step of the optimizer, and at the end of a window remove what can go.

        Call after ``optimizer.step()``, with the gradients cleared. Where units were removed, everything that holds
        the network's old parameters or graphs has to be made anew: wrap it again for data parallelism. Learning-rate
        schedules go on.

        Args:
            optimizer: The unwrapped torch optimizer of all of the network's parameters, or a list of several, of some
                parameters each; follows the removals.

        Returns:
            What was removed and frozen; empty at most steps.

        Raises:
            ValueError: The gates are not in the optimizer, or something that trains and that channels are cut from.
            TypeError: Channels have gates, and the optimizer keeps something that cannot follow their removal, as
                Adafactor's rows and columns; or it is around another one, which would not follow. Told at the first
                call, while the network is whole.
        """
        if not self._policy.active:
            return []
        optimizers = all_of(optimizer)
        if not self._stepped:
            check_holds_gates(optimizers, self.model)
            refuse_uncuttable(optimizers, self.model)
            self._stepped = True
        self._policy.after_step()
        first, self._looked = self._looked + 1, self._batches
        if not any(self._policy.at_boundary(step) for step in range(first, self._batches + 1)):
            return []
        refuse_uncuttable(optimizers, self.model)  # again: its first steps may have been left out
        _, verdicts = self._policy.close_window(self._batches)
        return self._operate(verdicts, optimizers)

    def finalize(self, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> list[Operation]:
        """Settle against the budget now what is still undecided; afterwards the network has no gates.

        The end of a run that went to its deadline (``removal.decide_by``) needs nothing more: then nothing happens.

        Args:
            optimizer: The optimizer, or a list of several, if training goes on.

        Returns:
            What was removed and frozen.

        Raises:
            TypeError: The optimizer cannot follow, as in :meth:`step`.
            ValueError: Something that trains and that channels are cut from is in no optimizer, as in :meth:`step`.
        """
        if not self._policy.active:
            return []
        optimizers = [] if optimizer is None else all_of(optimizer)
        if optimizers:
            refuse_uncuttable(optimizers, self.model)
        if not self._batches:
            warnings.warn(
                "no penalty was ever taken (Pruner.penalty, or penalize_output): the gates have learnt nothing, and "
                "what is removed now is chosen by its name",
                stacklevel=2,
            )
        return self._operate(self._policy.settle_now(), optimizers)

    def _operate(self, verdicts: list[Verdict], optimizers: Sequence[Optimizer]) -> list[Operation]:
        share = self._batches / self.total_steps
        operations = [Operation.of(verdict, self._batches, share) for verdict in verdicts]
        _check_agreement(Structure(operations))
        if not verdicts:
            return []
        surgeon = carry_out(operations, self.model)
        for optimizer in optimizers:
            update_optimizer(optimizer, surgeon)
        self.structure.operations += operations
        self._policy.carried_out(self.model, verdicts)
        return operations

    def losses_are_divided_by(self, accumulate: int) -> None:
        """Say that gradients are added up over so many batches for a step, each with its loss divided by their number.

        What a batch's gradient says to a gate depends on it, and so does the gates' learning rate: to be said before
        the optimizer is made. :meth:`penalize_output` says it too, for the gradients alone.

        Raises:
            ConfigError: It is no number of batches.
        """
        check_count("accumulate", accumulate)
        self._accumulate = accumulate
        self._policy.losses_are_divided_by(accumulate)

    @property
    def accumulate(self) -> int:
        """Over how many batches gradients are added up for a step; 1 until :meth:`losses_are_divided_by` says more."""
        return self._accumulate

    def penalize_output(self, accumulate: int = 1) -> RemovableHandle:
        """Add the penalty to whatever loss is made from the network's output, for loops that hide their loss.

        In place of calling :meth:`penalty`. Not for fp16 with a scaled loss. Of an output with several tensors, in
        tuples, lists and dicts, the loss may be made from any of them; the penalty counts once for a forward pass, in
        the first backward pass that reaches the gates. A loop that goes back from several losses of one forward pass,
        each for itself, keeps the graph (``retain_graph=True``) until the last.

        Asked for again, it takes the place of what was asked for before.

        Args:
            accumulate: Batches whose gradients are averaged for one step of the optimizer.

        Returns:
            A handle that takes it off again.
        """
        self.losses_are_divided_by(accumulate)

        def hook(model: nn.Module, _: object, output: object) -> object:
            if model is not self.model:  # a copy of it, with its hooks
                return output
            if not (self.model.training and torch.is_grad_enabled() and self._policy.active):
                return output
            return with_penalty(output, self._penalty(beside_output=True) / accumulate)

        if self._beside_output is not None:  # of a training that failed, perhaps: two would ask the gates twice
            self._beside_output.remove()
        self._beside_output = self.model.register_forward_hook(hook)
        return self._beside_output

    @property
    def _is_beside_output(self) -> bool:
        handle = self._beside_output
        hooks = None if handle is None else handle.hooks_dict_ref()
        return handle is not None and hooks is not None and handle.id in hooks

    # What came of it.

    def report(self) -> dict[str, Any]:
        """Where the network stands: its cost now and dense (one sample, multiply-add = 2), gates, what was removed."""
        cost, dense = self._table.cost_of(self.structure), self._table.dense
        return {
            "kept_cost": self._policy.kept_cost,
            "budget_target": self.budget.target,
            "flops_forward": cost.flops_forward,
            "flops_forward_dense": dense.flops_forward,
            "params": cost.params,
            "params_dense": dense.params,
            "gates_left": len(find_gates(self.model)),
            "removed_blocks": sorted(self.structure.removed_blocks()),
            "removed_channels": self.structure.removed_channels(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, besides the network's and the optimizer's own state, to go on exactly."""
        return {
            "structure": self.structure.to_dict(),
            "unit_cost": None if self._measured is None else self._measured.to_dict(),
            "round_to": round_to_on(self._surgery, self._device),
            "policy": self._policy.state_dict(),
            "loss_scale": None if self._loss_scale is None else self._loss_scale.item(),
            "batches": self._batches,
            "looked": self._looked,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's gates know no loss scale, as they have decided nothing, and would learn from scaled gradients."""
        vars(self).update(state)
        self._policy.scale_losses_by(self._loss_scale)

    @property
    def batches(self) -> int:
        """For how many batches it has given a penalty; those before a state that it took up count."""
        return self._batches

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state: call on a fresh pruner, before the optimizer is made and the network's state is loaded.

        Raises:
            StructureMismatch: The state is of another network, or of other gates; nothing was done to this one.
        """
        structure = Structure.from_dict(state["structure"])
        check_gates(structure, list(state["policy"]["consensus"]["always_on"]), gated_units(self.model))
        replay(structure, self.model)
        self.structure = structure
        if self._measured is not None:
            self._measured = UnitCost.of_state(state)
            self._costs = unit_costs(self._table, self.budget, self._measured)
        if self._surgery.round_to is None and "round_to" in state:  # the device may be another
            self._surgery = SurgeryConfig(state["round_to"])
            self._rounding = self._table.rounding(state["round_to"])
        if state.get("loss_scale") is not None:
            self._loss_scale = torch.tensor(state["loss_scale"], dtype=torch.float32, device=self._device)
        self._policy = self._new_policy()
        self._policy.load_state_dict(state["policy"])
        self._batches, self._looked = state["batches"], state["looked"]


def _count(model: nn.Module, example: Tensor) -> UnitTable:
    """What the network and its units cost.

    Raises:
        ConfigError: Its pass in training cannot be gone through without values.
    """
    try:
        return UnitTable.of(model, tuple(example.shape[1:]), dtype=example.dtype)
    except UserError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model: the cost of {type(model).__name__} cannot be counted in a pass in training of tensors without "
            f"values (PyTorch's meta device): {' '.join(str(error).split())}; expected a forward pass that depends on "
            "shapes alone (no .item(), no branch on a value) and makes its tensors on its input's device"
        ) from error


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _measured_for_all(unit: MeasuredUnit, model: nn.Module, example: Tensor) -> UnitCost:
    """What rank 0 measures: ranks that each went by figures of their own would not agree on what is removed.

    Raises:
        ConfigError: It cannot be measured here.
        RuntimeError: Rank 0 has failed in another way, in which it fails itself.
    """
    if _world_size() == 1:
        return measure_unit_cost(unit, model, example)

    def from_rank_0(found: UnitCost | Exception | None) -> UnitCost | Exception | None:
        shared = [found]
        dist.broadcast_object_list(shared, src=0, device=example.device if example.is_cuda else None)
        return shared[0]

    if dist.get_rank() == 0:
        try:
            measured = measure_unit_cost(unit, model, example)
        except BaseException as error:  # whatever it is: the others wait for what is found
            reason = f"budget.unit: {unit!r} could not be measured by rank 0 ({type(error).__name__}: {error})"
            from_rank_0(error if isinstance(error, ConfigError) else RuntimeError(reason))
            raise
        from_rank_0(measured)
        return measured
    found = from_rank_0(None)
    if isinstance(found, Exception):
        raise found
    assert found is not None
    return found


def _check_agreement(structure: Structure) -> None:
    """Check that all processes are about to do the same: networks of different shapes could not go on together.

    Raises:
        RuntimeError: They are not.
    """
    if _world_size() == 1:
        return
    found: list[str] = [""] * _world_size()
    dist.all_gather_object(found, structure.checksum())
    if len(set(found)) > 1:
        odd = ", ".join(str(rank) for rank, checksum in enumerate(found) if checksum != found[0])
        raise RuntimeError(
            f"rank {odd} would remove other units than rank 0; expected penalty() after every forward pass in "
            "training, and step() after every step, on all processes alike"
        )
