"""Small YAML files into frozen dataclasses, with one line that names what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import TypeVar

import jsonargparse
import yaml

from greenprune.config import ConfigError, load_yaml, plain_message

Settings = TypeVar("Settings")


def read_settings(path: Path, cls: type[Settings], what: str) -> Settings:
    """Read a YAML mapping into a dataclass.

    Args:
        path: The file.
        cls: The dataclass; it validates itself, with :class:`ConfigError`.
        what: What the file is, as the user calls it: starts every message.

    Raises:
        ConfigError: The file cannot be read, or a key, type or value in it is wrong.
    """
    where = f"{what} {str(path)!r}"
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror}); expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: is not valid YAML: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: holds no keys; expected one YAML mapping")
    known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(f"{where}: {key}: unknown key; {hint}valid here: {', '.join(known)}")
        if value is None and type(None) not in typing.get_args(hints[key]):  # a key with nothing after it
            advice = "expected a value, or no such line to have the default"
            raise ConfigError(f"{where}: {key}: null is not valid; {advice}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode="greenprune")
    parser.add_class_arguments(cls, nested_key=None)
    try:
        # What is not given keeps the dataclass's default; what is null is there on purpose.
        parsed = parser.parse_object(values)
        return cls(**{key: parsed[key] for key in values})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {plain_message(error, hints.__getitem__)}") from None
