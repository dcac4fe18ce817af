"""Residual blocks that nobody has registered, found in what a module's forward does (torch.fx) and taken apart by it.

Where the forward of a module adds to a value what a branch makes of it, or to what a smaller path makes of it, that is
a residual block; several such sums in a row are several blocks. Modules inside are not looked into: a branch that is a
chain of modules stays one, so that channels between its layers can be gated. What stands between them (a function, a
product with a parameter) becomes a module of its own.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.modules import activation
from torch.nn.modules.conv import _ConvNd

from greenprune.models.forward_graph import IN_PLACE, follow
from greenprune.models.residual import PlainBlock, ResidualBlock

# By the kind of node and what it calls. In place on what the branch has made it is an addition as well.
_ADDITIONS = (
    ("call_function", operator.add),
    ("call_function", operator.iadd),
    ("call_function", torch.add),
    ("call_method", "add"),
)

# Functions that are activations, as the modules that do the same.
_ACTIVATIONS: dict[tuple[str, Any], type[nn.Module]] = {
    ("call_function", functional.relu): nn.ReLU,
    ("call_function", torch.relu): nn.ReLU,
    ("call_method", "relu"): nn.ReLU,
    ("call_function", functional.relu6): nn.ReLU6,
    ("call_function", functional.gelu): nn.GELU,
    ("call_function", functional.silu): nn.SiLU,
    ("call_function", functional.hardswish): nn.Hardswish,
    ("call_function", functional.mish): nn.Mish,
}


# What a class may do besides its forward, which its modules alone would not.
_LOST = ("__call__", "train", "_apply", "state_dict", "_save_to_state_dict", "_load_from_state_dict", "get_extra_state")
_LOST_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def find_residuals(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network that can be taken apart by what their forward does, in their taken-apart form.

    Of modules in one another it is the innermost. Of a class of which some are such blocks, those without a sum (where
    the width changes, say) are blocks without a shortcut. The network itself is none, nor is what is called with more
    than one value, what stands or has tensors in several places or such that its forward leaves out, and what does
    otherwise in training than in evaluation but through its modules.

    Args:
        model: The network.

    Returns:
        By path, in the order of the network: a :class:`ResidualBlock`, a chain with some, or a :class:`PlainBlock`,
        made of the block's own modules and parameters.
    """
    shared = _in_several_places(model)
    alone = {
        name: module
        for name, module in model.named_modules()
        if name and "_orig_mod" not in name and _may_be_block(module) and not shared & _ids(module)
    }
    parted = {name: part(module) for name, module in alone.items()}
    found = {name: split for name, split in parted.items() if split is not None and _holds_all(split, alone[name])}
    found = {name: split for name, split in found.items() if not any(other.startswith(f"{name}.") for other in found)}
    kinds = {type(alone[name]) for name in found}
    without_sum = {name: module for name, module in alone.items() if type(module) in kinds and parted[name] is None}
    for name, module in without_sum.items():
        if not any(f"{name}.".startswith(f"{other}.") or other.startswith(f"{name}.") for other in found):
            plain = _plain(module)
            if plain is not None and _holds_all(plain, module):
                found[name] = plain
    return {name: found[name] for name in alone if name in found}


def _may_be_block(module: nn.Module) -> bool:
    """Whether a module has a forward of its own that takes one value, and layers that could be left out."""
    kind = type(module)
    of_others = kind.__module__.startswith(("torch.", "greenprune.")) or isinstance(module, ResidualBlock | PlainBlock)
    if of_others or kind.forward is nn.Sequential.forward or not _layers([module]):
        return False
    if _does_more_than_its_forward(module):
        return False
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return len(parameters) == 1 and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL


def _does_more_than_its_forward(module: nn.Module) -> bool:
    """Whether something else than the forward of its class would be lost with a module."""
    kind = type(module)
    own = any(getattr(kind, name) is not getattr(nn.Module, name) for name in _LOST)
    return own or "forward" in vars(module) or any(getattr(module, name, None) for name in _LOST_HOOKS)


def _layers(modules: Collection[nn.Module]) -> int:
    """How many layers with products there are in some modules."""
    return sum(isinstance(inner, _ConvNd | nn.Linear) for module in modules for inner in module.modules())


def _ids(module: nn.Module) -> set[int]:
    return {id(held) for held in (*module.modules(), *module.parameters(), *module.buffers())}


