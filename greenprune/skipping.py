"""Steps whose gradient is not finite, left out as if they had not been: on every rank alike, decided on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from greenprune.config import ConfigError
from greenprune.gating import GatePolicy

MOST_IN_A_ROW = 20
"""Steps skipped one after the other that still are a passing fault (our choice); more, and the network is broken."""


class StepSkipper:
    """Has an optimizer leave out steps whose gradient is not finite, and takes back what else such a step changed.

    Gradients are means over all ranks, so what is not finite on one is not finite on all, and no rank has to tell
    another. The host is told nothing either: the optimizer's fused kernels take the finding as a tensor, as they do
    from a loss scaler, and the rest is chosen by it on the device.

    Args:
        optimizer: The run's optimizer, on its device.
        policy: The gates' policy, if the run is gated.
        scaled: Whether a loss scaler looks after the optimizer's step already.
        device: Device of the network.

    Attributes:
        skipped: 1 if the last step was left out, else 0; a scalar on the device.

    Raises:
        ConfigError: The optimizer cannot leave a step out.
    """

    def __init__(self, optimizer: Optimizer, policy: GatePolicy | None, *, scaled: bool, device: torch.device) -> None:
        if not scaled and not all(group.get("fused") for group in optimizer.param_groups):
            raise ConfigError(
                f"optim.nonfinite: 'skip' is not valid with {type(optimizer).__name__} as it runs here, which has no "
                "fused kernel; expected stop"
            )
        self._optimizer = optimizer
        self._policy = policy
        self._scaled = scaled
        self.skipped = torch.zeros((), device=device)  # 1 for a step that is left out
        self._in_a_row = torch.zeros((), device=device)
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []
        for group in optimizer.param_groups:
            for parameter in group["params"] if isinstance(optimizer, SGD) and group["momentum"] else []:
                # Its first step would make the buffer and leave it without content if it is skipped.
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def begin(self, module: nn.Module) -> None:
        """Remember what a forward pass in training changes."""
        self._buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point() and buffer.numel()]
        if [copy.shape for copy in self._before] != [buffer.shape for buffer in self._buffers]:
            self._before = [torch.empty_like(buffer) for buffer in self._buffers]
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)
        if self._policy is not None and self._policy.active:
            self._policy.remember_step()

    def marked(self, loss: Tensor) -> Tensor:
        """A loss with a gradient that is not finite where the loss is not, which is not always so by itself.

        Nor where a statistic has become so: divided by a variance that has left fp32, activations are 0, and all else
        is finite. Constants that are infinite, as masks may be, are not meant.
        """
        is_bad = ~loss.detach().isfinite()
        if self._buffers:
            now, before = (torch.stack(torch._foreach_norm(of, torch.inf)) for of in (self._buffers, self._before))
            is_bad = is_bad | (before.isfinite() & ~now.isfinite()).any()
        return loss * torch.where(is_bad, torch.nan, 1.0)

    def judge(self, module: nn.Module) -> None:
        """Look at the gradients of all ranks, after the backward pass and before the optimizer's step."""
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        self.skipped = (~torch.nn.utils.get_total_norm(gradients).isfinite()).float()
        self._in_a_row = (self._in_a_row + 1) * self.skipped
        if not self._scaled:
            self._optimizer.found_inf = self.skipped  # type: ignore[attr-defined]

    def end(self, seen: Tensor) -> Tensor:
        """Take back what a step that is left out has changed.

        Args:
            seen: What the step adds to sums of the epoch.

        Returns:
            What it does add, and behind it 1 if it is left out.
        """
        skipped = self.skipped.bool()
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skipped, before, buffer))
        if self._policy is not None and self._policy.active:
            self._policy.forget_step(skipped)
        return torch.cat([torch.where(skipped, torch.zeros_like(seen), seen), self.skipped.to(seen.dtype).view(1)])

    @property
    def in_a_row(self) -> int:
        """Steps left out without one in between that was not; waits for the device."""
        return int(self._in_a_row.item())
