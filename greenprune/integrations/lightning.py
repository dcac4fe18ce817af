"""A callback for Lightning's Trainer (``pip install 'greenprune[lightning]'``)."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.hooks import RemovableHandle

from greenprune.config import UserError
from greenprune.pruner import Pruner

_AVERAGING = tuple(
    getattr(pl.callbacks, name)
    for name in ("StochasticWeightAveraging", "WeightAveraging")  # the second is younger
    if hasattr(pl.callbacks, name)
)


class PrunerCallback(pl.Callback):  # type: ignore[misc]
    """Adds the gates' penalty to the loss, removes units as the training goes on, and settles the rest at its end.

    The module keeps its training step as it is. It makes its one optimizer of ``pruner.parameter_groups()``. The state
    of the pruner is saved with Lightning's checkpoints, and ``fit(..., ckpt_path=...)`` with a fresh pruner goes on
    from it.

    Args:
        pruner: The pruner of the network inside the module; its ``total_steps`` are the batches of the whole fit.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self._handle: RemovableHandle | None = None
        self._steps = 0

    @property
    def state_key(self) -> str:
        """Where Lightning's checkpoints keep the state."""
        return "PrunerCallback"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Bring the network into the structure of a checkpoint before its weights are loaded and the optimizer is made.

        The gates are told of accumulated gradients, as their learning rate follows from it.
        """
        if stage == "fit" and self.pruner.batches == 0:
            self._take_up_before_weights(pl_module)
        self.pruner.losses_are_divided_by(trainer.accumulate_grad_batches)

    def _take_up_before_weights(self, module: pl.LightningModule) -> None:
        """Lightning gives callbacks their state after it has loaded the weights, which fit the structure alone."""
        module.__dict__.pop("on_load_checkpoint", None)  # of a fit that did not start
        asked = module.on_load_checkpoint

        def take_up(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            # A network that was trained without a pruner has none, and is pruned from here on.
            if state is not None and self.pruner.batches == 0:
                self.pruner.load_state_dict(state)
            asked(checkpoint)

        module.on_load_checkpoint = take_up  # until the fit starts

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse what cannot work before anything is trained.

        Raises:
            UserError: Several processes, a precision other than 32-true and bf16-mixed, or a callback that averages
                weights.
        """
        pl_module.__dict__.pop("on_load_checkpoint", None)
        if trainer.world_size > 1:
            raise UserError(
                f"devices: {trainer.world_size} processes are not valid with PrunerCallback, which cannot wrap the "
                "network again after a removal; expected 1, or greenprune's own trainer"
            )
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise UserError(
                f"precision: {trainer.precision!r} is not valid with PrunerCallback; expected 32-true or bf16-mixed"
            )
        for callback in trainer.callbacks:
            if isinstance(callback, _AVERAGING):
                raise UserError(
                    f"callbacks: {type(callback).__name__} is not valid with PrunerCallback: its copy of the network "
                    "keeps what is removed; expected no averages of weights"
                )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the penalty beside the network's output.

        Raises:
            UserError: There is not exactly one optimizer.
        """
        if len(trainer.optimizers) != 1:
            raise UserError(f"PrunerCallback expects one optimizer, not {len(trainer.optimizers)}")
        self._steps = trainer.global_step
        self._handle = self.pruner.penalize_output(trainer.accumulate_grad_batches)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Follow a GradientAccumulationScheduler; the gates' learning rate stays that of the start."""
        if trainer.accumulate_grad_batches != self.pruner.accumulate:
            self._handle = self.pruner.penalize_output(trainer.accumulate_grad_batches)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Follow the optimizer's step, if the batch ended in one."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.pruner.step(trainer.optimizers[0])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Settle what is undecided and leave a network without gates."""
        self._take_penalty_off()
        self.pruner.finalize(trainer.optimizers[0])

    def on_exception(self, *_: Any) -> None:
        """Leave the network's output as it is where a fit fails; the gates stay, for another fit to go on with."""
        self._take_penalty_off()

    def _take_penalty_off(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, for Lightning's checkpoints."""
        return self.pruner.state_dict()
