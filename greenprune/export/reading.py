"""A module file read as data: the layers that it spells out are made anew, and nothing that it says is run.

A folder from somewhere else may hold any Python. :func:`layers_of` takes the text apart instead, as
:func:`greenprune.export.source.module_source` put it together: calls of known layers with plain values, and the classes
that these need, which have to be word for word this package's own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from greenprune.export import layers
from greenprune.export.source import definitions
from greenprune.models.attention import SelfAttention, SeparateSelfAttention, WindowAttention

_OWN: dict[str, type[nn.Module]] = {
    name: kind for name, kind in vars(layers).items() if isinstance(kind, type) and kind.__module__ == layers.__name__
} | {kind.__name__: kind for kind in (SelfAttention, SeparateSelfAttention, WindowAttention)}

_IMPORTS = {"__future__", "math", "torch", "torch.nn", "safetensors.torch"}

# What constructors say of arguments that they do not take.
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class NotAnExport(ValueError):
    """A text that :func:`greenprune.export.source.module_source` did not write; the message says where."""


def layers_of(text: str) -> nn.Sequential:
    """The network that a module file spells out, its tensors without memory (on the meta device).

    Args:
        text: What the file holds.

    Raises:
        NotAnExport: There is something in it that is not the making of a known layer.
        RecursionError: Its calls are too deep inside each other.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotAnExport(f"it is not Python ({type(error).__name__})") from None
    there = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) and not _is_header(node):
            raise NotAnExport(f"line {node.lineno}: {ast.unparse(node)[:80]!r} is not of an export")
    network = nn.Sequential()
    with torch.device("meta"):
        for name, call in _parts(there.pop("Network", None)):
            layer = _made(call)
            if not isinstance(layer, nn.Module):
                raise NotAnExport(f"line {call.lineno}: {ast.unparse(call)[:80]!r} is no layer")
            network.add_module(name, layer)
    there.pop("load_network", None)
    _compare({name: _plain(node) for name, node in there.items()}, network)
    return network


def _is_header(node: ast.stmt) -> bool:
    """Whether a statement is a docstring or imports what an export needs."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Import(names=names):
            return {name.name for name in names} <= _IMPORTS
        case ast.ImportFrom(module=module, level=0):
            return module in _IMPORTS
    return False


def _parts(network: ast.AST | None) -> Iterable[tuple[str, ast.expr]]:
    """The names of the network's parts and the expressions that make them, as its constructor assigns them."""
    if not isinstance(network, ast.ClassDef):
        raise NotAnExport("it has no class Network")
    match [node for node in network.body if not isinstance(node, ast.Expr)]:
        case [ast.FunctionDef(name="__init__", body=[begun, *assignments])]:
            pass
        case _:
            raise NotAnExport(f"line {network.lineno}: class Network has more than a constructor")
    if ast.unparse(network).splitlines()[0] != "class Network(nn.Sequential):":
        raise NotAnExport(f"line {network.lineno}: class Network is not a plain nn.Sequential")
    if ast.unparse(begun) != "super().__init__()":
        raise NotAnExport(f"line {begun.lineno}: the constructor does not begin with super().__init__()")
    for node in assignments:
        match node:
            case ast.Assign(targets=[ast.Attribute(value=ast.Name(id="self"), attr=name)], value=value):
                yield name, value
            case _:
                raise NotAnExport(f"line {node.lineno}: {ast.unparse(node)[:80]!r} makes no part of the network")


def _made(node: ast.expr) -> Any:
    """What an expression stands for: a layer, a tensor to be filled, a dtype or a plain value."""
    match node:
        case ast.Call(func=function, args=arguments, keywords=keywords):
            make = _maker(function)
            values = [_made(argument) for argument in arguments]
            named = {str(keyword.arg): _made(keyword.value) for keyword in keywords}
            try:
                return make(*values, **named)
            except _REFUSALS as error:
                reason = " ".join(str(error).split())[:200]
                raise NotAnExport(f"line {node.lineno}: {ast.unparse(function)} refuses ({reason})") from None
        case ast.Attribute(value=ast.Name(id="torch"), attr=name) if isinstance(
            getattr(torch, name, None), torch.dtype
        ):
            return getattr(torch, name)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        raise NotAnExport(f"line {node.lineno}: {ast.unparse(node)[:80]!r} is no plain value") from None


def _maker(function: ast.expr) -> Any:
    """The constructor that a call names: a layer of ``torch.nn``, one of this package, or that of a tensor."""
    match function:
        case ast.Name(id=name) if name in _OWN:
            return _OWN[name]
        case ast.Attribute(value=ast.Name(id="nn"), attr="Parameter"):
            return nn.Parameter
        case ast.Attribute(value=ast.Name(id="torch"), attr="empty"):
            return torch.empty
        case ast.Attribute(value=ast.Name(id="nn"), attr=name):
            kind = getattr(nn, name, None)
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                return kind
    raise NotAnExport(f"line {function.lineno}: {ast.unparse(function)[:80]!r} is no layer that an export has")


def _compare(found: dict[str, str], network: nn.Module) -> None:
    """Check that the classes in the file compute what this package's classes of the same names do."""
    expected = {node.name: _plain(node) for text in definitions(network) for node in ast.parse(text).body}  # type: ignore[attr-defined]
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise NotAnExport(f"its {name} is not the one that this version of greenprune writes")


def _plain(node: ast.AST) -> str:
    """A definition without its docstrings and its place in the file."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:]
    return ast.dump(node)
