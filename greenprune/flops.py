"""What the present structure costs, counted by PyTorch's own counter on a copy without storage.

Convention: one multiply-add is 2 FLOPs. Matrix products, convolutions and attention are counted; normalisation,
activations and pooling are not (torch.utils.flop_counter). Passes are of two samples: of what a pass does once, however
many samples it has, as Swin V2 makes its position biases (1 % of it), a sample is charged half.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from greenprune.config import UserError

_BATCH = 2  # batch normalisation in training needs more than one value a channel


@dataclass(frozen=True)
class Cost:
    """What a network or a part of it costs; costs of disjoint parts add up.

    Attributes:
        flops_forward: FLOPs of the forward pass of one sample.
        flops_train: FLOPs of the forward and backward pass of one sample.
        params: Number of parameters, frozen ones too: they take memory and can be removed as well.
    """

    flops_forward: int = 0
    flops_train: int = 0
    params: int = 0


def subtract(whole: Cost, parts: Iterable[Cost]) -> Cost:
    """What is left of a network without some disjoint parts of it."""
    gone = list(parts)
    return Cost(
        whole.flops_forward - sum(part.flops_forward for part in gone),
        whole.flops_train - sum(part.flops_train for part in gone),
        whole.params - sum(part.params for part in gone),
    )


def _convolution_backward(
    grad_shape: Sequence[int],
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: Sequence[bool],
    **_: object,
) -> int:
    """FLOPs of a convolution's backward: for each of input and weight as many as in its forward."""
    forward: int = conv_flop_count(list(x_shape), list(weight_shape), list(grad_shape), transposed)
    return forward * (int(output_mask[0]) + int(output_mask[1]))


# PyTorch's formula takes the weight's gradient of a convolution in groups for that of one without, which is as many
# times larger as there are groups.
_CORRECTIONS = {torch.ops.aten.convolution_backward: _convolution_backward}


def go_back_from(output: object) -> None:
    """The backward pass of a sum over a network's output: a tensor, or what is made of such.

    Raises:
        UserError: There is nothing in it that training goes back through.
    """
    tensors = list(trained_tensors(output))
    if not tensors:
        raise UserError(
            f"the network gives a {type(output).__name__} without a tensor that training goes back through; expected a "
            "tensor, or a tuple, dict or dataclass of tensors"
        )
    torch.autograd.backward(tensors, [torch.ones_like(tensor) for tensor in tensors])


def trained_tensors(output: object) -> Iterator[Tensor]:
    """The tensors that training goes back through in a network's output.

    It may be made of tuples, lists, dicts and dataclasses of any depth.
    """
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, Mapping | tuple | list):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from trained_tensors(item)
    elif is_dataclass(output) and not isinstance(output, type):
        for item in fields(output):
            yield from trained_tensors(getattr(output, item.name, None))


def count_costs(
    model: nn.Module,
    image_shape: tuple[int, ...],
    names: Iterable[str] = ("",),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Cost]:
    """Count what a network and its parts cost, gates included.

    Nothing is computed: the passes run on the meta device, in tenths of a second.

    Args:
        model: The unwrapped network.
        image_shape: Shape of one input without the batch: [C, H, W] of an image.
        names: Module paths as in ``named_modules``; the empty one is the whole network.
        dtype: Of the input.

    Returns:
        The cost of each named module.
    """
    shadow = copy.deepcopy(model).to("meta").train()
    images = torch.empty(_BATCH, *image_shape, dtype=dtype, device="meta")
    # Without gradients the counter fails at a module that is given a view of a parameter that asks for some, such as a
    # learned query.
    trained = [parameter for parameter in shadow.parameters() if parameter.requires_grad]
    shadow.requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        shadow(images)
    for parameter in trained:
        parameter.requires_grad_(True)
    # One counter over both passes: it knows whose backward it sees only if it saw the forward. Gradients without values
    # have no anomalies to look for, which a script may have asked for.
    with (
        torch.autograd.set_detect_anomaly(False),
        FlopCounterMode(display=False, custom_mapping=_CORRECTIONS) as training,
    ):
        go_back_from(shadow(images))
    in_forward, in_training = forward.get_flop_counts(), training.get_flop_counts()
    root = type(model).__name__
    costs = {}
    for name in names:
        key = f"{root}.{name}" if name else "Global"
        flops_forward = sum(in_forward.get(key, {}).values()) // _BATCH
        flops_train = sum(in_training.get(key, {}).values()) // _BATCH
        if name:
            # The counter books the backward of neighbours under each other (a shortcut's under the branch beside it).
            # Inside a network the backward of a product or convolution is two more of its size: by input and by weight.
            # A gate's is one: nothing goes back into its input.
            flops_train = (2 if name.endswith(".gate") else 3) * flops_forward
        params = sum(p.numel() for p in model.get_submodule(name).parameters())
        costs[name] = Cost(flops_forward, flops_train, params)
    return costs
