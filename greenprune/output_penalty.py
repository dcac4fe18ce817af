"""A penalty that is learnt from with whatever loss is made of a network's output."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from greenprune.flops import trained_tensors


class _Once(torch.autograd.Function):
    """Passes a penalty on; the first backward pass gives it the gradient that a term of the loss has, others nothing.

    What goes back from several outputs comes here together, as one gradient.
    """

    @staticmethod
    def forward(ctx: Any, penalty: Tensor) -> Tensor:
        ctx.given = False
        return penalty.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor | None:
        if ctx.given:  # of one pass, whose parts of the loss go back one after the other
            return None
        ctx.given = True
        return torch.ones_like(grads[0])


class _PenaltyBeside(torch.autograd.Function):
    """Passes an output on; what goes back from it asks for the penalty's gradient too.

    Without ``as_view`` it is a tensor of its own to PyTorch, though of the same storage, so that it may be changed in
    place. A view may not, which PyTorch tells.
    """

    @staticmethod
    def forward(_: Any, output: Tensor, penalty: Tensor, as_view: bool) -> Tensor:
        return output.view_as(output) if as_view else output.detach()

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        return grad, torch.ones((), device=grad.device), None


def with_penalty(output: object, penalty: Tensor) -> object:
    """The output with a penalty beside every tensor that training may go back through, counted once for all.

    Args:
        output: What a network gives: a tensor, or tuples, lists, dicts and dataclasses of tensors; dicts are changed in
            place.
        penalty: A scalar with gradient.

    Raises:
        TypeError: There is no such tensor in it.
    """
    once = _Once.apply(penalty)
    if isinstance(output, Tensor):
        return _PenaltyBeside.apply(output, once, False)
    tensors = {id(tensor): tensor for tensor in trained_tensors(output)}.values()
    # Of two views of the same, the one would not notice that the other is changed in place.
    roots = Counter(_root(tensor) for tensor in tensors)
    beside = {tensor: _PenaltyBeside.apply(tensor, once, roots[_root(tensor)] > 1) for tensor in tensors}
    changed = _exchange(output, beside)
    if changed is None:
        raise TypeError(
            f"the network gives a {type(output).__name__}; expected a tensor, or a tuple, dict or dataclass of tensors"
        )
    return changed


def _root(tensor: Tensor) -> int:
    """Equal for tensors that autograd knows as views of the same."""
    return id(tensor if tensor._base is None else tensor._base)


def _exchange(output: object, beside: Mapping[Tensor, Tensor]) -> Any:
    """An output with some of its tensors exchanged, dicts in place; None if there is none of them in it."""
    if isinstance(output, Tensor):
        return beside.get(output)
    places = _places(output)
    changes = {place: changed for place, item in places if (changed := _exchange(item, beside)) is not None}
    if not changes:
        return None
    if isinstance(output, dict):
        for key, item in changes.items():
            output[key] = item
        return output
    if not isinstance(output, tuple | list):
        made = copy.copy(output)
        for name, item in changes.items():
            object.__setattr__(made, name, item)  # also of one that is frozen
        return made
    items = [changes.get(place, item) for place, item in places]
    if isinstance(output, list):
        return items
    return type(output)(*items) if hasattr(output, "_fields") else tuple(items)


def _places(output: object) -> list[tuple[Any, object]]:
    """What an output is made of, each with its key, index or name; nothing if it is none that can be taken apart."""
    if isinstance(output, dict):
        return list(output.items())
    if isinstance(output, tuple | list):
        return list(enumerate(output))
    if is_dataclass(output) and not isinstance(output, type):
        return [(item.name, getattr(output, item.name, None)) for item in fields(output)]
    return []
