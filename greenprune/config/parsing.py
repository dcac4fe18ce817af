"""The way from YAML and flags to a validated config, and back."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from greenprune.config.checked import ConfigError
from greenprune.config.fields import Config


class _Loader(yaml.SafeLoader):
    """YAML with the booleans and floats of version 1.2: ``precision: no`` is a word, ``lr: 5e-4`` a number.

    Nor is ``time: 4:00:00`` a number, to the base of sixty.

    As version 1.2 has it, a key that is given twice is an error, too; PyYAML would drop all that the first one holds.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"{key.value!r} is given twice, in lines {lines[key.value]} and {line}; expected each key once"
                    )
                lines[key.value] = line
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_INT = re.compile(r"^[-+]?(0b[01_]+|0[0-7_]*|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_FLOAT = re.compile(r"^([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that is a float in either version: a run named ``5e-4`` stays a name to every reader."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_yaml(text: str) -> Any:
    """Plain values from YAML as config files are written."""
    return yaml.load(text, _Loader)


set_loader("greenprune", load_yaml, exceptions=(yaml.YAMLError,))
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def config_parser(prog: str = "train.py") -> ArgumentParser:
    """The parser of a run's flags: ``--config FILE`` and one flag for each field, with its docstring as help."""
    parser = ArgumentParser(
        prog=prog,
        description="Train a gated network and remove what it does not need while it trains.",
        exit_on_error=False,
        parser_mode="greenprune",
    )
    parser.add_argument("--config", action="config", help="YAML file with one complete run; later flags override it")
    parser.add_class_arguments(Config, nested_key=None)
    sections = {name.partition(".")[0] for name in FIELDS if "." in name}
    for action in parser._actions:
        if action.dest in sections:  # a file for a section alone, which parse_config refuses: --config is the one file
            action.help = argparse.SUPPRESS
    return parser


def _fields(cls: type, prefix: str = "") -> dict[str, bool]:
    """All dotted field names of a config dataclass, and whether each may be null."""
    found: dict[str, bool] = {}
    for item in dataclasses.fields(cls):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if dataclasses.is_dataclass(default):
            found |= _fields(type(default), f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = "None" in str(item.type)
    return found


FIELDS = _fields(Config)
"""Dotted name of every field, and whether it may be null."""


def _read_file(path: Path) -> str:
    """A config file as plain YAML, checked to have known keys, to name what is wrong better than the parser does.

    Raises:
        ConfigError: The file is missing, is not YAML, or has a key that no field has.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {str(path)!r} ({error.strerror}); expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {str(path)!r} holds no fields; expected one YAML mapping with a complete run")
    known = list(FIELDS)
    sections = {name.split(".")[0] for name in known if "." in name}
    for key, value in values.items():
        if key in sections and isinstance(value, dict):
            for name, item in value.items():
                _check_key(f"{key}.{name}", known)
                _check_null(f"{key}.{name}", item)
                if f"{key}.{name}" in values:  # YAML sees two keys, and the parser would take the later one
                    raise ConfigError(f"{key}.{name}: given by itself and in {key}; expected each key once")
        elif key in sections:
            valid = [name for name in known if name.startswith(f"{key}.")]
            raise ConfigError(f"{key}: {value!r} is not valid; expected a mapping of {', '.join(valid)}")
        else:
            _check_key(str(key), known)
            _check_null(str(key), value)
    return yaml.dump(values, Dumper=_Dumper)  # in ASCII, for the parser also looks for a file of that name


def _check_null(key: str, value: object) -> None:
    """Refuse null (a key with nothing after it) where a field needs a value."""
    if value is None and not FIELDS[key]:
        raise ConfigError(f"{key}: null is not valid; expected a value, or no such line to have the default")


def _check_key(key: str, known: list[str]) -> None:
    if key in known:
        return
    section = key.split(".", maxsplit=1)[0]
    siblings = [name for name in known if name.startswith(f"{section}.")] if "." in key else []
    top = sorted({name.split(".")[0] for name in known})
    if key in top:
        fields = ", ".join(name for name in known if name.startswith(f"{key}."))
        raise ConfigError(f"{key}: a section, which takes no value of its own; expected one of its fields: {fields}")
    siblings = siblings or top
    close = difflib.get_close_matches(key, known if "." in key else [*top, *known], n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else ""
    shown = key if key.isprintable() and key.strip() else repr(key)
    raise ConfigError(f"{shown}: unknown key; {hint}valid here: {', '.join(siblings)}")


def check_field(key: str) -> None:
    """Check that a config has a field of this dotted name.

    Raises:
        ConfigError: It has none; the message names the closest one.
    """
    _check_key(key, list(FIELDS))


def declared_type(key: str) -> Any:
    """The type of a config's field, by its dotted name."""
    section, dot, name = key.partition(".")
    hints = typing.get_type_hints(Config)
    return typing.get_type_hints(hints[section])[name] if dot else hints[section]


def _with_files_read(args: list[str]) -> list[str]:
    """The arguments with what each config file holds in place of its path, and every flag known to be a field's.

    The parser would read a file once more, which a pipe (``--config <(...)``) has no second time, and in the locale's
    encoding.
    """
    known = list(FIELDS)
    read = []
    rest = iter(args)
    for arg in rest:
        path = next(rest, None) if arg == "--config" else None
        if arg.startswith("--config="):
            path = arg.removeprefix("--config=")
        if path is not None:
            read.append(f"--config={_read_file(Path(path))}")
            continue
        if arg.startswith("--") and arg not in ("--help", "--config", "--print_config"):
            _check_key(arg[2:].split("=")[0].split("+")[0], known)
        read.append(arg)
    return read


def parse_config(args: list[str], prog: str = "train.py") -> Config:
    """Turn command-line arguments, with the YAML files they name, into a validated config.

    Args:
        args: The arguments without the program's name.
        prog: Program name for the help text.

    Raises:
        ConfigError: Any key, type or value is wrong.
        SystemExit: ``--help`` was asked for (code 0).
    """
    parser = config_parser(prog)
    try:
        namespace = parser.parse_args(_with_files_read(args))
        config = parser.instantiate(namespace)
    except ConfigError:
        raise
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ConfigError(plain_message(error, declared_type)) from None
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        raise cause if isinstance(cause, ConfigError) else ConfigError(plain_message(error, declared_type)) from None
    values = {item.name: config[item.name] for item in dataclasses.fields(Config)}
    return Config(**values)


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a complete run from a YAML file, with fields given by their dotted names replaced.

    Raises:
        ConfigError: Any key, type or value is wrong.
    """
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (overrides or {}).items()}
    flags = [f"--{key}={word}" for key, word in words.items()]
    return parse_config([f"--config={path}", *flags])


def dump_config(config: Config) -> str:
    """The config as YAML that :func:`load_config` reads back."""
    return yaml.dump(config.to_dict(), Dumper=_Dumper, sort_keys=False)


# What a parser says of a field that may be of several types: those, why it is none of them, one by one, and what it is.
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)"
)


# And of what is no list.
_NOT_A_LIST = re.compile(r"([\w.]+): Expected a <class 'list'>\. Got value: ?(.*)")

# What may be in a list that has no choice of words, by type: an example, and what such things are called.
_ITEMS = {int: ("0, 1", "whole numbers"), float: ("0.3, 0.5", "numbers"), str: ("TEXT", "texts")}
_ITEMS |= {dict: ("{seed: 1}", "mappings"), Any: ("0, 1", "values for each field")}


def plain_message(error: BaseException, declared: Callable[[str], Any]) -> str:
    """One line from a parser's message, without its own preamble.

    Args:
        error: What the parser raised.
        declared: Says of what type a key's value has to be.
    """
    text = " ".join(str(error).split())
    found = re.search(r'[Kk]ey "?([\w.]+)"?:? ?(.*)', text)
    text = f"{found[1]}: {found[2]}" if found else text
    if no_list := _NOT_A_LIST.fullmatch(text):
        return _of_no_list(no_list[1], no_list[2], declared(no_list[1]))
    text = re.sub(r"Expected an? typing\.Literal\[(.*?)\]", r"Expected one of \1", text)
    return _UNION.sub(_of_several_types, re.sub(r"Expected an? <class '(\w+)'>", r"Expected a value of type \1", text))


def _of_several_types(found: re.Match[str]) -> str:
    names = ["null" if name == "NoneType" else name for name in re.findall(r"<class '(\w+)'>", found[1])]
    return f"Expected a value of type {' or '.join(names)}. Got value: {found[2]}"


def _of_no_list(key: str, given: str, declared: Any) -> str:
    """What to say of a value that stands where a list belongs, or where one does for each key of a mapping."""
    item = typing.get_args(declared)[-1]
    if typing.get_origin(declared) is dict:
        (item,) = typing.get_args(item)
    words = [str(word) for word in typing.get_args(item)] if typing.get_origin(item) is typing.Literal else []
    if words:
        example, items = given if given in words else words[0], ", ".join(words)
    else:
        example, items = _ITEMS[typing.get_origin(item) or item]
    return f"{key}: {_as_given(given)} is not valid; expected a list such as '[{example}]' of {items}"


def _as_given(text: str) -> str:
    """A value as other messages show it, text in quotes, from what a parser has made of it."""
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        value = text
    return "null" if text == "None" else repr(text) if isinstance(value, str) or value is None else text
