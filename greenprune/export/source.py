"""A plain network as a Python file that a person can read and that needs nothing but PyTorch to run."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from greenprune.export.plain import constructor_arguments
from greenprune.models.channels import named_steps

_WIDTH = 120
_READERS = {
    "safetensors": ("from safetensors.torch import load_file", "load_file(path)"),
    "torch": ("", 'torch.load(path, map_location="cpu", weights_only=True)'),
}


def module_source(network: nn.Sequential, about: str, *, reader: str, shapes: tuple[str, str]) -> str:
    """The text of a module with the network as a class ``Network`` and a function ``load_network``.

    Args:
        network: A plain network.
        about: What the network is, in one line.
        reader: How its tensors are stored: ``safetensors`` or ``torch``.
        shapes: Shape of the images and of the logits, as text.
    """
    import_reader, read = _READERS[reader]
    parts = [_render(_expression(part), f"self.{name} = ", "", indent=8) for name, part in named_steps(network)]
    body = "\n\n\n".join(definitions(network))
    needs = [
        "import math\n\n" if "math." in body else "",
        "import torch\n",
        f"{import_reader}\n" if import_reader else "",
        "from torch import Tensor, nn\n" if "Tensor" in body else "from torch import nn\n",
        "from torch.nn import functional\n" if "functional." in body else "",
    ]
    if "torch." not in re.sub(r"safetensors\.torch|from torch\.nn", "", body + read + "".join(parts)):
        needs.remove("import torch\n")
    header = f'"""{about}"""\n\nfrom __future__ import annotations\n\n{"".join(needs)}'
    network_class = f'''class Network(nn.Sequential):
    """From images {shapes[0]} to logits {shapes[1]}."""

    def __init__(self) -> None:
        super().__init__()
{chr(10).join(parts)}'''
    load = f'''def load_network(path: str) -> Network:
    """The network with the tensors of a file, ready for inference."""
    network = Network()
    network.load_state_dict({read})
    return network.eval()'''
    return "\n\n\n".join(text for text in (header.rstrip("\n"), body, network_class, load) if text) + "\n"


def definitions(network: nn.Module) -> list[str]:
    """The sources of the classes of the network that are not PyTorch's, with the functions that they call."""
    kinds = dict.fromkeys(type(module) for module in network.modules())
    own = [kind for kind in kinds if not kind.__module__.startswith("torch.")]
    functions = dict.fromkeys(function for kind in own for function in _called(kind))
    definitions = [*functions, *sorted(own, key=lambda kind: kind.__name__)]
    return [re.sub(r"  # noqa.*", "", inspect.getsource(found)).rstrip() for found in definitions]


def _called(kind: type) -> Iterable[Any]:
    """Functions of a class's own module that its code calls by name."""
    home = sys.modules[kind.__module__]
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    for node in ast.walk(tree):
        found = getattr(home, node.id, None) if isinstance(node, ast.Name) else None
        if inspect.isfunction(found) and found.__module__ == home.__name__:
            yield found


# Arguments that are shapes: as long as they are, also where their numbers are alike.
_SHAPES = ("normalized_shape", "unflattened_size")


@dataclass(frozen=True)
class _Call:
    """A call in the text: its name and its arguments, each with its keyword or an empty string."""

    name: str
    arguments: tuple[tuple[str, _Call | str], ...]


def _expression(value: Any) -> _Call | str:
    """The text that makes a module, a tensor to be filled, or a plain value."""
    if isinstance(value, nn.Sequential):
        return _Call("nn.Sequential", tuple(("", _expression(child)) for child in value))
    if isinstance(value, nn.Module):
        kind = type(value)
        prefix = "nn." if kind.__module__.startswith("torch.") else ""
        signature = inspect.signature(kind).parameters
        simplified = {
            name: _simplified(kind, name, argument) for name, argument in constructor_arguments(value).items()
        }
        arguments = tuple(
            ("" if _is_positional(signature[name]) else name, _expression(argument))
            for name, argument in simplified.items()
            if isinstance(argument, Tensor) or argument != signature[name].default
        )
        return _Call(prefix + kind.__name__, arguments)
    if isinstance(value, nn.Parameter):
        return _Call("nn.Parameter", (("", _expression(value.data)),))
    if isinstance(value, Tensor):
        shape = str(value.shape[0]) if value.dim() == 1 else repr(tuple(value.shape))
        dtype = (("dtype", str(value.dtype)),) if value.dtype != torch.float32 else ()
        return _Call("torch.empty", (("", shape), *dtype))
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _is_positional(parameter: inspect.Parameter) -> bool:
    """Whether an argument is written without its name: those that have no default, unless they must be named."""
    return parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY


def _simplified(kind: type[nn.Module], name: str, argument: Any) -> Any:
    """One number for a tuple of equal ones, where PyTorch's layers take it for the same."""
    if name in _SHAPES and len(argument) > 1:
        return argument
    if kind.__module__.startswith("torch.") and isinstance(argument, tuple) and len(set(argument)) == 1:
        return argument[0]
    return argument


def _render(call: _Call | str, before: str, after: str, indent: int) -> str:
    """A call on one line if it fits, else with an argument a line."""
    line = " " * indent + before + _inline(call) + after
    if isinstance(call, str) or not call.arguments or (len(line) <= _WIDTH and line.count("(") <= 4):
        return line
    inner = [_render(value, f"{name}=" if name else "", ",", indent + 4) for name, value in call.arguments]
    return "\n".join([" " * indent + before + call.name + "(", *inner, " " * indent + ")" + after])


def _inline(call: _Call | str) -> str:
    if isinstance(call, str):
        return call
    arguments = (f"{name}={_inline(value)}" if name else _inline(value) for name, value in call.arguments)
    return f"{call.name}({', '.join(arguments)})"
