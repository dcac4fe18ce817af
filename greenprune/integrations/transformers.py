"""A callback for the Trainer of Hugging Face transformers (``pip install 'greenprune[transformers]'``)."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from greenprune.config import UserError
from greenprune.pruner import Pruner


class PrunerCallback(TrainerCallback):  # type: ignore[misc]
    """Adds the gates' penalty to the loss, removes units as the training goes on, and settles the rest at its end.

    The trainer gets an optimizer made of ``pruner.parameter_groups()``; where it accumulates gradients, that is said to
    ``pruner.losses_are_divided_by`` before.

    Args:
        pruner: The pruner of the network that is trained; its ``total_steps`` are the batches of the whole training.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self._handle: RemovableHandle | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the penalty beside the network's output.

        Raises:
            UserError: Several processes or GPUs, fp16 with a scaled loss, weights of an earlier checkpoint, or
                accumulated gradients that the pruner was not told of before the optimizer was made.
        """
        if args.world_size > 1:
            raise UserError(
                f"{args.world_size} processes are not valid with PrunerCallback, which cannot wrap the network again "
                "after a removal; expected 1, or greenprune's own trainer"
            )
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs are not valid with PrunerCallback, since the trainer copies the network to each; "
                "expected 1, as with the environment's CUDA_VISIBLE_DEVICES=0"
            )
        if args.fp16:
            raise UserError("fp16: True is not valid with PrunerCallback; expected bf16 or full precision")
        if args.load_best_model_at_end:  # weights of before the last removals, in a network of after them
            raise UserError("load_best_model_at_end: True is not valid with PrunerCallback; expected False")
        if state.global_step > 0:  # the pruner's own state is not in the trainer's checkpoints
            raise UserError(
                f"resume_from_checkpoint: going on after {state.global_step} steps is not valid with PrunerCallback; "
                "expected a training from its start"
            )
        if self.pruner.accumulate != args.gradient_accumulation_steps:
            raise UserError(
                f"gradient_accumulation_steps: {args.gradient_accumulation_steps} is not what the pruner was told; "
                f"expected {self.pruner.accumulate}, or pruner.losses_are_divided_by("
                f"{args.gradient_accumulation_steps}) before the optimizer is made"
            )
        self._handle = self.pruner.penalize_output(args.gradient_accumulation_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Follow the optimizer's step."""
        self.pruner.step(_raw(given["optimizer"]))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Settle what is undecided and leave a network without gates."""
        if self._handle is not None:
            self._handle.remove()
        self.pruner.finalize(_raw(given["optimizer"]))


def _raw(optimizer: Any) -> Optimizer:
    """The torch optimizer inside Accelerate's wrapper."""
    raw: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return raw
