"""A structure that a run is given: read from the run that found it, and kept as text in the config."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from greenprune.config import Config, ConfigError
from greenprune.surgery.structure import Operation, Structure, StructureMismatch

_TEXT = "remove "
_PART = re.compile(r"(?P<unit>[^\s\[\]]+)(?:\[(?P<channels>[0-9,-]+)\])?")
_MOST_CHANNELS = 1 << 20  # no layer has as many; a slip of the keyboard must not fill the memory
_EXPECTED = "expected a run's folder, its structure.json, or 'remove UNIT UNIT[CHANNELS] ...'"


def resolve_structure(config: Config) -> Config:
    """The config with ``model.structure`` as the text of what is removed, in place of the file that it names.

    The text is what the run's config.yaml and checkpoints hold: the run does not depend on the file any more, and what
    was read is part of what makes two runs the same.

    Raises:
        ConfigError: The file is missing, or is not a structure.
    """
    if config.model.structure is None:
        return config
    text = structure_text(given_structure(config))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, structure=text))


def given_structure(config: Config) -> Structure:
    """What is removed before training begins; an empty structure if nothing is.

    Raises:
        ConfigError: The file is missing, or is not a structure.
    """
    given = config.model.structure
    if given is None:
        return Structure()
    return _from_text(given) if given.startswith(_TEXT) else _read(Path(given))


def structure_text(structure: Structure) -> str | None:
    """The removals of a structure as text that is equal for two structures that leave the same of a network.

    Returns:
        ``remove`` and the removed blocks by name, then the sets of channels with the indices that each lost, such as
        ``remove stages.0.1 stages.1.0:hidden[0-3,7]``; None if nothing is removed.
    """
    blocks = structure.removed_blocks()
    channels: dict[str, set[int]] = {}
    for operation in structure.removed():
        if operation.channels is not None and operation.unit.rpartition(":")[0] not in blocks:
            channels.setdefault(operation.unit, set()).update(operation.channels)
    parts = [*sorted(blocks), *(f"{name}[{_ranges(channels[name])}]" for name in sorted(channels))]
    return _TEXT + " ".join(parts) if parts else None


def _ranges(indices: Iterable[int]) -> str:
    """Whole numbers as text, with those that follow on each other as ranges: 0-3,7."""
    spans: list[tuple[int, int]] = []
    for index in sorted(indices):
        if spans and index == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], index)
        else:
            spans.append((index, index))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def _from_text(text: str) -> Structure:
    operations = []
    for word in text.removeprefix(_TEXT).split():
        part = _PART.fullmatch(word)
        try:
            if part is None:
                raise ValueError(word)
            channels = None if part["channels"] is None else tuple(_indices(part["channels"]))
            values = {"action": "remove", "unit": part["unit"], "step": 0, "epoch": 0.0, "reason": "given"}
            operations.append(Operation.from_dict({**values, "channels": channels}))
        except ValueError:
            raise ConfigError(f"model.structure: {word!r} is not a unit; {_EXPECTED}") from None
    return Structure(operations)


def _indices(ranges: str) -> Iterator[int]:
    for span in ranges.split(","):
        first, _, last = span.partition("-")
        if int(last or first) >= _MOST_CHANNELS:
            raise ValueError(span)
        yield from range(int(first), int(last or first) + 1)


def _read(path: Path) -> Structure:
    file = path / "structure.json" if path.is_dir() else path
    try:
        text = structure_text(Structure.from_dict(json.loads(file.read_text())))
    except OSError as error:
        raise ConfigError(f"model.structure: cannot read {str(file)!r} ({error.strerror}); {_EXPECTED}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, StructureMismatch) else "not JSON"
        raise ConfigError(f"model.structure: {str(file)!r} is not a structure ({reason}); {_EXPECTED}") from None
    if text is None:
        raise ConfigError(f"model.structure: {str(file)!r} removes nothing; expected one with a removal, or null")
    return _from_text(text)
