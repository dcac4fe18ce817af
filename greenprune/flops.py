"""What the present structure costs, counted by PyTorch's own counter on a copy without storage.

Convention: one multiply-add is 2 FLOPs. Matrix products, convolutions and attention are counted; normalisation,
activations and pooling are not (torch.utils.flop_counter).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_BATCH = 2  # batch normalisation in training needs more than one value a channel


@dataclass(frozen=True)
class Cost:
    """What one network costs.

    Attributes:
        flops_forward: FLOPs of the forward pass of one sample.
        flops_train: FLOPs of the forward and backward pass of one sample.
        params: Number of trainable parameters.
    """

    flops_forward: int
    flops_train: int
    params: int


def _on_meta(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta")


def network_cost(model: nn.Module, image_shape: tuple[int, int, int]) -> Cost:
    """Count what the network costs in its present structure, gates included.

    Nothing is computed: the passes run on the meta device, in tens of milliseconds.

    Args:
        model: The unwrapped network.
        image_shape: Shape [C, H, W] of one input.
    """
    shadow = _on_meta(model).train()
    images = torch.empty(_BATCH, *image_shape, device="meta")
    with FlopCounterMode(display=False) as forward:
        logits = shadow(images)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return Cost(
        flops_forward=forward.get_total_flops() // _BATCH,
        flops_train=(forward.get_total_flops() + backward.get_total_flops()) // _BATCH,
        params=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def module_flops(model: nn.Module, names: list[str], image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Forward FLOPs of one sample in each of the named modules.

    Args:
        model: The unwrapped network.
        names: Module paths as in ``named_modules``.
        image_shape: Shape [C, H, W] of one input.
    """
    shadow = _on_meta(model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(_BATCH, *image_shape, device="meta"))
    counts = counter.get_flop_counts()
    root = type(model).__name__
    return {name: sum(counts.get(f"{root}.{name}", {}).values()) // _BATCH for name in names}