def _holds_all(split: nn.Module, block: nn.Module) -> bool:
    """Whether nothing of a block is lost, and no tensor has come into several places."""
    left = set(split.modules())
    gone = [module for module in block.modules() if module not in left]
    if _in_several_places(split) or any(_does_more_than_its_forward(module) for module in gone):
        return False
    of_block, of_split = ([*module.parameters(), *module.buffers()] for module in (block, split))
    return {id(tensor) for tensor in of_block} == {id(tensor) for tensor in of_split}


def _in_several_places(model: nn.Module) -> set[int]:
    """Tensors and modules with tensors that have several places; activations may."""
    places: Counter[int] = Counter()
    for _, module in model.named_modules(remove_duplicate=False):
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        places.update(id(tensor) for tensor in tensors)
        if any(True for _ in (*module.parameters(), *module.buffers())):
            places[id(module)] += 1
    return {held for held, count in places.items() if count > 1}


class _Traced(fx.GraphModule):
    """What a block's forward does between its modules."""

    def __reduce__(self) -> Any:
        """Not pickled: what is read back is traced again by fx, to something else perhaps.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "a network with blocks that were found by what their forward does cannot be pickled as a whole; expected "
            "its state_dict() to be saved (docs/library.md, Resuming)"
        )


def part(block: nn.Module) -> nn.Module | None:
    """A module's taken-apart form by what its forward does; None if it is no residual block or cannot be followed."""
    ends = follow(block)
    if ends is None:
        return None
    parts: list[nn.Module] = []
    for stretch in _stretches(*ends):
        residual = _sum(block, stretch)
        if residual is not None:
            parts.append(residual)
            continue
        step = _step(block, stretch)
        last = parts[-1] if parts else None
        if isinstance(last, ResidualBlock) and isinstance(last.activation, nn.Identity) and _is_activation(step):
            # Whether the block's input has passed it too is not known: where the branch goes, it stays.
            last.activation, last.input_activated = _not_in_place(step), False
        elif isinstance(last, ResidualBlock) and _works_in_place_on(stretch.begin, block, stretch.nodes):
            return None  # without the branch it would work on what the block is given
        else:
            parts.append(step)
    if not any(isinstance(found, ResidualBlock) for found in parts):
        return None
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _plain(block: nn.Module) -> PlainBlock | None:
    """A block without a sum, if it is a row of modules."""
    ends = follow(block)
    steps = [] if ends is None else _steps(block, *ends)
    row = steps and not any(isinstance(step, fx.GraphModule) for step in steps)
    return PlainBlock(nn.Sequential(*steps)) if row else None


class _Stretch:
    """The nodes from one value of a graph to a later one, between which no single node is all that there is.

    Attributes:
        begin: The first value; not among the nodes.
        nodes: What is made of it, in order; the last one is where it ends.
    """

    def __init__(self, begin: fx.Node, nodes: list[fx.Node]) -> None:
        self.begin = begin
        self.nodes = nodes

    @property
    def end(self) -> fx.Node:
        """Its last node."""
        return self.nodes[-1]


