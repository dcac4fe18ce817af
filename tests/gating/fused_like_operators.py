"""Runs gated blocks with the fused kernels and with PyTorch's operators, and compares all that comes of them.

    python tests/gating/fused_like_operators.py cuda
    TRITON_INTERPRET=1 python tests/gating/fused_like_operators.py cpu

In Triton's interpreter the kernels run on a CPU: slowly, but with the same indices and masks.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from greenprune import kernels
from greenprune.gating import gates
from greenprune.gating.gates import BlockGate
from greenprune.models import ResidualBlock, residual

ACTIVATIONS = [nn.ReLU(), nn.Identity(), nn.SiLU(inplace=True)]
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
SHAPES = {
    "one tile": (5, 8, 4, 4),
    "a part of a tile": (3, 20, 5, 7),
    "several pieces": (2, 12, 40, 41),
    "many channels": (4, 200, 3, 3),
    "one position": (6, 33, 1, 1),
    "one sample": (1, 16, 8, 8),
    "more voices than fit": (150, 4, 2, 2),
}


def results(
    shape: tuple[int, ...],
    layout: torch.memory_format,
    dtype: torch.dtype,
    activation: nn.Module,
    every: int,
    seed: int,
) -> dict[str, Tensor]:
    """Output, decisions and gradients of a block whose gate is undecided."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x = random(*shape).to(DEVICE, dtype, memory_format=layout).requires_grad_()
    branch = nn.Conv2d(shape[1], shape[1], 1, groups=shape[1])
    block = ResidualBlock(branch, nn.Identity(), activation, input_activated=False)
    gate = BlockGate(shape[1], 0.6)
    with torch.no_grad():
        assert gate.weight is not None
        gate.weight.copy_(3 * random(*gate.weight.shape))
        gate.bias.fill_((0.1, gates.BOUND + 0.01, -gates.BOUND - 0.01)[seed % 3])
        branch.weight.copy_(random(*branch.weight.shape))
        branch.bias.copy_(random(*branch.bias.shape))
    branch.to(DEVICE, dtype)
    gate.to(DEVICE)
    block.gate, block.every = gate, every
    gate.every, gate.parts = every, 2
    gate.loss_scale = torch.tensor(128.0, device=DEVICE) if seed % 2 else None
    out = block(x)
    assert gate.decision is not None
    assert gate.logit is not None
    # So large that neither the bound nor the curvature of a decision's gradient is all that there is to see.
    size = (1.0 if gate.loss_scale is None else 128.0) / (shape[0] * math.sqrt(shape[1] * shape[2] * shape[3]))
    grad = (size * random(*shape)).to(DEVICE, dtype, memory_format=layout)
    decision, logit = gate.decision, gate.logit
    (out * grad).sum().backward(retain_graph=True)
    (0.1 * size * decision.mean()).backward()
    found = {"out": out, "decision": decision, "logit": logit, "x": x.grad, "weight": gate.weight.grad}
    found |= {"bias": gate.bias.grad, "branch": branch.weight.grad}
    return {name: tensor.detach().float() for name, tensor in found.items() if tensor is not None}


def main() -> None:
    layouts = [torch.contiguous_format, torch.channels_last]
    dtypes = [torch.float32, torch.bfloat16]
    open_, closed = 0, 0
    # On a CPU operators round a sum in bf16, and would see that there is nothing to multiply by.
    residual.sum_over = gates.sum_over = lambda x, dims, dtype: x.sum(dim=dims, dtype=dtype)  # type: ignore[attr-defined]
    residual._known_all_on = lambda _: False
    cases = list(itertools.product(SHAPES.items(), layouts, dtypes, ACTIVATIONS, [1, 4]))
    if DEVICE == "cpu":
        cases = cases[::11]  # some of every kind: the interpreter takes its time
    for number, ((name, shape), layout, dtype, activation, every) in enumerate(cases):
        arguments = (shape, layout, dtype, activation, every, number)
        used = 0

        def with_kernels(x: Tensor) -> object:
            nonlocal used
            used += 1
            return kernels

        residual.kernels_for = gates.kernels_for = with_kernels  # type: ignore[attr-defined, assignment]
        fused = results(*arguments)
        assert used == 2
        residual.kernels_for = gates.kernels_for = lambda _: None  # type: ignore[attr-defined, assignment]
        plain = results(*arguments)
        assert fused.keys() == plain.keys()
        assert torch.equal(fused["decision"], plain["decision"]), (name, fused["logit"], plain["logit"])
        open_ += int(plain["decision"].sum())
        closed += int((1 - plain["decision"]).sum())
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        # Operators round each product of the decision's gradient in bf16, before they are added up.
        of_gate = 2e-5 if dtype == torch.float32 else 0.2
        for key in plain:
            scale = float(plain[key].abs().max()) + 1e-6
            limit = of_gate if key in ("weight", "bias") else tolerance
            difference = float((fused[key] - plain[key]).abs().max()) / scale
            assert difference < limit, f"{name}, {layout}, {dtype}, {activation}, every {every}: {key} {difference}"
    assert open_ > 50
    assert closed > 50
    kernels.try_out(torch.device(DEVICE))
    print(f"{number + 1} cases alike, {open_} decisions on, {closed} off")


if __name__ == "__main__":
    main()
