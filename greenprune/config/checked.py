"""What every part of the configuration refuses: a value that is not of its field's declared type."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Something that the user can mend; its message is all they need to see (exit code 2).

    Attributes:
        known_to_all: Whether every process of the run has raised it, so that rank 0 can speak for all.
        ended_run: Whether it ended a run that had begun, as an image does that cannot be read (exit code 1).
    """

    known_to_all = False
    ended_run = False


def told_by_flags(error: UserError, section: str, **flags: str) -> UserError:
    """An error about a section of a config, for a command that has flags of its own in place of its fields.

    Args:
        error: What checking the section raised.
        section: The section.
        flags: For fields of it, the flag that stands for each.
    """
    told = str(error)
    for field, flag in flags.items():
        told = told.replace(f"{section}.{field}", flag)
    return UserError(told)


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key, the value and what is valid."""


@dataclasses.dataclass(frozen=True)  # or jsonargparse would take its subclasses for classes to choose from
class Checked:
    """A dataclass whose fields are what they are declared to be, whoever makes it: files and flags, or Python.

    Subclasses say in :meth:`_check` what is valid beyond types. A tuple where a list is declared becomes one.
    """

    def __post_init__(self) -> None:
        prefix = type(self).__name__.removesuffix("Config").lower()
        for name, declared in _declared(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if isinstance(value, tuple) and get_origin(declared) is list:
                value = list(value)
                object.__setattr__(self, name, value)  # it is frozen, and not yet made
            if not _is(value, declared):
                key = f"{prefix}.{name}" if prefix else name
                raise ConfigError(f"{key}: {value!r} is not valid; expected {_words(declared)}")
        self._check()

    def _check(self) -> None:
        """Refuse values of the right type that are not valid."""


@functools.cache
def _declared(of: type) -> dict[str, Any]:
    hints = get_type_hints(of)
    return {field.name: hints[field.name] for field in dataclasses.fields(of)}


_NUMBERS = {int: numbers.Integral, float: numbers.Real}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def _is(value: object, declared: Any) -> bool:
    """Whether a value is of a declared type: a class, ``Literal``, ``list`` or a union of them."""
    origin = get_origin(declared)
    if origin is Literal:
        return value in get_args(declared)
    if origin in (Union, types.UnionType):
        return any(_is(value, one) for one in get_args(declared))
    if origin is list:
        return isinstance(value, list) and all(_is(item, get_args(declared)[0]) for item in value)
    if declared in _NUMBERS:
        return isinstance(value, _NUMBERS[declared]) and not isinstance(value, bool)
    return isinstance(value, declared)


def _words(declared: Any) -> str:
    origin = get_origin(declared)
    if origin is Literal:
        return ", ".join(map(str, get_args(declared)))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, get_args(declared)))
    if origin is list:
        return f"a list of {_words(get_args(declared)[0])}"
    return _WORDS.get(declared, f"a {getattr(declared, '__name__', declared)}")