def _between(begin: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes that a value is made of, from another one on, in order; without that one."""
    order = {node: number for number, node in enumerate(begin.graph.nodes)}
    depends = {begin}
    for node in begin.graph.nodes:
        if depends.intersection(node.all_input_nodes):
            depends.add(node)
    found, to_look_at = set(), [end]
    while to_look_at:
        node = to_look_at.pop()
        if node in depends and node is not begin and node not in found:
            found.add(node)
            to_look_at += node.all_input_nodes
    return sorted(found, key=order.__getitem__)


def _stretches(begin: fx.Node, end: fx.Node) -> Iterator[_Stretch]:
    """A way through a graph, cut at every node that all of it passes through."""
    nodes = _between(begin, end)
    place = {node: number for number, node in enumerate([begin, *nodes])}
    last_use = {node: max((place[user] for user in node.users if user in place), default=0) for node in place}
    first, pending = 0, last_use[begin]
    for number, node in enumerate(nodes, 1):
        if pending <= number:
            yield _Stretch(([begin, *nodes])[first], nodes[first:number])
            first = number
        pending = max(pending, last_use[node])


def _sum(block: nn.Module, stretch: _Stretch) -> ResidualBlock | None:
    """The residual block that a stretch is: a sum of a branch and of where it begins, or of what has fewer layers."""
    node = stretch.end
    if (node.op, node.target) not in _ADDITIONS or node.kwargs or len(node.args) != 2:
        return None
    ends = [operand for operand in node.args if isinstance(operand, fx.Node)]
    ways = [_between(stretch.begin, operand) for operand in ends]
    if len(ends) < 2 or not all(way or operand is stretch.begin for way, operand in zip(ways, ends, strict=True)):
        return None
    layers = [
        _layers([block.get_submodule(str(step.target)) for step in way if step.op == "call_module"]) for way in ways
    ]
    if (
        layers[0] == layers[1]
        or set(ways[0]) & set(ways[1])
        or _works_in_place_on(stretch.begin, block, {*ways[0], *ways[1], node})
    ):
        return None
    branch, shortcut = ends if layers[0] > layers[1] else reversed(ends)
    beside = _steps(block, stretch.begin, shortcut)
    return ResidualBlock(
        nn.Sequential(*_steps(block, stretch.begin, branch)),
        nn.Sequential(*beside) if beside else nn.Identity(),
        nn.Identity(),
        input_activated=True,
    )


def _works_in_place_on(value: fx.Node, block: nn.Module, users: Collection[fx.Node]) -> bool:
    """Whether some of its users change a value: the other way from there on would go on with another."""
    for node in value.users:
        if node not in users or node.args[:1] != (value,):
            continue
        if node.op == "call_module":
            first = block.get_submodule(str(node.target))
            while type(first).forward is nn.Sequential.forward and len(first):  # type: ignore[arg-type]
                first = next(first.children())
            if getattr(first, "inplace", False):
                return True
        elif node.kwargs.get("inplace") or str(node.target).endswith("_") or node.target in IN_PLACE:
            return True
    return False


def _steps(block: nn.Module, begin: fx.Node, end: fx.Node) -> list[nn.Module]:
    """What makes a value of another one, in a row; a module that is no more than a row of others as these."""
    steps = [_step(block, stretch) for stretch in _stretches(begin, end)]
    return [inner for step in steps for inner in _opened(step)]


def _opened(step: nn.Module) -> list[nn.Module]:
    """The modules that a module is a row of (a convolution with its norm, a perceptron), else itself."""
    if not _may_be_block(step) or isinstance(step, fx.GraphModule | _ConvNd | nn.Linear):
        return [step]
    ends = follow(step)
    inner = [step] if ends is None else _steps(step, *ends)
    return [step] if any(isinstance(found, fx.GraphModule) for found in inner) else inner


def _step(block: nn.Module, stretch: _Stretch) -> nn.Module:
    """What a stretch does, as a module: the block's own where it is one."""
    node = stretch.end
    if len(stretch.nodes) == 1 and node.args == (stretch.begin,):
        if node.op == "call_module" and not node.kwargs:
            return block.get_submodule(str(node.target))
        activation_of = _ACTIVATIONS.get((node.op, node.target))
        if activation_of is not None and not node.kwargs.keys() - {"inplace"}:
            return activation_of()
    graph = fx.Graph()
    copies = {stretch.begin: graph.placeholder("x")}

    def copy_of(original: fx.Node) -> fx.Node:
        if original not in copies:
            for value in original.all_input_nodes:
                copy_of(value)
            copies[original] = graph.node_copy(original, copies.__getitem__)
        return copies[original]

    for original in stretch.nodes:  # in the order of the forward, which matters to what works in place
        copy_of(original)
    graph.output(copies[stretch.end])
    made = _Traced(block, graph, class_name="Traced")
    for path, _ in made.named_buffers():  # what is not to be saved is registered as if it were
        owner, _, name = path.rpartition(".")
        if name in block.get_submodule(owner)._non_persistent_buffers_set:
            made.get_submodule(owner)._non_persistent_buffers_set.add(name)
    return made


def _is_activation(step: nn.Module) -> bool:
    kind = type(step)
    if kind.__module__ == activation.__name__:
        return not isinstance(step, nn.MultiheadAttention)
    return kind.__module__.startswith("timm.layers.activations")


def _not_in_place(step: nn.Module) -> nn.Module:
    """An activation that leaves what it is given: where the branch has gone, that may be somebody else's too."""
    if not getattr(step, "inplace", False):
        return step
    step = copy.copy(step)
    step.inplace = False  # type: ignore[assignment]
    return step
