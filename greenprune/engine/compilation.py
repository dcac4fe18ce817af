"""``torch.compile`` for networks whose structure changes: block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from greenprune.models import PlainBlock, ResidualBlock

# Beyond its limit of 8 variants of one function, torch.compile goes on without compiling and says nothing; all blocks
# of a network share one function, and each structure is a variant.
_VARIANTS = 4096


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Have each block of an unwrapped network compiled, in place, when it first runs in a structure.

    Whole networks take 11 to 34 s to compile anew after each removal on a CPU; of blocks, those that lost channels
    alone are compiled anew, and blocks of the same shapes share what was compiled. What was compiled for an earlier
    structure is guarded by the shapes and modules it was compiled for, so it is never run again.

    Args:
        model: The unwrapped network.
        backend: What torch.compile compiles with.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, _VARIANTS)
    for module in _outermost_blocks(model):
        module.compile(backend=backend)


def _outermost_blocks(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, ResidualBlock | PlainBlock):
        return [module]
    return [block for child in module.children() for block in _outermost_blocks(child)]
