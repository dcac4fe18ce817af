"""What the forward of a module does, as a graph of its modules and of functions (torch.fx), if that is all it does."""

from __future__ import annotations

import contextlib
import copy
import operator
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import checkpoint

# What may be asked of a value to no end; anything else that leads nowhere is there for what it does.
_HARMLESS = (getattr, operator.getitem, "size", "dim", "numel")


class _Value(fx.Proxy):
    """A value that knows when it is changed: ``x += y`` is written down as ``x = x + y`` otherwise."""

    def __iadd__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __ipow__(self, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.ipow, (self, other), {})


IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow)


_DEVICES = ("cpu", "cuda")


def _contexts() -> tuple[object, ...]:
    """What a context that a forward enters may change; fx writes nothing of it down."""
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES]
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


@contextlib.contextmanager
def _autocast_everywhere(enabled: bool) -> Iterator[None]:
    """Within, with gradients, autocast is on or off: a forward that switches it then differs from what is around it."""
    before = [torch.is_autocast_enabled(device) for device in _DEVICES]
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, enabled)
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for device, was_enabled in zip(_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, was_enabled)


class _CannotTell(Exception):
    """A forward does what its steps alone would not."""


class _Tracer(fx.Tracer):
    """Follows the forward of one module; the modules in it are its steps."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__((checkpoint,), (checkpoint.checkpoint,))
        self._around = _contexts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The value of a node."""
        return _Value(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **options: Any) -> fx.Node:
        """Write a step down.

        Raises:
            _CannotTell: It is a checkpoint of activations, or lies in a context, which would be gone through and lost.
        """
        if getattr(target, "__module__", None) == checkpoint.__name__ or _contexts() != self._around:
            raise _CannotTell
        return super().create_node(kind, target, *args, **options)

    def create_arg(self, a: Any) -> Any:
        """Write an argument down.

        Raises:
            _CannotTell: It is a tensor that the forward has made of nothing: at random, perhaps, or on one device.
        """
        if isinstance(a, torch.Tensor) and not any(
            a is held for held in (*self.root.parameters(), *self.root.buffers())
        ):
            raise _CannotTell
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every module is one."""
        return True


@contextlib.contextmanager
def _as_before(block: nn.Module) -> Iterator[Callable[[], bool]]:
    """Within, a forward may do what it likes to its modules and to random numbers; it is undone.

    Yields:
        Whether it has changed something that one of its modules holds.
    """
    modules = list(block.modules())
    held = [dict(vars(module)) for module in modules]
    inside = [
        (value, copy.copy(value)) for own in held for value in own.values() if isinstance(value, dict | list | set)
    ]
    generators = torch.get_rng_state(), random.getstate()

    def changed() -> bool:
        same = all(
            vars(module).keys() == own.keys()
            and all(vars(module)[name] is own[name] for name in own.keys() - {"training"})
            for module, own in zip(modules, held, strict=True)
        )
        return not same or any(not _same_content(value, before) for value, before in inside)

    try:
        yield changed
    finally:
        for module, own in zip(modules, held, strict=True):
            vars(module).clear()
            vars(module).update(own)
        for value, before in inside:
            if not _same_content(value, before):
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])


def _same_content(value: Any, before: Any) -> bool:
    """Whether a container holds the very same things as a copy of it made before."""
    if isinstance(value, dict):
        return value.keys() == before.keys() and all(value[key] is before[key] for key in before)
    if isinstance(value, list):
        return len(value) == len(before) and all(now is then for now, then in zip(value, before, strict=True))
    return bool(value == before)


def follow(block: nn.Module) -> tuple[fx.Node, fx.Node] | None:
    """Input and result of what a module's forward does; None where that cannot be told, or depends on the mode."""
    graphs = []
    with _as_before(block) as changed:
        try:
            for training in (False, True):
                for module in block.modules():
                    module.training = training
                with _autocast_everywhere(training):
                    graphs.append(_Tracer().trace(block))
        except Exception:  # noqa: BLE001 - what a forward makes of a value that is none yet is an error of its own
            return None
        if changed() or str(graphs[0]) != str(graphs[1]):
            return None
    (begin,) = (node for node in graphs[0].nodes if node.op == "placeholder")
    (output,) = (node for node in graphs[0].nodes if node.op == "output")
    end = output.args[0]
    return (begin, end) if isinstance(end, fx.Node) and not _does_more(graphs[0], end) else None


def _does_more(graph: fx.Graph, end: fx.Node) -> bool:
    """Whether a forward does something that its result is not made of: keeps an average, say."""
    leads_there, to_look_at = {end}, [end]
    while to_look_at:
        for node in to_look_at.pop().all_input_nodes:
            if node not in leads_there:
                leads_there.add(node)
                to_look_at.append(node)
    others = (node for node in graph.nodes if node not in leads_there)
    return any(node.op.startswith("call_") and node.target not in _HARMLESS for node in others)
